//! Every example: what it writes is what it has always written (`golden/`), run straight, and
//! killed as a whole several times and resumed each time, with as many workers and with others.
//!
//! Rows are compared sorted: between subtasks there is no order. The programs are those that
//! `cargo test` builds.

mod common;

use common::process;
use common::program::{Cli, Ended, Started};
use common::{Random, folder, sorted_lines, text, trials, wait_for};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use testudo::state::checkpoint::ManifestName;

fn main() -> ExitCode {
    testudo::init();
    let mut trials = trials![every_example_is_tested, flights_are_exact_in_random_lives];
    for example in EXAMPLES {
        let name = |what: &str| format!("{}_{what}", example.name);
        let trial = |what: &str, test: fn(&'static Example)| {
            libtest_mimic::Trial::test(name(what), move || {
                test(example);
                Ok(())
            })
        };
        trials.push(trial("writes_what_it_always_wrote", straight));
        if example.resumes {
            trials.push(trial("is_exact_when_killed_and_resumed", resumed_alike));
            trials.push(trial("is_exact_when_resumed_with_other_workers", resumed_otherwise));
        }
    }
    // In their lives that are killed, examples are held back by their rate.
    common::host_on(4, &[], trials)
}

/// An example and how to run it so that it takes about a second.
struct Example {
    name: &'static str,
    /// Its own options.
    args: &'static [&'static str],
    /// Records a second in a life that is to be killed.
    rate: &'static str,
    /// How many files it prints to, besides the first.
    more: usize,
    resumes: bool,
}

const EXAMPLES: &[Example] = &[
    Example { name: "hello", args: &[], rate: "30", more: 0, resumes: true },
    Example { name: "keyed_state", args: &[], rate: "50", more: 0, resumes: true },
    Example { name: "event_time", args: &[], rate: "100", more: 1, resumes: true },
    Example { name: "late_data", args: &[], rate: "150000", more: 1, resumes: true },
    Example { name: "custom_operator", args: &[], rate: "500", more: 0, resumes: true },
    Example {
        name: "custom_source",
        args: &["--beats", "60", "--every-ms", "15"],
        rate: "1000000",
        more: 0,
        resumes: true,
    },
    Example { name: "flights", args: &[], rate: "25000", more: 0, resumes: true },
    // These kill or measure themselves, and check what comes out.
    Example { name: "crash", args: &[], rate: "", more: 0, resumes: false },
    Example { name: "self_healing", args: &[], rate: "", more: 0, resumes: false },
    Example { name: "embedded_latency", args: &["1000"], rate: "", more: 0, resumes: false },
];

/// The sources of the examples lie in the repository; one that is added is added here.
fn every_example_is_tested() {
    let sources = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples"));
    for entry in sources.expect("the examples").flatten() {
        let path = entry.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_known = EXAMPLES.iter().any(|example| example.name == name);
        let is_source = path.extension().is_some_and(|extension| extension == "rs");
        assert!(!is_source || is_known, "examples/{name}.rs is not among the tested ones");
    }
}

/// A folder for the lives of an example.
struct Scene {
    folder: tempfile::TempDir,
    example: &'static Example,
    input: Option<PathBuf>,
}

