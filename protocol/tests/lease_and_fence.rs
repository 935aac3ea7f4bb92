//! The protocol, checked in every state that it can reach within the bounds; and that the properties would notice mistakes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use protocol::{Bounds, Bug, Outcome, Protocol, State, reach};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

const STALE: &str = "no stale write has an effect";
const ONCE: &str = "an end is committed once";
const AGAIN: &str = "an ended job is never run again";
const STOLEN: &str = "no lease is taken from its holder";
const LEFT: &str = "no job leaves Redis before its end is committed";

/// One job, and each kind of trouble at once as often as given.
const ONE: Bounds = Bounds { jobs: 1, ..Bounds::CALM };
/// Every way to lose a lease.
const LOSSES: Bounds = Bounds { crashes: 1, pauses: 1, delays: 1, flushes: 1, ..ONE };
/// What people and producers do, with a zombie and a loss.
const REQUESTS: Bounds = Bounds { pauses: 1, flushes: 1, releases: 1, cancels: 1, lost_pushes: 1, ..ONE };
/// An old copy of Redis' data comes back.
const RESTARTS: Bounds = Bounds { crashes: 1, pauses: 1, restarts: 1, releases: 1, ..ONE };
/// Two jobs, which meet in the workers and in what happens to all of Redis.
const TWO: Bounds = Bounds { crashes: 1, flushes: 1, slow_reconciler: false, ..Bounds::CALM };

/// How long a search may take. The checker says that it is done also when it was cut off, so the clock is asked.
const IN_TIME: Duration = Duration::from_secs(1200);

