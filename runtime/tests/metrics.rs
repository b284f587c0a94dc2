//! Metrics: the text is what Prometheus reads, the numbers are those of the job, they never go
//! back, and nobody who asks for them can do the job any harm.

mod common;

use common::gated::Gated;
use common::process::Held;
use common::program::{Cli, Started};
use common::tool::{said, tool};
use common::{Jobs, folder, text, trials, wait_for};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use testudo::prelude::*;
use testudo::serde_json::{self, Value};
use testudo::sink::file::Csv;

const JOBS: Jobs = &[("counted", counted)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            the_text_is_valid_and_its_numbers_are_those_of_the_report,
            hostile_clients_do_the_job_no_harm,
            metrics_stay_where_they_were_when_the_supervisor_dies,
            a_port_that_is_taken_and_an_address_that_others_reach_are_refused,
            the_strict_parser_refuses_what_prometheus_would,
        ],
    )
}

const TOTAL: u64 = 60_000;

/// `gate output`: every number to one of the subtasks by key, and to a folder of parts.
fn counted(flow: &Flow, parameters: &str) {
    let (gate, output) = parameters.split_once(' ').expect("gate and output");
    let odd = flow.counter("odd \"numbers\"");
    flow.source("numbers", Gated { total: TOTAL, gate: gate.into() })
        .key_by(|n| n % 97)
        .stream()
        .filter(move |n| {
            odd.add(n % 2);
            true
        })
        .sink("rows", FileSink::folder(output, "csv", Csv(|n: &u64| *n)));
}

/// One sample: its labels as they are written, and its value.
type Samples = BTreeMap<String, (String, BTreeMap<String, f64>)>;

