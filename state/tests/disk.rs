//! Every disk keeps the same promises: io_uring, the helper thread, the model in memory, and the
//! first two with a kernel that cuts and interrupts what it is asked for.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testudo_state::disk::{
    self, BLOCK, BUFFER_BYTES, Buffer, Choice, DEPTH_MAX, Disk, DiskKind, Disturbance, Done,
    Faulty, FileId, Memory, Op, Outcome, Pool, SECTOR, Threaded, Ticket, Uring, What,
};

/// Cuts and interrupts what it can.
fn unkind() -> Disturbance {
    Disturbance { bytes_at_most: 3 * BLOCK, interrupt_each: 3, ..Disturbance::default() }
}

/// Every disk, with its name. Where io_uring is refused, the others remain.
fn disks() -> Vec<(&'static str, Box<dyn Disk>)> {
    let mut disks: Vec<(&str, Box<dyn Disk>)> = vec![
        ("pwrite", Box::new(Threaded::new().unwrap())),
        ("pwrite, disturbed", Box::new(Threaded::disturbed(unkind()).unwrap())),
        ("memory", Box::new(Memory::new())),
        ("around memory", Box::new(Faulty::new(Memory::new()))),
    ];
    match (Uring::new(8), Uring::disturbed(DEPTH_MAX, unkind())) {
        (Ok(plain), Ok(disturbed)) => {
            disks.push(("io_uring", Box::new(plain)));
            disks.push(("io_uring, disturbed", Box::new(disturbed)));
        }
        (Err(e), _) | (_, Err(e)) => eprintln!("without io_uring: {e}"),
    }
    disks
}

/// Runs a test on every disk, in a folder of its own.
fn each(test: impl Fn(&mut dyn Disk, &Pool, &Path)) {
    let pool = Pool::new(16 * BUFFER_BYTES);
    for (name, mut disk) in disks() {
        let folder = tempfile::tempdir().unwrap();
        eprintln!("on {name}");
        test(&mut *disk, &pool, folder.path());
        assert_eq!(disk.in_flight(), 0, "{name}");
        drop(disk);
        assert_eq!(pool.free(), pool.buffers(), "{name}: a buffer is missing");
    }
}

/// Submits and waits for one operation.
fn now(disk: &mut dyn Disk, op: Op) -> io::Result<Outcome> {
    disk::run_now(disk, op).map(|(outcome, _)| outcome)
}

fn file_of(outcome: io::Result<Outcome>) -> FileId {
    match outcome {
        Ok(Outcome::File(file)) => file,
        other => panic!("{other:?}"),
    }
}

fn create(disk: &mut dyn Disk, path: &Path) -> FileId {
    file_of(now(disk, Op::Create { path: path.into() }))
}

/// A buffer whose every word differs from all others of its seed.
fn filled(pool: &Pool, seed: u64) -> Buffer {
    let mut buffer = pool.take().expect("a free buffer");
    for (place, word) in buffer.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (seed << 32 | place as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
    }
    buffer
}

fn wait_for(disk: &mut dyn Disk, count: usize) -> Vec<Done> {
    let mut done = Vec::new();
    while done.len() < count {
        disk.poll(&mut done);
        disk.wait(Duration::from_millis(20));
    }
    done
}

