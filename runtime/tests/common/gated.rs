//! A source that ends when it is told to: numbers up to a bound, then nothing until a file appears.

use std::path::PathBuf;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};

/// See the module.
pub struct Gated {
    pub total: u64,
    /// The job's input ends once this file is there.
    pub gate: PathBuf,
}

pub struct GatedReader {
    total: u64,
    step: u64,
    gate: PathBuf,
}

impl Source for Gated {
    type Out = u64;
    type Position = u64;
    type Reader = GatedReader;

    fn start(&self, subtask: Subtask) -> u64 {
        subtask.index as u64
    }

    fn open(&self, subtask: Subtask, _from: &u64) -> Result<GatedReader, String> {
        let (step, gate) = (subtask.count as u64, self.gate.clone());
        Ok(GatedReader { total: self.total, step, gate })
    }
}

impl Reader<u64, u64> for GatedReader {
    fn read(
        &mut self,
        at: &mut u64,
        max: usize,
        out: &mut impl Collect<u64>,
    ) -> Result<Progress, String> {
        for _ in 0..max {
            if *at >= self.total {
                if self.gate.exists() {
                    return Ok(Progress::End);
                }
                return Ok(Progress::Idle { until_ns: testudo::time::now_ns() + 5_000_000 });
            }
            out.emit(*at);
            *at += self.step;
        }
        Ok(Progress::More)
    }
}
