//! Damaged and hostile files: every flipped byte is found where it is, a damaged newest checkpoint
//! is passed over, and nothing that a file says makes the reader panic or take memory that the
//! file does not have.

mod checkpoint_common;

use checkpoint_common::{Chance, JOB, Job, contents, folder, manifest};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use testudo_state::checkpoint::root::{ManifestRef, Root};
use testudo_state::checkpoint::{
    Chain, Damage, FileRef, Kind, Manifest, RegionHeader, RegionName, RegionReader, RegionWriter,
    checksum, store, verify,
};
use testudo_state::disk::{BLOCK, BUFFER_BYTES, Memory, Pool};

thread_local! {
    /// Bytes that this thread has, and the most it had.
    static HEAP: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator, counting.
struct Counting;

fn count(change: impl FnOnce(usize) -> usize) {
    let _ = HEAP.try_with(|heap| {
        let now = change(heap.get().0);
        heap.set((now, heap.get().1.max(now)));
    });
}

// SAFETY: hands everything to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|now| now + layout.size());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(|now| now.saturating_sub(layout.size()));
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(|now| (now + bytes).saturating_sub(layout.size()));
        // SAFETY: the caller keeps the promises of `realloc`.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that `work` took on top of what there was.
fn most<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HEAP.get().0;
    HEAP.set((before, before));
    let result = work();
    (result, HEAP.get().1 - before)
}

fn pool() -> Pool {
    Pool::new(8 * BUFFER_BYTES)
}

type Files = BTreeMap<String, Vec<u8>>;

/// A folder with a full checkpoint, a difference on top of it, and a savepoint.
fn small() -> (Files, Vec<Manifest>) {
    let (memory, pool) = (Memory::new(), pool());
    let mut job = Job::in_memory(&memory, &pool, 1);
    let mut manifests = Vec::new();
    for id in 1..4_u64 {
        for page in 0..3 {
            job.workers[0].put(0, page * id as u32, 100 * id + u64::from(page));
        }
        job.workers[0].now.cells = checkpoint_common::blob_of(id, 4000 + 100 * id as usize);
        let files = job.save(id).unwrap();
        let mut manifest = manifest(id, id, &files);
        if id == 1 {
            manifest.kind = Kind::Savepoint;
        }
        job.store.commit(&manifest).unwrap();
        manifests.push(manifest);
    }
    let read = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        (name, memory.content(path).unwrap())
    };
    (memory.names().iter().map(read).collect(), manifests)
}

fn memory_of(files: &Files) -> Memory {
    let memory = Memory::new();
    files.iter().for_each(|(name, bytes)| memory.put(&folder().join(name), bytes));
    memory
}

fn damages(files: &Files, pool: &Pool) -> Vec<Damage> {
    verify(&mut memory_of(files), pool, folder()).unwrap().damages
}

/// Whether damage at `at` of a file was found where it is: in its block, or in the blob or index
/// that it belongs to.
fn is_located(found: &[Damage], name: &str, at: usize, blob: std::ops::Range<usize>) -> bool {
    found.iter().any(|damage| {
        let block = usize::try_from(damage.at).unwrap() / BLOCK;
        let here = block == at / BLOCK || (blob.contains(&at) && blob.start / BLOCK == block);
        damage.file == folder().join(name) && here
    })
}

/// The bytes of a region file that have one checksum for several blocks: its blob.
fn blob_range(name: &str, files: &Files, pool: &Pool) -> std::ops::Range<usize> {
    if RegionName::parse(name).is_none() {
        return 0..files[name].len();
    }
    let mut memory = memory_of(files);
    let file = RegionReader::refer(&mut memory, pool, folder(), name).unwrap();
    let reader = RegionReader::open(&mut memory, pool, folder(), &file).unwrap();
    let blob = reader.index.blob("cells").unwrap();
    let start = BLOCK * (1 + blob.first_block as usize);
    start..start + BLOCK * blob.blocks() as usize
}

