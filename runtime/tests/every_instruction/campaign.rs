//! Deaths of one worker, each at a place of its own, and the comparison of what is left.

use crate::common::stepper::{Instruction, Single, Stepper, Stop};
use crate::common::{Random, folder, sorted_parts};
use crate::places::{Phase, Place, comes_to, find, is_soak, known, life, remember, traced};
use crate::{job, open_gate};
use std::collections::BTreeSet;

/// Deaths of one job in a soak: a difference in its output is one of theirs.
const DEATHS_OF_A_JOB: usize = 400;

/// Steps in which an instruction is waited for.
const PATIENCE: usize = 6;

/// Instructions that no life reaches any more, in a row, once the job is out of input.
const VAIN: usize = 24;

/// This part of the places, of so many: a soak may be divided.
fn shard() -> (usize, usize) {
    let text = std::env::var("TESTUDO_SOAK_SHARD").unwrap_or_else(|_| "0/1".into());
    let (index, count) = text.split_once('/').expect("TESTUDO_SOAK_SHARD=INDEX/COUNT");
    (index.parse().expect("a number"), count.parse().expect("a number"))
}

/// What came of it.
#[derive(Debug, Default)]
struct Tally {
    deaths: usize,
    covered: BTreeSet<Instruction>,
    missed: Vec<Place>,
    mismatches: usize,
}

pub fn run(phase: Phase) {
    let total = if is_soak() { 200_000 } else { 12_000 };
    let undisturbed = {
        let folder = folder();
        let output = folder.path().join("out");
        open_gate(&output);
        assert_eq!(job(total, &output).run().restarts(), 0);
        sorted_parts(&output)
    };
    let wrong = undisturbed.iter().filter(|line| !line.ends_with(" 0")).count();
    assert_eq!(wrong, 0, "the undisturbed job's own check");
    let Some(mut places) = known(phase).or_else(|| find(phase, total)) else { return };
    remember(phase, &places);
    let (shard, shards) = shard();
    let mut number = 0..;
    places.retain(|_| number.next().is_some_and(|number: usize| number % shards == shard));
    let found = places.len();
    let mut tally = Tally::default();
    while !places.is_empty() {
        disturb(phase, total, &undisturbed, &mut places, DEATHS_OF_A_JOB, &mut tally);
    }
    // What only a young job does is met in one.
    let mut again = if is_soak() { std::mem::take(&mut tally.missed) } else { Vec::new() };
    while !again.is_empty() {
        disturb(phase, total, &undisturbed, &mut again, 3, &mut tally);
    }
    println!(
        "{phase:?}: {} deaths at {} distinct instructions ({found} places), {} not reached, \
         {} mismatches",
        tally.deaths,
        tally.covered.len(),
        tally.missed.len(),
        tally.mismatches
    );
    assert_eq!(tally.mismatches, 0, "results that differ from those of an undisturbed job");
    assert!(tally.deaths > found / 2, "most places were never reached");
}

/// One job: lets its worker die at one place after the other, then compares.
fn disturb(
    phase: Phase,
    total: u64,
    undisturbed: &[String],
    places: &mut Vec<Place>,
    at_most: usize,
    tally: &mut Tally,
) {
    let folder = folder();
    let output = folder.path().join("out");
    let Some((job, mut stepper)) = traced(total, &output) else {
        return places.clear();
    };
    let (first, mut vain) = (places.last().copied(), 0);
    let mut random = Random::new(tally.deaths as u64);
    let deaths = tally.deaths;
    while tally.deaths < deaths + at_most && vain < VAIN && !places.is_empty() {
        assert!(stepper.next_life(), "the job ended under its worker's debugger");
        if phase == Phase::Attaching {
            let place = places.pop().expect("not empty");
            if dies_at(&mut stepper, place, 1, tally) {
                assert!(stepper.next_life(), "the job ended under its worker's debugger");
                assert_eq!(stepper.go_on(), Stop::Begin);
            }
        } else {
            assert_eq!(stepper.go_on(), Stop::Begin);
        }
        // Something is committed between two deaths, or nearly: the budget is for those that do
        // nothing. Every other one may be in a life's first step.
        let is_first = phase == Phase::Step && tally.deaths.is_multiple_of(2);
        for _ in 0..if is_first { 0 } else { 1 + random.below(3) } {
            assert_eq!(stepper.go_on(), Stop::Begin);
        }
        if phase == Phase::Attaching {
            // Somewhere in a step, so that there is something to roll back.
            let further = random.below(400);
            (0..further).for_each(|_| _ = life(&mut stepper).single_block());
            stepper.kill();
            continue;
        }
        while let Some(place) = places.pop() {
            if dies_at(&mut stepper, place, PATIENCE, tally) {
                vain = 0;
                break;
            }
            vain += 1;
            if vain == VAIN {
                break;
            }
        }
    }
    if stepper.life.is_none() {
        assert!(stepper.next_life(), "the job ended under its worker's debugger");
    }
    stepper.let_go();
    let ended = job.wait();
    assert!(ended.restarts() >= tally.deaths - deaths, "deaths in the report");
    let lines = sorted_parts(&output);
    if lines != undisturbed {
        tally.mismatches += 1;
        let differ = lines.iter().zip(undisturbed).filter(|(one, other)| one != other);
        let some: Vec<_> = differ.take(5).collect();
        eprintln!("{} lines, not {}; such as {some:?}", lines.len(), undisturbed.len());
        eprintln!("a result differs after the deaths from {first:?} to {:?}", places.last());
    }
}

/// Kills the worker at a place, if it comes there within so many steps.
fn dies_at(stepper: &mut Stepper, place: Place, steps: usize, tally: &mut Tally) -> bool {
    if !comes_to(stepper, place, steps) {
        tally.missed.push(place);
        return false;
    }
    let mut at = Some(place.at);
    for _ in 0..place.further {
        match life(stepper).single_step() {
            Single::At(next) => at = next,
            _ => break,
        }
    }
    stepper.kill();
    tally.deaths += 1;
    tally.covered.extend(at);
    true
}
