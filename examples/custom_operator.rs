//! An operator of one's own: sessions, closed by a timer when a user has been silent for half an
//! hour.
//!
//!     cargo run --release --example custom_operator
//!
//! `process` gives full control: code for each record and code for each timer, both with the key's
//! state at hand. Timers run on event time and survive crashes, as the state does.

use testudo::prelude::*;
use testudo::time::utc;

const SILENCE: i64 = 30 * 60_000;
const BEGIN: i64 = 1_735_689_600_000;

#[testudo::record]
struct Click {
    at: i64,
    user: u64,
}

/// Click number n: one each minute. Three users take turns, of 40 minutes or so.
fn click(n: u64) -> Click {
    Click { at: BEGIN + n as i64 * 60_000, user: (n + n % 3) / 40 % 3 }
}

/// A user's open session.
#[testudo::record]
struct Session {
    start: i64,
    end: i64,
    clicks: u64,
}

fn build(flow: &Flow, _options: &NoOptions) {
    flow.source("clicks", Generator::new(600, click))
        // One reader, so that a user's clicks come in order: what one producer sends for a key
        // stays as it was sent.
        .parallelism(1)
        .event_time(Duration::ZERO, |click| click.at)
        .key_by(|click| click.user)
        .process(
            |declare| declare.value::<Session>("session"),
            |open, context, click| {
                let session = match context.get(open).copied() {
                    Some(session) if click.at - session.end < SILENCE => {
                        context.delete_timer(session.end + SILENCE);
                        Session { end: click.at, clicks: session.clicks + 1, ..session }
                    }
                    // The watermark lags behind the clicks by a batch: the timer may not have come
                    // yet.
                    Some(session) => {
                        context.delete_timer(session.end + SILENCE);
                        context.emit((*context.key(), session));
                        Session { start: click.at, end: click.at, clicks: 1 }
                    }
                    None => Session { start: click.at, end: click.at, clicks: 1 },
                };
                context.set(open, &session);
                context.set_timer(session.end + SILENCE);
            },
            // Called once the watermark has reached the timer: also for the last sessions, when the
            // input ends.
            |open, context, _time| {
                if let Some(session) = context.get(open).copied() {
                    context.emit((*context.key(), session));
                    context.clear(open);
                }
            },
        )
        .print(|found| {
            let (user, session) = (found.0, found.1);
            format!(
                "user {user}: {} to {}, {} clicks",
                utc(session.start),
                utc(session.end),
                session.clicks
            )
        });
}

fn main() -> std::process::ExitCode {
    testudo::main(build)
}