#[test]
fn every_flipped_byte_is_found_and_located() {
    let (files, _) = small();
    let pool = pool();
    assert_eq!(damages(&files, &pool), []);
    let names: Vec<String> = files.keys().cloned().collect();
    assert_eq!(names.len(), 7, "{names:?}");
    let mut bytes = 0;
    for name in names {
        let blob = blob_range(&name, &files, &pool);
        let path = folder().join(&name);
        let mut changed = files[&name].clone();
        let mut memory = memory_of(&files);
        for at in 0..changed.len() {
            if at % 64 == 0 {
                // The model of a disk forgets nothing.
                memory = memory_of(&files);
            }
            changed[at] ^= 1 << (at % 8);
            memory.put(&path, &changed);
            changed[at] ^= 1 << (at % 8);
            let found = verify(&mut memory, &pool, folder()).unwrap().damages;
            assert!(is_located(&found, &name, at, blob.clone()), "{name} {at}: {found:?}");
            bytes += 1;
        }
    }
    assert!(bytes > 50_000);
}

#[test]
fn a_file_of_any_other_length_is_found() {
    let (files, _) = small();
    let pool = pool();
    for (name, whole) in &files {
        let few = (0..64).chain(whole.len() - 64..whole.len());
        let lengths = few.chain((0..whole.len()).step_by(512));
        let longer = [1, 512, 4096].map(|more| whole.len() + more);
        for length in lengths.chain(longer) {
            let mut files = files.clone();
            files.get_mut(name).unwrap().resize(length, 0);
            let found = damages(&files, &pool);
            let path = folder().join(name);
            assert!(found.iter().any(|d| d.file == path), "{name} {length}: {found:?}");
            // Whatever is left, the store opens, and commits again.
            let mut job = Job::in_memory(&memory_of(&files), &pool, 1);
            let before = job.store.newest_whole().unwrap();
            let id = job.store.next_id().unwrap();
            job.workers[0].put(0, 0, 1);
            job.checkpoint(id).unwrap_or_else(|e| panic!("{name} {length}: {e}"));
            let after = job.store.newest_whole().unwrap().expect("it was committed");
            assert_eq!(after.manifest.expect("whole").id, id);
            if let Some(before) = before {
                let kept = job.store.candidates().unwrap();
                assert!(kept.iter().any(|c| c.name == before.name && c.is_whole()), "{name}");
            }
        }
        let mut files = files.clone();
        files.remove(name);
        if name == "roots" {
            assert!(!damages(&files, &pool).is_empty());
        } else if !name.starts_with('s') {
            let found = damages(&files, &pool);
            assert!(found.iter().any(|d| d.file == folder().join(name)), "{name}: {found:?}");
        }
    }
}

#[test]
fn blocks_that_changed_places_are_found() {
    let (files, _) = small();
    let pool = pool();
    for (name, whole) in &files {
        let blocks = whole.len() / BLOCK;
        for (one, other) in (0..blocks).flat_map(|n| (0..n).map(move |m| (m, n))) {
            let block = |n: usize| n * BLOCK..(n + 1) * BLOCK;
            let mut files = files.clone();
            let bytes = files.get_mut(name).unwrap();
            bytes.copy_within(block(other), one * BLOCK);
            bytes[block(other)].copy_from_slice(&whole[block(one)]);
            if bytes == whole {
                continue;
            }
            let found = damages(&files, &pool);
            // The first of them at least: a changed header or index ends the reading of a file.
            let path = folder().join(name);
            assert!(found.iter().any(|d| d.file == path), "{name} {one} {other}: {found:?}");
        }
    }
}

#[test]
fn a_file_in_the_place_of_another_is_found() {
    let (files, _) = small();
    let pool = pool();
    for (one, other) in files.keys().flat_map(|a| files.keys().map(move |b| (a, b))) {
        if one == other {
            continue;
        }
        let mut misled = files.clone();
        misled.insert(one.clone(), files[other].clone());
        let found = damages(&misled, &pool);
        let path = folder().join(one);
        assert!(found.iter().any(|d| d.file == path), "{other} as {one}: {found:?}");
    }
}