fn names(disk: &dyn Disk, folder: &Path) -> Vec<String> {
    disk.list(folder).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn what_was_written_is_read_back() {
    each(|disk, pool, folder| {
        let path = folder.join("file");
        let file = create(disk, &path);
        let places = [3_u64, 0, 5, 1, 2, 4];
        for place in places {
            let buffer = filled(pool, place);
            let at = place * BUFFER_BYTES as u64;
            disk.submit(Op::Write { file, at, buffer, bytes: BUFFER_BYTES }).unwrap();
        }
        for done in wait_for(disk, places.len()) {
            assert_eq!(done.result.unwrap(), Outcome::Done);
            assert!(done.buffer.is_some());
        }
        assert_eq!(now(disk, Op::Sync { file }).unwrap(), Outcome::Done);
        assert_eq!(now(disk, Op::Close { file }).unwrap(), Outcome::Done);
        assert_eq!(disk.list(folder).unwrap(), [("file".into(), 6 * BUFFER_BYTES as u64)]);

        let file = file_of(now(disk, Op::Open { path: path.clone() }));
        let tickets: Vec<(Ticket, u64)> = (0..7)
            .map(|place| {
                let buffer = pool.take().unwrap();
                let at = place * BUFFER_BYTES as u64;
                (disk.submit(Op::Read { file, at, buffer, bytes: BUFFER_BYTES }).unwrap(), place)
            })
            .collect();
        for done in wait_for(disk, tickets.len()) {
            let place = tickets.iter().find(|(ticket, _)| *ticket == done.ticket).unwrap().1;
            let expected = if place == 6 { 0 } else { BUFFER_BYTES };
            assert_eq!(done.result.unwrap(), Outcome::Read(expected));
            let (read, pool) = (done.buffer.unwrap(), Pool::new(BUFFER_BYTES));
            assert!(place == 6 || read[..] == filled(&pool, place)[..], "part {place}");
        }
        now(disk, Op::Close { file }).unwrap();
    });
}

#[test]
fn a_file_is_created_only_where_there_is_none() {
    each(|disk, _, folder| {
        let path = folder.join("file");
        let file = create(disk, &path);
        let refused = now(disk, Op::Create { path: path.clone() }).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(disk::os_code(&refused), Some(libc::EEXIST));
        assert!(refused.to_string().contains(path.to_str().unwrap()), "{refused}");
        now(disk, Op::Close { file }).unwrap();
    });
}

#[test]
fn a_missing_file_is_an_error_with_its_name() {
    each(|disk, _, folder| {
        let path = folder.join("missing");
        let to = folder.join("other");
        for op in [
            Op::Open { path: path.clone() },
            Op::Edit { path: path.clone() },
            Op::Remove { path: path.clone() },
            Op::Rename { from: path.clone(), to },
        ] {
            let doing = op.doing();
            let error = now(disk, op).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{doing}");
            assert!(error.to_string().contains("missing"), "{doing}: {error}");
        }
    });
}

#[test]
fn names_are_changed_listed_and_removed() {
    each(|disk, pool, folder| {
        let (old, new) = (folder.join("old"), folder.join("new"));
        disk::write_file(disk, pool, &old, b"the new content").unwrap();
        disk::write_file(disk, pool, &new, b"in the way").unwrap();
        assert_eq!(names(disk, folder), ["new", "old"]);
        now(disk, Op::Rename { from: old, to: new.clone() }).unwrap();
        now(disk, Op::SyncDir { path: folder.into() }).unwrap();
        assert_eq!(names(disk, folder), ["new"]);
        let read = disk::read_file(disk, pool, &new, 4, 11, 1 << 20).unwrap();
        assert_eq!(read, b"new content");
        now(disk, Op::Remove { path: new }).unwrap();
        assert!(names(disk, folder).is_empty());
    });
}

#[test]
fn a_file_opened_to_edit_is_changed_in_place() {
    each(|disk, pool, folder| {
        let path = folder.join("roots");
        disk::write_file(disk, pool, &path, &[1; 2 * BLOCK]).unwrap();
        let file = file_of(now(disk, Op::Edit { path: path.clone() }));
        disk::write_at(disk, pool, file, BLOCK as u64, b"second").unwrap();
        now(disk, Op::Sync { file }).unwrap();
        now(disk, Op::Close { file }).unwrap();
        let read = disk::read_file(disk, pool, &path, 0, 2 * BLOCK as u64, 1 << 20).unwrap();
        assert_eq!(read[..BLOCK], [1; BLOCK]);
        assert_eq!(&read[BLOCK..BLOCK + 7], b"second\0");
        assert_eq!(read.len(), 2 * BLOCK);
    });
}

#[test]
fn any_part_of_a_file_is_read_and_no_more_than_it_has() {
    each(|disk, pool, folder| {
        let path = folder.join("file");
        let bytes: Vec<u8> = (0..600_000_u64).map(|n| ((n * 7919) >> 8) as u8).collect();
        disk::write_file(disk, pool, &path, &bytes).unwrap();
        let size = bytes.len().next_multiple_of(BLOCK) as u64;
        for (at, length) in [(0, 0), (0, 1), (4095, 2), (262_143, 300_000), (0, 600_000)] {
            let read = disk::read_file(disk, pool, &path, at, length, 1 << 20).unwrap();
            assert_eq!(read, bytes[at as usize..(at + length) as usize], "{length} at {at}");
        }
        for (at, length, limit) in [(size, 1, 10), (1, size, 1 << 20), (0, 11, 10)] {
            let error = disk::read_file(disk, pool, &path, at, length, limit).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
        let error = disk::read_file(disk, pool, &path, u64::MAX, 9, 10).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    });
}

#[test]
fn too_many_operations_come_back_unharmed() {
    let pool = Pool::new(64 * BUFFER_BYTES);
    for (name, mut disk) in disks() {
        let folder = tempfile::tempdir().unwrap();
        let file = create(&mut *disk, &folder.path().join("file"));
        let mut submitted = 0;
        let refused = loop {
            let buffer = filled(&pool, submitted);
            let at = submitted * BLOCK as u64;
            match disk.submit(Op::Write { file, at, buffer, bytes: BLOCK }) {
                Ok(_) => submitted += 1,
                Err(op) => break op,
            }
        };
        assert!((8..=DEPTH_MAX as u64).contains(&submitted), "{name}: {submitted}");
        assert_eq!(disk.in_flight() as u64, submitted, "{name}");
        let Op::Write { at, buffer, .. } = &refused else { panic!("{refused:?}") };
        assert_eq!(*at, submitted * BLOCK as u64);
        assert_eq!(buffer[..], filled(&pool, submitted)[..]);
        for done in wait_for(&mut *disk, submitted as usize) {
            done.result.unwrap();
        }
        disk.submit(refused).unwrap();
        wait_for(&mut *disk, 1).pop().unwrap().result.unwrap();
    }
    assert_eq!(pool.free(), 64);
}

#[test]
fn dropping_a_disk_waits_for_what_is_in_flight() {
    let pool = Pool::new(16 * BUFFER_BYTES);
    for (name, mut disk) in disks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = create(&mut *disk, &path);
        for place in 0..8 {
            let (at, buffer) = (place * BUFFER_BYTES as u64, filled(&pool, place));
            disk.submit(Op::Write { file, at, buffer, bytes: BUFFER_BYTES }).unwrap();
        }
        let is_real = disk.kind() != "memory";
        drop(disk);
        assert_eq!(pool.free(), 16, "{name}");
        if is_real {
            let content = std::fs::read(&path).unwrap();
            assert_eq!(content.len(), 8 * BUFFER_BYTES, "{name}");
            for (place, part) in content.chunks(BUFFER_BYTES).enumerate() {
                assert!(part == &filled(&pool, place as u64)[..], "{name}: part {place}");
            }
        }
    }
}

#[test]
fn polling_alone_completes_everything() {
    each(|disk, pool, folder| {
        let file = create(disk, &folder.join("file"));
        for place in 0..8 {
            let (at, buffer) = (place * BUFFER_BYTES as u64, filled(pool, place));
            disk.submit(Op::Write { file, at, buffer, bytes: BUFFER_BYTES }).unwrap();
        }
        let mut done = Vec::new();
        for _ in 0..60_000 {
            disk.poll(&mut done);
            if disk.in_flight() == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(done.len(), 8);
        now(disk, Op::Close { file }).unwrap();
    });
}

#[test]
fn registered_buffers_and_others_are_both_written() {
    let Ok(mut disk) = Uring::new(8) else { return };
    let (pool, stranger) = (Pool::new(4 * BUFFER_BYTES), Pool::new(BUFFER_BYTES));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    eprintln!("registered: {}", disk.register(&pool));
    let file = create(&mut disk, &path);
    for (place, pool) in [&stranger, &pool].into_iter().enumerate() {
        let (at, buffer) = (place as u64 * BUFFER_BYTES as u64, filled(pool, place as u64));
        disk.submit(Op::Write { file, at, buffer, bytes: BUFFER_BYTES }).unwrap();
    }
    for done in wait_for(&mut disk, 2) {
        done.result.unwrap();
    }
    now(&mut disk, Op::Close { file }).unwrap();
    for place in 0..2 {
        let at = place * BUFFER_BYTES as u64;
        let read = disk::read_file(&mut disk, &pool, &path, at, BUFFER_BYTES as u64, 1 << 20);
        assert!(read.unwrap() == filled(&pool, place)[..], "part {place}");
    }
}

#[test]
fn reserved_room_is_part_of_the_file_and_nothing_is_lost_to_it() {
    each(|disk, pool, folder| {
        let path = folder.join("file");
        let file = create(disk, &path);
        let reserved = 3 * BUFFER_BYTES as u64;
        assert_eq!(now(disk, Op::Reserve { file, bytes: reserved }).unwrap(), Outcome::Done);
        disk::write_at(disk, pool, file, BLOCK as u64, &[9; BLOCK]).unwrap();
        now(disk, Op::Reserve { file, bytes: BLOCK as u64 }).unwrap();
        now(disk, Op::Sync { file }).unwrap();
        now(disk, Op::Close { file }).unwrap();
        assert_eq!(disk::size_of(disk, &path).unwrap(), reserved);
        let read = disk::read_file(disk, pool, &path, 0, 3 * BLOCK as u64, 1 << 20).unwrap();
        assert!(read == [[0; BLOCK], [9; BLOCK], [0; BLOCK]].concat());
        if disk.kind() != "memory" {
            let file = file_of(now(disk, Op::Edit { path: "/dev/full".into() }));
            let refused = now(disk, Op::Reserve { file, bytes: 1 << 20 }).unwrap_err();
            assert_eq!(disk::os_code(&refused), Some(libc::ENODEV), "{refused}");
            now(disk, Op::Close { file }).unwrap();
        }
    });
}

#[test]
fn an_output_that_is_not_ours_is_synced() {
    each(|disk, _, folder| {
        let fd: OwnedFd = File::create(folder.join("output")).unwrap().into();
        assert_eq!(now(disk, Op::SyncFd { fd }).unwrap(), Outcome::Done);
        let (reader, _writer) = io::pipe().unwrap();
        let refused = now(disk, Op::SyncFd { fd: reader.into() }).unwrap_err();
        assert_eq!(disk::os_code(&refused), Some(libc::EINVAL), "a pipe cannot be synced");
    });
}

/// `/dev/full` knows no direct transfers either.
#[test]
fn a_full_disk_is_an_error_that_gives_the_buffer_back() {
    each(|disk, pool, _| {
        if disk.kind() == "memory" {
            return;
        }
        let file = file_of(now(disk, Op::Edit { path: "/dev/full".into() }));
        let buffer = pool.take().unwrap();
        disk.submit(Op::Write { file, at: 0, buffer, bytes: BUFFER_BYTES }).unwrap();
        let done = wait_for(disk, 1).pop().unwrap();
        let error = done.result.unwrap_err();
        assert_eq!(disk::os_code(&error), Some(libc::ENOSPC));
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().starts_with("cannot write /dev/full: "), "{error}");
        assert!(done.buffer.is_some());
        now(disk, Op::Close { file }).unwrap();
    });
}

#[test]
fn a_path_that_no_file_can_have_is_an_error() {
    each(|disk, _, folder| {
        if disk.kind() == "memory" {
            return;
        }
        let error = now(disk, Op::Open { path: folder.join("a\0b") }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    });
}

fn panics(work: impl FnOnce() + std::panic::UnwindSafe) -> bool {
    std::panic::catch_unwind(work).is_err()
}

#[test]
fn a_broken_rule_of_the_caller_is_found_on_every_disk() {
    for number in 0..disks().len() {
        for (rule, at, bytes) in [("at", 512, BLOCK), ("bytes", 0, 1000), ("none", 0, 0)] {
            let broken = panics(move || {
                let (_, mut disk) = disks().swap_remove(number);
                let folder = tempfile::tempdir().unwrap();
                let file = create(&mut *disk, &folder.path().join("file"));
                let buffer = Pool::new(1).take().unwrap();
                let _ = disk.submit(Op::Write { file, at, buffer, bytes });
            });
            assert!(broken, "{rule} on disk {number}");
        }
        for closes in [false, true] {
            let broken = panics(move || {
                let (_, mut disk) = disks().swap_remove(number);
                let folder = tempfile::tempdir().unwrap();
                let file = create(&mut *disk, &folder.path().join("file"));
                let buffer = Pool::new(1).take().unwrap();
                disk.submit(Op::Write { file, at: 0, buffer, bytes: BLOCK }).unwrap();
                let op = if closes { Op::Close { file } } else { Op::Sync { file } };
                let _ = disk.submit(op);
            });
            assert!(broken, "close: {closes}, on disk {number}");
        }
    }
}

#[test]
fn an_injected_error_comes_once_and_gives_the_buffer_back() {
    let pool = Pool::new(4 * BUFFER_BYTES);
    for (name, inner) in disks() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = Faulty::new(Boxed(inner));
        disk.fail("write", 1, What::Error(libc::EIO));
        disk.fail("sync", 0, What::Error(libc::EIO));
        disk.fail("create", 1, What::Error(libc::ENOSPC));
        let file = create(&mut disk, &folder.path().join("file"));
        let codes: Vec<Option<i32>> = (0..3_u64)
            .map(|place| {
                let (at, buffer) = (place * BLOCK as u64, filled(&pool, place));
                disk.submit(Op::Write { file, at, buffer, bytes: BLOCK }).unwrap();
                let done = wait_for(&mut disk, 1).pop().unwrap();
                assert!(done.buffer.is_some());
                done.result.err().and_then(|error| disk::os_code(&error))
            })
            .collect();
        assert_eq!(codes, [None, Some(libc::EIO), None], "{name}");
        assert_eq!(now(&mut disk, Op::Sync { file }).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(now(&mut disk, Op::Sync { file }).unwrap(), Outcome::Done, "{name}");
        let refused = now(&mut disk, Op::Create { path: folder.path().join("other") });
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!((disk.injected(), names(&disk, folder.path()).len()), (3, 1), "{name}");
        assert_eq!(pool.free(), 4);
    }
}

/// A boxed disk is a disk.
struct Boxed(Box<dyn Disk>);

impl Disk for Boxed {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        self.0.submit(op)
    }
    fn poll(&mut self, done: &mut Vec<Done>) {
        self.0.poll(done);
    }
    fn wait(&mut self, patience: Duration) {
        self.0.wait(patience);
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        self.0.list(folder)
    }
    fn kind(&self) -> &'static str {
        self.0.kind()
    }
}

