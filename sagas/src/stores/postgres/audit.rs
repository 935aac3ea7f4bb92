//! What the auditor reads, and the few things it mends. Reads are paged by key; those that must agree with each other
//! are made in one snapshot.

use std::{collections::HashMap, time::Duration};

use queue::JobId;
use sqlx::FromRow;
use uuid::Uuid;

use super::Postgres;
use crate::{
    audit::{Counts, FindingKind, ParkedSaga, Pending},
    error::StoreError,
};

/// A document's row.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct DocumentRow {
    pub id: Uuid,
    pub tenant: String,
    pub key: String,
    pub current_version: Option<Uuid>,
    pub current_order: i64,
    pub last_order: i64,
    pub deleted_order: Option<i64>,
}

/// A version's row, with what the server has computed over its text and chunks.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct VersionRow {
    pub id: Uuid,
    pub document_id: Uuid,
    pub tenant: String,
    pub doc_order: i64,
    pub state: String,
    pub model: String,
    pub dimensions: i32,
    pub collection: String,
    pub chunk_count: i32,
    pub vectors_hash: Option<Vec<u8>>,
    pub content_hash: Vec<u8>,
    pub sweeps: i16,
    /// How long its sweep has been due, in seconds, also if it was put off; negative: it is not due yet.
    pub sweep_due_s: Option<f64>,
    /// Whether the text is there.
    pub has_body: bool,
    /// Whether the text, where there is one, has the hash recorded with it.
    pub body_ok: bool,
    /// Chunk rows.
    pub chunk_rows: i64,
    /// Of those, rows with a number beyond the version's count.
    pub chunks_beyond: i64,
    /// Chunks whose text is not part of the version's text; `None`: too much text to look at in the server.
    pub chunks_strange: Option<i64>,
    /// State of the saga that made it.
    pub saga_state: Option<String>,
}

/// What the janitor has left to do.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct SweepsLeft {
    /// Versions to be swept, once or for the last time.
    sweeps: i64,
    /// Sagas that wait for a sweep.
    finishing: i64,
    /// Versions whose sweep should have been made by now.
    pub overdue: i64,
    /// When the next sweep is due, in seconds; negative: it is due already.
    next_in_s: Option<f64>,
}

impl SweepsLeft {
    /// Whether the janitor has nothing to do within this time.
    pub fn rests_for(&self, time: Duration) -> bool {
        let next = self.next_in_s.is_some_and(|next| next > time.as_secs_f64());
        self.sweeps == 0 && self.finishing == 0 || next
    }
}

/// What the audit of points and cache entries needs to know of a version.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct VersionState {
    pub id: Uuid,
    pub document: String,
    pub tenant: String,
    pub state: String,
    pub collection: String,
    pub chunk_count: i32,
    /// SHA-256 of the text, hex.
    pub content_hash: String,
}

/// An unfinished job.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct OpenJob {
    pub id: Uuid,
    pub queue: String,
    pub tenant: String,
    pub document: Option<String>,
    pub state: String,
    pub fence: i64,
    pub worker: Option<String>,
    pub dispatched: bool,
    /// Seconds since it was taken, if it runs, or dispatched, if it waits.
    pub age_s: f64,
}

/// What the ledger says of a job that has a lease.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct JobEnd {
    pub id: Uuid,
    pub tenant: String,
    pub state: String,
    /// Seconds since it ended; absent while it has not.
    pub ended_s: Option<f64>,
}

/// A disagreement between ledger, saga log and documents, found by one statement.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct LogRow {
    pub id: Uuid,
    pub job: Option<Uuid>,
    pub tenant: String,
    pub document: Option<String>,
    pub detail: String,
}

