//! What a worker is doing, in plain words of its own segment: in which stage, with what of which
//! input. Whoever looks after its death knows where it was, and whoever looks while it lives sees
//! whether it gets on.
//!
//! Invariants: one thread writes, with plain stores (a handful for each batch); a reader takes what
//! is there and trusts none of it: numbers are checked where they are used, text is made valid
//! (R23). What is exact about a single record is written only while a worker takes one record a
//! transaction (R17).
//!
//! Written by the step loop and by the heads of stages; read by the supervisor.

use crate::primitive::{AtomicU32, AtomicU64, Ordering};

/// Bytes of the first part of a record, or of what leads to it, that a marker shows.
pub const SHOWN: usize = 960;

/// What the stage in question was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Nothing of the user's runs.
    Engine = 0,
    /// A batch of an input, and what follows from it.
    Batch = 1,
    /// A single record, with nothing else in the transaction.
    Record = 2,
    /// The batch is over: operators finish what they began with it.
    Closing = 3,
    /// Windows and timers fire, or go on with it.
    Firing = 4,
    /// A source's reader makes records or looks for some.
    Reading = 5,
    /// As `Reading`, one record alone.
    ReadingOne = 6,
    /// Outputs are written before the commit.
    Saving = 7,
}

impl Phase {
    /// The phase behind a word; an unknown one reads as `Engine`.
    #[must_use]
    pub fn of(word: u32) -> Self {
        match word {
            1 => Self::Batch,
            2 => Self::Record,
            3 => Self::Closing,
            4 => Self::Firing,
            5 => Self::Reading,
            6 => Self::ReadingOne,
            7 => Self::Saving,
            _ => Self::Engine,
        }
    }
}

/// The input number of the source that a stage begins with; its part is added.
pub const SOURCE: u32 = 1 << 31;

/// A part of an input: positions from `from` to before `to`. Those of a ring are the frame's place
/// and a record's number in it, those of a source the number of its record in this subtask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// The stage that takes the input.
    pub stage: u32,
    /// The ring, by its number among the worker's input rings; or [`SOURCE`] and the part.
    pub input: u32,
    /// The first position.
    pub from: [u64; 2],
    /// The first position behind it.
    pub to: [u64; 2],
}

impl Place {
    /// What two places of one input have in common.
    #[must_use]
    pub fn overlap(&self, other: &Self) -> Option<Self> {
        let (from, to) = (self.from.max(other.from), self.to.min(other.to));
        let is_same = (self.stage, self.input) == (other.stage, other.input);
        (is_same && from < to).then_some(Self { from, to, ..*self })
    }
}

/// One record: that of an input, or one that followed from it and was handed on within the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spot {
    /// The stage that takes the input.
    pub stage: u32,
    /// The input, as in [`Place`].
    pub input: u32,
    /// The input's position.
    pub at: [u64; 2],
    /// The stage that it was handed on to, from 1; 0 for the record of the input itself.
    pub inner: u32,
    /// Which of the records that were handed on there in this transaction.
    pub index: u64,
}

/// The words.
#[derive(Debug)]
#[repr(C)]
pub struct Marker {
    /// A [`Phase`] in the upper half, the stage in the lower.
    doing: AtomicU64,
    /// Not zero while the engine waits for a disk or for room on one: that is no hang.
    pub waiting: AtomicU64,
    /// Stage and input of the batch that all of this began with.
    outer: AtomicU64,
    from: [AtomicU64; 2],
    to: [AtomicU64; 2],
    inner: AtomicU64,
    index: AtomicU64,
    /// The last place that was passed with care: the number of the order.
    pub passed: AtomicU64,
    origin: AtomicU64,
    shown: AtomicU64,
    reserved: [AtomicU64; 4],
    text: [AtomicU32; SHOWN / 4],
}

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Marker>() == 128 + SHOWN);

/// What a marker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// What was being done.
    pub phase: Phase,
    /// The stage whose code ran.
    pub stage: u32,
    /// The part of the input that it began with.
    pub place: Place,
    /// The record, where there was one alone.
    pub spot: Spot,
    /// Where it came from, in its source's words.
    pub origin: String,
    /// The first bytes of it.
    pub shown: Vec<u8>,
}

impl Marker {
    /// A stage begins to do something.
    #[inline(always)]
    pub fn set(&self, phase: Phase, stage: u32) {
        self.doing.store((phase as u64) << 32 | u64::from(stage), Ordering::Relaxed);
    }

    /// Nothing of the user's runs any more.
    #[inline(always)]
    pub fn clear(&self) {
        self.doing.store(0, Ordering::Relaxed);
    }

    /// What was set, to be put back by [`Marker::restore`].
    #[inline(always)]
    #[must_use]
    pub fn saved(&self) -> u64 {
        self.doing.load(Ordering::Relaxed)
    }

    /// The same is done in another stage.
    #[inline(always)]
    pub fn within(&self, stage: u32) {
        let phase = self.saved() & !u64::from(u32::MAX);
        self.restore(phase | u64::from(stage));
    }