#[test]
fn a_write_that_stops_half_way_fails_and_leaves_its_beginning() {
    let pool = Pool::new(4 * BUFFER_BYTES);
    let path = Path::new("/folder/file");
    let mut disk = Faulty::new(Memory::new());
    disk.fail("write", 0, What::Short(2));
    let error = disk::write_file(&mut disk, &pool, path, &[7; 5 * BLOCK]).unwrap_err();
    assert_eq!(disk::os_code(&error), Some(libc::ENOSPC));
    assert_eq!(disk.inner().content(path).unwrap(), [7; 2 * BLOCK]);
    disk.inner().put(path, &[8; 4 * BLOCK]);
    disk.fail("read", 0, What::Short(1));
    let error = disk::read_file(&mut disk, &pool, path, 0, 2 * BLOCK as u64, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
    assert_eq!(pool.free(), 4);
}

#[test]
fn failures_by_chance_are_the_same_for_the_same_seed() {
    let run = |seed| {
        let (pool, mut disk) = (Pool::new(BUFFER_BYTES), Faulty::new(Memory::new()));
        disk.fail_by_chance(seed, 4);
        let failed: Vec<bool> = (0..50)
            .map(|n| {
                let path = PathBuf::from(format!("/folder/{n}"));
                let wrote = std::panic::AssertUnwindSafe(&mut disk);
                disk::write_file(wrote.0, &pool, &path, b"x").is_err()
            })
            .collect();
        assert_eq!(pool.free(), 1);
        assert!(disk.injected() > 5, "{}", disk.injected());
        failed
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

/// Makes a system call of this thread fail with `code`, as a container's seccomp profile does.
fn refuse(call: libc::c_long, code: i32) {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // Load the call's number; skip one if it is another call; else the error.
    let number = u32::try_from(call).unwrap();
    let code = u32::try_from(code).unwrap();
    let mut program = [
        step(0x20, 0, 0, 0),
        step(0x15, 0, 1, number),
        step(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | code),
        step(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: both calls concern this thread alone; the program outlives the second.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter), 0);
    }
}

#[test]
fn where_io_uring_is_refused_the_helper_thread_takes_over_and_says_why() {
    for (code, word) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "built without")] {
        let test = move || {
            refuse(libc::SYS_io_uring_setup, code);
            let (mut disk, why) = disk::open(DiskKind::Auto).unwrap();
            let why = why.expect("a reason");
            assert!(why.contains(word) && why.contains("pwrite"), "{why}");
            assert_eq!(disk.kind(), "pwrite");
            let folder = tempfile::tempdir().unwrap();
            let pool = Pool::new(BUFFER_BYTES);
            disk::write_file(&mut *disk, &pool, &folder.path().join("file"), b"x").unwrap();
            let refused = disk::open(DiskKind::Uring).err().expect("asked for io_uring alone");
            assert!(refused.to_string().contains(word), "{refused}");
        };
        std::thread::spawn(test).join().unwrap();
    }
}

