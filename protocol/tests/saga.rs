//! Sagas with zombies and crashes at every point, in every state within the bounds; and that the properties notice mistakes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use protocol::saga::{ENDED, Kind, Mistake, NEWER, ONCE, OWNED, STALE, Sagas, WHOLE, Write};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

const INGESTS: Sagas =
    Sagas { kinds: [Kind::Ingest, Kind::Ingest], takes: 2, failures: 1, crashes: 1, mistake: None };
/// An ingest, and a deletion that was accepted after it.
const DELETES: Sagas = Sagas { kinds: [Kind::Ingest, Kind::Delete], ..INGESTS };
/// More of everything, for one job at a time: the other one is a deletion that is taken once.
const LONGER: Sagas = Sagas { takes: 3, failures: 2, crashes: 0, ..DELETES };

/// How long a search may take. The checker says that it is done also when it was cut off, so the clock is asked.
const IN_TIME: Duration = Duration::from_secs(240);

fn holds(name: &str, model: Sagas) {
    let begun = Instant::now();
    let checker = model.checker().threads(2).timeout(IN_TIME).spawn_dfs().join();
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

/// The properties that a mistake breaks, looked for one at a time so that none hides another.
fn breaks(model: Sagas, mistake: Mistake) -> Vec<&'static str> {
    breaks_within(IN_TIME, model, mistake)
}

fn breaks_within(time: Duration, model: Sagas, mistake: Mistake) -> Vec<&'static str> {
    let begun = Instant::now();
    let checker = Sagas { mistake: Some(mistake), ..model }
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AllFailures)
        .timeout(time)
        .spawn_bfs()
        .join();
    assert!(begun.elapsed() < time, "{mistake:?}: not all states were seen in time");
    let mut broken: Vec<&'static str> = vec![];
    for (name, path) in checker.discoveries() {
        if checker.model().property(name).expectation == Expectation::Always {
            println!("{mistake:?} breaks \"{name}\": {:?}", path.into_actions());
            broken.push(name);
        }
    }
    broken.sort_unstable();
    broken
}

#[test]
fn two_ingests_are_safe_whoever_wakes_when() {
    holds("two ingests", INGESTS);
}

#[test]
fn an_ingest_and_a_deletion_are_safe_whoever_wakes_when() {
    holds("an ingest and a deletion", DELETES);
}

#[test]
fn more_takes_and_failures_are_safe() {
    holds("more takes and failures", LONGER);
}

#[test]
#[should_panic(expected = "not all states were seen in time")]
fn a_search_that_is_cut_off_proves_nothing() {
    breaks_within(Duration::from_millis(10), LONGER, Mistake::PublishWithoutOrder);
}

#[test]
fn rule_02_each_write_needs_its_fence() {
    for write in Write::ALL {
        let broken = breaks(DELETES, Mistake::Unfenced(write));
        assert!(broken.contains(&STALE), "{write:?}: {broken:?}");
        // A pivot and an end also show: as half a state, as an effect of a job that has none, or as a second end. The others change
        // what the log says, and the harm would come with the writes that follow, which have their fence here.
        let shows = [ONCE, WHOLE, ENDED, OWNED].iter().any(|property| broken.contains(property));
        let ends = matches!(write, Write::Publish | Write::Bury | Write::Finish | Write::Complete);
        assert!(shows || !ends, "{write:?}: {broken:?}");
    }
}

#[test]
fn rule_06_the_decision_to_compensate_is_committed_first() {
    assert!(breaks(INGESTS, Mistake::UndoBeforeLog).contains(&WHOLE));
}

#[test]
fn rule_06_a_retry_has_a_version_of_its_own() {
    assert!(breaks(Sagas { takes: 3, ..DELETES }, Mistake::SameVersionAgain).contains(&WHOLE));
}

#[test]
fn rule_08_publish_looks_at_the_order() {
    let broken = breaks(INGESTS, Mistake::PublishWithoutOrder);
    assert!(broken.contains(&NEWER), "{broken:?}");
    assert!(!broken.contains(&OWNED), "{broken:?}");
}
