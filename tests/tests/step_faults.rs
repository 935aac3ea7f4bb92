//! Steps that fail or never end: tried again, compensated, or brought to their end by another delivery, never half.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use e2e::{Fleet, Outcome, Subject};
use futures::future::join_all;

const LANES: usize = 4;

struct Case {
    kind: &'static str,
    faults: &'static str,
    outcome: Outcome,
    /// Charged failures of the job.
    attempts: i32,
}

const fn case(kind: &'static str, faults: &'static str, outcome: Outcome, attempts: i32) -> Case {
    Case { kind, faults, outcome, attempts }
}

/// A step is tried 3 times within a delivery, a job 5 times.
const CASES: [Case; 20] = [
    case("ingest", "ingest.stage.before=error", Outcome::Done, 0),
    case("ingest", "ingest.stage.inside=error", Outcome::Done, 0),
    case("ingest", "ingest.vectors.inside=error*2", Outcome::Done, 0),
    case("ingest", "ingest.cache.after=error*3", Outcome::Done, 1),
    case("ingest", "ingest.vectors.after=error*6", Outcome::Done, 2),
    case("ingest", "ingest.publish.inside=error*3", Outcome::Done, 1),
    case("ingest", "ingest.publish.after=error", Outcome::Done, 0),
    case("ingest", "ingest.publish.before=error*15", Outcome::Dead, 5),
    case(
        "ingest",
        "ingest.publish.before=permanent;ingest.vectors.compensate.before=error*2",
        Outcome::Dead,
        1,
    ),
    case("ingest", "ingest.publish.before=permanent;engine.finish.inside=error", Outcome::Dead, 1),
    case("embed_document", "embed_document.vectors.after=error*3", Outcome::Done, 1),
    case("delete", "delete.tombstone.inside=error*3", Outcome::Done, 1),
    case("delete", "delete.purge_cache.before=error*4", Outcome::Done, 0),
    case("probe", "probe.second.after=error*3", Outcome::Done, 1),
    case("probe", "probe.effect.inside=error*4", Outcome::Done, 1),
    // A hanging step is ended by the job's own time, a hanging store call by the call's.
    case("ingest", "ingest.vectors.before=hang", Outcome::Done, 1),
    case("ingest", "ingest.publish.inside=hang", Outcome::Done, 0),
    case("embed_document", "embed_document.cache.after=hang", Outcome::Done, 1),
    case("delete", "delete.purge_vectors.before=hang", Outcome::Done, 0),
    // The pivot: it is tried until it has succeeded, because nobody knows whether it took effect.
    case("probe", "probe.third.before=hang", Outcome::Done, 0),
];

async fn run(fleet: &Fleet, no: usize, subject: &Subject) {
    let case = &CASES[no];
    let faults = fleet.faults(&format!("case-{no}"), case.faults);
    let worker = fleet.worker().queues(&[subject.queue.as_str()]).armed(&faults).start();
    let job = fleet.begin(subject).await;
    fleet.assert_outcome(subject, job, case.outcome).await;
    let point = case.faults.split('=').next().unwrap();
    assert!(faults.fired(point) > 0, "{point} was not met");
    let attempts = fleet.postgres.attempts(job).await.unwrap();
    assert_eq!(
        attempts.len(),
        case.attempts as usize,
        "{}: {attempts:#?}{}",
        case.faults,
        fleet.describe(job).await
    );
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    println!(
        "case {no}: {} with {}: {:?} after {} charged failures",
        case.kind, case.faults, case.outcome, case.attempts
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_fail_or_hang_are_tried_again_or_undone() {
    let fleet = Fleet::start().await;
    let mut subjects: Vec<Subject> = CASES
        .iter()
        .enumerate()
        .map(|(no, case)| {
            let mut subject =
                Subject::new(case.kind, &format!("{}-{no}", case.kind), &format!("lane-{}", no % LANES));
            if case.faults.contains("hang") {
                // Enough for the attempt after the hang, on a busy machine, too.
                subject.timeout = Duration::from_secs(5);
            }
            subject
        })
        .collect();
    fleet.seed(&mut subjects).await;
    let lane = async |lane: usize| {
        for (no, subject) in subjects.iter().enumerate().filter(|(no, _)| no % LANES == lane) {
            run(&fleet, no, subject).await;
        }
    };
    join_all((0..LANES).map(lane)).await;
    let janitor = fleet.worker().start();
    janitor.ready().await;
    fleet.audit_clean().await;
    println!("{} cases of failing and hanging steps passed", CASES.len());
    assert!(janitor.terminate().await.success());
    drop(janitor);
    fleet.end();
}
