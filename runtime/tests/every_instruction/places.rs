//! Where a worker may die: the instructions of a step and of attaching, found by single-stepping
//! it.
//!
//! A place is an instruction and a passage: the first time that a step comes by it, or a later one.

use crate::common::stepper::{Instruction, Life, Single, Stepper, Stop};
use crate::common::{Random, folder, program::Started, soak};
use crate::{job, open_gate};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Which instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Step,
    Attaching,
}

/// The worker that dies.
const WORKER: usize = 1;

/// Steps that are looked through for instructions.
const STEPS: usize = 4;

/// The same in a normal run, each for so long: where one was left, the next one goes on.
const LOOKS: usize = 8;
const LOOK: Duration = Duration::from_millis(250);

/// Steps before that: what is done to new state only is not met again.
const YOUTH: usize = 200;

/// Deaths in a normal run.
const DEATHS: usize = 70;

/// A place to die.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub at: Instruction,
    /// Passages up to the one that is the last.
    pub passage: u32,
    /// Instructions after that one.
    pub further: u32,
}

pub fn is_soak() -> bool {
    soak(true, false)
}

/// Where the shards of a soak keep the places that one of them has found.
fn kept(phase: Phase) -> Option<PathBuf> {
    let folder = std::env::var_os("TESTUDO_SOAK_FOLDER")?;
    Some(PathBuf::from(folder).join(format!("places-{phase:?}")))
}

/// The places that another shard has found.
pub fn known(phase: Phase) -> Option<Vec<Place>> {
    let text = std::fs::read_to_string(kept(phase)?).ok()?;
    let place = |line: &str| {
        let mut fields = line.split(' ').map(|field| field.parse::<u64>().ok());
        let mut next = || fields.next()?;
        let at = Instruction { module: next()? as u32, offset: next()? };
        Some(Place { at, passage: next()? as u32, further: 0 })
    };
    text.lines().map(place).collect()
}

pub fn remember(phase: Phase, places: &[Place]) {
    let Some(path) = kept(phase) else { return };
    let line =
        |place: &Place| format!("{} {} {}\n", place.at.module, place.at.offset, place.passage);
    std::fs::write(path, places.iter().map(line).collect::<String>()).expect("room");
}

/// A job with the worker under a debugger; `None` where that is not allowed.
pub fn traced(total: u64, output: &Path) -> Option<(Started, Stepper)> {
    let trap = WORKER.to_string();
    let job = job(total, output).env(testudo::testing::TRAP, &trap).start();
    match Stepper::of(&job, WORKER) {
        Ok(stepper) => {
            open_gate(output);
            Some((job, stepper))
        }
        Err(error) => {
            eprintln!("SKIPPED: processes cannot be traced here ({error})");
            None
        }
    }
}

/// Steps through the phase once and gives the places to die: all of them, each also at a later
/// passage, or as many as a normal run has time for.
pub fn find(phase: Phase, total: u64) -> Option<Vec<Place>> {
    let folder = folder();
    let (job, mut stepper) = traced(total, &folder.path().join("out"))?;
    let mut order = Vec::new();
    let mut passages: BTreeMap<Instruction, u32> = BTreeMap::new();
    assert!(stepper.next_life());
    for _ in 0..YOUTH {
        assert_eq!(stepper.go_on(), Stop::Begin);
    }
    stepper.kill();
    assert!(stepper.next_life());
    if phase == Phase::Attaching {
        // The life that is looked at has something to roll back.
        assert_eq!(stepper.go_on(), Stop::Begin);
        (0..3000).for_each(|_| _ = life(&mut stepper).single_step());
        stepper.kill();
        assert!(stepper.next_life());
    } else {
        assert_eq!(stepper.go_on(), Stop::Begin);
    }
    let looks = match phase {
        _ if !is_soak() => LOOKS,
        Phase::Step => STEPS,
        Phase::Attaching => 1,
    };
    let mut left = None;
    for look in 0..looks {
        if look > 0 && phase == Phase::Attaching {
            // Something is committed between two deaths.
            (0..3).for_each(|_| assert_eq!(stepper.go_on(), Stop::Begin));
            stepper.kill();
            assert!(stepper.next_life());
        }
        left = look_through(&mut stepper, left, &mut order, &mut passages);
    }
    stepper.let_go();
    drop(job);
    Some(choose(phase, &order, &passages))
}

