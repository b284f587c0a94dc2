//! Standing by: a process that has mapped what its workers have, to be read, and sleeps on a death
//! word of each (R1). When one dies it takes over at once, with nobody in between.
//!
//! ```text
//! map read-only, bring in what attaching reads ── ready ── sleep on the death words
//!   a word says died: kill the whole dead process, see that none of its threads runs on (R2)
//!   make the header's page writable ── claim ── keep what the dead left ── make the rest writable
//!   attach as every successor does: roll back, open, publish, ring bells
//!   between later steps: give back what was mapped of the other workers
//! ```
//!
//! Invariants:
//! - until the word says died, nothing of a worker's is writable here; until the claim is won, only
//!   the page that it stands on;
//! - a claim that somebody else won sends it back to sleep: no two successors (R2);
//! - what it maps of state is not brought in: making a mapping writable that has pages in the page
//!   tables costs 100 ns a page and 9 µs for each mapping, more than the first touches of the few
//!   pages that a first step needs. Of each group's first page, which attaching reads, there is a
//!   second mapping that stays read-only;
//! - a worker that gave up ([`WorkerState::Failed`]) is left to the supervisor: its successor would
//!   give up as well.
//!
//! Called by `entry` with a role that has a seat; `attach` goes on.

#![expect(unsafe_code, reason = "inherited descriptors, pages of workers, signals")]

use super::attach::{Mapped, held_groups};
use super::copy::{Copy, Originals};
use super::entry::Role;
use super::replica;
use super::warm::{self, Fronts};
use crate::config::Idle;
use crate::error::Error;
use crate::flow::Flow;
use crate::plan::Plan;
use crate::plan::layout::{JOURNAL_BYTES, stride};
use crate::supervisor::description::Description;
use crate::supervisor::remains;
use crate::testing::{Point, arm, point};
use crate::time::now_ns;
use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::death::{self, ClaimError, STANDBY};
use testudo_shm::header::{self, ControlHeader, WorkerHeader, WorkerState, control};
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::segment::{PAGE, Segment};
use testudo_shm::standby::{Seat, Standby, State};
use testudo_shm::wait::{WaitWord, has_wait_any, wait_any};

/// Longest sleep where the kernel can wait on one word only.
const LOOK: Duration = Duration::from_millis(2);

/// Longest sleep of all: whether there is a new supervisor is looked at now and then.
const REIGN: Duration = Duration::from_secs(1);

/// Bytes of a dead worker's segment that are kept for the supervisor.
pub(crate) fn kept_bytes(plan: &Plan) -> usize {
    remains::parts(plan).map(|part| part.len()).iter().sum()
}

/// A worker that is stood by for.
struct Charge {
    worker: usize,
    own: &'static WorkerHeader,
    process: Option<warm::Process>,
    /// A life that had ended before this standby was ready: the supervisor has started a successor.
    missed: Option<u64>,
}

impl Charge {
    /// Keeps hold of the process that is the worker now, to kill it for sure when it has died.
    fn look(&mut self) {
        let pid = self.own.pid.load(Ordering::Acquire);
        if pid != 0 && self.process.as_ref().is_none_or(|process| process.pid != pid) {
            self.process = warm::Process::open(pid);
        }
    }

    /// Whether it died and is not to be left to the supervisor.
    fn is_to_be_taken(&self) -> bool {
        death::is_dead(&self.own.death[STANDBY].word)
            && death::is_dead(&self.own.claim.word)
            && self.own.state.load(Ordering::Acquire) != WorkerState::Failed as u32
            && self.missed != Some(self.own.incarnation.load(Ordering::Acquire))
    }
}

/// Something that is mapped of a worker that somebody else is.
struct Leftover {
    arena: &'static Arena,
    at: usize,
    len: usize,
    /// What is mapped there instead, to be read: the descriptor, and where the range begins in it.
    instead: Option<(Rc<OwnedFd>, usize)>,
}

/// What a standby has that a worker needs no more: given back piece by piece, between its steps.
#[derive(Default)]
pub(crate) struct Leftovers {
    ranges: Vec<Leftover>,
    /// Descriptors and small mappings.
    held: Option<Box<dyn Any>>,
}

