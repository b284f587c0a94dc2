//! Starts worker processes: the job's program through posix_spawn (vfork and exec), from one
//! thread that lives as long as the supervisor (R3: a fork of a large parent costs milliseconds,
//! and parent-death signals, where they are used, follow the spawning thread).
//!
//! Called by `launch` and `recover`.

#![expect(unsafe_code, reason = "posix_spawn and its file actions")]

use super::program::Program;
use super::watch::event_fd;
use crate::error::Error;
use crate::keeper::leash::Tie;
use crate::keeper::{self, Line};
use crate::worker::entry::{ROLE, Role};
use crate::worker::inspect::INSPECT;
use std::ffi::{CStr, CString, OsString};
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

/// A started worker process.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    /// Readable once the process has ended.
    pub(crate) pidfd: OwnedFd,
}

impl Child {
    /// A process that is somebody else's child; `None` when there is none of that number.
    pub(crate) fn open(pid: i32) -> Option<Self> {
        // SAFETY: plain system call.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        // SAFETY: the descriptor was just returned by the kernel.
        (pidfd >= 0).then(|| Self { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd as i32) } })
    }

    /// A process that has ended and was waited for.
    pub(crate) fn gone(pid: i32) -> Result<Self, Error> {
        let pidfd = event_fd()?;
        // Readable for good, as the descriptor of an ended process is.
        testudo_shm::wait::wake_event(pidfd.as_raw_fd());
        Ok(Self { pid, pidfd })
    }

    /// Waits until the process has ended, so long at most; whether it has.
    pub(crate) fn ends_within(&self, limit: Duration) -> bool {
        let mut poll =
            libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
            // SAFETY: poll is a valid place for the one entry that it is said to have.
            let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
            if ready >= 0 || left.is_zero() {
                return ready > 0;
            }
        }
    }
}

/// What all workers of a job are started with.
#[derive(Debug)]
pub(crate) struct Spawner {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// What ends the workers, where that is not the end of this thread.
    tie: Option<Tie>,
}

fn c_string(text: OsString) -> CString {
    CString::new(text.into_vec()).unwrap_or_default()
}

impl Spawner {
    /// Takes this process's arguments and environment.
    pub(crate) fn new(line: Option<&Line>) -> Self {
        let environment = std::env::vars_os()
            .filter(|(name, _)| name != ROLE)
            .map(|(name, value)| {
                let mut pair = name;
                pair.push("=");
                pair.push(value);
                c_string(pair)
            })
            .collect();
        let arguments = std::env::args_os().skip(1).map(c_string).collect();
        Self { arguments, environment, tie: line.map(Line::tie) }
    }

    /// Starts a worker that inherits `descriptors` and the standard ones, and nothing else.
    pub(crate) fn spawn(
        &self,
        program: &Program,
        role: Role,
        descriptors: &[i32],
    ) -> Result<Child, Error> {
        let small = SmallPages::begin();
        let role = Role { small_pages: small.is_some(), tie: self.tie, ..role };
        let name = role.name();
        let leash = self.tie.map(|tie| tie.leash);
        let descriptors: Vec<i32> = descriptors.iter().copied().chain(leash).collect();
        let child = self.start(program, &name, format!("{ROLE}={role}"), &descriptors);
        drop(small);
        child
    }

    /// Starts a process that describes its plan and ends; see `worker/inspect.rs`.
    pub(crate) fn inquire(
        &self,
        program: &Program,
        pipe: i32,
        control: i32,
        bytes: usize,
    ) -> Result<Child, Error> {
        let variable = format!("{INSPECT}={pipe}:{control}:{bytes}");
        self.start(program, "testudo-plan", variable, &[pipe, control])
    }

    fn start(
        &self,
        program: &Program,
        name: &str,
        variable: String,
        descriptors: &[i32],
    ) -> Result<Child, Error> {
        let (text, variable) = (c_string(name.into()), c_string(variable.into()));
        let pointers = |first: &CString, rest: &[CString]| {
            let all = std::iter::once(first.as_ptr()).chain(rest.iter().map(|text| text.as_ptr()));
            all.chain([std::ptr::null()]).map(<*const libc::c_char>::cast_mut).collect::<Vec<_>>()
        };
        let arguments = pointers(&text, &self.arguments);
        let environment = pointers(&variable, &self.environment);
        let pid = raw_spawn(program.exec(), &arguments, &environment, descriptors);
        let pid = pid.map_err(|error| {
            let path = program.path.display();
            Error::Machine(format!("cannot start {name} ({path}): {error}"))
        })?;
        // SAFETY: plain system call on a child of ours that was not waited for yet.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if pidfd < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::Machine(format!("cannot watch {name} (pidfd_open): {error}")));
        }
        // SAFETY: the descriptor was just returned by the kernel.
        Ok(Child { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd as i32) } })
    }
}

/// While it lives, this process and those it starts get no huge pages: an allocator that asks for
/// them would zero, and perhaps first compact, megabytes before the worker's first instruction
/// (measured: 0.4 ms, and up to 8 where memory is fragmented). The worker turns them on again,
/// the successor of one not before its first steps are done.
struct SmallPages {
    _turn: std::sync::MutexGuard<'static, ()>,
}

