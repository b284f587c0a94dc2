//! Processes as tests need them: held by a descriptor while they are looked at or signalled, so
//! that a number that the kernel has given to somebody else in the meantime is never hit.

#![expect(unsafe_code, reason = "signals, process groups, pidfd_open, pidfd_send_signal")]

use super::{Random, wait_for};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use testudo::shm::header::WorkerHeader;
use testudo::shm::primitive::Ordering;
use testudo::supervisor::launch::{Running, View};

/// A process that cannot be mistaken for another one.
pub struct Held {
    pub pid: u32,
    fd: OwnedFd,
}

impl Held {
    /// The process of this number, if it is a child of `parent`, or of a supervisor of that.
    pub fn child_of(pid: u32, parent: u32) -> Option<Self> {
        // SAFETY: plain system call.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor was just returned by the kernel.
        let held = Self { pid, fd: unsafe { OwnedFd::from_raw_fd(fd as i32) } };
        // Looked at after it is held: what is read now belongs to the process that is held.
        is_of(stat(pid)?.parent, parent).then_some(held)
    }

    /// Sends a signal; false when the process is gone.
    pub fn signal(&self, signal: i32) -> bool {
        let fd = self.fd.as_raw_fd();
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: plain system call on an open descriptor.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) == 0 }
    }

    /// True once it has ended (it may still be a zombie).
    pub fn has_ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }
}

/// A line of /proc/PID/stat.
pub struct Stat {
    pub name: String,
    pub state: char,
    pub parent: u32,
    pub group: i32,
    pub session: i32,
}

/// What the kernel says about a process; `None` when there is none.
pub fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = text.rsplit_once(')')?;
    let mut fields = tail.split_whitespace();
    Some(Stat {
        name: head.split_once('(')?.1.to_owned(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
        session: fields.next()?.parse().ok()?,
    })
}

/// Clock ticks that a process has spent on processors.
pub fn ticks(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Nanoseconds that a process's first thread has spent on processors.
pub fn cpu_ns(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The children of a process, by number.
pub fn children(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("/proc can be listed").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|stat| stat.parent == parent)).collect()
}

/// Whether a process is `launched`, or a supervisor that it has started.
fn is_of(pid: u32, launched: u32) -> bool {
    let is_supervisor = |stat: Stat| stat.name == "testudo-sup" && stat.parent == launched;
    pid == launched || stat(pid).is_some_and(is_supervisor)
}

/// The supervisor of a job that was launched as a program, if it lives.
pub fn supervisor_of(launched: u32) -> Option<u32> {
    let is_supervisor =
        |pid: &u32| stat(*pid).is_some_and(|stat| stat.name == "testudo-sup" && stat.state != 'Z');
    children(launched).into_iter().find(is_supervisor)
}

/// The workers of a job: children of the launched process, or of its supervisor.
pub fn workers_of(launched: u32) -> Vec<u32> {
    let parents: Vec<u32> = supervisor_of(launched).into_iter().chain([launched]).collect();
    let is_worker = |pid: &u32| {
        stat(*pid).is_some_and(|stat| stat.name.starts_with("testudo-w") && stat.state != 'Z')
    };
    parents.into_iter().flat_map(children).filter(is_worker).collect()
}

/// Steps that each worker of a job has committed, by worker: from the first pages of their
/// segments, which the job's keeper holds.
pub fn commits(launched: u32) -> BTreeMap<usize, u64> {
    let entries = std::fs::read_dir(format!("/proc/{launched}/fd")).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| {
        let link = std::fs::read_link(entry.path()).ok()?;
        let name = link.to_str()?.strip_prefix("/memfd:")?;
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        let worker = name.rsplit_once("-w")?.1.parse().ok()?;
        let mut word = [0; 8];
        let at = std::mem::offset_of!(WorkerHeader, commits) as u64;
        std::fs::File::open(entry.path()).ok()?.read_exact_at(&mut word, at).ok()?;
        Some((worker, u64::from_ne_bytes(word)))
    };
    entries.filter_map(of).collect()
}

/// A number of KiB in /proc/PID/status, such as VmRSS.
pub fn status_kib(pid: u32, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Signals that wait for a process, as a mask.
pub fn pending_signals(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// How many descriptors a process has open.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The threads of a process, with their names.
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let thread = |entry: std::fs::DirEntry| {
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, name.trim_end().to_owned()))
    };
    entries.filter_map(thread).collect()
}

/// Has a program killed when the thread that starts it ends: a test program that is killed leaves
/// nothing behind.
pub fn end_with_us(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let end = || {
        // SAFETY: plain system call, allowed between fork and exec.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        Ok(())
    };
    // SAFETY: the closure only makes that call.
    unsafe { command.pre_exec(end) };
}

