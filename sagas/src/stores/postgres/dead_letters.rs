//! Dead letters: list, show, replay, discard, one or by filter. They are written in `ending`, with the job's death.

use chrono::{DateTime, Utc};
use queue::{JobId, Priority, QueueName, TenantId};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{FromRow, Row};
use std::time::Duration;
use uuid::Uuid;

use super::{Postgres, accept::NewJob, batches::BatchId, ledger::record_in};
use crate::{
    error::{Class, Dependency, StoreError},
    kinds::embed,
};

/// A job that will not be tried again without a person.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct DeadLetter {
    /// The letter.
    pub id: Uuid,
    /// The job that died.
    pub job_id: Uuid,
    /// Its last run, if it had one.
    pub saga_id: Option<Uuid>,
    /// Owner.
    pub tenant: String,
    /// Kind of the job.
    pub kind: String,
    /// Queue of the job.
    pub queue: String,
    /// The caller's name of the job's document.
    pub document: Option<String>,
    /// The reason as a word.
    pub class: String,
    /// The reason as a sentence.
    pub reason: String,
    /// Causes, outermost first.
    pub error_chain: Value,
    /// The request; null if it is sealed: [`letter_payload`](Postgres::letter_payload) opens it.
    pub payload: Value,
    /// The key it is sealed with.
    pub payload_key_id: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// When the job died.
    pub created_at: DateTime<Utc>,
    /// `open`, `replayed` or `discarded`.
    pub state: String,
    /// When a person dealt with it.
    pub resolved_at: Option<DateTime<Utc>>,
    /// Who.
    pub resolved_by: Option<String>,
    /// Why.
    pub note: Option<String>,
    /// The job that replays it.
    pub replay_job: Option<Uuid>,
}

/// A letter with all that is known of its job.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct LetterStory {
    /// The letter.
    #[serde(flatten)]
    #[sqlx(flatten)]
    pub letter: DeadLetter,
    /// The job's charged failures, each with its worker and times, oldest first.
    pub attempts: Value,
    /// The job's runs, each with its `steps` in the order they happened.
    pub runs: Value,
}

/// The place of a letter in the order of letters: when it was written, and its id.
pub type Cursor = (DateTime<Utc>, Uuid);

/// Which dead letters.
#[derive(Debug, Clone, Default)]
pub struct DeadLetterFilter {
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only with this reason word.
    pub class: Option<String>,
    /// Only in this state.
    pub state: Option<String>,
    /// Only written then or later.
    pub since: Option<DateTime<Utc>>,
    /// Only written before.
    pub until: Option<DateTime<Utc>>,
    /// Only with this text in the reason or the chain of errors, in any case.
    pub text: Option<String>,
    /// In a listing, which is newest first: only older ones than this. Elsewhere, oldest first: only newer ones.
    pub from: Option<Cursor>,
    /// Page length.
    pub limit: i64,
}

/// The answer to a replay or a discard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// Done; for a replay, as this job, which is in the ledger and left to the relay.
    Done(Option<JobId>),
    /// Somebody has dealt with it before.
    Already(String),
    /// The mended request is about another document than this, the dead job's: enqueue it as a job of its own.
    OtherDocument(String),
    /// The request is for every tenant, and the replay was to stay [within one](Replay::within_tenant).
    ForEveryTenant,
    /// No such letter.
    Unknown,
}

/// How a dead letter is replayed.
#[derive(Debug, Clone, Default)]
pub struct Replay {
    /// Who asks.
    pub actor: String,
    /// A mended request in place of the original one.
    pub payload: Option<Value>,
    /// A mended kind.
    pub kind: Option<String>,
    /// Take a new place at the end of the document's order instead of the original one.
    pub as_latest: bool,
    /// Refuse a request for every tenant, which isn't a tenant's to repeat.
    pub within_tenant: bool,
}

