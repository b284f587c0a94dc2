//! Staging memory: private pages from which, and into which, the disk transfers. A live segment is
//! never handed to the kernel (rules R4, R14).
//!
//! Invariants: a buffer is owned by one holder at a time, among them an operation in flight; it is
//! free again when it is dropped. The memory lives as long as the pool or any of its buffers. A
//! pool has at most 64 buffers; when they are out the caller's cut fails, not the job.
//!
//! Called by whoever copies blocks out of segments or reads a file.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use testudo_shm::primitive::{AtomicU64, Ordering};

use super::BUFFER_BYTES;

/// A bit for each buffer in one word.
const BUFFERS_MAX: usize = 64;

/// Huge pages are this large, and lie at multiples of it.
const HUGE: usize = 2 << 20;

/// The memory and who has it.
struct Shared {
    /// The mapping, of `mapped` bytes.
    mapping: NonNull<u8>,
    mapped: usize,
    /// The first buffer: a multiple of [`HUGE`] inside the mapping.
    base: NonNull<u8>,
    count: usize,
    /// Bit `n` is set while buffer `n` is free.
    free: AtomicU64,
}

// SAFETY: the pointers are to a mapping that is unmapped only when the last owner is gone; its
// bytes are reached only through a `Buffer`, of which there is one for each range at a time.
unsafe impl Send for Shared {}
// SAFETY: as above; what is shared is the free word, an atomic.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no buffer of it is left: each holds the `Arc`.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

/// Staging memory of one thread: buffers of [`BUFFER_BYTES`], aligned to blocks, in huge pages
/// where the kernel has them. Clones share the memory.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} of {} free)", self.free(), self.shared.count)
    }
}

impl Pool {
    /// Memory for as many whole buffers as `bytes` hold: one at least, 64 at most.
    pub fn new(bytes: usize) -> Self {
        let count = (bytes / BUFFER_BYTES).clamp(1, BUFFERS_MAX);
        // Room to begin at a huge page.
        let mapped = (count * BUFFER_BYTES).next_multiple_of(HUGE) + HUGE;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), mapped, protection, flags, -1, 0) };
        let mapping = NonNull::new(at.cast::<u8>()).filter(|_| at != libc::MAP_FAILED);
        let Some(mapping) = mapping else {
            let layout = Layout::from_size_align(mapped, HUGE);
            handle_alloc_error(layout.expect("a few MiB are a valid layout"))
        };
        let skip = mapping.as_ptr().align_offset(HUGE);
        // SAFETY: `skip` is less than HUGE, and the mapping is larger by HUGE than the buffers.
        let base = unsafe { mapping.add(skip) };
        let length = count * BUFFER_BYTES;
        // SAFETY: both pieces of advice concern pages of our mapping and never change bytes that
        // were written. A kernel that refuses them costs speed only.
        unsafe {
            libc::madvise(base.as_ptr().cast(), length, libc::MADV_HUGEPAGE);
            libc::madvise(base.as_ptr().cast(), length, libc::MADV_POPULATE_WRITE);
        }
        let free = AtomicU64::new(u64::MAX >> (BUFFERS_MAX - count));
        Self { shared: Arc::new(Shared { mapping, mapped, base, count, free }) }
    }

    /// A buffer with arbitrary old content, or none when all are in use.
    pub fn take(&self) -> Option<Buffer> {
        loop {
            // SYNC buffer-free: what the last holder did with the bytes is over.
            let free = self.shared.free.load(Ordering::Acquire);
            if free == 0 {
                return None;
            }
            let number = free.trailing_zeros();
            let taken = free & !(1 << number);
            let (ok, failed) = (Ordering::Acquire, Ordering::Relaxed);
            if self.shared.free.compare_exchange(free, taken, ok, failed).is_ok() {
                return Some(Buffer { shared: Arc::clone(&self.shared), number });
            }
        }
    }

    /// Buffers that can be taken now.
    pub fn free(&self) -> usize {
        self.shared.free.load(Ordering::Relaxed).count_ones() as usize
    }

    /// Buffers in all.
    pub fn buffers(&self) -> usize {
        self.shared.count
    }

    /// Where all the buffers lie, in one piece.
    pub(super) fn range(&self) -> (NonNull<u8>, usize) {
        (self.shared.base, self.shared.count * BUFFER_BYTES)
    }
}

/// One piece of a pool's memory. It is free again when dropped; a disk that has it in flight drops
/// it or gives it back only when the kernel is done with it.
pub struct Buffer {
    shared: Arc<Shared>,
    number: u32,
}

impl Buffer {
    /// Whether it is of this pool.
    pub(super) fn is_of(&self, pool: &Pool) -> bool {
        Arc::ptr_eq(&self.shared, &pool.shared)
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the number is below the pool's count, so the place is inside its mapping.
        unsafe { self.shared.base.add(self.number as usize * BUFFER_BYTES) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, initialised (the kernel's zeros at least), and ours alone.
        unsafe { NonNull::slice_from_raw_parts(self.start(), BUFFER_BYTES).as_ref() }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { NonNull::slice_from_raw_parts(self.start(), BUFFER_BYTES).as_mut() }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({})", self.number)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SYNC buffer-free: our use of the bytes is over before another takes them.
        self.shared.free.fetch_or(1 << self.number, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::BLOCK;

    #[test]
    fn a_dropped_buffer_is_free_again() {
        let pool = Pool::new(3 * BUFFER_BYTES);
        let taken: Vec<Buffer> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((taken.len(), pool.free(), pool.buffers()), (3, 0, 3));
        drop(taken);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn buffers_are_aligned_and_do_not_overlap() {
        let pool = Pool::new(64 * BUFFER_BYTES);
        let mut taken: Vec<Buffer> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), 64);
        for (number, buffer) in taken.iter_mut().enumerate() {
            assert_eq!(buffer.as_ptr().addr() % BLOCK, 0);
            buffer.fill(number as u8);
        }
        for (number, buffer) in taken.iter().enumerate() {
            assert!(buffer.iter().all(|byte| *byte == number as u8), "buffer {number}");
        }
    }

    #[test]
    fn a_buffer_outlives_its_pool() {
        let pool = Pool::new(1);
        let mut buffer = pool.take().unwrap();
        drop(pool);
        buffer.fill(7);
        assert_eq!(buffer[BUFFER_BYTES - 1], 7);
    }
}
