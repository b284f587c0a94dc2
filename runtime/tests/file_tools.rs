//! The `testudo` tool on checkpoint folders and single files: what it shows of whole ones, and that
//! it finds every byte that was changed.

mod common;

use common::tool::{said, tool};
use common::{Jobs, Random, deep, finish, folder, settings, start, text, trials};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::serde_json::Value;
use testudo::shm::primitive::{AtomicU64, Ordering};
use testudo::state::checkpoint::{
    FileRef, Keep, Kind, Manifest, Operator, Outcome, Region, RegionHeader, RegionWriter,
    SegmentEntry, Store, WorkerFile, region,
};
use testudo::state::disk::{self, BLOCK, DiskKind, Op, run_now};

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            the_checkpoints_of_a_folder_are_listed,
            the_newest_checkpoint_is_shown,
            a_whole_folder_is_verified,
            every_changed_byte_is_found,
            a_folder_at_work_is_whole,
            a_missing_file_is_found,
            a_folder_without_checkpoints_has_none,
            what_is_no_folder_is_refused,
            single_files_are_shown,
            files_of_another_kind_are_refused,
            a_damaged_file_is_said_to_be,
            segments_of_a_running_job_are_shown,
        ],
    )
}

/// A folder with a savepoint and two checkpoints of two workers in two regions; the second of
/// worker 0 is incremental, worker 1's region is carried over.
fn write_folder(dir: &Path) {
    let (disk, _) = disk::open(DiskKind::Pwrite).expect("a disk");
    let mut store = Store::open(dir, disk).expect("a folder");
    let first = [save(&mut store, 0, 1, &[]), save(&mut store, 1, 1, &[])];
    store.commit(&manifest(1, Kind::Savepoint, &first)).expect("room");
    store.commit(&manifest(2, Kind::Checkpoint, &first)).expect("room");
    let second = [save(&mut store, 0, 2, &first[..1]), first[1].clone()];
    store.commit(&manifest(3, Kind::Checkpoint, &second)).expect("room");
}

/// Writes what worker `worker` saved at `epoch`: three pages and a blob, on top of older files.
fn save(store: &mut Store, worker: u32, epoch: u64, older: &[FileRef]) -> FileRef {
    let header = RegionHeader { job: 7, worker, epoch, incarnation: 1 };
    let mut writer = RegionWriter::new(header);
    let bytes = 8 * BLOCK as u64;
    let (operator, groups, schema) = (77, 2, 5);
    writer.add_segment(SegmentEntry {
        operator,
        kind: 1,
        group: worker,
        groups,
        schema,
        bytes,
        since: 0,
    });
    older.iter().for_each(|file| writer.add_file(file.clone()));
    let mut blocks = vec![writer.header_block()];
    for page in 0..3 {
        let value = u64::from(worker) + 10 * epoch + u64::from(page) + 1;
        let block = [(value % 251) as u8; BLOCK];
        writer.add_block(0, (page + epoch as u32) % 8, &block);
        blocks.push(block);
    }
    for number in 0..writer.add_blob("cells", b"positions of everything").len() {
        let mut block = [0; BLOCK];
        region::blob_block(b"positions of everything", number, &mut block);
        blocks.push(block);
    }
    let (index, file) = writer.finish();
    let path = store.folder().join(&file.name);
    let (disk, pool) = store.disk();
    let mut bytes: Vec<u8> = blocks.concat();
    bytes.extend(index);
    disk::write_file(disk, pool, &path, &bytes).expect("room");
    run_now(disk, Op::SyncDir { path: path.parent().expect("the folder").to_owned() })
        .expect("it is there");
    file
}