/// Statements that find disagreements inside Postgres: each takes the id after which to go on and how many to return.
pub(crate) const LOG_CHECKS: &[(FindingKind, &str)] = &[
    (
        FindingKind::SagaOpenAfterJob,
        "SELECT s.id, s.job_id AS job, s.tenant, d.key AS document,
                'the saga is ' || s.state || ' and its job is ' || j.state AS detail
         FROM sagas s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE s.id > $1 AND s.state IN ('running', 'compensating') AND j.state NOT IN ('waiting', 'running')
         ORDER BY s.id LIMIT $2",
    ),
    (
        FindingKind::SagaDoneJobOpen,
        "SELECT s.id, s.job_id AS job, s.tenant, d.key AS document,
                'the saga is ' || s.state || ' and its job is ' || j.state AS detail
         FROM sagas s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE s.id > $1 AND s.state IN ('completed', 'finishing') AND j.state <> 'succeeded'
         ORDER BY s.id LIMIT $2",
    ),
    (
        FindingKind::FinishingStuck,
        "SELECT s.id, s.job_id AS job, s.tenant, d.key AS document,
                'the saga is finishing and no version that it replaced waits for a sweep' AS detail
         FROM sagas s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE s.id > $1 AND s.state = 'finishing'
           AND NOT EXISTS (SELECT FROM document_versions v WHERE v.retired_by = s.id AND v.sweep_after IS NOT NULL)
         ORDER BY s.id LIMIT $2",
    ),
    (
        // Waiting for a time, or for a worker that has just taken it, is no standstill.
        FindingKind::SagaStuck,
        "SELECT s.id, s.job_id AS job, s.tenant, d.key AS document,
                'the saga is ' || s.state || ', its job ' || j.state || ', and neither has moved since '
                    || greatest(s.updated_at, j.taken_at, j.run_at)::timestamptz(0) AS detail
         FROM saga_runs s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE s.id > $1 AND s.state IN ('running', 'compensating') AND j.state IN ('waiting', 'running')
           AND greatest(s.updated_at, j.taken_at, j.run_at) < now() - interval '1 hour' - make_interval(secs => j.timeout_ms / 1000.0)
         ORDER BY s.id LIMIT $2",
    ),
    (
        FindingKind::ParkedDisagrees,
        "SELECT s.id, s.job_id AS job, s.tenant, d.key AS document,
                'the saga is parked and its job is ' || j.state AS detail
         FROM sagas s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE s.id > $1 AND s.state = 'parked' AND j.state <> 'parked'
         ORDER BY s.id LIMIT $2",
    ),
    (
        FindingKind::DeadWithoutLetter,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document, 'the job is dead and has no dead letter' AS detail
         FROM jobs j LEFT JOIN documents d ON d.id = j.document_id
         WHERE j.id > $1 AND j.state = 'dead' AND NOT EXISTS (SELECT FROM dead_letters l WHERE l.job_id = j.id)
         ORDER BY j.id LIMIT $2",
    ),
    (
        FindingKind::LetterWithoutDeath,
        "SELECT l.id, l.job_id AS job, l.tenant, d.key AS document,
                'there is a dead letter and its job is ' || j.state AS detail
         FROM dead_letters l JOIN jobs j ON j.id = l.job_id LEFT JOIN documents d ON d.id = j.document_id
         WHERE l.id > $1 AND j.state <> 'dead'
         ORDER BY l.id LIMIT $2",
    ),
    (
        FindingKind::SucceededWithoutSaga,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document,
                'the job has succeeded and no saga of it has passed its pivot' AS detail
         FROM jobs j LEFT JOIN documents d ON d.id = j.document_id
         WHERE j.id > $1 AND j.state = 'succeeded' AND j.outcome IS NULL AND j.kind IN ('ingest', 'embed_document', 'delete')
           AND NOT EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id AND s.state IN ('completed', 'finishing'))
         ORDER BY j.id LIMIT $2",
    ),
    // A job's effect may be gone only because a later one, in the document's order, took its place.
    (
        FindingKind::EffectMissing,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document,
                'the job with order number ' || j.doc_order || ' has published version '
                    || coalesce(j.result ->> 'version', '(unnamed)') || ', which is '
                    || coalesce(v.state, 'not there') || '; the document stands at ' || d.current_order AS detail
         FROM jobs j JOIN documents d ON d.id = j.document_id
         LEFT JOIN document_versions v ON v.document_id = d.id AND v.id::text = j.result ->> 'version'
         WHERE j.id > $1 AND j.state = 'succeeded' AND j.outcome IS NULL AND j.kind = 'ingest'
           AND (d.current_order < j.doc_order OR v.state IN ('staged', 'abandoned')
                OR (d.current_order = j.doc_order AND d.current_version IS NULL AND v.state IS DISTINCT FROM 'published'
                    AND (d.deleted_order IS NULL OR d.deleted_order < j.doc_order)))
         ORDER BY j.id LIMIT $2",
    ),
    (
        FindingKind::EffectMissing,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document,
                'the delete with order number ' || j.doc_order || ' has succeeded and the document''s tombstone is '
                    || coalesce(d.deleted_order::text, 'not there') AS detail
         FROM jobs j JOIN documents d ON d.id = j.document_id
         WHERE j.id > $1 AND j.state = 'succeeded' AND j.outcome IS NULL AND j.kind = 'delete'
           AND (d.deleted_order IS NULL OR d.deleted_order < j.doc_order)
         ORDER BY j.id LIMIT $2",
    ),
    (
        FindingKind::RowWrongTenant,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document,
                'the job is of tenant ' || j.tenant || ' and its document of ' || d.tenant AS detail
         FROM jobs j JOIN documents d ON d.id = j.document_id
         WHERE j.id > $1 AND j.tenant <> d.tenant ORDER BY j.id LIMIT $2",
    ),
    (
        FindingKind::RowWrongTenant,
        "SELECT s.id, s.job_id AS job, s.tenant, NULL AS document,
                'the saga is of tenant ' || s.tenant || ' and its job of ' || j.tenant AS detail
         FROM sagas s JOIN jobs j ON j.id = s.job_id
         WHERE s.id > $1 AND s.tenant <> j.tenant ORDER BY s.id LIMIT $2",
    ),
    (
        FindingKind::OrderDisagrees,
        "SELECT j.id, j.id AS job, j.tenant, d.key AS document,
                'the job has order number ' || j.doc_order || ' and the last one given out is ' || d.last_order AS detail
         FROM jobs j JOIN documents d ON d.id = j.document_id
         WHERE j.id > $1 AND j.doc_order > d.last_order ORDER BY j.id LIMIT $2",
    ),
];