#[test]
fn buffers_that_cannot_be_registered_are_written_all_the_same() {
    let test = || {
        let Ok(mut disk) = Uring::new(8) else { return };
        refuse(libc::SYS_io_uring_register, libc::ENOMEM);
        let pool = Pool::new(BUFFER_BYTES);
        assert!(!disk.register(&pool));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        disk::write_file(&mut disk, &pool, &path, b"written").unwrap();
        assert_eq!(disk::read_file(&mut disk, &pool, &path, 0, 7, 7).unwrap(), b"written");
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn pwrite_is_used_without_a_word_when_asked_for() {
    let (disk, why) = disk::open(DiskKind::Pwrite).unwrap();
    assert_eq!((disk.kind(), why), ("pwrite", None));
}

// The model of a crash.

const FOLDER: &str = "/folder";

fn at(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// What the file holds after each possible crash.
fn contents(disk: &Memory, path: &Path) -> BTreeSet<Option<Vec<u8>>> {
    disk.choices(4096).into_iter().map(|choice| disk.crash(choice).content(path)).collect()
}

#[test]
fn what_was_synced_with_its_name_survives_every_crash() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk::write_file(&mut disk, &pool, &at("file"), &[5; BLOCK]).unwrap();
    now(&mut disk, Op::SyncDir { path: FOLDER.into() }).unwrap();
    assert_eq!(disk.unknowns(), 0);
    let left = disk.crash(Choice::Bits(0));
    assert_eq!(left.content(&at("file")).unwrap(), [5; BLOCK]);
    assert_eq!(left.crash(Choice::Seed(1)).names(), [at("file")]);
}

#[test]
fn an_unsynced_name_is_there_or_not() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk::write_file(&mut disk, &pool, &at("file"), &[5; BLOCK]).unwrap();
    let left = contents(&disk, &at("file"));
    assert_eq!(left, BTreeSet::from([None, Some(vec![5; BLOCK])]));
}

#[test]
fn an_unsynced_write_is_kept_lost_or_torn_at_a_sector() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk.put(&at("roots"), &[1; BLOCK]);
    let file = file_of(now(&mut disk, Op::Edit { path: at("roots") }));
    disk::write_at(&mut disk, &pool, file, 0, &[2; BLOCK]).unwrap();
    let torn =
        |first: u8, rest: u8| Some([[first; SECTOR].to_vec(), vec![rest; 7 * SECTOR]].concat());
    let all = BTreeSet::from([torn(1, 1), torn(1, 2), torn(2, 1), torn(2, 2)]);
    assert_eq!(contents(&disk, &at("roots")), all);
    for seed in 0..100 {
        let left = disk.crash(Choice::Seed(seed)).content(&at("roots")).unwrap();
        let whole = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
        assert!(left.chunks(SECTOR).all(whole), "seed {seed}");
        assert_eq!(disk.crash(Choice::Seed(seed)).content(&at("roots")).unwrap(), left);
    }
    now(&mut disk, Op::Sync { file }).unwrap();
    assert_eq!(contents(&disk, &at("roots")), BTreeSet::from([torn(2, 2)]));
}

