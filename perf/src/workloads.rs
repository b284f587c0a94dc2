//! The workloads w0 to w3: the same events, keys and windows as the rivals' programs, with their checksums.
//!
//! Called by the benches, in the launching process and in the workers alike.

use std::hint::black_box;
use testudo::prelude::*;

/// A bid of the Nexmark kind, 32 bytes.
#[testudo::record]
pub struct Bid {
    /// What is bid on: the key.
    pub auction: u64,
    /// Who bids.
    pub bidder: u64,
    /// How much.
    pub price: u64,
    /// Event time, milliseconds.
    pub ts_ms: u64,
}

/// Keys of w0 and w1.
pub const K1: u64 = 1_000_000;

/// Keys of w2 and w3.
pub const K2: u64 = 10_000;

/// The generator's random function.
#[inline(always)]
#[must_use]
pub fn splitmix64(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Event number `n` among `K` keys.
#[inline(always)]
#[must_use]
pub fn bid<const K: u64>(n: u64) -> Bid {
    let r = splitmix64(n);
    Bid { auction: r % K, bidder: (r >> 20) % 100_000, price: (r >> 40) % 10_000, ts_ms: n / 1000 }
}

/// w0: map, exchange, black box; no state.
pub fn w0(flow: &Flow, events: u64) {
    flow.source("bids", Generator::new(events, bid::<K1>))
        .map(|bid| Bid { price: bid.price * 908 / 1000, ..*bid })
        .key_by(|bid| bid.auction)
        .for_each(|bid| {
            black_box(bid);
        });
}

/// w1: a running count by key, every new count to a black box.
pub fn w1(flow: &Flow, events: u64) {
    flow.source("bids", Generator::new(events, bid::<K1>))
        .key_by(|bid| bid.auction)
        .aggregate(|| 0u64, |count, _| *count += 1, |_, count| *count)
        .for_each(|count| {
            black_box(count);
        });
}
