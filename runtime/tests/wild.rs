//! Wild stores: user code that writes to addresses it has no business with. What belongs to peers
//! and to the supervisor is mapped read-only, from descriptors that cannot be written through, so
//! the processor refuses; what a worker breaks of its own ends in its own deaths, never in a
//! peer's.

mod common;

use common::wild::Wild;
use common::{Jobs, finish, folder, scramble, settings, sorted_lines, sorted_parts, start};
use common::{text, trials};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Lines;

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![no_address_of_a_peer_can_be_written, what_a_worker_breaks_of_its_own_kills_no_peer,],
    )
}

const TOTAL: u64 = 60_000;

/// The number at which the wild worker goes wild.
const WHEN: u64 = 20_000;

/// Places in each mapping that are tried.
const PLACES: u64 = 12;

/// Whether this process is the wild worker of its job.
fn is_wild() -> bool {
    fs::read_to_string("/proc/self/comm").is_ok_and(|name| name.trim_end() == "testudo-w1")
}

/// A number, and what shows that it is one: a worker may break a record of its own on the way to a
/// peer, and nobody promises that the peer counts it right.
#[testudo::record]
#[derive(Debug)]
struct Sealed {
    number: u64,
    seal: u64,
}

/// Both workers read every other number and count them by key, so that an even key has one reader,
/// worker 0. Worker 1 does what `deed` says when its number comes.
fn counting(flow: &Flow, folder: &Path, deed: impl Fn(&Path) + 'static) {
    let place = folder.to_owned();
    let is_wild = is_wild();
    let numbers = flow
        .source("numbers", Generator::new(TOTAL, |n| n))
        .map(move |n| {
            if is_wild && *n == WHEN + 1 {
                deed(&place);
            }
            Sealed { number: *n, seal: scramble(*n) }
        })
        .key_by(|sealed| sealed.number % 50);
    numbers
        .aggregate(
            || [0u64; 2],
            |sum, Sealed { number, seal }| {
                if *seal == scramble(*number) {
                    *sum = [sum[0] + 1, sum[1].wrapping_add(*seal)];
                }
            },
            |key, sum| [*key, sum[0], sum[1]],
        )
        .sink("out", FileSink::folder(folder.join("out"), "txt", Lines(line)));
}

fn line(row: &[u64; 3]) -> String {
    format!("{} {} {}", row[0], row[1], row[2])
}

/// Tries to store to every mapping that is not its own, each time in a process of its own that has
/// the same mappings, and writes down what became of it.
fn outward(flow: &Flow, parameters: &str) {
    counting(flow, Path::new(parameters), |folder| {
        let mut said = String::new();
        for wild in Wild::mappings().into_iter().filter(|wild| !wild.is_own) {
            let refused = (0..PLACES).filter(|n| wild.is_refused(scramble(*n))).count();
            let opened = wild.can_be_opened_up();
            said += &format!("{} {refused} {opened}\n", wild.name);
        }
        fs::write(folder.join("said"), said).expect("room for a file");
    });
}

fn no_address_of_a_peer_can_be_written() {
    let (folder, calm) = (folder(), common::folder());
    let job = Settings { progress: false, ..settings(2) };
    let report = common::run(outward, &text(folder.path()), job.clone());
    let said = fs::read_to_string(folder.path().join("said")).expect("the deed was done");
    let lines: Vec<&str> = said.lines().collect();
    // The supervisor's segment, the peer's front, and the peer's ring, mapped twice in a row.
    assert!(lines.len() >= 4, "{said}");
    for line in lines {
        assert!(line.ends_with(&format!(" {PLACES} false")), "not refused: {line}");
    }
    assert!(report.restarts.is_empty());
    fs::write(calm.path().join("calm"), "").expect("room for a file");
    common::run(calmly, &text(calm.path()), job);
    let of = |folder: &tempfile::TempDir| sorted_parts(&folder.path().join("out"));
    assert_eq!(of(&folder), of(&calm));
}

fn calmly(flow: &Flow, parameters: &str) {
    counting(flow, Path::new(parameters), |_| ());
}

/// Stores a word of garbage to one place of its own segments, once in the life of the job.
fn inward(flow: &Flow, parameters: &str) {
    let (place, folder) = parameters.split_once(' ').expect("a place and a folder");
    let place: u64 = place.parse().expect("a number");
    counting(flow, Path::new(folder), move |folder| {
        let done = folder.join("done");
        if done.exists() {
            return;
        }
        let own: Vec<Wild> = Wild::mappings().into_iter().filter(|wild| wild.is_own).collect();
        let wild = &own[place as usize % own.len()];
        fs::write(&done, &wild.name).expect("room for a file");
        wild.store(scramble(place), scramble(!place));
    });
}

/// What worker 0 has counted of what it has read itself.
fn own_of_worker_0(folder: &tempfile::TempDir) -> Vec<String> {
    let mut lines = sorted_lines(&folder.path().join("out/part-000.txt"));
    let key = |line: &String| line.split(' ').next().and_then(|key| key.parse::<u64>().ok());
    lines.retain(|line| key(line).is_some_and(|key| key.is_multiple_of(2)));
    // A broken record that is not counted still has a row follow it: the same as before, or, where
    // it came before any other of its key, one of no records.
    lines.dedup();
    lines.retain(|line| line.split(' ').nth(1) != Some("0"));
    lines
}

fn what_a_worker_breaks_of_its_own_kills_no_peer() {
    let calm = folder();
    common::run(calmly, &text(calm.path()), settings(2));
    let wanted = own_of_worker_0(&calm);
    assert!(wanted.len() > 1000);
    for place in 0..common::deep(400, 24) {
        let folder = folder();
        let parameters = format!("{place} {}", text(folder.path()));
        let running = start(inward, &parameters, Settings { restart_budget: 3, ..settings(2) });
        match finish(running) {
            Ok(report) => {
                let others = report.restarts.iter().filter(|restart| restart.worker != 1).count();
                assert_eq!(others, 0, "place {place}: a peer died: {:?}", report.restarts);
                // What worker 0 read for itself is untouched.
                let found = own_of_worker_0(&folder);
                let differs = || found.iter().zip(&wanted).find(|(found, wanted)| found != wanted);
                assert!(found == wanted, "place {place}: a peer's state: {:?}", differs());
            }
            Err(error) => {
                // The job ended with a reason that names what was broken; or a broken record that
                // looks like one was refused by whoever it came to.
                let text = error.to_string();
                let is_stray = text.contains("a key of group");
                assert!(is_stray || !text.contains("worker 0"), "place {place}: {text}");
            }
        }
    }
}
