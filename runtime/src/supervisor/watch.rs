//! What the supervisor waits for, put together into one word: ended processes, signals, workers'
//! notices.
//!
//! Deaths themselves are seen in the death words (R1), on which the supervisor sleeps directly; a
//! small thread polls the slower sources and bumps the word.
//!
//! Called by `launch`.

#![expect(unsafe_code, reason = "epoll, eventfd")]

use crate::error::Error;
use crate::keeper::Line;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use testudo_shm::primitive::{AtomicU32, AtomicU64, Ordering};
use testudo_shm::wait::wake_all;

/// What the small thread has seen.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Bumped at each event; the supervisor sleeps on it.
    pub(crate) word: AtomicU32,
    /// How often the job was asked to end.
    pub(crate) signals: AtomicU32,
    stop: AtomicU32,
    /// Workers that are not to be replaced, a bit for each.
    held: [AtomicU64; 2],
}

impl Events {
    /// Wakes the supervisor.
    pub(crate) fn bump(&self) {
        self.word.fetch_add(1, Ordering::Release);
        wake_all(&self.word);
    }

    /// Asks the job to end: to drain, or at once.
    pub(crate) fn stop(&self, now: bool) {
        self.signals.fetch_max(1 + u32::from(now), Ordering::AcqRel);
        self.bump();
    }

    /// Holds successors of a worker back, or no longer.
    pub(crate) fn hold(&self, worker: usize, is_held: bool) {
        let (word, bit) = (&self.held[worker / 64 % 2], 1 << (worker % 64));
        if is_held {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
        self.bump();
    }

    /// Whether successors of a worker are held back.
    pub(crate) fn is_held(&self, worker: usize) -> bool {
        self.held[worker / 64 % 2].load(Ordering::Acquire) & 1 << (worker % 64) != 0
    }

    /// Counts a request to stop: the first drains, the second stops at once.
    pub(crate) fn request_stop(&self) {
        self.signals.fetch_add(1, Ordering::Release);
        self.bump();
    }
}

/// The small thread and its descriptors.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) events: Arc<Events>,
    epoll: OwnedFd,
    notice: OwnedFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

const NOTICE: u64 = 1;
const LINE: u64 = 2;
const PROCESS: u64 = 3;

/// Makes a non-blocking eventfd.
pub(crate) fn event_fd() -> Result<OwnedFd, Error> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    owned(fd, "eventfd")
}

fn owned(fd: i32, what: &str) -> Result<OwnedFd, Error> {
    if fd < 0 {
        return Err(Error::Machine(format!("{what}: {}", std::io::Error::last_os_error())));
    }
    // SAFETY: the descriptor was just returned by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Watch {
    /// Starts watching. Workers write to `notice`; the keeper, if there is one, passes signals on.
    pub(crate) fn start(
        events: Arc<Events>,
        notice: OwnedFd,
        line: Option<&'static Line>,
    ) -> Result<Self, Error> {
        // SAFETY: plain system call.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }, "epoll_create1")?;
        add(&epoll, notice.as_raw_fd(), libc::EPOLLIN, NOTICE)?;
        if let Some(line) = line {
            add(&epoll, line.socket().as_raw_fd(), libc::EPOLLIN, LINE)?;
            events.signals.fetch_add(line.take_stops(), Ordering::Release);
        }
        let poll = epoll.try_clone().map_err(|error| Error::Machine(error.to_string()))?;
        let bell = notice.try_clone().map_err(|error| Error::Machine(error.to_string()))?;
        let shared = Arc::clone(&events);
        let run = move || watch(&poll, &bell, line, &shared);
        let thread = std::thread::Builder::new()
            .name("testudo-watch".into())
            .spawn(run)
            .map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
        Ok(Self { events, epoll, notice, thread: Some(thread) })
    }

    /// The eventfd that workers write to when the supervisor should look at them.
    pub(crate) fn notice_fd(&self) -> i32 {
        self.notice.as_raw_fd()
    }

    /// Watches for the end of a process.
    pub(crate) fn watch_process(&self, pidfd: i32) -> Result<(), Error> {
        add(&self.epoll, pidfd, libc::EPOLLIN | libc::EPOLLONESHOT, PROCESS)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.events.stop.store(1, Ordering::Release);
        testudo_shm::wait::wake_event(self.notice.as_raw_fd());
        if let Some(thread) = self.thread.take() {
            // The thread only polls; it cannot have panicked in a way that matters here.
            let _ = thread.join();
        }
    }
}

fn add(epoll: &OwnedFd, fd: i32, events: i32, what: u64) -> Result<(), Error> {
    let mut event = libc::epoll_event { events: events as u32, u64: what };
    // SAFETY: both descriptors are open and event is a valid place.
    let done =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    if done != 0 {
        return Err(Error::Machine(format!("epoll_ctl: {}", std::io::Error::last_os_error())));
    }
    Ok(())
}

fn watch(epoll: &OwnedFd, notice: &OwnedFd, line: Option<&Line>, shared: &Events) {
    let mut count = 0u64;
    while shared.stop.load(Ordering::Acquire) == 0 {
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: ready has room for eight events.
        let events = unsafe { libc::epoll_wait(epoll.as_raw_fd(), ready.as_mut_ptr(), 8, -1) };
        for event in &ready[..usize::try_from(events).unwrap_or(0)] {
            match (event.u64, line) {
                // SAFETY: an eventfd gives eight bytes.
                (NOTICE, _) => unsafe {
                    libc::read(notice.as_raw_fd(), (&raw mut count).cast(), 8);
                },
                (LINE, Some(line)) => {
                    line.listen();
                    shared.signals.fetch_add(line.take_stops(), Ordering::Release);
                }
                _ => {}
            }
        }
        shared.bump();
    }
}
