//! Batches from the ways in, with the collector that every producer and worker runs; and what Redis holds of sealed jobs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Method, Request, StatusCode},
};
use producer::{
    Auth, BatchId, CallbackOn, Client, ClientSettings, Durability, EnqueueError, NewJob, ProducerSettings,
    new_job, router,
};
use queue::{JobId, WorkerId};
use sagas::{
    coalescing::Batch,
    encryption::{Keyring, new_key},
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{
            ending::Run,
            take::{Take, TakeBatch, TakeItem},
        },
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use support::{Stage, eventually, quick, report, tenant};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Takes and ends a job well, as a worker does.
async fn succeed(stage: &Stage, id: JobId) {
    let worker = WorkerId::new("w");
    let take = TakeBatch::new(stage.postgres.clone(), worker.clone());
    let taken = take.flush(&[TakeItem { id, fast: None }]).await.unwrap().remove(0);
    let Take::Taken(job) = taken else { panic!("{taken:?}") };
    let run = Run { job_id: id, fence: job.fence, saga_id: None, worker, started_at: chrono::Utc::now() };
    assert!(stage.postgres.complete(&run, &json!({}), &[]).await.unwrap());
}

fn after() -> NewJob {
    new_job("after", tenant("acme"), json!({})).unwrap()
}

#[tokio::test]
async fn a_batch_of_several_pages_completes_and_its_callback_is_dispatched() {
    let settings = ClientSettings { max_batch: 10, ..ClientSettings::default() };
    let stage = Stage::with(settings, |_| ()).await;
    let maintenance = stage.maintain(quick());
    let jobs: Vec<NewJob> = (0..25).map(report).collect();
    let ids = support::ids(&jobs);
    let made = stage.client.batch(tenant("acme"), "many").add(jobs).on_success(after()).seal().await.unwrap();
    assert_eq!(made.jobs.len(), 25);
    assert_eq!(made.jobs.iter().flatten().map(|receipt| receipt.id).collect::<Vec<_>>(), ids);
    for id in &ids {
        succeed(&stage, *id).await;
    }
    let callback = made.callback.unwrap();
    eventually(|| async {
        let claims = stage.claim("after", 1).await;
        if support::ids_of(&claims) == [callback] { Ok(()) } else { Err("not dispatched".to_owned()) }
    })
    .await;
    let view = stage.client.batch_state(made.id, Some("acme")).await.unwrap().unwrap();
    assert_eq!(
        (view.state.as_str(), view.total, view.succeeded, view.callback_job),
        ("finished", 25, 25, Some(callback.0))
    );
    maintenance.stop().await;
}

#[tokio::test]
async fn batches_that_can_not_be_finished_hold_up_no_others() {
    // More than one look of the collector takes.
    const ODD: usize = 201;
    let stage = Stage::new().await;
    let mut members = vec![];
    for _ in 0..ODD {
        let made = stage.client.batch(tenant("acme"), "odd").add([report(1)]).on_complete(after()).seal();
        members.push(made.await.unwrap().jobs[0].as_ref().unwrap().id);
    }
    // As one whose key is gone.
    let odd = "UPDATE batches SET callback = '{}'";
    let odd = sqlx::query(odd).execute(stage.postgres.pool()).await.unwrap();
    assert_eq!(odd.rows_affected(), ODD as u64);
    let made = stage.client.batch(tenant("acme"), "sound").add([report(1)]).on_complete(after()).seal();
    let made = made.await.unwrap();
    members.push(made.jobs[0].as_ref().unwrap().id);
    for id in members {
        succeed(&stage, id).await;
    }
    let maintenance = stage.maintain(quick());
    eventually(|| async {
        let view = stage.client.batch_state(made.id, None).await.unwrap().unwrap();
        if view.finished_at.is_some() { Ok(()) } else { Err(format!("{view:?}")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_cancel_that_stopped_half_way_is_ended_by_the_collector() {
    let stage = Stage::new().await;
    let open = stage
        .client
        .batch(tenant("acme"), "c")
        .add((0..500).map(report))
        .on_complete(after())
        .open()
        .await
        .unwrap();
    // Another process committed the request and died.
    stage.postgres.cancel_batch(open.id, None).await.unwrap();
    let late = open.add(vec![report(1)]).await.unwrap().remove(0);
    assert!(matches!(late, Err(EnqueueError::BatchSealed { batch }) if batch == open.id), "{late:?}");
    let maintenance = stage.maintain(quick());
    eventually(|| async {
        let view = stage.client.batch_state(open.id, None).await.unwrap().unwrap();
        if view.finished_at.is_some() && view.cancelled == 500 { Ok(()) } else { Err(format!("{view:?}")) }
    })
    .await;
    eventually(|| async {
        let waiting = stage.depth("report").await;
        if waiting == 0 { Ok(()) } else { Err(format!("the queue still has {waiting}")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_member_is_durable_also_when_asked_to_be_fast_and_a_bad_one_keeps_no_other_out() {
    let stage = Stage::new().await;
    let open = stage.client.batch(tenant("acme"), "f").open().await.unwrap();
    let fast = NewJob { batch: Some(open.id), ..report(1) };
    stage.client.enqueue(fast, Durability::Fast).await.unwrap();
    let mut jobs: Vec<NewJob> = (0..3).map(report).collect();
    jobs[1].max_attempts = 0;
    let outcomes = open.add(jobs).await.unwrap();
    assert!(outcomes[0].is_ok() && outcomes[1].is_err() && outcomes[2].is_ok(), "{outcomes:?}");
    let view = stage.client.batch_state(open.id, None).await.unwrap().unwrap();
    assert_eq!((view.total, stage.rows().await), (3, 3));
    let wrong =
        stage.client.batch(tenant("acme"), "x").callback(CallbackOn::Complete, support::ingest("a", "b"));
    assert!(matches!(wrong.seal().await, Err(EnqueueError::BadRequest { .. })));
    let unknown = NewJob { batch: Some(BatchId::new()), ..report(1) };
    let refused = stage.client.enqueue(unknown, Durability::Durable).await;
    assert!(matches!(refused, Err(EnqueueError::UnknownBatch { .. })), "{refused:?}");
}

struct Api {
    stage: Stage,
    router: Router,
}

impl Api {
    async fn new() -> Self {
        let stage = Stage::new().await;
        let call_timeout = Duration::from_millis(300);
        let vectors =
            Vectors::lazy(&VectorsConfig { url: "http://127.0.0.1:1".into(), api_key: None, call_timeout })
                .unwrap();
        let cache = Cache::lazy(&CacheConfig {
            url: "redis://127.0.0.1:1".into(),
            prefix: "t".into(),
            call_timeout,
            ..CacheConfig::default()
        })
        .unwrap();
        let embedder = Arc::new(embedding::hashing::HashingEmbedder::new());
        let stores = Stores::new(
            stage.postgres.clone(),
            vectors,
            cache,
            embedder,
            vec![],
            DocumentSettings::default(),
        );
        let settings = ProducerSettings { auth: Auth::Open, ..ProducerSettings::default() };
        let router = router(&settings, stage.client.clone(), stores, String::new, CancellationToken::new());
        Self { stage, router }
    }

    async fn call(&self, tenant: &str, method: Method, path: &str, body: &Value) -> (StatusCode, Value) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("X-Flotilla-Tenant", tenant)
            .body(if body.is_null() { Body::empty() } else { Body::from(body.to_string()) })
            .unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }
}

#[tokio::test]
async fn the_api_makes_fills_seals_shows_and_cancels_batches_of_its_own_tenant() {
    let api = Api::new().await;
    let maintenance = api.stage.maintain(quick());
    let job = json!({ "kind": "report", "payload": { "n": 1 } });
    let wrong = json!({ "kind": "report", "payload": { "n": 1 }, "priority": 12 });
    let id = BatchId::new();
    let request = json!({
        "id": id, "name": "import", "seal": false, "jobs": [job, wrong, job],
        "callback": { "on": "complete", "job": { "kind": "after", "payload": {} } },
    });
    let (status, made) = api.call("acme", Method::POST, "/v1/batches", &request).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let statuses: Vec<_> =
        made["results"].as_array().unwrap().iter().map(|one| one["status"].clone()).collect();
    assert_eq!((made["id"].clone(), statuses), (json!(id), vec![json!(202), json!(422), json!(202)]));
    let path = format!("/v1/batches/{id}");
    let (status, added) =
        api.call("acme", Method::POST, &format!("{path}/jobs"), &json!({ "jobs": [job] })).await;
    assert_eq!(
        (status, added["results"][0]["status"].clone()),
        (StatusCode::MULTI_STATUS, json!(202)),
        "{added}"
    );
    let (status, seen) = api.call("acme", Method::GET, &path, &Value::Null).await;
    assert_eq!(
        (status, seen["state"].clone(), seen["total"].clone()),
        (StatusCode::OK, json!("open"), json!(3))
    );
    // Nothing crosses tenants.
    for (method, at) in
        [(Method::GET, path.clone()), (Method::DELETE, path.clone()), (Method::POST, format!("{path}:seal"))]
    {
        assert_eq!(api.call("globex", method, &at, &Value::Null).await.0, StatusCode::NOT_FOUND, "{at}");
    }
    let theirs = api.call("globex", Method::POST, &format!("{path}/jobs"), &json!({ "jobs": [job] })).await;
    assert_eq!(theirs.0, StatusCode::NOT_FOUND);
    let (status, sealed) = api.call("acme", Method::POST, &format!("{path}:seal"), &Value::Null).await;
    assert_eq!((status, sealed["state"].clone()), (StatusCode::OK, json!("sealed")));
    let (_, late) = api.call("acme", Method::POST, &format!("{path}/jobs"), &json!({ "jobs": [job] })).await;
    assert_eq!(late["results"][0]["error"]["code"], json!("batch_sealed"), "{late}");

    let first = made["results"][0]["id"].as_str().unwrap().parse().unwrap();
    succeed(&api.stage, first).await;
    let (status, cancelled) = api.call("acme", Method::DELETE, &path, &Value::Null).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{cancelled}");
    let seen = eventually(|| async {
        let (_, seen) = api.call("acme", Method::GET, &path, &Value::Null).await;
        if seen["called_at"].is_string() { Ok(seen) } else { Err(seen.to_string()) }
    })
    .await;
    let counts = ["total", "succeeded", "failed", "cancelled", "percent"].map(|name| seen[name].clone());
    assert_eq!(counts, [json!(3), json!(1), json!(0), json!(2), json!(100.0)]);
    assert_eq!(seen["callback_job"], made["callback_job"]);
    assert_eq!(api.call("acme", Method::DELETE, &path, &Value::Null).await.0, StatusCode::CONFLICT);
    let (_, list) = api.call("acme", Method::GET, "/v1/batches?finished=true", &Value::Null).await;
    assert_eq!(list["batches"].as_array().unwrap().len(), 1);
    assert_eq!(api.call("globex", Method::GET, "/v1/batches", &Value::Null).await.1["batches"], json!([]));
    let (_, job) = api.call("acme", Method::GET, &format!("/v1/jobs/{first}"), &Value::Null).await;
    assert_eq!(job["batch_id"], json!(id));
    maintenance.stop().await;
}

#[tokio::test]
async fn a_post_that_is_made_again_names_the_same_batch_jobs_and_callback() {
    let api = Api::new().await;
    let job = |key: &str| json!({ "kind": "report", "payload": { "n": 1 }, "idempotency_key": key });
    let request = json!({
        "id": BatchId::new(), "name": "import", "jobs": [job("a"), job("b")],
        "callback": { "on": "complete", "job": { "kind": "after", "payload": {} } },
    });
    let (status, first) = api.call("acme", Method::POST, "/v1/batches", &request).await;
    assert_eq!(status, StatusCode::CREATED, "{first}");
    assert!(first["callback_job"].is_string(), "{first}");
    let (status, second) = api.call("acme", Method::POST, "/v1/batches", &request).await;
    assert_eq!(status, StatusCode::CREATED, "{second}");
    assert_eq!(second["callback_job"], first["callback_job"]);
    for place in 0..2_usize {
        let (was, is) = (&first["results"][place], &second["results"][place]);
        assert_eq!((&is["id"], &is["duplicate"]), (&was["id"], &json!(true)), "{second}");
    }
    assert_eq!(api.stage.rows().await, 2);
}

#[tokio::test]
async fn neither_redis_nor_the_ledger_holds_a_sealed_payload_in_plain() {
    const SECRET: &str = "swordfish-7719";
    let stage = Stage::new().await;
    let keys = Keyring::parse(&format!("k1:{}", new_key())).unwrap();
    let postgres = stage.postgres.clone().with_cipher(keys.into());
    let client = Client::new(postgres.clone(), Some(stage.queue.clone()), ClientSettings::default());
    let secret = || new_job("report", tenant("acme"), json!({ "card": SECRET })).unwrap();
    client.enqueue(secret(), Durability::Fast).await.unwrap();
    client.enqueue(secret(), Durability::Durable).await.unwrap();
    client.enqueue_many(vec![secret(), secret()], Durability::Fast).await.unwrap();
    assert_eq!(stage.rows().await, 1, "the others are in Redis alone");
    // Everything that Redis holds, as its own dump has it; values are short, so that nothing is compressed away.
    let mut redis = stage.redis().await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut redis).await.unwrap();
    let mut dumped = 0;
    let mut records = 0;
    for key in keys {
        let dump: Vec<u8> = redis::cmd("DUMP").arg(&key).query_async(&mut redis).await.unwrap();
        assert!(!dump.windows(SECRET.len()).any(|part| part == SECRET.as_bytes()), "{key}");
        dumped += dump.len();
        let kind: String = redis::cmd("TYPE").arg(&key).query_async(&mut redis).await.unwrap();
        if kind == "hash" {
            let fields: Vec<Vec<u8>> = redis::cmd("HVALS").arg(&key).query_async(&mut redis).await.unwrap();
            for field in fields {
                let text = String::from_utf8_lossy(&field);
                assert!(!text.contains(SECRET), "{key}: {text}");
                records += usize::from(text.contains("\"sealed\""));
            }
        }
    }
    assert!(dumped > 1000 && records == 3, "looked at {dumped} bytes, {records} sealed records");
    let rows: Vec<String> = sqlx::query_scalar("SELECT to_jsonb(j)::text FROM jobs j")
        .fetch_all(stage.postgres.pool())
        .await
        .unwrap();
    assert!(rows.iter().all(|row| !row.contains(SECRET)), "{rows:?}");
    // A worker with the key gets what was enqueued.
    for claim in stage.claim("report", 10).await {
        let fast = claim.envelope.fast.clone().map(|fast| serde_json::from_value(fast).unwrap());
        let take = TakeBatch::new(postgres.clone(), WorkerId::new("w"));
        let taken = take.flush(&[TakeItem { id: claim.envelope.id, fast }]).await.unwrap().remove(0);
        let Take::Taken(job) = taken else { panic!("{taken:?}") };
        assert_eq!(job.payload, json!({ "card": SECRET }));
    }
    assert_eq!(stage.rows().await, 4);
}
