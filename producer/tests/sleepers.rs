//! Sagas that wait for a signal or for child jobs, in a whole deployment: HTTP API, relay, collector, and a worker with one slot.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Method, Request, StatusCode},
};
use producer::{Auth, ClientSettings, Durability, ProducerSettings, new_job, router};
use queue::JobId;
use sagas::{
    Child, Class, Dependency, Registry, Saga, Step, StepContext, StepError, StoreError, TakenJob,
    async_trait,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::inspect::JobView,
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use support::{Maintenance, Stage, eventually, name, quick, tenant};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use worker::WorkerSettings;

/// What the steps do by themselves, by the kind of their saga.
struct Kind {
    name: &'static str,
    steps: Vec<Arc<dyn Step<Value>>>,
}

impl Saga for Kind {
    type Data = Value;
    fn kind(&self) -> &'static str {
        self.name
    }
    fn version(&self) -> i32 {
        1
    }
    fn steps(&self) -> &[Arc<dyn Step<Value>>] {
        &self.steps
    }
    fn pivot(&self) -> usize {
        self.steps.len()
    }
    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }
    fn prepare(&self, job: &TakenJob) -> Result<Value, StepError> {
        Ok(job.payload.clone())
    }
    fn result(&self, data: &Value) -> Value {
        data.clone()
    }
}

/// Waits for the signal `approve`.
struct Ask;

#[async_trait]
impl Step<Value> for Ask {
    fn name(&self) -> &'static str {
        "ask"
    }
    async fn execute(&self, ctx: &StepContext, data: &mut Value) -> Result<(), StepError> {
        let answer: Option<Value> = ctx.signal("approve", Duration::from_secs(3600)).await?;
        data["answer"] = answer.unwrap_or_default();
        Ok(())
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
}

/// Enqueues as many parts as its payload says, and adds up what they bring.
struct Sum;

#[async_trait]
impl Step<Value> for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }
    async fn execute(&self, ctx: &StepContext, data: &mut Value) -> Result<(), StepError> {
        let parts = data["parts"].as_i64().unwrap_or_default();
        let parts: Vec<Child> = (1..=parts).map(|n| Child::new("part", json!({ "n": n }))).collect();
        let ends = ctx.children("parts", &parts).await?;
        let sum: i64 = ends.iter().filter_map(|end| end.result.as_ref()?["n"].as_i64()).sum();
        data["sum"] = json!(sum);
        data["dead"] = json!(ends.iter().filter(|end| !end.succeeded()).count());
        Ok(())
    }
    async fn compensate(&self, ctx: &StepContext, _: &Value) -> Result<(), StepError> {
        ctx.cancel_children("parts").await
    }
}

/// Every seventh is hopeless.
struct Part(Arc<Mutex<Vec<i64>>>);

#[async_trait]
impl Step<Value> for Part {
    fn name(&self) -> &'static str {
        "part"
    }
    async fn execute(&self, _: &StepContext, data: &mut Value) -> Result<(), StepError> {
        let n = data["n"].as_i64().unwrap_or_default();
        self.0.lock().unwrap().push(n);
        if n % 7 == 0 { Err(StepError::permanent("seven", "sevens are hopeless")) } else { Ok(()) }
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
}

const SHOP: Dependency = Dependency::Other("shop");

/// Asks the shop, which may be closed.
struct Buy(Arc<AtomicBool>);

#[async_trait]
impl Step<Value> for Buy {
    fn name(&self) -> &'static str {
        "buy"
    }
    async fn execute(&self, ctx: &StepContext, _: &mut Value) -> Result<(), StepError> {
        ctx.call(SHOP, |_| async { shop_answers(&self.0) }).await
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
}

fn shop_answers(open: &AtomicBool) -> Result<(), StoreError> {
    if open.load(Ordering::SeqCst) {
        Ok(())
    } else {
        Err(StoreError::new(SHOP, Class::Unavailable, "closed"))
    }
}

struct Deployment {
    stage: Stage,
    router: Router,
    done: Arc<Mutex<Vec<i64>>>,
    shop: Arc<AtomicBool>,
    stop: CancellationToken,
    worker: tokio::task::JoinHandle<Result<(), worker::WorkerError>>,
    maintenance: Maintenance,
}

