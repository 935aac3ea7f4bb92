//! Embedding handed over to the queue `embed`: the same guarantees, with two jobs in two fleets for each document.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, LONG, TENANT, WorkerBuilder, text};

fn handing(worker: WorkerBuilder, queues: &[&str]) -> WorkerBuilder {
    worker.patient().queues(queues).env("FLOTILLA_HAND_EMBEDDING_OVER", "true")
}

async fn embeddings(fleet: &Fleet, state: &str) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM jobs WHERE kind = 'embed_version' AND queue = 'embed' AND state = $1",
    )
    .bind(state)
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handed_over_embedding_survives_kills_on_both_sides_once_for_each_document() {
    const DOCUMENTS: i64 = 24;
    let fleet = Fleet::start().await;
    let names: Vec<String> = (0..DOCUMENTS).map(|no| format!("document-{no}")).collect();
    let jobs = names.iter().map(|name| fleet.ingest_job(name, &text(name, 1))).collect();
    let ids = fleet.enqueue(jobs).await;
    // One dies in the middle of an embedding, one when an embedding has just ended and is to be published.
    let embedder = handing(fleet.worker(), &["embed"]).faults("embed_version.vectors.after=kill").start();
    let ingester = handing(fleet.worker(), &["ingest", "delete"]).faults("ingest.vectors.after=kill").start();
    embedder.killed().await;
    let embedder = handing(fleet.worker(), &["embed"]).start();
    ingester.killed().await;
    let ingester = handing(fleet.worker(), &["ingest", "delete"]).start();
    let ends = fleet.all_ended(&ids, LONG).await;
    assert!(ends.values().all(|state| state == "succeeded"), "{ends:?}");
    let charged: Vec<String> = sqlx::query_scalar("SELECT class || ': ' || error FROM job_attempts")
        .fetch_all(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(charged, <[String; 0]>::default(), "killed workers charge nobody");
    assert_eq!(embeddings(&fleet, "succeeded").await, DOCUMENTS, "one for each document");
    for name in &names {
        assert_eq!(fleet.stores.document(TENANT, name).await.unwrap().unwrap().text, text(name, 1));
    }
    fleet.audit_clean().await;
    assert!(embedder.terminate().await.success());
    assert!(ingester.terminate().await.success());
    drop((embedder, ingester));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedding_that_fails_for_good_leaves_what_readers_saw() {
    let fleet = Fleet::start().await;
    let worker = handing(fleet.worker(), &["ingest", "embed", "delete"]).start();
    let first = fleet.ingest("handbook", &text("handbook", 1)).await;
    assert_eq!(fleet.ended(first).await, "succeeded", "{}", fleet.describe(first).await);
    assert!(worker.terminate().await.success());
    let worker = handing(fleet.worker(), &["ingest", "embed", "delete"])
        .faults("embed_version.vectors.after=permanent")
        .start();
    let second = fleet.ingest("handbook", &text("handbook", 2)).await;
    assert_eq!(fleet.ended(second).await, "dead", "{}", fleet.describe(second).await);
    let letter = fleet.postgres.dead_letter(second.0).await.unwrap().unwrap();
    assert_eq!(letter.class, "embedding_failed", "{}", letter.reason);
    assert_eq!(embeddings(&fleet, "dead").await, 1);
    assert_eq!(fleet.stores.document(TENANT, "handbook").await.unwrap().unwrap().text, text("handbook", 1));
    fleet.audit_clean().await;
    assert!(worker.terminate().await.success());
    drop(worker);
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_ingest_ends_its_embedding_before_it_removes_the_points() {
    let fleet = Fleet::start().await;
    // Nobody embeds yet.
    let ingester = handing(fleet.worker(), &["ingest", "delete"]).start();
    let job = fleet.ingest("handbook", &text("handbook", 1)).await;
    e2e::wait_until("the ingest waits for its embedding", LONG, async || {
        let waiting = embeddings(&fleet, "waiting").await;
        let state = fleet.postgres.job(job, None).await.unwrap().unwrap().state;
        if (waiting, state.as_str()) == (1, "waiting") {
            Ok(())
        } else {
            Err(format!("{waiting} waiting, {state}"))
        }
    })
    .await;
    fleet.client().cancel(job, None).await.unwrap();
    assert_eq!(fleet.ended(job).await, "cancelled", "{}", fleet.describe(job).await);
    assert_eq!(embeddings(&fleet, "cancelled").await, 1);
    // Only now somebody embeds, and finds nothing to do.
    let embedder = handing(fleet.worker(), &["embed"]).start();
    embedder.ready().await;
    assert!(fleet.stores.document(TENANT, "handbook").await.unwrap().is_none());
    fleet.audit_clean().await;
    assert!(ingester.terminate().await.success());
    assert!(embedder.terminate().await.success());
    drop((ingester, embedder));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_callers_own_vectors_are_stored_also_by_the_next_worker() {
    let fleet = Fleet::start().await;
    let dimensions = fleet.stores.embedder.dimensions();
    let mut vector = vec![0.0_f32; dimensions];
    vector[3] = 1.0;
    let chunks = serde_json::json!([{ "text": "a text of its own", "vector": vector.clone() }]);
    let job = fleet.job("ingest", serde_json::json!({ "document": "handbook", "chunks": chunks }));
    let ids = fleet.enqueue(vec![job]).await;
    let victim = fleet.worker().faults("ingest.vectors.before=kill").start();
    victim.killed().await;
    let worker = fleet.worker().start();
    assert_eq!(fleet.ended(ids[0]).await, "succeeded", "{}", fleet.describe(ids[0]).await);
    let version = fleet.postgres.current_version(TENANT, "handbook").await.unwrap().unwrap();
    let points = fleet.stores.vectors.points(&version.collection, version.version, 1).await.unwrap();
    assert_eq!(points[0].vector.as_deref(), Some(vector.as_slice()), "not the model's");
    fleet.audit_clean().await;
    assert!(worker.terminate().await.success());
    drop((victim, worker));
    fleet.end();
}
