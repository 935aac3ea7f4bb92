//! Rules of `PROTOCOL.md` that show only in a whole worker.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, SHORT, TENANT, text, wait_until};

use queue::{Envelope, QueueName};
use sagas::stores::postgres::{accept::NewJob, ledger::Cancel};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_06_the_decision_to_compensate_is_committed_before_the_first_compensating_call() {
    let fleet = Fleet::start().await;
    let worker =
        fleet.worker().faults("ingest.publish.before=permanent;ingest.cache.compensate.before=kill").start();
    let job = fleet.ingest("a", &text("a", 1)).await;
    worker.killed().await;
    let run = fleet.postgres.sagas_of(job).await.unwrap().remove(0);
    assert_eq!(run.state, "compensating", "{}", fleet.describe(job).await);
    let verdict = run.verdict.expect("the verdict");
    assert_eq!(verdict["end"], "dead", "{verdict}");
    // Its successor has no fault points: it could go forward, and does not.
    let next = fleet.worker().start();
    assert_eq!(fleet.ended(job).await, "dead");
    let runs = fleet.postgres.sagas_of(job).await.unwrap();
    assert_eq!(runs.iter().map(|run| run.state.as_str()).collect::<Vec<_>>(), ["compensated"]);
    fleet.audit_clean().await;
    assert!(next.terminate().await.success(), "{}", next.tail());
    drop((worker, next));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_14_a_running_job_is_cancelled_and_leaves_nothing() {
    let fleet = Fleet::start().await;
    let worker = fleet.worker().faults("ingest.publish.before=hang").start();
    let job = fleet.ingest("a", &text("a", 1)).await;
    wait_until("the job is before its pivot", SHORT, async || {
        if fleet.fired("ingest.publish.before") == 1 { Ok(()) } else { Err(worker.tail()) }
    })
    .await;
    assert_eq!(fleet.postgres.cancel(job, Some(TENANT)).await.unwrap(), Cancel::Requested);
    assert_eq!(fleet.ended(job).await, "cancelled");
    let runs = fleet.postgres.sagas_of(job).await.unwrap();
    assert_eq!(runs[0].state, "compensated", "{}", fleet.describe(job).await);
    assert!(fleet.stores.document(TENANT, "a").await.unwrap().is_none());
    let report = fleet.audit_clean().await;
    assert_eq!((report.counts.points, report.counts.cache_entries), (0, 0));
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    drop(worker);
    fleet.end();
}

/// Redis alone has seen these jobs before a worker takes them: the ledger may refuse what was accepted, and their records may be
/// of another release.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_12_a_job_that_the_ledger_refuses_keeps_no_slot_from_others() {
    let fleet = Fleet::start().await;
    let fast = |job: &NewJob, record: serde_json::Value| Envelope {
        id: job.id,
        fast: Some(record),
        ..Envelope::new(job.kind.clone(), job.queue.clone(), job.tenant.clone())
    };
    let refused = NewJob { max_attempts: 0, ..fleet.ingest_job("refused", "x") };
    let newer = fleet.ingest_job("newer", "x");
    let jobs = [
        fast(&refused, serde_json::to_value(&refused).unwrap()),
        fast(&newer, json!({ "from": "a newer release" })),
    ];
    fleet.queue.push(&jobs).await.unwrap();
    let worker = fleet.worker().concurrency(1).start();
    let job = fleet.ingest("a", &text("a", 1)).await;
    assert_eq!(fleet.ended(job).await, "succeeded", "{}", worker.tail());
    let ingest = QueueName::new("ingest").unwrap();
    wait_until("both wait for another try", SHORT, async || {
        let stats = fleet.queue.stats(&ingest).await.unwrap();
        if (stats.scheduled, stats.in_flight) == (2, 0) { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    drop(worker);
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_15_an_unknown_kind_waits_uncharged_for_a_worker_that_knows_it() {
    let fleet = Fleet::start().await;
    let (patient, strict) = (fleet.worker().queues(&["patient"]), fleet.worker().queues(&["strict"]));
    let patient = patient.env("FLOTILLA_UNROUTABLE_AFTER_MS", "3600000").start();
    let strict = strict.env("FLOTILLA_UNROUTABLE_AFTER_MS", "1000").start();
    let job = |queue: &str| {
        let mut job = fleet.job("from_a_newer_release", json!({}));
        job.queue = queue::QueueName::new(queue).unwrap();
        job
    };
    let ids = fleet.accept(vec![job("patient"), job("strict")]).await;
    wait_until("it was looked at and put back", SHORT, async || {
        let job = fleet.postgres.job(ids[0], None).await.unwrap().unwrap();
        if job.deliveries > 0 && job.state == "waiting" { Ok(()) } else { Err(format!("{job:?}")) }
    })
    .await;
    let waiting = fleet.postgres.job(ids[0], None).await.unwrap().unwrap();
    assert_eq!((waiting.attempts, waiting.lost_deliveries), (0, 0));
    assert!(waiting.run_at > chrono::Utc::now(), "put back without a delay: {waiting:?}");
    // Where nobody has known it for long, it is dead.
    assert_eq!(fleet.ended(ids[1]).await, "dead");
    let letter = fleet.postgres.dead_letter(ids[1].0).await.unwrap().unwrap();
    assert_eq!(letter.class, "unknown_kind");
    let dead = fleet.postgres.job(ids[1], None).await.unwrap().unwrap();
    assert!(dead.deliveries > 1, "dead at first sight: {dead:?}");
    for worker in [&patient, &strict] {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    // Who stops says how many have ended; what was put back has not.
    for (queue, dead) in [("patient", 0), ("strict", 1)] {
        let rates = &fleet.flotilla(0, &["queues", "rates", queue])[0]["hour"];
        assert_eq!((&rates["ended"], &rates["dead"]), (&json!(dead), &json!(dead)), "{queue}: {rates}");
    }
    drop((patient, strict));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_a_job_that_alone_meets_an_outage_is_charged_after_five_times() {
    let fleet = Fleet::start().await;
    // Three tries of the step with five calls each: one failed attempt, and then it works.
    let worker = fleet.worker().patient().faults("ingest.stage.inside=unavailable*15").start();
    let job = fleet.ingest("a", &text("a", 1)).await;
    assert_eq!(fleet.ended(job).await, "succeeded");
    assert_eq!(fleet.fired("ingest.stage.inside"), 15);
    let attempts = fleet.postgres.attempts(job).await.unwrap();
    assert_eq!(attempts.len(), 1, "{}", fleet.describe(job).await);
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    drop(worker);
    fleet.end();
}
