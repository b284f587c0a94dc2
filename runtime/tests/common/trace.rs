//! System calls as they are made: a job's processes under ptrace, for tests of what the kernel is
//! asked to write where. All calls of a [`Tracer`] come from the thread that made it.

#![expect(unsafe_code, reason = "ptrace and waitpid")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A system call that is about to be made.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The calling process.
    pub process: u32,
    pub number: libc::c_long,
    arguments: [u64; 6],
}

/// Processes with all their threads, and those that they start from now on.
pub struct Tracer {
    /// Threads, with the processes that they belong to.
    threads: BTreeMap<i32, u32>,
}

/// New processes and threads are traced from their first instruction.
const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;

fn ptrace(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: requests that are used here either take numbers or write to what `data` points to,
    // which the caller made for that.
    let done = unsafe { libc::ptrace(request, thread, address, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tracer {
    /// Starts tracing; an error where that is not allowed.
    pub fn of(processes: &[u32]) -> io::Result<Self> {
        let mut threads = BTreeMap::new();
        for &process in processes {
            for entry in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
                let name = entry.file_name();
                let thread = name.to_str().and_then(|name| name.parse().ok()).expect("a number");
                ptrace(libc::PTRACE_SEIZE, thread, 0, OPTIONS as usize)?;
                ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
                threads.insert(thread, process);
            }
        }
        Ok(Self { threads })
    }

    /// Lets everything that has stopped go on, and shows each system call before it is made. False
    /// when no thread is left.
    pub fn go_on(&mut self, mut see: impl FnMut(Call)) -> bool {
        let threads: Vec<i32> = self.threads.keys().copied().collect();
        let mut any = false;
        for thread in threads {
            let mut status = 0;
            let flags = libc::WNOHANG | libc::__WALL;
            // SAFETY: status is a valid place for the result.
            let got = unsafe { libc::waitpid(thread, &raw mut status, flags) };
            if got < 0 || got == thread && !libc::WIFSTOPPED(status) {
                self.threads.remove(&thread);
            } else if got == thread {
                any = true;
                self.stopped(thread, status, &mut see);
            }
        }
        if !any {
            std::thread::sleep(Duration::from_micros(5));
        }
        !self.threads.is_empty()
    }

    fn stopped(&mut self, thread: i32, status: i32, see: &mut impl FnMut(Call)) {
        let signal = libc::WSTOPSIG(status);
        let event = status >> 16;
        let mut pass_on = 0;
        if signal == libc::SIGTRAP | 0x80 {
            if let Some((number, arguments)) = entered(thread) {
                see(Call { process: self.threads[&thread], number, arguments });
            }
        } else if [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_VFORK, libc::PTRACE_EVENT_CLONE]
            .contains(&event)
        {
            let mut started: libc::c_ulong = 0;
            let at = (&raw mut started).addr();
            if ptrace(libc::PTRACE_GETEVENTMSG, thread, 0, at).is_ok() {
                let process = process_of(started as i32).unwrap_or(started as u32);
                self.threads.insert(started as i32, process);
            }
        } else if event == 0 {
            pass_on = signal as usize;
        }
        // One that was killed in the meantime is seen at the next turn.
        let _ = ptrace(libc::PTRACE_SYSCALL, thread, 0, pass_on);
    }
}

/// The process that a thread belongs to.
fn process_of(thread: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// The call before which a thread has stopped; `None` behind one.
fn entered(thread: i32) -> Option<(libc::c_long, [u64; 6])> {
    // SAFETY: all of it are numbers.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let (bytes, at) = (size_of_val(&info), (&raw mut info).addr());
    ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, bytes, at).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: the operation says that this member was written.
    let entry = unsafe { info.u.entry };
    Some((entry.nr as libc::c_long, entry.args))
}

impl Call {
    /// Whether bytes of a file, a pipe or a socket are asked for.
    pub fn is_a_read(self) -> bool {
        [libc::SYS_read, libc::SYS_pread64].contains(&self.number) || self.reads_in_parts()
    }

    fn reads_in_parts(self) -> bool {
        [libc::SYS_readv, libc::SYS_preadv, libc::SYS_preadv2].contains(&self.number)
    }

    /// Whether the kernel is asked to write later, when nobody looks.
    fn is_asynchronous(self) -> bool {
        [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_submit]
            .contains(&self.number)
    }

    /// Where the kernel is asked to write, as addresses and lengths.
    fn fills(self) -> Vec<(u64, u64)> {
        let arguments = self.arguments;
        let one = |at: usize| vec![(arguments[at], 1)];
        match self.number {
            libc::SYS_read | libc::SYS_pread64 | libc::SYS_recvfrom | libc::SYS_getdents64 => {
                vec![(arguments[1], arguments[2])]
            }
            libc::SYS_readv | libc::SYS_preadv | libc::SYS_preadv2 => {
                self.parts(arguments[1], arguments[2])
            }
            libc::SYS_process_vm_readv => self.parts(arguments[1], arguments[2]),
            libc::SYS_recvmsg => {
                // Two words of address, then the list of parts and its length.
                let list = self.words(arguments[1] + 16, 2);
                list.first().map_or(Vec::new(), |at| self.parts(*at, list[1]))
            }
            libc::SYS_getrandom | libc::SYS_getcwd => vec![(arguments[0], arguments[1])],
            libc::SYS_readlinkat => vec![(arguments[2], arguments[3])],
            libc::SYS_fstat | libc::SYS_clock_gettime | libc::SYS_epoll_pwait => one(1),
            libc::SYS_newfstatat | libc::SYS_ioctl => one(2),
            libc::SYS_prlimit64 => one(3),
            libc::SYS_statx => one(4),
            _ => Vec::new(),
        }
    }

    /// A list of addresses and lengths in the calling process.
    fn parts(self, at: u64, count: u64) -> Vec<(u64, u64)> {
        let words = self.words(at, 2 * count.min(1024) as usize);
        words.chunks_exact(2).map(|part| (part[0], part[1])).collect()
    }

    fn words(self, at: u64, count: usize) -> Vec<u64> {
        let mut bytes = vec![0; count * 8];
        let memory = File::open(format!("/proc/{}/mem", self.process));
        match memory.and_then(|memory| memory.read_exact_at(&mut bytes, at)) {
            Ok(()) => bytes.chunks_exact(8).map(|word| word.try_into().expect("eight")),
            Err(_) => return Vec::new(),
        }
        .map(u64::from_ne_bytes)
        .collect()
    }

    /// Whether the kernel is asked to write into a segment, now or later.
    pub fn fills_a_segment(self) -> bool {
        let fills = self.fills();
        if fills.is_empty() {
            return self.is_asynchronous();
        }
        let segments = segments_of(self.process);
        let meets = |(at, len): &(u64, u64)| {
            let end = at.saturating_add((*len).max(1));
            segments.iter().any(|segment| *at < segment.end && segment.start < end)
        };
        fills.iter().any(meets)
    }
}

/// Where a process has segments mapped.
pub fn segments_of(process: u32) -> Vec<Range<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let lines = maps.lines().filter(|line| line.contains("/memfd:"));
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    lines.filter_map(range).collect()
}
