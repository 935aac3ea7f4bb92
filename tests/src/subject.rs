//! One job of one kind on a document of its own, and what must hold when it has ended.

use std::{fmt::Write, time::Duration};

use chrono::{DateTime, Utc};
use queue::{JobId, QueueName};
use sagas::stores::postgres::parked::Handled;
use serde_json::json;
use uuid::Uuid;

use crate::{Fleet, LONG, TENANT, Way, text, wait_until};

/// The kinds that do nothing but leave rows in the table of effects; see `sagas::kinds::probe`.
pub const PROBES: [&str; 4] = ["probe", "nap", "revocable", "gather"];

/// What a job is tried on. Each has a document and a queue of its own, so that only chosen workers meet it.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The job's kind.
    pub kind: String,
    /// Its document, or its name if it has none.
    pub document: String,
    /// Where its job waits.
    pub queue: String,
    /// The job's hard cap on one run.
    pub timeout: Duration,
    /// The revision of its text. From 2 on, its document is there before with revision 1.
    pub revision: u32,
    /// The version that readers saw before, for kinds that need one.
    before: Option<Uuid>,
}

/// How a subject's job is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its effect is there, once.
    Done,
    /// It is a dead letter, and nothing of its effect is left.
    Dead,
    /// A person wanted its end, and nothing of its effect is left.
    Cancelled,
}

impl Outcome {
    /// The job's state then.
    pub const fn state(self) -> &'static str {
        match self {
            Self::Done => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Subject {
    /// A subject that is not there yet.
    pub fn new(kind: &str, name: &str, queue: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            document: name.to_owned(),
            queue: queue.to_owned(),
            timeout: Duration::from_secs(300),
            revision: 1,
            before: None,
        }
    }

    /// An `ingest` of a document that is there already.
    pub fn again(name: &str, queue: &str) -> Self {
        Self { revision: 2, ..Self::new("ingest", name, queue) }
    }

    /// The same, waiting in another queue.
    pub fn in_queue(&self, queue: &str) -> Self {
        Self { queue: queue.to_owned(), ..self.clone() }
    }

    /// Whether its document must be there before the job.
    pub fn needs_document(&self) -> bool {
        self.revision > 1 || !(self.kind == "ingest" || PROBES.contains(&self.kind.as_str()))
    }

    /// Its document's text once the job is done.
    pub fn text(&self) -> String {
        text(&self.document, self.revision)
    }

    /// Its document's text before the job.
    pub fn text_before(&self) -> String {
        text(&self.document, 1)
    }
}

impl Fleet {
    /// Ingests the documents of those subjects that need one, by a worker that is gone afterwards, and makes the table of
    /// effects.
    pub async fn seed(&self, subjects: &mut [Subject]) {
        sqlx::query(
            "CREATE TABLE IF NOT EXISTS effects (
                seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job uuid NOT NULL, step text NOT NULL, key text NOT NULL,
                fence bigint NOT NULL, change integer NOT NULL)",
        )
        .execute(self.postgres.pool())
        .await
        .expect("the table of effects");
        let worker = self.worker().concurrency(16).start();
        let wanted = subjects.iter().filter(|subject| subject.needs_document());
        let jobs = wanted.map(|subject| self.ingest_job(&subject.document, &subject.text_before())).collect();
        let ids = self.accept(jobs).await;
        self.assert_all_succeeded(&ids).await;
        for subject in subjects.iter_mut().filter(|subject| subject.needs_document()) {
            subject.before = self.version_of(subject).await;
        }
        // Where nobody needs a document it is asked to end as soon as it listens.
        worker.ready().await;
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }

    /// Enqueues the subject's job.
    pub async fn begin(&self, subject: &Subject) -> JobId {
        let payload = match subject.kind.as_str() {
            "ingest" => json!({ "document": subject.document, "text": subject.text() }),
            "embed" => json!({ "documents": [subject.document] }),
            kind if PROBES.contains(&kind) => json!({}),
            _ => json!({ "document": subject.document }),
        };
        let mut job = self.job(&subject.kind, payload);
        job.queue = QueueName::new(subject.queue.as_str()).expect("a queue's name");
        job.timeout = subject.timeout;
        self.accept(vec![job]).await[0]
    }

    async fn version_of(&self, subject: &Subject) -> Option<Uuid> {
        let version =
            self.postgres.current_version(TENANT, &subject.document).await.expect("the current version");
        version.map(|version| version.version)
    }

