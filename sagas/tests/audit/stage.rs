//! The services of one test, and documents published through the real store functions, as a worker does it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use devstack::testing::TestServices;
use embedding::{Embedder, hashing::HashingEmbedder};
use queue::{JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    audit::{AuditSettings, Auditor, FindingKind, Report},
    chunking::{self, Chunking},
    coalescing::Batch,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig, Entry},
        postgres::{
            Postgres, PostgresConfig,
            accept::NewJob,
            publish::{Condition, Publish, PublishBatch, Published},
            stage::{NewSaga, NewVersion, Stage as Staging, StageBatch},
            take::{Take, TakeBatch, TakeItem, TakenJob},
        },
        vectors::{Point, Vectors, VectorsConfig, vectors_hash},
    },
};
use serde_json::json;
use sha2::{Digest, Sha256};
use uuid::Uuid;

pub const TENANT: &str = "acme";
pub const COLLECTION: &str = "flotilla-feature-hash-384";
/// Four chunks with the stage's limits.
pub const TEXT: &str = "The first sentence speaks of harbours and ships. The second one is about wind and sails. \
    The third one lists lighthouses on rocky coasts. The fourth one ends the story in a quiet bay.";

pub struct Stage {
    pub services: TestServices,
    pub stores: Stores,
    pub queue: Queue,
}

/// A version as its saga left it.
#[derive(Clone)]
pub struct Doc {
    pub job: JobId,
    pub saga: Uuid,
    pub document: Uuid,
    pub version: Uuid,
    pub ledger: Uuid,
    pub vectors: Vec<Vec<f32>>,
}

impl Doc {
    pub fn point(&self, no: usize) -> Point {
        Point {
            version: self.version,
            chunk: no as i32,
            document_id: self.document,
            tenant: TENANT.to_owned(),
            ledger: self.ledger,
            vector: self.vectors[no].clone(),
        }
    }
}

pub fn ingest_queue() -> QueueName {
    QueueName::new("ingest").unwrap()
}

pub fn worker() -> WorkerId {
    WorkerId::new("test:1")
}

impl Stage {
    pub async fn new() -> Self {
        Self::with(|_| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut DocumentSettings)) -> Self {
        let services = TestServices::start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant(TENANT).await.unwrap();
        let call_timeout = Duration::from_secs(5);
        let vectors = Vectors::lazy(&VectorsConfig {
            url: services.vectors().url().to_owned(),
            api_key: None,
            call_timeout,
        })
        .unwrap();
        let url = services.redis_cache().url().to_owned();
        let cache = Cache::lazy(&CacheConfig { url, call_timeout, ..CacheConfig::default() }).unwrap();
        let chunking = Chunking { max_chars: 60, overlap_chars: 0, max_chunks: 64 };
        let mut settings = DocumentSettings { chunking, ..DocumentSettings::default() };
        change(&mut settings);
        let stores =
            Stores::new(postgres, vectors, cache, Arc::new(HashingEmbedder::new()), vec![], settings);
        let url = services.redis_queue().url().to_owned();
        let queue = Queue::connect(QueueConfig { url, ..QueueConfig::default() }).await.unwrap();
        Self { services, stores, queue }
    }

    /// Accepts an `ingest` job and puts it into Redis.
    pub async fn accept(&self, key: &str) -> JobId {
        let job = self.accept_only(key).await;
        let envelope = self.stores.postgres.envelope(job).await.unwrap().unwrap();
        self.queue.push(&[envelope]).await.unwrap();
        job
    }

    /// Accepts an `ingest` job as dispatched, without putting it into Redis.
    pub async fn accept_only(&self, key: &str) -> JobId {
        let tenant = TenantId::new(TENANT).unwrap();
        let payload = json!({ "document": key, "text": TEXT });
        let job = NewJob {
            document: Some(key.to_owned()),
            ..NewJob::new("ingest", ingest_queue(), tenant, payload)
        };
        self.stores.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        job.id
    }

    /// Claims one job from Redis and takes it.
    pub async fn take(&self) -> (queue::Claim, TakenJob) {
        let claim =
            self.queue.claim(&ingest_queue(), &worker(), 1).await.unwrap().pop().expect("a job waits");
        let batch = TakeBatch::new(self.stores.postgres.clone(), worker());
        let item = TakeItem { id: claim.envelope.id, fast: None };
        match batch.flush(&[item]).await.unwrap().pop().unwrap() {
            Take::Taken(job) => (claim, *job),
            other => panic!("not taken: {other:?}"),
        }
    }

    /// A document, published and acked.
    pub async fn ingest(&self, key: &str, text: &str) -> Doc {
        self.accept(key).await;
        let (claim, job) = self.take().await;
        let doc = self.publish(&job, text, None).await;
        self.queue.ack(&[claim.lease_ref()]).await.unwrap();
        doc
    }

