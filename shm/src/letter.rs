//! What supervisor and worker tell each other about records that are taken one by one (R17): the
//! supervisor's orders, and the letter in which a worker hands over a record that was put aside.
//!
//! Invariants: orders are written before the process that they are for is started, but for `taken`;
//! a letter's number is a cell of the worker's, so a letter exists exactly when the step that
//! passed over its record was committed; its other words are written before that, and stay until
//! the supervisor's `taken` says that it is written down. Readers trust no length (R23).
//!
//! Written and read by the worker's careful steps and by the supervisor.

use crate::marker::{Place, Spot};
use crate::primitive::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a record that a letter holds.
pub const LETTER_BYTES: usize = 256 << 10;

/// Bytes of the text that says where it came from.
pub const ORIGIN_BYTES: usize = 1024;

/// What the supervisor has ordered of one worker. In its own segment.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Orders {
    /// Number of the order to take single records; 0: none.
    careful: AtomicU64,
    place: [AtomicU64; 5],
    /// Number of the order to put a record aside; 0: none.
    convicted: AtomicU64,
    spot: [AtomicU64; 5],
    /// Letters that are written down.
    pub taken: AtomicU64,
    reserved: [AtomicU64; 3],
}

fn both(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn store(words: &[AtomicU64; 5], values: [u64; 5]) {
    for (word, value) in words.iter().zip(values) {
        word.store(value, Ordering::Relaxed);
    }
}

fn load(words: &[AtomicU64; 5]) -> [u64; 5] {
    [0, 1, 2, 3, 4].map(|index: usize| words[index].load(Ordering::Relaxed))
}

fn spot_words(spot: &Spot) -> [u64; 5] {
    let Spot { stage, input, at, inner, index } = *spot;
    [both(stage, input), at[0], at[1], u64::from(inner), index]
}

fn spot_of(words: [u64; 5]) -> Spot {
    let [outer, first, second, inner, index] = words;
    let (stage, input) = ((outer >> 32) as u32, outer as u32);
    Spot { stage, input, at: [first, second], inner: inner as u32, index }
}

impl Orders {
    /// Orders care up to the end of a place, or none.
    pub fn set_careful(&self, number: u64, place: Option<Place>) {
        if let Some(Place { stage, input, from, to }) = place {
            store(&self.place, [both(stage, input), from[0], from[1], to[0], to[1]]);
        }
        self.careful.store(if place.is_some() { number } else { 0 }, Ordering::Release);
    }

    /// Orders a record to be put aside, or none.
    pub fn set_convicted(&self, number: u64, spot: Option<Spot>) {
        if let Some(spot) = spot {
            store(&self.spot, spot_words(&spot));
        }
        self.convicted.store(if spot.is_some() { number } else { 0 }, Ordering::Release);
    }

    /// The order to take single records, with its number.
    #[must_use]
    pub fn careful(&self) -> Option<(u64, Place)> {
        let number = self.careful.load(Ordering::Acquire);
        let [outer, a, b, c, d] = load(&self.place);
        let (stage, input) = ((outer >> 32) as u32, outer as u32);
        (number > 0).then_some((number, Place { stage, input, from: [a, b], to: [c, d] }))
    }

    /// The record to be put aside.
    #[must_use]
    pub fn convicted(&self) -> Option<Spot> {
        let is_set = self.convicted.load(Ordering::Acquire) > 0;
        is_set.then(|| spot_of(load(&self.spot)))
    }
}

/// A record that was put aside. In the worker's segment.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Letter {
    /// Letters so far: a cell, changed through the worker's transaction.
    number: AtomicU64,
    spot: [AtomicU64; 5],
    /// The latest cut that the worker had taken part in: a checkpoint with a later one holds this.
    epoch: AtomicU64,
    bytes: AtomicU64,
    total: AtomicU64,
    origin: AtomicU64,
    reserved: [AtomicU64; 6],
    origin_text: [AtomicU32; ORIGIN_BYTES / 4],
    text: [AtomicU32; LETTER_BYTES / 4],
}

/// What a letter says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Which record.
    pub spot: Spot,
    /// See [`Letter::write`].
    pub epoch: u64,
    /// Where it came from.
    pub origin: String,
    /// Its bytes, or the first of them.
    pub bytes: Vec<u8>,
    /// How many there are.
    pub total: u64,
}

fn copy_in(place: &[AtomicU32], bytes: &[u8]) -> u64 {
    let bytes = &bytes[..bytes.len().min(place.len() * 4)];
    for (word, chunk) in place.iter().zip(bytes.chunks(4)) {
        let mut four = [0; 4];
        four[..chunk.len()].copy_from_slice(chunk);
        word.store(u32::from_le_bytes(four), Ordering::Relaxed);
    }
    bytes.len() as u64
}

fn copy_out(place: &[AtomicU32], bytes: u64) -> Vec<u8> {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(place.len() * 4);
    let words = place[..bytes.div_ceil(4)].iter();
    let mut out: Vec<u8> =
        words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    out.truncate(bytes);
    out
}

impl Letter {
    /// Letters that were handed over, the present one included.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// Writes all but the number, which is set through the transaction.
    pub fn write(&self, spot: &Spot, epoch: u64, origin: &str, bytes: &[u8]) {
        store(&self.spot, spot_words(spot));
        self.epoch.store(epoch, Ordering::Relaxed);
        self.origin.store(copy_in(&self.origin_text, origin.as_bytes()), Ordering::Relaxed);
        self.bytes.store(copy_in(&self.text, bytes), Ordering::Relaxed);
        self.total.store(bytes.len() as u64, Ordering::Release);
    }

    /// What it says.
    #[must_use]
    pub fn read(&self) -> Read {
        let origin = copy_out(&self.origin_text, self.origin.load(Ordering::Relaxed));
        Read {
            spot: spot_of(load(&self.spot)),
            epoch: self.epoch.load(Ordering::Relaxed),
            origin: String::from_utf8_lossy(&origin).into_owned(),
            bytes: copy_out(&self.text, self.bytes.load(Ordering::Relaxed)),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn orders_and_letters_are_read_as_they_were_written() {
        // SAFETY: all fields are integers, for which zeros are a value.
        let (orders, letter): (Box<Orders>, Box<Letter>) =
            unsafe { (Box::new(std::mem::zeroed()), Box::new(std::mem::zeroed())) };
        assert_eq!((orders.careful(), orders.convicted()), (None, None));
        let place = Place { stage: 1, input: 2, from: [3, 4], to: [5, 6] };
        let spot = Spot { stage: 1, input: 2, at: [3, 4], inner: 5, index: 6 };
        orders.set_careful(9, Some(place));
        orders.set_convicted(10, Some(spot));
        assert_eq!((orders.careful(), orders.convicted()), (Some((9, place)), Some(spot)));
        orders.set_careful(11, None);
        orders.set_convicted(11, None);
        assert_eq!((orders.careful(), orders.convicted()), (None, None));
        let long = vec![7; LETTER_BYTES + 9];
        letter.write(&spot, 3, "there", &long);
        let read = letter.read();
        assert_eq!((read.spot, read.epoch, read.origin.as_str()), (spot, 3, "there"));
        assert_eq!((read.bytes.len(), read.total), (LETTER_BYTES, long.len() as u64));
    }
}
