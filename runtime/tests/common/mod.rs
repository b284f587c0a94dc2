//! What the test programs share. Each is a program of its own (`harness = false`), since jobs run
//! in worker processes that are the same program again: its main begins with `testudo::init()` and
//! ends in [`host`].
//!
//! A job runs in one of two ways: inside the test ([`run`], [`start`]), where its workers can be
//! watched and killed one by one, or as a program ([`program::Cli`]), where its exit code, standard
//! streams, environment and descriptors are its own.
//!
//! Nothing here waits for a time to pass as proof of anything: every wait is for an event, up to
//! [`PATIENCE`].

#![allow(dead_code, reason = "each test program uses a part of this")]

pub mod gated;

pub mod manager;

pub mod program;

pub mod process;

#[cfg(target_arch = "x86_64")]
pub mod stepper;

pub mod tally;

pub mod tool;

pub mod trace;

pub mod wild;

use libtest_mimic::{Arguments, Trial};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use testudo::prelude::*;
use testudo::supervisor::launch::Running;

/// A job's function.
pub type Build = fn(&Flow, &str);

/// Jobs by name, for those that run as programs.
pub type Jobs = &'static [(&'static str, Build)];

/// The longest that anything here may take, on a machine with much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Long variants run with TESTUDO_DEEP=1.
pub fn deep<T>(long: T, short: T) -> T {
    if std::env::var_os("TESTUDO_DEEP").is_some_and(|value| value == "1") { long } else { short }
}

/// Those of `scripts/soak` run with TESTUDO_SOAK=1.
pub fn soak<T>(long: T, short: T) -> T {
    if std::env::var_os("TESTUDO_SOAK").is_some_and(|value| value == "1") { long } else { short }
}

/// Test functions as trials under their names.
macro_rules! trials {
    ($($test:ident),* $(,)?) => {
        vec![$(libtest_mimic::Trial::test(stringify!($test), || {
            $test();
            Ok(())
        })),*]
    };
}
pub(crate) use trials;

/// The rest of a test program's main: the job asked for, or the tests.
pub fn host(jobs: Jobs, trials: Vec<Trial>) -> ExitCode {
    // Every test keeps all cores busy by itself.
    host_on(1, jobs, trials)
}

/// The same for tests that mostly wait: so many at a time.
pub fn host_on(threads: usize, jobs: Jobs, trials: Vec<Trial>) -> ExitCode {
    if program::is_asked_for() {
        return program::run(jobs);
    }
    let mut arguments = Arguments::from_args();
    let asked = arguments.test_threads.unwrap_or(threads);
    arguments.test_threads = Some(asked.min(threads));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Settings for a test's job: small rings and few groups start quickly and are full often.
pub fn settings(workers: usize) -> Settings {
    Settings {
        workers,
        ring_bytes: 64 << 10,
        key_groups: 16,
        progress: false,
        tier: tier(),
        ..Settings::default()
    }
}

/// The tier that all jobs are to have, where the environment asks for one.
fn tier() -> Option<testudo::config::Tier> {
    match std::env::var("TESTUDO_TIER").ok()?.as_str() {
        "1" => Some(testudo::config::Tier::Replica),
        "2" => Some(testudo::config::Tier::Standby),
        _ => None,
    }
}

/// Waits until `done` gives something.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits for a job's end; one that hangs is stopped and fails the test.
pub fn finish(running: Running) -> Result<Report, testudo::Error> {
    let begun = Instant::now();
    while !running.is_over() {
        if begun.elapsed() > PATIENCE {
            running.stop();
            running.stop();
            let end = running.join();
            panic!("the job hung; stopped, it says {end:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    running.join()
}

/// Runs a job to its end.
pub fn try_run(
    build: Build,
    parameters: &str,
    settings: Settings,
) -> Result<Report, testudo::Error> {
    finish(start(build, parameters, settings))
}

/// Runs a job that must end well.
pub fn run(build: Build, parameters: &str, settings: Settings) -> Report {
    match try_run(build, parameters, settings) {
        Ok(report) => report,
        Err(error) => panic!("the job failed: {error}"),
    }
}

/// Runs a job that must fail, and gives what it says and its exit code.
pub fn run_failing(build: Build, parameters: &str, settings: Settings) -> (String, u8) {
    match try_run(build, parameters, settings) {
        Ok(report) => panic!("the job should have failed: {report:?}"),
        Err(error) => (error.to_string(), error.exit_code()),
    }
}

/// Starts a job in a thread of its own.
pub fn start(build: Build, parameters: &str, settings: Settings) -> Running {
    Job::new(build).parameters(parameters).settings(settings).start()
}

/// The lines of a file, sorted.
pub fn sorted_lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends in half a line", path.display());
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

/// The lines of all parts in a folder, sorted.
pub fn sorted_parts(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the output folder is there");
    let paths = entries.map(|entry| entry.expect("the folder can be read").path());
    let is_part = |path: &std::path::PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("part-"))
    };
    let mut lines: Vec<String> =
        paths.filter(is_part).flat_map(|path| sorted_lines(&path)).collect();
    lines.sort_unstable();
    lines
}

/// A folder for a test's files, gone afterwards.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("testudo-test-").tempdir().expect("room for a temporary folder")
}

/// A path's text: temporary folders have no odd characters.
pub fn text(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

/// Numbers that look random and are the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        mix(&mut self.0) % bound
    }
}

fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    scramble(*state)
}

/// A number that depends on `n` in no visible way: for generators, which know only `n`.
pub fn scramble(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}
