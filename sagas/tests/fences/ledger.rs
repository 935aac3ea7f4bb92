//! A private ledger, and a worker's calls on it without a worker.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use devstack::testing::TestServices;
use queue::{JobId, QueueName, TenantId, WorkerId};
use sagas::{
    coalescing::Batch,
    error::Class,
    kinds,
    stores::postgres::{
        Fence, Postgres, PostgresConfig,
        accept::{Accepted, NewJob},
        deletion::Doomed,
        ending::{Failure, GivenBack, Parking, Run, Verdict},
        publish::{Condition, Publish, PublishBatch, Published},
        stage::{NewSaga, NewVersion, Stage, StageBatch},
        take::{Take, TakeBatch, TakeItem, TakenJob},
    },
};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use uuid::Uuid;

pub const TENANT: &str = "acme";
pub const HOUR: Duration = Duration::from_secs(3600);

/// A migrated Postgres of this test's own.
pub struct Ledger {
    pub postgres: Postgres,
    pub services: TestServices,
}

impl Ledger {
    pub async fn start() -> Self {
        Self::over(TestServices::builder().postgres().start().await.unwrap()).await
    }

    pub async fn over(services: TestServices) -> Self {
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant(TENANT).await.unwrap();
        Self { postgres, services }
    }

    /// Accepts jobs in one transaction, as if dispatched.
    pub async fn accept(&self, jobs: &[NewJob]) -> Vec<JobId> {
        let replies = self.postgres.accept(jobs, true).await.unwrap();
        replies
            .into_iter()
            .map(|reply| match reply {
                Accepted::New(id) => id,
                other => panic!("not accepted: {other:?}"),
            })
            .collect()
    }

    pub async fn ingest(&self, document: &str) -> JobId {
        self.accept(&[ingest(document)]).await[0]
    }

    /// What a worker gets for each of these jobs, in their order.
    pub async fn takes(&self, worker: &str, ids: &[JobId]) -> Vec<Take> {
        let batch = TakeBatch::new(self.postgres.clone(), WorkerId::new(worker));
        let items: Vec<TakeItem> = ids.iter().map(|id| TakeItem { id: *id, fast: None }).collect();
        batch.flush(&items).await.unwrap()
    }

    /// Takes a job that can be taken.
    pub async fn take(&self, worker: &str, id: JobId) -> TakenJob {
        match self.takes(worker, &[id]).await.remove(0) {
            Take::Taken(job) => *job,
            other => panic!("not taken: {other:?}"),
        }
    }

    /// Gives a taken job back.
    pub async fn give_back(&self, job: &TakenJob, delay: Duration, why: GivenBack) {
        let released = self.postgres.release(&run_of(job, None), delay, why).await.unwrap();
        assert_eq!(released, Some(delay));
    }

    /// Stages a version for a taken job, as a run's first step does.
    pub async fn staged(&self, job: &TakenJob) -> Arc<Stage> {
        let stage = Arc::new(stage_of(job));
        assert_eq!(StageBatch(self.postgres.clone()).flush(&[Arc::clone(&stage)]).await.unwrap(), [true]);
        stage
    }

    pub async fn publish(&self, items: &[Publish]) -> Vec<Published> {
        let items: Vec<_> = items.iter().cloned().map(Arc::new).collect();
        PublishBatch(self.postgres.clone()).flush(&items).await.unwrap()
    }

    /// Takes, stages and publishes; the published version.
    pub async fn ingested(&self, document: &str) -> Uuid {
        let job = self.take("w", self.ingest(document).await).await;
        let stage = self.staged(&job).await;
        assert_eq!(self.publish(&[publish_of(&job, &stage)]).await, [Published::Yes]);
        stage.version.id
    }

    /// Takes a delete and buries its document.
    pub async fn bury(&self, job: &TakenJob, saga: Uuid) -> (Published, Vec<Doomed>) {
        self.postgres
            .bury(&saga_of(job, saga), job.document_id.unwrap(), job.doc_order.unwrap(), HOUR)
            .await
            .unwrap()
    }

