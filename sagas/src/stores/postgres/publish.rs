//! The pivot of ingest and embed: readers see the new version from this commit on.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use queue::JobId;
use serde_json::Value;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Fence, Postgres, ending::insert_steps, lock_alive, take::StepRecord};
use crate::{
    coalescing::Batch,
    error::{Class, Dependency, StoreError},
    fault::without,
};

/// When the pivot is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// No job with a higher order number has settled the document (PROTOCOL.md 8).
    Order(i64),
    /// The document still shows the version that was copied: a re-embedding must never win over new content. The copy
    /// keeps the copied version's order number.
    Replaces(Uuid),
}

/// One saga's pivot.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The job, which succeeds with this commit.
    pub job_id: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// The run.
    pub saga_id: Uuid,
    /// The staged version.
    pub version: Uuid,
    /// Its document.
    pub document_id: Uuid,
    /// When it may.
    pub condition: Condition,
    /// SHA-256 over the version's vectors.
    pub vectors_hash: Vec<u8>,
    /// The job's result.
    pub result: Value,
    /// The run's steps, this one last; its end is the flush's.
    pub steps: Vec<StepRecord>,
    /// The first step after this one.
    pub next_step: i16,
    /// How long the version that is replaced stays for readers that are under way.
    pub grace: Duration,
}

/// What became of a pivot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// Readers see the new version; the job has succeeded.
    Yes,
    /// The condition does not hold.
    Superseded,
    /// A person asked for the job's end before the pivot.
    Cancelled,
    /// The fence refused.
    LeaseLost,
}

/// The coalesced pivot.
#[derive(Debug, Clone)]
pub struct PublishBatch(pub Postgres);

#[derive(Clone)]
struct Shown {
    version: Option<Uuid>,
    order: i64,
    deleted_order: Option<i64>,
}

#[async_trait]
impl Batch for PublishBatch {
    type Item = Arc<Publish>;
    type Reply = Published;
    const OP: &'static str = "publish";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Published>, StoreError> {
        let mut tx = self.0.begin().await?;
        let mut documents =
            lock_documents(&mut tx, items.iter().map(|item| item.document_id).collect()).await?;
        lock_versions(
            &mut tx,
            items.iter().map(|i| i.version).chain(documents.values().filter_map(|d| d.version)),
        )
        .await?;
        let held: Vec<_> = items.iter().map(|item| (item.job_id, item.fence)).collect();
        let alive = lock_alive(&mut tx, &held).await?;

        let mut retired: Vec<(Uuid, Uuid, f64)> = vec![];
        let mut shown: HashMap<Uuid, (Uuid, i64)> = HashMap::new();
        let mut published: Vec<(&Publish, bool)> = vec![];
        let mut skipped_versions: HashSet<Uuid> = HashSet::new();
        let mut replies = Vec::with_capacity(items.len());
        for item in items {
            let document = documents.get_mut(&item.document_id);
            replies.push(match (alive.get(&item.job_id), document) {
                (None, _) => Published::LeaseLost,
                (Some(job), _) if job.cancel_requested && !without("publish.cancel") => Published::Cancelled,
                (Some(_), Some(document)) if allowed(item.condition, document) => {
                    if let Condition::Order(order) = item.condition {
                        document.order = order;
                    }
                    let old = document.version.replace(item.version);
                    if let Some(old) = old {
                        retired.push((old, item.saga_id, item.grace.as_secs_f64()));
                        if shown.get(&item.document_id).is_some_and(|(version, _)| *version == old) {
                            skipped_versions.insert(old);
                        }
                    }
                    shown.insert(item.document_id, (item.version, document.order));
                    published.push((item, old.is_some()));
                    Published::Yes
                }
                _ => Published::Superseded,
            });
        }
        if !published.is_empty() {
            write_versions(&mut tx, &retired, &published, &skipped_versions).await?;
            show(&mut tx, &shown).await?;
            end(&mut tx, &published).await?;
        }
        crate::fault_point!("ingest.publish.inside");
        tx.commit().await?;
        Ok(replies)
    }
}

fn allowed(condition: Condition, document: &Shown) -> bool {
    match condition {
        Condition::Order(order) => {
            (document.order < order && document.deleted_order.is_none_or(|deleted| deleted < order))
                || without("publish.order")
        }
        Condition::Replaces(version) => document.version == Some(version) || without("publish.replaces"),
    }
}

async fn lock_documents(
    connection: &mut PgConnection,
    ids: Vec<Uuid>,
) -> Result<HashMap<Uuid, Shown>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT id, current_version, current_order, deleted_order FROM documents
         WHERE id = ANY((SELECT $1::uuid[])::uuid[]) ORDER BY id FOR NO KEY UPDATE",
    )
    .bind(ids)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let shown = Shown {
                version: row.try_get("current_version")?,
                order: row.try_get("current_order")?,
                deleted_order: row.try_get("deleted_order")?,
            };
            Ok((row.try_get("id")?, shown))
        })
        .collect()
}

