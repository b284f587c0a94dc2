//! Event time: windows that follow the time in the records, not the clock on the wall.
//!
//!     cargo run --release --example event_time
//!
//! Two thermometers report every second, but reports arrive up to four seconds late and out of
//! order. The watermark (the latest time seen, less that bound) tells the windows when nothing
//! earlier can follow; then they fire, once and complete. Run it with any number of `--workers`:
//! the lines are the same, in another order.

use testudo::prelude::*;
use testudo::time::utc;

const BOUND: Duration = Duration::from_secs(4);
/// Some midnight; times are in milliseconds since 1970.
const BEGIN: i64 = 1_735_689_600_000;

#[testudo::record]
struct Reading {
    at: i64,
    sensor: u64,
    tenths: i64,
}

/// Reading number n: two sensors in turn. Of every five seconds the last comes first.
fn reading(n: u64) -> Reading {
    let second = (n / 2 / 5 * 5 + 4 - n / 2 % 5) as i64;
    let swing = (second % 20 - 10).abs();
    Reading {
        at: BEGIN + second * 1000,
        sensor: n % 2,
        tenths: 200 + 3 * swing + 10 * (n % 2) as i64,
    }
}

/// What a window gathers. Slices of sliding windows are merged, so both parts must add up.
#[testudo::record]
#[derive(Default)]
struct Sum {
    readings: i64,
    tenths: i64,
}

impl Sum {
    fn add(&mut self, reading: &Reading) {
        *self = Self { readings: self.readings + 1, tenths: self.tenths + reading.tenths };
    }

    fn merge(&mut self, other: &Self) {
        *self =
            Self { readings: self.readings + other.readings, tenths: self.tenths + other.tenths };
    }

    fn line(&self, what: &str, sensor: u64, window: Bounds) -> String {
        let mean = self.tenths as f64 / self.readings as f64 / 10.0;
        let (from, to) = (utc(window.start), utc(window.end));
        format!(
            "{what} {}..{} sensor {sensor}: {mean:.1} °C of {}",
            &from[11..19],
            &to[11..19],
            self.readings
        )
    }
}

fn build(flow: &Flow, _options: &NoOptions) {
    let readings =
        flow.source("readings", Generator::new(120, reading)).event_time(BOUND, |r| r.at);
    let (readings, again) = readings.fork();

    // Tumbling: one window behind the other; every reading is in exactly one.
    readings
        .key_by(|reading| reading.sensor)
        .window(tumbling(Duration::from_secs(20)), |reading| reading.at)
        .aggregate(Sum::default, Sum::add, Sum::merge, |sensor, window, sum| {
            sum.line("tumbling", *sensor, window)
        })
        .print(|line| line.to_string());

    // Sliding: a window of 20 s begins every 10 s; every reading is in two. State is kept once, by
    // slices of 10 s.
    again
        .key_by(|reading| reading.sensor)
        .window(sliding(Duration::from_secs(20), Duration::from_secs(10)), |reading| reading.at)
        .aggregate(Sum::default, Sum::add, Sum::merge, |sensor, window, sum| {
            sum.line("sliding ", *sensor, window)
        })
        .print(|line| line.to_string());
}

fn main() -> std::process::ExitCode {
    testudo::main(build)
}