impl Leftovers {
    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.held.is_none()
    }

    /// Gives one piece back. A range that the kernel does not take back stays readable.
    #[cold]
    pub(crate) fn give_back(&mut self) {
        let Some(Leftover { arena, at, len, instead }) = self.ranges.pop() else {
            self.held = None;
            return;
        };
        let _ = match instead {
            Some((fd, from)) => arena.map(fd.as_fd(), from, len, at, Access::Peer),
            None => arena.forget(at, len),
        };
    }
}

/// All that a standby has mapped.
pub(super) struct Stand<'a> {
    pub(super) plan: &'a Plan,
    pub(super) arena: &'static Arena,
    /// How its worker waits.
    pub(super) idle: Idle,
    /// The supervisor's segment.
    control: Segment,
    /// A replica has its worker's segment, to copy it.
    own: Option<OwnedFd>,
    /// What it copied, while it becomes the worker.
    pub(super) copy: Option<Copy>,
    /// Read-only descriptors of the workers' segments.
    peers: HashMap<usize, Rc<OwnedFd>>,
    /// Group segments by worker and arena offset, where the job takes checkpoints.
    files: Vec<(usize, usize, OwnedFd)>,
    charges: Vec<Charge>,
    /// What there is to give back, for each worker that may be taken.
    leftovers: Vec<Vec<Leftover>>,
    page: Standby,
    fronts: Fronts,
}

/// Maps, says so, and sleeps until a worker is to be taken over. Gives the role that this process
/// has from then on, with its segment claimed and writable.
pub(super) fn inherit(
    seat: Seat,
    role: Role,
    description: &Description,
    segment: Segment,
    plan: &Plan,
    again: &dyn Fn() -> Flow,
) -> Result<(Role, Mapped), Error> {
    let mut stand = Stand::new(seat, description, segment, plan)?;
    warm::code();
    warm::memory();
    super::dying::prepare();
    crate::keeper::own_start();
    // SAFETY: the front of the control segment was mapped just now and stays so.
    let head = unsafe {
        header::at::<ControlHeader>(stand.arena.at(plan.layout.segments[plan.supervisor()].at))
    };
    for charge in &mut stand.charges {
        charge.look();
        let is_over = death::is_dead(&charge.own.death[STANDBY].word);
        charge.missed = is_over.then(|| charge.own.incarnation.load(Ordering::Acquire));
    }
    stand.page.set(State::Ready);
    // A supervisor that does not know of this standby has standbys of its own.
    let is_over = || {
        let reign = head.reign.load(Ordering::Acquire);
        let is_stale = role.tie.is_some_and(|tie| tie.reign != reign);
        is_stale || head.control.load(Ordering::Acquire) & control::LEAVE != 0
    };
    let mut until_ns = u64::MAX;
    if stand.is_replica() {
        let rest = replica::follow(&mut stand, description, &again(), &is_over)?;
        until_ns = rest.map_or(u64::MAX, |rest| now_ns() + rest.as_nanos() as u64);
    }
    // Asleep it takes nothing from anybody; awake it must not wait for a turn. Given up after the
    // first step.
    crate::haste::ahead();
    let patience = if has_wait_any() { REIGN } else { LOOK };
    loop {
        let bell = head.bell.load(Ordering::Acquire);
        if is_over() || now_ns() > until_ns {
            std::process::exit(0);
        }
        let words: Vec<u32> = stand
            .charges
            .iter()
            .map(|c| c.own.death[STANDBY].word.load(Ordering::Acquire))
            .collect();
        for index in 0..stand.charges.len() {
            if stand.charges[index].is_to_be_taken() && stand.takes(index)? {
                let worker = stand.charges[index].worker;
                name(worker);
                let role = Role { worker, standby: None, ..role };
                return Ok((role, stand.mapped(index, head)));
            }
            stand.charges[index].look();
        }
        stand.page.set(State::Ready);
        let death = |(charge, value): (&Charge, u32)| WaitWord {
            word: &charge.own.death[STANDBY].word,
            value,
        };
        let mut words: Vec<_> = stand.charges.iter().zip(words).map(death).collect();
        words.push(WaitWord { word: &head.bell, value: bell });
        wait_any(&words, Some(patience));
        stand.page.note_woken(now_ns());
    }
}

