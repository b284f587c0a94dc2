//! Missing pages: memory that is filled when it is first touched. The kernel stops who touches a
//! page that is not there, and a helper thread brings the bytes (userfaultfd).
//!
//! Works on pages that a memfd never had (or lost by punching); pages that were reserved read as
//! zeros and raise no fault (R16), so nothing here is ever reserved. A page that is there stays
//! what it is, so a process that takes a segment over goes on where its predecessor died.
//!
//! Invariants: bytes come from private memory and are put in place by the kernel in one piece: no
//! one sees half a page; a page that is there already is never overwritten.
//!
//! Called by the worker's loader.

use crate::arena::Arena;
use crate::fault::SetupError;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

const API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Faults of this process's own code only: what an unprivileged process may have.
const USER_MODE_ONLY: libc::c_int = 1;

#[repr(C)]
struct ApiCall {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const _: () = {
    assert!(size_of::<ApiCall>() == 24 && size_of::<Register>() == 32);
    assert!(size_of::<Copy>() == 40 && size_of::<Zero>() == 32 && size_of::<Message>() == 32);
};

/// Ranges of an arena whose missing pages are ours to bring.
#[derive(Debug)]
pub struct Missing {
    fd: OwnedFd,
    arena: &'static Arena,
}

impl Missing {
    /// Asks the kernel for the mechanism.
    ///
    /// # Errors
    /// When this process may not use it: an old kernel, or a container that forbids it.
    pub fn new(arena: &'static Arena) -> Result<Self, SetupError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: a plain system call that makes a descriptor.
        let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if raw < 0 {
            return Err(SetupError::last("cannot bring pages on first touch (userfaultfd)"));
        }
        // SAFETY: just returned by the kernel, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        let mut call = ApiCall { api: API, features: 0, ioctls: 0 };
        ioctl(&fd, UFFDIO_API, &mut call)
            .map_err(|_| SetupError::last("this kernel has another userfaultfd"))?;
        Ok(Self { fd, arena })
    }

    fn range(&self, at: usize, len: usize) -> Range {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.arena.len()));
        Range { start: self.arena.base().addr() as u64 + at as u64, len: len as u64 }
    }

    /// From here on, who touches a missing page in this mapped range of the arena waits for it.
    ///
    /// # Errors
    /// When the kernel cannot do this for such memory.
    pub fn register(&self, at: usize, len: usize) -> Result<(), SetupError> {
        let mut call = Register { range: self.range(at, len), mode: MODE_MISSING, ioctls: 0 };
        ioctl(&self.fd, UFFDIO_REGISTER, &mut call)
            .map_err(|_| SetupError::last("cannot watch a segment for missing pages"))
    }

    /// Missing pages of this range are zeros again. Wakes who still waits.
    pub fn unregister(&self, at: usize, len: usize) {
        let mut range = self.range(at, len);
        // Fails only for ranges that were never registered.
        let _ = ioctl(&self.fd, UFFDIO_UNREGISTER, &mut range);
    }

    /// Puts whole pages in place, up to the first that is there already. Returns how many bytes
    /// were put.
    ///
    /// # Errors
    /// What the kernel says: no memory.
    pub fn bring(&self, at: usize, bytes: &[u8]) -> io::Result<usize> {
        let range = self.range(at, bytes.len());
        let from = bytes.as_ptr().addr() as u64;
        let mut call = Copy { to: range.start, from, len: range.len, mode: 0, copied: 0 };
        match ioctl(&self.fd, UFFDIO_COPY, &mut call) {
            Ok(()) => Ok(bytes.len()),
            Err(_) if call.copied > 0 => Ok(call.copied as usize),
            Err(error) => match error.raw_os_error() {
                // There already; or nobody watches any more, since all of the range is there.
                Some(libc::EEXIST | libc::ENOENT) => Ok(0),
                Some(libc::EAGAIN) => self.bring(at, bytes),
                _ => Err(error),
            },
        }
    }

    /// The page at `at` holds zeros.
    ///
    /// # Errors
    /// What the kernel says: no memory.
    pub fn bring_zeros(&self, at: usize, len: usize) -> io::Result<()> {
        let mut call = Zero { range: self.range(at, len), mode: 0, zeroed: 0 };
        match ioctl(&self.fd, UFFDIO_ZEROPAGE, &mut call) {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST | libc::ENOENT) => {
                    self.wake(at, len);
                    Ok(())
                }
                Some(libc::EAGAIN) => self.bring_zeros(at, len),
                _ => Err(error),
            },
        }
    }

    /// Wakes who waits for a page that is there.
    pub fn wake(&self, at: usize, len: usize) {
        let mut range = self.range(at, len);
        // A wake-up that fails had nobody to wake.
        let _ = ioctl(&self.fd, UFFDIO_WAKE, &mut range);
    }

    /// The arena offset of a page that someone waits for; `None` when nobody does in that time.
    #[must_use]
    pub fn next(&self, patience: Duration) -> Option<usize> {
        let nothing = Message { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0 };
        let mut message = nothing;
        let read = |message: &mut Message| {
            let bytes = size_of::<Message>();
            // SAFETY: message has room for that many bytes; any bit pattern is a message.
            unsafe { libc::read(self.fd.as_raw_fd(), std::ptr::from_mut(message).cast(), bytes) }
        };
        if read(&mut message) <= 0 {
            if patience.is_zero() {
                return None;
            }
            let timeout = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX).max(1);
            let mut poll =
                libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&raw mut poll, 1, timeout) };
            if read(&mut message) <= 0 {
                return None;
            }
        }
        let base = self.arena.base().addr() as u64;
        let at = message.address.checked_sub(base)? as usize;
        (message.event == EVENT_PAGEFAULT).then_some(at & !(crate::segment::PAGE - 1))
    }
}