/// What is sealed is of no use to people who look.
const LETTER: &str = "id, job_id, saga_id, tenant, kind, queue, class, reason, error_chain,
       (SELECT d.key FROM jobs j JOIN documents d ON d.id = j.document_id WHERE j.id = l.job_id) AS document,
       CASE WHEN payload_key_id IS NULL THEN payload ELSE 'null' END AS payload, payload_key_id, traceparent, created_at, state,
       resolved_at, resolved_by, note, replay_job";

/// The rest of a letter's story, beside `LETTER`.
const STORY: &str = "(SELECT coalesce(jsonb_agg(to_jsonb(a) - 'job_id' ORDER BY a.attempt), '[]') FROM job_attempts a
         WHERE a.job_id = l.job_id) AS attempts,
       (SELECT coalesce(jsonb_agg(jsonb_build_object('id', s.id, 'definition_version', s.definition_version, 'state', s.state,
                   'error', s.error, 'created_at', s.created_at, 'finished_at', s.finished_at,
                   'steps', (SELECT coalesce(jsonb_agg(to_jsonb(t) - 'saga_id' ORDER BY t.fence, t.seq), '[]')
                             FROM saga_timeline t WHERE t.saga_id = s.id)) ORDER BY s.created_at, s.id), '[]')
        FROM sagas s WHERE s.job_id = l.job_id) AS runs";

/// What a filter lets through; its binds are `$1` to `$7`, and those of a cursor `$8` and `$9`.
const PASSES: &str = "($1::text IS NULL OR tenant = $1) AND ($2::text IS NULL OR kind = $2) AND ($3::text IS NULL OR class = $3)
       AND ($4::text IS NULL OR state = $4) AND ($5::timestamptz IS NULL OR created_at >= $5)
       AND ($6::timestamptz IS NULL OR created_at < $6)
       AND ($7::text IS NULL OR strpos(lower(reason), lower($7)) > 0 OR strpos(lower(error_chain::text), lower($7)) > 0)";

/// Binds what `PASSES` and a cursor need.
macro_rules! bound {
    ($query:expr, $filter:expr) => {
        $query
            .bind(&$filter.tenant)
            .bind(&$filter.kind)
            .bind(&$filter.class)
            .bind(&$filter.state)
            .bind($filter.since)
            .bind($filter.until)
            .bind(&$filter.text)
            .bind($filter.from.map(|(at, _)| at))
            .bind($filter.from.map(|(_, id)| id))
    };
}