    pub async fn delete(&self, document: &str) -> JobId {
        self.accept(&[delete(document)]).await[0]
    }

    /// State and outcome of a job.
    pub async fn state(&self, id: JobId) -> (String, Option<String>) {
        let job = self.postgres.job(id, None).await.unwrap().expect("the job");
        (job.state.to_string(), job.outcome)
    }

    pub async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(self.postgres.pool()).await.unwrap()
    }

    /// Every row of every table.
    pub async fn snapshot(&self) -> BTreeMap<String, Vec<String>> {
        let tables: Vec<String> = sqlx::query_scalar(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'flotilla'::regnamespace AND relkind IN ('r', 'p')
               AND NOT relispartition",
        )
        .fetch_all(self.postgres.pool())
        .await
        .unwrap();
        assert!(tables.len() > 10, "not the tables expected: {tables:?}");
        let mut all = BTreeMap::new();
        for table in tables {
            let sql = format!("SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1");
            let rows = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(self.postgres.pool()).await.unwrap();
            all.insert(table, rows);
        }
        all
    }
}

pub fn job(kind: &str, payload: Value) -> NewJob {
    let queue = QueueName::new(kinds::default_queue(kind)).unwrap();
    let document = kinds::document_of(kind, &payload);
    NewJob { document, ..NewJob::new(kind, queue, TenantId::new(TENANT).unwrap(), payload) }
}

pub fn ingest(document: &str) -> NewJob {
    job("ingest", json!({ "document": document, "text": "some text" }))
}

pub fn delete(document: &str) -> NewJob {
    job("delete", json!({ "document": document }))
}

pub fn saga_of(job: &TakenJob, id: Uuid) -> NewSaga {
    NewSaga {
        id,
        job_id: job.id,
        fence: job.fence,
        kind: job.kind.clone(),
        definition_version: 1,
        tenant: job.tenant.clone(),
        next_step: 1,
        data: json!({}),
    }
}

/// A stage with a run and a version of its own.
pub fn stage_of(job: &TakenJob) -> Stage {
    Stage {
        saga: saga_of(job, Uuid::now_v7()),
        version: NewVersion {
            id: Uuid::now_v7(),
            document_id: job.document_id.unwrap(),
            doc_order: job.doc_order.unwrap(),
            title: None,
            body: "some text".to_owned(),
            metadata: json!({}),
            content_hash: vec![1; 32],
            model: "hash".to_owned(),
            dimensions: 3,
            collection: "c".to_owned(),
            chunks: vec!["some".to_owned(), "text".to_owned()],
        },
    }
}

pub fn publish_of(job: &TakenJob, stage: &Stage) -> Publish {
    Publish {
        job_id: job.id,
        fence: job.fence,
        saga_id: stage.saga.id,
        version: stage.version.id,
        document_id: stage.version.document_id,
        condition: Condition::Order(stage.version.doc_order),
        vectors_hash: vec![2; 32],
        result: json!({}),
        steps: vec![],
        next_step: 4,
        grace: HOUR,
    }
}

pub fn run_of(job: &TakenJob, saga_id: Option<Uuid>) -> Run {
    Run {
        job_id: job.id,
        fence: job.fence,
        saga_id,
        worker: WorkerId::new("w"),
        started_at: chrono::Utc::now(),
    }
}

pub fn failure() -> Failure {
    Failure { class: Class::Permanent, code: "test".to_owned(), error: "a test's".to_owned(), chain: vec![] }
}

pub fn retry(retry_in: Duration) -> Verdict {
    Verdict::Retry { failure: failure(), retry_in_ms: u64::try_from(retry_in.as_millis()).unwrap() }
}

/// How a run past its pivot is parked that keeps the log as it is.
pub fn parking<'a>(verdict: Option<&'a Verdict>, error: &'a str) -> Parking<'a> {
    Parking { verdict, error, past_pivot: true, progress: None }
}

/// The next fence after one.
pub fn after(fence: Fence) -> Fence {
    Fence(fence.0 + 1)
}
