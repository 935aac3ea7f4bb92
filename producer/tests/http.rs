//! The HTTP API's contract: what each request is answered, and that nothing crosses tenants.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use producer::{Auth, ClientSettings, Durability, ProducerSettings, new_job, router};
use queue::{JobId, TenantId};
use sagas::{
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::Postgres,
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use support::{Stage, eventually};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

const KEY: &str = "acme-key";
const OTHER_KEY: &str = "globex-key";

struct Api {
    stage: Stage,
    router: Router,
    stopping: CancellationToken,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }
}

/// Stores whose vectors and cache are not there; the ledger is.
fn stores(postgres: Postgres) -> Stores {
    let call_timeout = Duration::from_millis(300);
    let vectors =
        Vectors::lazy(&VectorsConfig { url: "http://127.0.0.1:1".into(), api_key: None, call_timeout })
            .unwrap();
    let cache = Cache::lazy(&CacheConfig {
        url: "redis://127.0.0.1:1".into(),
        call_timeout,
        ..CacheConfig::default()
    })
    .unwrap();
    let embedder = Arc::new(embedding::hashing::HashingEmbedder::new());
    Stores::new(postgres, vectors, cache, embedder, vec![], DocumentSettings::default())
}

impl Api {
    async fn new() -> Self {
        Self::with(ClientSettings::default(), Auth::ApiKeys).await
    }

    async fn with(settings: ClientSettings, auth: Auth) -> Self {
        let stage = Stage::with(settings, |_| ()).await;
        stage.postgres.create_api_key("acme", "test", KEY).await.unwrap();
        stage.postgres.create_api_key("globex", "test", OTHER_KEY).await.unwrap();
        let stopping = CancellationToken::new();
        let router = router(
            &ProducerSettings { auth, ..ProducerSettings::default() },
            stage.client.clone(),
            stores(stage.postgres.clone()),
            || "some_metric 1\n".to_owned(),
            stopping.clone(),
        );
        Self { stage, router, stopping }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer { status: parts.status, headers: parts.headers, body }
    }

    async fn call(&self, key: &str, method: Method, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .body(body.into())
            .unwrap();
        self.send(request).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call(KEY, Method::GET, path, Body::empty()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.call(KEY, Method::POST, path, body.to_string()).await
    }

    async fn enqueue(&self, body: &Value) -> Answer {
        self.post("/v1/jobs", body).await
    }

    /// Waits until `/readyz` says so: it gives each store at most a second, which a busy machine may need once.
    async fn until_ready(&self, queue: &str) {
        let body = json!({ "ready": true, "postgres": "up", "queue": queue });
        eventually(|| async {
            let answer = self.get("/readyz").await;
            let ready = (answer.status, &answer.body) == (StatusCode::OK, &body);
            if ready { Ok(()) } else { Err(format!("{}: {}", answer.status, answer.body)) }
        })
        .await;
    }
}

fn job() -> Value {
    json!({ "kind": "ingest", "payload": { "document": "notes/today.txt", "text": "It rains." } })
}

fn with(name: &str, value: Value) -> Value {
    let mut job = job();
    job[name] = value;
    job
}

#[tokio::test]
async fn an_accepted_job_is_202_and_can_be_looked_at() {
    let api = Api::new().await;
    let mut request = job();
    request["priority"] = json!(8);
    request["run_at"] = json!("2999-01-01T00:00:00Z");
    request["max_attempts"] = json!(3);
    request["timeout_ms"] = json!(60_000);
    let answer = api.enqueue(&request).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.body);
    assert_eq!(answer.body["duplicate"], json!(false));
    let id = answer.body["id"].as_str().unwrap();
    assert_eq!(answer.headers[header::LOCATION], format!("/v1/jobs/{id}"));
    let seen = api.get(&format!("/v1/jobs/{id}")).await;
    assert_eq!(seen.status, StatusCode::OK);
    for (field, value) in [
        ("kind", json!("ingest")),
        ("queue", json!("ingest")),
        ("priority", json!(8)),
        ("tenant", json!("acme")),
        ("state", json!("waiting")),
        ("document", json!("notes/today.txt")),
        ("max_attempts", json!(3)),
        ("run_at", json!("2999-01-01T00:00:00Z")),
        ("attempts_made", json!([])),
        ("sagas", json!([])),
    ] {
        assert_eq!(seen.body[field], value, "{field}");
    }
    assert_eq!(api.stage.scheduled("ingest").await, 1);
    let list = api.get("/v1/jobs?state=waiting&limit=5").await;
    assert_eq!(list.body["jobs"][0]["id"], json!(id));
    assert_eq!(api.get("/v1/jobs?state=dead").await.body["jobs"], json!([]));
    assert_eq!(api.get("/v1/jobs?queue=ingest").await.body["jobs"][0]["id"], json!(id));
    assert_eq!(api.get("/v1/jobs?queue=embed").await.body["jobs"], json!([]));
}

