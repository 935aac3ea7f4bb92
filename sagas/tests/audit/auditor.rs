//! The auditor's place, its pace, and what it leaves in the ledger.

use std::time::{Duration, Instant};

use sagas::audit::{AuditSettings, FindingKind as Kind};

use crate::stage::{Stage, TEXT, settings};

const HOLD: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

impl Stage {
    async fn due(&self) {
        sqlx::query("UPDATE auditor SET due_at = now()").execute(self.stores.postgres.pool()).await.unwrap();
    }
}

#[tokio::test]
async fn one_of_the_fleet_audits_when_it_is_due_until_it_ends_or_is_not_heard_of() {
    let stage = Stage::new().await;
    let postgres = &stage.stores.postgres;
    assert!(!postgres.begin_audit("one", HOLD).await.unwrap(), "a new fleet is filled first");
    stage.due().await;
    let names: Vec<String> = (0..16).map(|n| format!("worker {n}")).collect();
    let asked = names.iter().map(|name| async move { postgres.begin_audit(name, HOLD).await.unwrap() });
    let won: Vec<bool> = futures::future::join_all(asked).await;
    assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
    let (holder, other) = if won[0] {
        (&names[0], &names[1])
    } else {
        let at = won.iter().position(|won| *won).unwrap();
        (&names[at], &names[0])
    };
    assert!(postgres.keep_audit(holder, HOLD).await.unwrap());
    assert!(!postgres.keep_audit(other, HOLD).await.unwrap());
    assert!(!postgres.end_audit(other, None, HOUR).await.unwrap());
    assert!(!postgres.begin_audit(other, HOLD).await.unwrap());

    // Its holder is not heard of any more.
    assert!(postgres.keep_audit(holder, Duration::ZERO).await.unwrap());
    assert!(postgres.begin_audit(other, HOLD).await.unwrap());
    let report = stage.audit().await;
    assert!(!postgres.end_audit(holder, Some(&report), HOUR).await.unwrap(), "the late one writes nothing");
    assert_eq!(postgres.drift().await.unwrap().finished_at, None);
    assert!(postgres.end_audit(other, Some(&report), HOUR).await.unwrap());
    assert!(!postgres.begin_audit(holder, HOLD).await.unwrap(), "not due for an hour");
    let drift = postgres.drift().await.unwrap();
    assert!(drift.finished_at.is_some() && drift.age_s < 60.0 && drift.by_kind.is_empty(), "{drift:?}");
}

#[tokio::test]
async fn what_was_found_stands_until_an_audit_comes_to_its_end_without_it() {
    let stage = Stage::new().await;
    let postgres = &stage.stores.postgres;
    let doc = stage.ingest("story", TEXT).await;
    stage
        .stores
        .vectors
        .remove_ids(crate::stage::COLLECTION, &[sagas::stores::point_id(doc.version, 1)])
        .await
        .unwrap();
    let report = stage.names(Kind::PointMissing).await;
    stage.due().await;
    assert!(postgres.begin_audit("one", HOLD).await.unwrap());
    assert!(postgres.end_audit("one", Some(&report), Duration::ZERO).await.unwrap());
    // One that fails leaves the word of the one before.
    assert!(postgres.begin_audit("two", HOLD).await.unwrap());
    assert!(postgres.end_audit("two", None, Duration::ZERO).await.unwrap());
    let drift = postgres.drift().await.unwrap();
    assert_eq!(drift.by_kind.into_iter().collect::<Vec<_>>(), [("point_missing".to_owned(), 1)]);
    let kept = postgres.last_audit().await.unwrap().unwrap();
    assert_eq!(kept["findings"][0]["version"], doc.version.to_string(), "{kept}");

    // A mended one is found, and does not stand.
    let mended = stage.repair().await;
    assert_eq!((mended.total(), mended.left_by_kind.len()), (1, 0));
    assert!(postgres.begin_audit("one", HOLD).await.unwrap());
    assert!(postgres.end_audit("one", Some(&mended), HOUR).await.unwrap());
    assert!(postgres.drift().await.unwrap().by_kind.is_empty());
}

#[tokio::test]
async fn an_audit_with_a_rate_takes_its_time() {
    let stage = Stage::new().await;
    for n in 0..5 {
        stage.ingest(&format!("story {n}"), TEXT).await;
    }
    let paced = AuditSettings { page: 4, rate: Some(5), ..settings() };
    let begun = Instant::now();
    let report = stage.auditor().run(&paced).await.unwrap();
    let took = begun.elapsed();
    assert!(report.is_clean(), "{:#?}", report.findings);
    // 5 documents, 20 points twice, and 5 cache entries; nobody waits for the last page.
    let things = 5 + 20 + 20 + 5;
    assert_eq!((report.counts.points, report.counts.cache_entries), (20, 5));
    assert!(took >= Duration::from_secs_f64((f64::from(things) - 5.0) / 5.0), "{took:?}");
}

#[tokio::test]
async fn a_saga_that_has_not_moved_for_an_hour_beyond_its_jobs_time_is_stuck() {
    let stage = Stage::new().await;
    stage.accept("story").await;
    let (_claim, job) = stage.take().await;
    let staged = stage.stage(&job, TEXT).await;
    let (saga, id) = (staged.saga, staged.job.0);
    stage.sql("UPDATE sagas SET updated_at = now() - interval '2 h' WHERE id = $1", saga).await;
    stage.sql("UPDATE jobs SET run_at = now() - interval '2 h', timeout_ms = 60000 WHERE id = $1", id).await;
    stage.clean().await; // it was taken just now
    stage.sql("UPDATE jobs SET taken_at = now() - interval '62 min' WHERE id = $1", id).await;
    stage.names(Kind::SagaStuck).await;
    // Its job may take longer; or waits for a time that has just come.
    stage.sql("UPDATE jobs SET timeout_ms = 600000 WHERE id = $1", id).await;
    stage.clean().await;
    stage.sql("UPDATE jobs SET timeout_ms = 60000, run_at = now() WHERE id = $1", id).await;
    stage.clean().await;
}