fn manifest(id: u64, kind: Kind, files: &[FileRef]) -> Manifest {
    let regions = files.iter().zip(0..).map(|(file, worker)| {
        let epoch = if file.name.contains("-e1-") { 1 } else { 2 };
        let outcome = if id == 3 && epoch == 1 { Outcome::CarriedOver } else { Outcome::Ok };
        let workers = vec![WorkerFile { worker, file: file.clone() }];
        Region { number: worker, epoch, outcome, workers }
    });
    Manifest {
        version: 1,
        id,
        kind,
        job: "counts".into(),
        job_id: 7,
        plan: 9,
        started_ms: 1_763_632_800_000,
        finished_ms: 1_763_632_800_150,
        groups: 2,
        workers: 2,
        finished: false,
        operators: vec![Operator {
            uid: "count".into(),
            name: "count words".into(),
            schema: 5,
            grouping: "key".into(),
        }],
        regions: regions.collect(),
        previous: None,
        figures: BTreeMap::from([("bytes_written".into(), 12_345)]),
    }
}

fn parsed(lines: &str) -> Vec<Value> {
    let value = |line| testudo::serde_json::from_str(line).expect("an object");
    lines.lines().map(value).collect()
}

fn the_checkpoints_of_a_folder_are_listed() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let words = ["checkpoint", "list", &text(&dir)];
    let (code, out, err) = said(&tool(at.path(), &words));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.len(), 4, "{out}");
    assert!(out.contains("2   checkpoint  counts  2025-11-20T10:00:00Z  2 "), "{out}");
    assert!(lines.iter().any(|line| line.starts_with("2 ") && line.ends_with("named")), "{out}");
    assert!(lines.iter().any(|line| line.starts_with("1 ") && line.ends_with("kept")), "{out}");
    let newest = lines.iter().find(|line| line.starts_with("3 ")).expect("the third");
    assert!(newest.contains("2, 1 carried over") && newest.ends_with("newest"), "{out}");
    let (code, out, _) = said(&tool(at.path(), &["--json", "checkpoint", "list", &text(&dir)]));
    let rows = parsed(&out);
    assert_eq!((code, rows.len()), (0, 3));
    let kept = rows.iter().find(|row| row["standing"] == "kept").expect("the savepoint");
    assert_eq!(kept["manifest"]["kind"], "savepoint");
    let (code, _, _) = said(&tool(at.path(), &["checkpoint", "--json", "list", &text(&dir)]));
    assert_eq!(code, 0, "--json may stand anywhere");
}

fn the_newest_checkpoint_is_shown() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let (code, out, _) = said(&tool(at.path(), &["checkpoint", "show", &text(&dir)]));
    assert_eq!(code, 0);
    assert!(
        out.starts_with("c3.manifest: newest\ncheckpoint 3 of job counts (0000000000000007)"),
        "{out}"
    );
    assert!(out.contains("bytes_written: 12345\n"), "{out}");
    assert!(out.contains("w0-e2-i1.region") && out.contains("carried over"), "{out}");
    let (code, out, _) =
        said(&tool(at.path(), &["checkpoint", "show", &text(&dir), "2", "--json"]));
    assert_eq!((code, &parsed(&out)[0]["manifest"]["id"]), (0, &2.into()));
    let (code, _, err) = said(&tool(at.path(), &["checkpoint", "show", &text(&dir), "9"]));
    assert_eq!(code, 1);
    assert!(err.contains("has no checkpoint 9; there are: "), "{err}");
}

fn a_whole_folder_is_verified() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let (code, out, err) = said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with("3 checkpoints, 3 region files, 12 blocks, "), "{out}");
    let (_, out, _) = said(&tool(at.path(), &["checkpoint", "verify", &text(&dir), "--json"]));
    assert_eq!(parsed(&out)[0]["whole"], true);
}

