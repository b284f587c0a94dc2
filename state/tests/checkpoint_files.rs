//! What is written is what is read: region files, chains against a model, manifests, roots; and
//! the golden files of each version are still read, and still written byte for byte.

mod checkpoint_common;

use checkpoint_common::{Chance, JOB, Pages, block_of, folder, manifest, segment, write_region};
use std::collections::BTreeMap;
use std::path::PathBuf;
use testudo_state::checkpoint::root::{ManifestRef, Root};
use testudo_state::checkpoint::{
    Chain, FileRef, Kind, Manifest, ManifestName, Previous, RegionHeader, RegionName, RegionReader,
    RegionWriter, SegmentEntry, checksum, verify,
};
use testudo_state::disk::{BLOCK, BUFFER_BYTES, Memory, Pool};

fn pool() -> Pool {
    Pool::new(8 * BUFFER_BYTES)
}

fn header(epoch: u64) -> RegionHeader {
    RegionHeader { job: JOB, worker: 3, epoch, incarnation: 2 }
}

/// Encodes a file: segments, and blocks of them.
fn encode(
    epoch: u64,
    segments: &[SegmentEntry],
    older: &[FileRef],
    pages: &[(u32, u32, u64)],
) -> (Vec<u8>, FileRef, Vec<[u8; BLOCK]>) {
    let mut writer = RegionWriter::with_capacity(header(epoch), pages.len());
    for segment in segments {
        writer.add_segment(*segment);
    }
    older.iter().for_each(|file| writer.add_file(file.clone()));
    let mut blocks = vec![writer.header_block()];
    for (segment, page, value) in pages {
        let block = block_of(*value);
        writer.add_block(*segment, *page, &block);
        blocks.push(block);
    }
    let (index, file) = writer.finish();
    (index, file, blocks)
}

#[test]
fn what_a_writer_encodes_a_reader_finds() {
    let (mut memory, pool) = (Memory::new(), pool());
    let segments = [segment(2, 9), segment(5, 100)];
    // More entries than are hashed at a time.
    let pages: Vec<_> = (0..9).map(|p| (0, p, 10 + u64::from(p))).collect();
    let more = (0..100).map(|p| (1, 99 - p, 1000 + u64::from(p)));
    let pages: Vec<_> = pages.into_iter().chain(more).collect();
    let (index, file, blocks) = encode(7, &segments, &[], &pages);
    assert_eq!(file.name, "w3-e7-i2.region");
    assert_eq!(file.blocks(), 109);
    write_region(&mut memory, &pool, &file, &blocks, &index).unwrap();
    let reader = RegionReader::open(&mut memory, &pool, folder(), &file).unwrap();
    assert_eq!(reader.header, header(7));
    assert_eq!(reader.index.segments, segments);
    let read: Vec<_> = reader.index.blocks().collect();
    assert_eq!(read.len(), pages.len());
    for (n, (entry, (segment, page, value))) in (0_u32..).zip(read.iter().zip(&pages)) {
        assert_eq!((entry.segment, entry.page, entry.block), (*segment, *page, n));
        assert_eq!(entry.checksum, checksum(&block_of(*value)));
    }
    assert_eq!(RegionReader::refer(&mut memory, &pool, folder(), &file.name), Ok(file));
}

#[test]
fn an_index_of_many_entries_has_the_checksum_of_its_bytes() {
    let pages: Vec<_> = (0..8000).map(|p| (0, p, 1)).collect();
    let (index, file, _) = encode(1, &[segment(0, 8000)], &[], &pages);
    assert_eq!(index.len(), file.index_bytes as usize);
    assert_eq!(checksum(&index), file.index_checksum);
}

/// What a chain must say: the newest value of each page, by key group.
#[derive(Default)]
struct Model {
    pages: BTreeMap<u32, BTreeMap<u32, u64>>,
    values: BTreeMap<u64, u64>,
}

fn compare(chain: &Chain, model: &Model, what: &str) {
    let held: Pages = (0..chain.segments().len())
        .flat_map(|n| {
            let group = chain.segments()[n].group;
            chain.pages(n).map(move |(page, place)| ((group, page), place.checksum))
        })
        .collect();
    let expected: Pages = model
        .pages
        .iter()
        .flat_map(|(group, pages)| pages.iter().map(|(page, v)| ((*group, *page), *v)))
        .map(|(key, value)| (key, model.values[&value]))
        .collect();
    assert_eq!(held, expected, "{what}");
    let mut live: BTreeMap<u32, u64> = BTreeMap::new();
    for n in 0..chain.segments().len() {
        chain.pages(n).for_each(|(_, place)| *live.entry(place.file).or_default() += 1);
    }
    for (number, _) in chain.files() {
        let counted = live.get(&number).copied().unwrap_or(0);
        assert_eq!(chain.live(number), counted, "{what}");
        assert_eq!(chain.pages_in(number).count() as u64, counted, "{what}");
    }
}