/// Has the kernel refuse a call to a program and all that it starts, with this error: what old
/// kernels and the sandboxes of some containers do.
pub fn refuse(command: &mut std::process::Command, call: libc::c_long, error: i32) {
    use std::os::unix::process::CommandExt;
    let filter = move || {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let refuse = libc::SECCOMP_RET_ERRNO | error as u32;
        let mut steps = [
            // The call's number stands first in what the filter sees.
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
        // SAFETY: plain system calls, allowed between fork and exec; the program lives through the
        // second one.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure only makes these calls.
    unsafe { command.pre_exec(filter) };
}

/// Signals all processes of the group that a child of ours leads.
pub fn signal_group(leader: u32, signal: i32) {
    let group = stat(leader).map(|stat| stat.group);
    assert_eq!(group, Some(leader as i32), "not the leader of a group of its own");
    // SAFETY: plain system call on a group whose leader is a child of ours that was not waited for.
    unsafe { libc::kill(-(leader as i32), signal) };
}

/// Has a process refused to write beyond so many bytes of any file.
pub fn limit_file_size(pid: u32, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let none = std::ptr::null_mut();
    // SAFETY: limit is a valid place that is only read.
    let done = unsafe { libc::prlimit(pid as i32, libc::RLIMIT_FSIZE, &raw const limit, none) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Asks the kernel to read no bytes to an address.
pub fn read_nothing_to(address: u64) {
    let null = std::fs::File::open("/dev/null").expect("it is always there");
    let at = std::ptr::without_provenance_mut::<libc::c_void>(address as usize);
    // SAFETY: nothing is read, so nothing is written.
    unsafe { libc::read(null.as_raw_fd(), at, 0) };
}

/// Our own process group and session.
pub fn own_group_and_session() -> (i32, i32) {
    // SAFETY: plain system calls about ourselves.
    unsafe { (libc::getpgid(0), libc::getsid(0)) }
}

/// Signals the process that is a worker of a job in this program right now.
pub fn signal_worker(header: &WorkerHeader, signal: i32) -> bool {
    let pid = header.pid.load(Ordering::Acquire);
    Held::child_of(pid, std::process::id()).is_some_and(|held| held.signal(signal))
}

/// Disturbs the workers of a job, never one that has not committed since it was last disturbed (the
/// restart budget is for those that get nothing done).
pub struct Disturber<'a> {
    running: &'a Running,
    view: &'a View,
    /// Process and commits of each worker when it was last killed.
    last: Vec<(u32, u64)>,
    random: Random,
    pub kills: usize,
}

impl<'a> Disturber<'a> {
    pub fn new(running: &'a Running, view: &'a View, seed: u64) -> Self {
        let last = vec![(0, 0); view.workers.len()];
        Self { running, view, last, random: Random::new(seed), kills: 0 }
    }

    /// Waits until a worker has committed in its present life; false when the job is over before.
    pub fn settle(&self, worker: usize) -> bool {
        let header = self.view.workers[worker];
        wait_for("a commit of a worker that was restarted", || {
            let (pid, commits) = self.last[worker];
            let is_new = header.pid.load(Ordering::Acquire) != pid;
            let over = self.running.is_over();
            let ready = is_new && header.commits.load(Ordering::Acquire) > commits;
            (over || ready).then_some(!over)
        })
    }

    /// Kills one worker, once it has settled.
    pub fn kill(&mut self, worker: usize) {
        if self.settle(worker) {
            self.pause();
            self.kill_now(worker);
        }
    }

    /// Kills a worker whatever it does.
    pub fn kill_now(&mut self, worker: usize) {
        self.end_now(worker, libc::SIGKILL);
    }

    /// Ends a worker by a signal that it does not survive.
    pub fn end_now(&mut self, worker: usize, signal: i32) {
        let header = self.view.workers[worker];
        self.last[worker].0 = header.pid.load(Ordering::Acquire);
        if signal_worker(header, signal) {
            self.kills += 1;
        }
        // Whatever it still committed while the signal was on its way does not count as progress of
        // its successor.
        let pid = self.last[worker].0;
        wait_for("the end of a killed worker", || {
            let ended = stat(pid).is_none_or(|stat| stat.state == 'Z');
            let replaced = header.pid.load(Ordering::Acquire) != pid;
            (ended || replaced || self.running.is_over()).then_some(())
        });
        self.last[worker].1 = header.commits.load(Ordering::Acquire);
    }

    /// Kills workers at random.
    pub fn kill_randomly(&mut self, times: usize) {
        for _ in 0..times {
            let worker = self.random.below(self.view.workers.len() as u64) as usize;
            self.kill(worker);
        }
    }

    /// Stops a random worker for a while; then it goes on, or is killed where it stands.
    pub fn stop_randomly(&mut self, times: usize) {
        for _ in 0..times {
            let worker = self.random.below(self.view.workers.len() as u64) as usize;
            if !self.settle(worker) {
                return;
            }
            let header = self.view.workers[worker];
            signal_worker(header, libc::SIGSTOP);
            std::thread::sleep(Duration::from_millis(self.random.below(8)));
            if self.random.below(3) == 0 {
                self.kill_now(worker);
            } else {
                signal_worker(header, libc::SIGCONT);
            }
        }
    }

    /// Lets a little of the job pass, so that kills hit all of it.
    fn pause(&mut self) {
        let nanos = self.random.below(2_000_000);
        if nanos > 200_000 {
            std::thread::sleep(Duration::from_nanos(nanos));
        }
    }
}
