//! The main job: how every airline left New York's airports, hour by hour, from a year of flights
//! out of order.
//!
//!     cargo run --release --example flights
//!     cargo run --release --example flights -- --input FILE… --output OUT.csv --workers 4
//!
//! With `--output` it writes one row for each hour, airport and airline that has flights; without,
//! it prints the ten worst of these. Without `--input` it reads January 2013, which lies in the
//! program. Kill its workers while it runs (`pkill -9 testudo-w`): the rows stay the same.

use std::fs::File;
use std::os::unix::{fs::OpenOptionsExt, process::CommandExt};
use std::{path::PathBuf, process::Command, process::ExitCode};
use testudo::clap;
use testudo::prelude::*;
use testudo::serde::Deserialize;
use testudo::sink::file::Csv;
use testudo::time::{parse_utc, utc};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Within the files, time goes back by up to 22 hours: after that long an hour is complete.
const OUT_OF_ORDER: Duration = Duration::from_secs(22 * 3600);
const HOUR: Duration = Duration::from_secs(3600);
/// Longer than any input.
const AGES: Duration = Duration::from_secs(1000 * 365 * 86_400);

#[derive(clap::Args)]
struct Options {
    /// Files of flights, as examples/data/README.md describes them [default: January 2013]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    input: Vec<PathBuf>,
    /// File for all rows [default: the ten worst go to standard output]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// The cells of a line that matter here, as text.
#[derive(Deserialize)]
#[serde(crate = "testudo::serde")]
struct Line {
    time_hour: String,
    origin: String,
    carrier: String,
    dep_time: String,
    dep_delay: String,
}

/// Up to eight letters. Fixed sizes make plain records: workers hand each other slices of them.
type Code = [u8; 8];

#[testudo::record]
#[derive(Deserialize)]
#[serde(crate = "testudo::serde", try_from = "Line")]
struct Flight {
    hour: i64,
    origin: Code,
    carrier: Code,
    has_departed: u64,
    delay: i64,
}

/// What fails here is a bad line: it is refused and counted (and kept, with `--rejects FILE`).
impl TryFrom<Line> for Flight {
    type Error = String;

    fn try_from(line: Line) -> Result<Self, String> {
        let bad = |name: &str, value: &str| format!("{name} is {value:?}");
        let time = line.dep_time.parse::<u16>().ok();
        let delay = line.dep_delay.parse().ok();
        let (has_departed, delay) = match (line.dep_time.as_str(), time, delay) {
            ("NA", ..) => (0, 0),
            (_, Some(_), Some(delay)) => (1, delay),
            (text, None, _) => return Err(bad("dep_time", text)),
            _ => return Err(bad("dep_delay", &line.dep_delay)),
        };
        let hour = parse_utc(&line.time_hour).ok_or_else(|| bad("time_hour", &line.time_hour))?;
        let origin = code(&line.origin).ok_or_else(|| bad("origin", &line.origin))?;
        let carrier = code(&line.carrier).ok_or_else(|| bad("carrier", &line.carrier))?;
        Ok(Self { hour, origin, carrier, has_departed, delay })
    }
}

fn code(text: &str) -> Option<Code> {
    let mut code = Code::default();
    code.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    (!text.is_empty() && !text.contains('\0')).then_some(code)
}

fn text(code: &Code) -> &str {
    std::str::from_utf8(code).unwrap_or("?").trim_end_matches('\0')
}

/// The flights of an hour, airport and airline.
#[testudo::record]
#[derive(Default)]
struct Totals {
    departures: u64,
    cancelled: u64,
    delay_sum: i64,
    /// Meaningless without departures.
    delay_max: i64,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.delay_max = match (self.departures, other.departures) {
            (_, 0) => self.delay_max,
            (0, _) => other.delay_max,
            _ => self.delay_max.max(other.delay_max),
        };
        self.departures += other.departures;
        self.cancelled += other.cancelled;
        self.delay_sum += other.delay_sum;
    }
}

#[testudo::record]
#[derive(Default)]
struct Row {
    hour: i64,
    origin: Code,
    carrier: Code,
    totals: Totals,
}

