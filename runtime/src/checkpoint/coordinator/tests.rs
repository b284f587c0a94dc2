//! The coordinator's promises, one test each, and a tiny model of it driven by random events.

use super::*;
use std::collections::BTreeSet;

/// A coordinator whose workers all run, in their first life, and a clock.
struct Stage {
    coordinator: Coordinator,
    now: Now,
    lives: Vec<u64>,
}

fn limits() -> Limits {
    Limits { deadline: Duration::from_secs(10), ..Limits::default() }
}

impl Stage {
    /// So many regions of so many workers each.
    fn new(regions: usize, workers: usize, limits: Limits) -> Self {
        let edges: Vec<_> = (0..regions * workers)
            .filter(|task| task % workers > 0)
            .map(|task| (task - 1, task))
            .collect();
        let regions = Regions::of(regions * workers, &edges);
        let lives = vec![1; regions.task_count()];
        let mut stage =
            Self { coordinator: Coordinator::new(regions, limits), now: Now::default(), lives };
        for worker in 0..stage.lives.len() {
            assert_eq!(stage.coordinator.worker_began(stage.now, worker, 1), []);
        }
        stage
    }

    fn begin(&mut self, kind: Kind) -> Vec<Action> {
        self.coordinator.begin(self.now, kind).expect("none is open").1
    }

    fn kind(&self) -> Kind {
        self.coordinator.open().expect("one is open").1
    }

    fn pass(&mut self, seconds: u64) -> Vec<Action> {
        self.now.monotonic_ns += seconds * 1_000_000_000;
        self.coordinator.tick(self.now)
    }

    /// The worker answers the present cut of its region.
    fn answer(&mut self, worker: usize, result: Result<Measure, String>) -> Vec<Action> {
        let region = self.coordinator.regions.of_task(worker);
        let epoch = self.coordinator.states[region].epoch;
        self.coordinator.acknowledged(self.now, worker, epoch, self.lives[worker], result)
    }

    fn ok(&mut self, worker: usize) -> Vec<Action> {
        self.answer(worker, Ok(Measure::default()))
    }

    fn refuse(&mut self, worker: usize) -> Vec<Action> {
        self.answer(worker, Err("disk full".into()))
    }

    fn die(&mut self, worker: usize) -> Vec<Action> {
        self.coordinator.task_failed(self.now, worker)
    }

    fn replace(&mut self, worker: usize) -> Vec<Action> {
        self.lives[worker] += 1;
        self.coordinator.worker_began(self.now, worker, self.lives[worker])
    }

    fn seal(&mut self) -> Vec<Action> {
        let id = self.coordinator.open().expect("one is open").0;
        self.coordinator.sealed(self.now, id, Ok(()))
    }

    /// One whole checkpoint in which the first workers of these regions refuse.
    fn round(&mut self, kind: Kind, refusing: &[usize]) -> Vec<Action> {
        self.begin(kind);
        let mut last = Vec::new();
        for worker in 0..self.lives.len() {
            let region = self.coordinator.regions.of_task(worker);
            let is_first = self.coordinator.regions.tasks(region)[0] == worker;
            last = if is_first && refusing.contains(&region) {
                self.refuse(worker)
            } else {
                self.ok(worker)
            };
            if matches!(last.last(), Some(Action::Fail { .. })) {
                return last;
            }
        }
        assert!(matches!(last.last(), Some(Action::Seal { .. })), "{last:?}");
        self.seal()
    }
}

fn why(actions: &[Action]) -> &str {
    match actions.last() {
        Some(Action::Fail { why, .. }) => why,
        _ => panic!("no failure in {actions:?}"),
    }
}

/// Which regions of a complete checkpoint are carried over, with their epochs.
fn carried(actions: &[Action]) -> Vec<(usize, u64)> {
    match actions {
        [Action::Complete { parts, .. }] => {
            let old = parts.iter().filter(|part| !part.is_fresh);
            old.map(|part| (part.region, part.epoch)).collect()
        }
        _ => panic!("not complete: {actions:?}"),
    }
}

