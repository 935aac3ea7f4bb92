//! The auditor of a fleet: one worker at a time looks, all of them report what it found, and it mends only where it may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, LONG, TENANT, WorkerProcess, text, wait_until};
use sagas::stores::vectors::Point;
use serde_json::Value;
use uuid::Uuid;

impl Audited {
    fn worker(&self, repair: bool) -> WorkerProcess {
        self.0
            .worker()
            .env("FLOTILLA_AUDIT_EVERY_MS", "300")
            .env("FLOTILLA_AUDIT_REPAIR", repair.to_string())
            .start()
    }

    /// Waits until an audit that began from now on has ended with this drift, and every worker reports it.
    async fn drifts(&self, expected: &[(&str, i64)], workers: &[&WorkerProcess]) {
        let postgres = &self.0.postgres;
        let now: chrono::DateTime<chrono::Utc> =
            sqlx::query_scalar("UPDATE auditor SET due_at = now() RETURNING now()")
                .fetch_one(postgres.pool())
                .await
                .unwrap();
        let expected: Vec<(String, i64)> =
            expected.iter().map(|(kind, n)| ((*kind).to_owned(), *n)).collect();
        wait_until("the fleet's auditor says so", LONG, async || {
            let (began, drift): (Option<chrono::DateTime<chrono::Utc>>, Value) =
                sqlx::query_as("SELECT started_at, drift FROM auditor WHERE finished_at >= started_at")
                    .fetch_optional(postgres.pool())
                    .await
                    .map_err(|e| e.to_string())?
                    .unwrap_or_default();
            let found = postgres.drift().await.map_err(|e| e.to_string())?.by_kind;
            if began > Some(now) && found.into_iter().collect::<Vec<_>>() == expected {
                return Ok(());
            }
            Err(format!("began {began:?}, after {now}: {drift}"))
        })
        .await;
        for worker in workers {
            wait_until("each worker reports it", LONG, async || {
                let metrics = worker.metrics().await.map_err(|e| e.to_string())?;
                let gauge =
                    |kind: &str| WorkerProcess::gauge(&metrics, &format!("audit_drift{{kind=\"{kind}\"}}"));
                let right = expected.iter().all(|(kind, n)| gauge(kind) == Some(*n as f64));
                let other = if expected.is_empty() {
                    gauge("point_extra") == Some(0.0)
                } else {
                    gauge("cache_stale") == Some(0.0)
                };
                if right && other && metrics.contains("audit_age_seconds") { Ok(()) } else { Err(metrics) }
            })
            .await;
        }
    }
}

struct Audited(Fleet);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_is_found_in_the_background_reported_by_all_and_mended_where_that_is_allowed() {
    let fleet = Audited(Fleet::start().await);
    let (one, two) = (fleet.worker(false), fleet.worker(false));
    let jobs = [fleet.0.ingest("a", &text("a", 1)).await, fleet.0.ingest("b", &text("b", 1)).await];
    fleet.0.assert_all_succeeded(&jobs).await;
    fleet.drifts(&[], &[&one, &two]).await;

    // A point that no version has. Only reported: it is still there after several audits.
    let stores = &fleet.0.stores;
    let collection = stores.collection(stores.embedder.model());
    let point = Point {
        version: Uuid::now_v7(),
        chunk: 0,
        document_id: Uuid::now_v7(),
        tenant: TENANT.to_owned(),
        ledger: stores.ledger().await.unwrap(),
        vector: stores.embedder.embed(vec!["adrift".to_owned()]).await.unwrap().remove(0),
    };
    let id = sagas::stores::point_id(point.version, 0);
    let deadline = tokio::time::Instant::now() + LONG;
    stores.vectors.insert(&collection, point.vector.len(), vec![point], deadline).await.unwrap();
    fleet.drifts(&[("point_extra", 1)], &[&one, &two]).await;
    fleet.drifts(&[("point_extra", 1)], &[&one, &two]).await;
    assert_eq!(stores.vectors.points_by_id(&collection, &[id], false).await.unwrap().len(), 1);
    let last = fleet.0.flotilla(1, &["audit", "--last"]);
    assert_eq!(last["report"]["findings"][0]["subject"], id.to_string(), "{last}");

    // Whoever audits dies; others go on. These may mend.
    for worker in [&one, &two] {
        worker.kill9().await;
    }
    sqlx::query("UPDATE auditor SET held_until = now() WHERE holder IS NOT NULL")
        .execute(fleet.0.postgres.pool())
        .await
        .unwrap();
    let mending = fleet.worker(true);
    fleet.drifts(&[], &[&mending]).await;
    assert!(stores.vectors.points_by_id(&collection, &[id], false).await.unwrap().is_empty());
    let actor: String =
        sqlx::query_scalar("SELECT actor FROM audit_log WHERE action = 'audit.repair.point_extra'")
            .fetch_one(fleet.0.postgres.pool())
            .await
            .unwrap();
    assert!(actor.starts_with("auditor:"), "{actor}");
    fleet.0.audit_clean().await;
    assert!(mending.terminate().await.success(), "{}", mending.tail());
    drop((one, two, mending));
    fleet.0.end();
}