fn every_changed_byte_is_found() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let mut random = Random::new(11);
    let entries = fs::read_dir(&dir).expect("there").map(|entry| entry.expect("one").path());
    let files: Vec<_> = entries.filter(|path| !path.ends_with("lock")).collect();
    assert_eq!(files.len(), 1 + 3 + 3, "{files:?}");
    for _ in 0..deep(1000, 150) {
        let path = &files[random.below(files.len() as u64) as usize];
        let whole = fs::read(path).expect("there");
        let mut changed = whole.clone();
        let byte = random.below(whole.len() as u64) as usize;
        changed[byte] ^= 1 << random.below(8);
        fs::write(path, changed).expect("room");
        let (code, out, err) = said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)]));
        fs::write(path, whole).expect("room");
        assert_eq!(code, 1, "byte {byte} of {}: {out}{err}", path.display());
        let name = path.file_name().expect("a file").to_string_lossy();
        assert!(out.contains(&*name), "byte {byte} of {name}: {out}");
        assert!(err.contains("damaged"), "{err}");
    }
    assert_eq!(said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)])).0, 0);
}

fn a_folder_at_work_is_whole() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let (stop, stopped) = crossbeam::channel::bounded::<()>(0);
    let reached = std::sync::Arc::new(AtomicU64::new(0));
    let job = std::thread::spawn({
        let (dir, reached) = (dir.clone(), std::sync::Arc::clone(&reached));
        move || {
            let (disk, _) = disk::open(DiskKind::Pwrite).expect("a disk");
            let mut store = Store::open(&dir, disk).expect("a folder");
            let mut epoch = 3;
            while stopped.try_recv() == Err(crossbeam::channel::TryRecvError::Empty) {
                let files = [save(&mut store, 0, epoch, &[]), save(&mut store, 1, epoch, &[])];
                let mut manifest = manifest(epoch + 1, Kind::Checkpoint, &files);
                manifest.regions.iter_mut().for_each(|region| region.epoch = epoch);
                store.commit(&manifest).expect("room");
                let keep = Keep { running_epoch: epoch + 1, held: &[] };
                store.retire(&keep).expect("room");
                epoch += 1;
                reached.store(epoch, Ordering::Release);
                // As often as a job may, not as often as a disk can.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    });
    let mut checks = 0;
    common::wait_for("checkpoints meanwhile", || {
        let (code, out, err) = said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)]));
        // Too fast for a busy machine is an answer; damage is none.
        assert!(code == 0 || err.contains("faster than they can be read"), "{code}: {out}{err}");
        checks += 1;
        (checks >= deep(300, 40) && reached.load(Ordering::Acquire) > 5).then_some(())
    });
    drop(stop);
    job.join().expect("it works on");
    assert_eq!(said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)])).0, 0);
}

fn a_missing_file_is_found() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    fs::remove_file(dir.join("w1-e1-i1.region")).expect("it was there");
    let (code, out, _) = said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)]));
    assert_eq!((code, out.contains("w1-e1-i1.region")), (1, true), "{out}");
}

fn a_folder_without_checkpoints_has_none() {
    let at = folder();
    let dir = at.path().join("new");
    let (disk, _) = disk::open(DiskKind::Pwrite).expect("a disk");
    drop(Store::open(&dir, disk).expect("a folder"));
    let (code, out, _) = said(&tool(at.path(), &["checkpoint", "list", &text(&dir)]));
    assert_eq!((code, out.as_str()), (0, "no checkpoint\n"));
    assert_eq!(said(&tool(at.path(), &["checkpoint", "verify", &text(&dir)])).0, 0);
    let (code, _, err) = said(&tool(at.path(), &["checkpoint", "show", &text(&dir)]));
    assert_eq!(
        (code, err.contains("has no whole checkpoint; there are: none")),
        (1, true),
        "{err}"
    );
}

fn what_is_no_folder_is_refused() {
    let at = folder();
    let file = at.path().join("file");
    fs::write(&file, "text").expect("room");
    for command in ["list", "show", "verify"] {
        let (code, _, err) = said(&tool(at.path(), &["checkpoint", command, "/nowhere"]));
        assert_eq!((code, err.contains("/nowhere: No such file")), (4, true), "{err}");
        let (code, _, err) = said(&tool(at.path(), &["checkpoint", command, &text(&file)]));
        assert_eq!((code, err.contains("is not a folder")), (2, true), "{err}");
        // A folder of something else has no roots: that is damage, not nothing.
        let (code, _, err) = said(&tool(at.path(), &["checkpoint", command, &text(at.path())]));
        assert_eq!((code, err.is_empty()), (1, false), "{command}");
    }
    let (code, _, err) = said(&tool(at.path(), &["checkpoint", "job", "verify", "/nowhere"]));
    assert_eq!(code, 2, "{err}");
}

