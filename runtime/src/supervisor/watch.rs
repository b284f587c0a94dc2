//! What the supervisor waits for, put together into one word: ended processes, signals, workers'
//! notices.
//!
//! Deaths themselves are seen in the death words (R1), on which the supervisor sleeps directly; a
//! small thread polls the slower sources and bumps the word.
//!
//! Called by `launch`.

#![expect(unsafe_code, reason = "epoll, eventfd, signalfd")]

use crate::error::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::wait::wake_all;

/// What the small thread has seen.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Bumped at each event; the supervisor sleeps on it.
    pub(crate) word: AtomicU32,
    /// SIGINT and SIGTERM received.
    pub(crate) signals: AtomicU32,
    stop: AtomicU32,
}

impl Events {
    /// Wakes the supervisor.
    pub(crate) fn bump(&self) {
        self.word.fetch_add(1, Ordering::Release);
        wake_all(&self.word);
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
const SIGNAL: u64 = 2;
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

/// Blocks SIGINT and SIGTERM in this thread (and those it starts) and gives a descriptor that reads
/// them.
pub(crate) fn signal_fd() -> Result<OwnedFd, Error> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialised before it is used.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    owned(fd, "signalfd")
}

impl Watch {
    /// Starts watching; `signals` comes from [`signal_fd`] where this process is to end jobs on
    /// signals.
    pub(crate) fn start(events: Arc<Events>, signals: Option<OwnedFd>) -> Result<Self, Error> {
        // SAFETY: plain system call.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }, "epoll_create1")?;
        let notice = event_fd()?;
        add(&epoll, notice.as_raw_fd(), libc::EPOLLIN, NOTICE)?;
        if let Some(signals) = &signals {
            add(&epoll, signals.as_raw_fd(), libc::EPOLLIN, SIGNAL)?;
        }
        let poll = epoll.try_clone().map_err(|error| Error::Machine(error.to_string()))?;
        let bell = notice.try_clone().map_err(|error| Error::Machine(error.to_string()))?;
        let shared = Arc::clone(&events);
        let run = move || watch(&poll, &bell, signals.as_ref(), &shared);
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

fn watch(epoll: &OwnedFd, notice: &OwnedFd, signals: Option<&OwnedFd>, shared: &Events) {
    let mut buffer = [0u8; 128];
    while shared.stop.load(Ordering::Acquire) == 0 {
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: ready has room for eight events.
        let count = unsafe { libc::epoll_wait(epoll.as_raw_fd(), ready.as_mut_ptr(), 8, -1) };
        for event in &ready[..usize::try_from(count).unwrap_or(0)] {
            let from = match event.u64 {
                NOTICE => Some(notice),
                SIGNAL => signals,
                _ => None,
            };
            if let Some(fd) = from {
                // SAFETY: the buffer has 128 bytes, enough for one record of either descriptor.
                let got = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), 128) };
                if event.u64 == SIGNAL && got > 0 {
                    shared.signals.fetch_add(1, Ordering::Release);
                }
            }
        }
        shared.bump();
    }
}
