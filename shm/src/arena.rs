//! The arena: one reserved range of addresses in which a process maps all segments of its job, each
//! at an offset that the plan fixed. An offset therefore names the same byte in every process of
//! the job, and in every incarnation of a worker: the undo log needs no pointers and no segment
//! table.
//!
//! Invariants:
//! - what is not mapped is PROT_NONE: a stray access faults, it does not corrupt;
//! - a ring's data is mapped twice in a row (`map_mirrored`), so any record is contiguous. Only the
//!   mirrored pair is ever mapped for these bytes (rule R10: every access starts in the first
//!   half).
//!
//! Called by workers and the supervisor while attaching.

use crate::fault::SetupError;
use crate::segment::PAGE;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether this process is the one writer of a segment, or one of its readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The single writer (rule: one process may write a byte).
    Owner,
    /// A reader: the mapping faults on a store.
    Peer,
    /// A reader that becomes the writer once the present one is dead, by
    /// [`Arena::make_writable`]. The descriptor must be a writable one.
    Heir,
}

/// A reserved address range with segments mapped into it.
#[derive(Debug)]
pub struct Arena {
    base: *mut u8,
    len: usize,
}

// SAFETY: the arena is a mapping, not tied to a thread; what may be accessed where is the segments'
// business.
unsafe impl Send for Arena {}
// SAFETY: as above; the methods that change mappings take &self but act on disjoint, page-aligned
// ranges.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `len` bytes of addresses (no memory).
    ///
    /// # Errors
    /// When the address space is limited (RLIMIT_AS) below `len`.
    pub fn reserve(len: usize) -> Result<Self, SetupError> {
        let len = len.next_multiple_of(PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous PROT_NONE mapping touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(SetupError::last(format!(
                "cannot reserve {} GiB of addresses (not memory){}",
                len.div_ceil(1 << 30),
                address_limit(len)
            )));
        }
        Ok(Self { base: base.cast(), len })
    }

    /// Address of offset 0.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes reserved.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of `offset`.
    ///
    /// # Panics
    /// When the offset lies outside the reservation: offsets come from our own plan.
    #[must_use]
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len, "offset {offset} outside the arena of {} bytes", self.len);
        // SAFETY: the result stays inside the reservation.
        unsafe { self.base.add(offset) }
    }

    /// Maps `len` bytes of a segment, from `from` on, at arena offset `at`. All three are whole
    /// pages.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub fn map(
        &self,
        fd: BorrowedFd<'_>,
        from: usize,
        len: usize,
        at: usize,
        access: Access,
    ) -> Result<(), SetupError> {
        assert!(at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && from.is_multiple_of(PAGE));
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "mapping outside the arena"
        );
        let prot = match access {
            Access::Owner => libc::PROT_READ | libc::PROT_WRITE,
            Access::Peer | Access::Heir => libc::PROT_READ,
        };
        let offset = libc::off_t::try_from(from)
            .map_err(|_| SetupError::other("offset too large", std::io::ErrorKind::InvalidInput))?;
        // SAFETY: [at, at + len) lies in our own reservation (checked above); MAP_FIXED replaces
        // only that.
        let got = unsafe {
            libc::mmap(
                self.base.add(at).cast(),
                len,
                prot,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                offset,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(SetupError::last(format!("cannot map {len} bytes at arena offset {at}")));
        }
        // Core files of a crashed worker need not carry its state.
        // SAFETY: advice on a mapping that was just made.
        unsafe { libc::madvise(got, len, libc::MADV_DONTDUMP) };
        Ok(())
    }

    /// Maps `len` bytes twice in a row, so that an access that starts in the first half may run
    /// over its end.
    ///
    /// # Errors
    /// When the kernel refuses a mapping.
    pub fn map_mirrored(
        &self,
        fd: BorrowedFd<'_>,
        from: usize,
        len: usize,
        at: usize,
        access: Access,
    ) -> Result<(), SetupError> {
        self.map(fd, from, len, at, access)?;
        self.map(fd, from, len, at + len, access)
    }

    /// Brings what there is of a mapped range into this process's page tables, so that the first
    /// access to each page costs no fault. The caller names parts that have pages: a hole of a
    /// segment would get some. Without effect before Linux 5.14.
    pub fn populate(&self, at: usize, len: usize) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: it reads pages of our own reservation into the page tables, no more.
        unsafe { libc::madvise(self.base.add(at).cast(), len, libc::MADV_POPULATE_READ) };
    }

    /// Makes a mapping of its own out of a part of one, by a difference that does not matter: core
    /// files have it. What is brought into the page tables there brings no neighbours with it, and
    /// making it writable splits nothing.
    pub fn set_apart(&self, at: usize, len: usize) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: advice on our own reservation.
        unsafe { libc::madvise(self.base.add(at).cast(), len, libc::MADV_DODUMP) };
    }

    /// Makes a range of neighbouring mappings writable that were made as [`Access::Heir`]: its
    /// former writer is dead. One call for many mappings: each call empties the processor's cache
    /// of translations once.
    ///
    /// # Errors
    /// When the kernel refuses, or something in the range was mapped from a read-only descriptor.
    pub fn make_writable(&self, at: usize, len: usize) -> Result<(), SetupError> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range lies in our own reservation; only what may be done with it changes.
        if unsafe { libc::mprotect(self.base.add(at).cast(), len, prot) } != 0 {
            return Err(SetupError::last(format!(
                "cannot make {len} bytes at arena offset {at} writable"
            )));
        }
        Ok(())
    }

    /// Takes [`Arena::make_writable`] back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn make_readable(&self, at: usize, len: usize) -> Result<(), SetupError> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: as above.
        if unsafe { libc::mprotect(self.base.add(at).cast(), len, libc::PROT_READ) } != 0 {
            return Err(SetupError::last(format!(
                "cannot make {len} bytes at arena offset {at} read-only"
            )));
        }
        Ok(())
    }

    /// Takes a range out of the arena again: what it showed is no business of this process any
    /// more.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget(&self, at: usize, len: usize) -> Result<(), SetupError> {
        assert!(at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE));
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range lies in our own reservation, to which it goes back.
        let got =
            unsafe { libc::mmap(self.base.add(at).cast(), len, libc::PROT_NONE, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return Err(SetupError::last(format!("cannot unmap {len} bytes at offset {at}")));
        }
        Ok(())
    }

    /// Asks for huge pages on a mapped range. Without effect where the system does not give them
    /// for shared memory.
    pub fn advise_huge(&self, at: usize, len: usize) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: advice on our own reservation.
        unsafe { libc::madvise(self.base.add(at).cast(), len, libc::MADV_HUGEPAGE) };
    }
}

/// What a limit on addresses has to do with a refusal of `len` bytes, and what to do about it.
fn address_limit(len: usize) -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is a valid place for the result.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    if got != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return String::new();
    }
    format!(
        ": this process may have {} MiB in all (ulimit -v {}); \
         raise that by more than {} GiB, or remove it: ulimit -v unlimited",
        limit.rlim_cur >> 20,
        limit.rlim_cur >> 10,
        len >> 30
    )
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `reserve` and is unmapped exactly once.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
