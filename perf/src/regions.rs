//! Regions: how often a checkpoint completes when regions fail or are late by chance, led by the
//! engine's own coordinator, with simulated tasks in virtual time.
//!
//! Two experiments, as the papers did them in production: many regions that rarely fail, and a few
//! that are often late. Beside each figure stands what a global scheme makes of the same draws: it
//! completes when no task fails. Checkpoints count after the first complete one, since before it
//! there is nothing to carry over. Nothing is measured with a clock: one seed, one result.
//!
//! In a forced global checkpoint the coordinator cuts a failed region once more, which is a fresh
//! draw; `slow_regional_success_one_attempt` is the same experiment without that.
//!
//! Called by `main`.

use crate::report::{Failure, Line, Lines, Params};
use testudo::checkpoint::Now;
use testudo::checkpoint::coordinator::{Action, Coordinator, Limits};
use testudo::checkpoint::history::{Kind, Measure};
use testudo::checkpoint::regions::Regions;

/// Region checkpoints against global ones.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Checkpoints of each experiment
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    checkpoints: u64,
    /// Regions of one task each that fail a checkpoint
    #[arg(long, default_value_t = 5_000, value_name = "N")]
    regions: usize,
    /// Probability that a task fails a checkpoint
    #[arg(long, default_value_t = 0.0001, value_name = "P")]
    failure: f64,
    /// Regions that are late
    #[arg(long, default_value_t = 12, value_name = "N")]
    slow_regions: usize,
    /// Probability that a region misses the deadline of a checkpoint
    #[arg(long, default_value_t = 0.05, value_name = "P")]
    late: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// Runs both experiments.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.checkpoints == 0 || args.regions == 0 || args.slow_regions == 0 {
        return Err(Failure::Usage("0 checkpoints or regions: nothing would be counted".into()));
    }
    for (name, p) in [("--failure", args.failure), ("--late", args.late)] {
        if !(0.0..1.0).contains(&p) {
            return Err(Failure::Usage(format!("{name} {p}: a probability, below 1")));
        }
    }
    let limits = Limits::default();
    let failing = experiment(args, args.regions, args.failure, Fault::Fails, limits)?;
    let slow = experiment(args, args.slow_regions, args.late, Fault::IsLate, limits)?;
    let one_attempt = Limits { global_attempts: 1, ..limits };
    let once = experiment(args, args.slow_regions, args.late, Fault::IsLate, one_attempt)?;
    let mut params = Params::new();
    params.insert("checkpoints".into(), args.checkpoints.into());
    params.insert("regions".into(), args.regions.into());
    params.insert("failure".into(), args.failure.into());
    params.insert("slow_regions".into(), args.slow_regions.into());
    params.insert("late".into(), args.late.into());
    params.insert("seed".into(), args.seed.into());
    params.insert("max_failed_ratio".into(), limits.max_failed_ratio.into());
    params.insert("max_consecutive".into(), limits.max_consecutive.into());
    params.insert("global_attempts".into(), limits.global_attempts.into());
    let mut lines = Lines::new("regions", params, None);
    lines.add("global_success", failing.global(), "%");
    lines.add("regional_success", failing.regional(), "%");
    lines.add("slow_global_success", slow.global(), "%");
    lines.add("slow_regional_success", slow.regional(), "%");
    lines.add("slow_regional_success_one_attempt", once.regional(), "%");
    lines.add("forced_global", failing.forced, "checkpoints");
    lines.add("slow_forced_global", slow.forced, "checkpoints");
    Ok(lines.finish())
}

/// What befalls an unlucky task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It says that it failed.
    Fails,
    /// It says nothing before the deadline.
    IsLate,
}

/// What became of the checkpoints that count.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    counted: u64,
    /// Those in which no task was unlucky at its first cut.
    all_well: u64,
    completed: u64,
    /// Those that were made global because a region had failed too often.
    forced: u64,
}

impl Tally {
    fn global(&self) -> f64 {
        100.0 * self.all_well as f64 / self.counted as f64
    }

    fn regional(&self) -> f64 {
        100.0 * self.completed as f64 / self.counted as f64
    }
}

/// Random numbers that are the same in every run.
struct Draws {
    state: u64,
    below: u64,
}

impl Draws {
    /// True with the probability asked for.
    fn is_unlucky(&mut self) -> bool {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let n = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (n ^ (n >> 31)) >> 11 < self.below
    }
}

/// Virtual time from the beginning of one checkpoint to that of the next, and of an answer.
const INTERVAL_NS: u64 = 600_000_000_000;
const ANSWER_NS: u64 = 1_000_000_000;

/// The only life of each simulated task.
const LIFE: u64 = 1;