#[test]
fn a_file_may_have_grown_without_its_bytes() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    let file = create(&mut disk, &at("file"));
    now(&mut disk, Op::SyncDir { path: FOLDER.into() }).unwrap();
    disk::write_at(&mut disk, &pool, file, 0, &[1; BLOCK]).unwrap();
    let left = contents(&disk, &at("file"));
    for possible in [vec![], vec![0; BLOCK], vec![1; SECTOR], vec![1; BLOCK]] {
        assert!(left.contains(&Some(possible.clone())), "{} bytes", possible.len());
    }
    now(&mut disk, Op::Reserve { file, bytes: 2 * BLOCK as u64 }).unwrap();
    now(&mut disk, Op::Sync { file }).unwrap();
    let synced = [[1; BLOCK], [0; BLOCK]].concat();
    assert_eq!(contents(&disk, &at("file")), BTreeSet::from([Some(synced)]));
}

#[test]
fn a_later_write_may_survive_an_earlier_one() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk.put(&at("file"), &[0; 2 * BLOCK]);
    let file = file_of(now(&mut disk, Op::Edit { path: at("file") }));
    disk::write_at(&mut disk, &pool, file, 0, &[1; BLOCK]).unwrap();
    disk::write_at(&mut disk, &pool, file, BLOCK as u64, &[2; BLOCK]).unwrap();
    let reordered = [[0; BLOCK], [2; BLOCK]].concat();
    assert!(contents(&disk, &at("file")).contains(&Some(reordered)));
}

