//! The supervisor's end of what it and its keeper say to each other.
//!
//! Invariants: a process has one line at most, for as long as it lives; whoever reads the socket
//! keeps for the others what is meant for them; no lock is held while waiting for the keeper but by
//! who waits for its answer.
//!
//! Called by `testudo::main` (opens it), `launch` (hands over), `watch` (listens) and `spawn` (how
//! an adopted process ended).

#![expect(unsafe_code, reason = "inherited descriptors, a parent-death signal, descriptor flags")]

use super::leash::Tie;
use super::message::{self, FDS_MAX, Heard, Kind, Packet};
use super::role::Role;
use crate::error::Error;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use testudo_shm::primitive::{AtomicU32, Ordering};

/// Descriptors of a job have numbers from here on: the same in the keeper and in every supervisor,
/// and above whatever the keeper has of its own.
pub(crate) const BASE: RawFd = 64;

/// How long the end of an adopted process is waited for once the kernel says that it has ended.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the keeper has said.
#[derive(Debug, Default)]
struct Said {
    stops: u32,
    /// Signals that were handed out by `take_stops`.
    taken: u32,
    held: Option<u32>,
    /// How processes that came to the keeper ended, by number.
    ended: HashMap<i32, i32>,
    /// Processes of an earlier supervisor, with what they can be signalled by.
    adopted: HashMap<i32, OwnedFd>,
}

/// The line to the keeper.
#[derive(Debug)]
pub(crate) struct Line {
    socket: OwnedFd,
    role: Role,
    is_leader: AtomicU32,
    said: Mutex<Said>,
}

static LINE: OnceLock<Line> = OnceLock::new();

/// This process's line, if it has a keeper.
pub(crate) fn line() -> Option<&'static Line> {
    LINE.get()
}

/// Opens the line of a process that the keeper has started. It ends with the keeper from here on.
pub(crate) fn open(role: Role) -> Result<&'static Line, Error> {
    // SAFETY: plain system calls.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() as u32 != role.keeper {
            return Err(Error::Machine("the keeper of this job is gone".into()));
        }
    }
    close_on_exec(role.line);
    close_on_exec(role.leash);
    // SAFETY: the keeper left this descriptor open for us; nothing else in this process knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(role.line) };
    let said = Said { stops: role.stops, ..Said::default() };
    Ok(LINE.get_or_init(|| {
        let is_leader = AtomicU32::new(0);
        Line { socket, role, is_leader, said: Mutex::new(said) }
    }))
}

/// Has a descriptor closed when another program is run.
pub(crate) fn close_on_exec(fd: RawFd) {
    // SAFETY: plain system call; a number that is not open changes nothing.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// Moves a descriptor to a number that it can have in the keeper and in later supervisors too.
pub(crate) fn place(fd: OwnedFd, line: Option<&Line>) -> Result<OwnedFd, Error> {
    if line.is_none() {
        return Ok(fd);
    }
    // SAFETY: plain system call on an open descriptor; the result is checked below.
    let placed = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, BASE) };
    if placed < 0 {
        let error = io::Error::last_os_error();
        return Err(Error::Machine(format!("no descriptor to be had (ulimit -n): {error}")));
    }
    // SAFETY: it was just returned by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(placed) })
}

impl Line {
    /// What the keeper told this process.
    pub(crate) fn role(&self) -> &Role {
        &self.role
    }

    /// What ties a worker to the keeper.
    pub(crate) fn tie(&self) -> Tie {
        let Role { leash, keeper, reign, .. } = self.role;
        Tie { leash, keeper, reign }
    }