/// The name that ps and top show.
fn name(worker: usize) {
    let name = std::ffi::CString::new(format!("testudo-w{worker}")).unwrap_or_default();
    // SAFETY: a plain system call; name outlives it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

impl<'a> Stand<'a> {
    fn new(
        seat: Seat,
        description: &Description,
        control: Segment,
        plan: &'a Plan,
    ) -> Result<Self, Error> {
        let charge = plan.standbys(&description.settings).swap_remove(seat.index);
        // SAFETY: the supervisor left this descriptor open for us; it is taken once.
        let page = Standby::adopt(unsafe { OwnedFd::from_raw_fd(seat.fd) }, kept_bytes(plan))?;
        // The arena lives as long as the process: ring ends and places point into it.
        let arena: &'static Arena =
            Box::leak(Box::new(Arena::reserve(plan.layout.reserved_bytes)?));
        let mut peers = HashMap::new();
        let mut owners: HashMap<usize, OwnedFd> = HashMap::new();
        for (process, fds) in description.segments.iter().enumerate() {
            // SAFETY: as above; writable ones were left open for the workers in question alone.
            unsafe {
                peers.insert(process, Rc::new(OwnedFd::from_raw_fd(fds.peer)));
                if charge.contains(&process) {
                    owners.insert(process, OwnedFd::from_raw_fd(fds.owner));
                }
            }
        }
        let charges = charge
            .iter()
            .map(|&worker| Charge {
                worker,
                // SAFETY: mapped below, before anybody looks, and for good.
                own: unsafe { header::at(arena.at(plan.layout.segments[worker].at)) },
                process: None,
                missed: None,
            })
            .collect();
        let idle = description.settings.idle;
        let mut this = Self {
            plan,
            arena,
            idle,
            control,
            own: None,
            copy: None,
            peers,
            files: Vec::new(),
            charges,
            leftovers: Vec::new(),
            page,
            fronts: Fronts::reserve(plan.layout.groups.iter().map(|laid| laid.groups).sum())?,
        };
        this.map_segments(&owners, description.settings.huge_pages)?;
        this.map_groups(description, &charge)?;
        this.leftovers = charge.iter().map(|worker| this.leftovers(*worker)).collect();
        if this.is_replica() {
            this.map_follow(description)?;
            this.own = owners.remove(&this.worker());
        }
        Ok(this)
    }

    /// Whether it follows the one worker that it stands by for.
    pub(super) fn is_replica(&self) -> bool {
        self.plan.layout.follow(self.worker()).is_some()
    }

    /// The first worker, or only one.
    pub(super) fn worker(&self) -> usize {
        self.charges[0].worker
    }

    /// Whether the first worker is to be taken over from now.
    pub(super) fn must_take(&self) -> bool {
        self.charges[0].is_to_be_taken()
    }

    /// The first worker's death was seen now.
    pub(super) fn note_death(&self) {
        self.page.note_woken(now_ns());
    }

    /// The word that says that the first worker died.
    pub(super) fn death_word(&self) -> &'static AtomicU32 {
        &self.charges[0].own.death[STANDBY].word
    }

    /// What a replica copies.
    pub(super) fn originals(&self) -> Originals<'_> {
        let own = self.own.as_ref().map_or(self.control.fd(), AsFd::as_fd);
        let (groups, peers, control) = (&self.files, &self.peers, self.control.fd());
        Originals { own, groups, peers, control }
    }

    /// Maps what a worker and its replica tell each other, as the replica has it.
    fn map_follow(&self, description: &Description) -> Result<(), Error> {
        let worker = self.worker();
        let Some(laid) = self.plan.layout.follow(worker) else { return Ok(()) };
        let found = description.follows.iter().find(|fds| fds.worker == worker);
        let fds = found.ok_or_else(|| {
            Error::Plan(format!("worker {worker} has no journal; was it of tier 1 at the start?"))
        })?;
        // SAFETY: the supervisor left both open for this process; each is taken once.
        let (journal, follower) = unsafe {
            (OwnedFd::from_raw_fd(fds.journal.owner), OwnedFd::from_raw_fd(fds.follower.owner))
        };
        self.arena.map(journal.as_fd(), 0, JOURNAL_BYTES, laid.journal, Access::Heir)?;
        let bytes = laid.follower_bytes();
        self.arena.map(follower.as_fd(), 0, bytes, laid.follower, Access::Owner)?;
        Ok(())
    }

    fn map_segments(
        &self,
        owners: &HashMap<usize, OwnedFd>,
        huge_pages: bool,
    ) -> Result<(), Error> {
        let layout = &self.plan.layout;
        let (arena, supervisor) = (self.arena, self.plan.supervisor());
        for (process, segment) in layout.segments.iter().enumerate() {
            if process == supervisor {
                arena.map(self.control.fd(), 0, segment.front, segment.at, Access::Peer)?;
                warm::data(arena, self.control.fd(), segment.front, segment.at);
            } else if let Some(fd) = owners.get(&process) {
                arena.map(fd.as_fd(), 0, segment.private_end, segment.at, Access::Heir)?;
                // The claim stands there: it becomes writable before the rest.
                arena.set_apart(segment.at, PAGE);
                // What attaching reads: the front, the cells, the log as far as a step fills it.
                let until = segment.log + crate::plan::layout::LOG_SOFT_BYTES;
                warm::data(arena, fd.as_fd(), until, segment.at);
            } else {
                let fd = self.peers[&process].as_fd();
                arena.map(fd, 0, segment.front, segment.at, Access::Peer)?;
                warm::data(arena, fd, segment.front, segment.at);
            }
        }
        let is_ours = |process| owners.contains_key(&process);
        for ring in layout.rings.iter().filter(|ring| is_ours(ring.from) || is_ours(ring.to)) {
            let (fd, access) = match owners.get(&ring.from) {
                Some(fd) => (fd.as_fd(), Access::Heir),
                None if ring.from == supervisor => (self.control.fd(), Access::Peer),
                None => (self.peers[&ring.from].as_fd(), Access::Peer),
            };
            arena.map_mirrored(fd, ring.data, ring.bytes, ring.at, access)?;
            if huge_pages {
                arena.advise_huge(ring.at, 2 * ring.bytes);
            }
        }
        Ok(())
    }

    /// Maps the groups without a gap between them, so that all of a worker's become writable by one
    /// call: what follows a segment's end faults as a gap does.
    fn map_groups(&mut self, description: &Description, charge: &[usize]) -> Result<(), Error> {
        let plan = self.plan;
        for (laid, fds) in plan.layout.groups.iter().zip(&description.groups) {
            for &worker in charge {
                for group in held_groups(plan, laid.operator, laid.groups, worker) {
                    // SAFETY: the groups of our workers were left open for us; each is taken once.
                    let fd = unsafe { OwnedFd::from_raw_fd(fds[group]) };
                    let at = laid.at + group * stride(laid.bytes);
                    self.arena.map(fd.as_fd(), 0, stride(laid.bytes), at, Access::Heir)?;
                    if description.settings.huge_pages {
                        self.arena.advise_huge(at, laid.bytes);
                    }
                    self.fronts.add(fd.as_fd(), at)?;
                    if description.checkpoints.is_some() || self.is_replica() {
                        self.files.push((worker, at, fd));
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the place of a worker that died; false when somebody else was first.
    fn takes(&mut self, index: usize) -> Result<bool, Error> {
        let charge = &self.charges[index];
        let (worker, own) = (charge.worker, charge.own);
        arm(worker, own.incarnation.load(Ordering::Acquire));
        point(Point::StandbyWoken);
        self.page.set(State::Taking(worker));
        let pid = own.pid.load(Ordering::Acquire);
        match &charge.process {
            Some(process) if process.pid == pid => process.end(),
            // It died before it was ever looked at.
            _ => warm::Process::open_dead(pid).iter().for_each(warm::Process::end),
        }
        point(Point::StandbyEnded);
        let segment = &self.plan.layout.segments[worker];
        self.arena.make_writable(segment.at, PAGE)?;
        match death::claim(own, || point(Point::Claimed)) {
            Ok(()) => {}
            Err(error @ ClaimError::NotSupported) => return Err(Error::Machine(error.to_string())),
            Err(ClaimError::Owned(_)) => {
                self.arena.make_readable(segment.at, PAGE)?;
                return Ok(false);
            }
        }
        let start = |part: &Range<usize>| self.arena.at(segment.at + part.start).cast_const();
        let parts = remains::parts(self.plan).map(|part| (start(&part), part.len()));
        // SAFETY: the front of the segment is mapped whole, and its owner was ended above.
        unsafe { self.page.keep(&parts) };
        self.page.set(State::Took(worker));
        self.make_writable(worker)?;
        point(Point::StandbyWritable);
        Ok(true)
    }

    /// What the worker goes on with, and what it gives back later.
    fn mapped(mut self, index: usize, control: &'static ControlHeader) -> Mapped {
        let Charge { worker, own, .. } = self.charges[index];
        let ranges = self.leftovers.swap_remove(index);
        let is_own = |(of, ..): &mut (usize, usize, OwnedFd)| *of == worker;
        let own_files = self.files.extract_if(.., is_own);
        let files = own_files.map(|(_, at, fd)| (at, fd)).collect();
        let Self { arena, peers, files: others, charges, page, copy, fronts, .. } = self;
        let held: Option<Box<dyn Any>> = Some(Box::new((peers, others, charges, page, copy)));
        Mapped { arena, own, control, files, leftovers: Leftovers { ranges, held }, fronts }
    }

    /// The segment with the rings that the worker fills, then the groups of each operator: each in
    /// one piece.
    fn make_writable(&self, worker: usize) -> Result<(), Error> {
        let layout = &self.plan.layout;
        let segment = &layout.segments[worker];
        let rings = layout.rings.iter().filter(|ring| ring.from == worker);
        let end = rings.map(|ring| ring.at + 2 * ring.bytes).max();
        let end = end.unwrap_or(segment.at + segment.private_end);
        self.arena.make_writable(segment.at, end - segment.at)?;
        for laid in &layout.groups {
            let held = held_groups(self.plan, laid.operator, laid.groups, worker);
            if let (Some(first), Some(last)) = (held.first(), held.last()) {
                debug_assert!(last - first + 1 == held.len(), "a worker's groups are neighbours");
                let at = laid.at + first * stride(laid.bytes);
                held.iter()
                    .for_each(|group| self.fronts.fetch(laid.at + group * stride(laid.bytes)));
                self.arena.make_writable(at, held.len() * stride(laid.bytes))?;
            }
        }
        if let Some(laid) = layout.follow(worker) {
            self.arena.make_writable(laid.journal, JOURNAL_BYTES)?;
            self.arena.make_readable(laid.follower, laid.follower_bytes())?;
        }
        Ok(())
    }

    /// What is to be given back once this process is `taken`.
    fn leftovers(&self, taken: usize) -> Vec<Leftover> {
        let layout = &self.plan.layout;
        let others: Vec<usize> =
            self.charges.iter().map(|charge| charge.worker).filter(|w| *w != taken).collect();
        let (arena, mut all) = (self.arena, Vec::new());
        for &worker in &others {
            let segment = &layout.segments[worker];
            let peer = &self.peers[&worker];
            let (front, end) = (segment.front, segment.private_end);
            let instead = Some((Rc::clone(peer), 0));
            all.push(Leftover { arena, at: segment.at, len: front, instead });
            let (at, len) = (segment.at + front, end - front);
            all.push(Leftover { arena, at, len, instead: None });
            for laid in &layout.groups {
                let groups = held_groups(self.plan, laid.operator, laid.groups, worker);
                let len = stride(laid.bytes);
                for at in groups.into_iter().map(|group| laid.at + group * len) {
                    let view = self.fronts.place(at);
                    let view =
                        view.map(|(arena, at)| Leftover { arena, at, len: PAGE, instead: None });
                    all.extend(view);
                    all.push(Leftover { arena, at, len, instead: None });
                }
            }
        }
        let is_other = |worker| others.contains(&worker);
        for ring in layout.rings.iter().filter(|ring| ring.from != taken) {
            let is_mapped = is_other(ring.from) || is_other(ring.to);
            let half = |at| Leftover {
                arena,
                at,
                len: ring.bytes,
                instead: (ring.to == taken)
                    .then(|| (Rc::clone(&self.peers[&ring.from]), ring.data)),
            };
            if is_mapped {
                all.extend([half(ring.at), half(ring.at + ring.bytes)]);
            }
        }
        all
    }
}