    /// Puts back what was set before.
    #[inline(always)]
    pub fn restore(&self, saved: u64) {
        self.doing.store(saved, Ordering::Relaxed);
    }

    /// A part of an input is taken.
    #[inline(always)]
    pub fn enter(&self, phase: Phase, place: &Place) {
        let outer = u64::from(place.stage) << 32 | u64::from(place.input);
        self.outer.store(outer, Ordering::Relaxed);
        for (word, value) in self.from.iter().zip(place.from) {
            word.store(value, Ordering::Relaxed);
        }
        for (word, value) in self.to.iter().zip(place.to) {
            word.store(value, Ordering::Relaxed);
        }
        self.set(phase, place.stage);
    }

    /// A record alone: which it is, where it came from, and how it begins. Its input was said by
    /// [`Marker::enter`].
    pub fn alone(&self, inner: u32, index: u64, origin: &str, bytes: &[u8]) {
        self.inner.store(u64::from(inner), Ordering::Relaxed);
        self.index.store(index, Ordering::Relaxed);
        let origin = &origin.as_bytes()[..origin.len().min(SHOWN / 2)];
        let mut all = origin.iter().chain(bytes).copied();
        let mut count = 0;
        for word in &self.text {
            let (mut four, before) = ([0; 4], count);
            for (place, byte) in four.iter_mut().zip(&mut all) {
                (*place, count) = (byte, count + 1);
            }
            if count == before {
                break;
            }
            word.store(u32::from_le_bytes(four), Ordering::Relaxed);
        }
        self.origin.store(origin.len() as u64, Ordering::Relaxed);
        self.shown.store(count, Ordering::Relaxed);
    }

    /// Where the part of an input begins that is taken.
    #[must_use]
    pub fn from(&self) -> [u64; 2] {
        [self.from[0].load(Ordering::Relaxed), self.from[1].load(Ordering::Relaxed)]
    }

    /// What it says now.
    #[must_use]
    pub fn read(&self) -> Seen {
        let doing = self.doing.load(Ordering::Acquire);
        let outer = self.outer.load(Ordering::Relaxed);
        let pair = |words: &[AtomicU64; 2]| {
            [words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)]
        };
        let (stage, input) = ((outer >> 32) as u32, outer as u32);
        let place = Place { stage, input, from: pair(&self.from), to: pair(&self.to) };
        let inner = self.inner.load(Ordering::Relaxed) as u32;
        let index = self.index.load(Ordering::Relaxed);
        let shown = (self.shown.load(Ordering::Relaxed) as usize).min(SHOWN);
        let words = self.text.iter().map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        let mut bytes: Vec<u8> = words.take(shown.div_ceil(4)).flatten().collect();
        bytes.truncate(shown);
        let origin = (self.origin.load(Ordering::Relaxed) as usize).min(bytes.len());
        let shown = bytes.split_off(origin);
        Seen {
            phase: Phase::of((doing >> 32) as u32),
            stage: doing as u32,
            place,
            spot: Spot { stage, input, at: place.from, inner, index },
            origin: String::from_utf8_lossy(&bytes).into_owned(),
            shown,
        }
    }

    /// Forgets what a predecessor said.
    pub fn begin(&self) {
        self.clear();
        self.waiting.store(0, Ordering::Relaxed);
        self.inner.store(0, Ordering::Relaxed);
        self.index.store(0, Ordering::Relaxed);
        self.origin.store(0, Ordering::Relaxed);
        self.shown.store(0, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_overlap_only_in_one_input() {
        let place = |input, from, to| Place { stage: 1, input, from: [from, 0], to: [to, 0] };
        let common = place(0, 5, 9).overlap(&place(0, 7, 20));
        assert_eq!(common, Some(place(0, 7, 9)));
        assert_eq!(place(0, 5, 9).overlap(&place(1, 7, 20)), None, "another input");
        assert_eq!(place(0, 5, 9).overlap(&place(0, 9, 20)), None, "right behind it");
    }

    #[test]
    fn what_is_marked_is_read() {
        // SAFETY: all fields are integers, for which zeros are a value.
        let marker: Box<Marker> = unsafe { Box::new(std::mem::zeroed()) };
        let place = Place { stage: 3, input: SOURCE, from: [7, 0], to: [8, 0] };
        marker.enter(Phase::Record, &place);
        marker.alone(0, 4, "there", b"hello");
        let seen = marker.read();
        assert_eq!((seen.phase, seen.stage, seen.place), (Phase::Record, 3, place));
        assert_eq!((seen.spot.at, seen.spot.index), ([7, 0], 4));
        assert_eq!((seen.origin.as_str(), seen.shown.as_slice()), ("there", &b"hello"[..]));
        marker.alone(0, 4, "", &[7; 2 * SHOWN]);
        assert_eq!(marker.read().shown, [7; SHOWN]);
        marker.begin();
        assert_eq!(marker.read().phase, Phase::Engine);
    }
}
