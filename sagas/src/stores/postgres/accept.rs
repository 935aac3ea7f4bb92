//! Acceptance: jobs enter the ledger (contract point 1). One transaction for a whole batch.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use chrono::{DateTime, Utc};
use queue::{JobId, Priority, QueueName, TenantId, TraceContext};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, Postgres as Db, Row, pool::PoolConnection};
use uuid::Uuid;

use super::{
    Postgres,
    batches::{self, BatchId},
    sealing::{self, Sealed},
};
use crate::{
    encryption::PayloadCipher,
    error::{Class, Dependency, StoreError},
};

/// A key under which the same request is accepted once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idempotency {
    /// The caller's key, 1 to 256 characters.
    pub key: String,
    /// Keys of different scopes never meet.
    pub scope: String,
    /// How long the key is remembered: from acceptance, or from the job's end.
    pub ttl: Duration,
    /// Which of them.
    #[serde(default)]
    pub until: Until,
}

/// What an idempotency key's time is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// Acceptance: the key is free when its time is over, whatever the job does.
    #[default]
    Accepted,
    /// The job's end: the key is held until the job has ended, however long that takes, and then for its time; with a
    /// time of zero it is free at once. It goes with the job's record at the latest.
    Finished,
}

/// A job to accept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewJob {
    /// Made by the client, so that a retried call is the same job.
    pub id: JobId,
    /// `ingest`, `embed`, `delete`, or a user's own.
    pub kind: String,
    /// Where it waits.
    pub queue: QueueName,
    /// 9 first.
    pub priority: Priority,
    /// The owner, who must exist.
    pub tenant: TenantId,
    /// The request, a JSON object.
    pub payload: Value,
    /// Not before; `None` is now.
    pub run_at: Option<DateTime<Utc>>,
    /// Charged failures before the job is dead.
    pub max_attempts: i32,
    /// Hard cap on one run.
    pub timeout: Duration,
    /// The caller's name for the document the job is about; gives the job its place in that document's order.
    pub document: Option<String>,
    /// Keep this order number instead of taking a new one: replays do (PROTOCOL.md 8).
    pub keep_order: Option<i64>,
    /// Accept the same request once.
    pub idempotency: Option<Idempotency>,
    /// The job that enqueues this one.
    pub parent: Option<JobId>,
    /// The dead job that this one replays.
    pub replay_of: Option<JobId>,
    /// The open batch that this job becomes a member of.
    #[serde(default)]
    pub batch: Option<BatchId>,
    /// The payload is sealed already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Sealed>,
    /// The producer's trace.
    pub trace: Option<TraceContext>,
}

impl NewJob {
    /// A job with the defaults: its kind's own queue, priority 5, at once, 5 attempts, 5 minutes.
    pub fn new(kind: impl Into<String>, queue: QueueName, tenant: TenantId, payload: Value) -> Self {
        Self {
            id: JobId::new(),
            kind: kind.into(),
            queue,
            priority: Priority::default(),
            tenant,
            payload,
            run_at: None,
            max_attempts: 5,
            timeout: Duration::from_secs(300),
            document: None,
            keep_order: None,
            idempotency: None,
            parent: None,
            replay_of: None,
            batch: None,
            sealed: None,
            trace: None,
        }
    }

    /// What makes the request the same: kind, document and plain payload.
    pub(super) fn request_bytes(&self) -> Vec<u8> {
        let document = self.document.as_deref().unwrap_or_default();
        format!("{}\0{document}\0{}", self.kind, self.payload).into_bytes()
    }
}

/// What became of one job of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// It is in the ledger.
    New(JobId),
    /// The same request was accepted before, as this job.
    Duplicate(JobId),
    /// The idempotency key was used with another request; that was this job.
    Conflict(JobId),
    /// No such tenant.
    UnknownTenant,
    /// The tenant has no such batch.
    UnknownBatch(BatchId),
    /// The batch takes no more members.
    BatchSealed(BatchId),
}

impl Postgres {
    /// Accepts a batch in one transaction; answers in its order. Array order is the order of jobs on one document.
    /// Calling again with the same ids after an unknown outcome accepts nothing twice. With `dispatched` the caller
    /// promises to put the jobs into Redis itself; otherwise the relay does.
    pub async fn accept(&self, jobs: &[NewJob], dispatched: bool) -> Result<Vec<Accepted>, StoreError> {
        if jobs.iter().all(is_plain) {
            return self.accept_plain(&mut *self.pool.acquire().await?, jobs, dispatched).await;
        }
        self.accept_together(jobs, dispatched).await
    }

