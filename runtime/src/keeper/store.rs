//! The service manager's descriptor store: what a keeper holds is with the service manager as well,
//! so that a job goes on with its state when its keeper is killed and started again.
//!
//! Invariants: the control segment is stored last, once all workers are watched, and says how many
//! there are, so a part of a job is never taken for a whole one; what is stored is taken back as
//! soon as the job is over, so that the next start begins afresh. A service manager that keeps
//! nothing changes nothing.
//!
//! The protocol is that of `sd_notify(3)` and `sd_listen_fds(3)`: a datagram for each descriptor
//! (`FDSTORE=1`, with its name), and descriptors from number 3 on with their names in the
//! environment of the process that is started.
//!
//! Called by the keeper.

#![expect(unsafe_code, reason = "takes and moves inherited descriptors")]

use super::role::Job;
use super::{line, message};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The first descriptor that a service manager hands over.
const FIRST: RawFd = 3;

/// How long the service manager may take for one descriptor.
const PATIENCE: Duration = Duration::from_secs(2);

/// A place for descriptors that outlives this process.
#[derive(Debug)]
pub(super) struct Store {
    socket: UnixDatagram,
    /// What is in it.
    names: Vec<String>,
    has_control: bool,
}

impl Store {
    /// The service manager's, where there is one.
    pub(super) fn open() -> Option<Self> {
        let place = std::env::var_os("NOTIFY_SOCKET")?;
        let socket = UnixDatagram::unbound().ok()?;
        let address = match place.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&place),
        };
        socket.connect_addr(&address.ok()?).ok()?;
        socket.set_write_timeout(Some(PATIENCE)).ok()?;
        Some(Self { socket, names: Vec::new(), has_control: false })
    }

    /// Has all that a job needs kept, but for what is there already.
    pub(super) fn keep(&mut self, held: &[OwnedFd], job: &Job) -> io::Result<()> {
        let is_control = |fd: &&OwnedFd| fd.as_raw_fd() == job.control;
        for fd in held.iter().filter(|fd| !is_control(fd)) {
            self.put(fd, Name::Held(fd.as_raw_fd()))?;
        }
        if !self.has_control {
            for fd in held.iter().filter(is_control) {
                self.put(fd, Name::Control { job: *job, count: held.len() })?;
            }
            self.has_control = true;
        }
        Ok(())
    }

    fn put(&mut self, fd: &OwnedFd, name: Name) -> io::Result<()> {
        let name = name.to_string();
        if self.names.contains(&name) {
            return Ok(());
        }
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.names.push(name);
        let fds = [fd.as_raw_fd()];
        message::send_parts(self.socket.as_raw_fd(), [text.as_bytes(), &[]], &fds, true)
    }

    /// The job is over, or begins afresh.
    pub(super) fn forget(&mut self) {
        // The control segment first: what is left of a job then is none.
        self.names.sort();
        for name in self.names.drain(..) {
            // A service manager that does not answer is about to end us, or has no store.
            let _ = self.socket.send(format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes());
        }
        self.has_control = false;
    }

    /// What an earlier keeper of this job has left, if all of it is there: each descriptor under
    /// the number that it had.
    pub(super) fn left(&mut self) -> Option<(Vec<OwnedFd>, Job)> {
        let is_for_us = number("LISTEN_PID")? == std::process::id();
        let count = number("LISTEN_FDS")?;
        let names = std::env::var("LISTEN_FDNAMES").ok().filter(|_| is_for_us)?;
        let names: Vec<&str> = names.split(':').collect();
        if names.len() != count as usize {
            return None;
        }
        let named = (FIRST..).zip(names).filter_map(|(fd, name)| Some((fd, Name::parse(name)?)));
        let named: Vec<(RawFd, Name)> = named.collect();
        self.names = named.iter().map(|(_, name)| name.to_string()).collect();
        // All of them leave their places first: some are other ones' places.
        let away = moved_away(&named, &mut self.socket).ok()?;
        let job = away.iter().find_map(|(_, name)| match name {
            Name::Control { job, count } if *count <= away.len() => Some(*job),
            _ => None,
        });
        let held = away.into_iter().map(|(fd, name)| super::hold(&fd, name.number()));
        let held = held.collect::<io::Result<Vec<_>>>().ok();
        self.has_control = job.is_some() && held.is_some();
        if !self.has_control {
            self.forget();
        }
        Some((held?, job?))
    }
}

fn number(variable: &str) -> Option<u32> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Takes inherited descriptors and gives them other numbers, above all that any of them has or is
/// to have; the socket too.
fn moved_away(
    named: &[(RawFd, Name)],
    socket: &mut UnixDatagram,
) -> io::Result<Vec<(OwnedFd, Name)>> {
    let all = named.iter().flat_map(|(fd, name)| [*fd, name.number()]);
    let above = all.max().unwrap_or(line::BASE) + 1;
    let again = |fd: RawFd| {
        // SAFETY: plain system call; the result is checked, and ours.
        let moved = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) };
        if moved < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(moved) })
    };
    *socket = UnixDatagram::from(again(socket.as_raw_fd())?);
    let moved = |(fd, name): &(RawFd, Name)| {
        let moved = again(*fd)?;
        // SAFETY: the service manager left this descriptor open for us, and nothing else in this
        // process knows it.
        drop(unsafe { OwnedFd::from_raw_fd(*fd) });
        Ok((moved, *name))
    };
    named.iter().map(moved).collect()
}

/// What a descriptor in the store is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// It has this number in every process of the job.
    Held(RawFd),
    /// It is the control segment; there are so many of the job in all.
    Control { job: Job, count: usize },
}

impl Name {
    fn number(&self) -> RawFd {
        match self {
            Self::Held(number) => *number,
            Self::Control { job, .. } => job.control,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        fn next<T: std::str::FromStr>(parts: &mut std::str::Split<'_, char>) -> Option<T> {
            parts.next()?.parse().ok()
        }
        let parts = &mut text.strip_prefix("testudo-")?.split('-');
        let name = match parts.next()? {
            "held" => Self::Held(next(parts)?),
            "control" => {
                let (control, control_bytes) = (next(parts)?, next(parts)?);
                let job = Job { control, control_bytes, chronicle: next(parts)? };
                Self::Control { job, count: next(parts)? }
            }
            _ => return None,
        };
        (parts.next().is_none() && name.number() >= line::BASE).then_some(name)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Held(number) => write!(f, "testudo-held-{number}"),
            Self::Control { job, count } => {
                let Job { control, control_bytes, chronicle } = job;
                write!(f, "testudo-control-{control}-{control_bytes}-{chronicle}-{count}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_as_it_was_written() {
        let job = Job { control: 64, control_bytes: 1 << 40, chronicle: 65 };
        for name in [Name::Held(99), Name::Control { job, count: 12 }] {
            assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
        for text in ["", "testudo", "testudo-held-1", "testudo-held-70-1", "testudo-other-70", "x"]
        {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }
}
