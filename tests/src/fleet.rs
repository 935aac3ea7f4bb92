//! Private services with a fleet of workers on them.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use devstack::testing::TestServices;
use embedding::hashing::HashingEmbedder;
use producer::{Client, ClientSettings, Durability};
use queue::{JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    audit::{AuditSettings, Auditor, Finding, Report},
    engine::{Engine, EngineSettings},
    kinds::{self, DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{
            Postgres, PostgresConfig,
            accept::{Accepted, NewJob},
        },
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{Faults, LONG, Reader, SHORT, Subject, WorkerBuilder, process, wait_until};

/// The tenant that owns all that tests enqueue.
pub const TENANT: &str = "acme";

/// Jobs accepted in one transaction.
const PAGE: usize = 500;
/// As `FLOTILLA_LEASE_MS` below.
const LEASE: Duration = Duration::from_secs(2);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const ENDED: [&str; 4] = ["succeeded", "cancelled", "dead", "parked"];

/// The services of one test, migrated, and what its workers share.
///
/// Dropping it ends everything. A test calls [`Fleet::end`] instead, which also proves that nothing is left.
pub struct Fleet {
    /// The four servers, to be killed and stopped.
    pub services: TestServices,
    /// The ledger.
    pub postgres: Postgres,
    /// The stores as a reader in this process sees them.
    pub stores: Stores,
    /// The queue as an observer in this process sees it.
    pub queue: Queue,
    faults: PathBuf,
    started: AtomicU32,
}

impl Fleet {
    /// Starts the services, migrates, and makes the tenant. No worker runs yet.
    pub async fn start() -> Self {
        let services =
            TestServices::start().await.unwrap_or_else(|e| panic!("the services don't start: {e}"));
        let faults = services.dir().join("faults");
        std::fs::create_dir(&faults).expect("a directory for fault points");
        let env: HashMap<_, _> = services.env().into_iter().collect();
        let mut config = PostgresConfig::new(&env["DATABASE_URL"]);
        config.call_timeout = CALL_TIMEOUT;
        let postgres = Postgres::connect(&config).await.expect("Postgres");
        postgres.migrate_up().await.expect("the migrations");
        postgres.create_tenant(TENANT).await.expect("the tenant");
        let vectors =
            VectorsConfig { url: env["QDRANT_URL"].clone(), api_key: None, call_timeout: CALL_TIMEOUT };
        let cache = CacheConfig {
            url: env["REDIS_CACHE_URL"].clone(),
            call_timeout: CALL_TIMEOUT,
            ..CacheConfig::default()
        };
        let stores = Stores::new(
            postgres.clone(),
            Vectors::lazy(&vectors).expect("the vector server"),
            Cache::lazy(&cache).expect("the cache"),
            Arc::new(HashingEmbedder::new()),
            vec![],
            DocumentSettings::default(),
        );
        let queue = Queue::lazy(QueueConfig {
            url: env["REDIS_QUEUE_URL"].clone(),
            lease: LEASE,
            ..QueueConfig::default()
        })
        .expect("the queue");
        Self { services, postgres, stores, queue, faults, started: AtomicU32::new(0) }
    }

    /// A worker over these services, with leases of 2 s and short grace periods. Not started yet.
    pub fn worker(&self) -> WorkerBuilder {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        WorkerBuilder::new(format!("worker-{number}"), self.services.dir(), self.env())
    }

    /// The environment of a `flotilla` process over these services.
    pub fn env(&self) -> Vec<(String, String)> {
        let services = self.services.env().into_iter().map(|(name, value)| (name.to_owned(), value));
        let settings = [
            ("FLOTILLA_PREFIX", "flotilla"),
            ("FLOTILLA_EMBEDDER", "hash"),
            ("FLOTILLA_QUEUES", "ingest,embed,delete"),
            ("FLOTILLA_CONCURRENCY", "8"),
            ("FLOTILLA_LEASE_MS", "2000"),
            ("FLOTILLA_HEARTBEAT_MS", "500"),
            ("FLOTILLA_DRAIN_GRACE_MS", "5000"),
            ("FLOTILLA_GRACE_MS", "500"),
            ("FLOTILLA_SWEEP_BOUND_MS", "3000"),
            ("FLOTILLA_RETRY_BASE_MS", "100"),
            ("FLOTILLA_RECONCILE_MS", "500"),
            ("FLOTILLA_CALL_TIMEOUT_MS", "1000"),
            ("FLOTILLA_FAULTS_PAGE", "2"),
            ("FLOTILLA_LOG", "info"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let faults = ("FLOTILLA_FAULTS_DIR".to_owned(), self.faults.display().to_string());
        services.chain(settings).chain([faults]).collect()
    }

    /// What `flotilla ARGUMENTS --json` prints over these services; the test fails unless it ends with this exit code.
    /// Null for a command that prints nothing. It has patience with a busy machine: what it does is to be seen, not how fast.
    pub fn flotilla(&self, code: i32, arguments: &[&str]) -> Value {
        let output = std::process::Command::new(process::binary())
            .args(arguments)
            .arg("--json")
            .envs(self.env())
            .env("FLOTILLA_CALL_TIMEOUT_MS", "10000")
            .env("USER", "tester")
            .env_remove("FLOTILLA_FAULTS")
            .stdin(std::process::Stdio::null())
            .output()
            .expect("the program runs");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\nstdout: {out}\nstderr: {err}");
        if out.trim().is_empty() {
            return Value::Null;
        }
        serde_json::from_str(&out)
            .unwrap_or_else(|e| panic!("{arguments:?}: {e}\nstdout: {out}\nstderr: {err}"))
    }

    /// How often a fault point has acted, over all workers armed by [`WorkerBuilder::faults`].
    pub fn fired(&self, point: &str) -> usize {
        Faults { spec: String::new(), dir: self.faults.clone() }.fired(point)
    }

    /// Fault points whose firings are counted apart from all others, for one case of many; see [`WorkerBuilder::armed`].
    pub fn faults(&self, case: &str, spec: impl Into<String>) -> Faults {
        let dir = self.faults.join(case);
        std::fs::create_dir(&dir).expect("a directory for the case");
        Faults { spec: spec.into(), dir }
    }

    /// The names of all fault points: those around each step of each registered saga, and those inside store writes.
    pub fn fault_points(&self) -> Vec<String> {
        self.fault_points_of(false)
    }

    /// The same, of a worker that hands embeddings over or doesn't.
    pub(crate) fn fault_points_of(&self, handing_over: bool) -> Vec<String> {
        let mut stores = self.stores.clone();
        Arc::make_mut(&mut stores.settings).hand_embedding_over = handing_over;
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        let engine = Engine::new(
            self.postgres.clone(),
            stores.breakers(stop),
            WorkerId::new("names"),
            EngineSettings::default(),
            stores.registry(),
        );
        let mut points = engine.fault_points();
        points.extend(sagas::fault::INSIDE.iter().map(|point| (*point).to_owned()));
        points
    }

    /// A job of [`TENANT`] with the defaults, in its kind's own queue, not yet accepted.
    pub fn job(&self, kind: &str, payload: Value) -> NewJob {
        let queue = QueueName::new(kinds::default_queue(kind)).expect("a queue's name");
        let document = kinds::document_of(kind, &payload);
        NewJob { document, ..NewJob::new(kind, queue, TenantId::new(TENANT).expect("a tenant"), payload) }
    }

    /// An `ingest` job, not yet accepted.
    pub fn ingest_job(&self, document: &str, text: &str) -> NewJob {
        self.job("ingest", json!({ "document": document, "text": text }))
    }

    /// Accepts jobs into the ledger, in order; the relay of a worker dispatches them.
    pub async fn accept(&self, jobs: Vec<NewJob>) -> Vec<JobId> {
        let mut ids = vec![];
        for page in jobs.chunks(PAGE) {
            for reply in self.postgres.accept(page, false).await.expect("the jobs are accepted") {
                match reply {
                    Accepted::New(id) => ids.push(id),
                    other => panic!("a job was not accepted: {other:?}"),
                }
            }
        }
        ids
    }

    /// A client as programs that enqueue use it: it accepts into the ledger and dispatches to Redis itself.
    pub fn client(&self) -> Client {
        Client::new(self.postgres.clone(), Some(self.queue.clone()), ClientSettings::default())
    }

    /// Enqueues jobs, in order, as a client does.
    pub async fn enqueue(&self, jobs: Vec<NewJob>) -> Vec<JobId> {
        let replies =
            self.client().enqueue_many(jobs, Durability::Durable).await.expect("the batch is accepted");
        replies.into_iter().map(|reply| reply.expect("a job is accepted").id).collect()
    }

    /// Enqueues a document's text.
    pub async fn ingest(&self, document: &str, text: &str) -> JobId {
        self.accept(vec![self.ingest_job(document, text)]).await[0]
    }

    /// Enqueues a document's deletion.
    pub async fn delete(&self, document: &str) -> JobId {
        self.accept(vec![self.job("delete", json!({ "document": document }))]).await[0]
    }

    /// Waits until all these jobs have ended; their states.
    pub async fn all_ended(&self, ids: &[JobId], within: Duration) -> BTreeMap<JobId, String> {
        let all: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        wait_until("all jobs have ended", within, async || {
            let states = self.postgres.job_states(&all).await.map_err(|e| e.to_string())?;
            let open: Vec<Uuid> = states
                .iter()
                .filter(|(_, state)| !ENDED.contains(&state.as_str()))
                .map(|(id, _)| *id)
                .collect();
            if states.len() == ids.len() && open.is_empty() {
                return Ok(states.into_iter().map(|(id, state)| (JobId(id), state)).collect());
            }
            let mut shown = format!("{} of {} jobs are open", open.len(), ids.len());
            for id in open.into_iter().take(5) {
                shown.push_str(&self.describe(JobId(id)).await);
            }
            Err(shown)
        })
        .await
    }

    /// Waits until all these jobs have ended, and fails unless each succeeded.
    pub async fn assert_all_succeeded(&self, ids: &[JobId]) {
        for (id, state) in self.all_ended(ids, LONG).await {
            assert_eq!(state, "succeeded", "{}", self.describe(id).await);
        }
    }

    /// Waits until a job has ended; its state.
    pub async fn ended(&self, id: JobId) -> String {
        self.all_ended(&[id], LONG).await.remove(&id).expect("the job")
    }

    /// Waits until the queue's Redis has let go of a job that has ended: the ledger knows first, and the ack follows.
    pub async fn let_go(&self, queue: &str, id: JobId) {
        let place = [(QueueName::new(queue).expect("a queue's name"), id)];
        wait_until("Redis has let go of the job", SHORT, async || {
            let missing = self.queue.missing(&place).await.map_err(|e| e.to_string())?;
            if missing == [id] { Ok(()) } else { Err(self.describe(id).await) }
        })
        .await;
    }

    /// Waits until the janitor has nothing left to remove of a subject's document: nothing sweeps any more what a zombie may
    /// still leave there. A worker must run.
    pub async fn swept(&self, subject: &Subject) {
        wait_until("the janitor has done with the document", SHORT, async || {
            let due: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM document_versions v JOIN documents d ON d.id = v.document_id
                 WHERE d.key = $1 AND v.sweep_after IS NOT NULL",
            )
            .bind(&subject.document)
            .fetch_one(self.postgres.pool())
            .await
            .map_err(|e| e.to_string())?;
            if due == 0 { Ok(()) } else { Err(format!("{due} versions to sweep")) }
        })
        .await;
    }

    /// A job and its runs, for a failed test's message.
    pub async fn describe(&self, id: JobId) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        match self.postgres.job(id, None).await {
            Ok(Some(job)) => writeln!(
                text,
                "\n{} {} of {:?}: {} {:?}, {} deliveries ({} lost), {} attempts, run at {}, worker {:?}, error {:?}",
                job.kind, id, job.document, job.state, job.outcome, job.deliveries, job.lost_deliveries, job.attempts,
                job.run_at, job.worker, job.last_error
            ),
            other => writeln!(text, "\n{id}: {other:?}"),
        }
        .expect("a string");
        for saga in self.postgres.sagas_of(id).await.unwrap_or_default() {
            writeln!(
                text,
                "  run {}: {} at step {}, error {:?}",
                saga.id, saga.state, saga.next_step, saga.error
            )
            .expect("a string");
            for step in self.postgres.steps(saga.id).await.unwrap_or_default() {
                writeln!(
                    text,
                    "    {} {} {}: {}, {} tries, {:?}",
                    step.fence, step.direction, step.step_name, step.state, step.attempts, step.error
                )
                .expect("a string");
            }
        }
        text
    }

    /// Reads what a subject's job is about while it runs; `None` if that is no document.
    pub fn reader_of(&self, subject: &Subject) -> Option<Reader> {
        let document = (subject.document.clone(), vec![subject.text_before(), subject.text()]);
        let goes = subject.kind == "delete";
        subject
            .needs_document()
            .then(|| Reader::start_with(self.stores.clone(), [document], goes, Duration::from_millis(20)))
    }

    /// Reads documents all the time; each has one of its texts whenever it is seen, and stays once it was seen.
    pub fn reader(&self, documents: impl IntoIterator<Item = (String, Vec<String>)>) -> Reader {
        Reader::start(self.stores.clone(), documents)
    }

    /// Waits until no work is under way and the janitor has swept, then audits all stores, without repair; fails the test
    /// on any disagreement. A worker must run, because the janitor runs in workers.
    pub async fn audit_clean(&self) -> Report {
        wait_until("no work is under way", LONG, async || {
            let (unfinished, sweeps, finishing): (i64, i64, i64) = sqlx::query_as(
                "SELECT (SELECT count(*) FROM jobs WHERE state IN ('waiting', 'running')),
                        (SELECT count(*) FROM document_versions WHERE sweep_after IS NOT NULL),
                        (SELECT count(*) FROM sagas WHERE state NOT IN ('completed', 'compensated'))",
            )
            .fetch_one(self.postgres.pool())
            .await
            .map_err(|e| e.to_string())?;
            if (unfinished, sweeps, finishing) == (0, 0, 0) {
                return Ok(());
            }
            Err(format!(
                "{unfinished} unfinished jobs, {sweeps} versions to sweep, {finishing} sagas not ended"
            ))
        })
        .await;
        // The ledger knows of an end first, and Redis by the ack that follows.
        let queues: Vec<String> = sqlx::query_scalar("SELECT DISTINCT queue FROM jobs")
            .fetch_all(self.postgres.pool())
            .await
            .expect("the queues");
        wait_until("Redis has no leases left", LONG, async || {
            for queue in &queues {
                let name = QueueName::new(queue.as_str()).expect("a queue's name");
                let stats = self.queue.stats(&name).await.map_err(|e| e.to_string())?;
                if stats.in_flight > 0 {
                    return Err(format!("{} leases in queue {queue}", stats.in_flight));
                }
            }
            Ok(())
        })
        .await;
        let settings = AuditSettings { repair: false, wait_for_janitor: SHORT, ..AuditSettings::default() };
        let auditor = Auditor::new(self.stores.clone(), Some(self.queue.clone()));
        let report = auditor.run(&settings).await.expect("the audit");
        assert!(report.is_clean(), "the stores disagree: {:#?}", report.findings);
        assert_eq!(
            (report.pending.unseen_points, report.pending.unseen_cache_entries),
            (0, 0),
            "{:?}",
            report.pending
        );
        assert!(report.queue_audited);
        report
    }

    /// Audits all stores, without repair, while others work, and fails the test on any disagreement about this subject's
    /// document and job, or about what belongs to nobody. What the janitor has yet to do is none.
    pub async fn audit_clean_of(&self, subject: &Subject, job: JobId) {
        let auditor = Auditor::new(self.stores.clone(), Some(self.queue.clone()));
        let report = wait_until("the stores can be audited", SHORT, async || {
            auditor.run(&AuditSettings::default()).await.map_err(|error| error.to_string())
        })
        .await;
        let ours = |finding: &&Finding| match (&finding.document, finding.job) {
            (None, None) => true,
            (document, of) => document.as_deref() == Some(&*subject.document) || of == Some(job.0),
        };
        let found: Vec<&Finding> = report.findings.iter().filter(ours).collect();
        assert!(found.is_empty(), "the stores disagree: {found:#?}{}", self.describe(job).await);
    }

    /// Ends the services, and proves that neither they nor a worker are left. Drop the workers first.
    pub fn end(self) {
        drop(self);
        let left = process::children();
        assert!(left.is_empty(), "processes are left: {left:?}");
    }
}
