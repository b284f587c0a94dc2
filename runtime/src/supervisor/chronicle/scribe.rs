//! Writes the chronicle, by comparing what there is with what was noted; and reads it back into
//! what a supervisor begins with that follows another.
//!
//! Called by `launch` and by `adopt`.

use super::{Chronicle, Note};
use crate::checkpoint::history::{Record, State};
use crate::checkpoint::schedule::Schedule;
use crate::control::socket::Kept;
use crate::supervisor::checkpoint::Checkpointer;
use crate::supervisor::console::Ends;
use crate::supervisor::ladder::Account;
use crate::supervisor::recover::Crew;
use crate::supervisor::report::Restart;
use std::collections::HashMap;
use std::os::fd::RawFd;

/// What was noted of a job so far.
#[derive(Debug)]
pub(crate) struct Scribe {
    chronicle: Chronicle,
    begun_ns: u64,
    /// Restarts noted, and those of them of which more may be known later.
    restarts: usize,
    unfinished: Vec<usize>,
    /// The newest checkpoint noted, and whether it was open then.
    newest: (u64, bool),
    schedule: Option<Schedule>,
    is_pausing: bool,
}

impl Scribe {
    /// A scribe for a job that begins.
    pub(crate) fn new(chronicle: Chronicle, begun_ns: u64) -> Self {
        let (restarts, unfinished, newest) = (0, Vec::new(), (0, false));
        let (schedule, is_pausing) = (None, false);
        Self { chronicle, begun_ns, restarts, unfinished, newest, schedule, is_pausing }
    }

    /// A scribe that goes on where an earlier one stopped.
    pub(crate) fn go_on(chronicle: Chronicle, past: &Past) -> Self {
        let mut this = Self::new(chronicle, past.begun_ns);
        this.restarts = past.restarts.len();
        this.unfinished = (0..this.restarts).filter(|n| !is_finished(&past.restarts[*n])).collect();
        if let Some(record) = past.records.last() {
            this.newest = (record.id, record.state == State::Open);
        }
        this.schedule = past.schedule.clone();
        this
    }

    /// When the job began, by the monotonic clock.
    pub(crate) fn begun_ns(&self) -> u64 {
        self.begun_ns
    }

    /// The chronicle's descriptor, for the keeper.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.chronicle.fd()
    }

    /// The job begins.
    pub(crate) fn begin(&mut self, locks: &[RawFd], console: Option<Ends>, metrics: Option<RawFd>) {
        let (ns, locks) = (self.begun_ns, locks.to_vec());
        self.chronicle.note(&Note::Begun { ns, locks, console, metrics });
    }

    /// The job has a control socket.
    pub(crate) fn note_socket(&mut self, socket: Option<Kept>) {
        if let Some(socket) = socket {
            self.chronicle.note(&Note::Socket(socket));
        }
    }

    /// Notes what is new.
    pub(crate) fn look(&mut self, crew: &Crew<'_>, checkpoints: Option<&Checkpointer>) {
        let mut changed: Vec<usize> = Vec::new();
        self.unfinished.retain(|number| {
            let is_finished = is_finished(&crew.restarts[*number]);
            changed.extend(is_finished.then_some(*number));
            !is_finished
        });
        for number in self.restarts..crew.restarts.len() {
            changed.push(number);
            if !is_finished(&crew.restarts[number]) {
                self.unfinished.push(number);
            }
        }
        self.restarts = crew.restarts.len();
        for number in changed {
            let restart = crew.restarts[number].clone();
            let (commits, account) = crew.account(restart.worker);
            self.chronicle.note(&Note::Restart { number, restart, commits, account });
        }
        if let Some(checkpoints) = checkpoints {
            self.look_at(checkpoints);
        }
    }

    fn look_at(&mut self, checkpoints: &Checkpointer) {
        let records = checkpoints.history().records();
        for record in records {
            let now = (record.id, record.state == State::Open);
            if now.0 > self.newest.0 || (now.0 == self.newest.0 && now.1 != self.newest.1) {
                self.chronicle.note(&Note::Checkpoint(record.clone()));
                self.newest = now;
            }
        }
        if self.schedule.as_ref() != Some(checkpoints.schedule()) {
            self.schedule = Some(checkpoints.schedule().clone());
            self.chronicle.note(&Note::Schedule(checkpoints.schedule().clone()));
        }
        if self.is_pausing != checkpoints.is_pausing() {
            self.is_pausing = checkpoints.is_pausing();
            self.chronicle.note(&Note::Pausing(self.is_pausing));
        }
    }
}