    /// Readable when the keeper has said something.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        // What it guards is whole between any two of its changes.
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, packet: Packet<'_>) -> Result<(), Error> {
        let failed =
            |error: io::Error| Error::Machine(format!("the keeper cannot be told: {error}"));
        message::send(self.socket.as_raw_fd(), packet, true).map_err(failed)
    }

    /// Has the keeper let go of everything: the job begins once more.
    pub(crate) fn release(&self) -> Result<(), Error> {
        self.send(Packet::new(Kind::Release, 0, 0))
    }

    /// Has the keeper hold descriptors, under the numbers that they have here.
    pub(crate) fn hold(&self, fds: &[RawFd]) -> Result<(), Error> {
        for fds in fds.chunks(FDS_MAX) {
            let numbers: Vec<u8> = fds.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
            self.send(Packet { text: &numbers, fds, ..Packet::new(Kind::Hold, 0, 0) })?;
        }
        Ok(())
    }

    /// Says that all descriptors of the job are with the keeper, and waits until they are.
    pub(crate) fn begun(
        &self,
        control: RawFd,
        control_bytes: usize,
        chronicle: RawFd,
    ) -> Result<(), Error> {
        let number = chronicle.to_ne_bytes();
        let packet = Packet::new(Kind::Begun, control as u32, control_bytes as u64);
        self.send(Packet { text: &number, ..packet })?;
        let mut said = self.said();
        loop {
            match said.held.take() {
                Some(0) => return Ok(()),
                Some(code) => {
                    let error = io::Error::from_raw_os_error(code.cast_signed());
                    return Err(Error::Machine(format!(
                        "the job's descriptors cannot be kept (ulimit -n): {error}"
                    )));
                }
                None => self.take_in(&mut said, true)?,
            }
        }
    }

    /// Says that all workers are watched.
    pub(crate) fn leads(&self) -> Result<(), Error> {
        self.is_leader.store(1, Ordering::Release);
        self.send(Packet::new(Kind::Running, 0, 0))
    }

    /// Whether this process has led the job, or there was none to be taken over: how it ends is how
    /// the job ends.
    pub(crate) fn is_leader(&self) -> bool {
        self.role.job.is_none() || self.is_leader.load(Ordering::Acquire) != 0
    }

    /// Says that all is done but what the program does afterwards.
    pub(crate) fn ending(&self) -> Result<(), Error> {
        self.send(Packet::new(Kind::Ending, 0, 0))
    }

    /// Says that the job is over. Nobody is left to whom a failure of this could be told.
    pub(crate) fn over(&self, code: u8) {
        let _ = self.send(Packet::new(Kind::Over, u32::from(code), 0));
    }

    /// Has the next supervisor be another program.
    pub(crate) fn upgrade(&self, binary: &Path) -> Result<(), Error> {
        let text = binary.as_os_str().as_bytes();
        self.send(Packet { text, ..Packet::new(Kind::Upgrade, 0, 0) })
    }

    /// Takes in what the keeper has said, without waiting.
    pub(crate) fn listen(&self) {
        let mut said = self.said();
        while message::is_readable(&self.socket) && self.take_in(&mut said, false).is_ok() {}
    }

    fn take_in(&self, said: &mut Said, wait: bool) -> Result<(), Error> {
        let gone = || Error::Machine("the keeper of this job is gone".into());
        match message::receive(self.socket.as_raw_fd(), wait).map_err(|_| gone())? {
            Heard::Nothing => {}
            Heard::End => return Err(gone()),
            Heard::Packet(packet) => match packet.kind {
                Kind::Held => said.held = Some(packet.a),
                Kind::Stops => said.stops = said.stops.max(packet.a),
                Kind::Ended => {
                    said.ended.insert(packet.a.cast_signed(), packet.b as i32);
                }
                _ => {}
            },
        }
        Ok(())
    }

    /// Signals that have asked the job to end since this was last called.
    pub(crate) fn take_stops(&self) -> u32 {
        let mut said = self.said();
        let stops = said.stops - said.taken;
        said.taken = said.stops;
        stops
    }

    /// A process of an earlier supervisor is watched by this one.
    pub(crate) fn adopt(&self, pid: i32, pidfd: OwnedFd) {
        self.said().adopted.insert(pid, pidfd);
    }

    /// Kills an adopted process; false when it is none. (Its number may be another process's by
    /// now: the keeper has waited for it.)
    pub(crate) fn kill(&self, pid: i32) -> bool {
        let said = self.said();
        let Some(pidfd) = said.adopted.get(&pid) else { return false };
        let none = std::ptr::null::<libc::siginfo_t>();
        let fd = pidfd.as_raw_fd();
        // SAFETY: plain system call on an open descriptor; a process that is gone is none to kill.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) };
        true
    }

    /// How an adopted process ended, as the kernel's status; `None` while it runs, or when it is
    /// none. The inner `None`: it ended, and nobody knows how.
    pub(crate) fn end_of(&self, pid: i32, wait: bool) -> Option<Option<i32>> {
        let mut said = self.said();
        let pidfd = said.adopted.get(&pid)?.try_clone().ok()?;
        drop(said);
        if !has_ended(&pidfd, if wait { -1 } else { 0 }) {
            return None;
        }
        // The keeper waits for it about now, and says so.
        let until = Instant::now() + PATIENCE;
        loop {
            self.listen();
            said = self.said();
            let status = said.ended.remove(&pid);
            if status.is_some() || Instant::now() > until {
                said.adopted.remove(&pid);
                return Some(status);
            }
            drop(said);
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Whether a process has ended, waiting so many milliseconds at most (-1: for ever).
fn has_ended(pidfd: &OwnedFd, millis: i32) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one valid entry.
        let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
        if ready >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return ready > 0;
        }
    }
}