#[test]
fn a_rename_leaves_the_file_under_one_of_its_names() {
    let mut disk = Memory::new();
    disk.put(&at("new"), b"old content");
    disk.put(&at("temporary"), b"new content");
    now(&mut disk, Op::Rename { from: at("temporary"), to: at("new") }).unwrap();
    let before = vec![at("new"), at("temporary")];
    let left: BTreeSet<Vec<PathBuf>> =
        disk.choices(100).into_iter().map(|choice| disk.crash(choice).names()).collect();
    assert_eq!(left, BTreeSet::from([before, vec![at("new")]]));
    now(&mut disk, Op::SyncDir { path: FOLDER.into() }).unwrap();
    assert_eq!(disk.crash(Choice::Bits(0)).names(), [at("new")]);
}

#[test]
fn a_removed_name_may_come_back_until_its_folder_is_synced() {
    let mut disk = Memory::new();
    disk.put(&at("file"), b"x");
    now(&mut disk, Op::Remove { path: at("file") }).unwrap();
    assert_eq!(contents(&disk, &at("file")).len(), 2);
    now(&mut disk, Op::SyncDir { path: FOLDER.into() }).unwrap();
    assert_eq!(contents(&disk, &at("file")), BTreeSet::from([None]));
}

#[test]
fn no_later_sync_saves_what_a_failed_one_lost() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk.put(&at("file"), &[1; BLOCK]);
    let file = file_of(now(&mut disk, Op::Edit { path: at("file") }));
    disk::write_at(&mut disk, &pool, file, 0, &[2; BLOCK]).unwrap();
    disk.fail_syncs(1);
    let failed = now(&mut disk, Op::Sync { file }).unwrap_err();
    assert_eq!(disk::os_code(&failed), Some(libc::EIO));
    now(&mut disk, Op::Sync { file }).unwrap();
    assert_eq!(disk.content(&at("file")).unwrap(), [2; BLOCK], "reads still see it");
    assert_eq!(disk.crash(Choice::Bits(u64::MAX)).content(&at("file")).unwrap(), [1; BLOCK]);
}