/// Several jobs of one process must not take each other's setting for the user's.
static SMALL_PAGES: std::sync::Mutex<()> = std::sync::Mutex::new(());

impl SmallPages {
    /// `None` where huge pages are turned off for good.
    fn begin() -> Option<Self> {
        let turn = SMALL_PAGES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: plain system calls.
        let is_set = unsafe {
            libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
        };
        is_set.then_some(Self { _turn: turn })
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        // SAFETY: plain system call.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0) };
    }
}

fn raw_spawn(
    program: &CStr,
    arguments: &[*mut libc::c_char],
    environment: &[*mut libc::c_char],
    descriptors: &[i32],
) -> Result<i32, std::io::Error> {
    let check =
        |code: i32| if code == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(code)) };
    let mut actions = std::mem::MaybeUninit::<libc::posix_spawn_file_actions_t>::uninit();
    let mut attributes = std::mem::MaybeUninit::<libc::posix_spawnattr_t>::uninit();
    let mut pid = 0;
    // SAFETY: both structures are initialised before use and destroyed after; the pointer lists end
    // in null and their strings are alive in the caller.
    unsafe {
        check(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        check(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
        for &fd in descriptors {
            // A descriptor duplicated onto itself loses its close-on-exec flag.
            check(libc::posix_spawn_file_actions_adddup2(actions.as_mut_ptr(), fd, fd))?;
        }
        // Held back until the worker ignores them: a signal to the process group must not kill one
        // that is just starting.
        let mut held = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut reset = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(held.as_mut_ptr());
        for signal in crate::worker::entry::IGNORED {
            libc::sigaddset(held.as_mut_ptr(), signal);
        }
        libc::sigemptyset(reset.as_mut_ptr());
        // The Rust runtime ignores SIGPIPE, and ignored signals stay ignored across an exec.
        libc::sigaddset(reset.as_mut_ptr(), libc::SIGPIPE);
        check(libc::posix_spawnattr_setsigmask(attributes.as_mut_ptr(), held.as_ptr()))?;
        check(libc::posix_spawnattr_setsigdefault(attributes.as_mut_ptr(), reset.as_ptr()))?;
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        check(libc::posix_spawnattr_setflags(attributes.as_mut_ptr(), flags as libc::c_short))?;
        let done = check(libc::posix_spawn(
            &raw mut pid,
            program.as_ptr(),
            actions.as_ptr(),
            attributes.as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
        ));
        libc::posix_spawn_file_actions_destroy(actions.as_mut_ptr());
        libc::posix_spawnattr_destroy(attributes.as_mut_ptr());
        done?;
    }
    Ok(pid)
}

/// A pipe that a child writes to; what is not there yet is not waited for.
pub(crate) fn readable_pipe() -> Result<(PipeReader, PipeWriter), Error> {
    let failed = |error: std::io::Error| Error::Machine(format!("pipe: {error}"));
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    // SAFETY: a plain system call on a descriptor of ours.
    let done = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if done < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok((reader, writer))
}

/// Kills a process at once.
pub(crate) fn kill(pid: i32) {
    if keeper::line().is_some_and(|line| line.kill(pid)) {
        return;
    }
    // SAFETY: plain system call; the child was not reaped, so the number is still its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Asks a process to keep its stack and end.
pub(crate) fn abort(child: &Child) {
    let none = std::ptr::null::<libc::siginfo_t>();
    let fd = child.pidfd.as_raw_fd();
    // SAFETY: plain system call on an open descriptor.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGABRT, none, 0) };
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
    /// It ended while nobody could be told how.
    Unknown,
}

impl Exit {
    /// What the kernel says.
    fn of(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            Self::Signal(libc::WTERMSIG(status))
        } else {
            Self::Code(libc::WEXITSTATUS(status))
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match *self {
            Self::Code(code) => return write!(f, "exit code {code}"),
            Self::Unknown => "unknown: the supervisor had died",
            Self::Signal(libc::SIGKILL) => "SIGKILL",
            Self::Signal(libc::SIGSEGV) => "SIGSEGV",
            Self::Signal(libc::SIGBUS) => "SIGBUS",
            Self::Signal(libc::SIGABRT) => "SIGABRT",
            Self::Signal(libc::SIGILL) => "SIGILL",
            Self::Signal(libc::SIGFPE) => "SIGFPE",
            Self::Signal(libc::SIGTERM) => "SIGTERM",
            Self::Signal(signal) => return write!(f, "signal {signal}"),
        };
        f.write_str(name)
    }
}

/// Reaps a child that has ended; `None` while it runs. With `wait`, waits for it.
pub(crate) fn reap(pid: i32, wait: bool) -> Option<Exit> {
    let mut status = 0;
    loop {
        // SAFETY: status is a valid place for the result.
        let got =
            unsafe { libc::waitpid(pid, &raw mut status, if wait { 0 } else { libc::WNOHANG }) };
        if got < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        if got == pid {
            return Some(Exit::of(status));
        }
        // A worker that an earlier supervisor has started is waited for by the keeper.
        let adopted = keeper::line().and_then(|line| line.end_of(pid, wait))?;
        return Some(adopted.map_or(Exit::Unknown, Exit::of));
    }
}
