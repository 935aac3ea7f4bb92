//! Drift between the ledger and the queue's Redis.

use std::time::Duration;

use queue::{Envelope, QueueError, TenantId};
use sagas::audit::{AuditError, AuditSettings, Auditor, FindingKind as Kind};
use serde_json::json;
use uuid::Uuid;

use crate::stage::{Stage, TENANT, TEXT, ingest_queue, settings, worker};

async fn flush(stage: &Stage) {
    let client = redis::Client::open(stage.services.redis_queue().url()).unwrap();
    let mut raw = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("FLUSHALL").exec_async(&mut raw).await.unwrap();
}

#[tokio::test]
async fn a_job_that_runs_without_a_lease_is_named_and_dispatched_again() {
    let stage = Stage::new().await;
    let id = stage.accept("story").await;
    let (claim, job) = stage.take().await;
    stage.sql("UPDATE jobs SET taken_at = now() - interval '1 h' WHERE id = $1", id.0).await;
    let report = stage.clean().await;
    assert_eq!(report.pending.unfinished, 1, "with its lease it just runs");

    flush(&stage).await;
    stage.sql("UPDATE jobs SET taken_at = now() WHERE id = $1", id.0).await;
    stage.clean().await; // its worker is about to register the lease again
    stage.sql("UPDATE jobs SET taken_at = now() - interval '1 h' WHERE id = $1", id.0).await;
    let report = stage.names(Kind::RunningWithoutLease).await;
    assert_eq!(report.findings[0].job, Some(id.0));
    stage.names_and_mends(Kind::RunningWithoutLease).await;
    drop((claim, job));

    // It comes back, and ends as if nothing had been.
    let (claim, job) = stage.take().await;
    assert_eq!((job.id, job.deliveries), (id, 2));
    stage.publish(&job, TEXT, None).await;
    stage.queue.ack(&[claim.lease_ref()]).await.unwrap();
    stage.clean().await;
}

#[tokio::test]
async fn a_lease_that_nobody_reaps_and_a_record_without_its_lease_are_named() {
    let stage = Stage::new().await;
    let id = stage.accept("story").await;
    stage.take().await;
    stage.sql("UPDATE jobs SET taken_at = now() - interval '1 h' WHERE id = $1", id.0).await;
    let later = stage.queue.at(chrono::Utc::now().timestamp_millis() + 3_600_000);
    let auditor = Auditor::new(stage.stores.clone(), Some(later));
    let report = auditor.run(&settings()).await.unwrap();
    assert_eq!(report.by_kind.get(&Kind::RunningWithoutLease), Some(&1), "{:#?}", report.findings);

    // The same, when only the lease itself is gone: no reaper would ever find the job.
    let client = redis::Client::open(stage.services.redis_queue().url()).unwrap();
    let mut raw = client.get_multiplexed_async_connection().await.unwrap();
    let key = "{flotilla:ingest:0}:l";
    let lease: i64 = redis::cmd("ZSCORE").arg(key).arg(id.to_string()).query_async(&mut raw).await.unwrap();
    redis::cmd("ZREM").arg(key).arg(id.to_string()).exec_async(&mut raw).await.unwrap();
    let report = stage.names(Kind::RunningWithoutLease).await;
    assert!(!report.findings[0].repairable);
    redis::cmd("ZADD").arg(key).arg(lease).arg(id.to_string()).exec_async(&mut raw).await.unwrap();
    stage.clean().await;

    let report = auditor.run(&AuditSettings { repair: true, ..settings() }).await.unwrap();
    assert_eq!((report.repaired, report.unrepaired()), (1, 0), "{:#?}", report.findings);
    assert_eq!(stage.take().await.1.id, id, "it waits again");
}

#[tokio::test]
async fn a_dispatched_job_that_redis_does_not_know_is_named_and_dispatched_again() {
    let stage = Stage::new().await;
    let lost = stage.accept_only("story").await;
    stage.clean().await; // it may be on its way
    stage.sql("UPDATE jobs SET dispatched_at = now() - interval '1 h' WHERE id = $1", lost.0).await;
    stage.names_and_mends(Kind::MissingInQueue).await;
    assert_eq!(stage.queue.missing(&[(ingest_queue(), lost)]).await.unwrap(), []);

    // One that the relay has yet to dispatch is pending.
    let waits = stage.accept_only("other").await;
    stage.stores.postgres.leave_to_relay(&[waits]).await.unwrap();
    let now = AuditSettings { dispatch_grace: Some(Duration::ZERO), ..settings() };
    let report = stage.auditor().run(&now).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert_eq!((report.pending.undispatched, report.pending.unfinished), (1, 2));
}

/// Its worker may have been killed before it could tell the ledger: then nobody but the queue has the job.
#[tokio::test]
async fn a_fast_job_that_only_the_queue_has_is_left_to_it() {
    let stage = Stage::new().await;
    // The ledger must know the queue for the audit to look at it.
    stage.accept_only("story").await;
    let tenant = TenantId::new(TENANT).unwrap();
    let fast = Envelope { fast: Some(json!({})), ..Envelope::new("ingest", ingest_queue(), tenant.clone()) };
    let strange = Envelope::new("ingest", ingest_queue(), tenant);
    stage.queue.push(&[fast.clone(), strange.clone()]).await.unwrap();
    assert_eq!(stage.queue.claim(&ingest_queue(), &worker(), 2).await.unwrap().len(), 2);

    let later = stage.queue.at(chrono::Utc::now().timestamp_millis() + 3_600_000);
    let auditor = Auditor::new(stage.stores.clone(), Some(later));
    let report = auditor.run(&AuditSettings { repair: true, ..settings() }).await.unwrap();
    let named: Vec<_> = report.findings.iter().map(|one| (one.kind, one.subject.clone())).collect();
    assert_eq!(named, [(Kind::LeaseWithoutJob, strange.id.to_string())]);
    let both = [(ingest_queue(), fast.id), (ingest_queue(), strange.id)];
    assert_eq!(stage.queue.missing(&both).await.unwrap(), [strange.id]);
}

#[tokio::test]
async fn rule_25_another_ledgers_queue_is_not_compared() {
    let stage = Stage::new().await;
    stage.queue.stamp(Uuid::now_v7()).await.unwrap();
    stage.accept("story").await;
    let error = stage.auditor().run(&AuditSettings { repair: true, ..settings() }).await.unwrap_err();
    assert!(matches!(error, AuditError::Queue(QueueError::OtherLedger { .. })), "{error}");
}

#[tokio::test]
async fn a_lease_of_a_job_that_has_ended_is_named() {
    let stage = Stage::new().await;
    let id = stage.accept("story").await;
    stage.take().await;
    let end = "UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = $1";
    stage.sql(end, id.0).await;
    stage.clean().await; // the ack may be on its way
    stage.sql("UPDATE jobs SET finished_at = now() - interval '1 h' WHERE id = $1", id.0).await;
    let report = stage.names(Kind::LeaseWithoutJob).await;
    assert!(!report.findings[0].repairable, "its worker still holds it");

    let later = stage.queue.at(chrono::Utc::now().timestamp_millis() + 3_600_000);
    let auditor = Auditor::new(stage.stores.clone(), Some(later));
    let report = auditor.run(&AuditSettings { repair: true, ..settings() }).await.unwrap();
    assert_eq!((report.repaired, report.unrepaired()), (1, 0), "{:#?}", report.findings);
    stage.clean().await;
    assert_eq!(stage.queue.missing(&[(ingest_queue(), id)]).await.unwrap(), [id]);
}
