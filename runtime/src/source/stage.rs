//! The head of a stage that begins with a source.
//!
//! Invariants: position, count and end are cells, written in the same transaction as what the
//! records led to; a source that ended, or that the job's drain stopped, sends the last watermark
//! and never reads again.
//!
//! Called by the step loop.

use super::{Collect, Progress, Reader};
use crate::error::Error;
use crate::operator::{Push, Stage};
use crate::worker::careful::Verdict;
use crate::worker::context::{CounterPlace, Cx};
use crate::worker::tape::{Mode, Told};
use std::marker::PhantomData;
use testudo_shm::marker::{self, Phase};
use testudo_shm::record::{Batch, Record, Scratch};
use testudo_shm::txn::{Place, Plain};

const READING: u64 = 0;
const ENDED: u64 = 1;
const DONE: u64 = 2;

/// How fast a subtask may read: so many records a second, without catching up after a pause.
#[derive(Debug)]
pub struct Pace {
    nanos_per_record: f64,
    next_ns: f64,
}

/// After a pause longer than this, the time is not made up for.
const PAUSE_NS: f64 = 10e6;

impl Pace {
    pub(crate) fn new(records_per_s: f64) -> Self {
        Self { nanos_per_record: 1e9 / records_per_s, next_ns: 0.0 }
    }

    /// Records that are due now; when none is, the time at which one will be.
    fn due(&mut self, now_ns: u64, max: usize) -> Result<usize, u64> {
        let now = now_ns as f64;
        if self.next_ns < now - PAUSE_NS {
            self.next_ns = now;
        }
        if self.next_ns > now {
            return Err(self.next_ns as u64);
        }
        let due = ((now - self.next_ns) / self.nanos_per_record) as usize + 1;
        Ok(due.min(max))
    }

    fn took(&mut self, records: usize) {
        self.next_ns += records as f64 * self.nanos_per_record;
    }
}

/// A part of the source, with the reader that reads it. There is one, unless the job goes on with
/// another number of subtasks than it was begun with.
pub struct SourcePart<P: Plain, R> {
    pub(crate) reader: R,
    pub(crate) position: Place<P>,
    pub(crate) phase: Place<u64>,
}

pub struct SourceStage<T, P: Plain, R, N> {
    pub(crate) name: String,
    pub(crate) stage: u32,
    /// Records that were put aside.
    pub(crate) aside: CounterPlace,
    pub(crate) parts: Vec<SourcePart<P, R>>,
    /// The part whose turn it is.
    pub(crate) turn: usize,
    pub(crate) phase: Place<u64>,
    pub(crate) records: CounterPlace,
    pub(crate) rejected: CounterPlace,
    /// Where the descriptions of refused input go, when a rejects file is wanted.
    pub(crate) rejects: Option<Box<dyn Push<String>>>,
    /// Rejects of this subtask after which the job fails.
    pub(crate) rejects_max: u64,
    pub(crate) pace: Option<Pace>,
    /// Records that this subtask may still read, where the job has a limit.
    pub(crate) limit: Option<u64>,
    pub(crate) wake: Option<u64>,
    pub(crate) operator: usize,
    /// What it reads from did not answer last.
    pub(crate) is_blocked: bool,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn() -> T>,
}

struct Collector<'a, T, N> {
    next: &'a mut N,
    cx: &'a mut Cx,
    rejects: Option<&'a mut (dyn Push<String> + 'static)>,
    emitted: usize,
    rejected: usize,
    last_reject: String,
    of: PhantomData<fn(T)>,
}

impl<T: Record, N: Push<T>> Collect<T> for Collector<'_, T, N> {
    #[inline(always)]
    fn emit(&mut self, value: T) {
        self.emitted += 1;
        self.next.push_value(self.cx, &value);
    }

    #[inline(always)]
    fn emit_all(&mut self, values: &[T]) {
        self.emitted += values.len();
        if self.cx.careful.is_some() {
            self.cx.show_alone(T::bytes_of(values).unwrap_or_default());
        }
        match Batch::of_values(values) {
            Some(batch) => self.next.push_batch(self.cx, batch),
            None => values.iter().for_each(|value| self.next.push_value(self.cx, value)),
        }
    }

    fn reject(&mut self, description: String) {
        self.rejected += 1;
        if let Some(rejects) = &mut self.rejects {
            rejects.push_value(self.cx, &description);
        }
        self.last_reject = description;
    }
}

