//! Absent producers: in partial completeness a worker that is dead for a while holds nobody's
//! windows up. Its channels count as idle until it is back; watermarks never go back, so what it
//! brings then is late where a window has fired, and is counted as such.
//!
//! Death is read in the producer's own header (R1): this works without a supervisor too. What is
//! known here is private: a successor of this worker finds it out again.
//!
//! Called by the inlet.

use testudo_shm::death;
use testudo_shm::header::{WorkerHeader, WorkerState};
use testudo_shm::primitive::Ordering;

/// Whether a worker is down: dead, or a successor of the dead one is still attaching.
pub(crate) fn is_down(header: &WorkerHeader) -> bool {
    death::is_dead(&header.death[0].word) || {
        let state = WorkerState::of(header.state.load(Ordering::Acquire));
        state == WorkerState::Attaching && header.incarnation.load(Ordering::Relaxed) > 1
    }
}

/// A producer in another worker.
#[derive(Debug)]
struct Watched {
    channel: usize,
    header: &'static WorkerHeader,
    /// When it was first seen down; 0 while it is up.
    since_ns: u64,
}

/// The producers of an inlet, as far as they may be absent.
#[derive(Debug, Default)]
pub(crate) struct Absent {
    after_ns: u64,
    watched: Vec<Watched>,
    /// By channel.
    away: Vec<bool>,
}

impl Absent {
    /// Watches these producers, each with its channel of so many.
    pub(crate) fn new(
        after: std::time::Duration,
        channels: usize,
        producers: impl IntoIterator<Item = (usize, &'static WorkerHeader)>,
    ) -> Self {
        let watched = producers.into_iter();
        let watched = watched.map(|(channel, header)| Watched { channel, header, since_ns: 0 });
        Self {
            after_ns: after.as_nanos() as u64,
            watched: watched.collect(),
            away: vec![false; channels],
        }
    }

    /// Whether anybody is watched: nobody is in full completeness.
    #[inline(always)]
    pub(crate) fn is_watching(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Looks at all of them. True when one that has left nothing in its ring (`is_empty`, by
    /// channel) has just been away for long enough.
    pub(crate) fn look(&mut self, now_ns: u64, is_empty: impl Fn(usize) -> bool) -> bool {
        let mut any = false;
        for watched in &mut self.watched {
            let is_away = &mut self.away[watched.channel];
            if !is_down(watched.header) {
                (watched.since_ns, *is_away) = (0, false);
                continue;
            }
            if watched.since_ns == 0 {
                watched.since_ns = now_ns.max(1);
            }
            let is_long = now_ns.saturating_sub(watched.since_ns) >= self.after_ns;
            if !*is_away && is_long && is_empty(watched.channel) {
                (*is_away, any) = (true, true);
            }
        }
        any
    }

    /// Whether a channel holds nothing up.
    #[inline]
    pub(crate) fn is_away(&self, channel: usize) -> bool {
        self.away.get(channel) == Some(&true)
    }

    /// Whether any does.
    pub(crate) fn any_away(&self) -> bool {
        self.away.contains(&true)
    }

    /// When one that is down will have been for long enough.
    pub(crate) fn wake_ns(&self) -> Option<u64> {
        let down = self.watched.iter().filter(|w| w.since_ns > 0 && !self.away[w.channel]);
        down.map(|watched| watched.since_ns + self.after_ns).min()
    }
}