#[tokio::test]
async fn the_same_key_is_200_and_with_another_request_409_naming_the_job() {
    let api = Api::new().await;
    let first = api.enqueue(&with("idempotency_key", json!("k"))).await;
    assert_eq!(first.status, StatusCode::ACCEPTED);
    // The header says the same as the field.
    let request = Request::post("/v1/jobs")
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header("Idempotency-Key", "k")
        .body(Body::from(job().to_string()))
        .unwrap();
    let again = api.send(request).await;
    assert_eq!((again.status, &again.body["duplicate"]), (StatusCode::OK, &json!(true)));
    assert_eq!(again.body["id"], first.body["id"]);
    let mut other = with("idempotency_key", json!("k"));
    other["payload"]["text"] = json!("It snows.");
    let conflict = api.enqueue(&other).await;
    assert_eq!((conflict.status, conflict.code()), (StatusCode::CONFLICT, "idempotency_conflict"));
    assert_eq!(conflict.body["error"]["job"], first.body["id"]);
    let both = Request::post("/v1/jobs")
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header("Idempotency-Key", "other")
        .body(Body::from(with("idempotency_key", json!("k")).to_string()))
        .unwrap();
    assert_eq!(api.send(both).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_body_that_is_not_json_or_not_utf8_is_400() {
    let api = Api::new().await;
    for (body, code) in [
        (b"{\"kind\": ".to_vec(), "malformed_json"),
        (b"".to_vec(), "malformed_json"),
        (
            b"{\"kind\": \"ingest\", \"payload\": {\"document\": \"a\", \"text\": \"\xff\xfe\"}}".to_vec(),
            "not_utf8",
        ),
        (
            b"{\"kind\": \"ingest\", \"payload\": {\"document\": \"a\", \"text\": \"\\ud800\"}}".to_vec(),
            "malformed_json",
        ),
    ] {
        let shown = String::from_utf8_lossy(&body).into_owned();
        let answer = api.call(KEY, Method::POST, "/v1/jobs", body).await;
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::BAD_REQUEST, code),
            "{shown}: {}",
            answer.body
        );
    }
    assert_eq!(api.stage.rows().await, 0);
}

#[tokio::test]
async fn a_field_that_is_unknown_missing_or_out_of_range_is_422_and_named() {
    let api = Api::new().await;
    let payload = |value: Value| with("payload", value);
    for (body, named) in [
        (with("prority", json!(9)), "prority"),
        (json!({ "payload": {} }), "kind"),
        (with("priority", json!(10)), "priority 10"),
        (with("priority", json!(-1)), "priority -1"),
        (with("max_attempts", json!(0)), "max_attempts is 0"),
        (with("timeout_ms", json!(0)), "timeout_ms is 0"),
        (with("run_at", json!("tomorrow")), "invalid"),
        (with("queue", json!("a b")), "queue name"),
        (with("kind", json!("a b")), "kind"),
        (with("kind", json!("")), "kind"),
        (with("idempotency_key", json!("")), "idempotency_key has 0 characters"),
        (with("durability", json!("maybe")), "durable"),
        (payload(json!([])), "payload"),
        (payload(json!({ "document": "a" })), "text"),
        (payload(json!({ "document": "a", "text": "x", "txet": "y" })), "txet"),
        (payload(json!({ "document": "", "text": "x" })), "payload.document"),
        (payload(json!({ "document": "x".repeat(513), "text": "x" })), "payload.document"),
        (payload(json!({ "document": "a", "text": "a\u{0}b" })), "NUL"),
        (payload(json!({ "document": "a", "text": "x", "collection": "team/docs" })), "payload.collection"),
        (json!({ "kind": "embed", "payload": { "all": true, "collection": "" } }), "payload.collection"),
        (json!({ "kind": "embed", "payload": { "every_tenant": true } }), "every_tenant"),
        (json!({ "kind": "embed", "payload": { "all": true, "every_tenant": "true" } }), "every_tenant"),
    ] {
        let answer = api.enqueue(&body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}: {}", answer.body);
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(named), "{body}: {message}");
    }
    assert_eq!(api.stage.rows().await, 0);
}

#[tokio::test]
async fn a_payload_over_the_limit_is_413() {
    let api =
        Api::with(ClientSettings { max_payload: 10_000, ..ClientSettings::default() }, Auth::ApiKeys).await;
    let text = |bytes: usize| with("payload", json!({ "document": "a", "text": "x".repeat(bytes) }));
    assert_eq!(api.enqueue(&text(9_900)).await.status, StatusCode::ACCEPTED);
    // Over the payload's limit, and over that of the whole body.
    for bytes in [10_100, 1_000_000] {
        let answer = api.enqueue(&text(bytes)).await;
        assert_eq!((answer.status, answer.code()), (StatusCode::PAYLOAD_TOO_LARGE, "too_large"), "{bytes}");
        assert!(answer.body["error"]["message"].as_str().unwrap().contains("10000"), "{}", answer.body);
    }
}

#[tokio::test]
async fn without_a_valid_key_it_is_401() {
    let api = Api::new().await;
    let revoked = api.stage.postgres.create_api_key("acme", "old", "old-key").await.unwrap();
    assert!(api.stage.postgres.revoke_api_key(revoked).await.unwrap());
    for value in
        [None, Some("Bearer "), Some("Bearer nobody"), Some("Bearer old-key"), Some("Basic YWNtZTp4")]
    {
        let mut request = Request::post("/v1/jobs");
        if let Some(value) = value {
            request = request.header(header::AUTHORIZATION, value);
        }
        // Naming a tenant is no proof.
        let request =
            request.header("X-Flotilla-Tenant", "acme").body(Body::from(job().to_string())).unwrap();
        let answer = api.send(request).await;
        assert_eq!((answer.status, answer.code()), (StatusCode::UNAUTHORIZED, "unauthorized"), "{value:?}");
        assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
    }
    assert_eq!(api.stage.rows().await, 0);
}

#[tokio::test]
async fn a_tenant_with_too_many_jobs_gets_429_with_retry_after() {
    let settings = ClientSettings { max_waiting_per_tenant: 1, ..ClientSettings::default() };
    let api = Api::with(settings, Auth::ApiKeys).await;
    assert_eq!(api.enqueue(&job()).await.status, StatusCode::ACCEPTED);
    let answer = api.enqueue(&job()).await;
    assert_eq!((answer.status, answer.code()), (StatusCode::TOO_MANY_REQUESTS, "tenant_full"));
    assert_eq!(answer.headers[header::RETRY_AFTER], "5");
}