/// Nothing more will be known about a restart.
fn is_finished(restart: &Restart) -> bool {
    restart.recovery_us.is_some() && !restart.cause.is_empty()
}

/// What an earlier supervisor knew.
#[derive(Debug, Default)]
pub(crate) struct Past {
    pub(crate) begun_ns: u64,
    pub(crate) locks: Vec<RawFd>,
    pub(crate) console: Option<Ends>,
    pub(crate) metrics: Option<RawFd>,
    pub(crate) socket: Option<Kept>,
    pub(crate) restarts: Vec<Restart>,
    /// By worker: its commits at its latest death, and how its deaths count.
    pub(crate) accounts: HashMap<usize, (u64, Account)>,
    /// One for each checkpoint, as it was last noted.
    pub(crate) records: Vec<Record>,
    pub(crate) schedule: Option<Schedule>,
    pub(crate) is_pausing: bool,
}

impl Past {
    /// Puts notes together.
    pub(crate) fn of(notes: Vec<Note>) -> Self {
        let mut past = Self::default();
        for note in notes {
            match note {
                Note::Begun { ns, locks, console, metrics } => {
                    (past.begun_ns, past.locks) = (ns, locks);
                    (past.console, past.metrics) = (console, metrics);
                }
                Note::Socket(socket) => past.socket = Some(socket),
                Note::Restart { number, restart, commits, account } => {
                    past.accounts.insert(restart.worker, (commits, account));
                    if number < past.restarts.len() {
                        past.restarts[number] = restart;
                    } else {
                        past.restarts.push(restart);
                    }
                }
                Note::Checkpoint(record) => {
                    past.records.retain(|known| known.id != record.id);
                    past.records.push(record);
                }
                Note::Schedule(schedule) => past.schedule = Some(schedule),
                Note::Pausing(is_pausing) => past.is_pausing = is_pausing,
            }
        }
        past
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::history::Kind;
    use crate::config::RestartBudget;
    use crate::supervisor::ladder::{Ladder, Rungs};

    fn restart(worker: usize, cause: &str) -> Restart {
        Restart { worker, life: 1, pid: 7, cause: cause.into(), seen_ns: 1, ..Restart::default() }
    }

    #[test]
    fn the_latest_note_on_a_thing_counts() {
        let record = |state| Record {
            id: 3,
            kind: Kind::Regional,
            begun_unix_ms: 0,
            regions_ok: 0,
            regions_failed: 0,
            duration_us: 0,
            measure: Default::default(),
            state,
        };
        let ladder = Ladder::new(RestartBudget { deaths: 8, period: None }, Rungs::default());
        let note = |number, restart, commits| {
            let account = ladder.account();
            Note::Restart { number, restart, commits, account }
        };
        let past = Past::of(vec![
            Note::Begun { ns: 9, locks: vec![70], console: None, metrics: None },
            note(0, restart(1, ""), 5),
            note(1, restart(0, ""), 5),
            note(0, restart(1, "SIGKILL"), 6),
            Note::Checkpoint(record(State::Open)),
            Note::Checkpoint(record(State::Complete)),
            Note::Schedule(Schedule::Never),
            Note::Pausing(true),
            Note::Pausing(false),
        ]);
        assert_eq!((past.begun_ns, past.locks.as_slice()), (9, [70].as_slice()));
        assert_eq!(past.restarts.len(), 2);
        assert_eq!(past.restarts[0].cause, "SIGKILL");
        assert_eq!(past.accounts[&1].0, 6);
        assert_eq!(past.records.len(), 1);
        assert_eq!(past.records[0].state, State::Complete);
        assert_eq!((past.schedule, past.is_pausing), (Some(Schedule::Never), false));
    }
}