async fn lock_versions(
    connection: &mut PgConnection,
    ids: impl Iterator<Item = Uuid>,
) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT FROM document_versions WHERE id = ANY((SELECT $1::uuid[])::uuid[]) ORDER BY id FOR NO KEY UPDATE")
        .bind(ids.collect::<Vec<_>>())
        .execute(connection)
        .await?;
    Ok(())
}

/// Retires the versions that readers saw, then publishes the new ones. A version both published and replaced within one
/// batch goes straight to `retired`.
async fn write_versions(
    connection: &mut PgConnection,
    retired: &[(Uuid, Uuid, f64)],
    published: &[(&Publish, bool)],
    skipped: &HashSet<Uuid>,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE document_versions v SET state = 'retired', retired_by = r.saga, sweep_after = now() + make_interval(secs => r.grace)
         FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::float8[]) AS r (id, saga, grace) WHERE v.id = r.id",
    )
    .bind(retired.iter().map(|r| r.0).collect::<Vec<_>>())
    .bind(retired.iter().map(|r| r.1).collect::<Vec<_>>())
    .bind(retired.iter().map(|r| r.2).collect::<Vec<_>>())
    .execute(&mut *connection)
    .await?;
    let new: Vec<&Publish> =
        published.iter().map(|(item, _)| *item).filter(|item| !skipped.contains(&item.version)).collect();
    let done = sqlx::query(
        "UPDATE document_versions v SET state = 'published', published_at = now(), vectors_hash = p.hash
         FROM unnest((SELECT $1::uuid[]), $2::bytea[]) AS p (id, hash) WHERE v.id = p.id AND v.state = 'staged'",
    )
    .bind(new.iter().map(|item| item.version).collect::<Vec<_>>())
    .bind(new.iter().map(|item| item.vectors_hash.clone()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    if done.rows_affected() != new.len() as u64 {
        // A fence holder's own staged version can't be missing. Whose it is the batch finds out by being split.
        let why = format!("{} of {} versions were staged at their publish", done.rows_affected(), new.len());
        return Err(StoreError::new(Dependency::Postgres, Class::Data, why));
    }
    Ok(())
}

async fn show(connection: &mut PgConnection, shown: &HashMap<Uuid, (Uuid, i64)>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE documents d SET current_version = s.version, current_order = s.num, updated_at = now()
         FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::bigint[]) AS s (id, version, num) WHERE d.id = s.id",
    )
    .bind(shown.keys().copied().collect::<Vec<_>>())
    .bind(shown.values().map(|s| s.0).collect::<Vec<_>>())
    .bind(shown.values().map(|s| s.1).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Ends the sagas and their jobs. A saga that replaced a version stays `finishing` until that version is swept.
async fn end(connection: &mut PgConnection, published: &[(&Publish, bool)]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE sagas s SET state = CASE WHEN e.retires THEN 'finishing' ELSE 'completed' END,
                finished_at = CASE WHEN e.retires THEN NULL ELSE now() END,
                next_step = e.next_step, updated_at = now(), fence = e.fence
         FROM unnest((SELECT $1::uuid[]), $2::boolean[], $3::bigint[], $4::smallint[]) AS e (id, retires, fence, next_step)
         WHERE s.id = e.id",
    )
    .bind(published.iter().map(|(item, _)| item.saga_id).collect::<Vec<_>>())
    .bind(published.iter().map(|(_, retires)| *retires).collect::<Vec<_>>())
    .bind(published.iter().map(|(item, _)| item.fence.0).collect::<Vec<_>>())
    .bind(published.iter().map(|(item, _)| item.next_step).collect::<Vec<_>>())
    .execute(&mut *connection)
    .await?;
    let ended_at = chrono::Utc::now();
    let steps: Vec<Vec<StepRecord>> = published
        .iter()
        .map(|(item, _)| {
            let mut steps = item.steps.clone();
            if let Some(pivot) = steps.last_mut() {
                pivot.ended_at = ended_at;
            }
            steps
        })
        .collect();
    let runs: Vec<_> = published
        .iter()
        .zip(&steps)
        .map(|((item, _), steps)| (item.saga_id, item.fence, steps.as_slice()))
        .collect();
    insert_steps(connection, &runs).await?;
    sqlx::query(
        "UPDATE jobs j SET state = 'succeeded', result = nullif(e.result, 'null'::jsonb), finished_at = now(), last_error = NULL
         FROM unnest((SELECT $1::uuid[]), $2::jsonb[]) AS e (id, result) WHERE j.id = e.id",
    )
    .bind(published.iter().map(|(item, _)| item.job_id.0).collect::<Vec<_>>())
    .bind(published.iter().map(|(item, _)| item.result.clone()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}