#[test]
fn an_operation_in_flight_may_have_begun() {
    let (mut disk, pool) = (Memory::new(), Pool::new(BUFFER_BYTES));
    disk.put(&at("file"), &[1; BLOCK]);
    let file = file_of(now(&mut disk, Op::Edit { path: at("file") }));
    let mut buffer = pool.take().unwrap();
    buffer.fill(2);
    disk.submit(Op::Write { file, at: 0, buffer, bytes: BLOCK }).unwrap();
    disk.submit(Op::Create { path: at("other") }).unwrap();
    assert!(disk.crash(Choice::Bits(0)).content(&at("other")).is_none());
    let kept = disk.crash(Choice::Bits(u64::MAX));
    assert_eq!(kept.content(&at("file")).unwrap(), [2; BLOCK]);
    assert_eq!(kept.content(&at("other")).unwrap(), b"");
    assert_eq!(disk.content(&at("file")).unwrap(), [1; BLOCK], "a crash elsewhere changes nothing");
}

/// Replaces a file by way of a temporary one; leaves out the sync when told to.
fn replace(disk: &mut Memory, pool: &Pool, content: &[u8], with_sync: bool) -> io::Result<()> {
    let file = match now(disk, Op::Create { path: at("temporary") })? {
        Outcome::File(file) => file,
        other => panic!("{other:?}"),
    };
    disk::write_at(disk, pool, file, 0, content)?;
    if with_sync {
        now(disk, Op::Sync { file })?;
    }
    now(disk, Op::Close { file })?;
    now(disk, Op::Rename { from: at("temporary"), to: at("file") })?;
    now(disk, Op::SyncDir { path: FOLDER.into() }).map(|_| ())
}

