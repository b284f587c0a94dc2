//! Windows of event time: how time is cut, and the two operators that aggregate over it.
//!
//! State is kept by *slice*: the greatest common divisor of size and slide. A tumbling window is
//! one slice, a sliding one merges several. A window [start, end) fires once the watermark is at or
//! past its end; ends are multiples of the slide, so windows at both ends of the stream may be
//! partly filled.
//!
//! `keyed` has windows by key, `all` those over everything (aggregated per subtask, then merged).

pub(crate) mod keyed;

pub(crate) mod all;

use std::time::Duration;

/// A window's bounds: event time in milliseconds, the start included, the end not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// First millisecond.
    pub start: i64,
    /// First millisecond after it; `i64::MAX` also for a window that would end beyond that.
    pub end: i64,
}

/// How event time is cut into windows.
///
/// ```
/// use std::time::Duration;
/// use testudo::window::{sliding, tumbling};
/// let hourly = tumbling(Duration::from_secs(3600));
/// let overlapping = sliding(Duration::from_secs(10), Duration::from_secs(2));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    size: i64,
    slide: i64,
    slice: i64,
}

/// Windows of `size`, one behind the other.
///
/// # Panics
/// When `size` is less than a millisecond.
#[must_use]
pub fn tumbling(size: Duration) -> Window {
    sliding(size, size)
}

/// Windows of `size`, one beginning every `slide`.
///
/// # Panics
/// When either is less than a millisecond, or the slide is longer than the size.
#[must_use]
pub fn sliding(size: Duration, slide: Duration) -> Window {
    let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX / 4);
    let (size, slide) = (millis(size), millis(slide));
    assert!(
        slide >= 1 && size >= slide,
        "a window needs 1 ms <= slide <= size, not {slide}, {size}"
    );
    Window { size, slide, slice: greatest_common_divisor(size, slide) }
}

fn greatest_common_divisor(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

impl Window {
    /// Start of the slice that a time belongs to.
    #[inline(always)]
    pub(crate) fn slice_of(self, time: i64) -> i64 {
        time.saturating_sub(time.rem_euclid(self.slice))
    }

    /// First time after a slice. The first slice of all begins with time itself, not at a multiple.
    #[inline(always)]
    pub(crate) fn slice_end(self, slice: i64) -> i64 {
        slice.saturating_add(self.slice - slice.rem_euclid(self.slice))
    }

    /// End of the first window that contains a slice.
    pub(crate) fn first_end(self, slice: i64) -> i64 {
        slice.saturating_add(self.slide - slice.rem_euclid(self.slide))
    }

    /// End of the last window that contains a slice: what comes when that has fired is late.
    #[inline(always)]
    pub(crate) fn last_end(self, slice: i64) -> i64 {
        match slice.checked_add(self.size - slice.rem_euclid(self.slice)) {
            Some(end) => end - end.rem_euclid(self.slide),
            None => self.last_end_beyond(slice),
        }
    }

    /// As `last_end`, where the slice's last time plus the size is no time any more.
    #[cold]
    fn last_end_beyond(self, slice: i64) -> i64 {
        let end = i128::from(slice) + i128::from(self.size);
        let end = end - end.rem_euclid(i128::from(self.slide));
        i64::try_from(end).unwrap_or(i64::MAX)
    }

    /// The window that ends at `end`. All that would end beyond time itself are one, which ends
    /// with it, and has the last millisecond too.
    pub(crate) fn bounds(self, end: i64) -> Bounds {
        let past = match end {
            i64::MAX => (self.slide - end.rem_euclid(self.slide)) % self.slide,
            _ => 0,
        };
        Bounds { start: end.saturating_sub(self.size - past), end }
    }

    /// The last time that a window has.
    pub(crate) fn last_of(bounds: Bounds) -> i64 {
        if bounds.end == i64::MAX { i64::MAX } else { bounds.end - 1 }
    }

    /// End of the next window to fire: behind the one that ended at `fired`, not among those that
    /// the watermark had `passed` before (a straggler may belong to some that were empty then),
    /// containing `oldest` or a later slice.
    pub(crate) fn next_end(self, fired: i64, passed: i64, oldest: i64) -> i64 {
        let open = self.first_end(oldest).max(self.first_end(passed));
        open.max(self.first_end(fired))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_knows_its_first_and_last_window() {
        let window = sliding(Duration::from_millis(10), Duration::from_millis(4));
        assert_eq!(window.slice, 2);
        for time in -50..50i64 {
            let slice = window.slice_of(time);
            assert!(slice <= time && time < window.slice_end(slice));
            let ends: Vec<i64> =
                (-100..100).filter(|end| end % 4 == 0 && end - 10 <= time && time < *end).collect();
            assert_eq!(ends.first(), Some(&window.first_end(slice)), "first window of {time}");
            assert_eq!(ends.last(), Some(&window.last_end(slice)), "last window of {time}");
        }
    }

    #[test]
    fn slices_and_windows_at_the_ends_of_time_are_those_of_exact_arithmetic() {
        let clip = |time: i128| time.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        for (size, slide) in [(1, 1), (7, 7), (10, 10), (10, 4), (9, 2), (1000, 1), (86_400, 7)] {
            let window =
                sliding(Duration::from_millis(size as u64), Duration::from_millis(slide as u64));
            let near = (0..200).flat_map(|n| [i64::MIN + n, n - 100, i64::MAX - n]);
            for time in near {
                let slice = window.slice_of(time);
                let cut = |by: i64| i128::from(time) - i128::from(time.rem_euclid(by));
                let exact = cut(window.slice);
                assert_eq!(slice, clip(exact), "slice of {time}, {size}/{slide}");
                let end = clip(exact + i128::from(window.slice));
                assert_eq!(window.slice_end(slice), end, "end of the slice of {time}");
                let first = clip(cut(slide) + i128::from(slide));
                assert_eq!(window.first_end(slice), first, "first window of {time}");
                let last = exact + i128::from(size);
                let last = clip(last - last.rem_euclid(slide.into()));
                assert_eq!(window.last_end(slice), last, "last window of {time}");
                let bounds = window.bounds(first);
                assert!(bounds.start <= time && time <= Window::last_of(bounds), "{bounds:?}");
                // The end of time has its own row of windows; any other follows the one before.
                assert_eq!(window.next_end(i64::MIN, i64::MIN, slice), first);
            }
        }
    }

    #[test]
    fn a_tumbling_window_is_one_slice() {
        let window = tumbling(Duration::from_secs(3600));
        assert_eq!(window.first_end(7_200_000), window.last_end(7_200_000));
        assert_eq!(window.bounds(3_600_000), Bounds { start: 0, end: 3_600_000 });
    }
}
