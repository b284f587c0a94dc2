//! What a bench says: one line for each figure, for people or as JSON, and how a bench can fail.
//!
//! Invariants: a line names everything that its figure depends on, the regime included, so that
//! lines can be collected and compared later. Called by every bench and by `main`.

use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Write;

/// Parameters of a run, in the order in which they were added.
pub type Params = Map<String, Value>;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Always `testudo`.
    pub engine: &'static str,
    /// The bench.
    pub bench: String,
    /// What was measured.
    pub metric: String,
    /// The figure: a number, or text for a checksum.
    pub value: Value,
    /// Its unit.
    pub unit: &'static str,
    /// Round trip of a cache line between the two cores, before and after; nothing where only one
    /// core may be used.
    pub regime_rtt_ns: Option<[u64; 2]>,
    /// What the run depended on.
    pub params: Params,
}

/// The lines of one run of a bench: same parameters, same regime.
#[derive(Debug)]
pub struct Lines {
    bench: String,
    params: Params,
    regime: Option<[u64; 2]>,
    lines: Vec<Line>,
}

impl Lines {
    /// Lines of `bench`, run with `params` in `regime`.
    pub fn new(bench: &str, params: Params, regime: Option<[u64; 2]>) -> Self {
        Self { bench: bench.into(), params, regime, lines: Vec::new() }
    }

    /// Adds a figure.
    pub fn add(&mut self, metric: &str, value: impl Into<Value>, unit: &'static str) {
        self.lines.push(Line {
            engine: "testudo",
            bench: self.bench.clone(),
            metric: metric.into(),
            value: value.into(),
            unit,
            regime_rtt_ns: self.regime,
            params: self.params.clone(),
        });
    }

    /// All lines.
    pub fn finish(self) -> Vec<Line> {
        self.lines
    }
}

impl Line {
    /// The line as it is printed, without its end.
    pub fn text(&self, as_json: bool) -> String {
        if as_json {
            return serde_json::to_string(self).unwrap_or_default();
        }
        let value = match &self.value {
            Value::Number(number) if number.is_f64() => {
                format!("{:.3}", number.as_f64().unwrap_or(f64::NAN))
            }
            value => plain(value),
        };
        let mut text = format!("{} {}={value} {}", self.bench, self.metric, self.unit);
        for (name, value) in &self.params {
            let _ = write!(text, " {name}={}", plain(value));
        }
        if let Some([before, after]) = self.regime_rtt_ns {
            let _ = write!(text, " regime_rtt_ns={before}/{after}");
        }
        text
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

/// The value at a quantile of samples, the nearest rank; 0 when there are none.
pub fn quantile(sorted: &[u64], q: f64) -> u64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0)
}

/// The middle of some figures; 0 when there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Why there is no figure.
#[derive(Debug)]
pub enum Failure {
    /// The command cannot be carried out as given.
    Usage(String),
    /// Something failed on the way.
    Run(String),
    /// It ran, and what came out is wrong.
    Wrong(String),
}

impl Failure {
    /// The exit code: 2 for usage, 1 for a failed run, 3 for a wrong result.
    pub fn code(&self) -> u8 {
        match self {
            Self::Run(_) => 1,
            Self::Usage(_) => 2,
            Self::Wrong(_) => 3,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage(text) | Self::Run(text) => f.write_str(text),
            Self::Wrong(text) => write!(f, "WRONG RESULT: {text}"),
        }
    }
}

impl From<testudo::Error> for Failure {
    fn from(error: testudo::Error) -> Self {
        Self::Run(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Run(error.to_string())
    }
}

impl From<testudo_shm::fault::SetupError> for Failure {
    fn from(error: testudo_shm::fault::SetupError) -> Self {
        Self::Run(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_sample() {
        let samples: Vec<u64> = (1..=10).collect();
        assert_eq!(quantile(&samples, 0.5), 5);
        assert_eq!(quantile(&samples, 0.99), 10);
        assert_eq!(quantile(&samples, 1.0), 10);
        assert_eq!(quantile(&[7], 0.5), 7);
        assert_eq!(quantile(&[], 0.5), 0);
    }
}