/// Reads the text form as strictly as its specification allows: each family has HELP and TYPE
/// before its samples, which stand together and differ in their labels.
fn parse(text: &str) -> Result<Samples, String> {
    let mut families = Samples::new();
    let (mut helped, mut current) = (BTreeSet::new(), String::new());
    if !text.ends_with('\n') {
        return Err("the last line has no end".into());
    }
    for line in text.lines() {
        let wrong = |what: &str| Err(format!("{what}: {line:?}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let Some((name, _)) = rest.split_once(' ') else { return wrong("no help") };
            if !helped.insert(name.to_owned()) {
                return wrong("helped twice");
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = rest.split_once(' ') else { return wrong("no type") };
            let is_known = ["counter", "gauge"].contains(&kind) && helped.contains(name);
            if !is_known || families.insert(name.into(), (kind.into(), BTreeMap::new())).is_some() {
                return wrong("a type that cannot be");
            }
            current = name.to_owned();
        } else {
            let (name, labels, value) = sample(line)?;
            if name != current {
                return wrong("a sample outside of its family");
            }
            let family = families.get_mut(&name).expect("it is current");
            if family.1.insert(labels, value).is_some() {
                return wrong("a sample twice");
            }
        }
    }
    Ok(families)
}

fn sample(line: &str) -> Result<(String, String, f64), String> {
    let wrong = |what: &str| format!("{what}: {line:?}");
    let end = line.find(['{', ' ']).ok_or_else(|| wrong("no value"))?;
    let (name, mut rest) = line.split_at(end);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty()
        || !name.chars().all(is_name)
        || name.starts_with(|c: char| c.is_ascii_digit())
    {
        return Err(wrong("no name"));
    }
    let mut labels = Vec::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").ok_or_else(|| wrong("no label"))?;
            if label.is_empty() || !label.chars().all(is_name) {
                return Err(wrong("a label's name"));
            }
            let (mut value, mut chars) = (String::new(), after.char_indices());
            let end = loop {
                match chars.next().ok_or_else(|| wrong("a label without end"))? {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next() {
                        Some((_, c @ ('\\' | '"' | 'n'))) => value.push(c),
                        _ => return Err(wrong("an escape")),
                    },
                    (_, c) => value.push(c),
                }
            };
            labels.push(format!("{label}={value}"));
            rest = &after[end + 1..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let mut sorted = labels.clone();
    sorted.sort();
    sorted.dedup_by_key(|label| label.split('=').next().unwrap_or("").to_owned());
    let value = rest.strip_prefix(' ').and_then(|rest| rest.parse::<f64>().ok());
    match value {
        Some(value) if sorted.len() == labels.len() => Ok((name.into(), labels.join(","), value)),
        _ => Err(wrong("labels or value")),
    }
}

fn the_strict_parser_refuses_what_prometheus_would() {
    let good = "# HELP a x\n# TYPE a counter\na{b=\"c\\\"\"} 1\n";
    assert!(parse(good).is_ok());
    for bad in [
        "a 1\n",
        "# HELP a x\n# TYPE a counter\na 1",
        "# TYPE a counter\na 1\n",
        "# HELP a x\n# TYPE a counter\na 1\na 2\n",
        "# HELP a x\n# TYPE a counter\na{b=\"c} 1\n",
        "# HELP a x\n# TYPE a counter\na{b=\"c\",b=\"d\"} 1\n",
        "# HELP a x\n# TYPE a counter\na one\n",
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

/// A running job that serves metrics.
struct Scene {
    folder: tempfile::TempDir,
    job: Started,
    address: SocketAddr,
}

impl Scene {
    fn start(workers: usize) -> Self {
        let folder = folder();
        let parameters = format!("{} {}", text(&gate(&folder)), text(&output(&folder)));
        let job = Cli::new("counted", &parameters)
            .workers(workers)
            .env("XDG_RUNTIME_DIR", &text(folder.path()))
            .args(["--listen", "127.0.0.1:0", "--rate", "40000", "--report", "json"])
            .start();
        let address = wait_for("the job to say where its metrics are", || {
            let at = status(folder.path())?["metrics"].as_str()?.to_owned();
            let at = at.strip_prefix("http://")?.strip_suffix("/metrics")?.to_owned();
            at.parse().ok()
        });
        Self { folder, job, address }
    }

    fn scrape(&self) -> Samples {
        let (head, body) = get(self.address, "/metrics");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
        parse(&body).unwrap_or_else(|what| panic!("{what}\n{body}"))
    }

    /// Waits until all input is in the output, and gives the numbers then.
    fn settled(&self) -> Samples {
        wait_for("all records to be out", || {
            let samples = self.scrape();
            let is_out = sum(&samples, "operator_numRecordsOut", "") == TOTAL as f64
                && sum(&samples, "operator_numRecordsIn", "kind=sink") == TOTAL as f64;
            // What was read last may be out before its ring is given back.
            let [out, taken, between] =
                ["worker_numBytesOut", "worker_numBytesIn", "edge_backlogBytes"]
                    .map(|name| sum(&samples, name, ""));
            (is_out && out == taken + between && between < 1000.0).then_some(samples)
        })
    }

    /// Lets the job end, and gives its report.
    fn end(self) -> Value {
        std::fs::write(gate(&self.folder), "").expect("room for an empty file");
        let report = self.job.wait().report();
        let rows = common::sorted_parts(&output(&self.folder));
        let mut expected: Vec<String> = (0..TOTAL).map(|n| n.to_string()).collect();
        expected.sort_unstable();
        assert!(rows == expected, "{} rows instead of {TOTAL}, or others", rows.len());
        report
    }
}

fn gate(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("gate")
}

fn output(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("out")
}

fn status(place: &Path) -> Option<Value> {
    let (code, out, _) = said(&tool(place, &["status", "job", "--json"]));
    (code == 0).then(|| serde_json::from_str(&out).expect("JSON"))
}

/// One request, and the answer's head and body.
fn get(address: SocketAddr, target: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in UTF-8");
    let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
    (head.to_owned(), body.to_owned())
}

/// Sum of a family's samples whose labels contain a text.
fn sum(samples: &Samples, name: &str, label: &str) -> f64 {
    let family = samples.get(&format!("testudo_{name}"));
    let all = family.iter().flat_map(|(_, samples)| samples.iter());
    all.filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value).sum()
}

/// Counters of a later scrape are not below those of an earlier one.
fn assert_grown(before: &Samples, now: &Samples) {
    for (name, (kind, samples)) in before {
        for (labels, value) in samples.iter().filter(|_| kind == "counter") {
            let later = now[name].1.get(labels).copied();
            let later = later.unwrap_or_else(|| panic!("{name}{{{labels}}} is gone"));
            assert!(later >= *value, "{name}{{{labels}}} went from {value} back to {later}");
        }
    }
}

fn the_text_is_valid_and_its_numbers_are_those_of_the_report() {
    let scene = Scene::start(2);
    let mut before = scene.scrape();
    for kill in 0..4 {
        let worker = scene.job.workers(2)[kill % 2];
        let held = common::process::Held::child_of(worker, scene.job.pid()).expect("a worker");
        held.signal(libc::SIGKILL);
        let now = wait_for("the death to be counted", || {
            let now = scene.scrape();
            assert_grown(&before, &now);
            let deaths = sum(&now, "job_numRestartsByCause", "cause=SIGKILL");
            before = now.clone();
            (deaths == (kill + 1) as f64).then_some(now)
        });
        assert_eq!(sum(&now, "job_numRestarts", ""), (kill + 1) as f64);
    }
    let now = scene.settled();
    assert_grown(&before, &now);
    let expected = [
        ("operator_numRecordsOut", "kind=source", TOTAL),
        ("operator_numRecordsIn", "kind=sink", TOTAL),
        ("worker_numRecordsIn", "", TOTAL),
        ("worker_numRecordsOut", "", TOTAL),
        ("job_userCounter", "counter=odd \"numbers\"", TOTAL / 2),
        ("job_numRestarts", "", 4),
        ("operator_numRecordsDropped", "", 0),
        ("edge_numRecordsOut", "edge=hash-0", TOTAL),
        ("edge_numRecordsIn", "edge=hash-0", TOTAL),
        ("edge_numRecordsDropped", "", 0),
    ];
    for (name, label, value) in expected {
        assert_eq!(sum(&now, name, label), value as f64, "{name}");
    }
    // What has left one worker has reached the other, or lies between them: padding, at most.
    let [out, taken, between] =
        ["worker_numBytesOut", "worker_numBytesIn", "edge_backlogBytes"].map(|n| sum(&now, n, ""));
    assert!(out > 0.0 && out == taken + between && between < 1000.0, "{out} {taken} {between}");
    assert_eq!(sum(&now, "edge_numBytesOut", ""), out);
    let spent = ["busy", "idle", "backPressured", "waiting"]
        .map(|what| sum(&now, &format!("worker_{what}TimeMs"), "worker=0"));
    // As of later: it is taken before the times are.
    let uptime = sum(&scene.scrape(), "job_uptimeSeconds", "") * 1e3;
    assert!(spent[0] > 0.0 && spent[1] > 0.0, "{spent:?}");
    assert!(spent.iter().sum::<f64>() <= uptime, "{spent:?} of {uptime}");
    // The same numbers by the other way.
    let status = status(scene.folder.path()).expect("it runs");
    assert_eq!(status["figures"]["operators"][0]["operator"], "numbers");
    let odd = &status["figures"]["counters"];
    let odd: u64 = odd.as_array().expect("a list").iter().filter_map(|c| c["value"].as_u64()).sum();
    assert_eq!(odd, TOTAL / 2);
    assert_eq!(status["figures"]["restarts"]["SIGKILL"], 4);
    let report = scene.end();
    assert_eq!(report["records_in"], TOTAL);
    assert_eq!(report["records_out"], TOTAL);
    assert_eq!(report["counters"]["odd \"numbers\""], TOTAL / 2);
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(4));
}

fn hostile_clients_do_the_job_no_harm() {
    let scene = Scene::start(2);
    let connect = || TcpStream::connect(scene.address).expect("it listens");
    // Those who say nothing, and those who never come to an end.
    let silent: Vec<TcpStream> = (0..200).map(|_| connect()).collect();
    let mut slow = connect();
    let mut huge = connect();
    let flood = std::thread::spawn(move || {
        // It may be let go before it has said all of it.
        let line = [b'x'; 64 << 10];
        while huge.write_all(&line).is_ok() {}
    });
    for garbage in [&b"\0\0\0\n\n"[..], b"GET /metrics\r\n\r\n", b"\xFF\xFE\r\n\r\n"] {
        let mut stream = connect();
        stream.write_all(garbage).expect("it listens");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        assert!(answer.starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&answer));
    }
    for _ in 0..20 {
        let _ = slow.write_all(b"G");
        scene.scrape();
    }
    assert!(get(scene.address, "/other").0.starts_with("HTTP/1.1 404 "));
    let (head, body) = get(scene.address, "/healthz");
    assert!(head.starts_with("HTTP/1.1 200 ") && body.starts_with("ok\n"), "{head} {body}");
    // Readers that do not read.
    let unread: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = connect();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("it listens");
            stream
        })
        .collect();
    let threads = common::process::threads(scene.job.supervisor());
    assert_eq!(threads.iter().filter(|(_, name)| name == "testudo-metrics").count(), 1);
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", scene.job.supervisor()));
    let sockets = descriptors.expect("our own child").flatten().filter(|entry| {
        let link = std::fs::read_link(entry.path());
        link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    });
    assert!(sockets.count() < 40);
    scene.settled();
    drop((silent, unread, slow));
    flood.join().expect("it only writes");
    let report = scene.end();
    assert_eq!(report["records_out"], TOTAL);
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0));
}

