//! When a checkpoint is due: never, at a fixed interval, or by the clock; changeable while the job
//! runs.
//!
//! Clock patterns have cron's five fields (minute, hour, day of the month, month, day of the week)
//! and are in UTC, whatever the machine's time zone is: a job that moves to another machine or
//! lives through a change of daylight time keeps its hours.
//!
//! Invariants: nothing piles up: a due time that passes while a checkpoint is open is skipped, not
//! queued; between the end of one and the beginning of the next lies the minimal pause, and a due
//! time that falls into the pause is honoured right after it.
//!
//! Called by the supervisor's loop; the text forms also by the command line and the control socket.

use super::Now;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// When checkpoints are due.
///
/// ```
/// use testudo::checkpoint::schedule::Schedule;
///
/// for text in ["never", "1s", "200ms", "5m", "0 * * * *", "*/15 8-18 * * 1-5"] {
///     let schedule: Schedule = text.parse().unwrap();
///     assert_eq!(schedule.to_string(), text);
/// }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Schedule {
    /// Only when asked for.
    #[default]
    Never,
    /// At a fixed interval.
    Every(Duration),
    /// Whenever the clock, in UTC, matches.
    At(Pattern),
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

impl TryFrom<String> for Schedule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "never" {
            Ok(Self::Never)
        } else if text.contains(' ') {
            text.parse().map(Self::At)
        } else {
            parse_duration(text).map(Self::Every)
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Every(duration) => {
                // Nothing shorter can be written, nor is it of use.
                let ms = duration.as_millis().max(1);
                let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms")];
                let unit = units.iter().find(|(length, _)| ms % length == 0);
                let (length, name) = unit.unwrap_or(&units[3]);
                write!(f, "{}{name}", ms / length)
            }
            Self::At(pattern) => f.write_str(&pattern.text),
        }
    }
}

/// Parses a time such as 200ms, 1s, 5m or 2h: at least a millisecond, at most a year.
///
/// # Errors
/// What is wrong with the text, and what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const YEAR_MS: u64 = 366 * 24 * 3_600_000;
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit_ms = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} is no time; write a number and ms, s, m or h: 200ms")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is no time; write it like 200ms or 5m"))?;
    match number.checked_mul(unit_ms) {
        Some(ms @ 1..=YEAR_MS) => Ok(Duration::from_millis(ms)),
        _ => Err(format!("{text:?}: at least 1ms, at most a year")),
    }
}

/// A pattern of the clock: which minutes, hours, days, months and days of the week match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    /// A set bit for each value that matches.
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// As in cron: when both kinds of day are limited, either may match.
    either_day: bool,
}

/// Name, least and largest value of each field.
const FIELDS: [(&str, u32, u32); 5] = [
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day", 1, 31),
    ("month", 1, 12),
    ("day of the week", 0, 7),
];

/// Days that are searched for the next match: a 29th of February is at most eight years off.
const SEARCHED_DAYS: i64 = 366 * 8 + 2;

const DAY_MS: i64 = 86_400_000;

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        if fields.len() != FIELDS.len() {
            return Err(format!(
                "{text:?} has {} fields; a clock pattern has five: minute, hour, day, month, day \
                 of the week, such as \"0 * * * *\" for each full hour",
                fields.len()
            ));
        }
        let mut bits = [0; FIELDS.len()];
        for ((bits, field), of) in bits.iter_mut().zip(&fields).zip(FIELDS) {
            *bits = parse_field(field, of)?;
        }
        let [minutes, hours, days, months, weekdays] = bits;
        // Sunday is 0 and 7.
        let weekdays = (weekdays | weekdays >> 7) & 0x7F;
        let either_day = fields[2] != "*" && fields[4] != "*";
        let text = fields.join(" ");
        let pattern = Self { text, minutes, hours, days, months, weekdays, either_day };
        match pattern.next_after(0) {
            Some(_) => Ok(pattern),
            None => Err(format!("{:?} never happens", pattern.text)),
        }
    }
}

/// The values that a field stands for: *, 5, 1-5, */15, 10-40/10, and lists of them.
fn parse_field(field: &str, (name, least, largest): (&str, u32, u32)) -> Result<u64, String> {
    let bad = |part: &str| {
        format!(
            "{part:?}: the {name} is {least} to {largest}, as in *, {least}, {least}-{largest} or */2"
        )
    };
    let number = |text: &str, part: &str| -> Result<u32, String> {
        let number = text.parse().map_err(|_| bad(part))?;
        if (least..=largest).contains(&number) { Ok(number) } else { Err(bad(part)) }
    };
    let mut bits = 0;
    for part in field.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, step.parse().map_err(|_| bad(part))?),
            None => (part, 1),
        };
        let (first, last) = match range.split_once('-') {
            _ if range == "*" => (least, largest),
            Some((first, last)) => (number(first, part)?, number(last, part)?),
            None if part.contains('/') => (number(range, part)?, largest),
            None => (number(range, part)?, number(range, part)?),
        };
        if first > last || step == 0 {
            return Err(bad(part));
        }
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        bits |= (first..=last).step_by(step).fold(0u64, |bits, value| bits | 1 << value);
    }
    Ok(bits)
}