#[test]
fn a_checkpoint_completes_when_every_worker_has_answered_and_the_root_is_written() {
    let mut stage = Stage::new(2, 2, limits());
    let begun = stage.begin(Kind::Regional);
    let cut = |region| Action::BeginCut { region, epoch: 1 };
    assert_eq!(begun, [cut(0), cut(1)]);
    for worker in 0..3 {
        assert_eq!(stage.ok(worker), []);
    }
    let part = |region| Part { region, epoch: 1, is_fresh: true };
    let (id, kind, parts) = (1, Kind::Regional, vec![part(0), part(1)]);
    assert_eq!(stage.ok(3), [Action::Seal { id, kind, parts: parts.clone() }]);
    assert_eq!(stage.coordinator.good(0), None, "nothing is good before it is sealed");
    assert_eq!(stage.coordinator.sealed(stage.now, 7, Ok(())), [], "another id");
    assert_eq!(stage.seal(), [Action::Complete { id, kind, parts }]);
    assert_eq!(stage.coordinator.good(1), Some(1));
    assert_eq!(stage.coordinator.open(), None);
}

#[test]
fn only_one_checkpoint_is_open_at_a_time() {
    let mut stage = Stage::new(1, 1, limits());
    stage.begin(Kind::Regional);
    assert_eq!(stage.coordinator.begin(stage.now, Kind::Savepoint), Err(Busy { id: 1 }));
    stage.ok(0);
    assert_eq!(stage.coordinator.begin(stage.now, Kind::Regional), Err(Busy { id: 1 }));
    stage.seal();
    assert_eq!(stage.coordinator.begin(stage.now, Kind::Regional).map(|begun| begun.0), Ok(2));
}

#[test]
fn a_failed_region_contributes_its_last_good_snapshot() {
    let mut stage = Stage::new(4, 1, limits());
    assert_eq!(carried(&stage.round(Kind::Regional, &[])), []);
    stage.begin(Kind::Regional);
    assert_eq!(stage.refuse(2), [Action::AbortCut { region: 2, epoch: 2 }]);
    for worker in [0, 1, 3] {
        stage.ok(worker);
    }
    assert_eq!(carried(&stage.seal()), [(2, 1)]);
    assert_eq!(stage.coordinator.good(1), Some(2));
    assert_eq!(stage.coordinator.good(2), Some(1));
}

