//! Progress on a terminal: one line, rewritten. Nothing when standard error is no terminal.
//!
//! Called by the supervisor's loop.

use super::launch::Scene;
use super::report::{counter_sum, lowest_watermark};
use crate::config::Settings;
use crate::plan::{CounterKind, Plan};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Time between two lines.
const EVERY: Duration = Duration::from_millis(200);

pub(crate) struct Progress<'a> {
    plan: &'a Plan,
    scene: &'a Scene,
    is_shown: bool,
    last: Option<(Instant, u64)>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(plan: &'a Plan, settings: &Settings, scene: &'a Scene) -> Self {
        let is_shown = settings.progress && std::io::stderr().is_terminal();
        Self { plan, scene, is_shown, last: None }
    }

    /// Shows the line when it is time.
    pub(crate) fn show(&mut self, restarts: usize) {
        if !self.is_shown || self.last.is_some_and(|(at, _)| at.elapsed() < EVERY) {
            return;
        }
        let now = Instant::now();
        let records = counter_sum(self.plan, self.scene, "source", CounterKind::Out);
        let (at, before) = self.last.unwrap_or((now, records));
        let rate =
            (records - before.min(records)) as f64 / now.duration_since(at).as_secs_f64().max(1e-9);
        self.last = Some((now, records));
        let watermark = match lowest_watermark(self.plan, self.scene) {
            Some(millis) => format!("watermark {}", crate::time::utc(millis)),
            None => "no watermark".into(),
        };
        let line = format!("{records} records, {rate:.0}/s, {watermark}, {restarts} restarts");
        let mut err = std::io::stderr().lock();
        // Progress is a courtesy: a terminal that went away changes nothing.
        let _ = write!(err, "\r\x1b[K{line}").and_then(|()| err.flush());
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if self.last.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
