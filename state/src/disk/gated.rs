//! A disk in front of which somebody stands: each operation passes, fails, or waits until it may
//! pass. For outages that are to begin and end while a job runs.
//!
//! Invariants: operations keep their order: behind one that waits, all wait; one that failed gives
//! its buffer back like any other.
//!
//! Called by the runtime's tests of outages, around the disk of a worker or of the launching
//! process.

use super::{Disk, Done, FileId, Op, Outcome, Pool, Ticket};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Pass,
    /// It fails with this number of the operating system.
    Fail(i32),
    /// It waits, and is judged again.
    Wait,
}

/// Judges an operation on a file by its name.
type Judge = Box<dyn FnMut(&Path) -> Verdict>;

/// See the module.
pub struct Gated {
    disk: Box<dyn Disk>,
    judge: Judge,
    waiting: VecDeque<(Ticket, Op)>,
    ready: Vec<Done>,
    submitted: u64,
    /// Our tickets by the disk's.
    tickets: HashMap<Ticket, Ticket>,
    /// Names of files that are being opened, and that are open.
    opening: HashMap<Ticket, PathBuf>,
    names: HashMap<FileId, PathBuf>,
}

impl std::fmt::Debug for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gated({}, {} waiting)", self.disk.kind(), self.waiting.len())
    }
}

impl Gated {
    /// Puts a judge in front of a disk.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, judge: impl FnMut(&Path) -> Verdict + 'static) -> Self {
        Self {
            disk,
            judge: Box::new(judge),
            waiting: VecDeque::new(),
            ready: Vec::new(),
            submitted: 0,
            tickets: HashMap::new(),
            opening: HashMap::new(),
            names: HashMap::new(),
        }
    }

    fn name(&self, op: &Op) -> Option<PathBuf> {
        match op {
            Op::Create { path } | Op::Open { path } | Op::Edit { path } => Some(path.clone()),
            Op::SyncDir { path } | Op::Remove { path } => Some(path.clone()),
            Op::Rename { to, .. } => Some(to.clone()),
            Op::Reserve { file, .. } | Op::Write { file, .. } | Op::Sync { file } => {
                self.names.get(file).cloned()
            }
            // What is read, and what only gives something back, is never in the way.
            Op::Read { .. } | Op::SyncFd { .. } | Op::Close { .. } => None,
        }
    }

    /// Lets those in front pass, as far as they may.
    fn advance(&mut self) {
        while let Some((ticket, op)) = self.waiting.pop_front() {
            let name = self.name(&op);
            let verdict = name.as_ref().map_or(Verdict::Pass, |name| (self.judge)(name));
            match verdict {
                Verdict::Wait => return self.waiting.push_front((ticket, op)),
                Verdict::Fail(code) => {
                    let result = Err(io::Error::from_raw_os_error(code));
                    self.ready.push(Done { ticket, result, buffer: op.into_buffer() });
                }
                Verdict::Pass => {
                    let opens = matches!(op, Op::Create { .. } | Op::Open { .. } | Op::Edit { .. });
                    match self.disk.submit(op) {
                        Ok(inner) => {
                            self.tickets.insert(inner, ticket);
                            if let (true, Some(name)) = (opens, name) {
                                self.opening.insert(inner, name);
                            }
                        }
                        Err(op) => return self.waiting.push_front((ticket, op)),
                    }
                }
            }
        }
    }
}

impl Disk for Gated {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        op.check();
        if self.in_flight() >= super::DEPTH_MAX {
            return Err(op);
        }
        self.submitted += 1;
        let ticket = Ticket(self.submitted);
        self.waiting.push_back((ticket, op));
        self.advance();
        Ok(ticket)
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.advance();
        done.append(&mut self.ready);
        let before = done.len();
        self.disk.poll(done);
        for done in &mut done[before..] {
            let name = self.opening.remove(&done.ticket);
            if let (Ok(Outcome::File(file)), Some(name)) = (&done.result, name) {
                self.names.insert(*file, name);
            }
            if let Some(ticket) = self.tickets.remove(&done.ticket) {
                done.ticket = ticket;
            }
        }
    }

    fn wait(&mut self, patience: Duration) {
        if !self.ready.is_empty() {
        } else if self.waiting.is_empty() {
            self.disk.wait(patience);
        } else {
            std::thread::sleep(patience.min(Duration::from_millis(1)));
        }
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight() + self.waiting.len() + self.ready.len()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        self.disk.list(folder)
    }

    fn kind(&self) -> &'static str {
        self.disk.kind()
    }

    fn register(&mut self, pool: &Pool) -> bool {
        self.disk.register(pool)
    }
}