impl Deployment {
    /// With one slot.
    async fn start() -> Self {
        Self::with(1).await
    }

    async fn with(slots: usize) -> Self {
        let stage =
            Stage::with(ClientSettings::default(), |config| config.lease = Duration::from_secs(4)).await;
        let call_timeout = Duration::from_secs(1);
        // Nothing here uses them.
        let away = "http://127.0.0.1:1".to_owned();
        let vectors = Vectors::lazy(&VectorsConfig { url: away, api_key: None, call_timeout }).unwrap();
        let cache = CacheConfig { url: "redis://127.0.0.1:1".into(), call_timeout, ..CacheConfig::default() };
        let stores = Stores::new(
            stage.postgres.clone(),
            vectors,
            Cache::lazy(&cache).unwrap(),
            Arc::new(embedding::hashing::HashingEmbedder::new()),
            vec![],
            DocumentSettings::default(),
        );
        let (stop, done) = (CancellationToken::new(), Arc::default());
        let shop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&shop);
        let http = ProducerSettings { auth: Auth::Open, ..ProducerSettings::default() };
        let router = router(&http, stage.client.clone(), stores.clone(), String::new, stop.clone());
        let registry = Registry::default()
            .with(Kind { name: "approval", steps: vec![Arc::new(Ask)] })
            .with(Kind { name: "sum", steps: vec![Arc::new(Sum)] })
            .with(Kind { name: "part", steps: vec![Arc::new(Part(Arc::clone(&done)))] })
            .with(Kind { name: "purchase", steps: vec![Arc::new(Buy(Arc::clone(&shop)))] })
            .probe(SHOP, move || std::future::ready(shop_answers(&asked)));
        let queues = ["approval", "sum", "part", "purchase"].map(name).to_vec();
        let mut settings = WorkerSettings::new(queues, Duration::from_secs(4));
        settings.concurrency = slots;
        settings.addr = Some("127.0.0.1:0".parse().unwrap());
        let worker =
            worker::run(settings, stores, registry, stage.queue.clone(), Arc::new(String::new), stop.clone());
        let worker = tokio::spawn(worker);
        let maintenance = stage.maintain(quick());
        Self { stage, router, done, shop, stop, worker, maintenance }
    }

    async fn enqueue(&self, kind: &str, payload: Value) -> JobId {
        let job = new_job(kind, tenant("acme"), payload).unwrap();
        self.stage.client.enqueue(job, Durability::Durable).await.unwrap().id
    }

    async fn job(&self, id: JobId) -> JobView {
        self.stage.postgres.job(id, None).await.unwrap().unwrap()
    }

    async fn ended(&self, id: JobId) -> JobView {
        eventually(|| async {
            let job = self.job(id).await;
            if job.finished_at.is_some() { Ok(job) } else { Err(format!("{job:?}")) }
        })
        .await
    }

    async fn asleep(&self, id: JobId) {
        eventually(|| async {
            let job = self.job(id).await;
            let sleeps = job.state == "waiting" && job.deliveries > 0 && job.run_at > chrono::Utc::now();
            if sleeps { Ok(()) } else { Err(format!("{job:?}")) }
        })
        .await;
    }

    async fn signal(&self, tenant: &str, id: JobId, body: &'static str) -> (StatusCode, Value) {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/v1/jobs/{id}/signals/approve"))
            .header("X-Flotilla-Tenant", tenant)
            .body(Body::from(body))
            .unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    async fn stop(self) {
        self.stop.cancel();
        self.worker.await.unwrap().unwrap();
        self.maintenance.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_wait_for_a_signal_hold_no_slot_outlive_redis_and_wake_promptly() {
    let fleet = Deployment::start().await;
    let mut sleepers = vec![];
    for _ in 0..5 {
        sleepers.push(fleet.enqueue("approval", json!({})).await);
    }
    for id in &sleepers {
        fleet.asleep(*id).await;
    }
    // The worker has one slot, and it is free.
    let job = fleet.ended(fleet.enqueue("part", json!({ "n": 1 })).await).await;
    assert_eq!(job.state, "succeeded");

    let begun = Instant::now();
    assert_eq!(fleet.signal("acme", sleepers[0], r#""yes""#).await.0, StatusCode::ACCEPTED);
    let job = fleet.ended(sleepers[0]).await;
    assert_eq!(job.result, Some(json!({ "answer": "yes" })));
    // It would have slept for an hour.
    println!("woken and ended {:?} after the signal", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(10));
    let (status, answer) = fleet.signal("acme", sleepers[0], r#""yes""#).await;
    assert_eq!((status, &answer["duplicate"]), (StatusCode::OK, &json!(true)));
    let (status, answer) = fleet.signal("acme", sleepers[0], r#""no""#).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::CONFLICT, &json!("conflict")));
    assert_eq!(fleet.signal("globex", sleepers[1], r#""yes""#).await.0, StatusCode::NOT_FOUND);
    assert_eq!(fleet.signal("acme", sleepers[1], "{").await.0, StatusCode::BAD_REQUEST);

    // Redis forgets who sleeps; Postgres doesn't.
    redis::cmd("FLUSHALL").exec_async(&mut fleet.stage.redis().await).await.unwrap();
    for id in &sleepers[1..] {
        assert_eq!(fleet.signal("acme", *id, r#""yes""#).await.0, StatusCode::ACCEPTED);
    }
    for id in &sleepers[1..] {
        let job = fleet.ended(*id).await;
        assert_eq!((job.result, job.attempts), (Some(json!({ "answer": "yes" })), 0));
    }
    assert_eq!(fleet.signal("acme", sleepers[1], "null").await.1["error"]["code"], json!("conflict"));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_waits_for_its_children_in_the_one_slot_that_they_need() {
    let fleet = Deployment::start().await;
    let job = fleet.ended(fleet.enqueue("sum", json!({ "parts": 20 })).await).await;
    // 1 to 20 without 7 and 14.
    assert_eq!(job.result, Some(json!({ "parts": 20, "sum": 210 - 21, "dead": 2 })), "{job:?}");
    assert_eq!(job.attempts, 0);
    let mut done = fleet.done.lock().unwrap().clone();
    done.sort_unstable();
    assert_eq!(done, (1..=20).collect::<Vec<_>>(), "each part once");
    let job = fleet.ended(fleet.enqueue("sum", json!({ "parts": 0 })).await).await;
    assert_eq!(
        job.result,
        Some(json!({ "parts": 0, "sum": 0, "dead": 0 })),
        "no children have ended at once"
    );
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protocol_16_a_job_that_runs_alone_does_not_wait_for_those_who_wait_out_an_outage() {
    let fleet = Deployment::with(4).await;
    let purchase = fleet.enqueue("purchase", json!({})).await;
    eventually(|| async {
        let job = fleet.job(purchase).await;
        if job.state == "running" { Ok(()) } else { Err(format!("{job:?}")) }
    })
    .await;
    let lone = new_job("part", tenant("acme"), json!({ "n": 1 })).unwrap();
    fleet.stage.postgres.accept(std::slice::from_ref(&lone), true).await.unwrap();
    sqlx::query("UPDATE jobs SET lost_deliveries = 2 WHERE id = $1")
        .bind(lone.id.0)
        .execute(fleet.stage.postgres.pool())
        .await
        .unwrap();
    fleet.stage.postgres.leave_to_relay(&[lone.id]).await.unwrap();
    eventually(|| async {
        let job = fleet.job(lone.id).await;
        if job.deliveries > 0 { Ok(()) } else { Err(format!("{job:?}")) }
    })
    .await;
    let other = fleet.enqueue("part", json!({ "n": 2 })).await;
    assert_eq!(fleet.ended(other).await.state, "succeeded");
    assert_eq!(fleet.job(purchase).await.state, "running", "it waits out the outage");
    fleet.shop.store(true, Ordering::SeqCst);
    assert_eq!(fleet.ended(purchase).await.state, "succeeded");
    let lone = fleet.ended(lone.id).await;
    assert_eq!((lone.state.as_str(), lone.attempts), ("succeeded", 0), "{lone:?}");
    fleet.stop().await;
}