#[tokio::test]
async fn without_the_ledger_it_is_503_with_retry_after_and_not_ready() {
    let api = Api::new().await;
    assert_eq!(api.enqueue(&job()).await.status, StatusCode::ACCEPTED);
    api.until_ready("up").await;
    api.stage.services.postgres().kill9().await.unwrap();
    let answer = api.enqueue(&job()).await;
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        "{}",
        answer.body
    );
    assert_eq!(answer.headers[header::RETRY_AFTER], "2");
    let answer = api.get("/v1/documents/a").await;
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        "{}",
        answer.body
    );
    let message = answer.body["error"]["message"].as_str().unwrap();
    assert!(!message.contains("127.0.0.1"), "addresses stay inside: {message}");
    let ready = api.get("/readyz").await;
    assert_eq!((ready.status, &ready.body["postgres"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("down")));
    assert_eq!(api.get("/healthz").await.status, StatusCode::OK);
    api.stage.services.postgres().restart().await.unwrap();
    eventually(|| async {
        let answer = api.enqueue(&job()).await;
        if answer.status == StatusCode::ACCEPTED { Ok(()) } else { Err(answer.body.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn the_queue_is_reported_but_not_needed_for_readiness() {
    let api = Api::new().await;
    api.until_ready("up").await;
    api.stage.services.redis_queue().kill9().await.unwrap();
    api.until_ready("down").await;
    assert_eq!(api.enqueue(&job()).await.status, StatusCode::ACCEPTED);
    api.stopping.cancel();
    assert_eq!(api.get("/readyz").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_batch_answers_per_job_in_array_order() {
    let api = Api::new().await;
    let jobs = json!({ "jobs": [
        job(),
        with("idempotency_key", json!("k")),
        with("unknown", json!(1)),
        { "kind": "report", "payload": { "number": 1 }, "durability": "fast" },
        with("idempotency_key", json!("k")),
        { "kind": "ingest", "payload": { "document": "b" } },
        job(),
    ] });
    let answer = api.post("/v1/jobs:batch", &jobs).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS, "{}", answer.body);
    let results = answer.body["results"].as_array().unwrap();
    let statuses: Vec<_> = results.iter().map(|result| result["status"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [202, 202, 422, 202, 200, 422, 202]);
    assert_eq!(results[4]["id"], results[1]["id"]);
    assert_eq!(
        (&results[4]["duplicate"], &results[2]["error"]["code"]),
        (&json!(true), &json!("invalid_request"))
    );
    for (place, order) in [(0, 1), (1, 2), (6, 3)] {
        let id = results[place]["id"].as_str().unwrap();
        assert_eq!(api.get(&format!("/v1/jobs/{id}")).await.body["doc_order"], json!(order), "job {place}");
    }
    assert_eq!(api.stage.rows().await, 3, "the fast one is in Redis alone");
    assert_eq!(api.post("/v1/jobs:batch", &json!({ "jobs": [] })).await.body["results"], json!([]));
    let many: Vec<Value> = (0..1001).map(|_| job()).collect();
    let answer = api.post("/v1/jobs:batch", &json!({ "jobs": many })).await;
    assert_eq!((answer.status, answer.code()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid_job"));
}

#[tokio::test]
async fn cancel_is_200_for_a_waiting_job_and_409_for_an_ended_one() {
    let api = Api::new().await;
    let id = api.enqueue(&job()).await.body["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{id}");
    let answer = api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!("cancelled")));
    let answer = api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    assert_eq!((answer.status, answer.code()), (StatusCode::CONFLICT, "ended"));
    // As a worker leaves them.
    let id = api.enqueue(&job()).await.body["id"].as_str().unwrap().to_owned();
    let set = |state: &'static str| {
        let (id, pool) = (id.parse::<uuid::Uuid>().unwrap(), api.stage.postgres.pool().clone());
        async move {
            sqlx::query(
                "UPDATE jobs SET state = $2, worker = 'w', finished_at = CASE WHEN $2 = 'succeeded' THEN now() END WHERE id = $1",
            )
            .bind(id)
            .bind(state)
            .execute(&pool)
            .await
            .unwrap();
        }
    };
    let path = format!("/v1/jobs/{id}");
    set("running").await;
    let answer = api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    assert_eq!((answer.status, &answer.body["state"]), (StatusCode::ACCEPTED, &json!("requested")));
    set("succeeded").await;
    let answer = api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    assert_eq!((answer.status, answer.code()), (StatusCode::CONFLICT, "past_pivot"));
    for unknown in ["/v1/jobs/00000000-0000-7000-8000-000000000000", "/v1/jobs/nonsense"] {
        let answer = api.call(KEY, Method::DELETE, unknown, Body::empty()).await;
        assert_eq!((answer.status, answer.code()), (StatusCode::NOT_FOUND, "not_found"), "{unknown}");
    }
}

#[tokio::test]
async fn nothing_crosses_tenants() {
    let api = Api::new().await;
    let pool = api.stage.postgres.pool();
    let id = api.enqueue(&with("idempotency_key", json!("k"))).await.body["id"].as_str().unwrap().to_owned();
    let job_path = format!("/v1/jobs/{id}");
    let letter = uuid::Uuid::now_v7();
    sqlx::query("INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload) VALUES ($1, $2, 'acme', 'ingest', 'ingest', 'permanent', 'x', '{}')")
        .bind(letter)
        .bind(id.parse::<uuid::Uuid>().unwrap())
        .execute(pool)
        .await
        .unwrap();
    publish(pool, "acme", "secret/plan", "the plan").await;
    let letter_path = format!("/v1/dead-letters/{letter}");
    for path in [&job_path, &letter_path, &"/v1/documents/secret/plan".to_owned()] {
        assert_eq!(api.get(path).await.status, StatusCode::OK, "{path}");
        let theirs = api.call(OTHER_KEY, Method::GET, path, Body::empty()).await;
        assert_eq!((theirs.status, theirs.code()), (StatusCode::NOT_FOUND, "not_found"), "{path}");
    }
    for (method, path) in [
        (Method::DELETE, job_path.clone()),
        (Method::POST, format!("{letter_path}:replay")),
        (Method::POST, format!("{letter_path}:discard")),
    ] {
        let theirs = api.call(OTHER_KEY, method, &path, "{}").await;
        assert_eq!((theirs.status, theirs.code()), (StatusCode::NOT_FOUND, "not_found"), "{path}");
    }
    for (path, list) in [("/v1/jobs", "jobs"), ("/v1/dead-letters", "dead_letters"), ("/v1/events", "events")]
    {
        assert_eq!(api.get(path).await.body[list].as_array().unwrap().len(), 1, "{path}");
        let theirs = api.call(OTHER_KEY, Method::GET, path, Body::empty()).await;
        assert_eq!(theirs.body[list], json!([]), "{path}");
    }
    // Their key is another key, and their document another document.
    let theirs =
        api.call(OTHER_KEY, Method::POST, "/v1/jobs", with("idempotency_key", json!("k")).to_string()).await;
    assert_eq!((theirs.status, &theirs.body["duplicate"]), (StatusCode::ACCEPTED, &json!(false)));
    assert_eq!(api.get(&job_path).await.body["state"], json!("waiting"), "nobody cancelled it");
}

#[tokio::test]
async fn events_are_read_by_cursor_and_a_cursor_before_what_is_kept_is_410() {
    let api = Api::new().await;
    let pool = api.stage.postgres.pool();
    let begin = api.get("/v1/events?after=now").await;
    assert_eq!((begin.status, &begin.body["events"]), (StatusCode::OK, &json!([])));
    for key in ["a", "b", "c"] {
        publish(pool, "acme", key, "text").await;
    }
    sqlx::query("UPDATE documents SET current_version = NULL WHERE key = 'b'").execute(pool).await.unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let (mut after, mut seen) = (begin.body["next"].as_str().unwrap().to_owned(), vec![]);
    loop {
        let page = api.get(&format!("/v1/events?after={after}&limit=3")).await;
        assert_eq!(page.status, StatusCode::OK, "{}", page.body);
        let events = page.body["events"].as_array().unwrap().clone();
        assert!(events.len() <= 3);
        if events.is_empty() {
            assert_eq!(page.body["next"], json!(after), "with nothing new the cursor stays");
            if seen.len() == 4 {
                break;
            }
            // The server's own transactions hold events back, too.
            assert!(std::time::Instant::now() < deadline, "{seen:?}");
            continue;
        }
        after = page.body["next"].as_str().unwrap().to_owned();
        seen.extend(
            events
                .iter()
                .map(|e| format!("{} {}", e["event"].as_str().unwrap(), e["document"].as_str().unwrap())),
        );
    }
    assert_eq!(
        seen,
        ["document.published a", "document.published b", "document.published c", "document.deleted b"]
    );
    let oldest = api.get("/v1/events").await;
    assert_eq!(oldest.body["events"].as_array().unwrap().len(), 4);
    let first = oldest.body["events"][0]["cursor"].as_str().unwrap();
    assert_eq!(api.stage.postgres.expire_events(std::time::Duration::ZERO, 3).await.unwrap(), 3);
    let gone = api.get(&format!("/v1/events?after={first}")).await;
    assert_eq!((gone.status, gone.code()), (StatusCode::GONE, "cursor_expired"), "{}", gone.body);
    assert_eq!(api.get("/v1/events").await.body["events"].as_array().unwrap().len(), 1);
    assert_eq!(api.get(&format!("/v1/events?after={after}")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn whoever_begins_while_there_are_no_events_is_told_later_that_they_have_missed_some() {
    let api = Api::new().await;
    let pool = api.stage.postgres.pool();
    let begin = api.get("/v1/events").await;
    assert_eq!((begin.status, &begin.body["events"]), (StatusCode::OK, &json!([])));
    let next = format!("/v1/events?after={}", begin.body["next"].as_str().unwrap());
    for key in ["a", "b"] {
        publish(pool, "acme", key, "text").await;
    }
    eventually(|| async {
        let page = api.get(&next).await;
        let all = page.body["events"].as_array().is_some_and(|events| events.len() == 2);
        if all { Ok(()) } else { Err(format!("not both came after the cursor: {}", page.body)) }
    })
    .await;
    assert_eq!(api.stage.postgres.expire_events(Duration::ZERO, 1).await.unwrap(), 1);
    let gone = api.get(&next).await;
    assert_eq!((gone.status, gone.code()), (StatusCode::GONE, "cursor_expired"), "{}", gone.body);
}

/// A published document, as `publish` leaves it.
async fn publish(pool: &sqlx::PgPool, tenant: &str, key: &str, text: &str) {
    let (document, version) = (uuid::Uuid::now_v7(), uuid::Uuid::now_v7());
    sqlx::query("INSERT INTO documents (id, tenant, key, last_order) VALUES ($1, $2, $3, 1)")
        .bind(document)
        .bind(tenant)
        .bind(key)
        .execute(pool)
        .await
        .unwrap();
    sqlx::query(VERSION)
        .bind(version)
        .bind(document)
        .bind(tenant)
        .bind(uuid::Uuid::now_v7())
        .bind(text)
        .execute(pool)
        .await
        .unwrap();
    sqlx::query("UPDATE documents SET current_version = $2, current_order = 1 WHERE id = $1")
        .bind(document)
        .bind(version)
        .execute(pool)
        .await
        .unwrap();
}

const VERSION: &str = "INSERT INTO document_versions (id, document_id, tenant, doc_order, saga_id, state, body, content_hash, model,
        dimensions, collection, chunk_count, vectors_hash, published_at)
    VALUES ($1, $2, $3, 1, $4, 'published', $5, sha256(convert_to($5, 'UTF8')), 'm', 1, 'c', 1, sha256('x'), now())";

#[tokio::test]
async fn dead_letters_are_replayed_or_discarded_once() {
    let api = Api::new().await;
    let pool = api.stage.postgres.pool();
    let mut letters = vec![];
    for _ in 0..2 {
        let id = api.enqueue(&job()).await.body["id"].as_str().unwrap().parse::<uuid::Uuid>().unwrap();
        for sql in [
            "UPDATE jobs SET state = 'running', worker = 'w' WHERE id = $1",
            "UPDATE jobs SET state = 'dead', finished_at = now() WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id).execute(pool).await.unwrap();
        }
        let letter = uuid::Uuid::now_v7();
        sqlx::query("INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload) VALUES ($1, $2, 'acme', 'ingest', 'ingest', 'permanent', 'x', $3)")
            .bind(letter)
            .bind(id)
            .bind(&job()["payload"])
            .execute(pool)
            .await
            .unwrap();
        letters.push(letter);
    }
    let path = |letter: usize, verb: &str| format!("/v1/dead-letters/{}:{verb}", letters[letter]);
    let bad = json!({ "payload": { "document": "notes/today.txt" } });
    assert_eq!(api.post(&path(0, "replay"), &bad).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let moved = json!({ "payload": { "document": "other", "text": "x" } });
    assert_eq!(api.post(&path(0, "replay"), &moved).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let mut hidden = json!({ "payload": job()["payload"] });
    hidden["payload"]["metadata"] = json!({ "token": "[redacted]" });
    let answer = api.post(&path(0, "replay"), &hidden).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", answer.body);
    assert!(answer.body["error"]["message"].as_str().unwrap().contains("[redacted]"), "{}", answer.body);
    let answer = api.post(&path(0, "replay"), &json!({})).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.body);
    let replay = answer.body["replay_job"].as_str().unwrap();
    let seen = api.get(&format!("/v1/jobs/{replay}")).await.body;
    assert_eq!(
        (&seen["doc_order"], &seen["state"]),
        (&json!(1), &json!("waiting")),
        "a replay keeps its order number"
    );
    let answer = api.post(&path(0, "discard"), &json!({})).await;
    assert_eq!((answer.status, answer.code()), (StatusCode::CONFLICT, "already_resolved"));
    let answer = api.post(&path(1, "discard"), &json!({ "reason": "a test" })).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(api.get("/v1/dead-letters").await.body["dead_letters"], json!([]));
    let all = api.get("/v1/dead-letters?state=all").await.body["dead_letters"].clone();
    assert_eq!(all.as_array().unwrap().len(), 2);
    // Page by page, newest first.
    let first = api.get("/v1/dead-letters?state=all&limit=1").await.body["dead_letters"].clone();
    let before = format!("/v1/dead-letters?state=all&limit=1&before={}", first[0]["id"].as_str().unwrap());
    let second = api.get(&before).await.body["dead_letters"].clone();
    assert_eq!(json!([first[0], second[0]]), all);
    let theirs = api.call(OTHER_KEY, Method::GET, &before, Body::empty()).await;
    assert_eq!((theirs.status, theirs.code()), (StatusCode::NOT_FOUND, "not_found"));
    assert_eq!(api.post(&path(1, "explode"), &json!({})).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_tenant_replays_no_request_for_every_tenant() {
    let api = Api::new().await;
    let everywhere = json!({ "every_tenant": true });
    let mut letters = vec![];
    for payload in [json!({ "all": true }), everywhere.clone()] {
        // The second is an operator's.
        let job = new_job("embed", TenantId::new("acme").unwrap(), payload.clone()).unwrap();
        let id = api.stage.client.enqueue(job, Durability::Durable).await.unwrap().id;
        letters.push(dies(&api, id, "embed", &payload).await);
    }
    let replay = |letter: usize| format!("/v1/dead-letters/{}:replay", letters[letter]);
    for (letter, body) in [(0, json!({ "payload": everywhere })), (1, json!({}))] {
        let answer = api.post(&replay(letter), &body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", answer.body);
        assert!(
            answer.body["error"]["message"].as_str().unwrap().contains("every_tenant"),
            "{}",
            answer.body
        );
    }
    let all = api.post("/v1/dead-letters:replay", &json!({})).await;
    assert_eq!(all.status, StatusCode::ACCEPTED, "{}", all.body);
    assert_eq!(
        (&all.body["replayed"][0]["id"], &all.body["failed"][0]["id"], &all.body["next"]),
        (&json!(letters[0]), &json!(letters[1]), &Value::Null)
    );
}

#[tokio::test]
async fn letters_that_cannot_be_replayed_do_not_hide_those_behind_them() {
    let api = Api::new().await;
    let mut letters = vec![];
    for payload in [json!({ "every_tenant": true }), json!({ "every_tenant": true }), json!({ "all": true })]
    {
        let job = new_job("embed", TenantId::new("acme").unwrap(), payload.clone()).unwrap();
        let id = api.stage.client.enqueue(job, Durability::Durable).await.unwrap().id;
        letters.push(dies(&api, id, "embed", &payload).await);
    }
    let ask = async |body: Value| api.post("/v1/dead-letters:replay", &body).await;
    let first = ask(json!({ "limit": 2 })).await.body;
    assert_eq!((&first["replayed"], &first["next"]), (&json!([]), &json!(letters[1])), "{first}");
    let second = ask(json!({ "limit": 2, "after": first["next"] })).await.body;
    assert_eq!(
        (&second["replayed"][0]["id"], &second["next"]),
        (&json!(letters[2]), &Value::Null),
        "{second}"
    );
    let selection = json!({ "after": first["next"] }).to_string();
    let theirs = api.call(OTHER_KEY, Method::POST, "/v1/dead-letters:replay", selection).await;
    assert_eq!((theirs.status, theirs.code()), (StatusCode::NOT_FOUND, "not_found"));
}

/// Has a job die; its letter.
async fn dies(api: &Api, job: JobId, kind: &str, payload: &Value) -> uuid::Uuid {
    let pool = api.stage.postgres.pool();
    for sql in [
        "UPDATE jobs SET state = 'running', worker = 'w' WHERE id = $1",
        "UPDATE jobs SET state = 'dead', finished_at = now() WHERE id = $1",
    ] {
        sqlx::query(sql).bind(job.0).execute(pool).await.unwrap();
    }
    let letter = uuid::Uuid::now_v7();
    sqlx::query("INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload) VALUES ($1, $2, 'acme', $3, $3, 'odd', 'x', $4)")
        .bind(letter)
        .bind(job.0)
        .bind(kind)
        .bind(payload)
        .execute(pool)
        .await
        .unwrap();
    letter
}

#[tokio::test]
async fn a_tenants_open_letters_are_replayed_or_discarded_together() {
    let api = Api::new().await;
    let pool = api.stage.postgres.pool();
    for (n, class) in ["odd", "odd", "odd", "other"].into_iter().enumerate() {
        let id = api.enqueue(&job()).await.body["id"].as_str().unwrap().parse::<uuid::Uuid>().unwrap();
        for sql in [
            "UPDATE jobs SET state = 'running', worker = 'w' WHERE id = $1",
            "UPDATE jobs SET state = 'dead', finished_at = now() WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id).execute(pool).await.unwrap();
        }
        sqlx::query("INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload) VALUES ($1, $2, 'acme', 'ingest', 'ingest', $3, $4, $5)")
            .bind(uuid::Uuid::now_v7())
            .bind(id)
            .bind(class)
            .bind(format!("number {n}"))
            .bind(&job()["payload"])
            .execute(pool)
            .await
            .unwrap();
    }
    let replay = async |body: serde_json::Value| api.post("/v1/dead-letters:replay", &body).await;
    let dry = replay(json!({ "class": "odd", "dry_run": true })).await;
    assert_eq!((dry.status, &dry.body["letters"]), (StatusCode::OK, &json!(3)), "{}", dry.body);
    assert_eq!(replay(json!({ "limit": 0 })).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(replay(json!({ "clas": "odd" })).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let theirs = api.call(OTHER_KEY, Method::POST, "/v1/dead-letters:replay", "{}").await;
    assert_eq!((theirs.status, &theirs.body["replayed"]), (StatusCode::ACCEPTED, &json!([])));

    let first = replay(json!({ "class": "odd", "limit": 2 })).await;
    assert_eq!(first.status, StatusCode::ACCEPTED, "{}", first.body);
    assert_eq!(first.body["replayed"].as_array().unwrap().len(), 2);
    let job = first.body["replayed"][0]["replay_job"].as_str().unwrap();
    assert_eq!(api.get(&format!("/v1/jobs/{job}")).await.body["state"], "waiting");
    let rest = replay(json!({ "class": "odd", "text": "NUMBER 2" })).await;
    assert_eq!(rest.body["replayed"].as_array().unwrap().len(), 1, "{}", rest.body);
    assert_eq!(replay(json!({ "class": "odd" })).await.body["replayed"], json!([]));

    let discard = async |body: serde_json::Value| api.post("/v1/dead-letters:discard", &body).await;
    assert_eq!(discard(json!({})).await.status, StatusCode::BAD_REQUEST, "without a reason");
    assert_eq!(discard(json!({ "reason": "a test", "dry_run": true })).await.body["letters"], 1);
    assert_eq!(discard(json!({ "reason": "a test" })).await.body, json!({ "discarded": 1 }));
    assert_eq!(
        api.get("/v1/dead-letters?state=all&text=number%203").await.body["dead_letters"][0]["note"],
        "a test"
    );
    assert_eq!(api.get("/v1/dead-letters").await.body["dead_letters"], json!([]));
}

#[tokio::test]
async fn with_open_auth_the_header_names_the_tenant() {
    let api = Api::with(ClientSettings::default(), Auth::Open).await;
    let send = |tenant: Option<&'static str>| {
        let mut request = Request::post("/v1/jobs");
        if let Some(tenant) = tenant {
            request = request.header("X-Flotilla-Tenant", tenant);
        }
        api.send(request.body(Body::from(job().to_string())).unwrap())
    };
    assert_eq!(send(Some("globex")).await.status, StatusCode::ACCEPTED);
    let unknown = send(Some("nobody")).await;
    assert_eq!((unknown.status, unknown.code()), (StatusCode::NOT_FOUND, "unknown_tenant"));
    let odd = send(Some("a b")).await;
    assert_eq!((odd.status, odd.code()), (StatusCode::BAD_REQUEST, "invalid_tenant"));
    api.stage.postgres.create_tenant("default").await.unwrap();
    assert_eq!(send(None).await.status, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn the_callers_trace_goes_on_in_the_job() {
    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let api = Api::new().await;
    for (sent, kept) in [(PARENT, json!(PARENT)), ("00-nonsense-01", Value::Null)] {
        let request = Request::post("/v1/jobs")
            .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
            .header("traceparent", sent)
            .body(Body::from(job().to_string()))
            .unwrap();
        let answer = api.send(request).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED);
        let seen = api.get(&format!("/v1/jobs/{}", answer.body["id"].as_str().unwrap())).await.body;
        assert_eq!(seen["traceparent"], kept);
    }
}

#[tokio::test]
async fn schedules_are_made_shown_changed_paused_and_deleted_by_their_owner_alone() {
    let api = Api::new().await;
    let mut nightly = json!({
        "name": "nightly", "cron": "30 2 * * *", "time_zone": "Europe/Berlin", "kind": "report", "payload": { "of": "day" },
        "catch_up": "all", "max_catch_up": 7, "priority": 2
    });
    let made = api.post("/v1/schedules", &nightly).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    assert_eq!(made.headers[header::LOCATION], "/v1/schedules/nightly");
    assert_eq!(api.post("/v1/schedules", &nightly).await.code(), "name_taken");
    let shown = api.get("/v1/schedules/nightly?next=3").await;
    assert_eq!(shown.status, StatusCode::OK);
    assert_eq!(shown.body["next_ticks"].as_array().unwrap().len(), 3);
    assert_eq!(shown.body["next_ticks"][0], shown.body["next_tick_at"]);
    assert_eq!((&shown.body["priority"], &shown.body["catch_up"]), (&json!(2), &json!("all")));
    // Another tenant sees none of it.
    for (method, path) in [
        (Method::GET, "/v1/schedules/nightly"),
        (Method::DELETE, "/v1/schedules/nightly"),
        (Method::POST, "/v1/schedules/nightly:pause"),
    ] {
        let answer = api.call(OTHER_KEY, method.clone(), path, Body::empty()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{method} {path}");
    }
    let theirs = api.call(OTHER_KEY, Method::GET, "/v1/schedules", Body::empty()).await;
    assert_eq!(theirs.body, json!({ "schedules": [] }));
    nightly["cron"] = json!("0 3 * * *");
    let path = "/v1/schedules/nightly";
    let changed = api.call(KEY, Method::PUT, path, nightly.to_string()).await;
    assert_eq!((changed.status, &changed.body["cron"]), (StatusCode::OK, &json!("0 3 * * *")));
    nightly["name"] = json!("other");
    assert_eq!(api.call(KEY, Method::PUT, path, nightly.to_string()).await.code(), "invalid_schedule");
    let paused = api.post("/v1/schedules/nightly:pause", &json!({})).await;
    assert!(paused.body["paused_at"].is_string(), "{}", paused.body);
    assert_eq!(api.get(path).await.body["next_ticks"], json!([]));
    let resumed = api.post("/v1/schedules/nightly:resume", &json!({})).await;
    assert!(resumed.body["paused_at"].is_null(), "{}", resumed.body);
    assert_eq!(api.post("/v1/schedules/nightly:run", &json!({})).await.status, StatusCode::NOT_FOUND);
    assert_eq!(api.get("/v1/schedules").await.body["schedules"].as_array().unwrap().len(), 1);
    let gone = api.call(KEY, Method::DELETE, path, Body::empty()).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert_eq!(api.get(path).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_schedule_that_can_not_be_is_refused_with_the_field_named() {
    let api = Api::new().await;
    let sound = json!({ "name": "x", "cron": "0 * * * *", "kind": "report", "payload": {} });
    for (field, value, status, names) in [
        ("cron", json!("0 25 * * *"), StatusCode::BAD_REQUEST, "cron is \"0 25 * * *\""),
        ("time_zone", json!("Berlin"), StatusCode::BAD_REQUEST, "time_zone is \"Berlin\""),
        ("name", json!("a/b"), StatusCode::BAD_REQUEST, "name is \"a/b\""),
        ("name", json!(null), StatusCode::BAD_REQUEST, "name: is missing"),
        ("max_catch_up", json!(5000), StatusCode::BAD_REQUEST, "max_catch_up is 5000"),
        ("catch_up", json!("some"), StatusCode::UNPROCESSABLE_ENTITY, "some"),
        ("payload", json!([]), StatusCode::UNPROCESSABLE_ENTITY, "payload"),
        ("priority", json!(10), StatusCode::UNPROCESSABLE_ENTITY, "priority 10"),
        ("corn", json!("0 * * * *"), StatusCode::UNPROCESSABLE_ENTITY, "corn"),
    ] {
        let mut request = sound.clone();
        request[field] = value;
        let answer = api.post("/v1/schedules", &request).await;
        assert_eq!(answer.status, status, "{field}: {}", answer.body);
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(names), "{field}: {message}");
    }
}

#[tokio::test]
async fn a_waiting_job_is_changed_by_its_owner_and_another_one_is_not() {
    let api = Api::new().await;
    let id = api.enqueue(&job()).await.body["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{id}");
    let patch = |key: &'static str, body: Value| {
        let (api, path) = (&api, &path);
        async move { api.call(key, Method::PATCH, path, body.to_string()).await }
    };
    let changed = patch(KEY, json!({ "priority": 9, "run_at": "2999-01-01T00:00:00Z" })).await;
    assert_eq!(changed.status, StatusCode::OK, "{}", changed.body);
    assert_eq!(
        (&changed.body["priority"], &changed.body["run_at"]),
        (&json!(9), &json!("2999-01-01T00:00:00Z"))
    );
    assert_eq!(patch(OTHER_KEY, json!({ "priority": 1 })).await.status, StatusCode::NOT_FOUND);
    for (body, names) in [
        (json!({}), "nothing to change"),
        (json!({ "priority": 10 }), "priority 10"),
        (json!({ "prio": 1 }), "prio"),
        (json!({ "run_at": "tomorrow" }), "invalid characters"),
    ] {
        let refused = patch(KEY, body.clone()).await;
        assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}: {}", refused.body);
        assert!(refused.body["error"]["message"].as_str().unwrap().contains(names), "{}", refused.body);
    }
    api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    let late = patch(KEY, json!({ "priority": 1 })).await;
    assert_eq!((late.status, late.code()), (StatusCode::CONFLICT, "ended"));
}

#[tokio::test]
async fn a_key_may_be_held_until_its_job_has_ended_and_the_second_sees_the_first() {
    let api = Api::new().await;
    let mut request = with("idempotency_key", json!("k"));
    request["idempotency_until"] = json!("finished");
    request["idempotency_ttl_ms"] = json!(0);
    let first = api.enqueue(&request).await;
    assert_eq!(first.status, StatusCode::ACCEPTED, "{}", first.body);
    assert!(first.body.get("job").is_none(), "{}", first.body);
    let second = api.enqueue(&request).await;
    assert_eq!(second.status, StatusCode::OK);
    assert_eq!((&second.body["id"], &second.body["job"]["state"]), (&first.body["id"], &json!("waiting")));
    let path = format!("/v1/jobs/{}", first.body["id"].as_str().unwrap());
    api.call(KEY, Method::DELETE, &path, Body::empty()).await;
    let third = api.enqueue(&request).await;
    assert_eq!(third.status, StatusCode::ACCEPTED, "{}", third.body);
    let without = api.enqueue(&with("idempotency_until", json!("finished"))).await;
    assert_eq!(without.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(without.body["error"]["message"].as_str().unwrap().contains("there is none"));
}

#[tokio::test]
async fn odd_routes_and_questions_are_answered_in_the_same_form() {
    let api = Api::new().await;
    for (method, path, status) in [
        (Method::GET, "/v2/jobs", StatusCode::NOT_FOUND),
        (Method::PUT, "/v1/jobs", StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/v1/search", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/search?q=", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/search?q=x&k=0", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/search?q=x&k=many", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/search?q=x&limit=3", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/search?q=x&model=gpt", StatusCode::UNPROCESSABLE_ENTITY),
        (Method::GET, "/v1/search?q=x", StatusCode::SERVICE_UNAVAILABLE),
        (Method::GET, "/v1/jobs?limit=0", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/jobs?before=x", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/documents/none", StatusCode::NOT_FOUND),
        (Method::GET, "/v1/documents/%00", StatusCode::NOT_FOUND),
        (Method::GET, "/v1/documents/%ff", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/dead-letters/x", StatusCode::NOT_FOUND),
        (Method::GET, "/v1/events?after=7", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/events?limit=0", StatusCode::BAD_REQUEST),
    ] {
        let answer = api.call(KEY, method.clone(), path, Body::empty()).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        let error = support::object(&answer.body["error"]);
        assert!(
            error["code"].is_string() && error["message"].is_string(),
            "{method} {path}: {}",
            answer.body
        );
    }
}

#[tokio::test]
async fn a_panic_is_a_500_that_says_nothing() {
    let stage = Stage::new().await;
    let router = router(
        &ProducerSettings::default(),
        stage.client.clone(),
        stores(stage.postgres.clone()),
        || panic!("the secret of /metrics"),
        CancellationToken::new(),
    );
    let response = router.oneshot(Request::get("/metrics").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = String::from_utf8(to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec()).unwrap();
    assert!(body.contains("\"internal\"") && !body.contains("secret"), "{body}");
}

#[tokio::test]
async fn the_description_names_every_route_and_metrics_are_text() {
    let api = Api::new().await;
    let description = api.send(Request::get("/openapi.json").body(Body::empty()).unwrap()).await;
    assert_eq!(description.status, StatusCode::OK);
    let paths = support::object(&description.body["paths"]);
    for (path, methods) in [
        ("/v1/jobs", vec!["get", "post"]),
        ("/v1/jobs:batch", vec!["post"]),
        ("/v1/jobs/{id}", vec!["delete", "get", "patch"]),
        ("/v1/search", vec!["get"]),
        ("/v1/documents/{key}", vec!["get"]),
        ("/v1/schedules", vec!["get", "post"]),
        ("/v1/schedules/{name}", vec!["delete", "get", "post", "put"]),
        ("/v1/dead-letters", vec!["get"]),
        ("/v1/events", vec!["get"]),
        ("/v1/dead-letters/{id}", vec!["get", "post"]),
        ("/v1/dead-letters:discard", vec!["post"]),
        ("/v1/dead-letters:replay", vec!["post"]),
    ] {
        let described: Vec<&str> =
            paths.get(path).map(support::object).unwrap().keys().map(String::as_str).collect();
        assert_eq!(described, methods, "{path}");
    }
    let properties = &description.body["components"]["schemas"]["JobRequest"]["properties"];
    for field in [
        "kind",
        "payload",
        "queue",
        "priority",
        "run_at",
        "max_attempts",
        "timeout_ms",
        "idempotency_key",
        "idempotency_until",
        "idempotency_ttl_ms",
        "durability",
    ] {
        assert!(properties[field].is_object(), "{field}: {properties}");
    }
    let metrics = api.send(Request::get("/metrics").body(Body::empty()).unwrap()).await;
    assert_eq!((metrics.status, metrics.body), (StatusCode::OK, json!("some_metric 1\n")));
}
