//! Keyed state: what a job remembers for each key, as a value, a list and a map.
//!
//!     cargo run --release --example keyed_state
//!
//! Customers buy in shops. For each customer the job keeps how much they spent (a value), their
//! latest purchases (a list) and what they spent in each shop (a map). All of it lives in shared
//! memory and changes together with the step that changes it: a worker that dies loses none of it
//! and applies nothing twice.

use testudo::prelude::*;

const CUSTOMERS: u64 = 5;
const SHOPS: [&str; 4] = ["bakery", "bookshop", "cinema", "market"];
/// Purchases of a customer between two statements.
const STATEMENT: usize = 4;

/// A plain record: numbers only, so workers read it in the ring, where it lies.
#[testudo::record]
struct Purchase {
    customer: u64,
    shop: u64,
    cents: u64,
}

/// Purchase number n. A function of n alone: whoever reads again from n on sees the same.
fn purchase(n: u64) -> Purchase {
    let mixed = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    Purchase {
        customer: n % CUSTOMERS,
        shop: mixed % SHOPS.len() as u64,
        cents: 100 + mixed % 4900,
    }
}

fn build(flow: &Flow, _options: &NoOptions) {
    flow.source("purchases", Generator::new(60, purchase))
        // One reader: what one producer sends for a key comes in the order in which it was sent.
        .parallelism(1)
        .key_by(|purchase| purchase.customer)
        .process(
            // Each state has a name: it is found by it again, by the successor of a worker that
            // died.
            |declare| {
                let spent = declare.value::<u64>("spent");
                let latest = declare.list::<u64>("latest");
                let by_shop = declare.map::<u64, u64>("by_shop");
                (spent, latest, by_shop)
            },
            // The context knows the record's key: all calls are about that key's part of the state.
            |(spent, latest, by_shop), context, purchase| {
                let total = context.get(spent).copied().unwrap_or(0) + purchase.cents;
                context.set(spent, &total);
                let there = context.map_get(by_shop, &purchase.shop).copied().unwrap_or(0);
                context.map_put(by_shop, &purchase.shop, &(there + purchase.cents));
                context.append(latest, &purchase.cents);
                let cents: Vec<String> = context.items(latest).map(u64::to_string).collect();
                if cents.len() < STATEMENT {
                    return;
                }
                context.clear_list(latest);
                let dearest =
                    context.map_iter(by_shop).max_by_key(|(shop, cents)| (**cents, **shop));
                let shop = dearest.map_or("nowhere", |(shop, _)| SHOPS[*shop as usize]);
                context.emit(format!(
                    "customer {} spent {total} so far, most of it at the {shop}; lately {}",
                    context.key(),
                    cents.join(", ")
                ));
            },
            // No timers here: see custom_operator.rs.
            |_, _, _| (),
        )
        .print(|line| line.to_string());
}

fn main() -> std::process::ExitCode {
    testudo::main(build)
}