    /// [`accept`](Self::accept) on a connection that the caller has [reached](Self::reach).
    pub async fn accept_on(
        &self,
        mut connection: PoolConnection<Db>,
        jobs: &[NewJob],
        dispatched: bool,
    ) -> Result<Vec<Accepted>, StoreError> {
        if jobs.iter().all(is_plain) {
            return self.accept_plain(&mut connection, jobs, dispatched).await;
        }
        // A transaction begins in a task of its own, on a connection that it takes itself.
        drop(connection);
        self.accept_together(jobs, dispatched).await
    }

    async fn accept_together(&self, jobs: &[NewJob], dispatched: bool) -> Result<Vec<Accepted>, StoreError> {
        let mut tx = self.begin().await?;
        let replies = self.accept_in(&mut tx, jobs, dispatched).await?;
        tx.commit().await?;
        Ok(replies)
    }

    /// Accepts jobs that touch nothing but their own rows: one statement, which commits by itself.
    async fn accept_plain(
        &self,
        connection: &mut PgConnection,
        jobs: &[NewJob],
        dispatched: bool,
    ) -> Result<Vec<Accepted>, StoreError> {
        let all: Vec<&NewJob> = jobs.iter().collect();
        let strangers = insert(connection, &self.cipher, &all, &vec![None; jobs.len()], dispatched).await?;
        let reply = |job: &NewJob| {
            if strangers.iter().any(|tenant| tenant == job.tenant.as_str()) {
                Accepted::UnknownTenant
            } else {
                Accepted::New(job.id)
            }
        };
        Ok(jobs.iter().map(reply).collect())
    }

    /// Accepts a batch inside the caller's transaction; see [`accept`](Self::accept).
    pub(super) async fn accept_in(
        &self,
        connection: &mut PgConnection,
        jobs: &[NewJob],
        dispatched: bool,
    ) -> Result<Vec<Accepted>, StoreError> {
        let mut replies: Vec<Option<Accepted>> = vec![None; jobs.len()];
        refuse_unknown_tenants(connection, jobs, &mut replies).await?;
        already_there(connection, jobs, &mut replies).await?;
        batches::hold_open(connection, jobs, &mut replies).await?;
        known_by_key(connection, &self.cipher, jobs, &mut replies).await?;
        reserve_keys(connection, &self.cipher, jobs, &mut replies).await?;
        let fresh: Vec<&NewJob> =
            jobs.iter().zip(&replies).filter(|(_, r)| r.is_none()).map(|(job, _)| job).collect();
        if !fresh.is_empty() {
            let places = order(connection, &fresh).await?;
            none_strange(&insert(connection, &self.cipher, &fresh, &places, dispatched).await?)?;
        }
        Ok(jobs.iter().zip(replies).map(|(job, reply)| reply.unwrap_or(Accepted::New(job.id))).collect())
    }

    /// Accepts one job inside the caller's transaction and leaves it to the relay.
    pub(super) async fn accept_one(
        &self,
        connection: &mut PgConnection,
        job: &NewJob,
    ) -> Result<(), StoreError> {
        let places = order(connection, &[job]).await?;
        none_strange(&insert(connection, &self.cipher, &[job], &places, false).await?)
    }

    /// Brings jobs with `durability=fast` into the ledger when a worker is about to take them, or somebody looks for them; in id
    /// order, as both may have the same. Those of unknown tenants or with keys already used stay out, and so are dropped by the
    /// take: these are returned. A parent that the ledger doesn't have is left out: retention may have removed it.
    pub async fn admit_fast(&self, mut jobs: Vec<NewJob>) -> Result<Vec<JobId>, StoreError> {
        jobs.sort_unstable_by_key(|job| job.id);
        // Whoever pages through Redis may meet one twice.
        jobs.dedup_by_key(|job| job.id);
        let named: Vec<JobId> = jobs.iter().flat_map(|job| [job.parent, job.replay_of]).flatten().collect();
        if !named.is_empty() {
            let known = self.known_jobs(&named).await?;
            for job in &mut jobs {
                job.parent = job.parent.filter(|id| known.contains(id));
                job.replay_of = job.replay_of.filter(|id| known.contains(id));
            }
        }
        let mut refused = vec![];
        for (job, reply) in jobs.iter().zip(self.accept(&jobs, true).await?) {
            match reply {
                Accepted::New(_) => continue,
                Accepted::Conflict(first) => {
                    tracing::warn!(job = %job.id, %first, "a fast job is dropped: its idempotency key was used with another request");
                }
                Accepted::UnknownTenant => {
                    tracing::error!(job = %job.id, tenant = %job.tenant, "a fast job is dropped: its tenant doesn't exist (any more)");
                }
                _ => {}
            }
            refused.push(job.id);
        }
        Ok(refused)
    }