impl Postgres {
    /// A page of dead letters, newest first.
    pub async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetter>, StoreError> {
        let sql = format!(
            "SELECT {LETTER} FROM dead_letters l
             WHERE {PASSES} AND ($8::timestamptz IS NULL OR (created_at, id) < ($8, $9::uuid))
             ORDER BY created_at DESC, id DESC LIMIT $10"
        );
        Ok(bound!(sqlx::query_as(sqlx::AssertSqlSafe(sql)), filter)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// A page of letters with all that is known of their jobs, oldest first; their payloads are null:
    /// [`letter_payload`](Self::letter_payload) reads one.
    pub async fn letter_stories(&self, filter: &DeadLetterFilter) -> Result<Vec<LetterStory>, StoreError> {
        let letter = LETTER.replace("THEN payload ELSE", "THEN 'null'::jsonb ELSE");
        let sql = format!(
            "SELECT {letter}, {STORY} FROM dead_letters l
             WHERE {PASSES} AND ($8::timestamptz IS NULL OR (created_at, id) > ($8, $9::uuid))
             ORDER BY created_at, id LIMIT $10"
        );
        Ok(bound!(sqlx::query_as(sqlx::AssertSqlSafe(sql)), filter)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// The places of a page of letters, oldest first.
    pub async fn letter_places(&self, filter: &DeadLetterFilter) -> Result<Vec<Cursor>, StoreError> {
        let sql = format!(
            "SELECT created_at, id FROM dead_letters
             WHERE {PASSES} AND ($8::timestamptz IS NULL OR (created_at, id) > ($8, $9::uuid))
             ORDER BY created_at, id LIMIT $10"
        );
        Ok(bound!(sqlx::query_as(sqlx::AssertSqlSafe(sql)), filter)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// How many letters a filter lets through, by kind and class, whatever its limit; and the time on the ledger's clock.
    /// With that as `until`, what dies from then on is left out.
    pub async fn letter_totals(
        &self,
        filter: &DeadLetterFilter,
    ) -> Result<(Vec<(String, String, i64)>, DateTime<Utc>), StoreError> {
        let mut tx = self.begin().await?;
        let now = sqlx::query_scalar("SELECT now()").fetch_one(&mut *tx).await?;
        let sql = format!(
            "SELECT kind, class, count(*) FROM dead_letters
             WHERE {PASSES} AND ($8::timestamptz IS NULL OR (created_at, id) > ($8, $9::uuid)) GROUP BY 1, 2 ORDER BY 1, 2"
        );
        let totals = bound!(sqlx::query_as(sqlx::AssertSqlSafe(sql)), filter).fetch_all(&mut *tx).await?;
        Ok((totals, now))
    }

    /// One letter with all that is known of its job, by its own id or its job's.
    pub async fn letter_story(&self, id: Uuid) -> Result<Option<LetterStory>, StoreError> {
        let sql = format!("SELECT {LETTER}, {STORY} FROM dead_letters l WHERE id = $1 OR job_id = $1");
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&self.pool).await?)
    }

    /// One dead letter, by its own id or its job's.
    pub async fn dead_letter(&self, id: Uuid) -> Result<Option<DeadLetter>, StoreError> {
        let sql = format!("SELECT {LETTER} FROM dead_letters l WHERE id = $1 OR job_id = $1");
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&self.pool).await?)
    }

    /// Enqueues the dead job again as a new job that keeps the original's order number. The letter's row is locked
    /// meanwhile, so that two people can't replay it twice.
    pub async fn replay(&self, id: Uuid, how: &Replay) -> Result<Resolved, StoreError> {
        let mut tx = self.begin().await?;
        let row = sqlx::query(
            "SELECT l.id, l.state, j.id AS job, j.kind, j.queue, j.priority, j.tenant, j.payload, j.payload_key_id, j.max_attempts, j.timeout_ms,
                    j.doc_order, j.batch_id, d.key AS document
             FROM dead_letters l JOIN jobs j ON j.id = l.job_id LEFT JOIN documents d ON d.id = j.document_id
             WHERE l.id = $1 OR l.job_id = $1 FOR UPDATE OF l",
        )
        .bind(id)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(row) = row else { return Ok(Resolved::Unknown) };
        let state: String = row.try_get("state")?;
        if state != "open" {
            return Ok(Resolved::Already(state));
        }
        let odd = |e: &dyn std::fmt::Display| {
            StoreError::new(
                Dependency::Postgres,
                Class::Permanent,
                format!("the dead job can't be read: {e}"),
            )
        };
        let kind: String = row.try_get("kind")?;
        let new_kind = how.kind.clone().unwrap_or_else(|| kind.clone());
        let queue: String = if new_kind == kind {
            row.try_get("queue")?
        } else {
            crate::kinds::default_queue(&new_kind).to_owned()
        };
        let payload = if let Some(mended) = &how.payload {
            mended.clone()
        } else {
            let (tenant, job): (String, Uuid) = (row.try_get("tenant")?, row.try_get("job")?);
            let key: Option<String> = row.try_get("payload_key_id")?;
            let owner = super::sealing::payload_of(&tenant, job);
            self.cipher.open(owner, row.try_get("payload")?, key.as_deref()).map_err(|e| odd(&e))?
        };
        if how.within_tenant && embed::is_for_every_tenant(&new_kind, &payload) {
            return Ok(Resolved::ForEveryTenant);
        }
        let document: Option<String> = row.try_get("document")?;
        let named = how.payload.as_ref().and_then(|mended| crate::kinds::document_of(&new_kind, mended));
        if let (Some(dead), Some(named)) = (&document, named)
            && *dead != named
        {
            return Ok(Resolved::OtherDocument(dead.clone()));
        }
        let mut job = NewJob::new(
            new_kind,
            QueueName::new(queue).map_err(|e| odd(&e))?,
            TenantId::new(row.try_get::<String, _>("tenant")?).map_err(|e| odd(&e))?,
            payload,
        );
        job.priority =
            Priority::try_from(i64::from(row.try_get::<i16, _>("priority")?)).map_err(|e| odd(&e))?;
        job.max_attempts = row.try_get("max_attempts")?;
        job.timeout = Duration::from_millis(row.try_get::<i32, _>("timeout_ms")?.unsigned_abs().into());
        job.keep_order = if how.as_latest { None } else { row.try_get("doc_order")? };
        job.document = document.or_else(|| crate::kinds::document_of(&job.kind, &job.payload));
        job.replay_of = Some(JobId(row.try_get("job")?));
        // Takes the dead job's place in its batch, also in a sealed one.
        job.batch = row.try_get::<Option<Uuid>, _>("batch_id")?.map(BatchId);
        self.accept_one(&mut tx, &job).await?;
        sqlx::query(
            "UPDATE dead_letters SET state = 'replayed', resolved_at = now(), resolved_by = $2, replay_job = $3 WHERE id = $1",
        )
        .bind(row.try_get::<Uuid, _>("id")?)
        .bind(&how.actor)
        .bind(job.id.0)
        .execute(&mut *tx)
        .await?;
        let detail = json!({ "job": job.id.to_string() });
        record_in(&mut tx, &how.actor, "dlq.replay", &id.to_string(), &detail).await?;
        tx.commit().await?;
        Ok(Resolved::Done(Some(job.id)))
    }

    /// Closes a dead letter without a replay.
    pub async fn discard(&self, id: Uuid, actor: &str, reason: &str) -> Result<Resolved, StoreError> {
        let mut tx = self.begin().await?;
        let done = sqlx::query(
            "UPDATE dead_letters SET state = 'discarded', resolved_at = now(), resolved_by = $2, note = $3
             WHERE (id = $1 OR job_id = $1) AND state = 'open'",
        )
        .bind(id)
        .bind(actor)
        .bind(reason)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 1 {
            record_in(&mut tx, actor, "dlq.discard", &id.to_string(), &json!({ "reason": reason })).await?;
            tx.commit().await?;
            return Ok(Resolved::Done(None));
        }
        tx.rollback().await?;
        Ok(match self.dead_letter(id).await? {
            Some(letter) => Resolved::Already(letter.state),
            None => Resolved::Unknown,
        })
    }

    /// Closes a page of the open letters that a filter lets through, oldest first; returns how many. A letter that somebody
    /// else holds is left to them.
    pub async fn discard_page(
        &self,
        filter: &DeadLetterFilter,
        actor: &str,
        reason: &str,
    ) -> Result<u64, StoreError> {
        let sql = format!(
            "WITH due AS (
                 SELECT id FROM dead_letters
                 WHERE {PASSES} AND state = 'open' AND ($8::timestamptz IS NULL OR (created_at, id) > ($8, $9::uuid))
                 ORDER BY created_at, id LIMIT $10 FOR NO KEY UPDATE SKIP LOCKED
             ), closed AS (
                 UPDATE dead_letters l SET state = 'discarded', resolved_at = now(), resolved_by = $11, note = $12
                 FROM due WHERE l.id = due.id RETURNING l.id)
             INSERT INTO audit_log (id, actor, action, subject, detail)
             SELECT uuid7(), $11, 'dlq.discard', id::text, jsonb_build_object('reason', $12::text) FROM closed"
        );
        Ok(bound!(sqlx::query(sqlx::AssertSqlSafe(sql)), filter)
            .bind(filter.limit)
            .bind(actor)
            .bind(reason)
            .execute(&self.pool)
            .await?
            .rows_affected())
    }
}
