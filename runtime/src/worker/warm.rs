//! What a standby does ahead of time, so that a take-over waits for nothing: pages of data and code
//! in the page tables, and a hold on the process that it may have to end.
//!
//! Called by `standby`; `attach` reads the first pages of groups where they are at hand.

#![expect(unsafe_code, reason = "advice on our own memory, descriptors of processes")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use testudo_shm::arena::{Access, Arena};
use testudo_shm::fault::SetupError;
use testudo_shm::primitive::prefetch;
use testudo_shm::segment::PAGE;

/// Brings in what there is of the first `until` bytes of a segment that is mapped whole at an arena
/// offset. Holes stay holes: an empty page of a segment is a page as well.
pub(super) fn data(arena: &Arena, fd: BorrowedFd<'_>, until: usize, at: usize) {
    let seek = |from: usize, whence: libc::c_int| {
        // SAFETY: a plain system call; nobody reads through the descriptor's own position.
        let found = unsafe { libc::lseek(fd.as_raw_fd(), from as libc::off_t, whence) };
        usize::try_from(found).ok()
    };
    let mut next = 0;
    while let Some(data) = seek(next, libc::SEEK_DATA).filter(|data| *data < until) {
        let hole = seek(data, libc::SEEK_HOLE).unwrap_or(until).clamp(data + PAGE, until);
        arena.populate(at + data, hole - data);
        next = hole;
    }
}

/// Bytes of a group's first page that attaching reads: the heap's words and the first roots.
const FETCHED: usize = 1024;

/// Read-only views of groups' first pages, one behind the other, all of them in the page tables.
/// The pages themselves are mapped in the arena as well, where none of them is brought in.
#[derive(Debug, Default)]
pub(super) struct Fronts {
    /// Lives as long as the process: groups read there.
    views: Option<&'static Arena>,
    /// Where in them, by the groups' arena offsets.
    places: HashMap<usize, usize>,
}

impl Fronts {
    /// Room for as many.
    pub(super) fn reserve(count: usize) -> Result<Self, SetupError> {
        let views = (count > 0).then(|| Arena::reserve(count * PAGE)).transpose()?;
        let views = views.map(|views| &*Box::leak(Box::new(views)));
        Ok(Self { views, places: HashMap::with_capacity(count) })
    }

    /// Maps the first page of the group that lies at an arena offset.
    pub(super) fn add(&mut self, fd: BorrowedFd<'_>, at: usize) -> Result<(), SetupError> {
        if let Some(views) = self.views {
            let place = self.places.len() * PAGE;
            views.map(fd, 0, PAGE, place, Access::Peer)?;
            views.populate(place, PAGE);
            self.places.insert(at, place);
        }
        Ok(())
    }

    /// Asks for what attaching reads of one: it lies in the cache of the dead one's core.
    pub(super) fn fetch(&self, at: usize) {
        const LINE: usize = 64;
        if let Some(front) = self.of(at) {
            (0..FETCHED / LINE).for_each(|line| prefetch(front.wrapping_add(line * LINE)));
        }
    }

    /// Where the first page of the group at an arena offset is mapped.
    pub(super) fn place(&self, at: usize) -> Option<(&'static Arena, usize)> {
        Some((self.views?, *self.places.get(&at)?))
    }

    /// The first page of the group at an arena offset.
    pub(super) fn of(&self, at: usize) -> Option<*mut u8> {
        self.place(at).map(|(views, place)| views.at(place))
    }
}

/// Brings in the code of the program and its libraries.
pub(super) fn code() {
    unsafe extern "C" fn bring(
        info: *mut libc::dl_phdr_info,
        _: libc::size_t,
        _: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the loader hands in a valid description, with so many program headers.
        let (base, headers) = unsafe {
            let info = &*info;
            (info.dlpi_addr, std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()))
        };
        for part in headers.iter().filter(|part| part.p_type == libc::PT_LOAD) {
            let from = (base + part.p_vaddr) as usize & !(PAGE - 1);
            let end = ((base + part.p_vaddr + part.p_memsz) as usize).next_multiple_of(PAGE);
            let at = std::ptr::without_provenance_mut::<libc::c_void>(from);
            // SAFETY: advice on a mapped part of the program; nothing in it changes.
            unsafe { libc::madvise(at, end - from, libc::MADV_POPULATE_READ) };
        }
        0
    }
    // SAFETY: the callback keeps nothing and calls nothing back.
    unsafe { libc::dl_iterate_phdr(Some(bring), std::ptr::null_mut()) };
}

/// Bytes of stack and heap that attaching and the first steps take.
const SOON: usize = 128 << 10;

