//! What keeper and supervisor say to each other: one packet each, over a pair of sockets, with
//! descriptors where a packet carries any.
//!
//! Invariants: a packet is whole or not there (SOCK_SEQPACKET); what the supervisor had said before
//! it died is still heard; neither side trusts a number in a packet further than the kernel checks
//! it.
//!
//! Called by the keeper and by `line`, the supervisor's end.

#![expect(unsafe_code, reason = "socketpair, sendmsg and recvmsg with descriptors")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors in one packet, at most.
pub(super) const FDS_MAX: usize = 16;

/// Bytes of text in one packet, at most: a path.
pub(super) const TEXT_MAX: usize = 4096;

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// To the keeper: let go of all that you hold.
    Release = 1,
    /// To the keeper: hold these descriptors, by the numbers in the text.
    Hold = 2,
    /// To the keeper: that was all; `a` is the control segment's descriptor, `b` its bytes, and the
    /// text names the chronicle's. Answered with `Held`.
    Begun = 3,
    /// To the keeper: all workers are watched.
    Running = 4,
    /// To the keeper: all is done but what the program does afterwards; leaving by itself is final.
    Ending = 5,
    /// To the keeper: the job is over, with exit code `a`.
    Over = 6,
    /// To the keeper: the next supervisor is the program that the text names; this one leaves.
    Upgrade = 7,
    /// To the supervisor: all is held, or `a` is the error.
    Held = 8,
    /// To the supervisor: so many signals have asked the job to end.
    Stops = 9,
    /// To the supervisor: process `a`, which came to the keeper, ended with status `b`.
    Ended = 10,
}

impl Kind {
    fn of(word: u32) -> Option<Self> {
        const ALL: [Kind; 10] = [
            Kind::Release,
            Kind::Hold,
            Kind::Begun,
            Kind::Running,
            Kind::Ending,
            Kind::Over,
            Kind::Upgrade,
            Kind::Held,
            Kind::Stops,
            Kind::Ended,
        ];
        ALL.into_iter().find(|kind| *kind as u32 == word)
    }
}

/// The fixed part of a packet.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Head {
    kind: u32,
    a: u32,
    b: u64,
}

impl Head {
    fn bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        let words = [self.kind.to_ne_bytes(), self.a.to_ne_bytes()];
        bytes[..8].copy_from_slice(words.as_flattened());
        bytes[8..].copy_from_slice(&self.b.to_ne_bytes());
        bytes
    }
}

/// A packet to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) kind: Kind,
    pub(super) a: u32,
    pub(super) b: u64,
    pub(super) text: &'a [u8],
    pub(super) fds: &'a [RawFd],
}

impl Packet<'_> {
    /// A packet without text and descriptors.
    pub(super) fn new(kind: Kind, a: u32, b: u64) -> Self {
        Self { kind, a, b, text: &[], fds: &[] }
    }
}

/// A packet that has come.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) kind: Kind,
    pub(super) a: u32,
    pub(super) b: u64,
    pub(super) text: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What a look into the socket found.
#[derive(Debug)]
pub(super) enum Heard {
    Packet(Received),
    /// Nothing for the moment.
    Nothing,
    /// The other side is gone, and all that it had said was heard.
    End,
}

/// Makes the two ends; both are closed on exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: ends has room for the two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just returned by the kernel.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Room for the descriptors of one packet, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 128]);

/// Sends a packet; with `wait`, waits for room.
pub(super) fn send(to: RawFd, packet: Packet<'_>, wait: bool) -> io::Result<()> {
    assert!(packet.fds.len() <= FDS_MAX && packet.text.len() <= TEXT_MAX, "a packet's limits");
    let head = Head { kind: packet.kind as u32, a: packet.a, b: packet.b };
    send_parts(to, [&head.bytes(), packet.text], packet.fds, wait)
}

