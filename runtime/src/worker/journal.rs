//! The journal: what a worker of tier 1 tells its replica of every step that it commits, so that
//! this can do the same (R21).
//!
//! ```text
//! words of an entry
//!   how many | step | monotonic clock | bits | turn of the inputs
//!   for each input ring     its tail, as looked at
//!   for each output ring    its consumer's head and its limit, as known when the step began
//!   for each input ring     where it stands after the step
//!   for each output ring    heads that were looked at in the step; where it stands after it
//!   checksum of changes | a piece of state and its checksum | readings of the sources | of the
//!   clock of the day
//! ```
//!
//! Everything else that a step does follows from these and from what was before. The step's result
//! is in the entry as well: it is what the replica compares with.
//!
//! A replica begins with a copy of the state. For that the worker stands still between two steps,
//! [`STAND_NS`] at most.
//!
//! Invariants:
//! - an entry is written after its step is committed: a replica knows of no step that is undone;
//! - what a replica has still to read of an input ring is not given back to the producer;
//! - the worker never waits long: a replica that does not get on for [`BEHIND_NS`] is left behind,
//!   and is told so before anything that it had still to read is given back.
//!
//! Called by the step loop. Costs one comparison a step while no replica follows, and nothing
//! where the worker has another tier.

use super::context::{Cx, InRing};
use super::tape::Mode;
use crate::time::{now_ns, step as clock};
use testudo_shm::follow::{Follower, Journal, Parting};
use testudo_shm::primitive::Ordering;
use testudo_shm::txn::{Place, Txn};
use testudo_state::group::USED_AT;

/// Longest time that the worker stands still to be copied.
const STAND_NS: u64 = 250_000_000;

/// Longest time in which a replica that has something to read may read nothing.
const BEHIND_NS: u64 = 100_000_000;

/// Changes of a step that are compared.
pub(crate) const CHANGES: usize = 8;

/// Steps between two pieces of state that are compared.
const STEPS: u32 = 32;

/// Bytes of such a piece.
const PIECE: u64 = 16 << 10;

/// Bits of an entry.
pub(crate) mod bits {
    pub(crate) const DRAINING: u64 = 1;
    pub(crate) const PAUSING: u64 = 2;
    /// Pages of freed blocks were given back since the step before.
    pub(crate) const GAVE_BACK: u64 = 4;
    /// The number of records that one input may give stands above these.
    pub(crate) const TURN_SHIFT: u64 = 8;
}

/// Goes round all key groups of a worker, a piece at a time.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// Arena offsets.
    groups: Vec<u64>,
    group: usize,
    at: u64,
}

impl Pieces {
    pub(crate) fn new(groups: Vec<u64>) -> Self {
        Self { groups, group: 0, at: 0 }
    }

    /// The next piece: offset and bytes; no bytes where there is nothing.
    fn next(&mut self, txn: &Txn) -> (u64, u64) {
        let Some(&group) = self.groups.get(self.group) else {
            (self.group, self.at) = (0, 0);
            return (0, 0);
        };
        let used: Place<u64> = txn.place(group + USED_AT);
        let used = txn.get(used);
        let (at, bytes) = (self.at, PIECE.min(used.saturating_sub(self.at)));
        self.at += bytes;
        if self.at >= used {
            (self.group, self.at) = (self.group + 1, 0);
        }
        (group + at, bytes)
    }
}

/// The worker's side.
#[derive(Debug)]
pub(crate) struct Leading {
    journal: Journal,
    follower: Follower,
    pieces: Pieces,
    /// The replica that is written for; 0 for none.
    wish: u64,
    /// The latest wish that was seen to.
    seen: u64,
    /// Words written.
    tail: u64,
    /// Where the replica was last found, and since when.
    read: u64,
    read_ns: u64,
    /// Bits of the next entry that gather over steps which do nothing.
    gathered: u64,
    steps: u32,
    digest: u64,
    entry: Vec<u64>,
    /// A replica was left, and what it had still to read is not given back yet.
    owes: bool,
}

/// Looks at a replica that copies between two at whether it lives.
const LOOKS: u32 = 1000;