#[test]
fn a_late_region_contributes_its_last_good_snapshot() {
    let mut stage = Stage::new(4, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.begin(Kind::Regional);
    for worker in 0..3 {
        stage.ok(worker);
    }
    let due = stage.coordinator.deadline_ns().expect("one is open");
    assert_eq!(due, stage.now.monotonic_ns + 10_000_000_000);
    assert_eq!(stage.pass(9), []);
    let late = stage.pass(1);
    assert_eq!(late[0], Action::AbortCut { region: 3, epoch: 2 });
    assert_eq!(carried(&stage.seal()), [(3, 1)]);
    assert_eq!(stage.coordinator.deadline_ns(), None);
}

#[test]
fn a_worker_that_dies_fails_its_regions_open_cut() {
    let mut stage = Stage::new(4, 2, limits());
    stage.round(Kind::Regional, &[]);
    stage.begin(Kind::Regional);
    // Worker 0 has answered already; its region's other one has not.
    stage.ok(0);
    assert_eq!(stage.die(0), [Action::AbortCut { region: 0, epoch: 2 }]);
    stage.replace(0);
    assert_eq!(stage.ok(0), [], "the successor's answer to a cut that has failed");
    for worker in 2..8 {
        stage.ok(worker);
    }
    assert_eq!(carried(&stage.seal()), [(0, 1)]);
}

#[test]
fn a_death_after_the_regions_last_answer_changes_nothing() {
    let mut stage = Stage::new(4, 1, limits());
    stage.begin(Kind::Regional);
    stage.ok(0);
    assert_eq!(stage.die(0), []);
    for worker in 1..4 {
        stage.ok(worker);
    }
    stage.die(3);
    assert_eq!(carried(&stage.seal()), []);
}

#[test]
fn a_region_whose_worker_does_not_run_fails_from_the_start() {
    let mut stage = Stage::new(4, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.die(1);
    assert!(!stage.coordinator.all_running());
    let begun = stage.begin(Kind::Regional);
    assert!(!begun.iter().any(|action| matches!(action, Action::BeginCut { region: 1, .. })));
    stage.replace(1);
    for worker in [0, 2, 3] {
        stage.ok(worker);
    }
    assert_eq!(carried(&stage.seal()), [(1, 1)]);
}

#[test]
fn a_region_fails_once_however_many_of_its_tasks_do() {
    let mut stage = Stage::new(4, 3, limits());
    stage.round(Kind::Regional, &[]);
    stage.begin(Kind::Regional);
    assert_eq!(stage.refuse(0).len(), 1);
    assert_eq!(stage.refuse(1), []);
    assert_eq!(stage.die(2), []);
    stage.replace(2);
    assert_eq!(stage.pass(5), []);
    for worker in 3..12 {
        stage.ok(worker);
    }
    stage.seal();
    assert!(!stage.coordinator.is_global_next(), "one failure, not three");
    let record = stage.coordinator.history().newest().expect("one");
    assert_eq!((record.regions_ok, record.regions_failed), (3, 1));
}

#[test]
fn failed_regions_may_be_a_share_of_all() {
    let mut stage = Stage::new(10, 1, limits());
    stage.round(Kind::Regional, &[]);
    assert_eq!(carried(&stage.round(Kind::Regional, &[7, 8, 9])).len(), 3);
    let failed = stage.round(Kind::Regional, &[0, 1, 2, 3]);
    assert_eq!(why(&failed), "region 0: worker 0: disk full; 4 of 10 regions failed, 3 may");
}

#[test]
fn a_share_is_not_lost_to_rounding() {
    let mut stage = Stage::new(100, 1, Limits { max_failed_ratio: 0.29, ..limits() });
    stage.round(Kind::Regional, &[]);
    let refusing: Vec<_> = (0..29).collect();
    assert_eq!(carried(&stage.round(Kind::Regional, &refusing)).len(), 29);
}

#[test]
fn a_checkpoint_without_anything_new_is_none() {
    let mut stage = Stage::new(2, 1, Limits { max_failed_ratio: 1.0, ..limits() });
    stage.round(Kind::Regional, &[]);
    assert_eq!(carried(&stage.round(Kind::Regional, &[0])), [(0, 1)]);
    let failed = stage.round(Kind::Regional, &[0, 1]);
    assert!(why(&failed).ends_with("no region succeeded"), "{failed:?}");
}

#[test]
fn before_its_first_good_snapshot_a_region_has_nothing_to_carry_over() {
    let mut stage = Stage::new(4, 1, limits());
    stage.begin(Kind::Regional);
    stage.ok(0);
    let failed = stage.refuse(1);
    assert!(why(&failed).ends_with("no good snapshot to carry over yet"), "{failed:?}");
    let aborted = |region| Action::AbortCut { region, epoch: 1 };
    assert_eq!(failed[..4], [aborted(1), aborted(0), aborted(2), aborted(3)]);
    // Snapshots of a checkpoint that failed are not good either.
    let failed = stage.round(Kind::Regional, &[0]);
    assert!(why(&failed).starts_with("region 0: worker 0: disk full"), "{failed:?}");
}

#[test]
fn after_consecutive_failures_of_a_region_one_global_checkpoint_is_forced() {
    let mut stage = Stage::new(4, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.round(Kind::Regional, &[1]);
    assert!(!stage.coordinator.is_global_next());
    stage.round(Kind::Regional, &[1]);
    assert!(stage.coordinator.is_global_next());
    stage.begin(Kind::Regional);
    assert_eq!(stage.kind(), Kind::Global);
    stage.refuse(1);
    let failed = stage.refuse(1);
    assert!(why(&failed).ends_with("all regions must succeed"), "{failed:?}");
    assert!(!stage.coordinator.is_global_next(), "one, not a row of them");
    assert_eq!(carried(&stage.round(Kind::Regional, &[1])), [(1, 1)]);
}

#[test]
fn failures_of_a_region_that_are_not_in_a_row_force_nothing() {
    let mut stage = Stage::new(4, 1, limits());
    stage.round(Kind::Regional, &[]);
    for refusing in [[1], [2], [1], [2]] {
        stage.round(Kind::Regional, &refusing);
        assert!(!stage.coordinator.is_global_next());
    }
}

#[test]
fn a_global_checkpoint_that_succeeds_frees_all_old_snapshots() {
    let mut stage = Stage::new(4, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.round(Kind::Regional, &[1]);
    stage.round(Kind::Regional, &[1]);
    assert_eq!(carried(&stage.round(Kind::Regional, &[])), []);
    assert!((0..4).all(|region| stage.coordinator.good(region) == Some(4)));
}

#[test]
fn with_no_failures_allowed_every_checkpoint_is_global() {
    let mut stage = Stage::new(2, 1, Limits { max_consecutive: 0, ..limits() });
    for _ in 0..3 {
        stage.begin(Kind::Regional);
        assert_eq!(stage.kind(), Kind::Global);
        stage.ok(0);
        stage.ok(1);
        stage.seal();
    }
}

#[test]
fn in_a_global_checkpoint_a_failed_region_is_cut_once_more() {
    let mut stage = Stage::new(3, 1, limits());
    stage.begin(Kind::Global);
    stage.ok(0);
    let again =
        [Action::AbortCut { region: 1, epoch: 1 }, Action::BeginCut { region: 1, epoch: 2 }];
    assert_eq!(stage.refuse(1), again);
    // Each cut has the whole deadline.
    stage.now.monotonic_ns += 9_000_000_000;
    stage.ok(2);
    assert_eq!(stage.ok(1).len(), 1);
    let complete = stage.seal();
    assert_eq!(carried(&complete), []);
    assert_eq!(stage.coordinator.good(1), Some(2));
    assert_eq!(stage.coordinator.good(2), Some(1));
}

#[test]
fn in_a_global_checkpoint_the_second_cut_waits_for_the_successor() {
    let mut stage = Stage::new(2, 2, limits());
    stage.begin(Kind::Global);
    stage.ok(0);
    assert_eq!(stage.die(1), [Action::AbortCut { region: 0, epoch: 1 }]);
    assert_eq!(stage.ok(0), [], "an answer to the cut that failed");
    assert_eq!(stage.replace(1), [Action::BeginCut { region: 0, epoch: 2 }]);
    for worker in 0..4 {
        stage.ok(worker);
    }
    assert_eq!(carried(&stage.seal()), []);
}

#[test]
fn a_second_cut_waits_for_all_successors() {
    let mut stage = Stage::new(2, 2, limits());
    stage.begin(Kind::Global);
    assert_eq!(stage.die(0).len(), 1);
    assert_eq!(stage.die(1), []);
    assert_eq!(stage.replace(0), []);
    assert_eq!(stage.replace(1), [Action::BeginCut { region: 0, epoch: 2 }]);
}

#[test]
fn files_of_epochs_that_may_still_be_written_are_no_garbage() {
    let mut stage = Stage::new(2, 1, limits());
    assert_eq!(stage.coordinator.running_epoch(), 1);
    stage.begin(Kind::Global);
    stage.ok(0);
    stage.refuse(1);
    // Region 1 is at its second epoch; region 0's snapshot of the first is not sealed.
    assert_eq!(stage.coordinator.running_epoch(), 1);
    stage.ok(1);
    stage.seal();
    assert_eq!(stage.coordinator.running_epoch(), 2);
}

#[test]
fn a_successor_that_never_comes_is_late() {
    let mut stage = Stage::new(2, 1, limits());
    stage.die(0);
    stage.begin(Kind::Savepoint);
    stage.ok(1);
    assert_eq!(stage.pass(9), []);
    assert!(why(&stage.pass(1)).starts_with("region 0: late"));
}

#[test]
fn savepoints_are_always_global() {
    let mut stage = Stage::new(4, 1, Limits { global_attempts: 1, ..limits() });
    stage.round(Kind::Regional, &[]);
    let failed = stage.round(Kind::Savepoint, &[3]);
    assert!(why(&failed).ends_with("all regions must succeed"), "{failed:?}");
    match &stage.round(Kind::Savepoint, &[])[..] {
        [Action::Complete { kind: Kind::Savepoint, parts, .. }] => {
            assert!(parts.iter().all(|part| part.is_fresh));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn with_one_region_a_failure_is_a_failed_checkpoint() {
    let mut stage = Stage::new(1, 2, limits());
    stage.round(Kind::Regional, &[]);
    for _ in 0..5 {
        stage.begin(Kind::Regional);
        assert_eq!(stage.kind(), Kind::Regional);
        let failed = stage.refuse(1);
        assert_eq!(why(&failed), "region 0: worker 1: disk full");
    }
    stage.begin(Kind::Savepoint);
    assert!(matches!(stage.refuse(0)[..], [Action::AbortCut { .. }, Action::Fail { .. }]));
}

#[test]
fn answers_of_an_old_epoch_are_not_heard() {
    let mut stage = Stage::new(1, 1, limits());
    stage.begin(Kind::Regional);
    stage.refuse(0);
    stage.begin(Kind::Regional);
    let coordinator = &mut stage.coordinator;
    for epoch in [0, 1, 3] {
        let ok = Ok(Measure::default());
        assert_eq!(coordinator.acknowledged(stage.now, 0, epoch, 1, ok), []);
        let refused = Err("disk full".into());
        assert_eq!(coordinator.acknowledged(stage.now, 0, epoch, 1, refused), []);
    }
    assert_eq!(stage.ok(0).len(), 1);
}

#[test]
fn answers_of_an_old_life_are_not_heard() {
    let mut stage = Stage::new(1, 1, limits());
    stage.die(0);
    stage.replace(0);
    stage.begin(Kind::Regional);
    for life in [0, 1, 3] {
        let refused = Err("disk full".into());
        assert_eq!(stage.coordinator.acknowledged(stage.now, 0, 1, life, refused), []);
        assert_eq!(stage.coordinator.worker_began(stage.now, 0, life.min(2)), []);
    }
    assert_eq!(stage.ok(0).len(), 1);
}

#[test]
fn a_worker_answers_once() {
    let mut stage = Stage::new(1, 2, limits());
    stage.begin(Kind::Regional);
    assert_eq!(stage.ok(0), []);
    assert_eq!(stage.ok(0), []);
    assert_eq!(stage.refuse(0), []);
    assert_eq!(stage.ok(1).len(), 1);
    assert_eq!(stage.coordinator.acknowledged(stage.now, 99, 1, 1, Ok(Measure::default())), []);
}

#[test]
fn a_successor_tells_of_a_death_that_nobody_noticed() {
    let mut stage = Stage::new(1, 1, limits());
    stage.begin(Kind::Regional);
    assert!(why(&stage.replace(0)).ends_with("died"));
}

#[test]
fn a_checkpoint_whose_root_cannot_be_written_has_failed() {
    let mut stage = Stage::new(2, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.begin(Kind::Regional);
    stage.ok(0);
    stage.ok(1);
    assert_eq!(stage.pass(100), [], "no deadline while it is being sealed");
    let failed = stage.coordinator.sealed(stage.now, 2, Err("no space left on device".into()));
    let aborted = |region| Action::AbortCut { region, epoch: 2 };
    assert_eq!(failed[..2], [aborted(0), aborted(1)]);
    assert_eq!(why(&failed), "cannot be sealed: no space left on device");
    assert_eq!(stage.coordinator.good(0), Some(1));
}

#[test]
fn an_abandoned_checkpoint_has_failed() {
    let mut stage = Stage::new(2, 1, limits());
    assert_eq!(stage.coordinator.abandon(stage.now, "the job ends"), []);
    stage.begin(Kind::Regional);
    stage.ok(0);
    let failed = stage.coordinator.abandon(stage.now, "the job ends");
    assert_eq!((failed.len(), why(&failed)), (3, "the job ends"));
    assert_eq!(stage.ok(1), []);
}

#[test]
fn numbers_go_on_where_an_earlier_run_stopped() {
    let start = Start { last_id: 40, last_epoch: 7, good: vec![Some(6), None] };
    let mut coordinator = Coordinator::resume(Regions::of(2, &[]), limits(), &start);
    for worker in 0..2 {
        coordinator.worker_began(Now::default(), worker, 1);
    }
    assert_eq!((coordinator.good(0), coordinator.good(1)), (Some(6), None));
    let (id, begun) = coordinator.begin(Now::default(), Kind::Regional).expect("none is open");
    assert_eq!(id, 41);
    assert_eq!(begun[0], Action::BeginCut { region: 0, epoch: 8 });
}

#[test]
fn the_history_tells_what_a_checkpoint_took() {
    let mut stage = Stage::new(2, 1, limits());
    stage.round(Kind::Regional, &[]);
    stage.begin(Kind::Regional);
    let measure =
        Measure { bytes_full: 100, bytes_incremental: 10, in_flight_bytes: 1, pause_ns: 5 };
    stage.answer(0, Ok(measure));
    let record = stage.coordinator.history().newest().expect("one");
    assert_eq!((record.id, &record.state), (2, &State::Open));
    stage.pass(2);
    stage.answer(1, Ok(measure));
    stage.seal();
    let record = stage.coordinator.history().newest().expect("one");
    assert_eq!(record.duration_us, 2_000_000);
    assert_eq!((record.measure.bytes_full, record.measure.pause_ns), (200, 5));
    assert_eq!((record.regions_ok, &record.state), (2, &State::Complete));
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % bound
    }
}

/// The tiny model: what has happened to whole regions, from which everything is worked out anew.
struct Model {
    ratio: f64,
    good: Vec<Option<u64>>,
    row: Vec<u32>,
    is_forced: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Open,
    Fail,
    Seal(BTreeSet<usize>),
}

impl Model {
    /// What the ends of cuts so far, (region, succeeded), mean.
    fn verdict(&self, kind: Kind, log: &[(usize, bool)]) -> Verdict {
        let count = self.good.len();
        let attempts = if kind.needs_all() && count > 1 { 2 } else { 1 };
        let fails = |region| log.iter().filter(|end| **end == (region, false)).count();
        let failed: Vec<_> = (0..count).filter(|region| fails(*region) >= attempts).collect();
        let fresh: BTreeSet<_> = log.iter().filter(|end| end.1).map(|end| end.0).collect();
        let is_lost = failed.iter().any(|region| self.good[*region].is_none());
        let are_too_many = failed.len() as f64 > self.ratio * count as f64 + 1e-9;
        let cannot = kind.needs_all() || count == 1 || is_lost || are_too_many;
        if !failed.is_empty() && (cannot || failed.len() == count) {
            Verdict::Fail
        } else if fresh.len() + failed.len() == count {
            Verdict::Seal(fresh)
        } else {
            Verdict::Open
        }
    }

    fn end(&mut self, kind: Kind, log: &[(usize, bool)], good: &[Part]) {
        for part in good {
            self.good[part.region] = Some(part.epoch);
        }
        for region in 0..self.row.len() {
            match log.iter().rfind(|end| end.0 == region) {
                _ if kind.needs_all() => self.row[region] = 0,
                Some((_, true)) => self.row[region] = 0,
                Some((_, false)) => self.row[region] += 1,
                None => {}
            }
        }
        self.is_forced = self.row.len() > 1 && self.row.iter().any(|row| *row >= 2);
    }
}

/// A random event of an open checkpoint; gives the coordinator's actions, and which regions' cuts
/// ended by it and how.
fn disturb(
    stage: &mut Stage,
    random: &mut Random,
    answered: &mut BTreeSet<(usize, u64)>,
) -> (Vec<Action>, Vec<(usize, bool)>) {
    let worker = random.below(stage.lives.len());
    let region = stage.coordinator.regions.of_task(worker);
    let epoch = stage.coordinator.states[region].epoch;
    let is_open = matches!(stage.coordinator.states[region].cut, Cut::Open { .. });
    let is_heard = is_open && !answered.contains(&(worker, epoch));
    match random.below(40) {
        0 => {
            let cuts = stage.coordinator.states.iter().enumerate();
            let late: Vec<_> = cuts
                .filter(|(_, state)| matches!(state.cut, Cut::Open { .. }))
                .map(|(region, _)| (region, false))
                .collect();
            (stage.pass(11), late)
        }
        1 => {
            let actions = stage.refuse(worker);
            (actions, is_heard.then_some((region, false)).into_iter().collect())
        }
        2 => {
            let mut actions = stage.die(worker);
            actions.extend(stage.replace(worker));
            (actions, is_open.then_some((region, false)).into_iter().collect())
        }
        3 => {
            let (now, life) = (stage.now, stage.lives[worker]);
            let refused = || Err("old".to_owned());
            let coordinator = &mut stage.coordinator;
            let mut actions = coordinator.acknowledged(now, worker, epoch, life - 1, refused());
            actions.extend(coordinator.acknowledged(now, worker, epoch - 1, life, refused()));
            (actions, Vec::new())
        }
        _ => {
            answered.insert((worker, epoch));
            let tasks = stage.coordinator.regions.tasks(region);
            let is_whole = tasks.iter().all(|task| answered.contains(&(*task, epoch)));
            let ended = is_heard && is_whole;
            (stage.ok(worker), ended.then_some((region, true)).into_iter().collect())
        }
    }
}

#[test]
fn whatever_happens_the_coordinator_decides_as_the_model() {
    let mut complete = 0;
    let mut forced = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let (regions, workers) = (1 + random.below(7), 1 + random.below(3));
        let ratio = [0.0, 0.3, 0.5, 1.0][random.below(4)];
        let mut stage =
            Stage::new(regions, workers, Limits { max_failed_ratio: ratio, ..limits() });
        let mut model =
            Model { ratio, good: vec![None; regions], row: vec![0; regions], is_forced: false };
        for _ in 0..30 {
            let asked =
                [Kind::Regional, Kind::Regional, Kind::Global, Kind::Savepoint][random.below(4)];
            let is_forced = asked == Kind::Regional && model.is_forced;
            forced += u32::from(is_forced);
            let kind = if is_forced { Kind::Global } else { asked };
            let mut seen = stage.begin(asked);
            assert_eq!(stage.kind(), kind, "seed {seed}");
            let (mut log, mut answered) = (Vec::new(), BTreeSet::new());
            while model.verdict(kind, &log) == Verdict::Open {
                let (actions, ends) = disturb(&mut stage, &mut random, &mut answered);
                log.extend(ends);
                seen.extend(actions);
                let is_decided =
                    matches!(seen.last(), Some(Action::Fail { .. } | Action::Seal { .. }));
                let verdict = model.verdict(kind, &log);
                assert_eq!(is_decided, verdict != Verdict::Open, "seed {seed}: {log:?}");
            }
            let good = conclude(&mut stage, &mut random, &mut seen, &model, kind, &log);
            complete += u32::from(!good.is_empty());
            model.end(kind, &log, &good);
            check_cuts(&seen, &good);
        }
    }
    assert!(complete > 1000 && forced > 50, "{complete} complete, {forced} forced");
}

/// Seals what is to be sealed, or fails to; gives the parts of a complete checkpoint.
fn conclude(
    stage: &mut Stage,
    random: &mut Random,
    seen: &mut Vec<Action>,
    model: &Model,
    kind: Kind,
    log: &[(usize, bool)],
) -> Vec<Part> {
    let Verdict::Seal(fresh) = model.verdict(kind, log) else {
        assert!(matches!(seen.last(), Some(Action::Fail { .. })), "{log:?}: {seen:?}");
        return Vec::new();
    };
    let Some(Action::Seal { id, parts, .. }) = seen.last().cloned() else {
        panic!("{log:?}: {seen:?}");
    };
    for (region, part) in parts.iter().enumerate() {
        let epoch = Some(part.epoch);
        assert_eq!((part.region, part.is_fresh), (region, fresh.contains(&region)));
        assert!(part.is_fresh || epoch == model.good[region], "{parts:?}");
        assert!(!part.is_fresh || epoch > model.good[region], "{parts:?}");
    }
    assert_eq!(parts.len(), model.good.len());
    if random.below(20) == 0 {
        seen.extend(stage.coordinator.sealed(stage.now, id, Err("disk full".into())));
        return Vec::new();
    }
    seen.extend(stage.seal());
    assert!(matches!(seen.last(), Some(Action::Complete { parts: said, .. }) if *said == parts));
    parts
}

/// Every cut that was begun is either in the complete checkpoint or aborted, and none twice.
fn check_cuts(seen: &[Action], good: &[Part]) {
    let mut open = BTreeSet::new();
    for action in seen {
        match action {
            Action::BeginCut { region, epoch } => assert!(open.insert((*region, *epoch))),
            Action::AbortCut { region, epoch } => assert!(open.remove(&(*region, *epoch))),
            _ => {}
        }
    }
    let fresh = good.iter().filter(|part| part.is_fresh);
    assert_eq!(open, fresh.map(|part| (part.region, part.epoch)).collect::<BTreeSet<_>>());
}
