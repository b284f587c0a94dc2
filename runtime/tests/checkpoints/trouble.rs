//! What goes wrong around checkpoints: calls that the system refuses, disks that are full or gone,
//! files that were damaged, and folders that do not fit the job.

use super::common::program::Ended;
use super::common::tool::{said, tool};
use super::common::{deep, folder, text, wait_for};
use super::harness::{Scene, bytes_in, flip, index, names};
use super::jobs::{self, Asked};
use std::fs;
use std::path::{Path, PathBuf};
use testudo::testing::{KILL_AT, Point};

/// A job that was killed with two whole checkpoints in its folder.
fn killed(job: &'static str, seed: u64) -> Scene {
    let scene = Scene::new(job, 90_000, 1, seed);
    let ended = scene.crash_at(2, 40_000, "s", Point::BeforeRetire, 2);
    assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
    assert!(scene.manifests().len() >= 2, "{:?}", scene.manifests());
    scene
}

/// How often a program has said something.
fn times(ended: &Ended, what: &str) -> usize {
    ended.err.matches(what).count()
}

pub fn a_job_without_io_uring_writes_its_checkpoints_otherwise_and_says_so_once() {
    let mut scene = Scene::new("ordered", 200_000, 1, 1);
    for error in [libc::ENOSYS, libc::EPERM] {
        let mut life = scene.resumed(2, 16_000);
        life = life.without_call(libc::SYS_io_uring_setup, error);
        let before = scene.newest();
        let mut life = life.start();
        assert!(scene.wait_for_checkpoints(&mut life, before, 2), "the job was too short");
        life.signal_group(libc::SIGKILL);
        let ended = life.wait();
        assert_eq!(times(&ended, "pwrite"), 1, "{}", ended.err);
    }
    let ended = scene.resumed(2, 0).args(["--disk", "uring"]);
    let ended = ended.without_call(libc::SYS_io_uring_setup, libc::EPERM).run();
    assert_eq!(ended.code, Some(4), "{}", ended.err);
    scene.args = vec!["--disk".into(), "pwrite".into()];
    assert!(scene.crash(2, 40_000), "the job was too short");
    scene.end(2);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn a_job_without_userfaultfd_loads_at_once_and_says_so_once() {
    for workers in [2, 3] {
        let scene = killed("ordered", 2);
        let life = scene.resumed(workers, 0).without_call(libc::SYS_userfaultfd, libc::EPERM);
        let ended = life.run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert_eq!(times(&ended, "userfaultfd"), 1, "{}", ended.err);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

/// The folder as a job sees it that runs in a mount namespace of its own.
fn seen_by(pid: u32, path: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root{}", text(path)))
}

pub fn a_full_disk_fails_checkpoints_until_there_is_room() {
    let may_mount = folder();
    let probe = format!("mount -t tmpfs none {}", text(may_mount.path()));
    let probe =
        std::process::Command::new("unshare").args(["--mount", "sh", "-c", &probe]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let scene = Scene::new("ordered", 2_000_000, 1, 3);
    let place = text(scene.folder.path());
    fs::create_dir(scene.checkpoints()).expect("room for a folder");
    let mount =
        format!("mount -t tmpfs -o size=24m none {} && exec \"$@\"", text(&scene.checkpoints()));
    let life = scene.life(2, 16_000).args(["--name", "job"]);
    let life = life.env("XDG_RUNTIME_DIR", &place).env("TMPDIR", &place);
    let life = life.under_unshared(&mount).start();
    let seen = seen_by(life.pid(), &scene.checkpoints());
    let newest = || names(&seen).iter().filter_map(|name| manifest_number(name)).max().unwrap_or(0);
    wait_for("a checkpoint", || (newest() >= 2).then_some(()));
    let filler = seen.join("filler");
    let full = fs::File::create(&filler).map(|mut file| {
        std::io::copy(&mut std::io::repeat(7), &mut file).expect_err("the disk becomes full")
    });
    assert_eq!(full.expect("a file").raw_os_error(), Some(libc::ENOSPC));
    let before = newest();
    wait_for("a checkpoint that finds the disk full", || {
        let history = tool(scene.folder.path(), &["checkpoint", "job", "history", "--json"]);
        let (_, out, _) = said(&history);
        out.contains("No space left on device").then_some(())
    });
    fs::remove_file(&filler).expect("our own file");
    wait_for("a checkpoint when there is room again", || (newest() > before + 1).then_some(()));
    life.signal(libc::SIGTERM);
    let ended = life.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("No space left on device"), "{}", ended.err);
    assert!(ended.err.contains("the job goes on"), "{}", ended.err);
}

fn manifest_number(name: &str) -> Option<u64> {
    name.strip_prefix('c')?.strip_suffix(".manifest")?.parse().ok()
}

pub fn a_job_whose_checkpoint_folder_is_removed_goes_on_and_says_so() {
    let scene = Scene::new("ordered", 400_000, 1, 4);
    let mut life = scene.life(2, 16_000).start();
    assert!(scene.wait_for_checkpoints(&mut life, 0, 1), "the job was too short");
    // New files may appear while it is being removed.
    while scene.checkpoints().exists() {
        let _ = fs::remove_dir_all(scene.checkpoints());
    }
    let ended = life.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("the job goes on"), "{}", ended.err);
    assert!(ended.err.lines().count() < 20, "{}", ended.err);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn a_checkpoint_folder_that_cannot_be_is_refused_before_anything_is_touched() {
    let scene = Scene::new("ordered", 1_000, 1, 5);
    fs::write(&scene.files[0], "precious\n").expect("room for an output");
    fs::write(scene.checkpoints(), "a file").expect("room for a file");
    let ended = scene.life(2, 0).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains(&text(&scene.checkpoints())), "{}", ended.err);
    assert_eq!(scene.rows(0), ["precious"]);
}

/// Damages a killed job's newest checkpoint and has it go on; the older one must be used.
fn falls_back(damage: impl Fn(&Scene, u64)) {
    for workers in [2, 3] {
        let scene = killed("ordered", workers as u64);
        let (older, newest) = newest_two(&scene);
        damage(&scene, newest);
        let ended = scene.end(workers);
        let expected = format!("going on from checkpoint {older} instead");
        assert!(ended.err.contains(&expected), "{}", ended.err);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

/// The last two checkpoints. One that failed may have had a number between them.
fn newest_two(scene: &Scene) -> (u64, u64) {
    match scene.manifests()[..] {
        [.., older, newest] => (older, newest),
        _ => panic!("there are no two checkpoints"),
    }
}

fn manifest(scene: &Scene, id: u64) -> PathBuf {
    scene.checkpoints().join(format!("c{id}.manifest"))
}

/// The newest file of worker 0 that checkpoint `id` names.
fn region_file(scene: &Scene, id: u64) -> PathBuf {
    let text = fs::read_to_string(manifest(scene, id)).expect("a manifest");
    let at = text.find("\"w0-e").expect("a file of worker 0") + 1;
    let name = text[at..].split('"').next().expect("its name");
    scene.checkpoints().join(name)
}

pub fn a_damaged_manifest_is_reported_and_the_checkpoint_before_is_used() {
    falls_back(|scene, newest| flip(&manifest(scene, newest), 300));
}

pub fn a_damaged_root_slot_is_reported_and_the_checkpoint_before_is_used() {
    falls_back(|scene, _| {
        let roots = scene.checkpoints().join("roots");
        let bytes = fs::read(&roots).expect("roots");
        let sequence = |slot: usize| {
            let at = slot * 4096 + 16;
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
        };
        let newest = usize::from(sequence(1) > sequence(0));
        flip(&roots, newest as u64 * 4096 + 70);
    });
}

pub fn a_damaged_index_is_reported_and_the_checkpoint_before_is_used() {
    falls_back(|scene, newest| {
        let path = region_file(scene, newest);
        let bytes = fs::metadata(&path).expect("the file").len();
        flip(&path, bytes - 30);
    });
}

/// Blocks of state are read when they are needed: the job is under way by then.
pub fn a_damaged_block_is_reported_and_the_checkpoint_before_is_used() {
    falls_back(|scene, newest| flip(&region_file(scene, newest), 4096 + 100));
}

/// The crash comes after the job went back, and before it took a checkpoint there.
pub fn a_job_that_dies_after_it_went_back_does_not_find_the_damaged_checkpoint_again() {
    let mut scene = killed("ordered", 8);
    let (older, newest) = newest_two(&scene);
    flip(&region_file(&scene, newest), 4096 + 100);
    scene.args = vec!["--checkpoint-at".into(), "0 0 1 1 *".into()];
    let look = || {
        let bytes = fs::metadata(&scene.files[0]).expect("the output").len();
        (fs::read(scene.checkpoints().join("roots")).expect("the roots"), bytes)
    };
    let before = look();
    let mut life = scene.resumed_without_interval(2, 40_000).start();
    wait_for("the job to go back, its output with it", || {
        let over = life.child.try_wait().expect("our own child").is_some();
        assert!(!over, "the job was too short");
        let now = look();
        (now.0 != before.0 && now.1 != before.1).then_some(())
    });
    life.signal_group(libc::SIGKILL);
    let ended = life.wait();
    let older = format!("going on from checkpoint {older} instead");
    assert!(ended.err.contains(&older), "{}", ended.err);
    assert!(scene.newest() <= newest, "a checkpoint was taken");
    scene.args.clear();
    scene.end(2);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn when_all_is_damaged_nothing_is_touched() {
    let scene = killed("ordered", 9);
    let (older, newest) = newest_two(&scene);
    flip(&manifest(&scene, newest), 300);
    flip(&region_file(&scene, older), 10);
    let before = fs::read(&scene.files[0]).expect("the output");
    let ended = scene.resumed(2, 0).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains("no checkpoint in"), "{}", ended.err);
    assert_eq!(fs::read(&scene.files[0]).expect("the output"), before);
}

/// A refused job: exit code 6, all of these said, outputs and checkpoints as they were.
fn refused(scene: &Scene, life: super::common::program::Cli, said: &[&str]) {
    let before = fs::read(&scene.files[0]).expect("the output");
    let manifests = scene.manifests();
    let ended = life.run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    for said in said {
        assert!(ended.err.contains(said), "{said:?} is not said: {}", ended.err);
    }
    assert_eq!(fs::read(&scene.files[0]).expect("the output"), before);
    assert_eq!(scene.manifests(), manifests);
}

pub fn checkpoints_of_something_else_are_refused_and_nothing_is_touched() {
    let scene = killed("counted", 10);
    let parameters = Asked::text(scene.total, 0, &scene.files);
    let again = |job: &str| scene.life_as(job, &parameters, 2).args(["--resume"]);
    refused(&scene, again("counted").args(["--name", "other"]), &["\"other\"", "\"job\""]);
    refused(&scene, again("recounted"), &["another type", "count"]);
    let id = scene.newest().to_string();
    let life = scene.life_as("recounted", &parameters, 2).args(["--resume-from", &id]);
    refused(&scene, life, &["another type"]);
    scene.end(2);
    scene.check(&jobs::counted_rows(scene.total));
}

/// A job that was killed goes on as another one. Records in flight on an exchange that this one
/// does not have are never dropped: it is refused until there are none.
fn changes(scene: &Scene, was: &str, is: &str, args: &[&str]) {
    let asked = |change: &str| {
        format!("{} {change}", Asked::text(scene.total, 0, &scene.files)).trim_end().to_owned()
    };
    for _ in 0..12 {
        let order = format!("s:{}:1:1:all", index(Point::BeforeRetire));
        let life = scene.life_as("counted", &asked(was), 2).args(["--resume", "--rate", "20000"]);
        let ended = life.env(KILL_AT, &order).run();
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
        let before = fs::read(&scene.files[0]).expect("the output");
        let life = scene.life_as("counted", &asked(is), 2).args(["--resume"]);
        let ended = life.args(args.iter().copied()).run();
        if ended.code == Some(0) {
            return;
        }
        assert_eq!(ended.code, Some(6), "{}", ended.err);
        assert!(ended.err.contains("in flight on exchange"), "{}", ended.err);
        assert_eq!(fs::read(&scene.files[0]).expect("the output"), before);
    }
    panic!("something is always in flight");
}

pub fn an_added_operator_begins_empty() {
    let scene = Scene::new("counted", 30_000, 1, 11);
    changes(&scene, "", "+", &[]);
    scene.check(&jobs::counted_rows(scene.total));
}

pub fn a_removed_operator_is_refused_unless_its_state_may_go() {
    let scene = Scene::new("counted", 300_000, 1, 12);
    let more = format!("{} +", Asked::text(scene.total, 40_000, &scene.files));
    let mut life = scene.life_as("counted", &more, 2).start();
    assert!(scene.wait_for_checkpoints(&mut life, 0, 2), "the job was too short");
    life.signal_group(libc::SIGKILL);
    life.wait();
    refused(&scene, scene.resumed(2, 0), &["again", "--allow-dropped-state"]);
    let scene = Scene::new("counted", 30_000, 1, 13);
    changes(&scene, "+", "", &["--allow-dropped-state"]);
    scene.check(&jobs::counted_rows(scene.total));
}

pub fn a_second_job_on_a_folder_is_refused() {
    let scene = Scene::new("ordered", 300_000, 1, 13);
    let mut life = scene.life(1, 40_000).start();
    assert!(scene.wait_for_checkpoints(&mut life, 0, 1), "the job was too short");
    let other = scene.folder.path().join("other");
    let parameters = Asked::text(1000, 0, std::slice::from_ref(&other));
    let ended = scene.life_as("ordered", &parameters, 1).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains(&format!("in use by process {}", life.pid())), "{}", ended.err);
    assert!(!other.exists());
    life.signal(libc::SIGTERM);
    assert_eq!(life.wait().code, Some(0));
    scene.end(1);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn resuming_without_a_folder_is_a_usage_error() {
    let scene = Scene::new("ordered", 1000, 1, 14);
    let parameters = Asked::text(1000, 0, &scene.files);
    for flag in [&["--resume"] as &[&str], &["--resume-from", "3"]] {
        let cli = super::common::program::Cli::new("ordered", &parameters);
        let ended = cli.workers(1).args(flag.iter().copied()).run();
        assert_eq!(ended.code, Some(2), "{}", ended.err);
        assert!(ended.err.contains("--checkpoint-dir"), "{}", ended.err);
    }
}

pub fn resuming_where_there_is_nothing_begins_afresh_and_says_so() {
    let scene = Scene::new("ordered", 10_000, 1, 15);
    fs::write(&scene.files[0], "of another run\n").expect("room for an output");
    let ended = scene.end(2);
    assert!(ended.err.contains("the job begins afresh"), "{}", ended.err);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn resuming_a_finished_job_changes_nothing() {
    let scene = Scene::new("ordered", 10_000, 1, 16);
    scene.end(2);
    let state = || {
        let files = [scene.files[0].clone(), scene.checkpoints().join("roots")];
        let look = |path: PathBuf| {
            let modified = fs::metadata(&path).and_then(|meta| meta.modified()).expect("its time");
            (fs::read(&path).expect("a file"), modified)
        };
        (files.map(look), scene.manifests())
    };
    let before = state();
    for workers in [2, 3] {
        let ended = scene.end(workers);
        assert!(ended.err.contains("had come to its end"), "{}", ended.err);
        assert!(state() == before, "something changed");
    }
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn a_checkpoint_may_be_named_by_number_and_by_path() {
    for (workers, by_path) in [(2, false), (2, true), (3, false)] {
        let scene = killed("ordered", 17);
        let (older, _) = newest_two(&scene);
        let name = if by_path { text(&manifest(&scene, older)) } else { older.to_string() };
        let ended = scene.life(workers, 0).args(["--resume-from", &name]).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        scene.check(&jobs::ordered_rows(scene.total));
    }
    let scene = killed("ordered", 18);
    refused(&scene, scene.life(2, 0).args(["--resume-from", "77"]), &["there is no checkpoint 77"]);
}

/// Begun again without --resume, a job counts none of the checkpoints that are there.
pub fn a_job_that_begins_again_does_not_go_back_to_an_older_run() {
    let scene = killed("ordered", 19);
    let ended = scene.life(2, 8_000).env(KILL_AT, "0:7:1:0:all").run();
    assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
    let ended = scene.end(2);
    assert!(ended.err.contains("the job begins afresh"), "{}", ended.err);
    scene.check(&jobs::ordered_rows(scene.total));
}

/// Many checkpoints, in two lives: the folder holds what two of them need, no more.
pub fn a_folder_does_not_grow_without_bound() {
    let mut scene = Scene::new("ordered", 300_000, 1, 20);
    let args = ["--checkpoint-interval", "1ms", "--rate", "10000"];
    scene.args = args.map(str::to_owned).to_vec();
    let (many, mut most) = (deep(100, 30), (0, 0));
    for _ in 0..2 {
        let before = scene.newest();
        let mut life = scene.resumed_without_interval(2, 0).start();
        wait_for("many checkpoints", || {
            let over = life.child.try_wait().expect("our own child").is_some();
            let (files, bytes) =
                (names(&scene.checkpoints()).len(), bytes_in(&scene.checkpoints()));
            most = (most.0.max(files), most.1.max(bytes));
            (over || scene.newest() >= before + many).then_some(())
        });
        life.signal_group(libc::SIGKILL);
        life.wait();
    }
    assert!(scene.newest() >= 2 * many, "{} checkpoints", scene.newest());
    // Two checkpoints of two workers, each of up to 25 files, and what is being written and
    // removed.
    assert!(most.0 <= 120, "{} files", most.0);
    assert!(most.1 <= 64 << 20, "{} bytes", most.1);
    scene.args.clear();
    scene.end(2);
    scene.check(&jobs::ordered_rows(scene.total));
}