/// Segments come, go, come back, shrink, are sparse and become dense.
fn chain_story(seed: u64, pool: &Pool) {
    let mut chance = Chance(seed);
    let mut memory = Memory::new();
    let mut chain = Chain::empty();
    let mut model = Model::default();
    let mut since = [0_u64; 6];
    let mut size = [40_u64, 3000, 100_000, 64, 1, 9];
    for epoch in 1..25 {
        let mut segments = Vec::new();
        let mut blocks = Vec::new();
        for group in 0..6_usize {
            let key = group as u32;
            if chance.below(8) == 0 {
                model.pages.remove(&key);
                continue;
            }
            if !model.pages.contains_key(&key) {
                since[group] = epoch;
            }
            if chance.below(10) == 0 {
                // It shrinks: what lies beyond is gone.
                size[group] = 1 + chance.below(size[group]);
            }
            let pages = model.pages.entry(key).or_default();
            pages.retain(|page, _| u64::from(*page) < size[group]);
            let mut entry = segment(key, size[group]);
            entry.since = since[group];
            segments.push(entry);
            let number = segments.len() as u32 - 1;
            let count = if chance.below(10) == 0 { 300 } else { chance.below(6) };
            let changed: BTreeMap<u32, u64> = (0..count)
                .map(|_| (chance.below(size[group]) as u32, chance.below(1 << 40)))
                .collect();
            blocks.extend(changed.iter().map(|(page, value)| (number, *page, *value)));
            pages.extend(changed);
        }
        let (index, file, bytes) = encode(epoch, &segments, &chain.needed(), &blocks);
        let sums = blocks.iter().map(|(_, _, value)| (*value, checksum(&block_of(*value))));
        model.values.extend(sums);
        write_region(&mut memory, pool, &file, &bytes, &index).unwrap();
        chain.append(JOB, file.clone(), index).unwrap();
        compare(&chain, &model, &format!("seed {seed} epoch {epoch}, appended"));
        let opened = Chain::open(&mut memory, pool, folder(), &file).unwrap();
        compare(&opened, &model, &format!("seed {seed} epoch {epoch}, opened"));
        assert_eq!(opened.needed(), chain.needed());
        // Its end alone says the same of everything but pages.
        let end = Chain::open_end(&mut memory, pool, folder(), &file).unwrap();
        assert_eq!((end.segments(), end.blobs()), (opened.segments(), opened.blobs()));
        assert_eq!((end.newest(), end.job()), (opened.newest(), opened.job()));
        assert!((0..end.segments().len()).all(|segment| end.pages(segment).next().is_none()));
    }
}

#[test]
fn a_chain_says_what_the_newest_files_say() {
    let pool = pool();
    (0..40).for_each(|seed| chain_story(seed, &pool));
}

#[test]
fn a_page_that_comes_twice_and_a_file_that_is_not_newer_are_refused() {
    let segments = [segment(0, 10)];
    let (index, file, _) = encode(1, &segments, &[], &[(0, 4, 1), (0, 4, 2)]);
    let error = Chain::empty().append(JOB, file, index).expect_err("twice");
    assert!(error.what.contains("twice"), "{error}");
    let mut chain = Chain::empty();
    let (index, file, _) = encode(2, &segments, &[], &[(0, 4, 1)]);
    chain.append(JOB, file.clone(), index.clone()).unwrap();
    assert!(chain.append(JOB, file, index).is_err());
    let (index, file, _) = encode(3, &segments, &[], &[(0, 4, 1)]);
    assert!(chain.append(JOB + 1, file, index).is_err());
}

#[test]
fn names_are_read_only_as_they_are_written() {
    let name = RegionName { worker: 12, epoch: 345, incarnation: 6 };
    assert_eq!(RegionName::parse("w12-e345-i6.region"), Some(name));
    let not =
        ["w12-e345-i6.region.tmp", "w012-e345-i6.region", "w+1-e3-i6.region", "w1-e-i6.region"];
    assert!(not.iter().all(|name| RegionName::parse(name).is_none()));
    let savepoint = ManifestName { id: 7, savepoint: true };
    assert_eq!(ManifestName::parse("s7.manifest"), Some(savepoint));
    let not = ["x7.manifest", "c07.manifest", "c7.manifest.tmp", "c.manifest", "é7.manifest"];
    assert!(not.iter().all(|name| ManifestName::parse(name).is_none()));
}

