//! Late data: what happens to records that come after their window has fired.
//!
//!     cargo run --release --example late_data
//!
//! Orders carry the minute in which they were made and arrive in order, but for one in ten
//! thousand: that one was stuck in a till without a network for an hour. A bound of an hour would
//! make every result wait for it. Here the windows wait a minute, and the late orders leave by a
//! second stream, where they can be looked at or added elsewhere. Nothing is lost in silence: every
//! order is in a window or on the side.

use testudo::prelude::*;
use testudo::time::utc;

const ORDERS: u64 = 200_000;
const MINUTE: i64 = 60_000;
const BEGIN: i64 = 1_735_689_600_000;

#[testudo::record]
struct Order {
    at: i64,
    shop: u64,
    cents: u64,
}

/// A shop's hour.
#[testudo::record]
#[derive(Default)]
struct Hour {
    start: i64,
    shop: u64,
    orders: u64,
    cents: u64,
}

impl Hour {
    fn add(&mut self, order: &Order) {
        self.orders += 1;
        self.cents += order.cents;
    }

    fn merge(&mut self, other: &Self) {
        self.orders += other.orders;
        self.cents += other.cents;
    }
}

/// Order number n: a thousand in a minute; one in ten thousand an hour late.
fn order(n: u64) -> Order {
    let is_stuck = n % 10_000 == 9_999 && n > 60_000;
    let minute = (n / 1000) as i64 - if is_stuck { 60 } else { 0 };
    Order { at: BEGIN + minute * MINUTE, shop: n % 3, cents: 250 + n % 1000 }
}

fn build(flow: &Flow, _options: &NoOptions) {
    let orders = flow.counter("orders in windows");
    let stuck = flow.counter("orders on the side");
    let (hours, late) = flow
        .source("orders", Generator::new(ORDERS, order))
        // One reader: with several, each is as late as the slowest of them, which no one wants to
        // explain.
        .parallelism(1)
        .event_time(Duration::from_secs(60), |order| order.at)
        .key_by(|order| order.shop)
        .window(tumbling(Duration::from_secs(3600)), |order| order.at)
        .aggregate_with_late(Hour::default, Hour::add, Hour::merge, |shop, hour, sum| Hour {
            start: hour.start,
            shop: *shop,
            ..*sum
        });
    hours.print(move |hour| {
        orders.add(hour.orders);
        let Hour { start, shop, orders, cents } = hour;
        format!("{}  shop {shop}: {orders} orders, {cents} cents", utc(*start))
    });
    late.print(move |order| {
        stuck.add(1);
        format!("{}  shop {}: LATE, {} cents", utc(order.at), order.shop, order.cents)
    });
}

fn main() -> std::process::ExitCode {
    testudo::main_with(build, |_, report| {
        let sum: u64 = report.counters.values().sum();
        if sum == ORDERS {
            Ok(())
        } else {
            Err(format!("{sum} of {ORDERS} orders are accounted for"))
        }
    })
}