    /// Waits until the job is given back by a worker that doesn't know its kind.
    pub async fn given_back(&self, job: JobId) {
        wait_until("the job is given back", LONG, async || {
            let since: Option<DateTime<Utc>> =
                sqlx::query_scalar("SELECT unroutable_since FROM jobs WHERE id = $1")
                    .bind(job.0)
                    .fetch_one(self.postgres.pool())
                    .await
                    .map_err(|e| e.to_string())?;
            if since.is_some() { Ok(()) } else { Err(self.describe(job).await) }
        })
        .await;
    }

    /// Waits until the job is parked, and has its run go on, as a person does once the cause is mended.
    pub async fn retry_parked(&self, job: JobId) {
        assert_eq!(self.ended(job).await, "parked", "{}", self.describe(job).await);
        let runs = self.postgres.sagas_of(job).await.expect("the runs");
        let parked = runs.iter().find(|run| run.state == "parked").expect("a parked run");
        let retried = self.postgres.retry_parked(parked.id, "tester").await.expect("a retry");
        assert!(matches!(retried, Handled::Done(..)), "{retried:?}");
    }

    /// Waits for the end of a job that comes this way, with a person's help where it is stuck. Fails unless its effect is there
    /// exactly once, or not at all.
    pub async fn comes_to_its_end(&self, subject: &Subject, job: JobId, way: &Way) {
        if matches!(way, Way::Stuck(..)) {
            self.retry_parked(job).await;
        }
        self.assert_outcome(subject, job, way.outcome()).await;
    }

    /// Waits for the job's end and fails unless its effect is there exactly once, or not at all.
    pub async fn assert_outcome(&self, subject: &Subject, job: JobId, outcome: Outcome) {
        let state = self.ended(job).await;
        let story = self.describe(job).await;
        assert_eq!(state, outcome.state(), "{story}");
        let letters: i64 = self.count("SELECT count(*) FROM dead_letters WHERE job_id = $1", job.0).await;
        assert_eq!(letters, i64::from(outcome == Outcome::Dead), "dead letters of{story}");
        let open: i64 =
            self.count("SELECT count(*) FROM sagas WHERE job_id = $1 AND state NOT IN ('completed', 'compensated', 'finishing')", job.0).await;
        assert_eq!(open, 0, "open runs of{story}");
        let done: i64 = self
            .count(
                "SELECT count(*) FROM sagas WHERE job_id = $1 AND state IN ('completed', 'finishing')",
                job.0,
            )
            .await;
        assert_eq!(done, i64::from(outcome == Outcome::Done), "completed runs of{story}");
        match subject.kind.as_str() {
            kind if PROBES.contains(&kind) => {
                self.assert_effects(job, i64::from(outcome == Outcome::Done), &story).await;
            }
            "delete" => {
                assert_eq!(
                    self.stores.document(TENANT, &subject.document).await.expect("read"),
                    None,
                    "{story}"
                );
            }
            "embed" => {
                let children: Vec<Uuid> = self.ids("SELECT id FROM jobs WHERE parent = $1", job.0).await;
                assert_eq!(children.len(), 1, "jobs enqueued by{story}");
                assert_eq!(self.ended(JobId(children[0])).await, "succeeded");
                self.assert_version(subject, Outcome::Done, &story).await;
            }
            _ => self.assert_version(subject, outcome, &story).await,
        }
    }

    /// One new version is published in place of the one before; or none, and readers see what they saw before.
    async fn assert_version(&self, subject: &Subject, outcome: Outcome, story: &str) {
        let now = self.version_of(subject).await;
        if outcome == Outcome::Done {
            assert!(now.is_some() && now != subject.before, "no new version after{story}");
        } else {
            assert_eq!(now, subject.before, "readers see another version after{story}");
        }
        if now.is_some() {
            let shown =
                self.stores.document(TENANT, &subject.document).await.expect("read").expect("the document");
            let text = if outcome == Outcome::Done { subject.text() } else { subject.text_before() };
            assert_eq!(shown.text, text, "{story}");
        }
        let published: Vec<Uuid> = sqlx::query_scalar(
            "SELECT v.id FROM document_versions v JOIN documents d ON d.id = v.document_id WHERE d.key = $1 AND v.published_at IS NOT NULL",
        )
        .bind(&subject.document)
        .fetch_all(self.postgres.pool())
        .await
        .expect("the versions");
        let expected: Vec<Uuid> =
            now.into_iter().chain(subject.before.filter(|before| Some(*before) != now)).collect();
        assert!(
            published.iter().all(|version| expected.contains(version)),
            "published more than once:{story}"
        );
    }