#[test]
fn a_manifest_is_json_and_says_what_it_said() {
    let mut given = manifest(9, 9, &[]);
    given.previous = Some(Previous { name: "c8.manifest".into(), checksum: u64::MAX });
    let bytes = given.encode();
    assert_eq!(Manifest::decode(&bytes, "c9.manifest"), Ok(given));
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["previous"]["checksum"], "ffffffffffffffff");
    assert_eq!(json["id"], 9);
    assert!(Manifest::decode(&bytes, "c8.manifest").is_err());
    let text = String::from_utf8(bytes).unwrap().replace("\"version\": 1", "\"version\": 2");
    let from = text.find("\",").unwrap();
    let sum = format!("{:016x}", checksum(&text.as_bytes()[from..]));
    let text = text.replacen(&text[from - 16..from], &sum, 1);
    let (_, what) = Manifest::decode(text.as_bytes(), "c9.manifest").expect_err("version 2");
    assert!(what.contains("version 2, this program reads 1"), "{what}");
}

/// The files of a folder as version 1 writes them.
fn golden() -> BTreeMap<String, Vec<u8>> {
    let segments = [segment(0, 3), SegmentEntry { since: 1, ..segment(5, 2) }];
    let mut files = BTreeMap::new();
    let mut region = |header: RegionHeader, pages: &[(u32, u32, u64)], older: &[FileRef]| {
        let mut writer = RegionWriter::new(header);
        for segment in &segments {
            writer.add_segment(*segment);
        }
        older.iter().for_each(|file| writer.add_file(file.clone()));
        let mut bytes = writer.header_block().to_vec();
        for (segment, page, value) in pages {
            writer.add_block(*segment, *page, &block_of(*value));
            bytes.extend(block_of(*value));
        }
        let cells = format!("cells of epoch {}", header.epoch);
        writer.add_blob("cells", cells.as_bytes());
        bytes.extend(cells.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let (index, file) = writer.finish();
        bytes.extend(index);
        files.insert(file.name.clone(), bytes);
        file
    };
    let header = |epoch| RegionHeader { job: JOB, worker: 0, epoch, incarnation: 4 };
    let first = region(header(1), &[(0, 2, 20), (1, 0, 50)], &[]);
    let second = region(header(2), &[(0, 2, 21)], std::slice::from_ref(&first));
    let mut one = manifest(1, 1, &[first]);
    one.kind = Kind::Savepoint;
    let mut two = manifest(2, 2, &[second]);
    let sum = checksum(&one.encode());
    two.previous = Some(Previous { name: "s1.manifest".into(), checksum: sum });
    let mut roots = Vec::new();
    for (slot, manifest) in [(0_u32, &one), (1, &two)] {
        let bytes = manifest.encode();
        let named = ManifestRef {
            name: manifest.name().to_string(),
            bytes: bytes.len() as u64,
            checksum: checksum(&bytes),
        };
        files.insert(named.name.clone(), bytes);
        let (sequence, previous) = (3 + u64::from(slot), 7);
        let root = Root { sequence, job: JOB, manifest: Some(named), previous };
        roots.extend(root.encode(slot));
    }
    files.insert("roots".into(), roots);
    files
}

fn golden_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoint-1")
}

/// Writes the golden files of a new version. Those of an old one are never written again.
#[test]
#[ignore = "run once for each version of the format"]
fn write_golden_files() {
    std::fs::create_dir_all(golden_folder()).unwrap();
    for (name, bytes) in golden() {
        std::fs::write(golden_folder().join(name), bytes).unwrap();
    }
}

#[test]
fn golden_files_are_read_and_written_as_ever() {
    let memory = Memory::new();
    let written = golden();
    for entry in std::fs::read_dir(golden_folder()).expect("it is checked in") {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let bytes = std::fs::read(&path).unwrap();
        assert!(written[&name] == bytes, "{name} would be written differently: a new version?");
        memory.put(&folder().join(&name), &bytes);
    }
    assert_eq!(memory.names().len(), 5);
    let pool = pool();
    let report = verify(&mut memory.clone(), &pool, folder()).unwrap();
    assert!(report.is_whole(), "{report:?}");
    assert_eq!((report.checkpoints, report.files, report.blocks), (2, 2, 5));
    let mut job = checkpoint_common::Job::in_memory(&memory, &pool, 1);
    let newest = job.store.newest_whole().unwrap().expect("it is whole").manifest.unwrap();
    assert_eq!((newest.id, newest.job.as_str(), newest.plan), (2, "counts", 0x91a4));
    let held = checkpoint_common::contents(&mut job, &newest).unwrap();
    assert_eq!(held[0].cells, b"cells of epoch 2");
    assert_eq!(held[0].pages, Pages::from([((0, 2), 21), ((5, 0), 50)]));
    let chain = job.store.chain(newest.files().next().unwrap()).unwrap();
    assert_eq!(chain.segments()[1].since, 1);
    assert_eq!(chain.segments()[1].schema, 5);
}
