//! A disk that fails when told to: errors, writes that stop half-way, reads that end early.
//!
//! Invariants: a failed operation gives its buffer back like any other; a failed sync was not made.
//! (What a failed sync means for the bytes, [`super::Memory::fail_syncs`] models.)
//!
//! Called by tests, around any other disk.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::{BLOCK, Disk, Done, Op, Outcome, Pool, Ticket};

/// Tickets of operations that never reach the disk inside have this bit.
const OURS: u64 = 1 << 63;

/// What an operation meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Fails with this number, for example `libc::EIO`. Nothing is changed.
    Error(i32),
    /// So many blocks are written, then the operation fails with `ENOSPC`. A read ends after so
    /// many blocks, as at a file's end. Other operations are as usual.
    Short(usize),
}

/// A fault to come.
#[derive(Debug, Clone, Copy)]
struct Fault {
    on: &'static str,
    /// Matching operations still to pass.
    after: u64,
    what: What,
}

/// A disk that fails when told to.
#[derive(Debug)]
pub struct Faulty<D> {
    disk: D,
    faults: Vec<Fault>,
    /// Draws a failure for one operation in so many.
    chance: Option<(u64, u64)>,
    submitted: u64,
    ready: Vec<Done>,
    /// Writes that were cut short, and what to say about them.
    cut: HashMap<Ticket, i32>,
    injected: u64,
}

impl<D: Disk> Faulty<D> {
    /// A disk that works, until told otherwise.
    pub fn new(disk: D) -> Self {
        let (faults, ready, cut) = (Vec::new(), Vec::new(), HashMap::new());
        Self { disk, faults, chance: None, submitted: 0, ready, cut, injected: 0 }
    }

    /// The `n`-th (from 0, counted from now) operation of this kind ([`Op::doing`]; "any" for all)
    /// meets this, once.
    pub fn fail(&mut self, on: &'static str, n: u64, what: What) {
        self.faults.push(Fault { on, after: n, what });
    }

    /// One operation in so many, by chance, fails with EIO or ENOSPC, or stops half-way.
    pub fn fail_by_chance(&mut self, seed: u64, one_in: u64) {
        self.chance = Some((seed | 1, one_in.max(1)));
    }

    /// Operations that were made to fail.
    pub fn injected(&self) -> u64 {
        self.injected
    }

    /// The disk inside.
    pub fn inner(&self) -> &D {
        &self.disk
    }

    /// The fault that an operation meets.
    fn fault(&mut self, op: &Op) -> Option<What> {
        let doing = op.doing();
        let mut met = None;
        self.faults.retain_mut(|fault| {
            if met.is_some() || (fault.on != "any" && fault.on != doing) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            met = Some(fault.what);
            false
        });
        met.or_else(|| self.drawn())
    }

    fn drawn(&mut self) -> Option<What> {
        let (state, one_in) = self.chance.as_mut()?;
        // Xorshift: any seed but zero.
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        let drawn = *state >> 8;
        let kinds = [What::Error(libc::EIO), What::Error(libc::ENOSPC), What::Short(1)];
        drawn.is_multiple_of(*one_in).then(|| kinds[(drawn / *one_in % 3) as usize])
    }

    fn refuse(&mut self, op: Op, code: i32) -> Ticket {
        self.submitted += 1;
        let ticket = Ticket(OURS | self.submitted);
        let result = Err(io::Error::from_raw_os_error(code));
        self.ready.push(Done { ticket, result, buffer: op.into_buffer() });
        ticket
    }

    /// Submits the first blocks of a transfer only.
    fn shorten(&mut self, op: Op, blocks: usize) -> Result<Ticket, Op> {
        let short = |bytes: usize| (blocks * BLOCK).min(bytes);
        match op {
            Op::Write { bytes, .. } | Op::Read { bytes, .. } if short(bytes) == bytes => {
                self.disk.submit(op)
            }
            Op::Write { file, at, buffer, bytes } if blocks > 0 => {
                let op = Op::Write { file, at, buffer, bytes: short(bytes) };
                let ticket = self.disk.submit(op).map_err(|op| restored(op, bytes))?;
                self.cut.insert(ticket, libc::ENOSPC);
                Ok(ticket)
            }
            Op::Read { file, at, buffer, bytes } if blocks > 0 => {
                let op = Op::Read { file, at, buffer, bytes: short(bytes) };
                self.disk.submit(op).map_err(|op| restored(op, bytes))
            }
            Op::Write { .. } => Ok(self.refuse(op, libc::ENOSPC)),
            Op::Read { buffer, .. } => {
                self.submitted += 1;
                let ticket = Ticket(OURS | self.submitted);
                let (result, buffer) = (Ok(Outcome::Read(0)), Some(buffer));
                self.ready.push(Done { ticket, result, buffer });
                Ok(ticket)
            }
            other => self.disk.submit(other),
        }
    }
}

/// A transfer with its own length again.
fn restored(op: Op, bytes: usize) -> Op {
    match op {
        Op::Write { file, at, buffer, .. } => Op::Write { file, at, buffer, bytes },
        Op::Read { file, at, buffer, .. } => Op::Read { file, at, buffer, bytes },
        other => other,
    }
}

impl<D: Disk> Disk for Faulty<D> {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        op.check();
        match self.fault(&op) {
            None => self.disk.submit(op),
            Some(what) => {
                self.injected += 1;
                match what {
                    What::Error(code) => Ok(self.refuse(op, code)),
                    What::Short(blocks) => self.shorten(op, blocks),
                }
            }
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.ready);
        let before = done.len();
        self.disk.poll(done);
        for done in &mut done[before..] {
            if let Some(code) = self.cut.remove(&done.ticket) {
                done.result = Err(io::Error::from_raw_os_error(code));
            }
        }
    }

    fn wait(&mut self, patience: Duration) {
        if self.ready.is_empty() {
            self.disk.wait(patience);
        }
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight() + self.ready.len()
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