#[test]
fn a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used() {
    let (files, manifests) = small();
    let pool = pool();
    let newest = &manifests[2];
    let file = newest.files().next().unwrap();
    let cases = [
        (file.name.clone(), 17, "header"),
        (file.name.clone(), file.index_at as usize + 3, "index"),
        ("c3.manifest".to_string(), 900, "manifest"),
    ];
    for (name, at, part) in cases {
        let mut files = files.clone();
        files.get_mut(&name).unwrap()[at] ^= 4;
        let memory = memory_of(&files);
        let mut job = Job::in_memory(&memory, &pool, 1);
        let candidates = job.store.candidates().unwrap();
        let damage = candidates[0].damage.as_ref().unwrap_or_else(|| panic!("{part}: none"));
        assert_eq!(damage.file, folder().join(&name));
        assert!(damage.to_string().contains(part), "{damage}");
        assert!(damage.to_string().contains("resume from an older one"), "{damage}");
        let whole = job.store.newest_whole().unwrap().expect("2 is whole").manifest.unwrap();
        assert_eq!(whole.id, 2);
        // The next commit takes the damaged one's slot, not the whole one's.
        job.restore(&whole).unwrap();
        job.workers[0].put(1, 1, 1);
        job.checkpoint(4).unwrap();
        let left: Vec<_> = job.store.candidates().unwrap();
        let names: Vec<_> = left.iter().map(|c| (c.name.as_str(), c.is_whole())).collect();
        assert_eq!(names, [("c4.manifest", true), ("c2.manifest", true)], "{part}");
    }
}

#[test]
fn going_back_to_an_older_checkpoint_survives_a_crash() {
    let (files, manifests) = small();
    let pool = pool();
    for name in ["c2.manifest", "s1.manifest"] {
        let memory = memory_of(&files);
        let mut job = Job::in_memory(&memory, &pool, 1);
        job.store.adopt(name).unwrap();
        let mut after = Job::in_memory(&memory, &pool, 1);
        let whole = after.store.newest_whole().unwrap().expect("whole");
        assert_eq!(whole.name, name);
        let manifest = whole.manifest.unwrap();
        assert_eq!(manifest.regions, manifests[manifest.id as usize - 1].regions);
        assert!(contents(&mut after, &manifest).is_ok());
    }
    let memory = memory_of(&files);
    let mut job = Job::in_memory(&memory, &pool, 1);
    job.store.reset(JOB + 1).unwrap();
    let mut after = Job::in_memory(&memory, &pool, 1);
    assert!(after.store.candidates().unwrap().is_empty());
    assert!(after.store.newest_whole().unwrap().is_none());
    let kept = store::manifests(&mut memory.clone(), &pool, folder()).unwrap();
    assert!(kept.iter().any(|(name, read)| name.savepoint && read.is_ok()));
}

/// What a reader may take: a few times what the folder holds, and a little for itself.
fn bound(files: &Files) -> usize {
    4 * files.values().map(Vec::len).sum::<usize>() + (256 << 10)
}

/// Lets every reader loose on a folder.
fn read_all(files: &Files, file: Option<&FileRef>, pool: &Pool, story: &dyn Fn() -> String) {
    let mut memory = memory_of(files);
    let mut named: Vec<FileRef> = file.into_iter().cloned().collect();
    for name in files.keys().filter(|name| RegionName::parse(name).is_some()) {
        let (found, taken) = most(|| RegionReader::refer(&mut memory, pool, folder(), name));
        assert!(taken < bound(files), "{}: refer took {taken}", story());
        named.extend(found);
    }
    for file in &named {
        let (end, taken) = most(|| Chain::open_end(&mut memory, pool, folder(), file));
        assert!(taken < bound(files), "{}: opening the end took {taken}", story());
        let (chain, taken) = most(|| Chain::open(&mut memory, pool, folder(), file));
        assert!(taken < bound(files), "{}: opening took {taken}", story());
        for chain in [chain, end].into_iter().flatten() {
            let (read, taken) = most(|| {
                let pages: usize =
                    (0..chain.segments().len()).map(|n| chain.pages(n).count()).sum();
                let mut disk = memory.clone();
                let blobs = chain.blobs().iter();
                let read = blobs.map(|b| chain.read_blob(&mut disk, pool, folder(), b).is_ok());
                (pages, read.filter(|ok| *ok).count())
            });
            assert!(taken < bound(files), "{}: reading {read:?} took {taken}", story());
        }
    }
    let (_, taken) = most(|| verify(&mut memory, pool, folder()).unwrap());
    assert!(taken < bound(files), "{}: verifying took {taken}", story());
    let (_, taken) = most(|| {
        let mut job = Job::open(Box::new(memory.clone()), Box::new(memory.clone()), pool, 1);
        if let Ok(job) = &mut job {
            let _ = (job.store.candidates(), job.store.newest_whole(), job.store.next_id());
            let _ = (job.store.next_epoch(), job.store.retire(&Default::default()));
        }
        job.is_ok()
    });
    // The job's own writes go through the disk in memory.
    assert!(taken < 4 * bound(files), "{}: opening the store took {taken}", story());
}