impl Scene {
    fn new(example: &'static Example) -> Self {
        let folder = folder();
        let input = (example.name == "flights").then(|| {
            let packed = std::fs::File::open(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../examples/data/flights-2013-01.csv.gz"
            ));
            let mut unpacked = flate2::read::GzDecoder::new(packed.expect("the bundled flights"));
            let path = folder.path().join("input.csv");
            let mut file = std::fs::File::create(&path).expect("room for the flights");
            std::io::copy(&mut unpacked, &mut file).expect("room for the flights");
            path
        });
        Self { folder, example, input }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("output")
    }

    fn program(&self, workers: usize) -> Cli {
        let (workers, output) = (workers.to_string(), text(&self.output()));
        let into = if self.input.is_some() { "--output" } else { "--print-to" };
        let cli = Cli::example(self.example.name)
            .own_group()
            .args(self.example.args.iter().copied())
            .args(["--workers", &workers, "--no-progress", into, &output]);
        match &self.input {
            Some(input) => cli.args(["--input", &text(input)]),
            None => cli,
        }
    }

    fn life(&self, workers: usize) -> Cli {
        let checkpoints = text(&self.checkpoints());
        let each = ["--checkpoint-interval", "10ms", "--resume"];
        self.program(workers).args(["--checkpoint-dir", &checkpoints]).args(each)
    }

    fn checkpoints(&self) -> PathBuf {
        self.folder.path().join("checkpoints")
    }

    fn newest(&self) -> u64 {
        let entries = std::fs::read_dir(self.checkpoints()).into_iter().flatten().flatten();
        let ids = entries.filter_map(|entry| {
            Some(ManifestName::parse(&entry.file_name().to_string_lossy())?.id)
        });
        ids.max().unwrap_or(0)
    }

    /// All that was written, sorted, without what no two runs have in common.
    fn rows(&self) -> Vec<String> {
        let mut rows = sorted_lines(&self.output());
        for number in 0..self.example.more {
            rows.extend(sorted_lines(&self.folder.path().join(format!("output.{}", number + 2))));
        }
        if self.example.name == "custom_source" {
            rows.iter_mut().for_each(|row| row.truncate(row.find(", read").unwrap_or(row.len())));
            rows.sort_unstable();
        }
        rows
    }

    /// A life that is killed, with all its processes, some time after its first checkpoint. False
    /// if it came to its end.
    fn crash(&self, workers: usize, random: &mut Random) -> bool {
        let before = self.newest();
        let mut life = self.life(workers).args(["--rate", self.example.rate]).start();
        let is_over = wait_for("a checkpoint", || {
            let is_over = life.child.try_wait().expect("our own child").is_some();
            (is_over || self.newest() > before).then_some(is_over)
        });
        if !is_over {
            std::thread::sleep(Duration::from_micros(random.below(250_000)));
            life.signal_group(libc::SIGKILL);
        }
        let ended = life.wait();
        let is_killed = ended.signal == Some(libc::SIGKILL);
        assert!(is_killed || ended.code == Some(0), "a life ended by itself: {ended:?}");
        is_killed
    }
}

fn ended_well(ended: &Ended) {
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"))
}

/// Compares with the file under `golden/`: its lines, or their count and checksum where they are
/// many. TESTUDO_GOLDEN=1 writes it anew.
fn compare(example: &Example, rows: &[String]) {
    let all = rows.join("\n") + "\n";
    let found = if rows.len() > 1000 {
        let sum = testudo::state::checkpoint::checksum(all.as_bytes());
        format!("{} rows, xxh3 {sum:016x}\n", rows.len())
    } else {
        all
    };
    let path = golden(example.name);
    if std::env::var_os("TESTUDO_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::write(&path, &found).expect("the golden file can be written");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{}: not what {} says:\n{found}", example.name, path.display());
}

fn straight(example: &'static Example) {
    if !example.resumes {
        return ended_well(&Cli::example(example.name).args(example.args.iter().copied()).run());
    }
    let scene = Scene::new(example);
    ended_well(&scene.program(2).run());
    compare(example, &scene.rows());
}

fn lives(example: &'static Example, workers: [usize; 4], seed: u64) {
    let mut random = Random::new(seed);
    // On a machine that is busy elsewhere a life may come to its end before it is killed.
    let scene = wait_for("a life that is killed", || {
        let scene = Scene::new(example);
        let killed =
            workers[..3].iter().filter(|workers| scene.crash(**workers, &mut random)).count();
        (killed > 0).then_some(scene)
    });
    ended_well(&scene.life(workers[3]).run());
    compare(example, &scene.rows());
}

fn resumed_alike(example: &'static Example) {
    lives(example, [2; 4], 1);
}

fn resumed_otherwise(example: &'static Example) {
    // The first number says how many metronomes there are.
    lives(example, [2, 3, 1, 2], 2);
}