/// Whether a process is there and has not died.
#[cold]
fn is_there(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The input rings that a replica has as well.
pub(crate) fn inputs(cx: &Cx) -> impl Iterator<Item = &InRing> {
    cx.in_rings.iter().filter(|input| input.rest.is_none())
}

impl Leading {
    /// A predecessor's replica, if there is one, is left: what it had still to read may go.
    pub(crate) fn new(journal: Journal, follower: Follower, pieces: Pieces) -> Self {
        journal.leave(Parting::None);
        Self {
            journal,
            follower,
            pieces,
            wish: 0,
            // Who made it may be this process, or gone; who is there makes another.
            seen: follower.header().wish.load(Ordering::Acquire),
            tail: journal.tail(),
            read: 0,
            read_ns: 0,
            gathered: 0,
            steps: 0,
            digest: 0,
            entry: Vec::new(),
            owes: false,
        }
    }

    /// Between two steps: whether a replica wants to be let in.
    #[inline]
    pub(crate) fn is_asked(&self) -> bool {
        self.follower.header().wish.load(Ordering::Acquire) != self.seen
    }

    /// Whether a replica follows.
    #[inline]
    pub(crate) fn is_followed(&self) -> bool {
        self.wish != 0
    }

    /// Stands still until the replica has its copy, or for as long as it may take. `is_over`: the
    /// worker is to leave.
    #[cold]
    pub(crate) fn stand_still(&mut self, cx: &mut Cx, is_over: impl Fn() -> bool) {
        self.part(cx, Parting::None);
        let words = self.follower.header();
        let wish = words.wish.load(Ordering::Acquire);
        self.seen = wish;
        let (header, begun, mut looks) = (self.journal.header(), now_ns(), 0u32);
        header.parting.store(Parting::None as u64, Ordering::Relaxed);
        header.begin.store(self.tail, Ordering::Relaxed);
        header.granted.store(wish, Ordering::Release);
        while words.copied.load(Ordering::Acquire) != wish {
            let is_late = now_ns() - begun > STAND_NS;
            let is_other = words.wish.load(Ordering::Relaxed) != wish;
            let pid = words.pid.load(Ordering::Relaxed);
            looks += 1;
            let is_gone = looks.is_multiple_of(LOOKS) && !is_there(pid);
            if is_late || is_other || is_gone || is_over() {
                return self.journal.leave(if is_late { Parting::Large } else { Parting::None });
            }
            std::thread::yield_now();
        }
        header.stood_ns.store(now_ns() - begun, Ordering::Relaxed);
        (self.wish, self.read, self.read_ns) = (wish, self.tail, now_ns());
        (self.gathered, self.steps) = (0, 0);
        cx.tape.mode = Mode::Note;
        // A process that has just begun, as the replica, does not know which marks were sent, nor
        // whose turn it is among the lanes of an exchange.
        cx.beginnings += 1;
        let mut heads = 0..;
        for input in cx.in_rings.iter_mut().filter(|input| input.rest.is_none()) {
            input.follower = heads.next().map(|ring| self.follower.head(ring));
        }
        header.active.store(wish, Ordering::SeqCst);
        header.granted.store(0, Ordering::Relaxed);
    }

    /// Goes on without a replica.
    #[cold]
    pub(crate) fn part(&mut self, cx: &mut Cx, why: Parting) {
        if self.wish == 0 {
            return;
        }
        (self.wish, self.owes) = (0, true);
        if why == Parting::Behind {
            self.journal.header().left_behind.fetch_add(1, Ordering::Relaxed);
        }
        self.journal.leave(why);
        cx.tape.mode = Mode::Off;
        cx.tape.clear();
        for input in &mut cx.in_rings {
            input.follower = None;
        }
        for out in &mut cx.out_rings {
            out.ring.forget_heads();
        }
        clock::look_oneself();
    }

    /// Whether something is to be given back that no replica has read: it need not any more.
    #[inline]
    pub(crate) fn settles(&mut self) -> bool {
        std::mem::take(&mut self.owes)
    }

    /// Between two steps, while a replica follows: whether it still does.
    #[inline]
    pub(crate) fn look(&mut self, cx: &mut Cx) {
        let header = self.follower.header();
        if header.copied.load(Ordering::Relaxed) != self.wish {
            // It has left by itself.
            return self.part(cx, Parting::None);
        }
        let read = header.read.load(Ordering::Acquire);
        if read != self.read || read == self.tail {
            (self.read, self.read_ns) = (read, cx.now_ns);
        } else if cx.now_ns.saturating_sub(self.read_ns) > BEHIND_NS {
            self.part(cx, Parting::Behind);
        }
    }

    /// Begins a step's entry. `gives_back`: pages of freed blocks were given back.
    #[inline]
    pub(crate) fn begin(&mut self, cx: &mut Cx, gives_back: bool) {
        cx.tape.clear();
        clock::note();
        if gives_back {
            self.gathered |= bits::GAVE_BACK;
        }
        let mut bits = self.gathered | (cx.turn as u64) << bits::TURN_SHIFT;
        if cx.draining {
            bits |= bits::DRAINING;
        }
        if cx.pausing {
            bits |= bits::PAUSING;
        }
        self.entry.clear();
        self.entry.extend([0, 0, cx.now_ns, bits, cx.rotation as u64]);
        let tails = inputs(cx).map(|input| input.ring.as_ref().map_or(0, |ring| ring.seen()));
        self.entry.extend(tails);
        for out in &mut cx.out_rings {
            let seen = out.ring.note_heads();
            self.entry.extend([seen, out.limit]);
        }
    }

    /// The stages have run.
    #[inline]
    pub(crate) fn processed(&mut self, cx: &Cx) {
        self.digest = cx.txn.digest(CHANGES);
    }

    /// The step is committed; it was number `step`.
    #[inline]
    pub(crate) fn end(&mut self, cx: &mut Cx, step: u64) {
        self.gathered = 0;
        self.entry.extend(inputs(cx).flat_map(InRing::position));
        for out in &cx.out_rings {
            let heads = out.ring.noted_heads();
            self.entry.push(heads.len() as u64);
            self.entry.extend(heads);
            self.entry.push(out.ring.position());
        }
        self.steps += 1;
        let (at, bytes) = if self.steps < STEPS { (0, 0) } else { self.pieces.next(&cx.txn) };
        if bytes > 0 {
            self.steps = 0;
        }
        let piece = cx.txn.checksum(at, bytes);
        self.entry.extend([self.digest, at, bytes, piece, cx.tape.words.len() as u64]);
        self.entry.extend(&cx.tape.words);
        clock::noted(|times| self.entry.extend(times));
        (self.entry[0], self.entry[1]) = (self.entry.len() as u64, step);
        if self.has_room(cx) {
            for (position, word) in (self.tail..).zip(&self.entry) {
                self.journal.put(position, *word);
            }
            self.tail += self.entry.len() as u64;
            self.journal.publish(self.tail);
        }
    }

    /// Waits for room, but not long; false when the replica was left.
    #[inline]
    fn has_room(&mut self, cx: &mut Cx) -> bool {
        let words = self.entry.len() as u64;
        let fits = |read: u64, tail: u64| tail + words - read.min(tail) <= self.journal.capacity();
        if fits(self.read, self.tail) {
            return true;
        }
        self.wait_for_room(cx, words)
    }

    #[cold]
    fn wait_for_room(&mut self, cx: &mut Cx, words: u64) -> bool {
        let mut since = now_ns();
        loop {
            let read = self.follower.header().read.load(Ordering::Acquire);
            // What cannot be true is no replica's position.
            let is_sound = read >= self.read && read <= self.tail;
            if read != self.read && is_sound {
                (self.read, self.read_ns) = (read, cx.now_ns);
                since = now_ns();
            }
            if self.tail + words - self.read <= self.journal.capacity() {
                return true;
            }
            if !is_sound || now_ns() - since > BEHIND_NS || words > self.journal.capacity() {
                self.part(cx, Parting::Behind);
                return false;
            }
            std::thread::yield_now();
        }
    }
}
