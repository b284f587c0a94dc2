//! The workloads w0 to w3: the same events, keys, windows and checksums as the programs that they
//! are compared with.
//!
//! Event number n of N: `r = splitmix64(n)`, auction `r % K`, bidder `(r >> 20) % 100,000`, price
//! `(r >> 40) % 10,000`, time n / 1000 milliseconds. Subtask s of p reads n = s, s + p, …
//!
//! Called by the benches, in the launching process and in the workers alike.

use std::hint::black_box;
use testudo::prelude::*;
use testudo::sink::file::Lines;

/// A bid, 32 bytes.
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

/// Keys of w0, w1 and the latency bench.
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
    bid_of(n, K)
}

/// The same where the number of keys is known at run time only.
#[inline(always)]
#[must_use]
pub fn bid_of(n: u64, keys: u64) -> Bid {
    let r = splitmix64(n);
    let auction = r % keys;
    Bid { auction, bidder: (r >> 20) % 100_000, price: (r >> 40) % 10_000, ts_ms: n / 1000 }
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

/// w1 with another number of keys.
pub fn w1_of(flow: &Flow, events: u64, keys: u64) {
    flow.source("bids", Generator::new(events, move |n| bid_of(n, keys)))
        .key_by(|bid| bid.auction)
        .aggregate(|| 0u64, |count, _| *count += 1, |_, count| *count)
        .for_each(|count| {
            black_box(count);
        });
}

/// A row of w2: the most bids that one auction had in a window.
#[testudo::record]
pub struct MostBids {
    /// End of the window, milliseconds.
    pub window_end: u64,
    /// Bids of the auction with the most.
    pub count: u64,
}

impl MostBids {
    fn hash(window_end: u64, count: u64) -> u64 {
        splitmix64(window_end.wrapping_mul(31).wrapping_add(count))
    }
}

/// w2: a sliding count of 10 s every 2 s by auction, and of each window the largest; rows to the
/// file `rows`.
pub fn w2(flow: &Flow, events: u64, rows: &str) {
    let window = sliding(Duration::from_secs(10), Duration::from_secs(2));
    flow.source("bids", Generator::new(events, bid::<K2>))
        .event_time(Duration::ZERO, |bid| bid.ts_ms.cast_signed())
        .key_by(|bid| bid.auction)
        .window(window, |bid| bid.ts_ms.cast_signed())
        .aggregate(
            || 0u64,
            |count, _| *count += 1,
            |count, other| *count += *other,
            |_, window, count| MostBids { window_end: window.end.cast_unsigned(), count: *count },
        )
        // A window's rows belong to its last slide: one tumbling window for each sliding one.
        .window_all(tumbling(Duration::from_secs(2)), |row| row.window_end.cast_signed() - 1)
        .aggregate(
            || 0u64,
            |most, row| *most = (*most).max(row.count),
            |most, other| *most = (*most).max(*other),
            |window, most| MostBids { window_end: window.end.cast_unsigned(), count: *most },
        )
        .sink(
            "rows",
            FileSink::new(
                rows,
                Lines(|row: &MostBids| format!("{} {}", row.window_end, row.count)),
            ),
        );
}

/// The best bid of a window: the highest price; of equal ones the lowest bidder, then the lowest
/// auction.
#[testudo::record]
pub struct Best {
    /// The price.
    pub price: u64,
    /// The bidder.
    pub bidder: u64,
    /// The auction.
    pub auction: u64,
}

impl Best {
    const NONE: Self = Self { price: 0, bidder: u64::MAX, auction: u64::MAX };

    #[inline(always)]
    fn take(&mut self, other: Self) {
        let order = other.price.cmp(&self.price).then(self.bidder.cmp(&other.bidder));
        if order.then(self.auction.cmp(&other.auction)).is_gt() {
            *self = other;
        }
    }
}

/// A row of w3.
#[testudo::record]
pub struct BestBid {
    /// End of the window, milliseconds.
    pub window_end: u64,
    /// The best bid in it.
    pub best: Best,
}

/// w3: the best bid of every 10 s, each worker's own first and then of all; rows to the file
/// `rows`.
pub fn w3(flow: &Flow, events: u64, rows: &str) {
    let text = |row: &BestBid| {
        let Best { price, bidder, auction } = row.best;
        format!("{} {price} {bidder} {auction}", row.window_end)
    };
    flow.source("bids", Generator::new(events, bid::<K2>))
        .event_time(Duration::ZERO, |bid| bid.ts_ms.cast_signed())
        .window_all(tumbling(Duration::from_secs(10)), |bid| bid.ts_ms.cast_signed())
        .aggregate(
            || Best::NONE,
            |best, bid| {
                best.take(Best { price: bid.price, bidder: bid.bidder, auction: bid.auction });
            },
            |best, other| best.take(*other),
            |window, best| BestBid { window_end: window.end.cast_unsigned(), best: *best },
        )
        .sink("rows", FileSink::new(rows, Lines(text)));
}

/// Checksum of the rows that w2 or w3 wrote: the wrapping sum of a hash of each row, whatever their
/// order.
///
/// # Errors
/// A row that is none, as text.
pub fn checksum(workload: &str, rows: &str) -> Result<u64, String> {
    let mut sum = 0u64;
    for row in rows.lines() {
        let numbers: Result<Vec<u64>, _> = row.split(' ').map(str::parse).collect();
        let hash = match (workload, numbers.as_deref()) {
            ("w2", Ok(&[end, count])) => MostBids::hash(end, count),
            ("w3", Ok(&[end, price, bidder, auction])) => splitmix64(
                end.wrapping_mul(31)
                    .wrapping_add(price.wrapping_mul(7))
                    .wrapping_add(bidder.wrapping_mul(3))
                    .wrapping_add(auction),
            ),
            _ => return Err(format!("{workload} wrote the row {row:?}")),
        };
        sum = sum.wrapping_add(hash);
    }
    Ok(sum)
}

/// Number of rows, and their checksum.
type Sum = (usize, u64);

/// The published checksums: events, w2's sum, w3's sum.
const KNOWN: [(u64, Sum, Sum); 5] = [
    (1_000_000, (5, 0x6f0a_aa11_73dd_a2d1), (1, 0xb47b_5c34_1cd4_8d4e)),
    (10_000_000, (9, 0xc508_82d4_5ac6_e234), (1, 0xf5e5_9481_4d19_561e)),
    (20_000_000, (14, 0xe0c5_a5ca_d426_8a3d), (2, 0x7c82_4a38_2070_478e)),
    (50_000_000, (29, 0x82d6_b7f7_d7f0_b140), (5, 0x04c5_f41e_d885_acf4)),
    (100_000_000, (54, 0x6df4_cadb_92a0_419c), (10, 0x26e7_ed92_7e7b_4ecc)),
];

/// Rows and checksum that a workload must give for so many events, where they are published.
pub fn known(workload: &str, events: u64) -> Option<Sum> {
    let (_, w2, w3) = KNOWN.iter().find(|(of, ..)| *of == events)?;
    match workload {
        "w2" => Some(*w2),
        "w3" => Some(*w3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        assert_eq!(splitmix64(0), 0xE220_A839_7B1D_CDAF);
        let first = bid::<K1>(0);
        let r = splitmix64(0);
        assert_eq!(first.auction, r % 1_000_000);
        assert_eq!(first.bidder, (r >> 20) % 100_000);
        assert_eq!(first.price, (r >> 40) % 10_000);
        assert_eq!(bid::<K1>(5_999).ts_ms, 5);
    }

    #[test]
    fn a_checksum_does_not_depend_on_the_order_of_rows() {
        assert_eq!(checksum("w2", "2000 7\n4000 9\n"), checksum("w2", "4000 9\n2000 7\n"));
        assert_ne!(checksum("w2", "2000 7\n"), checksum("w2", "2000 8\n"));
        assert!(checksum("w3", "2000 7\n").is_err());
    }

    /// One window of w3, straight from its definition.
    #[test]
    fn the_best_bid_of_a_million_events_is_the_published_one() {
        let mut best = Best::NONE;
        for n in 0..1_000_000 {
            let bid = bid::<K2>(n);
            best.take(Best { price: bid.price, bidder: bid.bidder, auction: bid.auction });
        }
        let row = format!("10000 {} {} {}\n", best.price, best.bidder, best.auction);
        assert_eq!(checksum("w3", &row).ok(), known("w3", 1_000_000).map(|(_, sum)| sum));
    }
}