/// One of some things.
fn any<'a>(random: &mut Random, of: &[&'a [&'a str]]) -> &'a [&'a str] {
    of[random.below(of.len() as u64) as usize]
}

/// A life with options that the seed chooses: other workers, another disk, one core, little
/// bandwidth, checkpoints all the time or hardly ever.
fn random_life(scene: &Scene, random: &mut Random, is_last: bool) -> Cli {
    let workers = [1, 2, 3, 5][random.below(4) as usize];
    let checkpoints = text(&scene.checkpoints());
    let mut cli = scene.program(workers).args(["--resume", "--checkpoint-dir", &checkpoints]);
    let choices: [&[&[&str]]; 5] = [
        &[&["1ms"], &["5ms"], &["20ms"], &["100ms"], &["300ms"], &["1s"]],
        &[&[], &[], &["--disk", "pwrite"]],
        &[&[], &[], &["--checkpoint-bandwidth", "1MiB"], &["--checkpoint-bandwidth", "100KiB"]],
        &[&[], &[], &["--load-bandwidth", "200KiB"]],
        &[&[], &[], &["--ring-bytes", "16KiB"]],
    ];
    cli = cli.args(["--checkpoint-interval"]);
    for choice in choices {
        cli = cli.args(any(random, choice).iter().copied());
    }
    if !is_last {
        cli = cli.args(["--rate"]);
        cli = cli.args(any(random, &[&["10000"], &["30000"], &["100000"]]).iter().copied());
    }
    match random.below(3) {
        0 => cli.under("exec taskset -c 0 \"$@\"").own_group(),
        _ => cli,
    }
}

/// Goes on until the life is over or its time is: workers die in between, or not.
fn disturb(life: &mut Started, random: &mut Random) {
    let end = Instant::now() + Duration::from_micros(random.below(800_000));
    let kills = random.below(3) == 0;
    while Instant::now() < end && life.child.try_wait().expect("our own child").is_none() {
        std::thread::sleep(Duration::from_micros(random.below(100_000)));
        let workers = process::workers_of(life.pid());
        if kills && !workers.is_empty() {
            let victim = workers[random.below(workers.len() as u64) as usize];
            let held = process::Held::child_of(victim, life.pid());
            // It may have ended by itself.
            let _ = held.is_some_and(|held| held.signal(libc::SIGKILL));
        }
    }
}

/// Jobs of several lives, each ended by SIGKILL to all processes, by a stop, or by draining.
fn flights_are_exact_in_random_lives() {
    let is_soak = std::env::var_os("TESTUDO_SOAK").is_some_and(|value| value == "1");
    let example = EXAMPLES.iter().find(|example| example.name == "flights").expect("it is there");
    for seed in 0..if is_soak { 300 } else { 2 } {
        let mut random = Random::new(seed + 1000);
        let scene = Scene::new(example);
        for _ in 0..1 + random.below(4) {
            let mut life = random_life(&scene, &mut random, false).start();
            disturb(&mut life, &mut random);
            let signals: &[i32] = match random.below(8) {
                0 => &[libc::SIGTERM],
                1 => &[libc::SIGTERM, libc::SIGTERM],
                _ => &[libc::SIGKILL],
            };
            if signals[0] == libc::SIGTERM {
                // A process that does not mind signals yet would end of one.
                wait_for("the job to mind signals", || {
                    let is_over = life.child.try_wait().expect("our own child").is_some();
                    (is_over || process::supervisor_of(life.pid()).is_some()).then_some(())
                });
            }
            for signal in signals {
                if life.child.try_wait().expect("our own child").is_none() {
                    life.signal_group(*signal);
                }
            }
            let ended = life.wait();
            let is_killed = ended.signal == Some(libc::SIGKILL) || ended.code == Some(0);
            let is_stopped = signals.len() > 1 && ended.code != Some(101);
            assert!(is_killed || is_stopped, "seed {seed}: a life ended by itself: {ended:?}");
        }
        let ended = random_life(&scene, &mut random, true).run();
        assert_eq!(ended.code, Some(0), "seed {seed}: {}{}", ended.out, ended.err);
        if is_soak {
            eprintln!("seed {seed} is exact: {}", ended.err.lines().next().unwrap_or_default());
        }
        compare(example, &scene.rows());
    }
}
