//! What the ladder decides, death by death.

use super::*;
use std::time::Duration;

const ALL: Rungs = Rungs { cold: true, region: true, job: true };

fn budget(deaths: u32, period: Option<Duration>) -> RestartBudget {
    RestartBudget { deaths, period }
}

fn ladder(rungs: Rungs) -> Ladder {
    Ladder::new(budget(50, None), rungs)
}

fn batch(from: u64, to: u64) -> Where {
    Where::Batch(Place { stage: 1, input: 0, from: [from, 0], to: [to, 0] })
}

fn record(at: u64) -> Where {
    Where::Record(Spot { stage: 1, input: 0, at: [at, 0], inner: 0, index: 0 })
}

fn death(cause: Cause, place: Where) -> Death {
    Death { cause, has_committed: false, lived_ns: 1000, at_ns: 0, place, is_state_damaged: false }
}

fn rungs(ladder: &mut Ladder, deaths: &[Death]) -> Vec<Rung> {
    deaths.iter().map(|death| ladder.died(death).rung).collect()
}

#[test]
fn r17_a_record_is_convicted_by_three_deaths_alone() {
    let mut ladder = ladder(Rungs::default());
    let fault = |place| death(Cause::Fault(11), place);
    let begin = [fault(batch(0, 512)), fault(batch(0, 512))];
    assert_eq!(rungs(&mut ladder, &begin), [Rung::Warm, Rung::Careful]);
    for _ in 0..2 {
        let decision = ladder.died(&fault(record(77)));
        assert_eq!((decision.rung, decision.convicted), (Rung::Careful, None));
    }
    let decision = ladder.died(&fault(record(77)));
    let Where::Record(spot) = record(77) else { unreachable!() };
    assert_eq!(decision.convicted, Some(spot), "five deaths in all");
    ladder.put_aside();
    ladder.passed();
    assert_eq!(ladder.died(&fault(batch(600, 700))).rung, Rung::Warm, "it begins anew");
}

#[test]
fn r17_only_own_doing_leads_to_careful_and_convicts() {
    for cause in [Cause::Killed, Cause::Unknown, Cause::Exit(3)] {
        let mut ladder = ladder(ALL);
        let all = [death(cause, batch(0, 512)); 20];
        assert_eq!(rungs(&mut ladder, &all), [Rung::Warm; 20], "{cause:?}");
        rungs(&mut ladder, &[death(Cause::Panic, batch(0, 512)); 2]);
        for _ in 0..20 {
            assert_eq!(ladder.died(&death(cause, record(7))).convicted, None, "{cause:?}");
        }
    }
}

#[test]
fn r17_two_places_are_two_faults() {
    let mut ladder = ladder(Rungs::default());
    for step in 0..20 {
        let other = Where::Batch(Place {
            stage: 1,
            input: 1,
            from: [step * 512, 0],
            to: [step * 512 + 512, 0],
        });
        let deaths = [death(Cause::Panic, batch(step * 512, step * 512 + 512)), {
            death(Cause::Abort, other)
        }];
        let taken = rungs(&mut ladder, &deaths.map(|death| Death { has_committed: true, ..death }));
        assert_eq!(taken, [Rung::Warm, Rung::Warm]);
    }
}

#[test]
fn r17_deaths_of_several_records_are_counted_apart() {
    let mut ladder = ladder(Rungs::default());
    rungs(&mut ladder, &[death(Cause::Panic, batch(0, 512)); 2]);
    for at in [1, 2, 1, 2] {
        let progress = Death { has_committed: true, ..death(Cause::Panic, record(at)) };
        assert_eq!(ladder.died(&progress).convicted, None);
    }
    assert!(ladder.died(&death(Cause::Panic, record(2))).convicted.is_some());
}

#[test]
fn what_fires_without_a_record_goes_up_the_ladder() {
    use Rung::{Careful, Cold, Failure, Job, Region, Warm};
    let place = Place { stage: 1, input: u32::MAX, from: [0, 0], to: [1, 0] };
    let fired = death(Cause::Fault(11), Where::Fired(place));
    let mut with_all = Ladder::new(budget(8, None), ALL);
    let expected = [Warm, Careful, Careful, Cold, Warm, Region, Warm, Job, Failure];
    assert_eq!(rungs(&mut with_all, &[fired; 9]), expected);
    let mut without = Ladder::new(budget(4, None), Rungs::default());
    let expected = [Warm, Careful, Careful, Careful, Failure];
    assert_eq!(rungs(&mut without, &[fired; 5]), expected, "as long as the budget lasts");
}

#[test]
fn a_rung_that_the_job_does_not_have_is_passed_over() {
    let mut ladder = ladder(Rungs { job: true, ..Rungs::default() });
    let fired = [death(Cause::Panic, Where::Elsewhere); 4];
    assert_eq!(rungs(&mut ladder, &fired), [Rung::Warm, Rung::Warm, Rung::Warm, Rung::Job]);
    let damaged = Death { is_state_damaged: true, ..death(Cause::Unknown, Where::Elsewhere) };
    assert_eq!(ladder.died(&damaged).rung, Rung::Job);
}

#[test]
fn state_that_does_not_verify_is_restored_at_once() {
    let damaged = Death { is_state_damaged: true, ..death(Cause::Unknown, Where::Elsewhere) };
    assert_eq!(ladder(ALL).died(&damaged).rung, Rung::Cold);
}

#[test]
fn a_plain_budget_counts_deaths_in_a_row() {
    let mut ladder = Ladder::new(budget(2, None), ALL);
    let killed = |at_ns| Death { at_ns, ..death(Cause::Killed, Where::Elsewhere) };
    assert_eq!(rungs(&mut ladder, &[killed(0), killed(1 << 60)]), [Rung::Warm, Rung::Warm]);
    let progress = Death { has_committed: true, ..killed(0) };
    assert_eq!(ladder.died(&progress).in_a_row, 1);
    let long = Death { lived_ns: SOUND_LIFE_NS + 1, ..killed(0) };
    assert_eq!(ladder.died(&long).in_a_row, 1, "it lived long without work");
    assert_eq!(rungs(&mut ladder, &[killed(0), killed(0)]), [Rung::Warm, Rung::Failure]);
}

#[test]
fn a_budget_for_a_period_forgets_what_is_older() {
    let minute = Duration::from_secs(60);
    let mut ladder = Ladder::new(budget(2, Some(minute)), ALL);
    let killed =
        |s: u64| Death { at_ns: s * 1_000_000_000, ..death(Cause::Killed, Where::Elsewhere) };
    for s in (0..3000).step_by(31) {
        assert_eq!(ladder.died(&killed(s)).rung, Rung::Warm, "second {s}");
    }
    let mut ladder = Ladder::new(budget(2, Some(minute)), ALL);
    let taken = rungs(&mut ladder, &[killed(0), killed(25), killed(59)]);
    assert_eq!(taken, [Rung::Warm, Rung::Warm, Rung::Failure]);
}

#[test]
fn pauses_double_up_to_half_a_second() {
    let mut ladder = ladder(ALL);
    let all: Vec<u64> = (0..12)
        .map(|_| ladder.died(&death(Cause::Killed, Where::Elsewhere)).pause_ns / 1_000_000)
        .collect();
    assert_eq!(all, [0, 8, 16, 32, 64, 128, 256, 500, 500, 500, 500, 500]);
}
