//! Where payloads and results are sealed and opened on their way into and out of the ledger; see
//! [`encryption`](crate::encryption) for how.
//!
//! `payload_key_id` and `result_key_id` say whether a column holds a sealed value, so that no plain payload can be taken for
//! one. `flotilla.enqueue` in SQL has no keys: what it inserts is plain until the relay takes it.

use std::collections::HashMap;

use queue::JobId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Fence, Postgres, accept::NewJob, dead_letters::DeadLetter, inspect::JobView};
use crate::{
    encryption::{Owner, PayloadCipher, Purpose, Unreadable},
    error::{Class, Dependency, StoreError},
};

/// Says of a [`NewJob`] that its payload is sealed already: in Redis, and in a batch's callback.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sealed {
    /// With which key.
    pub key_id: String,
    /// What the request gave before, for its idempotency key.
    pub fingerprint: Vec<u8>,
}

/// How many records a page of a rotation changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Rotated {
    /// Unfinished jobs, and dead ones that may be replayed.
    pub jobs: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// Callbacks of batches.
    pub callbacks: u64,
}

/// How many records are sealed with a key. `None`: plain.
#[derive(Debug, Clone, Default, Serialize, sqlx::FromRow)]
pub struct KeyUse {
    /// The key.
    pub key_id: Option<String>,
    /// Unfinished jobs.
    pub unfinished: i64,
    /// Other jobs.
    pub ended: i64,
    /// Results of jobs.
    pub results: i64,
    /// Dead letters that nobody has dealt with.
    pub dead_letters: i64,
    /// Callbacks of batches that are still to be enqueued.
    pub callbacks: i64,
    /// Signals to jobs that have not ended.
    pub signals: i64,
}

fn broken(what: &str, error: impl std::fmt::Display) -> StoreError {
    StoreError::new(Dependency::Postgres, Class::Permanent, format!("{what}: {error}"))
}

pub(super) fn payload_of(tenant: &str, job: Uuid) -> Owner<'_> {
    Owner { tenant, job, purpose: Purpose::Payload }
}

/// A payload as it is stored, with its key's id.
pub(super) fn seal_payload(
    cipher: &PayloadCipher,
    job: &NewJob,
) -> Result<(Value, Option<String>), StoreError> {
    if let Some(sealed) = &job.sealed {
        return Ok((job.payload.clone(), Some(sealed.key_id.clone())));
    }
    let owner = payload_of(job.tenant.as_str(), job.id.0);
    cipher.seal(owner, &job.payload).ok_or_else(|| broken("the payload can't be sealed", "the cipher failed"))
}

impl Postgres {
    /// Seals payloads and results from now on, and opens those that its keys fit.
    #[must_use]
    pub fn with_cipher(mut self, cipher: PayloadCipher) -> Self {
        self.cipher = cipher;
        self
    }

    /// What seals.
    pub fn cipher(&self) -> &PayloadCipher {
        &self.cipher
    }

    /// The job with its payload sealed, for places outside the ledger.
    pub fn seal_job(&self, job: &NewJob) -> Result<NewJob, StoreError> {
        if job.sealed.is_some() {
            return Ok(job.clone());
        }
        let (payload, key_id) = seal_payload(&self.cipher, job)?;
        let sealed = key_id
            .map(|key_id| Sealed { key_id, fingerprint: self.cipher.fingerprint(&job.request_bytes()) });
        Ok(NewJob { payload, sealed, ..job.clone() })
    }

    /// The job with its payload in plain.
    pub(super) fn open_job(&self, mut job: NewJob) -> Result<NewJob, StoreError> {
        if let Some(sealed) = job.sealed.take() {
            let owner = payload_of(job.tenant.as_str(), job.id.0);
            job.payload = self
                .cipher
                .open(owner, std::mem::take(&mut job.payload), Some(&sealed.key_id))
                .map_err(|e| broken("a job's payload", e))?;
        }
        Ok(job)
    }

    /// A dead letter's payload in plain.
    pub async fn letter_payload(&self, letter: &DeadLetter) -> Result<Value, StoreError> {
        let stored: Value = sqlx::query_scalar("SELECT payload FROM dead_letters WHERE id = $1")
            .bind(letter.id)
            .fetch_one(&self.pool)
            .await?;
        let owner = payload_of(&letter.tenant, letter.job_id);
        self.cipher
            .open(owner, stored, letter.payload_key_id.as_deref())
            .map_err(|e| broken("the dead letter's payload", e))
    }

    /// Opens the result of a job that people look at. What can't be opened here is left out.
    pub(super) fn open_result(&self, mut job: JobView) -> JobView {
        if let Some(key) = &job.result_key_id {
            let owner = Owner { tenant: &job.tenant, job: job.id, purpose: Purpose::Result };
            job.result = job.result.take().and_then(|stored| self.cipher.open(owner, stored, Some(key)).ok());
        }
        job
    }