/// As a replica: reads what the worker read, and goes to where it went.
#[cold]
fn play<T: Record, P: Plain, N: Push<T>>(
    told: &Told,
    reader: &mut impl Reader<T, P>,
    position: &mut P,
    out: &mut Collector<'_, T, N>,
) -> Result<Progress, String> {
    let played = told.play(|max| {
        let (before, had) = (*position, out.emitted + out.rejected);
        reader.read(position, max, out)?;
        // It found out something that the worker had not found out yet.
        if out.emitted + out.rejected == had {
            *position = before;
        }
        Ok(out.emitted + out.rejected)
    });
    *position = P::read_from_bytes(&told.position).unwrap_or(*position);
    played
}

/// Takes the one record that is passed over, for its bytes.
struct Kept<T> {
    bytes: Vec<u8>,
    of: PhantomData<fn(T)>,
}

impl<T: Record> Collect<T> for Kept<T> {
    fn emit(&mut self, value: T) {
        let mut scratch = Scratch::default();
        self.bytes.extend_from_slice(value.item(&mut scratch).bytes());
    }

    fn emit_all(&mut self, values: &[T]) {
        let mut scratch = Scratch::default();
        for value in values {
            self.bytes.extend_from_slice(value.item(&mut scratch).bytes());
        }
    }

    fn reject(&mut self, description: String) {
        self.bytes.extend_from_slice(description.as_bytes());
    }
}

impl<T: Record, P: Plain, R: Reader<T, P>, N: Push<T>> SourceStage<T, P, R, N> {
    /// How many records may be read now.
    fn allowance(&mut self, cx: &mut Cx) -> usize {
        // What has no room to be counted in (a closure) still has steps of a bounded length.
        let mut max = self.room(cx).min(cx.turn);
        cx.is_pressed |= max == 0;
        if let Some(limit) = self.limit {
            let left = limit.saturating_sub(cx.txn.get(self.records));
            max = max.min(usize::try_from(left).unwrap_or(usize::MAX));
        }
        if max > 0
            && let Some(pace) = &mut self.pace
        {
            match pace.due(cx.now_ns, max) {
                Ok(due) => max = due,
                Err(later) => {
                    self.wake = Some(later);
                    return 0;
                }
            }
        }
        max
    }

    /// Reads from the part whose turn it is, or finds that all have ended.
    fn read(&mut self, cx: &mut Cx) -> usize {
        if cx.has_taken_one() {
            return 0;
        }
        let Some(part) = self.next_part(cx) else {
            cx.txn.set(self.phase, ENDED);
            return 0;
        };
        if cx.tape.mode == Mode::Tell {
            return self.read_again(cx);
        }
        let mut max = self.allowance(cx);
        if max == 0 {
            return 0;
        }
        let number = cx.txn.get(self.records) + cx.txn.get(self.rejected);
        let input = marker::SOURCE | part as u32;
        let to = [number.saturating_add(max as u64), 0];
        let place = marker::Place { stage: self.stage, input, from: [number, 0], to };
        if cx.careful.is_some() {
            if self.begin_alone(cx, part, &place) == Verdict::PutAside {
                return self.pass_over(cx, part);
            }
            max = 1;
        } else {
            cx.marker.enter(Phase::Reading, &place);
        }
        self.turn = part + 1;
        let work = self.read_part(cx, part, max, None);
        (cx.part, cx.ended_parts) = (0, Vec::new());
        work
    }

    /// As a replica: reads what the worker read.
    #[cold]
    fn read_again(&mut self, cx: &mut Cx) -> usize {
        // As the worker did: looking for room is looking at the consumers' heads.
        let _ = self.room(cx);
        let Some(told) = cx.tape.told(self.stage) else {
            return 0;
        };
        if told.part >= self.parts.len() || told.position.len() != size_of::<P>() {
            let message = "the worker has another source than its replica".to_owned();
            cx.fail(Error::job(&self.name, message));
            return 0;
        }
        let work = self.read_part(cx, told.part, told.count, Some(&told));
        (cx.part, cx.ended_parts) = (0, Vec::new());
        work
    }

    /// The next part that has not ended, in turn.
    #[inline]
    fn next_part(&self, cx: &Cx) -> Option<usize> {
        let count = self.parts.len();
        let order = (0..count).map(|step| (self.turn + step) % count);
        order.into_iter().find(|part| cx.txn.get(self.parts[*part].phase) == READING)
    }