    /// Which of these jobs the ledger has.
    pub async fn known_jobs(&self, jobs: &[JobId]) -> Result<HashSet<JobId>, StoreError> {
        Ok(there(&mut *self.pool.acquire().await?, jobs.iter().copied()).await?)
    }

    /// Marks accepted jobs as not dispatched, so that the relay puts them into Redis.
    pub async fn leave_to_relay(&self, jobs: &[JobId]) -> Result<(), StoreError> {
        sqlx::query("UPDATE jobs SET dispatched_at = NULL WHERE id = ANY($1) AND state = 'waiting'")
            .bind(jobs.iter().map(|id| id.0).collect::<Vec<_>>())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Hands those of these jobs to the relay that have been due for longer than `grace` and still wait; how many they are.
    pub async fn wake_overdue(&self, jobs: &[JobId], grace: Duration) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "UPDATE jobs SET dispatched_at = NULL
             WHERE id = ANY($1) AND state = 'waiting' AND run_at < now() - make_interval(secs => $2)",
        )
        .bind(jobs.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(grace.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }
}

/// Whether a job has no place in a document's order, no idempotency key and no batch.
fn is_plain(job: &NewJob) -> bool {
    job.document.is_none() && job.idempotency.is_none() && job.batch.is_none()
}

async fn refuse_unknown_tenants(
    connection: &mut PgConnection,
    jobs: &[NewJob],
    replies: &mut [Option<Accepted>],
) -> Result<(), sqlx::Error> {
    let mut names: Vec<String> = jobs.iter().map(|job| job.tenant.to_string()).collect();
    names.sort();
    names.dedup();
    let known: Vec<String> = sqlx::query_scalar("SELECT id FROM tenants WHERE id = ANY($1)")
        .bind(&names)
        .fetch_all(connection)
        .await?;
    for (job, reply) in jobs.iter().zip(replies) {
        if !known.iter().any(|name| *name == job.tenant.to_string()) {
            *reply = Some(Accepted::UnknownTenant);
        }
    }
    Ok(())
}

/// Which of these jobs the ledger has.
pub(super) async fn there(
    connection: &mut PgConnection,
    jobs: impl Iterator<Item = JobId>,
) -> Result<HashSet<JobId>, sqlx::Error> {
    let there: Vec<Uuid> =
        sqlx::query_scalar("SELECT id FROM jobs WHERE id = ANY((SELECT $1::uuid[])::uuid[])")
            .bind(jobs.map(|job| job.0).collect::<Vec<_>>())
            .fetch_all(connection)
            .await?;
    Ok(there.into_iter().map(JobId).collect())
}

/// Jobs that an earlier call with the same ids has accepted (PROTOCOL.md 20).
async fn already_there(
    connection: &mut PgConnection,
    jobs: &[NewJob],
    replies: &mut [Option<Accepted>],
) -> Result<(), sqlx::Error> {
    let there = there(connection, jobs.iter().map(|job| job.id)).await?;
    for (job, reply) in jobs.iter().zip(replies) {
        if reply.is_none() && there.contains(&job.id) {
            *reply = Some(Accepted::New(job.id));
        }
    }
    Ok(())
}

/// Whether a key `k` that is held until its job's end is free: that was long enough ago. A parked job's end can be taken back.
const ITS_JOB_IS_OVER: &str =
    "EXISTS (SELECT FROM jobs j WHERE j.id = k.job_id AND j.finished_at + k.after_end <= clock_timestamp()
                                                 AND j.state <> 'parked')";

