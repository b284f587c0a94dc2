//! The machine's monotonic clock, as all processes of a job read it.

/// Nanoseconds of the monotonic clock, comparable between processes of one boot.
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    clock::monotonic_ns()
}

/// Nanoseconds of processor time that this thread has used.
pub(crate) fn thread_ns() -> u64 {
    clock::thread_ns()
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Milliseconds since 1970, as operators of a step see it: what they see is noted for a replica, or
/// told to it (R21).
pub(crate) mod step {
    use super::unix_ms;
    use std::cell::RefCell;

    /// How operators learn what time it is.
    enum Clock {
        /// They look.
        Own,
        /// They look; what they saw is kept: times, and how often in a row.
        Noted(Vec<u64>),
        /// They are told what others saw.
        Told { words: Vec<u64>, at: usize, is_short: bool },
    }

    thread_local! {
        static CLOCK: RefCell<Clock> = const { RefCell::new(Clock::Own) };
    }

    /// What time it is.
    #[inline]
    pub(crate) fn ms() -> i64 {
        CLOCK.with_borrow_mut(|clock| match clock {
            Clock::Own => unix_ms(),
            Clock::Noted(words) => {
                let now = unix_ms();
                match words.as_mut_slice() {
                    [.., last, times] if *last == now.cast_unsigned() => *times += 1,
                    _ => words.extend([now.cast_unsigned(), 1]),
                }
                now
            }
            Clock::Told { words, at, is_short } => {
                let Some([time, times]) = words.get_mut(*at..*at + 2) else {
                    *is_short = true;
                    return 0;
                };
                *times = times.saturating_sub(1);
                *at += if *times == 0 { 2 } else { 0 };
                time.cast_signed()
            }
        })
    }

    /// From here on it is noted, afresh.
    pub(crate) fn note() {
        CLOCK.with_borrow_mut(|clock| match clock {
            Clock::Noted(words) => words.clear(),
            other => *other = Clock::Noted(Vec::new()),
        });
    }

    /// What was noted.
    pub(crate) fn noted(take: impl FnOnce(&[u64])) {
        CLOCK.with_borrow(|clock| {
            if let Clock::Noted(words) = clock {
                take(words);
            }
        });
    }

    /// From here on operators are told.
    pub(crate) fn tell(words: Vec<u64>) {
        CLOCK.set(Clock::Told { words, at: 0, is_short: false });
    }

    /// Whether exactly what was told was asked for.
    pub(crate) fn is_over() -> bool {
        CLOCK.with_borrow(|clock| match clock {
            Clock::Told { words, at, is_short } => *at == words.len() && !is_short,
            _ => true,
        })
    }

    /// From here on they look.
    pub(crate) fn look_oneself() {
        CLOCK.set(Clock::Own);
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn what_was_seen_is_told_as_often_as_it_was_asked_for() {
            super::note();
            let seen: Vec<i64> = (0..5).map(|_| super::ms()).collect();
            let mut words = Vec::new();
            super::noted(|noted| words.extend(noted));
            super::tell(words);
            assert_eq!((0..5).map(|_| super::ms()).collect::<Vec<_>>(), seen);
            assert!(super::is_over());
            super::ms();
            assert!(!super::is_over(), "nobody saw a sixth");
            super::look_oneself();
            assert!(super::ms() > 0 && super::is_over());
        }
    }
}

/// Event time in words: milliseconds since 1970, UTC, to the second.
#[must_use]
pub fn utc(millis: i64) -> String {
    let seconds = millis.div_euclid(1000);
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, date) = civil(day);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
pub(crate) fn civil(day: i64) -> (i64, i64, i64) {
    // Days are counted from 0000-03-01, so that the leap day ends a year.
    let day = day + 719_468;
    let era = day.div_euclid(146_097);
    let of_era = day.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let date = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, date)
}

/// Milliseconds since 1970 of a time such as `2013-01-01T10:00:00Z`; `None` when it is none.
#[must_use]
pub fn parse_utc(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    if bytes.len() != 20 || bytes[10] != b'T' || bytes[19] != b'Z' {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = &bytes[from..to];
        digits.iter().try_fold(0, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
    };
    let (year, month, date) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&date)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let of_year = (153 * m + 2) / 5 + date - 1;
    let day = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Some(((day * 24 + hour) * 60 + minute) * 60_000 + second * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_survives_being_written_and_read() {
        for millis in
            [0, 1_357_034_400_000, -62_135_596_800_000, 951_782_400_000, 4_102_444_799_000]
        {
            assert_eq!(parse_utc(&utc(millis)), Some(millis), "{}", utc(millis));
        }
        assert_eq!(utc(1_357_034_400_000), "2013-01-01T10:00:00Z");
        for bad in ["", "2013-01-01 10:00:00Z", "2013-13-01T10:00:00Z", "2013-01-01T1x:00:00Z"] {
            assert_eq!(parse_utc(bad), None, "{bad}");
        }
    }
}

mod clock {
    #![expect(unsafe_code, reason = "std's Instant cannot be compared between processes")]

    #[inline]
    pub(super) fn monotonic_ns() -> u64 {
        read(libc::CLOCK_MONOTONIC)
    }

    pub(super) fn thread_ns() -> u64 {
        read(libc::CLOCK_THREAD_CPUTIME_ID)
    }

    #[inline]
    fn read(clock: libc::clockid_t) -> u64 {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: now is a valid place for the result; both clocks always exist.
        unsafe { libc::clock_gettime(clock, &raw mut now) };
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}