/// The ten rows with the most minutes of delay, worst first.
#[testudo::record]
#[derive(Default)]
struct Worst {
    rows: [Row; 10],
}

impl Worst {
    fn add(&mut self, row: &Row) {
        // Ties fall the same way whoever merges what first.
        let rank = |row: &Row| (-row.totals.delay_sum, row.hour, row.origin, row.carrier);
        let at = self.rows.partition_point(|other| rank(other) < rank(row));
        if at < self.rows.len() {
            self.rows[at..].rotate_right(1);
            self.rows[at] = *row;
        }
    }

    fn table(&self) -> String {
        let mut table =
            "hour (UTC)            from  airline  departed  cancelled  delay  longest".to_string();
        for Row { hour, origin, carrier, totals: t } in
            self.rows.iter().filter(|row| row.totals.delay_sum > 0)
        {
            let (hour, origin, carrier) = (utc(*hour), text(origin), text(carrier));
            table += &format!(
                "\n{hour}  {origin:<4}  {carrier:<7}  {:>8}  {:>9}  {:>5}  {:>7}",
                t.departures, t.cancelled, t.delay_sum, t.delay_max
            );
        }
        table
    }
}

fn build(flow: &Flow, options: &Options) {
    let rows = flow
        .source("flights", FileSource::<Flight>::csv(&options.input))
        .event_time(OUT_OF_ORDER, |flight| flight.hour)
        .key_by(|flight| [flight.origin, flight.carrier])
        .window(tumbling(HOUR), |flight| flight.hour)
        .aggregate(
            Totals::default,
            |totals, flight| {
                let (departures, delay) = (flight.has_departed, flight.delay);
                totals.add(&Totals {
                    departures,
                    cancelled: 1 - departures,
                    delay_sum: delay,
                    delay_max: delay,
                });
            },
            Totals::add,
            |key, hour, totals| Row {
                hour: hour.start,
                origin: key[0],
                carrier: key[1],
                totals: *totals,
            },
        );
    match &options.output {
        Some(file) => {
            let csv = Csv(|row: &Row| {
                let max = (row.totals.departures > 0).then_some(row.totals.delay_max);
                let (origin, carrier) =
                    (text(&row.origin).to_string(), text(&row.carrier).to_string());
                let Totals { departures, cancelled, delay_sum, .. } = row.totals;
                (utc(row.hour), origin, carrier, departures, cancelled, delay_sum, max)
            });
            let header =
                "window_start,origin,carrier,departures,cancelled,dep_delay_sum,dep_delay_max";
            rows.sink("rows", FileSink::new(file, csv).header(header));
        }
        // One window over everything: each worker finds its ten worst, one merges these.
        None => rows
            .window_all(tumbling(AGES), |row| row.hour)
            .aggregate(
                Worst::default,
                Worst::add,
                |worst, other| other.rows.iter().for_each(|row| worst.add(row)),
                |_, worst| *worst,
            )
            .print(Worst::table),
    }
}

/// Becomes this program again with the bundled flights as its input: a file without a name on
/// standard input, which the workers open through this process and which is gone with it, however
/// that ends.
fn run_on_january(arguments: &[std::ffi::OsString]) -> std::io::Result<std::convert::Infallible> {
    let bundled = &include_bytes!("data/flights-2013-01.csv.gz")[..];
    let path = std::env::temp_dir().join(format!("testudo-flights-{}.csv", std::process::id()));
    let mut file =
        File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    std::io::copy(&mut flate2::read::GzDecoder::new(bundled), &mut file)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).arg("--input").arg(format!("/proc/{}/fd/0", std::process::id()));
    if arguments.is_empty() {
        command.args(["--workers", "2"]);
    }
    Err(command.stdin(file).exec())
}

fn main() -> ExitCode {
    testudo::init();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let is_told =
        |word: &str| arguments.iter().any(|argument| argument.to_string_lossy().starts_with(word));
    if ["--input", "--help", "-h"].into_iter().any(is_told) {
        return testudo::main(build);
    }
    let Err(error) = run_on_january(&arguments);
    eprintln!("flights: cannot unpack the bundled flights: {error}; give others with --input FILE");
    ExitCode::FAILURE
}
