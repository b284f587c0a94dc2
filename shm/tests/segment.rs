//! Segments and arenas: what the kernel is asked to guarantee, it does.
//!
//! Promises: one process may write a byte; no peer can truncate what others have mapped; what was
//! given back reads as zeros, which are no frame (R9, R12).

mod common;

use common::{Memory, Random, TestRing, must};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use testudo_shm::arena::{Access, Arena};
use testudo_shm::fault::Fault;
use testudo_shm::primitive::Ordering;
use testudo_shm::segment::{PAGE, Segment};

fn memfd(flags: libc::c_uint, len: usize) -> OwnedFd {
    // SAFETY: a literal name; the descriptor is owned by the result alone.
    unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | flags);
        assert!(fd >= 0 && libc::ftruncate(fd, len as libc::off_t) == 0);
        OwnedFd::from_raw_fd(fd)
    }
}

#[test]
fn a_segment_can_be_neither_shrunk_nor_grown_nor_unsealed() {
    let segment = must(Segment::create("sealed", 4 * PAGE));
    for len in [0, PAGE, 5 * PAGE] {
        // SAFETY: plain system call.
        let done = unsafe { libc::ftruncate(segment.raw_fd(), len as libc::off_t) };
        let error = std::io::Error::last_os_error();
        assert_eq!((done, error.raw_os_error()), (-1, Some(libc::EPERM)), "to {len} bytes");
    }
    // SAFETY: plain system call.
    let done = unsafe { libc::fcntl(segment.raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(done, -1, "a peer could seal the owner out");
}

#[test]
fn only_a_sealed_descriptor_of_the_full_size_is_adopted() {
    let segment = must(Segment::create("whole", 4 * PAGE));
    let copy = || segment.fd().try_clone_to_owned().expect("dup");
    assert_eq!(must(Segment::adopt(copy(), 4 * PAGE)).len(), 4 * PAGE);
    assert_eq!(must(Segment::adopt(copy(), PAGE)).len(), PAGE);
    let short = Segment::adopt(copy(), 5 * PAGE).expect_err("short").to_string();
    assert!(short.contains("16384") && short.contains("20480"), "{short}");
    let unsealed = memfd(libc::MFD_ALLOW_SEALING, 4 * PAGE);
    assert!(Segment::adopt(unsealed, 4 * PAGE).is_err(), "unsealed");
    let partly = memfd(libc::MFD_ALLOW_SEALING, 4 * PAGE);
    // SAFETY: plain system call.
    let done = unsafe { libc::fcntl(partly.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
    assert_eq!(done, 0);
    let error = Segment::adopt(partly, 4 * PAGE).expect_err("it can be shrunk").to_string();
    assert!(error.contains("no sealed segment"), "{error}");
    let file = std::fs::File::open("/proc/self/exe").expect("an ordinary file");
    assert!(Segment::adopt(file.into(), PAGE).is_err(), "an ordinary file");
}

#[test]
fn a_read_only_descriptor_cannot_be_mapped_writable() {
    let segment = must(Segment::create("peer", 2 * PAGE));
    let peer = must(segment.read_only());
    let arena = must(Arena::reserve(8 * PAGE));
    must(arena.map(segment.fd(), 0, 2 * PAGE, 0, Access::Owner));
    must(arena.map(peer.as_fd(), 0, 2 * PAGE, 4 * PAGE, Access::Peer));
    let refused = arena.map(peer.as_fd(), 0, 2 * PAGE, 6 * PAGE, Access::Owner);
    let refused = refused.expect_err("mapped writable").source;
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    // SAFETY: a part of our own reservation.
    let made = unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        libc::mprotect(arena.at(4 * PAGE).cast(), PAGE, flags)
    };
    assert_eq!(made, -1, "a peer made its mapping writable");
    // SAFETY: both are mapped.
    unsafe {
        arena.at(100).write_volatile(7);
        assert_eq!(arena.at(4 * PAGE + 100).read_volatile(), 7, "the same memory");
    }
    // A peer cannot reopen it for writing through its own descriptor's flags either.
    // SAFETY: plain system call.
    let mode = unsafe { libc::fcntl(peer.as_raw_fd(), libc::F_GETFL) } & libc::O_ACCMODE;
    assert_eq!(mode, libc::O_RDONLY);
}

#[test]
fn r10_both_halves_of_a_mirror_are_the_same_bytes() {
    let segment = must(Segment::create("mirror", 2 * PAGE));
    let arena = must(Arena::reserve(8 * PAGE));
    must(arena.map_mirrored(segment.fd(), 0, 2 * PAGE, PAGE, Access::Owner));
    for offset in [0, 1, PAGE, 2 * PAGE - 1] {
        // SAFETY: both halves are mapped.
        unsafe {
            arena.at(PAGE + offset).write_volatile(offset as u8 | 0x80);
            assert_eq!(arena.at(3 * PAGE + offset).read_volatile(), offset as u8 | 0x80);
        }
    }
}

#[test]
fn r12_punched_pages_read_as_zeros_and_their_neighbours_stay() {
    let mut memory = Memory::new(4 * PAGE);
    let mut random = Random::new(1);
    memory.words().fill_with(|| random.next() | 1);
    let before = memory.words().to_vec();
    memory.segment.punch(PAGE, 2 * PAGE);
    let words = PAGE / 8;
    assert!(memory.words()[words..3 * words].iter().all(|word| *word == 0));
    assert_eq!(memory.words()[..words], before[..words]);
    assert_eq!(memory.words()[3 * words..], before[3 * words..]);
}

#[test]
fn r9_punched_ring_memory_is_no_frame() {
    let ring = TestRing::new(PAGE);
    let mut producer = ring.producer(0);
    producer.reserve(1000).expect("room").close(1000, 1);
    producer.publish();
    ring.segment.punch(PAGE, PAGE);
    assert_eq!(ring.data(0).load(Ordering::Relaxed), 0);
    let mut consumer = ring.consumer(0);
    assert!(consumer.look() && consumer.frame().is_none());
    assert_eq!(consumer.fault(), Some(Fault::Kind { found: 0, at: 0 }));
}

#[test]
fn a_segment_costs_nothing_before_it_is_touched() {
    let segment = must(Segment::create("sparse", 1 << 30));
    let file = std::fs::File::from(segment.fd().try_clone_to_owned().expect("dup"));
    let metadata = file.metadata().expect("stat");
    assert_eq!(metadata.len(), 1 << 30);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&metadata), 0);
    assert_eq!(std::os::unix::fs::MetadataExt::nlink(&metadata), 0, "it has a name somewhere");
}

#[test]
fn a_setup_error_says_what_was_being_done() {
    let error = Arena::reserve(usize::MAX / 2).expect_err("half of all addresses").to_string();
    assert!(error.contains("cannot reserve") && error.contains("memory"), "{error}");
}

#[test]
#[should_panic(expected = "outside the arena")]
fn an_offset_outside_the_arena_is_refused() {
    let _ = must(Arena::reserve(PAGE)).at(PAGE);
}