const WORDS: [u64; 8] =
    [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 40, u64::MAX / 4096, u64::MAX];

/// The newest region file with a word of its index replaced, and a reference that believes it.
fn changed_index(
    files: &Files,
    file: &FileRef,
    at: usize,
    word: u64,
    bytes: usize,
) -> (Files, FileRef) {
    let mut files = files.clone();
    let whole = files.get_mut(&file.name).unwrap();
    whole[at..at + bytes].copy_from_slice(&word.to_le_bytes()[..bytes]);
    let index_checksum = checksum(&whole[file.index_at as usize..]);
    (files, FileRef { index_checksum, ..file.clone() })
}

#[test]
fn any_number_in_an_index_is_met_with_an_error_at_most() {
    let (files, manifests) = small();
    let pool = pool();
    let file = manifests[2].files().next().unwrap();
    let index = file.index_at as usize..file.bytes as usize;
    let used = files[&file.name][index.clone()].iter().rposition(|b| *b != 0).unwrap();
    let tail = index.end - 64;
    // The front holds all entries; between them and the tail there are zeros.
    let front = index.start..index.start + used.min(600);
    for at in front.step_by(4).chain((tail..index.end).step_by(4)) {
        for (n, word) in WORDS.into_iter().enumerate() {
            let bytes = if at + 8 <= index.end && n % 2 == 0 { 8 } else { 4 };
            let (changed, file) = changed_index(&files, file, at, word, bytes);
            read_all(&changed, Some(&file), &pool, &|| format!("{word:#x} at {at}"));
        }
    }
}

#[test]
fn any_reference_is_met_with_an_error_at_most() {
    let (files, manifests) = small();
    let pool = pool();
    let good = manifests[2].files().next().unwrap().clone();
    for word in WORDS.into_iter().flat_map(|word| [word, word & !0xfff]) {
        let changed = [
            FileRef { bytes: word, ..good.clone() },
            FileRef { index_at: word, ..good.clone() },
            FileRef { index_bytes: word, ..good.clone() },
            FileRef { bytes: word, index_at: word / 2, index_bytes: word / 2, ..good.clone() },
            FileRef {
                index_at: word,
                index_bytes: 4096,
                bytes: word.wrapping_add(4096),
                ..good.clone()
            },
            FileRef { index_checksum: word, ..good.clone() },
        ];
        for file in changed {
            let opened = Chain::open(&mut memory_of(&files), &pool, folder(), &file);
            assert!(opened.is_err() || file == good, "{file:?}");
            read_all(&files, Some(&file), &pool, &|| format!("{file:?}"));
        }
    }
    for name in ["", "..", "/etc/passwd", "../w0-e3-i3.region", "w0-e03-i3.region", "roots"] {
        let file = FileRef { name: name.into(), ..good.clone() };
        assert!(Chain::open(&mut memory_of(&files), &pool, folder(), &file).is_err(), "{name}");
    }
}

#[test]
fn any_number_in_a_manifest_or_root_is_met_with_an_error_at_most() {
    let (files, manifests) = small();
    let pool = pool();
    let roots = |named: &ManifestRef, sequence: u64| {
        let root = Root { sequence, job: JOB, manifest: Some(named.clone()), previous: 0 };
        [root.encode(0), Root { sequence: sequence ^ 1, ..root }.encode(1)].concat()
    };
    let text = String::from_utf8(manifests[2].encode()).unwrap();
    let numbers: Vec<(usize, &str)> = text
        .match_indices(": ")
        .filter(|(at, _)| text.as_bytes()[at + 2].is_ascii_digit())
        .collect();
    assert!(numbers.len() > 10);
    for (at, _) in numbers {
        let digits = text[at + 2..].bytes().take_while(u8::is_ascii_digit).count();
        for word in ["-1", "1e400", "18446744073709551615", "99999999999999999999", "[[[[", "{}"] {
            let mut changed = format!("{}{word}{}", &text[..at + 2], &text[at + 2 + digits..]);
            changed.truncate(changed.trim_end().len());
            let mut bytes = changed.into_bytes();
            bytes.resize(bytes.len().next_multiple_of(BLOCK), b' ');
            let from = text.find("\",").unwrap();
            let sum = format!("{:016x}", checksum(&bytes[from..]));
            bytes[from - 16..from].copy_from_slice(sum.as_bytes());
            let name = "c3.manifest".to_string();
            let named = ManifestRef {
                name: name.clone(),
                bytes: bytes.len() as u64,
                checksum: checksum(&bytes),
            };
            let mut files = files.clone();
            files.insert(name, bytes);
            files.insert("roots".into(), roots(&named, 7));
            read_all(&files, None, &pool, &|| format!("{word} at {at}"));
        }
    }
    for word in WORDS {
        let named = ManifestRef { name: "c3.manifest".into(), bytes: word, checksum: word };
        let mut files = files.clone();
        files.insert("roots".into(), roots(&named, word));
        read_all(&files, None, &pool, &|| format!("{word:#x} in a root"));
    }
}