    pub async fn stage(&self, job: &TakenJob, text: &str) -> Doc {
        let chunks = chunking::split(text, self.stores.settings.chunking);
        let vectors = HashingEmbedder::new().embed(chunks.clone()).await.unwrap();
        let doc = Doc {
            job: job.id,
            saga: Uuid::now_v7(),
            document: job.document_id.unwrap(),
            version: Uuid::now_v7(),
            ledger: self.stores.ledger().await.unwrap(),
            vectors,
        };
        let stage = Staging {
            saga: NewSaga {
                id: doc.saga,
                job_id: job.id,
                fence: job.fence,
                kind: "ingest".to_owned(),
                definition_version: 1,
                tenant: TENANT.to_owned(),
                next_step: 1,
                data: json!({}),
            },
            version: NewVersion {
                id: doc.version,
                document_id: doc.document,
                doc_order: job.doc_order.unwrap(),
                title: None,
                body: text.to_owned(),
                metadata: json!({}),
                content_hash: Sha256::digest(text.as_bytes()).to_vec(),
                model: "feature-hash-384".to_owned(),
                dimensions: 384,
                collection: COLLECTION.to_owned(),
                chunks,
            },
        };
        assert_eq!(StageBatch(self.stores.postgres.clone()).flush(&[Arc::new(stage)]).await.unwrap(), [true]);
        doc
    }

    /// Publishes a taken job's document; with `vectors` as if the caller had given them.
    pub async fn publish(&self, job: &TakenJob, text: &str, vectors: Option<Vec<Vec<f32>>>) -> Doc {
        let mut doc = self.stage(job, text).await;
        if let Some(vectors) = vectors {
            doc.vectors = vectors;
        }
        self.insert_all((0..doc.vectors.len()).map(|no| doc.point(no)).collect()).await;
        let content_hash = format!("{:x}", Sha256::digest(text.as_bytes()));
        let entry = Entry { body: text.to_owned(), content_hash, tenant: TENANT.to_owned() };
        self.stores.cache.put(doc.version, &entry).await.unwrap();
        let publish = Publish {
            job_id: doc.job,
            fence: job.fence,
            saga_id: doc.saga,
            version: doc.version,
            document_id: doc.document,
            condition: Condition::Order(job.doc_order.unwrap()),
            vectors_hash: vectors_hash(doc.vectors.iter().map(Vec::as_slice)),
            result: json!({ "document_id": doc.document, "version": doc.version, "chunks": doc.vectors.len() }),
            steps: vec![],
            next_step: 4,
            grace: self.stores.settings.grace,
        };
        let answer = PublishBatch(self.stores.postgres.clone()).flush(&[Arc::new(publish)]).await.unwrap();
        assert_eq!(answer, [Published::Yes]);
        doc
    }

    pub async fn insert(&self, point: Point) {
        self.insert_all(vec![point]).await;
    }

    async fn insert_all(&self, points: Vec<Point>) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        self.stores.vectors.insert(COLLECTION, 384, points, deadline).await.unwrap();
    }

    /// Changes rows as nothing of ours would: past what the database lets become of jobs and runs.
    pub async fn sql(&self, statement: &'static str, id: Uuid) {
        let mut tx = self.stores.postgres.begin().await.unwrap();
        let triggers = |what: &str| {
            sqlx::AssertSqlSafe(format!(
                "ALTER TABLE jobs {what} TRIGGER jobs_transitions; ALTER TABLE sagas {what} TRIGGER sagas_transitions"
            ))
        };
        sqlx::raw_sql(triggers("DISABLE")).execute(&mut *tx).await.unwrap();
        let done = sqlx::query(statement).bind(id).execute(&mut *tx).await.unwrap();
        assert!(done.rows_affected() > 0, "{statement} changed nothing");
        sqlx::raw_sql(triggers("ENABLE")).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    }

    pub fn qdrant(&self) -> qdrant_client::Qdrant {
        qdrant_client::Qdrant::from_url(self.services.vectors().url())
            .skip_compatibility_check()
            .build()
            .unwrap()
    }

    pub fn auditor(&self) -> Auditor {
        Auditor::new(self.stores.clone(), Some(self.queue.clone()))
    }

    pub async fn audit(&self) -> Report {
        self.auditor().run(&settings()).await.unwrap()
    }

    pub async fn repair(&self) -> Report {
        self.auditor().run(&AuditSettings { repair: true, ..settings() }).await.unwrap()
    }

    /// The audit names `kind` and nothing else.
    #[track_caller]
    pub fn names(&self, kind: FindingKind) -> impl Future<Output = Report> {
        let auditor = self.auditor();
        let at = std::panic::Location::caller();
        async move {
            let report = auditor.run(&settings()).await.unwrap();
            let kinds: BTreeSet<FindingKind> = report.by_kind.keys().copied().collect();
            assert_eq!(kinds, BTreeSet::from([kind]), "{at}: {:#?}", report.findings);
            report
        }
    }

    /// The audit names `kind` and nothing else, a repair mends it, and the next audit is clean.
    #[track_caller]
    pub fn names_and_mends(&self, kind: FindingKind) -> impl Future<Output = ()> {
        let named = self.names(kind);
        let at = std::panic::Location::caller();
        async move {
            let report = named.await;
            assert!(report.findings.iter().all(|finding| finding.repairable), "{at}: {:#?}", report.findings);
            let report = self.repair().await;
            assert_eq!(report.unrepaired(), 0, "{at}: {:#?}", report.findings);
            assert!(report.repaired > 0 && !report.is_clean(), "{at}");
            self.clean_at(at).await;
        }
    }

    #[track_caller]
    pub fn clean(&self) -> impl Future<Output = Report> {
        self.clean_at(std::panic::Location::caller())
    }

    async fn clean_at(&self, at: &std::panic::Location<'_>) -> Report {
        let report = self.audit().await;
        assert!(report.is_clean(), "{at}: {:#?}", report.findings);
        report
    }
}

pub fn settings() -> AuditSettings {
    AuditSettings {
        confirm_after: Duration::from_millis(50),
        actor: "test".to_owned(),
        ..AuditSettings::default()
    }
}