fn single_files_are_shown() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let show = |what: &str, file: &str| {
        let path = text(&dir.join(file));
        let (code, out, err) = said(&tool(at.path(), &["inspect", what, &path]));
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        let (code, json, _) = said(&tool(at.path(), &["inspect", what, &path, "--json"]));
        assert_eq!(code, 0);
        (out, parsed(&json))
    };
    let (out, json) = show("root", "roots");
    assert_eq!(out.lines().count(), 2, "{out}");
    assert!(out.contains("c3.manifest, 4096 bytes") && out.contains("c2.manifest"), "{out}");
    assert_eq!(json.len(), 2);
    let (out, json) = show("manifest", "s1.manifest");
    assert!(out.starts_with("savepoint 1 of job counts"), "{out}");
    assert_eq!(json[0]["id"], 1);
    let (out, json) = show("region", "w0-e2-i1.region");
    assert!(out.starts_with("worker 0, epoch 2, incarnation 1, job 0000000000000007\n"), "{out}");
    assert!(out.contains("needs blocks of w0-e1-i1.region"), "{out}");
    assert!(out.contains("0 of 2") && out.contains("cells"), "{out}");
    assert_eq!(json[0]["segments"][0]["blocks"], 3);
}

fn files_of_another_kind_are_refused() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let cases =
        [("manifest", "roots"), ("region", "roots"), ("root", "c2.manifest"), ("segment", "roots")];
    for (what, file) in cases {
        let path = text(&dir.join(file));
        let (code, _, err) = said(&tool(at.path(), &["inspect", what, &path]));
        assert_eq!((code, err.is_empty()), (1, false), "{what} {file}: {err}");
    }
    let (code, _, err) = said(&tool(at.path(), &["inspect", "root", &text(&dir)]));
    assert_eq!((code, err.contains("is not a file")), (2, true), "{err}");
    assert_eq!(said(&tool(at.path(), &["inspect", "root", "/nowhere"])).0, 4);
    let short = at.path().join("short");
    for bytes in [0, 1, 4095] {
        fs::write(&short, vec![7; bytes]).expect("room");
        for what in ["segment", "manifest", "root", "region"] {
            let (code, _, err) = said(&tool(at.path(), &["inspect", what, &text(&short)]));
            assert_eq!((code, err.is_empty()), (1, false), "{what} of {bytes} bytes: {err}");
        }
    }
}

fn a_damaged_file_is_said_to_be() {
    let at = folder();
    let dir = at.path().join("ck");
    write_folder(&dir);
    let newest = dir.join("c3.manifest");
    let mut bytes = fs::read(&newest).expect("there");
    bytes[1000] ^= 1;
    fs::write(&newest, bytes).expect("room");
    let (code, out, err) = said(&tool(at.path(), &["checkpoint", "list", &text(&dir)]));
    assert_eq!((code, err.contains("c3.manifest is damaged")), (1, true), "{err}");
    let line = |id: &str| out.lines().find(|line| line.starts_with(id)).expect("listed").to_owned();
    assert!(line("3 ").ends_with("named, damaged") && line("2 ").ends_with("newest"), "{out}");
    let (code, out, _) = said(&tool(at.path(), &["checkpoint", "show", &text(&dir)]));
    assert_eq!((code, out.starts_with("c2.manifest: newest")), (0, true), "{out}");
    let (code, _, _) = said(&tool(at.path(), &["checkpoint", "show", &text(&dir), "3"]));
    assert_eq!(code, 1);
    let roots = dir.join("roots");
    let mut bytes = fs::read(&roots).expect("there");
    bytes[20] ^= 1;
    fs::write(&roots, bytes).expect("room");
    let (code, out, _) = said(&tool(at.path(), &["inspect", "root", &text(&roots)]));
    assert_eq!((code, out.lines().count()), (1, 2), "{out}");
    assert!(out.contains("slot 0: damaged at byte 0: "), "{out}");
}

