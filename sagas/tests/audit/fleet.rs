//! The janitor's part, and audits while work goes on.

use std::time::Duration;

use sagas::{
    audit::{AuditSettings, FindingKind as Kind},
    janitor::{self, JanitorSettings},
};
use tokio_util::sync::CancellationToken;

use crate::stage::{Stage, TEXT, settings};

fn quick(stage: &Stage, shutdown: &CancellationToken) -> tokio::task::JoinHandle<()> {
    let every = JanitorSettings { every: Duration::from_millis(1), ..JanitorSettings::default() };
    tokio::spawn(janitor::run(stage.stores.clone(), every, shutdown.clone()))
}

#[tokio::test]
async fn pending_janitor_work_is_counted_apart_and_overdue_work_is_named() {
    let stage = Stage::with(|settings| {
        settings.grace = Duration::from_millis(100);
        settings.sweep_bound = Duration::from_secs(600);
    })
    .await;
    let old = stage.ingest("story", TEXT).await;
    stage.ingest("story", "A new text.").await;
    let report = stage.clean().await;
    let pending = &report.pending;
    assert_eq!((pending.sweeps, pending.finishing), (1, 1));
    assert_eq!((pending.unseen_points, pending.unseen_cache_entries), (4, 1));

    let short = AuditSettings { wait_for_janitor: Duration::from_millis(300), ..settings() };
    let report = stage.auditor().run(&short).await.unwrap();
    assert_eq!(
        report.by_kind.into_iter().collect::<Vec<_>>(),
        [(Kind::JanitorOverdue, 1)],
        "no janitor runs"
    );

    // Long past its bound it is named without any wait.
    stage
        .sql("UPDATE document_versions SET sweep_after = now() - interval '1 h' WHERE id = $1", old.version)
        .await;
    stage.names(Kind::JanitorOverdue).await;

    let shutdown = CancellationToken::new();
    let task = quick(&stage, &shutdown);
    // The first sweep removes everything; the second, ten minutes later, what a late writer may have brought.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let report = stage.clean().await;
        if report.pending.finishing == 0 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{:?}", report.pending);
    }
    // By another audit: that one may have read the points before the sweep and the ledger after it.
    let pending = stage.clean().await.pending;
    assert_eq!((pending.sweeps, pending.unseen_points), (1, 0));
    // Nobody waits for what is due in ten minutes, and nobody calls it late.
    let long = AuditSettings { wait_for_janitor: Duration::from_secs(20), ..settings() };
    let begun = tokio::time::Instant::now();
    let report = stage.auditor().run(&long).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert!(begun.elapsed() < long.wait_for_janitor);
    stage.insert(old.point(0)).await;
    assert_eq!(stage.clean().await.pending.unseen_points, 1, "the second sweep's work");
    stage.sql("UPDATE document_versions SET sweep_after = now() WHERE id = $1", old.version).await;
    let report = stage.auditor().run(&long).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert_eq!(report.pending, sagas::audit::Pending::default());
    assert_eq!(report.counts.points, 1);

    // After the second sweep nobody looks any more: that is what the auditor is for.
    stage.insert(old.point(0)).await;
    stage.names_and_mends(Kind::PointExtra).await;
    shutdown.cancel();
    task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn audits_of_a_system_at_work_find_nothing() {
    let stage = Stage::with(|settings| {
        settings.grace = Duration::ZERO;
        settings.sweep_bound = Duration::from_millis(5);
    })
    .await;
    let shutdown = CancellationToken::new();
    let task = quick(&stage, &shutdown);
    let work = async {
        for round in 0..80 {
            for document in ["one", "two", "three"] {
                stage.ingest(document, &format!("{TEXT} Round {round}.")).await;
            }
        }
        shutdown.cancel();
    };
    let audits = async {
        let mut audits = 0;
        while !shutdown.is_cancelled() {
            let small = AuditSettings { page: 2, ..settings() };
            let report = stage.auditor().run(&small).await.unwrap();
            let real = report.by_kind.keys().any(|kind| *kind != Kind::JanitorOverdue);
            assert!(!real, "{:#?}", report.findings);
            audits += 1;
        }
        audits
    };
    let ((), audits) = tokio::join!(work, audits);
    assert!(audits >= 3, "only {audits} audits were made");
    task.await.unwrap();

    let shutdown = CancellationToken::new();
    let task = quick(&stage, &shutdown);
    let long = AuditSettings { wait_for_janitor: Duration::from_secs(20), ..settings() };
    let report = stage.auditor().run(&long).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert_eq!(report.pending, sagas::audit::Pending::default());
    let counts = &report.counts;
    assert_eq!((counts.documents, counts.versions, counts.cache_entries), (3, 3, 3), "{counts:?}");
    shutdown.cancel();
    task.await.unwrap();
}