#[test]
fn files_of_random_bytes_are_met_with_an_error_at_most() {
    let (files, _) = small();
    let pool = pool();
    let names: Vec<&String> = files.keys().collect();
    for seed in 0..400 {
        let mut chance = Chance(seed);
        let mut files = files.clone();
        let name = names[chance.below(names.len() as u64) as usize];
        let bytes = files.get_mut(name).unwrap();
        let from = chance.below(bytes.len() as u64) as usize;
        let until = from + chance.below(600) as usize;
        if chance.below(3) == 0 {
            bytes.resize(chance.below(9) as usize * BLOCK / 2, 0);
        }
        let length = bytes.len();
        bytes[from.min(length)..until.min(length)].fill_with(|| chance.below(256) as u8);
        read_all(&files, None, &pool, &|| format!("seed {seed}"));
        for slot in 0..2 {
            let block: Vec<u8> = (0..BLOCK).map(|_| chance.below(256) as u8).collect();
            assert!(Root::decode(&block, slot).is_err());
        }
        let decoded = Manifest::decode(&files[name], name);
        assert!(decoded.is_err() || files[name] == decoded.unwrap().encode());
    }
}

#[test]
fn a_page_far_away_and_a_blob_without_bytes_take_no_memory() {
    let far = testudo_state::checkpoint::SegmentEntry {
        bytes: u64::MAX,
        ..checkpoint_common::segment(0, 1)
    };
    let header = RegionHeader { job: JOB, worker: 0, epoch: 1, incarnation: 1 };
    let mut writer = RegionWriter::new(header);
    writer.add_segment(far);
    writer.add_block(0, u32::MAX, &[1; BLOCK]);
    let (index, file) = writer.finish();
    let (chain, taken) = most(|| {
        let mut chain = Chain::empty();
        chain.append(JOB, file, index).map(|()| chain)
    });
    assert!(chain.unwrap().find(0, u32::MAX).is_some());
    assert!(taken < 64 << 10, "{taken}");

    let (files, manifests) = small();
    let file = manifests[2].files().next().unwrap();
    let pool = pool();
    let reader = RegionReader::open(&mut memory_of(&files), &pool, folder(), file).unwrap();
    let (blocks, older) = (reader.index.blocks().len(), reader.index.files.len());
    let blob = file.index_at as usize + 20 * blocks + 48 * 2 + 40 * older;
    let blob_blocks = u64::from(u32::MAX) - blocks as u64;
    let (changed, file) = changed_index(&files, file, blob + 8, blob_blocks * BLOCK as u64, 8);
    let tail = file.bytes as usize - 64;
    let (changed, file) = changed_index(&changed, &file, tail + 12, u64::from(u32::MAX), 4);
    read_all(&changed, Some(&file), &pool, &|| "a blob of 16 TiB".into());
}

#[test]
fn a_header_that_is_not_the_files_own_is_found() {
    let (mut files, manifests) = small();
    let pool = pool();
    let file = manifests[2].files().next().unwrap().clone();
    let renamed = FileRef { name: "w9-e3-i3.region".into(), ..file.clone() };
    files.insert(renamed.name.clone(), files[&file.name].clone());
    let opened = RegionReader::open(&mut memory_of(&files), &pool, folder(), &renamed);
    assert!(opened.expect_err("another worker's").what.contains("in the place of another"));
    let header = RegionHeader { job: JOB + 1, worker: 0, epoch: 3, incarnation: 3 };
    files.get_mut(&file.name).unwrap()[..BLOCK].copy_from_slice(&header.encode());
    let opened = RegionReader::open(&mut memory_of(&files), &pool, folder(), &file);
    assert_eq!(opened.expect_err("another job's").at, 0);
}