/// Bytes of text to search for a version's chunks in the server; above it the auditor reads the text itself, because the
/// server unpacks the text once for each chunk.
const SEARCH_IN_SERVER: i64 = 16 << 20;

impl Postgres {
    /// A page of all documents after `after`.
    pub(crate) async fn audit_document_ids(&self, after: Uuid, limit: i64) -> Result<Vec<Uuid>, StoreError> {
        Ok(sqlx::query_scalar("SELECT id FROM documents WHERE id > $1 ORDER BY id LIMIT $2")
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// These documents and all their versions, in one snapshot.
    pub(crate) async fn audit_documents(
        &self,
        ids: &[Uuid],
    ) -> Result<(Vec<DocumentRow>, Vec<VersionRow>), StoreError> {
        let mut tx = self.snapshot().await?;
        let documents = sqlx::query_as(
            "SELECT id, tenant, key, current_version, current_order, last_order, deleted_order
             FROM documents WHERE id = ANY($1) ORDER BY id",
        )
        .bind(ids)
        .fetch_all(&mut *tx)
        .await?;
        let versions = sqlx::query_as(
            "SELECT v.id, v.document_id, v.tenant, v.doc_order, v.state, v.model, v.dimensions, v.collection, v.chunk_count,
                    v.vectors_hash, v.content_hash, v.sweeps,
                    extract(epoch FROM now() - coalesce(v.sweep_missed, v.sweep_after))::float8 AS sweep_due_s,
                    v.body IS NOT NULL AS has_body,
                    v.body IS NULL OR sha256(convert_to(v.body, 'UTF8')) = v.content_hash AS body_ok,
                    c.chunk_rows, c.chunks_beyond, c.chunks_strange, s.state AS saga_state
             FROM document_versions v LEFT JOIN sagas s ON s.id = v.saga_id
             CROSS JOIN LATERAL (
                 SELECT count(*) AS chunk_rows, count(*) FILTER (WHERE c.no >= v.chunk_count) AS chunks_beyond,
                        CASE WHEN octet_length(v.body)::bigint * v.chunk_count <= $2
                             THEN count(*) FILTER (WHERE strpos(v.body, c.body) = 0) END AS chunks_strange
                 FROM chunks c WHERE c.version_id = v.id) c
             WHERE v.document_id = ANY($1) ORDER BY v.document_id, v.id",
        )
        .bind(ids)
        .bind(SEARCH_IN_SERVER)
        .fetch_all(&mut *tx)
        .await?;
        Ok((documents, versions))
    }

    /// Those of these versions that exist.
    pub(crate) async fn audit_versions(
        &self,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, VersionState>, StoreError> {
        let rows: Vec<VersionState> = sqlx::query_as(
            "SELECT v.id, d.key AS document, v.tenant, v.state, v.collection, v.chunk_count,
                    encode(v.content_hash, 'hex') AS content_hash
             FROM document_versions v JOIN documents d ON d.id = v.document_id WHERE v.id = ANY($1)",
        )
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (row.id, row)).collect())
    }

    /// The collections that versions name.
    pub(crate) async fn audit_collections(&self) -> Result<Vec<String>, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_scalar("SELECT DISTINCT collection FROM document_versions")
            .fetch_all(&mut *tx)
            .await?)
    }

    /// The queues that jobs name.
    pub(crate) async fn audit_queues(&self) -> Result<Vec<String>, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_scalar("SELECT DISTINCT queue FROM jobs").fetch_all(&mut *tx).await?)
    }

    /// A page of unfinished jobs after `after`; or, with `only`, those of these jobs that are unfinished.
    pub(crate) async fn audit_open_jobs(
        &self,
        after: Uuid,
        limit: i64,
        only: Option<&[Uuid]>,
    ) -> Result<Vec<OpenJob>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT j.id, j.queue, j.tenant, d.key AS document, j.state, j.fence, j.worker,
                    j.dispatched_at IS NOT NULL AS dispatched,
                    extract(epoch FROM now() - coalesce(CASE WHEN j.state = 'running' THEN j.taken_at END,
                                                        j.dispatched_at, j.created_at))::float8 AS age_s
             FROM jobs j LEFT JOIN documents d ON d.id = j.document_id
             WHERE j.id > $1 AND j.state IN ('waiting', 'running') AND ($3::uuid[] IS NULL OR j.id = ANY($3))
             ORDER BY j.id LIMIT $2",
        )
        .bind(after)
        .bind(limit)
        .bind(only)
        .fetch_all(&self.pool)
        .await?)
    }

    /// What the ledger says of these jobs; those it doesn't know are absent.
    pub(crate) async fn audit_job_ends(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, JobEnd>, StoreError> {
        let rows: Vec<JobEnd> = sqlx::query_as(
            "SELECT id, tenant, state, extract(epoch FROM now() - finished_at)::float8 AS ended_s FROM jobs WHERE id = ANY($1)",
        )
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (row.id, row)).collect())
    }

    /// A page of one of [`LOG_CHECKS`].
    pub(crate) async fn audit_log_check(
        &self,
        sql: &'static str,
        after: Uuid,
        limit: i64,
    ) -> Result<Vec<LogRow>, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_as(sql).bind(after).bind(limit).fetch_all(&mut *tx).await?)
    }

    /// Work under way: what the janitor, the relay and the workers still have to do, and what waits for a person.
    pub async fn audit_pending(&self) -> Result<Pending, StoreError> {
        let mut tx = self.snapshot().await?;
        let (sweeps, finishing, undispatched, unfinished, parked) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM document_versions WHERE sweep_after IS NOT NULL),
                    (SELECT count(*) FROM sagas WHERE state = 'finishing'),
                    (SELECT count(*) FROM jobs WHERE dispatched_at IS NULL AND state = 'waiting'),
                    (SELECT count(*) FROM jobs WHERE state IN ('waiting', 'running')),
                    (SELECT count(*) FROM sagas WHERE state = 'parked')",
        )
        .fetch_one(&mut *tx)
        .await?;
        let parked_sagas: Vec<ParkedSaga> = sqlx::query_as(
            "SELECT s.id AS saga, s.job_id AS job, s.tenant, d.key AS document, s.error
             FROM sagas s JOIN jobs j ON j.id = s.job_id LEFT JOIN documents d ON d.id = j.document_id
             WHERE s.state = 'parked' ORDER BY s.id LIMIT 100",
        )
        .fetch_all(&mut *tx)
        .await?;
        Ok(Pending {
            sweeps,
            finishing,
            undispatched,
            unfinished,
            parked,
            parked_sagas,
            ..Pending::default()
        })
    }

    /// What the janitor has left; `overdue` counts what has been due for `overdue` and longer.
    pub(crate) async fn audit_sweeps(&self, overdue: Duration) -> Result<SweepsLeft, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_as(
            "SELECT count(*) AS sweeps, (SELECT count(*) FROM sagas WHERE state = 'finishing') AS finishing,
                    count(*) FILTER (WHERE coalesce(sweep_missed, sweep_after) <= now() - make_interval(secs => $1)) AS overdue,
                    extract(epoch FROM min(sweep_after) - now())::float8 AS next_in_s
             FROM document_versions WHERE sweep_after IS NOT NULL",
        )
        .bind(overdue.as_secs_f64())
        .fetch_one(&mut *tx)
        .await?)
    }

    /// How many jobs and sagas there are; the rest is counted on the way.
    pub(crate) async fn audit_counts(&self) -> Result<Counts, StoreError> {
        let mut tx = self.snapshot().await?;
        let (jobs, sagas) =
            sqlx::query_as("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM sagas)")
                .fetch_one(&mut *tx)
                .await?;
        Ok(Counts { jobs, sagas, ..Counts::default() })
    }

    /// Withdraws a staged version whose saga is not under way; the janitor removes its points and cache entry. `false`: it
    /// is not such a version (any more).
    pub(crate) async fn mend_orphan(&self, version: Uuid, sweep_after: Duration) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let done = sqlx::query(
            "UPDATE document_versions v SET state = 'abandoned', body = NULL, sweep_after = now() + make_interval(secs => $2)
             WHERE v.id = $1 AND v.state = 'staged'
               AND NOT EXISTS (SELECT FROM sagas s WHERE s.id = v.saga_id AND s.state IN ('running', 'compensating', 'parked'))
               AND NOT EXISTS (SELECT FROM documents d WHERE d.current_version = v.id)",
        )
        .bind(version)
        .bind(sweep_after.as_secs_f64())
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query("DELETE FROM chunks WHERE version_id = $1").bind(version).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Writes the chunk rows of a published version anew. `false`: it is not published any more.
    pub(crate) async fn mend_chunks(&self, version: Uuid, chunks: &[String]) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let published = sqlx::query(
            "SELECT FROM document_versions WHERE id = $1 AND state = 'published' FOR NO KEY UPDATE",
        )
        .bind(version)
        .fetch_optional(&mut *tx)
        .await?;
        if published.is_none() {
            return Ok(false);
        }
        sqlx::query("DELETE FROM chunks WHERE version_id = $1").bind(version).execute(&mut *tx).await?;
        sqlx::query("INSERT INTO chunks (version_id, no, body) SELECT $1, no - 1, body FROM unnest($2::text[]) WITH ORDINALITY AS c (body, no)")
            .bind(version)
            .bind(chunks)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Removes chunk rows that no one can see: beyond a version's count, or of a version without text.
    pub(crate) async fn mend_extra_chunks(&self, version: Uuid) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "DELETE FROM chunks c USING document_versions v
             WHERE c.version_id = $1 AND v.id = c.version_id
               AND (c.no >= v.chunk_count OR (v.state NOT IN ('staged', 'published') AND v.body IS NULL))",
        )
        .bind(version)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Puts back a version's text, if it has the hash recorded with it. `false`: it has not.
    pub(crate) async fn mend_body(&self, version: Uuid, body: &str) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE document_versions SET body = $2
             WHERE id = $1 AND state = 'published' AND content_hash = sha256(convert_to($2, 'UTF8'))",
        )
        .bind(version)
        .bind(body)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Completes a saga that waits for a sweep which will not come. `false`: it doesn't (any more).
    pub(crate) async fn mend_finishing(&self, saga: Uuid) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE sagas s SET state = 'completed', finished_at = now(), updated_at = now()
             WHERE s.id = $1 AND s.state = 'finishing'
               AND NOT EXISTS (SELECT FROM document_versions v WHERE v.retired_by = s.id AND v.sweep_after IS NOT NULL)",
        )
        .bind(saga)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes the dead letter that a dead job lacks, from what the ledger still knows. `false`: there is one.
    pub(crate) async fn mend_letter(&self, job: JobId) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "INSERT INTO dead_letters (id, job_id, saga_id, tenant, kind, queue, class, reason, payload, payload_key_id, traceparent)
             SELECT uuid7(), j.id, (SELECT s.id FROM sagas s WHERE s.job_id = j.id ORDER BY s.created_at DESC LIMIT 1),
                    j.tenant, j.kind, j.queue, 'letter_lost', coalesce(j.last_error, 'the reason is not recorded'),
                    j.payload, j.payload_key_id, j.traceparent
             FROM jobs j WHERE j.id = $1 AND j.state = 'dead'
             ON CONFLICT (job_id) DO NOTHING",
        )
        .bind(job.0)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }
}