    /// Counts effects in the table that is only ever added to: each step's sum is `net`, and was never anything but 0 or 1.
    async fn assert_effects(&self, job: JobId, net: i64, story: &str) {
        let rows: Vec<(String, String, i64, i32)> =
            sqlx::query_as("SELECT step, key, fence, change FROM effects WHERE job = $1 ORDER BY seq")
                .bind(job.0)
                .fetch_all(self.postgres.pool())
                .await
                .expect("the effects");
        let mut last_fence = 0;
        for step in ["first", "second", "third"] {
            let mut sum = 0;
            for (_, _, _, change) in rows.iter().filter(|row| row.0 == step) {
                sum += i64::from(*change);
                assert!((0..=1).contains(&sum), "effects of step {step} {rows:?} of{story}");
            }
            assert_eq!(sum, net, "net effects of step {step} {rows:?} of{story}");
        }
        for (_, _, fence, _) in &rows {
            assert!(*fence >= last_fence, "an older fence wrote after a newer one: {rows:?} of{story}");
            last_fence = *fence;
        }
    }

    /// All that the stores hold of a subject's job and of those that embed for it, as text, to be compared later.
    pub async fn snapshot(&self, subject: &Subject, job: JobId) -> String {
        let rows: Vec<String> = sqlx::query_scalar(
            "WITH job AS (SELECT * FROM jobs WHERE id = $1),
             ours AS (SELECT id AS job_id FROM jobs WHERE id = $1 OR parent = $1 AND kind = 'embed_version')
             SELECT 'job ' || to_jsonb(j)::text FROM jobs j JOIN ours ON job_id = j.id
             UNION ALL SELECT 'run ' || to_jsonb(s)::text FROM sagas s JOIN ours USING (job_id)
             UNION ALL SELECT 'step ' || to_jsonb(t)::text FROM saga_timeline t
                 JOIN sagas s ON s.id = t.saga_id JOIN ours USING (job_id)
             UNION ALL SELECT 'attempt ' || to_jsonb(a)::text FROM job_attempts a JOIN ours USING (job_id)
             UNION ALL SELECT 'dead letter ' || to_jsonb(l)::text FROM dead_letters l JOIN ours USING (job_id)
             UNION ALL SELECT 'document ' || to_jsonb(d)::text FROM documents d JOIN job j ON j.document_id = d.id
             UNION ALL SELECT 'version ' || to_jsonb(v)::text FROM document_versions v JOIN job j USING (document_id)
             UNION ALL SELECT 'chunk ' || to_jsonb(c)::text FROM chunks c
                 JOIN document_versions v ON v.id = c.version_id JOIN job j USING (document_id)
             UNION ALL SELECT 'effect ' || to_jsonb(e)::text FROM effects e WHERE job = $1
             ORDER BY 1",
        )
        .bind(job.0)
        .fetch_all(self.postgres.pool())
        .await
        .expect("the rows of a job");
        let mut shown = rows.join("\n");
        // Every version that any run of the job has made, whether the ledger still knows it or not.
        let versions: Vec<(Uuid, String)> = sqlx::query_as(
            "SELECT (data ->> 'version')::uuid, data ->> 'collection' FROM sagas
             WHERE job_id = $1 AND data ? 'version' AND data ? 'collection' ORDER BY 1",
        )
        .bind(job.0)
        .fetch_all(self.postgres.pool())
        .await
        .expect("the versions of a job");
        for version in versions.iter().map(|(version, collection)| (*version, collection.clone())).chain(
            subject.before.map(|before| (before, self.stores.collection(self.stores.embedder.model()))),
        ) {
            let mut points = self.stores.vectors.points(&version.1, version.0, 64).await.expect("the points");
            points.sort_by_key(|point| point.chunk);
            let entry = self.stores.cache.peek(version.0).await.expect("the cache entry");
            write!(shown, "\npoints {} {points:?}\ncached {entry:?}", version.0).expect("a string");
        }
        shown
    }

    async fn count(&self, sql: &'static str, id: Uuid) -> i64 {
        sqlx::query_scalar(sql).bind(id).fetch_one(self.postgres.pool()).await.expect("a count")
    }

    async fn ids(&self, sql: &'static str, id: Uuid) -> Vec<Uuid> {
        sqlx::query_scalar(sql).bind(id).fetch_all(self.postgres.pool()).await.expect("ids")
    }
}
