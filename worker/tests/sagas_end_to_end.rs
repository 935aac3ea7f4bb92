//! One worker in this process over real private services: every saga, from acceptance to what readers see.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use devstack::testing::TestServices;
use producer::{Client, ClientSettings};
use queue::{JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    Dependency, Saga, Step, StepContext, StepError, TakenJob, async_trait,
    engine::EngineSettings,
    janitor::JanitorSettings,
    kinds::{DocumentSettings, Stores},
    search::Query,
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{Postgres, PostgresConfig, accept::NewJob, ledger::Cancel},
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use worker::WorkerSettings;

/// What the steps of `patient` did, in order.
type Log = Arc<Mutex<Vec<&'static str>>>;

/// A user's saga whose second step never ends by itself.
struct Patient(Vec<Arc<dyn Step<()>>>);

/// The first, and the pivot, which is never reached.
struct Quick(&'static str, Log);

/// Its work is a task that the engine can't drop: it must be told.
struct Long(Log);

impl Patient {
    fn new(log: &Log) -> Self {
        let quick = |name| Arc::new(Quick(name, Arc::clone(log)));
        Self(vec![quick("early"), Arc::new(Long(Arc::clone(log))), quick("pivot")])
    }
}

impl Saga for Patient {
    type Data = ();

    fn kind(&self) -> &'static str {
        "patient"
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<()>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        2
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, _: &TakenJob) -> Result<(), StepError> {
        Ok(())
    }
}

#[async_trait]
impl Step<()> for Quick {
    fn name(&self) -> &'static str {
        self.0
    }

    async fn execute(&self, _: &StepContext, (): &mut ()) -> Result<(), StepError> {
        self.1.lock().unwrap().push(self.0);
        Ok(())
    }

    async fn compensate(&self, _: &StepContext, (): &()) -> Result<(), StepError> {
        self.1.lock().unwrap().push("undone");
        Ok(())
    }
}

#[async_trait]
impl Step<()> for Long {
    fn name(&self) -> &'static str {
        "long"
    }

    async fn execute(&self, ctx: &StepContext, (): &mut ()) -> Result<(), StepError> {
        let (token, log) = (ctx.token(), Arc::clone(&self.0));
        log.lock().unwrap().push("long");
        let work = tokio::spawn(async move {
            token.cancelled().await;
            log.lock().unwrap().push("told");
        });
        work.await.map_err(|error| StepError::permanent("panicked", error.to_string()))?;
        std::future::pending().await
    }

    async fn compensate(&self, _: &StepContext, (): &()) -> Result<(), StepError> {
        Ok(())
    }
}

struct Fleet {
    log: Log,
    stores: Stores,
    queue: Queue,
    shutdown: CancellationToken,
    worker: tokio::task::JoinHandle<Result<(), worker::WorkerError>>,
    _services: TestServices,
}

const CALL: Duration = Duration::from_secs(10);

impl Fleet {
    async fn start() -> Self {
        let services = TestServices::start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        let vectors = Vectors::lazy(&VectorsConfig {
            url: services.vectors().url().to_owned(),
            api_key: None,
            call_timeout: CALL,
        })
        .unwrap();
        let cache = Cache::lazy(&CacheConfig {
            url: services.redis_cache().url().to_owned(),
            call_timeout: CALL,
            ..CacheConfig::default()
        })
        .unwrap();
        let embedder = embedding::open(&embedding::EmbedderConfig::Hashing).unwrap();
        let settings = DocumentSettings {
            grace: Duration::from_millis(300),
            sweep_bound: Duration::from_secs(1),
            ..DocumentSettings::default()
        };
        let stores = Stores::new(postgres, vectors, cache, embedder, vec![], settings);
        let config = QueueConfig {
            url: services.redis_queue().url().to_owned(),
            lease: Duration::from_secs(4),
            ..QueueConfig::default()
        };
        let queue = Queue::connect(config).await.unwrap();
        let (shutdown, log) = (CancellationToken::new(), Log::default());
        let settings = WorkerSettings {
            queues: ["ingest", "embed", "delete"].map(|name| QueueName::new(name).unwrap()).to_vec(),
            concurrency: 8,
            id: WorkerId::for_this_process(),
            heartbeat: Duration::from_secs(1),
            drain_grace: Duration::from_secs(5),
            addr: Some("127.0.0.1:0".parse().unwrap()),
            engine: EngineSettings {
                retry_base: Duration::from_millis(50),
                unroutable_after: Duration::ZERO,
                ..EngineSettings::default()
            },
            janitor: JanitorSettings { every: Duration::from_millis(100), ..JanitorSettings::default() },
            auditor: worker::AuditorSettings::default(),
        };
        let worker = tokio::spawn(worker::run(
            settings,
            stores.clone(),
            stores.registry().with(Patient::new(&log)),
            queue.clone(),
            Arc::new(String::new),
            shutdown.clone(),
        ));
        Self { log, stores, queue, shutdown, worker, _services: services }
    }