fn experiment(
    args: &Args,
    regions: usize,
    p: f64,
    fault: Fault,
    limits: Limits,
) -> Result<Tally, Failure> {
    let mut simulation = Simulation {
        coordinator: Coordinator::new(Regions::of(regions, &[]), limits),
        draws: Draws { state: args.seed, below: (p * (1u64 << 53) as f64) as u64 },
        fault,
        now: Now::default(),
        was_unlucky: false,
    };
    for task in 0..regions {
        simulation.coordinator.worker_began(simulation.now, task, LIFE);
    }
    // Until there is one, every checkpoint needs every task.
    const PATIENCE: u32 = 100_000;
    if !(0..PATIENCE).any(|_| simulation.checkpoint()) {
        return Err(Failure::Run(format!(
            "no checkpoint of {regions} regions completed at {p}: nothing to count after"
        )));
    }
    let mut tally = Tally::default();
    for _ in 0..args.checkpoints {
        tally.forced += u64::from(simulation.coordinator.is_global_next());
        tally.counted += 1;
        tally.completed += u64::from(simulation.checkpoint());
        tally.all_well += u64::from(!simulation.was_unlucky);
    }
    Ok(tally)
}

struct Simulation {
    coordinator: Coordinator,
    draws: Draws,
    fault: Fault,
    now: Now,
    /// A task was unlucky at its first cut of the latest checkpoint.
    was_unlucky: bool,
}

impl Simulation {
    /// Takes one checkpoint; true when it completed.
    fn checkpoint(&mut self) -> bool {
        let begun = self.now.monotonic_ns;
        self.pass(ANSWER_NS);
        let Ok((_, mut actions)) = self.coordinator.begin(self.now, Kind::Regional) else {
            return false;
        };
        self.was_unlucky = false;
        let mut attempt = 0;
        // Draws of first cuts are made whether or not the checkpoint is over by then, so that both
        // schemes see the same ones.
        let completed = loop {
            let (mut next, mut end) = (Vec::new(), None);
            for action in actions.drain(..) {
                if let Action::BeginCut { region, epoch } = action {
                    let is_unlucky = self.draws.is_unlucky();
                    self.was_unlucky |= is_unlucky && attempt == 0;
                    next.extend(self.answer(region, epoch, is_unlucky));
                } else {
                    end = end.or_else(|| self.follow(action, &mut next));
                }
            }
            if let Some(completed) = end {
                break completed;
            }
            if next.is_empty() {
                // Everybody else has answered: what is missing is late.
                let due = self.coordinator.deadline_ns().unwrap_or(self.now.monotonic_ns);
                self.pass(due.saturating_sub(self.now.monotonic_ns));
                next = self.coordinator.tick(self.now);
            }
            actions = next;
            attempt += 1;
        };
        self.pass((begun + INTERVAL_NS).saturating_sub(self.now.monotonic_ns));
        completed
    }

    fn pass(&mut self, ns: u64) {
        self.now.monotonic_ns += ns;
        self.now.unix_ms += (ns / 1_000_000).cast_signed();
    }

    /// A task answers its cut, or does not.
    fn answer(&mut self, task: usize, epoch: u64, is_unlucky: bool) -> Vec<Action> {
        let result = match (is_unlucky, self.fault) {
            (false, _) => Ok(Measure::default()),
            (true, Fault::Fails) => Err("unlucky".to_owned()),
            (true, Fault::IsLate) => return Vec::new(),
        };
        self.coordinator.acknowledged(self.now, task, epoch, LIFE, result)
    }

    /// Carries out an action other than a cut; true or false when it ends the checkpoint.
    fn follow(&mut self, action: Action, next: &mut Vec<Action>) -> Option<bool> {
        match action {
            Action::Seal { id, .. } => {
                next.extend(self.coordinator.sealed(self.now, id, Ok(())));
                None
            }
            Action::Complete { .. } => Some(true),
            Action::Fail { .. } => Some(false),
            Action::BeginCut { .. } | Action::AbortCut { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args {
            checkpoints: 3_000,
            regions: 200,
            failure: 0.0025,
            slow_regions: 12,
            late: 0.05,
            seed: 7,
        }
    }

    #[test]
    fn a_global_scheme_gives_what_arithmetic_says() {
        let args = args();
        let limits = Limits::default();
        let failing = experiment(&args, 200, 0.0025, Fault::Fails, limits).expect("it runs");
        assert!((failing.global() - 60.6).abs() < 4.0, "{failing:?}");
        let slow = experiment(&args, 12, 0.05, Fault::IsLate, limits).expect("it runs");
        assert!((slow.global() - 54.0).abs() < 4.0, "{slow:?}");
        assert!(failing.regional() > 99.9 && slow.regional() > 99.0, "{failing:?} {slow:?}");
    }

    #[test]
    fn without_carrying_over_a_region_checkpoint_is_a_global_one() {
        let limits = Limits { max_consecutive: 0, global_attempts: 1, ..Limits::default() };
        let tally = experiment(&args(), 12, 0.05, Fault::IsLate, limits).expect("it runs");
        assert_eq!(tally.completed, tally.all_well);
        assert_eq!(tally.forced, tally.counted);
    }

    #[test]
    fn one_seed_gives_one_result() {
        let values =
            || run(&args()).expect("it runs").iter().map(|l| l.text(true)).collect::<Vec<_>>();
        assert_eq!(values(), values());
    }
}