/// Jobs that come too late for their batch, and yet were accepted before under their idempotency keys: a call that is made again
/// gets the answer of the first. Their keys are only looked up, because those that are free must stay so.
async fn known_by_key(
    connection: &mut PgConnection,
    cipher: &PayloadCipher,
    jobs: &[NewJob],
    replies: &mut [Option<Accepted>],
) -> Result<(), sqlx::Error> {
    let mut late: Vec<(usize, &Idempotency)> = vec![];
    for (i, job) in jobs.iter().enumerate() {
        if let (Some(Accepted::BatchSealed(_)), Some(idempotency)) = (&replies[i], &job.idempotency) {
            late.push((i, idempotency));
        }
    }
    if late.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT n.place, k.fingerprint, k.job_id
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS n (place, tenant, scope, key)
         JOIN idempotency_keys k USING (tenant, scope, key)
         WHERE k.expires_at > now()
           AND NOT {ITS_JOB_IS_OVER}",
    )))
    .bind(late.iter().map(|(i, _)| *i as i64).collect::<Vec<_>>())
    .bind(late.iter().map(|(i, _)| jobs[*i].tenant.to_string()).collect::<Vec<_>>())
    .bind(late.iter().map(|(_, idempotency)| idempotency.scope.clone()).collect::<Vec<_>>())
    .bind(late.iter().map(|(_, idempotency)| idempotency.key.clone()).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    for row in &rows {
        let (i, print): (usize, Vec<u8>) =
            (row.try_get::<i64, _>("place")? as usize, row.try_get("fingerprint")?);
        let first = JobId(row.try_get("job_id")?);
        replies[i] = Some(if sealing::fingerprints(cipher, &jobs[i]).contains(&print) {
            Accepted::Duplicate(first)
        } else {
            Accepted::Conflict(first)
        });
    }
    Ok(())
}

/// Reserves the idempotency keys; requests with a key that is taken get their answer here. Duplicates inside the batch
/// are folded first: the first of them counts.
async fn reserve_keys(
    connection: &mut PgConnection,
    cipher: &PayloadCipher,
    jobs: &[NewJob],
    replies: &mut [Option<Accepted>],
) -> Result<(), sqlx::Error> {
    type Key<'a> = (String, &'a str, &'a str);
    let key_of = |job: &'_ NewJob| -> Option<(String, String, String)> {
        job.idempotency.as_ref().map(|i| (job.tenant.to_string(), i.scope.clone(), i.key.clone()))
    };
    // Sorted by key, so that two batches lock rows in one order.
    let mut first: BTreeMap<(String, String, String), (usize, Vec<u8>)> = BTreeMap::new();
    for (i, job) in jobs.iter().enumerate() {
        if replies[i].is_some() {
            continue;
        }
        let Some(key) = key_of(job) else { continue };
        let Some(print) = sealing::fingerprints(cipher, job).into_iter().next() else { continue };
        match first.get(&key) {
            None => {
                first.insert(key, (i, print));
            }
            Some((winner, same)) => {
                let id = jobs[*winner].id;
                replies[i] =
                    Some(if *same == print { Accepted::Duplicate(id) } else { Accepted::Conflict(id) });
            }
        }
    }
    if first.is_empty() {
        return Ok(());
    }
    let column = |f: &dyn Fn(&(String, String, String)) -> String| first.keys().map(f).collect::<Vec<_>>();
    let (tenants, scopes, keys) =
        (column(&|k| k.0.clone()), column(&|k| k.1.clone()), column(&|k| k.2.clone()));
    let prints: Vec<Vec<u8>> = first.values().map(|(_, print)| print.clone()).collect();
    let ids: Vec<Uuid> = first.values().map(|(i, _)| jobs[*i].id.0).collect();
    let ttls: Vec<f64> = first
        .values()
        .map(|(i, _)| jobs[*i].idempotency.as_ref().map_or(0.0, |k| k.ttl.as_secs_f64()))
        .collect();
    let held: Vec<bool> = first
        .values()
        .map(|(i, _)| jobs[*i].idempotency.as_ref().is_some_and(|k| k.until == Until::Finished))
        .collect();
    // A key that is held until its job has ended is free when the job's row says so: the end itself writes nothing here. A
    // job whose row can't be seen yet is new, and holds its key.
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "INSERT INTO idempotency_keys AS k (tenant, scope, key, fingerprint, job_id, expires_at, after_end)
         SELECT tenant, scope, key, print, job,
                CASE WHEN held THEN 'infinity' ELSE now() + make_interval(secs => ttl) END,
                CASE WHEN held THEN make_interval(secs => ttl) END
         FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::uuid[], $6::float8[], $7::boolean[])
              AS n (tenant, scope, key, print, job, ttl, held)
         ON CONFLICT (tenant, scope, key) DO UPDATE
             SET fingerprint = EXCLUDED.fingerprint, job_id = EXCLUDED.job_id, expires_at = EXCLUDED.expires_at,
                 after_end = EXCLUDED.after_end
             WHERE k.expires_at <= now()
                OR {ITS_JOB_IS_OVER}",
    )))
    .bind(&tenants)
    .bind(&scopes)
    .bind(&keys)
    .bind(prints)
    .bind(ids)
    .bind(ttls)
    .bind(held)
    .execute(&mut *connection)
    .await?;
    let rows = sqlx::query(
        "SELECT k.tenant, k.scope, k.key, k.fingerprint, k.job_id FROM idempotency_keys k
         JOIN unnest($1::text[], $2::text[], $3::text[]) AS n (tenant, scope, key) USING (tenant, scope, key)",
    )
    .bind(&tenants)
    .bind(&scopes)
    .bind(&keys)
    .fetch_all(connection)
    .await?;
    let mut standing: HashMap<Key<'_>, (Vec<u8>, Uuid)> = HashMap::new();
    for row in &rows {
        standing.insert(
            (row.try_get("tenant")?, row.try_get("scope")?, row.try_get("key")?),
            (row.try_get("fingerprint")?, row.try_get("job_id")?),
        );
    }
    for (i, job) in jobs.iter().enumerate() {
        let Some(key) = key_of(job) else { continue };
        let Some((print, holder)) = standing.get(&(key.0.clone(), key.1.as_str(), key.2.as_str())) else {
            continue;
        };
        if *holder == job.id.0 && replies[i].is_none() {
            continue;
        }
        if !matches!(
            replies[i],
            Some(
                Accepted::UnknownTenant
                    | Accepted::New(_)
                    | Accepted::UnknownBatch(_)
                    | Accepted::BatchSealed(_)
            )
        ) {
            let id = JobId(*holder);
            replies[i] = Some(if sealing::fingerprints(cipher, job).contains(print) {
                Accepted::Duplicate(id)
            } else {
                Accepted::Conflict(id)
            });
        }
    }
    Ok(())
}