    /// Results as they are stored, in the items' order; no result stays none. Without keys this asks nothing of the ledger.
    pub(super) async fn seal_results(
        &self,
        results: &[(JobId, &Value)],
    ) -> Result<Vec<(Value, Option<String>)>, StoreError> {
        if self.cipher.current().is_none() {
            return Ok(results.iter().map(|(_, result)| ((*result).clone(), None)).collect());
        }
        let ids: Vec<Uuid> = results.iter().map(|(job, _)| job.0).collect();
        let tenants: HashMap<Uuid, String> = sqlx::query_as("SELECT id, tenant FROM jobs WHERE id = ANY($1)")
            .bind(ids)
            .fetch_all(&self.pool)
            .await?
            .into_iter()
            .collect();
        let seal = |job: &JobId, result: &Value| {
            // A job that is not there is refused by the fence.
            let Some(tenant) = tenants.get(&job.0).filter(|_| !result.is_null()) else {
                return Some((Value::Null, None));
            };
            self.cipher.seal(Owner { tenant, job: job.0, purpose: Purpose::Result }, result)
        };
        results
            .iter()
            .map(|(job, result)| {
                seal(job, result).ok_or_else(|| broken("the result can't be sealed", "the cipher failed"))
            })
            .collect()
    }

    /// Seals what `flotilla.enqueue` has left plain among these jobs, whose rows the caller holds.
    pub(super) async fn seal_plain(
        &self,
        connection: &mut PgConnection,
        jobs: &[Uuid],
    ) -> Result<(), StoreError> {
        if self.cipher.current().is_none() {
            return Ok(());
        }
        let rows = sqlx::query(
            "SELECT id, tenant, payload FROM jobs WHERE id = ANY($1) AND payload_key_id IS NULL ORDER BY id",
        )
        .bind(jobs)
        .fetch_all(&mut *connection)
        .await?;
        let (mut ids, mut sealed, mut keys) = (vec![], vec![], vec![]);
        for row in &rows {
            let (id, tenant): (Uuid, String) = (row.try_get("id")?, row.try_get("tenant")?);
            let done = self.cipher.rewrap(payload_of(&tenant, id), &row.try_get("payload")?, None);
            if let Some((value, key)) = done.map_err(|e| broken("a payload can't be sealed", e))? {
                ids.push(id);
                sealed.push(value);
                keys.push(key);
            }
        }
        store(connection, "jobs", &ids, &sealed, &keys).await
    }

