//! A source of one's own: a metronome, whose beats come at their time and go on where they were
//! after a crash.
//!
//!     cargo run --release --example custom_source -- --beats 20 --every-ms 50
//!
//! A source says where it begins, and opens a reader at a position. The reader emits records and
//! moves the position; the engine stores it in the same transaction as everything that the records
//! led to. That is all there is to a source that is exact across crashes: what the position does
//! not hold does not exist.

use testudo::clap;
use testudo::prelude::*;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::time::now_ns;

#[derive(clap::Args)]
struct Options {
    /// Beats of each metronome
    #[arg(long, default_value_t = 20)]
    beats: u64,
    /// Milliseconds between two beats
    #[arg(long, default_value_t = 50)]
    every_ms: u64,
}

#[testudo::record]
struct Beat {
    metronome: u64,
    number: u64,
    /// Nanoseconds from when it was due until it was read.
    delay_ns: u64,
}

/// The source as every process describes it: nothing is open yet.
struct Metronome {
    beats: u64,
    every_ns: u64,
}

/// Number of the next beat, and when it is due; 0 before the first. Any plain value can be a
/// position.
type Position = [u64; 2];

impl Source for Metronome {
    type Out = Beat;
    type Position = Position;
    type Reader = MetronomeReader;

    fn start(&self, _subtask: Subtask) -> Position {
        [0, 0]
    }

    /// Called in the worker that runs the subtask: once, and again in each successor, with its
    /// position then.
    fn open(&self, subtask: Subtask, from: &Position) -> Result<MetronomeReader, String> {
        if self.every_ns == 0 {
            return Err("a metronome needs some time between beats: --every-ms 1 or more".into());
        }
        if from[0] > 0 {
            eprintln!("metronome {} goes on with beat {}", subtask.index, from[0]);
        }
        Ok(MetronomeReader {
            metronome: subtask.index as u64,
            beats: self.beats,
            every_ns: self.every_ns,
        })
    }
}

struct MetronomeReader {
    metronome: u64,
    beats: u64,
    every_ns: u64,
}

impl Reader<Beat, Position> for MetronomeReader {
    /// Emits what is due, at most `max` records. Never waits itself: it says when to look again.
    fn read(
        &mut self,
        position: &mut Position,
        max: usize,
        out: &mut impl Collect<Beat>,
    ) -> Result<Progress, String> {
        let now = now_ns();
        for _ in 0..max {
            let [number, due] = *position;
            if number == self.beats {
                return Ok(Progress::End);
            }
            let due = if due == 0 { now } else { due };
            if due > now {
                return Ok(Progress::Idle { until_ns: due });
            }
            out.emit(Beat { metronome: self.metronome, number, delay_ns: now - due });
            *position = [number + 1, due + self.every_ns];
        }
        Ok(Progress::More)
    }
}

fn build(flow: &Flow, options: &Options) {
    let metronome = Metronome { beats: options.beats, every_ns: options.every_ms * 1_000_000 };
    flow.source("metronome", metronome).print(|beat| {
        let late = beat.delay_ns / 1000;
        let (metronome, beat) = (beat.metronome, beat.number);
        format!("metronome {metronome}, beat {beat}, read {late} µs after its time")
    });
}

fn main() -> std::process::ExitCode {
    testudo::main(build)
}