    async fn enqueue(&self, kind: &str, payload: Value) -> JobId {
        let queue = if matches!(kind, "ingest" | "embed" | "delete") { kind } else { "ingest" };
        let mut job =
            NewJob::new(kind, QueueName::new(queue).unwrap(), TenantId::new("acme").unwrap(), payload);
        job.document = sagas::kinds::document_of(kind, &job.payload);
        self.stores.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        let envelope = self.stores.postgres.envelope(job.id).await.unwrap().unwrap();
        self.queue.push(&[envelope]).await.unwrap();
        job.id
    }

    /// Waits until the job has ended; returns its state, outcome and last error.
    async fn ended(&self, id: JobId) -> sagas::stores::postgres::inspect::JobView {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let job = self.stores.postgres.job(id, None).await.unwrap().unwrap();
            if job.finished_at.is_some() {
                return job;
            }
            assert!(Instant::now() < deadline, "not ended in time: {job:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn run(&self, kind: &str, payload: Value) -> sagas::stores::postgres::inspect::JobView {
        let id = self.enqueue(kind, payload).await;
        self.ended(id).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.worker.await.unwrap().unwrap();
    }

    async fn text(&self, document: &str) -> Option<String> {
        self.stores.document("acme", document).await.unwrap().map(|d| d.text)
    }

    async fn hits(&self, text: &str) -> Vec<(String, String)> {
        let query = Query { tenant: "acme", text, k: 3, model: None, collection: None };
        self.stores.search(&query).await.unwrap().into_iter().map(|hit| (hit.document, hit.text)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_is_ingested_replaced_embedded_again_and_deleted() {
    let fleet = Fleet::start().await;
    let job = fleet.run("ingest", json!({ "document": "a", "text": "the quick brown fox" })).await;
    assert_eq!((job.state.as_str(), job.last_error), ("succeeded", None));
    fleet.run("ingest", json!({ "document": "b", "text": "a lazy dog sleeps" })).await;
    assert_eq!(fleet.text("a").await.as_deref(), Some("the quick brown fox"));
    assert_eq!(fleet.hits("quick fox").await[0], ("a".into(), "the quick brown fox".into()));

    let job =
        fleet.run("ingest", json!({ "document": "a", "text": "an entirely new text about foxes" })).await;
    assert_eq!(job.state, "succeeded");
    assert_eq!(fleet.text("a").await.as_deref(), Some("an entirely new text about foxes"));
    assert!(fleet.hits("quick").await.iter().all(|(_, text)| text != "the quick brown fox"));

    let job = fleet.run("embed", json!({ "all": true, "collection": "other" })).await;
    assert_eq!(job.result, Some(json!({ "enqueued": 2 })));
    let deadline = Instant::now() + Duration::from_secs(20);
    while fleet.stores.vectors.collections().await.unwrap().is_empty()
        || fleet.stores.postgres.current_version("acme", "a").await.unwrap().unwrap().collection != "other"
    {
        // The children wait for the relay, which this test stands in for.
        let batch = fleet.stores.postgres.undispatched(10, &[], &[]).await.unwrap();
        fleet.queue.push(&batch.envelopes).await.unwrap();
        let ids: Vec<JobId> = batch.envelopes.iter().map(|e| e.id).collect();
        batch.done(&ids).await.unwrap();
        assert!(Instant::now() < deadline, "not embedded again in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(fleet.text("a").await.as_deref(), Some("an entirely new text about foxes"));

    let job = fleet.run("delete", json!({ "document": "a" })).await;
    assert_eq!(job.state, "succeeded");
    assert_eq!(fleet.text("a").await, None);
    assert!(fleet.hits("foxes").await.iter().all(|(document, _)| document != "a"));

    // The janitor finishes every saga and sweeps every version but the one that is shown.
    let left = "SELECT (SELECT count(*) FROM sagas WHERE state NOT IN ('completed', 'compensated'))
                     + (SELECT count(*) FROM document_versions WHERE state <> 'published')";
    let deadline = Instant::now() + Duration::from_secs(20);
    while sqlx::query_scalar::<_, i64>(left).fetch_one(fleet.stores.postgres.pool()).await.unwrap() > 0 {
        assert!(Instant::now() < deadline, "the janitor is not done");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_succeed_becomes_a_dead_letter_with_its_reason() {
    let fleet = Fleet::start().await;
    for (kind, payload, class) in [
        ("ingest", json!({ "document": "x", "text": " \n " }), "empty_document"),
        ("ingest", json!({ "document": "x", "text_base64": "/////w==" }), "not_utf8"),
        (
            "ingest",
            json!({ "document": "x", "chunks": [{ "text": "t", "vector": [1.0] }] }),
            "wrong_dimension",
        ),
        ("ingest", json!({ "document": "x", "text": "t", "model": "none" }), "unknown_model"),
        ("ingest", json!({ "document": "x" }), "bad_payload"),
        ("no_such_kind", json!({}), "unknown_kind"),
    ] {
        let job = fleet.run(kind, payload).await;
        assert_eq!(job.state, "dead", "{class}");
        let letter = fleet.stores.postgres.dead_letter(job.id).await.unwrap().unwrap();
        assert_eq!(letter.class, class, "{}", letter.reason);
        assert_eq!(job.attempts, 1);
    }
    assert_eq!(fleet.text("x").await, None);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protocol_14_cancel_ends_a_waiting_job_at_once_and_never_one_past_its_pivot() {
    let fleet = Fleet::start().await;
    let done = fleet.run("ingest", json!({ "document": "c", "text": "done" })).await;
    assert_eq!(fleet.stores.postgres.cancel(JobId(done.id), Some("acme")).await.unwrap(), Cancel::PastPivot);
    let mut job = NewJob::new(
        "ingest",
        QueueName::new("ingest").unwrap(),
        TenantId::new("acme").unwrap(),
        json!({ "document": "c", "text": "later" }),
    );
    job.document = Some("c".into());
    job.run_at = Some(chrono::Utc::now() + chrono::Duration::hours(1));
    fleet.stores.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
    assert_eq!(fleet.stores.postgres.cancel(job.id, Some("other")).await.unwrap(), Cancel::Unknown);
    assert_eq!(fleet.stores.postgres.cancel(job.id, Some("acme")).await.unwrap(), Cancel::Cancelled);
    assert_eq!(fleet.ended(job.id).await.state, "cancelled");
    assert_eq!(fleet.text("c").await.as_deref(), Some("done"));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protocol_14_a_clients_cancel_reaches_a_running_handler_and_leaves_no_lease() {
    let fleet = Fleet::start().await;
    let client =
        Client::new(fleet.stores.postgres.clone(), Some(fleet.queue.clone()), ClientSettings::default());
    let id = fleet.enqueue("patient", json!({})).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fleet.log.lock().unwrap().contains(&"long") {
        assert!(Instant::now() < deadline, "{:?}", fleet.stores.postgres.job(id, None).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let place = [(QueueName::new("ingest").unwrap(), id)];
    assert_eq!(fleet.queue.leases(&place[0].0).await.unwrap().len(), 1);
    assert_eq!(client.cancel(id, Some("other")).await.unwrap(), Cancel::Unknown);
    assert_eq!(fleet.log.lock().unwrap().len(), 2);

    assert_eq!(client.cancel(id, Some("acme")).await.unwrap(), Cancel::Requested);
    let job = fleet.ended(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("cancelled", 0), "{job:#?}");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let leases = fleet.queue.leases(&place[0].0).await.unwrap();
        let told = fleet.log.lock().unwrap().clone();
        if leases.is_empty() && told.contains(&"told") {
            break;
        }
        assert!(Instant::now() < deadline, "{told:?}, leases {leases:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(fleet.queue.places(&place).await.unwrap(), [None]);
    let log = fleet.log.lock().unwrap().clone();
    assert!(!log.contains(&"pivot"), "{log:?}");
    assert_eq!(log.iter().filter(|said| **said == "undone").count(), 1, "{log:?}");
    assert_eq!(client.cancel(id, Some("acme")).await.unwrap(), Cancel::Ended);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_have_ended_leave_nothing_in_the_queues_redis() {
    let fleet = Fleet::start().await;
    let mut ids = vec![];
    for number in 0..12 {
        let tenant = format!("tenant-{number}");
        fleet.stores.postgres.create_tenant(&tenant).await.unwrap();
        // One that succeeds, one that dies, one that dies of its kind, one that is cancelled while it waits.
        for (kind, payload) in [
            ("ingest", json!({ "document": "d", "text": format!("text {number}") })),
            ("ingest", json!({ "document": "x", "text": "" })),
            ("no_such_kind", json!({})),
            ("ingest", json!({ "document": "later", "text": "never" })),
        ] {
            let mut job = NewJob::new(
                kind,
                QueueName::new("ingest").unwrap(),
                TenantId::new(tenant.as_str()).unwrap(),
                payload,
            );
            job.priority = queue::Priority::try_from((number % 10) as u8).unwrap();
            job.document = sagas::kinds::document_of(kind, &job.payload);
            if job.document.as_deref() == Some("later") {
                job.run_at = Some(chrono::Utc::now() + Duration::from_secs(3600));
            }
            fleet.stores.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
            let envelope = fleet.stores.postgres.envelope(job.id).await.unwrap().unwrap();
            fleet.queue.push(&[envelope]).await.unwrap();
            if job.run_at.is_some() {
                let cancelled = fleet.stores.postgres.cancel(job.id, None).await.unwrap();
                assert_eq!(cancelled, Cancel::Cancelled);
                fleet.queue.forget(&[(job.queue.clone(), job.id)]).await.unwrap();
            }
            ids.push(job.id);
        }
    }
    for id in &ids {
        fleet.ended(*id).await;
    }
    let mut redis = redis::Client::open(fleet.queue.config().url.as_str())
        .unwrap()
        .get_multiplexed_async_connection()
        .await
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut redis).await.unwrap();
        let left: Vec<&String> = keys
            .iter()
            .filter(|key| key.contains("tenant-") || ids.iter().any(|id| key.contains(&id.to_string())))
            .collect();
        if left.is_empty() {
            // The counters of the queues, which don't grow.
            assert!(keys.len() <= 3 * 3, "{keys:?}");
            break;
        }
        assert!(Instant::now() < deadline, "left behind: {left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // All but those that were cancelled before a worker saw them count, within ten seconds.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let hour = fleet.queue.rates(&QueueName::new("ingest").unwrap()).await.unwrap().hour;
        if (hour.ended, hour.dead) == (36, 24) {
            break;
        }
        assert!(Instant::now() < deadline, "{hour:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    fleet.stop().await;
}