/// What `replace` leaves of the file, over all crashes before all its operations.
fn left_by_replace(with_sync: bool) -> BTreeSet<Vec<u8>> {
    let pool = Pool::new(BUFFER_BYTES);
    let mut left = BTreeSet::new();
    for stop in 0.. {
        let mut disk = Memory::new();
        disk.put(&at("file"), &[1; 2 * BLOCK]);
        disk.stop_before(stop);
        let replaced = replace(&mut disk, &pool, &[2; 2 * BLOCK], with_sync);
        for choice in disk.choices(1000) {
            let content = disk.crash(choice).content(&at("file")).expect("never without a file");
            assert!(replaced.is_err() || !with_sync || content == [2; 2 * BLOCK], "{choice:?}");
            left.insert(content);
        }
        if replaced.is_ok() {
            assert_eq!(disk.operations(), stop);
            break;
        }
    }
    left
}

#[test]
fn the_model_tells_a_safe_replacement_from_one_without_a_sync() {
    let whole = BTreeSet::from([vec![1; 2 * BLOCK], vec![2; 2 * BLOCK]]);
    assert_eq!(left_by_replace(true), whole);
    let torn = left_by_replace(false);
    assert!(torn.is_superset(&whole) && torn.len() > 3, "{}", torn.len());
}

#[test]
fn a_shuffled_disk_completes_everything_in_another_order() {
    let run = |seed| {
        let (mut disk, pool) = (Memory::new(), Pool::new(16 * BUFFER_BYTES));
        disk.shuffle(seed);
        let file = create(&mut disk, &at("file"));
        for place in 0..10 {
            let (at, buffer) = (place * BLOCK as u64, filled(&pool, place));
            disk.submit(Op::Write { file, at, buffer, bytes: BLOCK }).unwrap();
        }
        let order: Vec<Ticket> = wait_for(&mut disk, 10).iter().map(|done| done.ticket).collect();
        assert_eq!(disk.content(&at("file")).unwrap().len(), 10 * BLOCK);
        order
    };
    assert_eq!(run(3), run(3));
    assert!(!run(3).is_sorted());
    assert_ne!(run(3), run(4));
}