fn ioctl<T>(fd: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is given the structure that it takes, which outlives the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(all(test, not(miri), not(loom)))]
mod tests {
    use super::*;
    use crate::arena::Access;
    use crate::segment::{PAGE, Segment};

    /// Four missing pages; `None` where the system forbids this.
    fn four() -> Option<(&'static Arena, Segment, Missing)> {
        let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(4 * PAGE).unwrap()));
        let segment = Segment::create("missing", 4 * PAGE).unwrap();
        arena.map(segment.fd(), 0, 4 * PAGE, 0, Access::Owner).unwrap();
        let missing = Missing::new(arena).ok()?;
        missing.register(0, 4 * PAGE).unwrap();
        Some((arena, segment, missing))
    }

    fn first_byte(arena: &Arena, page: usize) -> u8 {
        // SAFETY: mapped by `four`.
        unsafe { arena.at(page * PAGE).read_volatile() }
    }

    #[test]
    fn r16_who_touches_a_missing_page_gets_its_bytes() {
        let Some((arena, _segment, missing)) = four() else { return };
        let missing = std::thread::spawn(move || {
            let mut at = Vec::new();
            while at.len() < 2 {
                if let Some(page) = missing.next(Duration::from_secs(5)) {
                    missing.bring(page, &[page as u8 / 16 + 7; PAGE]).unwrap();
                    at.push(page / PAGE);
                }
            }
            (at, missing)
        });
        assert_eq!(first_byte(arena, 2), (2 * PAGE) as u8 / 16 + 7);
        assert_eq!(first_byte(arena, 0), 7);
        let (at, missing) = missing.join().unwrap();
        assert_eq!(at, [2, 0]);
        missing.unregister(0, 4 * PAGE);
        assert_eq!(first_byte(arena, 3), 0);
    }

    #[test]
    fn r16_a_page_that_is_there_is_not_overwritten() {
        let Some((arena, _segment, missing)) = four() else { return };
        assert_eq!(missing.bring(PAGE, &[1; PAGE]).unwrap(), PAGE);
        assert_eq!(missing.bring(0, &[2; 3 * PAGE]).unwrap(), PAGE, "up to the page that is there");
        assert_eq!(missing.bring(PAGE, &[3; PAGE]).unwrap(), 0);
        missing.bring_zeros(2 * PAGE, PAGE).unwrap();
        assert_eq!([0, 1, 2].map(|page| first_byte(arena, page)), [2, 1, 0]);
    }
}