fn endless(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| n % 100)
        .aggregate(|| 0u64, |count, _| *count += 1, |_, count| *count)
        .for_each(|_| ());
}

fn segments_of_a_running_job_are_shown() {
    let at = folder();
    let base = settings(2);
    let job = start(endless, "", Settings { name: "seen".into(), rate: Some(1000), ..base });
    let view = job.workers().expect("it starts");
    common::wait_for("steps of all workers", || {
        let commits = |worker: &&testudo::shm::header::WorkerHeader| {
            worker.commits.load(testudo::shm::primitive::Ordering::Relaxed)
        };
        view.workers.iter().all(|worker| commits(worker) > 100).then_some(())
    });
    let mut seen: BTreeMap<String, Value> = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("Linux") {
        let number = entry.expect("one").file_name().to_string_lossy().into_owned();
        let name = fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
        let Some(name) = name.to_str().and_then(|name| name.strip_prefix("/memfd:seen-")) else {
            continue;
        };
        let path = format!("/proc/{}/fd/{number}", std::process::id());
        let (code, out, err) = said(&tool(at.path(), &["inspect", "segment", &path, "--json"]));
        assert_eq!(code, 0, "{name}: {err}");
        let (code, lines, _) = said(&tool(at.path(), &["inspect", "segment", &path]));
        assert_eq!((code, lines.contains("segment: ")), (0, true), "{lines}");
        seen.insert(name.trim_end_matches(" (deleted)").to_owned(), parsed(&out).remove(0));
        // The same of a copy of its first bytes, which somebody has kept.
        let copy = at.path().join("copy");
        let mut first = fs::File::open(&path).expect("our own segment").take(4 << 20);
        std::io::copy(&mut first, &mut fs::File::create(&copy).expect("room")).expect("room");
        let (code, out, err) =
            said(&tool(at.path(), &["inspect", "segment", &text(&copy), "--json"]));
        assert_eq!(code, 0, "{name}: {err}");
        let kept = parsed(&out).remove(0);
        let shown = &seen[name.trim_end_matches(" (deleted)")];
        let members = |of: &Value| of.as_object().expect("members").len();
        // A copy has no name of its own.
        assert_eq!(members(&kept) + 1, members(shown), "{kept} {shown}");
    }
    job.stop();
    finish(job).expect("it drains");
    assert_eq!(seen["control"]["segment"], "control");
    assert_eq!(seen["control"]["supervisor"], std::process::id());
    for worker in 0..2 {
        let shown = &seen[&format!("w{worker}")];
        assert_eq!((&shown["segment"], &shown["worker"]), (&"worker".into(), &worker.into()));
        let counters = shown["counters"].as_array().expect("counters");
        let read = counters.iter().find(|counter| counter["counter"] == "numbers/records_out");
        assert!(read.is_some_and(|read| read["value"].as_u64() > Some(0)), "{counters:?}");
        assert!(shown["cells"].as_array().is_some_and(|cells| cells.len() > 10), "{shown}");
        let rings = shown["ring_positions"].as_array().expect("rings");
        assert!(rings.iter().any(|ring| ring["position"].as_u64() > Some(0)), "{rings:?}");
        assert!(shown["undo_log"].is_string(), "{shown}");
    }
    let groups = seen.iter().filter(|(name, _)| name.starts_with("g0-"));
    let with_state = groups.filter(|(_, group)| {
        group["states"]
            .as_array()
            .is_some_and(|states| states.len() == 1 && states[0]["words"][0].as_u64() >= Some(4096))
    });
    assert!(with_state.count() > 0, "{seen:?}");
    assert!(seen.keys().any(|name| name.starts_with("g0-")), "{seen:?}");
}