impl Pattern {
    /// The first match after a time, both in milliseconds since 1970; `None` when there is none
    /// for years.
    #[must_use]
    pub fn next_after(&self, unix_ms: i64) -> Option<i64> {
        let from = unix_ms.div_euclid(60_000).checked_add(1)?;
        let first_day = from.div_euclid(1440);
        for day in first_day..first_day.checked_add(SEARCHED_DAYS)? {
            if !self.matches_day(day) {
                continue;
            }
            let begin = if day == first_day { from.rem_euclid(1440) } else { 0 };
            if let Some(minute) = self.minute_from(begin) {
                return day.checked_mul(DAY_MS)?.checked_add(minute * 60_000);
            }
        }
        None
    }

    fn matches_day(&self, day: i64) -> bool {
        let (_, month, date) = crate::time::civil(day);
        // 1 January 1970 was a Thursday.
        let weekday = (day + 4).rem_euclid(7);
        let by_date = self.days >> date & 1 == 1;
        let by_weekday = self.weekdays >> weekday & 1 == 1;
        let is_day = if self.either_day { by_date || by_weekday } else { by_date && by_weekday };
        is_day && self.months >> month & 1 == 1
    }

    /// The first matching minute of a day, from this one on.
    fn minute_from(&self, begin: i64) -> Option<i64> {
        (begin..1440).find(|minute| {
            self.hours >> (minute / 60) & 1 == 1 && self.minutes >> (minute % 60) & 1 == 1
        })
    }
}

/// The next due time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Never,
    /// By the monotonic clock.
    At(u64),
    /// By the wall clock.
    Clock(i64),
}

/// A schedule at work.
///
/// Tell it when a checkpoint begins and ends, whoever asked for it; ask it whether one is due.
#[derive(Debug, Clone)]
pub struct Timer {
    schedule: Schedule,
    pause_ns: u64,
    due: Due,
    /// Nothing is due before, in monotonic nanoseconds.
    not_before_ns: u64,
    is_open: bool,
    /// The wall clock when last looked at.
    seen_unix_ms: i64,
}

/// The wall clock is corrected by less than this without anybody setting it.
const CORRECTION_MS: i64 = 1000;

impl Timer {
    /// A schedule from now on, with a minimal pause between checkpoints.
    #[must_use]
    pub fn new(schedule: Schedule, pause: Duration, now: Now) -> Self {
        let mut timer = Self {
            schedule: Schedule::Never,
            pause_ns: nanoseconds(pause),
            due: Due::Never,
            not_before_ns: 0,
            is_open: false,
            seen_unix_ms: now.unix_ms,
        };
        timer.set(schedule, now);
        timer
    }

    /// The schedule.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Another schedule from now on; an open checkpoint is not touched, and the pause after it
    /// holds.
    pub fn set(&mut self, schedule: Schedule, now: Now) {
        self.due = match &schedule {
            Schedule::Never => Due::Never,
            Schedule::Every(interval) => {
                Due::At(now.monotonic_ns.saturating_add(nanoseconds(*interval)))
            }
            Schedule::At(pattern) => clock(pattern, now),
        };
        self.schedule = schedule;
        self.seen_unix_ms = now.unix_ms;
    }

    /// True when a checkpoint should begin now.
    pub fn is_due(&mut self, now: Now) -> bool {
        if let Schedule::At(pattern) = &self.schedule
            && now.unix_ms < self.seen_unix_ms - CORRECTION_MS
        {
            // The clock was set back: what was next may be far away by now.
            self.due = clock(pattern, now);
        }
        self.seen_unix_ms = now.unix_ms;
        self.due_in(now) == Some(Duration::ZERO)
    }

    /// How long until a checkpoint is due, by today's clock; `None` while one is open and where
    /// none will be.
    #[must_use]
    pub fn due_in(&self, now: Now) -> Option<Duration> {
        let until = match self.due {
            _ if self.is_open => return None,
            Due::Never => return None,
            Due::At(at) => Duration::from_nanos(at.saturating_sub(now.monotonic_ns)),
            Due::Clock(at) => {
                Duration::from_millis(u64::try_from(at.saturating_sub(now.unix_ms)).unwrap_or(0))
            }
        };
        let pause = Duration::from_nanos(self.not_before_ns.saturating_sub(now.monotonic_ns));
        Some(until.max(pause))
    }