    fn read_part(&mut self, cx: &mut Cx, part: usize, max: usize, told: Option<&Told>) -> usize {
        if self.parts.len() > 1 {
            let ended = self.parts.iter().map(|part| cx.txn.get(part.phase) != READING);
            (cx.ended_parts, cx.part) = (ended.collect(), part);
        }
        let SourcePart { reader, position: place, phase } = &mut self.parts[part];
        let (place, phase) = (*place, *phase);
        let mut position = cx.txn.get(place);
        let mut out = Collector {
            next: &mut self.next,
            cx,
            rejects: self.rejects.as_deref_mut(),
            emitted: 0,
            rejected: 0,
            last_reject: String::new(),
            of: PhantomData,
        };
        let progress = match told {
            None => reader.read(&mut position, max, &mut out),
            Some(told) => play(told, reader, &mut position, &mut out),
        };
        let (emitted, rejected, last_reject) = (out.emitted, out.rejected, out.last_reject);
        if cx.tape.mode == Mode::Note
            && let Ok(progress) = &progress
        {
            let count = emitted + rejected;
            cx.tape.note(self.stage, part, count, progress, position.as_bytes());
        }
        let moves_alone = progress == Ok(Progress::More);
        let is_blocked = matches!(progress, Ok(Progress::Blocked { .. }));
        if std::mem::replace(&mut self.is_blocked, is_blocked) && !is_blocked {
            cx.outside.works(self.operator);
        }
        match progress {
            Ok(Progress::More) => {}
            Ok(Progress::Idle { until_ns }) => self.wake = Some(until_ns),
            Ok(Progress::Blocked { until_ns, errno }) => {
                self.wake = Some(until_ns);
                cx.outside.failed(self.operator, errno, false);
            }
            Ok(Progress::End) => self.end_part(cx, part, phase),
            Err(message) => cx.fail(Error::job(&self.name, message)),
        }
        if emitted + rejected > 0 {
            cx.txn.set(place, position);
            cx.count(self.records, emitted as u64);
            if rejected > 0 {
                self.note_rejects(cx, rejected as u64, &last_reject);
            }
            if cx.careful.is_some() {
                cx.end_alone(self.stage);
            }
            self.end_batch(cx);
        } else if moves_alone {
            cx.txn.set(place, position);
        }
        if let Some(pace) = &mut self.pace {
            pace.took(emitted);
        }
        if emitted + rejected == 0 {
            cx.release_alone();
        }
        emitted + rejected
    }

    /// The only record of a careful step: which it is, in the source's own words.
    #[cold]
    fn begin_alone(&self, cx: &mut Cx, part: usize, place: &marker::Place) -> Verdict {
        let SourcePart { reader, position, .. } = &self.parts[part];
        let origin = format!("{}, {}", self.name, reader.origin(&cx.txn.get(*position)));
        cx.begin_alone(Phase::ReadingOne, place, origin, &[])
    }

    /// Passes over the next record of a part and puts it aside: the reader skips it, or makes it
    /// for nobody.
    #[cold]
    fn pass_over(&mut self, cx: &mut Cx, part: usize) -> usize {
        let SourcePart { reader, position: place, .. } = &mut self.parts[part];
        let mut position = cx.txn.get(*place);
        let mut kept = Kept { bytes: Vec::new(), of: PhantomData };
        let skipped = reader.skip(&mut position).and_then(|skipped| match skipped {
            Some(bytes) => Ok(bytes),
            None => reader.read(&mut position, 1, &mut kept).map(|_| kept.bytes),
        });
        match skipped {
            Ok(bytes) => {
                cx.txn.set(*place, position);
                cx.count(self.records, 1);
                cx.put_aside(&cx.outer_spot(), &bytes, self.aside);
            }
            Err(message) => cx.fail(Error::job(&self.name, message)),
        }
        1
    }

    /// A part has ended: its time holds nothing up any more. The last one ends the source.
    #[cold]
    fn end_part(&mut self, cx: &mut Cx, part: usize, phase: Place<u64>) {
        cx.txn.set(phase, ENDED);
        if self.parts.iter().all(|part| cx.txn.get(part.phase) != READING) {
            cx.txn.set(self.phase, ENDED);
        } else {
            self.end_batch(cx);
            cx.ended_parts[part] = true;
            self.end_batch(cx);
        }
    }