pub fn life(stepper: &mut Stepper) -> &mut Life {
    stepper.life.as_mut().expect("a life")
}

/// Notes the instructions up to the begin of the next step, in a normal run only those that are
/// jumped to, and as many as there is time for. Begins at `from`; gives the place where it has
/// ended before the step did.
fn look_through(
    stepper: &mut Stepper,
    from: Option<Place>,
    order: &mut Vec<Instruction>,
    passages: &mut BTreeMap<Instruction, u32>,
) -> Option<Place> {
    if let Some(from) = from
        && !comes_to(stepper, from, 1)
    {
        return None;
    }
    let begun = Instant::now();
    let (mut count, mut in_program, mut is_over) = (0, false, false);
    let mut noted: Vec<Instruction> = Vec::new();
    while !is_over && (is_soak() || begun.elapsed() < LOOK) {
        let life = life(stepper);
        // What was met before is passed over, up to where the next run begins.
        let is_new = |at| passages.get(&at).is_none_or(|times| *times == 1);
        let is_new = life.at().is_some_and(is_new);
        let single = if is_soak() && is_new { life.single_step() } else { life.single_block() };
        match single {
            Single::Begin => is_over = true,
            Single::Gone => panic!("the worker ended while it was looked at"),
            Single::At(at) => {
                // The stop's own way back out of the library is none of the worker's.
                in_program |= at.is_some_and(|at| at.module == 0);
                if let Some(at) = at.filter(|_| in_program) {
                    noted.push(at);
                    *passages.entry(at).or_default() += 1;
                }
            }
        }
        count += 1;
        if count % 1000 == 0 {
            stepper.tend();
        }
    }
    // Nor is its way into it.
    while noted.last().is_some_and(|at| at.module != 0) {
        noted.pop();
    }
    let last = noted.last().copied();
    let passage = noted.iter().filter(|at| Some(**at) == last).count();
    let mut known: BTreeSet<Instruction> = order.iter().copied().collect();
    order.extend(noted.into_iter().filter(|at| known.insert(*at)));
    if !is_over {
        assert_eq!(stepper.go_on(), Stop::Begin);
    }
    let at = last.filter(|_| !is_over)?;
    Some(Place { at, passage: passage.min(50) as u32, further: 0 })
}

fn choose(
    phase: Phase,
    order: &[Instruction],
    passages: &BTreeMap<Instruction, u32>,
) -> Vec<Place> {
    let mut random = Random::new(phase as u64 + 1);
    let deaths = if is_soak() { order.len() } else { DEATHS.min(order.len()) };
    let mut places = Vec::new();
    for n in 0..deaths {
        let at = order[n * order.len() / deaths];
        let later = 1 + random.below(u64::from(passages[&at]).min(40)) as u32;
        if is_soak() {
            places.push(Place { at, passage: 1, further: 0 });
            places.extend((later > 1).then_some(Place { at, passage: later, further: 0 }));
        } else {
            let passage = if n % 2 == 0 { 1 } else { later };
            places.push(Place { at, passage, further: n as u32 % 7 });
        }
    }
    places.reverse();
    places
}

/// Leads the worker to a place; false when it does not come there within so many steps.
pub fn comes_to(stepper: &mut Stepper, place: Place, steps: usize) -> bool {
    life(stepper).arm(Some(place.at));
    let (mut begun, mut passages) = (0, 0);
    while begun < steps && passages < place.passage {
        match stepper.go_on() {
            Stop::Begin => begun += 1,
            Stop::Gone(status) => panic!("the worker died by itself: status {status:#x}"),
            Stop::Breakpoint => passages += 1,
        }
    }
    life(stepper).arm(None);
    passages == place.passage
}