/// Every state within the bounds keeps every property. States that differ only in the numbers of jobs and workers count
/// as one.
fn holds(name: &str, bounds: Bounds) {
    let begun = Instant::now();
    let checker = Protocol::new(bounds)
        .checker()
        .threads(2)
        .symmetry_fn(State::representative)
        .timeout(IN_TIME)
        .spawn_dfs()
        .join();
    println!(
        "{name}: {} states, {} steps, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    assert!(begun.elapsed() < IN_TIME, "not all states were seen in time");
    checker.assert_properties();
}

/// The property that a mistake breaks first, with the shortest way there.
fn breaks(bounds: Bounds, bug: Bug) -> Option<(&'static str, usize)> {
    breaks_within(IN_TIME, bounds, bug)
}

fn breaks_within(time: Duration, bounds: Bounds, bug: Bug) -> Option<(&'static str, usize)> {
    let begun = Instant::now();
    let checker = Protocol::with_bug(bounds, bug)
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .timeout(time)
        .spawn_bfs()
        .join();
    let found = checker
        .discoveries()
        .into_iter()
        .filter(|(name, _)| checker.model().property(name).expectation == Expectation::Always)
        .map(|(name, path)| (name, path.into_actions()))
        .min_by_key(|(_, path)| path.len());
    let Some((name, path)) = found else {
        assert!(begun.elapsed() < time, "{bug:?}: not all states were seen in time");
        println!("{bug:?}: breaks nothing in {} states", checker.unique_state_count());
        return None;
    };
    println!("{bug:?}: breaks \"{name}\" in {} steps: {path:?}", path.len());
    Some((name, path.len()))
}

#[test]
fn one_job_is_safe_however_its_lease_is_lost() {
    holds("losses", LOSSES);
}

#[test]
fn one_job_is_safe_whatever_people_and_producers_do() {
    holds("requests", REQUESTS);
}

#[test]
fn an_older_copy_of_redis_harms_nothing() {
    holds("restarts", RESTARTS);
}

#[test]
fn two_jobs_are_safe() {
    holds("two jobs", TWO);
}

#[test]
fn from_every_state_every_job_can_come_to_its_end() {
    let all = [
        ("losses", Bounds { delays: 0, ..LOSSES }),
        ("requests", Bounds { pauses: 0, flushes: 0, delays: 1, ..REQUESTS }),
        ("restarts", Bounds { releases: 0, ..RESTARTS }),
    ];
    let (mut answers, mut facts) = (BTreeSet::new(), BTreeSet::new());
    for (name, bounds) in all {
        let begun = Instant::now();
        let reach = reach::explore(&Protocol::new(bounds));
        println!(
            "{name}: {} states, {} steps, {:.1} s",
            reach.states,
            reach.steps,
            begun.elapsed().as_secs_f64()
        );
        assert_eq!(reach.stuck, None, "{name}: the way to a state that nothing leads out of");
        facts.extend(reach.facts.iter().filter(|(_, seen)| **seen).map(|(fact, _)| *fact));
        answers.extend(reach.answers.into_keys());
    }
    // The model is not empty: trouble really comes, and is really met.
    for (fact, _) in reach::FACTS {
        assert!(facts.contains(fact), "never happens: {fact}");
    }
    for (action, outcome) in [
        ("Write", Outcome::Refused),
        ("Finish", Outcome::Refused),
        ("Finish", Outcome::Cancelled),
        ("Return", Outcome::Refused),
        ("Take", Outcome::Gone),
        ("Take", Outcome::NotYet),
        ("Heartbeat", Outcome::Lost),
        ("Heartbeat", Outcome::Vanished),
        ("Restore", Outcome::Restored),
        ("Restore", Outcome::TakenOver),
        ("Restore", Outcome::Lost),
        ("Ack", Outcome::NotOurs),
        ("Release", Outcome::NotOurs),
        ("Cancel", Outcome::Ended),
        ("Cancel", Outcome::Requested),
        ("Reconcile", Outcome::Queued),
        ("Reconcile", Outcome::Present),
        ("Push", Outcome::Present),
    ] {
        assert!(answers.contains(&(action.to_owned(), outcome)), "{action} is never answered {outcome:?}");
    }
}

#[test]
#[should_panic(expected = "not all states were seen in time")]
fn a_search_that_is_cut_off_proves_nothing() {
    breaks_within(Duration::from_millis(10), LOSSES, Bug::ReapAtOnce);
}

#[test]
fn rule_02_without_the_fence_a_zombie_has_effects() {
    assert_eq!(breaks(LOSSES, Bug::FinishWithoutFence).unwrap().0, STALE);
    assert_eq!(breaks(LOSSES, Bug::WriteWithoutFence).unwrap().0, STALE);
    let (property, _) = breaks(LOSSES, Bug::FinishWithoutAnyPredicate).unwrap();
    assert!([STALE, ONCE].contains(&property));
}

#[test]
fn rule_01_a_fence_from_redis_is_given_twice() {
    // After FLUSHALL Redis counts from the beginning: the zombie's number is the new holder's.
    let (property, _) = breaks(LOSSES, Bug::FenceFromRedis).unwrap();
    assert!([STALE, "one run at most can have an effect"].contains(&property), "{property}");
    // Nothing less than a loss of data shows it: that is why it would pass most tests.
    assert_eq!(breaks(Bounds { flushes: 0, ..LOSSES }, Bug::FenceFromRedis), None);
}

#[test]
fn rule_01_a_take_that_looks_at_no_state_runs_ended_jobs() {
    assert_eq!(breaks(LOSSES, Bug::TakeOfEndedJobs).unwrap().0, AGAIN);
}

#[test]
fn rule_12_an_ack_before_the_commit_loses_the_job_from_redis() {
    assert_eq!(breaks(LOSSES, Bug::AckBeforeCommit).unwrap().0, LEFT);
}

#[test]
fn rule_14_a_cancel_takes_no_running_job_out_of_redis() {
    assert_eq!(breaks(Bounds { delays: 1, ..REQUESTS }, Bug::ForgetOfRunningJobs).unwrap().0, LEFT);
}

#[test]
fn rule_05_a_lease_is_its_holders() {
    assert_eq!(breaks(LOSSES, Bug::RestoreOverOthers).unwrap().0, STOLEN);
    assert_eq!(breaks(LOSSES, Bug::AckWithoutToken).unwrap().0, STOLEN);
}

#[test]
fn rule_16_reaping_at_once_after_a_loss_is_waste_and_no_danger() {
    // The reaper's wait saves running jobs twice. What makes a second run harmless is the fence, so no property breaks.
    for bounds in [Bounds { delays: 0, ..LOSSES }, Bounds { releases: 0, ..RESTARTS }] {
        assert_eq!(breaks(bounds, Bug::ReapAtOnce), None);
    }
}

#[test]
fn rule_18_without_reconciler_or_reaper_a_job_is_stuck() {
    for bug in [Bug::NoReconciler, Bug::NoReaper] {
        let reach = reach::explore(&Protocol::with_bug(Bounds { delays: 0, pauses: 0, ..LOSSES }, bug));
        let way = reach.stuck.expect("a state that nothing leads out of");
        println!("{bug:?}: stuck after {} steps: {way:?}", way.len());
    }
}

#[test]
fn nothing_goes_wrong_by_itself() {
    let reach = reach::explore(&Protocol::new(Bounds::CALM));
    let refused: Vec<_> =
        reach.answers.iter().filter(|((_, outcome), _)| *outcome == Outcome::Refused).collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert!(
        reach.facts.iter().all(|(fact, seen)| !seen || *fact == "an ended job waits in Redis"),
        "{:?}",
        reach.facts
    );
    assert_eq!(reach.stuck, None);
    let size = std::mem::size_of::<State>();
    assert!(size < 200, "a state of {size} bytes is too large for millions of them");
}