/// The document id and order number of each job, given under the document row's lock. Those that are known are locked in id
/// order first, as whoever publishes locks them (PROTOCOL.md 3).
async fn order(
    connection: &mut PgConnection,
    jobs: &[&NewJob],
) -> Result<Vec<Option<(Uuid, i64)>>, sqlx::Error> {
    let mut wanted: BTreeMap<(String, String), i64> = BTreeMap::new();
    for job in jobs {
        if let Some(document) = &job.document {
            *wanted.entry((job.tenant.to_string(), document.clone())).or_default() +=
                i64::from(job.keep_order.is_none());
        }
    }
    if wanted.is_empty() {
        return Ok(vec![None; jobs.len()]);
    }
    let rows = sqlx::query(
        "WITH known AS MATERIALIZED (
             SELECT d.id FROM unnest((SELECT $2::text[]), $3::text[]) AS n (tenant, key)
             CROSS JOIN LATERAL (SELECT id FROM documents d WHERE d.tenant = n.tenant AND d.key = n.key OFFSET 0) AS d
         ), held AS MATERIALIZED (
             SELECT d.id FROM (SELECT id FROM known ORDER BY id) AS k
             CROSS JOIN LATERAL (SELECT d.id FROM documents d WHERE d.id = k.id FOR NO KEY UPDATE) AS d
         )
         INSERT INTO documents AS d (id, tenant, key, last_order)
         SELECT id, tenant, key, num FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[]) AS n (id, tenant, key, num)
         WHERE (SELECT count(*) FROM held) >= 0
         ON CONFLICT (tenant, key) DO UPDATE SET last_order = d.last_order + EXCLUDED.last_order
         RETURNING d.id, d.tenant, d.key, d.last_order",
    )
    .bind(wanted.keys().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
    .bind(wanted.keys().map(|(tenant, _)| tenant.clone()).collect::<Vec<_>>())
    .bind(wanted.keys().map(|(_, key)| key.clone()).collect::<Vec<_>>())
    .bind(wanted.values().copied().collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    let mut next: HashMap<(String, String), (Uuid, i64)> = HashMap::with_capacity(rows.len());
    for row in &rows {
        let key: (String, String) = (row.try_get("tenant")?, row.try_get("key")?);
        let given = wanted.get(&key).copied().unwrap_or_default();
        next.insert(key, (row.try_get("id")?, row.try_get::<i64, _>("last_order")? - given));
    }
    Ok(jobs
        .iter()
        .map(|job| {
            let place = next.get_mut(&(job.tenant.to_string(), job.document.clone()?))?;
            if job.keep_order.is_none() {
                place.1 += 1;
            }
            Some((place.0, job.keep_order.unwrap_or(place.1)))
        })
        .collect())
}

/// Where the tenants were looked up before: one of them was removed since.
fn none_strange(strangers: &[String]) -> Result<(), StoreError> {
    if strangers.is_empty() {
        return Ok(());
    }
    let message = format!("there is no tenant {}", strangers.join(", "));
    Err(StoreError::new(Dependency::Postgres, Class::Data, message))
}

/// Inserts rows and returns the tenants that don't exist, whose rows it leaves out. A row that is there already is an
/// earlier try of the same call (PROTOCOL.md 20).
async fn insert(
    connection: &mut PgConnection,
    cipher: &PayloadCipher,
    jobs: &[&NewJob],
    places: &[Option<(Uuid, i64)>],
    dispatched: bool,
) -> Result<Vec<String>, StoreError> {
    let (payloads, keys): (Vec<Value>, Vec<Option<String>>) =
        jobs.iter().map(|job| sealing::seal_payload(cipher, job)).collect::<Result<_, _>>()?;
    let text = |f: &dyn Fn(&NewJob) -> String| jobs.iter().map(|job| f(job)).collect::<Vec<_>>();
    let strangers = sqlx::query_scalar(
        "WITH j AS (
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::smallint[], $5::text[], $6::jsonb[], $7::timestamptz[],
                     $8::integer[], $9::integer[], $10::uuid[], $11::bigint[], $12::uuid[], $13::uuid[], $14::text[], $15::text[], $16::uuid[], $17::text[])
              AS j (id, kind, queue, priority, tenant, payload, run_at, max_attempts, timeout_ms, document_id, doc_order,
                    parent, replay_of, traceparent, tracestate, batch_id, key_id)
         ), known AS (
            SELECT id FROM tenants WHERE id = ANY($5)
         ), new AS (
            INSERT INTO jobs (id, kind, queue, priority, tenant, payload, run_at, max_attempts, timeout_ms, document_id,
                              doc_order, parent, replay_of, traceparent, tracestate, batch_id, payload_key_id, dispatched_at)
            SELECT j.id, kind, queue, priority, tenant, payload, coalesce(run_at, now()), max_attempts, timeout_ms, document_id,
                   doc_order, parent, replay_of, traceparent, tracestate, batch_id, key_id, CASE WHEN $18 THEN now() END
            FROM j JOIN known ON known.id = j.tenant
            ORDER BY j.id
            ON CONFLICT (id) DO NOTHING
         )
         SELECT DISTINCT tenant FROM j WHERE tenant NOT IN (SELECT id FROM known)",
    )
    .bind(jobs.iter().map(|job| job.id.0).collect::<Vec<_>>())
    .bind(text(&|job| job.kind.clone()))
    .bind(text(&|job| job.queue.to_string()))
    .bind(jobs.iter().map(|job| i16::from(job.priority.get())).collect::<Vec<_>>())
    .bind(text(&|job| job.tenant.to_string()))
    .bind(payloads)
    .bind(jobs.iter().map(|job| job.run_at).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.max_attempts).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| i32::try_from(job.timeout.as_millis()).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .bind(places.iter().map(|p| p.map(|p| p.0)).collect::<Vec<_>>())
    .bind(places.iter().map(|p| p.map(|p| p.1)).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.parent.map(|id| id.0)).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.replay_of.map(|id| id.0)).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.trace.as_ref().map(|t| t.traceparent.clone())).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.trace.as_ref().and_then(|t| t.tracestate.clone())).collect::<Vec<_>>())
    .bind(jobs.iter().map(|job| job.batch.map(|id| id.0)).collect::<Vec<_>>())
    .bind(keys)
    .bind(dispatched)
    .fetch_all(connection)
    .await?;
    Ok(strangers)
}
