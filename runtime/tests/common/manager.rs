//! A service manager as far as a job sees one: a socket that takes descriptors to be kept, and a
//! start that hands them over again (`sd_notify(3)`, `sd_listen_fds(3)`).

#![expect(unsafe_code, reason = "receives descriptors; moves them between fork and exec")]

use super::program::Cli;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Kept = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// Keeps what jobs give it, for as long as it lives.
pub struct Manager {
    place: PathBuf,
    kept: Kept,
}

impl Manager {
    /// One whose socket lies in this folder.
    pub fn start(folder: &Path) -> Self {
        let place = folder.join("notify");
        let socket = UnixDatagram::bind(&place).expect("room for a socket");
        let kept = Kept::default();
        let alive = Arc::downgrade(&kept);
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket of ours");
        std::thread::spawn(move || {
            while let Some(kept) = alive.upgrade() {
                if let Some((text, fd)) = receive(&socket) {
                    take(&mut kept.lock().expect("no panic"), &text, fd);
                }
            }
        });
        Self { place, kept }
    }

    /// How many descriptors it has.
    pub fn count(&self) -> usize {
        self.kept.lock().expect("no panic").len()
    }

    /// Whether it has all of a job.
    pub fn has_a_job(&self) -> bool {
        let kept = self.kept.lock().expect("no panic");
        kept.iter().any(|(name, _)| name.starts_with("testudo-control"))
    }

    /// Loses one that is no control segment.
    pub fn lose_one(&self) {
        let mut kept = self.kept.lock().expect("no panic");
        let at = kept.iter().position(|(name, _)| name.starts_with("testudo-held")).expect("one");
        kept.remove(at);
    }

    /// Has a job started as a service, with all that is kept.
    pub fn serve(&self, cli: Cli) -> Cli {
        let kept = self.kept.lock().expect("no panic");
        let (names, fds): (Vec<&str>, Vec<OwnedFd>) =
            kept.iter().map(|(name, fd)| (name.as_str(), fd.try_clone().expect("room"))).unzip();
        cli.env("NOTIFY_SOCKET", &super::text(&self.place))
            .env("LISTEN_FDS", &names.len().to_string())
            .env("LISTEN_FDNAMES", &names.join(":"))
            .under("LISTEN_PID=$$ exec \"$@\"")
            .with_descriptors(fds)
            .own_group()
    }
}

fn take(kept: &mut Vec<(String, OwnedFd)>, text: &str, fd: Option<OwnedFd>) {
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).expect("a name");
    if text.contains("FDSTOREREMOVE=1") {
        kept.retain(|(known, _)| known != name);
    } else if text.contains("FDSTORE=1") {
        kept.push((name.to_owned(), fd.expect("a descriptor")));
    }
}

/// The next message, with the descriptor that it carries; `None` when there is none for a while.
fn receive(socket: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut text = [0u8; 4096];
    let mut part = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    let mut control = [0u64; 8];
    // SAFETY: an all-zero header is valid; its pointers lead to places that live through the call,
    // and a descriptor in the control message is new and ours.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let got = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
        let got = usize::try_from(got).ok()?;
        let first = libc::CMSG_FIRSTHDR(&raw const message);
        let fd = (!first.is_null())
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()));
        Some((String::from_utf8_lossy(&text[..got]).into_owned(), fd))
    }
}

/// Has a program inherit these descriptors, from number 3 on.
pub fn hand_over(command: &mut std::process::Command, fds: Vec<OwnedFd>) {
    use std::os::unix::process::CommandExt;
    // In the child the places may be taken, by each other too: all leave them first.
    let above = 3 + fds.iter().map(AsRawFd::as_raw_fd).max().unwrap_or(0) + fds.len() as RawFd;
    let mut away = vec![0; fds.len()];
    let place = move || {
        for (away, fd) in away.iter_mut().zip(&fds) {
            // SAFETY: plain system call, allowed between fork and exec.
            *away = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) };
        }
        for (number, away) in (3..).zip(&away) {
            // SAFETY: as above; what had the number is closed on exec in any case.
            if unsafe { libc::dup2(*away, number) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes these calls.
    unsafe { command.pre_exec(place) };
}