fn metrics_stay_where_they_were_when_the_supervisor_dies() {
    let scene = Scene::start(2);
    for _ in 0..3 {
        let supervisor = scene.job.supervisor();
        let held = Held::child_of(supervisor, scene.job.pid()).expect("the supervisor");
        assert!(held.signal(libc::SIGKILL));
        // Nobody who asks meanwhile is refused: the next supervisor answers.
        let samples = scene.scrape();
        assert!(samples.contains_key("testudo_job_uptimeSeconds"), "{samples:?}");
        wait_for("another supervisor", || (scene.job.supervisor() != supervisor).then_some(()));
    }
    scene.settled();
    let report = scene.end();
    assert_eq!(report["records_out"], TOTAL);
}

fn a_port_that_is_taken_and_an_address_that_others_reach_are_refused() {
    let keep = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = keep.local_addr().expect("it has one").to_string();
    let folder = folder();
    let parameters = format!("{} {}", text(&gate(&folder)), text(&output(&folder)));
    let refused = |listen: &str| {
        let ended = Cli::new("counted", &parameters).workers(1).args(["--listen", listen]).run();
        assert_eq!(ended.code, Some(2), "{}", ended.err);
        assert!(ended.err.contains(&format!("--listen {listen}")), "{}", ended.err);
        ended.err
    };
    assert!(refused(&taken).contains("another program has that port"));
    assert!(refused("0.0.0.0:0").contains("--listen-openly"));
}