    #[cold]
    fn note_rejects(&mut self, cx: &mut Cx, rejected: u64, last: &str) {
        cx.count(self.rejected, rejected);
        let total = cx.txn.get(self.rejected);
        if total > self.rejects_max {
            let message = format!(
                "{total} inputs refused, more than --max-rejects {} allows; the last one: {last}",
                self.rejects_max
            );
            cx.fail(Error::job(&self.name, message));
        }
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        self.next.end_batch(cx);
        if let Some(rejects) = &mut self.rejects {
            rejects.end_batch(cx);
        }
    }

    fn room(&mut self, cx: &mut Cx) -> usize {
        let room = self.next.room(cx);
        self.rejects.as_mut().map_or(room, |rejects| room.min(rejects.room(cx)))
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        let side = self.rejects.as_mut().is_some_and(|rejects| rejects.pump(cx));
        self.next.pump(cx) | side
    }

    /// Sends the last watermark and the end down both outputs; true once they are through.
    fn finish(&mut self, cx: &mut Cx) -> bool {
        self.next.watermark(cx, i64::MAX);
        // What is pending (a firing window) shows as no room; it is pumped first.
        if self.next.room(cx) == 0 || !self.next.end(cx) {
            return false;
        }
        let Some(rejects) = &mut self.rejects else {
            return true;
        };
        rejects.watermark(cx, i64::MAX);
        rejects.end(cx)
    }

    fn limit_is_reached(&self, cx: &Cx) -> bool {
        self.limit.is_some_and(|limit| cx.txn.get(self.records) >= limit)
    }
}

impl<T: Record, P: Plain, R: Reader<T, P>, N: Push<T>> Stage for SourceStage<T, P, R, N> {
    fn run(&mut self, cx: &mut Cx) -> usize {
        self.wake = None;
        cx.marker.set(Phase::Firing, self.stage);
        let mut work = usize::from(self.pump(cx));
        if cx.txn.get(self.phase) == READING {
            if cx.draining || self.limit_is_reached(cx) {
                cx.txn.set(self.phase, ENDED);
            } else if !cx.pausing {
                work += self.read(cx);
            }
        }
        cx.marker.set(Phase::Firing, self.stage);
        if cx.txn.get(self.phase) == ENDED && cx.failure.is_none() && self.finish(cx) {
            cx.txn.set(self.phase, DONE);
            work += 1;
        }
        work
    }

    fn save(&mut self, cx: &mut Cx) {
        self.next.save(cx);
        if let Some(rejects) = &mut self.rejects {
            rejects.save(cx);
        }
    }

    fn is_done(&self, cx: &Cx) -> bool {
        cx.txn.get(self.phase) == DONE
    }

    fn wake_ns(&self) -> Option<u64> {
        self.wake
    }
}

#[cfg(test)]
mod tests {
    use super::Pace;

    const MS: u64 = 1_000_000;

    /// Asks at each of these times for as much as is due, and takes it.
    fn taken(pace: &mut Pace, times: impl IntoIterator<Item = u64>) -> usize {
        let mut all = 0;
        for at in times {
            if let Ok(due) = pace.due(at, usize::MAX) {
                pace.took(due);
                all += due;
            }
        }
        all
    }

    #[test]
    fn a_pace_is_kept_however_often_it_is_asked() {
        for step in [MS / 10, MS, 5 * MS] {
            let mut pace = Pace::new(1000.0);
            let all =
                taken(&mut pace, (0..1000 * MS).step_by(step as usize).map(|at| 700 * MS + at));
            assert!(
                (995..=1001).contains(&all),
                "{all} records in a second, asked every {step} ns"
            );
        }
    }

    #[test]
    fn a_slow_pace_is_kept_too() {
        let mut pace = Pace::new(0.5);
        assert_eq!(taken(&mut pace, (0..100_000 * MS).step_by(MS as usize)), 50);
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(1000.0);
        taken(&mut pace, [MS]);
        let after = taken(&mut pace, [60_000 * MS]);
        assert_eq!(after, 1, "a minute of sixty thousand records is gone");
        assert_eq!(taken(&mut pace, [60_010 * MS]), 10);
    }

    #[test]
    fn what_is_not_due_says_when_it_will_be() {
        let mut pace = Pace::new(100.0);
        assert_eq!(pace.due(50 * MS, 5), Ok(1));
        pace.took(1);
        assert_eq!(pace.due(51 * MS, 5), Err(60 * MS));
        assert_eq!(pace.due(60 * MS, 5), Ok(1));
    }

    #[test]
    fn room_bounds_what_is_taken() {
        let mut pace = Pace::new(1e9);
        pace.took(1);
        assert_eq!(pace.due(5 * MS, 64), Ok(64));
    }
}