/// Sends two parts as one packet, with [`FDS_MAX`] descriptors at most; with `wait`, waits for
/// room.
pub(super) fn send_parts(
    to: RawFd,
    parts: [&[u8]; 2],
    fds: &[RawFd],
    wait: bool,
) -> io::Result<()> {
    assert!(fds.len() <= FDS_MAX, "a packet's limits");
    let mut parts = parts
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    let mut control = Control([0; 128]);
    // SAFETY: an all-zero header is valid; its pointers lead to places that live through the call,
    // and the control message fits: 16 descriptors and its head are 80 bytes.
    let done = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len() as _;
        if !fds.is_empty() {
            let bytes = size_of_val(fds) as u32;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
            let first = libc::CMSG_FIRSTHDR(&raw const message);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let data = libc::CMSG_DATA(first).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(fds.as_ptr(), data, fds.len());
        }
        let flags = libc::MSG_NOSIGNAL | if wait { 0 } else { libc::MSG_DONTWAIT };
        again(|| libc::sendmsg(to, &raw const message, flags))
    };
    done.map(|_| ())
}

/// Takes the next packet; with `wait`, waits for it.
pub(super) fn receive(from: RawFd, wait: bool) -> io::Result<Heard> {
    let mut head = Head::default();
    let mut text = vec![0u8; TEXT_MAX];
    let mut parts = [
        libc::iovec { iov_base: (&raw mut head).cast(), iov_len: size_of::<Head>() },
        libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() },
    ];
    let mut control = Control([0; 128]);
    let mut fds = Vec::new();
    // SAFETY: as in `send`; the descriptors in the control message are new and ours.
    let got = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len() as _;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len() as _;
        let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
        let got = again(|| libc::recvmsg(from, &raw mut message, flags));
        let mut next = libc::CMSG_FIRSTHDR(&raw const message);
        while got.is_ok() && !next.is_null() {
            if (*next).cmsg_level == libc::SOL_SOCKET && (*next).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*next).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(next).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(&raw const message, next);
        }
        got
    };
    match got {
        Ok(0) => Ok(Heard::End),
        Ok(got) => {
            text.truncate(got.saturating_sub(size_of::<Head>()));
            let kind = Kind::of(head.kind);
            // Who is of another build may say more than is understood here.
            let packet = kind.map(|kind| Received { kind, a: head.a, b: head.b, text, fds });
            Ok(packet.map_or(Heard::Nothing, Heard::Packet))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Nothing),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Heard::End),
        Err(error) => Err(error),
    }
}

/// Makes a system call again while signals interrupt it.
fn again(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        let done = call();
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether something can be read from a socket, or its other side is gone.
pub(super) fn is_readable(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(heard: io::Result<Heard>) -> Received {
        match heard.expect("a socket of ours") {
            Heard::Packet(packet) => packet,
            other => panic!("{other:?} instead of a packet"),
        }
    }

    #[test]
    fn what_was_said_before_the_end_is_heard_with_its_descriptors() {
        let (near, far) = pair().expect("room");
        let held = std::fs::File::open("/dev/null").expect("it is always there");
        let fds = [held.as_raw_fd(); FDS_MAX];
        let text = vec![7; TEXT_MAX];
        let said = Packet { text: &text, fds: &fds, ..Packet::new(Kind::Hold, 1, u64::MAX) };
        send(near.as_raw_fd(), said, true).expect("room");
        send(near.as_raw_fd(), Packet::new(Kind::Over, 3, 0), true).expect("room");
        drop(near);
        assert!(is_readable(&far));
        let first = packet(receive(far.as_raw_fd(), false));
        assert_eq!((first.kind, first.a, first.b), (Kind::Hold, 1, u64::MAX));
        assert_eq!((first.fds.len(), first.text), (FDS_MAX, text));
        let second = packet(receive(far.as_raw_fd(), true));
        assert_eq!((second.kind, second.a, second.fds.len()), (Kind::Over, 3, 0));
        assert!(matches!(receive(far.as_raw_fd(), true).expect("open"), Heard::End));
    }

    #[test]
    fn a_packet_of_another_build_is_not_understood_and_not_fatal() {
        let (near, far) = pair().expect("room");
        let head = Head { kind: 999, ..Head::default() };
        // SAFETY: the head is readable for as many bytes as it has.
        unsafe { libc::send(near.as_raw_fd(), (&raw const head).cast(), size_of::<Head>(), 0) };
        assert!(matches!(receive(far.as_raw_fd(), false).expect("open"), Heard::Nothing));
    }
}
