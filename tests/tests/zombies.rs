//! Zombies: a worker is stopped inside a step until its lease is long gone and its successor has brought the job to its end;
//! then it goes on. Nothing changes by that, and the worker is of use again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, Outcome, SHORT, Subject, wait_until};
use futures::future::join_all;

const LANES: usize = 4;

/// The kind, where it is stopped, and where its successor fails, if it does.
const CASES: [(&str, &str, Option<&str>); 17] = [
    ("ingest", "ingest.stage.before", None),
    ("ingest", "ingest.stage.inside", None),
    ("ingest", "ingest.vectors.before", None),
    ("ingest", "ingest.vectors.inside", None),
    ("ingest", "ingest.vectors.inside", Some("ingest.publish.before")),
    ("ingest", "ingest.vectors.after", Some("ingest.publish.before")),
    ("ingest", "ingest.cache.before", Some("ingest.publish.before")),
    ("ingest", "ingest.publish.before", None),
    ("ingest", "ingest.publish.before", Some("ingest.cache.after")),
    ("ingest", "ingest.publish.inside", None),
    ("embed_document", "ingest.vectors.inside", None),
    ("embed_document", "embed_document.publish.before", Some("embed_document.cache.after")),
    ("delete", "delete.tombstone.inside", None),
    ("delete", "delete.purge_vectors.before", None),
    ("probe", "probe.first.before", None),
    ("probe", "probe.effect.inside", None),
    ("probe", "probe.second.after", Some("probe.third.before")),
];

async fn run(fleet: &Fleet, no: usize, subject: &Subject) {
    let (kind, point, fails_at) = CASES[no];
    let stops = fleet.faults(&format!("case-{no}"), format!("{point}=stop"));
    let queue = subject.queue.as_str();
    let zombie = fleet.worker().queues(&[queue]).concurrency(1).armed(&stops).start();
    let job = fleet.begin(subject).await;
    wait_until("the fault point acts", SHORT, async || {
        if stops.fired(point) == 1 {
            Ok(())
        } else {
            Err(format!("{point} was not met{}\n{}", fleet.describe(job).await, zombie.tail()))
        }
    })
    .await;
    zombie.stopped().await;
    let fails = fleet.faults(
        &format!("case-{no}-successor"),
        fails_at.map(|at| format!("{at}=permanent")).unwrap_or_default(),
    );
    let successor = fleet.worker().queues(&[queue]).armed(&fails).start();
    let outcome = if fails_at.is_some() { Outcome::Dead } else { Outcome::Done };
    fleet.assert_outcome(subject, job, outcome).await;
    fleet.swept(subject).await;
    let before = fleet.snapshot(subject, job).await;
    assert!(successor.terminate().await.success(), "{}", successor.tail());

    zombie.resume();
    // It has one slot: when it has brought another job to its end, it has done with the old one.
    let next = fleet.begin(&Subject::new("probe", "next", queue)).await;
    assert_eq!(fleet.ended(next).await, "succeeded", "{}", zombie.tail());
    let after = fleet.snapshot(subject, job).await;
    assert_eq!(before, after, "the zombie of {kind} at {point} changed something\n{}", zombie.tail());
    fleet.assert_outcome(subject, job, outcome).await;
    assert!(zombie.terminate().await.success(), "{}", zombie.tail());
    println!("case {no}: {kind} stopped at {point}, successor {outcome:?}: nothing changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_wakes_after_its_successor_has_ended_the_job_changes_nothing() {
    let fleet = Fleet::start().await;
    let mut subjects: Vec<Subject> = CASES
        .iter()
        .enumerate()
        .map(|(no, (kind, ..))| Subject::new(kind, &format!("{kind}-{no}"), &format!("lane-{}", no % LANES)))
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
    println!("{} zombies, none changed anything", CASES.len());
    assert!(janitor.terminate().await.success());
    drop(janitor);
    fleet.end();
}