    /// Notes why a job can't be run here, for people. Only under the fence.
    pub(crate) async fn note_error(&self, job: JobId, fence: Fence, error: &str) -> Result<(), StoreError> {
        sqlx::query(crate::fenced_sql!(
            "UPDATE jobs SET last_error = $3 WHERE id = $1 AND fence = $2 AND state = 'running'",
            "fence = $2 AND state = 'running'"
        ))
        .bind(job.0)
        .bind(fence.0)
        .bind(error)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Wraps the data keys of a page of records with the current key, and seals plain payloads: unfinished jobs and those
    /// that may be replayed, open dead letters, callbacks. Begin with nil ids; `None`: nothing is left. What can't be opened
    /// fails the page and names the key that is missing.
    pub async fn rotate_page(&self, after: Uuid, limit: i64) -> Result<Option<(Uuid, Rotated)>, StoreError> {
        let Some(current) = self.cipher.current() else {
            return Err(broken("nothing can be sealed", "FLOTILLA_ENCRYPTION_KEYS is not set"));
        };
        let callbacks = self.rotate_callbacks(current, limit).await?;
        // Found without locks: between two jobs there may be millions that need nothing.
        let found: Vec<Uuid> = sqlx::query_scalar(
            "SELECT j.id FROM jobs j
             WHERE j.id > $1 AND j.payload_key_id IS DISTINCT FROM $2
               AND (j.state IN ('waiting', 'running', 'parked')
                    OR (j.state = 'dead' AND EXISTS (SELECT FROM dead_letters l WHERE l.job_id = j.id AND l.state = 'open')))
             ORDER BY j.id LIMIT $3",
        )
        .bind(after)
        .bind(current)
        .bind(limit)
        .fetch_all(&mut *self.snapshot().await?)
        .await?;
        let mut tx = self.begin().await?;
        // Letters and their jobs have an order of their own; jobs are locked in id order (PROTOCOL.md 3).
        let jobs = sqlx::query(
            "SELECT id, tenant, payload, payload_key_id FROM jobs
             WHERE id = ANY($1) AND payload_key_id IS DISTINCT FROM $2 ORDER BY id FOR NO KEY UPDATE",
        )
        .bind(&found)
        .bind(current)
        .fetch_all(&mut *tx)
        .await?;
        let letters = sqlx::query(
            "SELECT id, job_id, tenant, payload, payload_key_id FROM dead_letters
             WHERE state = 'open' AND payload_key_id IS DISTINCT FROM $1 ORDER BY id LIMIT $2 FOR NO KEY UPDATE",
        )
        .bind(current)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        if found.is_empty() && letters.is_empty() && callbacks == 0 {
            return Ok(None);
        }
        let last = found.last().copied().unwrap_or(after);
        let mut rotated = Rotated { callbacks, ..Rotated::default() };
        for (table, owner, rows) in [("jobs", "id", &jobs), ("dead_letters", "job_id", &letters)] {
            let (mut ids, mut sealed, mut keys) = (vec![], vec![], vec![]);
            for row in rows {
                let (job, tenant): (Uuid, String) = (row.try_get(owner)?, row.try_get("tenant")?);
                let key: Option<String> = row.try_get("payload_key_id")?;
                let done =
                    self.cipher.rewrap(payload_of(&tenant, job), &row.try_get("payload")?, key.as_deref());
                if let Some((value, key)) = done.map_err(|e| broken(&format!("job {job}"), e))? {
                    ids.push(row.try_get::<Uuid, _>("id")?);
                    sealed.push(value);
                    keys.push(key);
                }
            }
            store(&mut tx, table, &ids, &sealed, &keys).await?;
            let count = if table == "jobs" { &mut rotated.jobs } else { &mut rotated.dead_letters };
            *count = ids.len() as u64;
        }
        tx.commit().await?;
        Ok(Some((last, rotated)))
    }

    /// In a transaction of their own, because a batch's row is locked before all others: so it can wait for those that the
    /// collector holds.
    async fn rotate_callbacks(&self, current: &str, limit: i64) -> Result<u64, StoreError> {
        let mut tx = self.begin().await?;
        let callbacks = sqlx::query(
            "SELECT id, callback FROM batches
             WHERE callback IS NOT NULL AND callback -> 'sealed' ->> 'key_id' IS DISTINCT FROM $1
             ORDER BY id LIMIT $2 FOR NO KEY UPDATE",
        )
        .bind(current)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        for row in &callbacks {
            let job: NewJob = serde_json::from_value(row.try_get("callback")?)
                .map_err(|e| broken("a batch's callback", e))?;
            let sealed = self.seal_job(&self.open_job(job)?)?;
            sqlx::query("UPDATE batches SET callback = $2 WHERE id = $1")
                .bind(row.try_get::<Uuid, _>("id")?)
                .bind(json!(sealed))
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        Ok(callbacks.len() as u64)
    }

    /// Which keys are in use.
    pub async fn keys_in_use(&self) -> Result<Vec<KeyUse>, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_as(
            "SELECT key_id, sum(unfinished)::bigint AS unfinished, sum(ended)::bigint AS ended, sum(results)::bigint AS results,
                    sum(letters)::bigint AS dead_letters, sum(callbacks)::bigint AS callbacks, sum(signals)::bigint AS signals
             FROM (SELECT payload_key_id AS key_id, count(*) FILTER (WHERE state IN ('waiting', 'running')) AS unfinished,
                          count(*) FILTER (WHERE state NOT IN ('waiting', 'running')) AS ended,
                          0 AS results, 0 AS letters, 0 AS callbacks, 0 AS signals FROM jobs GROUP BY 1
                   UNION ALL
                   SELECT result_key_id, 0, 0, count(*), 0, 0, 0 FROM jobs WHERE result IS NOT NULL GROUP BY 1
                   UNION ALL
                   SELECT payload_key_id, 0, 0, 0, count(*), 0, 0 FROM dead_letters WHERE state = 'open' GROUP BY 1
                   UNION ALL
                   SELECT callback -> 'sealed' ->> 'key_id', 0, 0, 0, 0, count(*), 0 FROM batches
                   WHERE callback IS NOT NULL GROUP BY 1
                   UNION ALL
                   SELECT s.payload_key_id, 0, 0, 0, 0, 0, count(*) FROM job_signals s JOIN jobs j ON j.id = s.job_id
                   WHERE j.state IN ('waiting', 'running', 'parked') GROUP BY 1) used
             GROUP BY 1 ORDER BY 1 NULLS LAST",
        )
        .fetch_all(&mut *tx)
        .await?)
    }
}

async fn store(
    connection: &mut PgConnection,
    table: &'static str,
    ids: &[Uuid],
    payloads: &[Value],
    keys: &[String],
) -> Result<(), StoreError> {
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "UPDATE {table} t SET payload = n.payload, payload_key_id = n.key_id
         FROM unnest($1::uuid[], $2::jsonb[], $3::text[]) AS n (id, payload, key_id) WHERE t.id = n.id"
    )))
    .bind(ids)
    .bind(payloads)
    .bind(keys)
    .execute(connection)
    .await?;
    Ok(())
}

/// A taken job's payload in plain, or why it can't be read here.
pub(super) fn open_taken(
    cipher: &PayloadCipher,
    tenant: &str,
    job: Uuid,
    stored: Value,
    key_id: Option<&str>,
) -> Result<Value, Unreadable> {
    cipher.open(payload_of(tenant, job), stored, key_id)
}

/// Fingerprints under which a job's request may stand (PROTOCOL.md 19).
pub(super) fn fingerprints(cipher: &PayloadCipher, job: &NewJob) -> Vec<Vec<u8>> {
    match &job.sealed {
        Some(sealed) => vec![sealed.fingerprint.clone()],
        None => cipher.fingerprints(&job.request_bytes()),
    }
}