/// Brings in stack and heap as far as the first steps need them.
#[inline(never)]
pub(super) fn memory() {
    std::hint::black_box(&mut [1u8; SOON]);
    let boxes: Vec<Box<[u8; 512]>> = (0..SOON / 512).map(|_| Box::new([1; 512])).collect();
    std::hint::black_box(&boxes);
}

/// A process that is held by a descriptor: its number alone may be another's by the time.
pub(super) struct Process {
    pub(super) pid: u32,
    /// Its folder under /proc, good as a pidfd as well.
    folder: OwnedFd,
    /// The list of its threads.
    tasks: OwnedFd,
    /// Whether the list says how many there are without being read.
    is_counted: bool,
}

/// `PF_EXITING` of the kernel: the thread runs no code of its program any more.
const EXITING: u64 = 0x4;

impl Process {
    /// Holds a process. `None` when there is none of that number, or no /proc.
    pub(super) fn open(pid: u32) -> Option<Self> {
        let open = |path: &str| {
            use std::os::unix::fs::OpenOptionsExt;
            let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
            File::options().read(true).custom_flags(flags).open(path).map(OwnedFd::from)
        };
        let folder = open(&format!("/proc/{pid}")).ok()?;
        let tasks = open(&format!("/proc/self/fd/{}/task", folder.as_raw_fd())).ok()?;
        let mut this = Self { pid, folder, tasks, is_counted: false };
        this.is_counted = this.count_threads() > 0;
        Some(this)
    }

    /// Holds a process that has died already. `None` when it is gone altogether: what has its
    /// number then is not about to end.
    pub(super) fn open_dead(pid: u32) -> Option<Self> {
        let process = Self::open(pid)?;
        process
            .thread(&pid.to_string())
            .is_some_and(|(_, flags)| flags & EXITING != 0)
            .then_some(process)
    }

    /// Ends a process whose first thread has died, and returns when no other thread of it can run
    /// any code of its own (R2). Its memory may take much longer to go.
    pub(super) fn end(&self) {
        let none = std::ptr::null::<libc::siginfo_t>();
        let fd = self.folder.as_raw_fd();
        // SAFETY: a plain system call on a descriptor that we own. Who is gone cannot be hit.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) };
        // Nearly always there was one thread.
        if self.is_counted && self.count_threads() <= 1 {
            return;
        }
        let threads = || {
            let entries = std::fs::read_dir(format!("/proc/self/fd/{}", self.tasks.as_raw_fd()));
            entries.into_iter().flatten().flatten()
        };
        let runs = |entry: std::fs::DirEntry| {
            let thread = entry.file_name().to_str().and_then(|tid| self.thread(tid));
            // One that waits in the kernel ends there.
            thread.is_some_and(|(state, flags)| state == 'R' && flags & EXITING == 0)
        };
        while threads().any(runs) {
            std::thread::yield_now();
        }
    }

    /// How many threads are left, the first one included.
    fn count_threads(&self) -> libc::nlink_t {
        // SAFETY: all zeros are a valid value, and the place for the result is valid.
        let about = unsafe {
            let mut about: libc::stat = std::mem::zeroed();
            let got = libc::fstat(self.tasks.as_raw_fd(), &raw mut about);
            (got == 0).then_some(about)
        };
        // A folder has two links and one for each folder in it, here: for each thread. Listing it
        // takes ten times as long.
        about.map_or(0, |about| about.st_nlink.saturating_sub(2))
    }

    /// State and flags of a thread.
    fn thread(&self, tid: &str) -> Option<(char, u64)> {
        let path = format!("/proc/self/fd/{}/{tid}/stat", self.tasks.as_raw_fd());
        let text = std::fs::read_to_string(path).ok()?;
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        // After the state: parent, group, session, terminal, its group; then the flags.
        Some((state, fields.nth(5)?.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::{EXITING, Process};

    #[test]
    fn a_living_process_is_not_taken_for_a_dead_one() {
        let pid = std::process::id();
        let process = Process::open(pid).expect("our own process");
        assert!(process.count_threads() >= 2, "the harness has a thread for each test");
        let (state, flags) = process.thread(&pid.to_string()).expect("our first thread");
        assert!(flags & EXITING == 0 && state != 'Z', "{state} {flags:#x}");
        assert!(Process::open_dead(pid).is_none());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    fn r2_a_process_is_ended_and_nobody_else_afterwards() {
        use std::os::unix::process::ExitStatusExt;
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .expect("a shell");
        let process = Process::open(child.id()).expect("the child");
        process.end();
        let status = child.wait().expect("the child can be waited for");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
        process.end();
        assert_eq!(process.count_threads(), 0, "it is gone");
        assert!(Process::open_dead(child.id()).is_none());
    }
}
