//! What a dead worker left: a copy of what stands in the front of its segment, all but letters and
//! the words of rings, that nobody changes any more. A successor begins by overwriting it, and a
//! standby does not wait for the supervisor.
//!
//! The copy is whole and of one life: it is taken first, and then the claim is looked at. While
//! that says that its owner is dead, nobody has written anything (R2: the claim comes before all
//! else), unless a standby has claimed the segment and died as well by now. A standby keeps a copy
//! of its own before it goes on, and that one is taken then, as long as it is of the life in
//! question.
//!
//! Called by `recover` at each death, for `autopsy`.

#![expect(unsafe_code, reason = "views the pages that a dead worker left, and a copy of them")]

use super::launch::Scene;
use crate::plan::Plan;
use crate::plan::layout::{COUNTERS_AT, LAST_WORDS_AT, LETTER_AT, MARKER_AT, OBITUARY_AT};
use std::ops::Range;
use std::time::{Duration, Instant};
use testudo_shm::counters::{Counter, ENTRY};
use testudo_shm::death;
use testudo_shm::header::WorkerHeader;
use testudo_shm::last_words::LastWords;
use testudo_shm::marker::Marker;
use testudo_shm::obituary::{Obituary, Told};
use testudo_shm::primitive::{AtomicU64, Ordering, fence};
use testudo_shm::segment::PAGE;
use testudo_shm::standby::{Standby, State};

/// How long a standby may take from its claim to its copy: many times what it does take. One that
/// dies between the two leaves nothing.
const PATIENCE: Duration = Duration::from_millis(20);

const WORDS: usize = PAGE / size_of::<u64>();

#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([AtomicU64; WORDS]);

/// The parts of a worker's segment that are copied, whole pages of each.
pub(crate) fn parts(plan: &Plan) -> [Range<usize>; 2] {
    let counters = plan.layout.edge_counters * ENTRY;
    [0..LETTER_AT, COUNTERS_AT..COUNTERS_AT + counters.next_multiple_of(PAGE)]
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Remains {
    pages: Vec<Page>,
}

impl Remains {
    /// Of a worker that died just now, as this process. `standby` is the one that may take its
    /// place.
    pub(crate) fn take(
        plan: &Plan,
        scene: &Scene,
        (worker, pid): (usize, u32),
        standby: Option<&Standby>,
    ) -> Self {
        let at = plan.layout.segments[worker].at;
        let words = parts(plan).map(|part| {
            let start = scene.arena.at(at + part.start).cast::<AtomicU64>().cast_const();
            // SAFETY: the fronts of all workers are mapped for good, and parts of them begin at
            // pages; they are read word by word (R23).
            unsafe { std::slice::from_raw_parts(start, part.len() / size_of::<u64>()) }
        });
        let claim = &scene.workers[worker].claim.word;
        let copy = Self::copy(&words);
        fence(Ordering::Acquire);
        let Some(standby) = standby else { return copy };
        let begun = Instant::now();
        loop {
            let is_unclaimed = death::is_dead(claim);
            match standby.state() {
                State::Took(of) if of == worker => {
                    let kept = Self::kept_by(standby).filter(|kept| kept.is_of(pid));
                    return kept.unwrap_or(copy);
                }
                _ if is_unclaimed => return copy,
                State::Taking(of) if of == worker && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_micros(50));
                }
                _ => return copy,
            }
        }
    }

    fn is_of(&self, pid: u32) -> bool {
        self.header().is_some_and(|header| header.pid.load(Ordering::Relaxed) == pid)
    }

    /// What a standby has kept of the worker whose place it took.
    pub(crate) fn kept_by(standby: &Standby) -> Option<Self> {
        let kept = standby.kept();
        (kept.len() >= WORDS).then(|| Self::copy(&[kept]))
    }

    fn copy(parts: &[&[AtomicU64]]) -> Self {
        let word = |page: &[AtomicU64], index: usize| {
            AtomicU64::new(page.get(index).map_or(0, |word| word.load(Ordering::Relaxed)))
        };
        let pages = parts.iter().flat_map(|part| part.chunks(WORDS));
        let page = |page: &[AtomicU64]| Page(std::array::from_fn(|index| word(page, index)));
        Self { pages: pages.map(page).collect() }
    }

    /// The `T` at an offset in the copy; `None` where so much was not left.
    fn at<T>(&self, offset: usize) -> Option<&T> {
        let bytes = self.pages.len() * PAGE;
        if !offset.is_multiple_of(align_of::<T>()) || offset + size_of::<T>() > bytes {
            return None;
        }
        // SAFETY: inside the copy, aligned; called below with types that are all atomics, plain
        // bytes or reserved words, for which any bits will do.
        Some(unsafe { &*self.pages.as_ptr().byte_add(offset).cast::<T>() })
    }

    /// Its header.
    pub(crate) fn header(&self) -> Option<&WorkerHeader> {
        self.at(0)
    }

    /// What it said of what it was doing.
    pub(crate) fn marker(&self) -> Option<&Marker> {
        self.at(MARKER_AT)
    }

    /// What the process of this number has said of its death in numbers.
    pub(crate) fn obituary(&self, pid: u32) -> Told {
        self.at::<Obituary>(OBITUARY_AT).map_or_else(Told::default, |page| page.read(pid))
    }

    /// Its last words.
    pub(crate) fn last_words(&self) -> String {
        self.at::<LastWords>(LAST_WORDS_AT).map_or(String::new(), LastWords::read)
    }

    /// One of its counters: they follow where the letter was.
    pub(crate) fn counter(&self, index: usize) -> u64 {
        self.at::<Counter>(LETTER_AT + index * ENTRY).map_or(0, Counter::value)
    }
}