    /// A checkpoint has begun, on schedule or not.
    pub fn begun(&mut self, now: Now) {
        self.is_open = true;
        self.skip_passed(now);
    }

    /// The open checkpoint has ended, well or not.
    pub fn ended(&mut self, now: Now) {
        self.is_open = false;
        self.not_before_ns = now.monotonic_ns.saturating_add(self.pause_ns);
        self.skip_passed(now);
    }

    /// Moves a due time that has passed to the next one of the schedule.
    fn skip_passed(&mut self, now: Now) {
        match (&self.schedule, self.due) {
            (Schedule::Every(interval), Due::At(at)) if at <= now.monotonic_ns => {
                let interval = nanoseconds(*interval);
                let passed = (now.monotonic_ns - at) / interval + 1;
                self.due = Due::At(at.saturating_add(passed.saturating_mul(interval)));
            }
            (Schedule::At(pattern), Due::Clock(at)) if at <= now.unix_ms => {
                self.due = clock(pattern, now);
            }
            _ => {}
        }
    }
}

fn clock(pattern: &Pattern, now: Now) -> Due {
    pattern.next_after(now.unix_ms).map_or(Due::Never, Due::Clock)
}

/// At least 1.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{parse_utc, utc};

    fn schedule(text: &str) -> Schedule {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// A moment some milliseconds after the start, which is at 10:00:00.
    fn at(ms: u64) -> Now {
        let start = parse_utc("2026-11-20T10:00:00Z").expect("a time");
        Now { monotonic_ns: 5_000_000_000 + ms * 1_000_000, unix_ms: start + ms.cast_signed() }
    }

    fn timer(text: &str, pause_ms: u64) -> Timer {
        Timer::new(schedule(text), Duration::from_millis(pause_ms), at(0))
    }

    #[test]
    fn times_are_written_with_a_unit() {
        assert_eq!(schedule("200ms"), Schedule::Every(Duration::from_millis(200)));
        assert_eq!(schedule("1s"), Schedule::Every(Duration::from_secs(1)));
        assert_eq!(schedule("5m"), Schedule::Every(Duration::from_secs(300)));
        assert_eq!(schedule("90s").to_string(), "90s");
        assert_eq!(schedule("7200s").to_string(), "2h");
        for bad in ["", "5", "s", "0s", "-1s", "1.5s", "1d", "1 s", "99999999999999999h", "10000h"]
        {
            assert!(bad.parse::<Schedule>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn patterns_that_say_nothing_are_refused() {
        let bad = [
            "0 * * *",
            "0 * * * * *",
            "60 * * * *",
            "* 24 * * *",
            "* * 0 * *",
            "* * 32 * *",
            "* * * 13 *",
            "* * * * 8",
            "5-1 * * * *",
            "*/0 * * * *",
            "a * * * *",
            "1,,2 * * * *",
            "- * * * *",
            "1-2-3 * * * *",
            "0 0 31 2 *",
            "0 0 30 2 *",
        ];
        for bad in bad {
            let said = bad.parse::<Schedule>().expect_err(bad);
            assert!(said.len() > 10, "{bad}: {said}");
        }
    }

    #[test]
    fn the_next_match_is_in_utc() {
        let next = |pattern: &str, from: &str| {
            let pattern: Pattern = pattern.parse().expect(pattern);
            utc(pattern.next_after(parse_utc(from).expect(from)).expect("a match"))
        };
        let cases = [
            ("0 * * * *", "2026-11-20T10:00:00Z", "2026-11-20T11:00:00Z"),
            ("0 * * * *", "2026-11-20T10:59:59Z", "2026-11-20T11:00:00Z"),
            ("* * * * *", "2026-12-31T23:59:30Z", "2027-01-01T00:00:00Z"),
            ("*/15 * * * *", "2026-11-20T10:16:00Z", "2026-11-20T10:30:00Z"),
            ("10-40/10 3 * * *", "2026-11-20T10:00:00Z", "2026-11-21T03:10:00Z"),
            ("5/20 3 * * *", "2026-11-21T03:05:00Z", "2026-11-21T03:25:00Z"),
            ("0 0 29 2 *", "2097-01-01T00:00:00Z", "2104-02-29T00:00:00Z"),
            // 20 November 2026 is a Friday.
            ("0 12 * * 1,3", "2026-11-20T10:00:00Z", "2026-11-23T12:00:00Z"),
            ("0 12 * * 7", "2026-11-20T10:00:00Z", "2026-11-22T12:00:00Z"),
            ("0 12 * * 0", "2026-11-20T10:00:00Z", "2026-11-22T12:00:00Z"),
            ("0 12 25 * 6", "2026-11-20T10:00:00Z", "2026-11-21T12:00:00Z"),
            ("0 12 25 * 6", "2026-11-21T12:00:00Z", "2026-11-25T12:00:00Z"),
        ];
        for (pattern, from, expected) in cases {
            assert_eq!(next(pattern, from), expected, "{pattern} after {from}");
        }
        assert_eq!("* * * * *".parse::<Pattern>().expect("fine").next_after(i64::MAX), None);
    }

    #[test]
    fn an_interval_keeps_its_grid() {
        let mut timer = timer("1s", 0);
        assert!(!timer.is_due(at(999)));
        assert!(timer.is_due(at(1003)));
        timer.begun(at(1003));
        timer.ended(at(1100));
        assert_eq!(timer.due_in(at(1100)), Some(Duration::from_millis(900)));
    }

    #[test]
    fn a_due_time_that_passes_while_one_is_open_is_skipped() {
        let mut timer = timer("1s", 0);
        timer.begun(at(1000));
        assert!(!timer.is_due(at(3500)));
        assert_eq!(timer.due_in(at(3500)), None);
        timer.ended(at(3500));
        assert!(!timer.is_due(at(3999)));
        assert!(timer.is_due(at(4000)));
    }

    #[test]
    fn a_due_time_of_the_clock_that_passes_while_one_is_open_is_skipped() {
        let mut timer = timer("* * * * *", 0);
        assert!(timer.is_due(at(60_000)));
        timer.begun(at(60_000));
        timer.ended(at(150_000));
        assert!(!timer.is_due(at(150_000)));
        assert!(timer.is_due(at(180_000)));
    }

    #[test]
    fn the_pause_holds_and_what_falls_into_it_comes_right_after() {
        let mut timer = timer("1s", 500);
        timer.begun(at(1000));
        timer.ended(at(1950));
        assert!(!timer.is_due(at(2000)));
        assert!(!timer.is_due(at(2449)));
        assert!(timer.is_due(at(2450)));
        timer.begun(at(2450));
        timer.ended(at(2451));
        assert!(timer.is_due(at(3000)), "back on the grid");
    }

    #[test]
    fn never_is_never() {
        let mut timer = timer("never", 0);
        assert!(!timer.is_due(at(u64::from(u32::MAX))));
        assert_eq!(timer.due_in(at(0)), None);
    }

    #[test]
    fn another_schedule_counts_from_its_change() {
        let mut timer = timer("1h", 0);
        timer.set(schedule("200ms"), at(1000));
        assert!(!timer.is_due(at(1199)));
        assert!(timer.is_due(at(1200)));
        timer.begun(at(1200));
        timer.set(schedule("10ms"), at(1201));
        assert!(!timer.is_due(at(5000)), "one is open");
        timer.set(schedule("never"), at(5001));
        timer.ended(at(5002));
        assert_eq!(timer.due_in(at(5002)), None);
        timer.set(schedule("0 * * * *"), at(5003));
        assert_eq!(timer.due_in(at(5003)), Some(Duration::from_millis(3_600_000 - 5003)));
    }

    #[test]
    fn a_clock_that_is_set_is_followed() {
        let mut timer = timer("0 * * * *", 0);
        let day_before = |ms: u64| Now { unix_ms: at(ms).unix_ms - 86_400_000, ..at(ms) };
        assert!(!timer.is_due(at(1000)));
        assert!(!timer.is_due(day_before(2000)));
        assert!(timer.is_due(day_before(3_600_000)), "the next full hour, not tomorrow's");
        let day_after = |ms: u64| Now { unix_ms: at(ms).unix_ms + 86_400_000, ..at(ms) };
        assert!(timer.is_due(day_after(3_600_001)), "one for all that were jumped over");
        timer.begun(day_after(3_600_002));
        timer.ended(day_after(3_600_003));
        assert!(!timer.is_due(day_after(3_600_004)));
    }

    #[test]
    fn schedules_are_text_in_files_and_messages() {
        for text in ["never", "200ms", "0 4 * * *"] {
            let json = serde_json::to_string(&schedule(text)).expect("text");
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Schedule>(&json).expect("back"), schedule(text));
        }
        assert!(serde_json::from_str::<Schedule>("\"soon\"").is_err());
    }
}
