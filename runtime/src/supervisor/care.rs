//! Care: what the ladder decides about single records is ordered of workers here, and what they
//! have put aside is written down.
//!
//! Invariants: orders stand in the supervisor's segment before the process that they are for is
//! started, and outlive both; a conviction is taken back only once its letter is written down.
//!
//! Called by `recover`.

use super::annals::Annals;
use super::autopsy::{hex, input_name, operators};
use super::dead_letters::{DeadLetters, Held, Line};
use super::ladder::{Decision, Ladder};
use super::launch::Scene;
use crate::error::Error;
use crate::plan::Plan;
use crate::testing::{Point, point};
use crate::time::{unix_ms, utc};
use testudo_shm::letter::Letter;
use testudo_shm::primitive::Ordering;

#[derive(Debug)]
pub(crate) struct Care {
    letters: DeadLetters,
    job: String,
    /// Number of the latest order of each worker.
    orders: Vec<u64>,
    /// Whether a worker was ordered to take care.
    careful: Vec<bool>,
}

impl Care {
    pub(crate) fn new(letters: DeadLetters, job: &str, workers: usize) -> Self {
        Self { letters, job: job.into(), orders: vec![0; workers], careful: vec![false; workers] }
    }

    /// Goes on with an earlier supervisor's orders.
    pub(crate) fn go_on(&mut self, plan: &Plan, scene: &Scene) {
        for worker in 0..plan.workers {
            if let Some((number, _)) = scene.orders(plan, worker).careful() {
                (self.orders[worker], self.careful[worker]) = (number, true);
            }
        }
    }

    /// Workers whose segments are emptied go on from cuts of these epochs (0: from the beginning):
    /// what they had put aside since comes again, and their letters are counted from the beginning.
    pub(crate) fn forget(
        &mut self,
        plan: &Plan,
        scene: &Scene,
        workers: &[(usize, u64)],
    ) -> Result<(), Error> {
        let held = |worker, epoch| match workers.iter().find(|(own, _)| *own == worker) {
            None => Held::Still,
            Some((_, of)) => Held::by(Some(of), epoch),
        };
        self.letters.withdraw(held)?;
        for (worker, _) in workers {
            let orders = scene.orders(plan, *worker);
            orders.set_careful(0, None);
            orders.set_convicted(0, None);
            orders.taken.store(0, Ordering::Release);
            self.careful[*worker] = false;
        }
        Ok(())
    }

    /// Orders what was decided, for the next process of the worker.
    pub(crate) fn order(&mut self, plan: &Plan, scene: &Scene, worker: usize, what: &Decision) {
        if what.careful.is_none() && !self.careful[worker] {
            return;
        }
        self.orders[worker] += 1;
        self.careful[worker] = what.careful.is_some();
        let orders = scene.orders(plan, worker);
        orders.set_careful(self.orders[worker], what.careful);
        orders.set_convicted(self.orders[worker], what.convicted);
    }

    /// Looks at what a worker has put aside, and whether the place is behind it.
    pub(crate) fn look(
        &mut self,
        plan: &Plan,
        scene: &Scene,
        worker: usize,
        ladder: &mut Ladder,
        annals: &mut Annals,
    ) {
        let (letter, orders) = (scene.letter(plan, worker), scene.orders(plan, worker));
        let number = letter.number();
        if number > orders.taken.load(Ordering::Relaxed) {
            self.take(plan, worker, letter, annals, number);
            if !self.letters.has(worker, number) {
                return;
            }
            point(Point::LetterTaken);
            // SYNC letter: the worker goes on when it sees this; its line is on disk.
            orders.set_convicted(0, None);
            orders.taken.store(number, Ordering::Release);
            ladder.put_aside();
        }
        if !self.careful[worker] {
            return;
        }
        let passed = scene.marker(plan, worker).passed.load(Ordering::Acquire);
        if passed == self.orders[worker] {
            self.careful[worker] = false;
            orders.set_careful(0, None);
            ladder.passed();
            annals.note("passed", worker, "the place is behind it: whole batches again");
        }
    }

    fn take(
        &mut self,
        plan: &Plan,
        worker: usize,
        letter: &Letter,
        annals: &mut Annals,
        number: u64,
    ) {
        let read = letter.read();
        let (spot, latest) = (read.spot, annals.latest(worker));
        let stage = if spot.inner > 0 { spot.inner - 1 } else { spot.stage } as usize;
        let operator =
            if stage < plan.stages.len() { operators(plan, stage) } else { String::new() };
        let error = latest.map_or(String::new(), |latest| {
            let Some(first) = latest.message.lines().next() else { return latest.cause.clone() };
            format!("{}: {first}", latest.cause)
        });
        let text = std::str::from_utf8(&read.bytes).ok();
        let line = Line {
            time: utc(unix_ms()),
            job: self.job.clone(),
            worker,
            number,
            epoch: read.epoch,
            operator,
            input: input_name(plan, worker, spot.stage as usize, spot.input),
            origin: read.origin,
            handed_on: (spot.inner > 0).then_some(spot.index),
            error,
            bytes: hex(&read.bytes),
            total: read.total,
            text: text.filter(|text| !text.is_empty()).map(str::to_owned),
        };
        let said = format!("{} from {}: {}", line.operator, line.origin, line.error);
        if self.letters.take(worker, number, || line) {
            crate::say!(
                "testudo: a record killed worker {worker} again and again and was put aside in \
                 {}: {said}",
                self.letters.path().display()
            );
            annals.note("dead-letter", worker, said);
        }
    }

    /// Whether somebody waits for a file that cannot be written at the moment.
    pub(crate) fn is_waiting(&self, plan: &Plan, scene: &Scene) -> bool {
        (0..plan.workers).any(|worker| {
            let taken = scene.orders(plan, worker).taken.load(Ordering::Relaxed);
            scene.letter(plan, worker).number() > taken
        })
    }
}
