//! The stage: the saga's row, the staged version and its chunks, in one transaction with many others.

use std::{collections::HashSet, time::Duration};

use async_trait::async_trait;
use queue::JobId;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Fence, Postgres, lock_alive};
use crate::{
    coalescing::Batch,
    error::{Dependency, StoreError},
};

/// A saga run's first row in the log.
#[derive(Debug, Clone)]
pub struct NewSaga {
    /// The run.
    pub id: Uuid,
    /// Its job.
    pub job_id: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// Kind of the saga.
    pub kind: String,
    /// Version of its definition.
    pub definition_version: i32,
    /// Owner.
    pub tenant: String,
    /// First step not done once this is committed.
    pub next_step: i16,
    /// The saga's typed data.
    pub data: Value,
}

/// A version to stage.
#[derive(Debug, Clone)]
pub struct NewVersion {
    /// Fresh for this run.
    pub id: Uuid,
    /// Its document.
    pub document_id: Uuid,
    /// The job's order number; for a re-embedding, that of the version copied.
    pub doc_order: i64,
    /// For people.
    pub title: Option<String>,
    /// The whole text.
    pub body: String,
    /// A JSON object of the caller's.
    pub metadata: Value,
    /// SHA-256 of the body.
    pub content_hash: Vec<u8>,
    /// Embedding model.
    pub model: String,
    /// Vector length.
    pub dimensions: i32,
    /// Qdrant collection.
    pub collection: String,
    /// Texts of the chunks, in order.
    pub chunks: Vec<String>,
}

/// What is to become of a staged version.
#[derive(Debug, Clone)]
pub struct StagedVersion {
    /// Its document.
    pub document_id: Uuid,
    /// Embedding model.
    pub model: String,
    /// Vector length.
    pub dimensions: usize,
    /// Qdrant collection.
    pub collection: String,
}

/// One saga's stage.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The run that begins.
    pub saga: NewSaga,
    /// What it stages.
    pub version: NewVersion,
}

/// The coalesced stage. The reply is `false` where the fence refused.
#[derive(Debug, Clone)]
pub struct StageBatch(pub Postgres);

#[async_trait]
impl Batch for StageBatch {
    type Item = std::sync::Arc<Stage>;
    type Reply = bool;
    const OP: &'static str = "stage";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<bool>, StoreError> {
        let mut tx = self.0.begin().await?;
        let held: Vec<_> = items.iter().map(|item| (item.saga.job_id, item.saga.fence)).collect();
        let alive = lock_alive(&mut tx, &held).await?;
        let live: Vec<&Stage> =
            items.iter().filter(|item| alive.contains_key(&item.saga.job_id)).map(AsRef::as_ref).collect();
        if !live.is_empty() {
            let sagas: Vec<&NewSaga> = live.iter().map(|item| &item.saga).collect();
            insert_sagas(&mut tx, &sagas).await?;
            let staged = insert_versions(&mut tx, &live).await?;
            let staged: Vec<&Stage> =
                live.into_iter().filter(|item| staged.contains(&item.version.id)).collect();
            insert_chunks(&mut tx, &staged).await?;
        }
        crate::fault_point!("ingest.stage.inside");
        tx.commit().await?;
        Ok(items.iter().map(|item| alive.contains_key(&item.saga.job_id)).collect())
    }
}

/// A staged version that is to be withdrawn.
#[derive(Debug, Clone, Copy)]
pub struct Abandoned {
    /// Whose run withdraws it.
    pub job: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// The version.
    pub version: Uuid,
    /// How long late writers may still put something of it into the other stores.
    pub sweep_after: Duration,
}

/// The coalesced withdrawal. The reply is `false` where the fence refused.
#[derive(Debug, Clone)]
pub struct AbandonBatch(pub Postgres);

#[async_trait]
impl Batch for AbandonBatch {
    type Item = Abandoned;
    type Reply = bool;
    const OP: &'static str = "unstage";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<bool>, StoreError> {
        self.0.abandon_all(items).await
    }
}

/// The coalesced first row of sagas whose first step doesn't write it. The reply is `false` where the fence refused.
#[derive(Debug, Clone)]
pub struct BeginBatch(pub Postgres);

#[async_trait]
impl Batch for BeginBatch {
    type Item = std::sync::Arc<NewSaga>;
    type Reply = bool;
    const OP: &'static str = "begin";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<bool>, StoreError> {
        self.0.begin_sagas(&items.iter().map(AsRef::as_ref).collect::<Vec<_>>()).await
    }
}

/// Writes the sagas' first rows. The caller holds the fences. A row that is there already is an earlier try of the same
/// call whose reply was lost.
pub(super) async fn insert_sagas(
    connection: &mut PgConnection,
    sagas: &[&NewSaga],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, next_step, data, fence)
         SELECT id, job_id, kind, version, tenant, 'running', next_step, data, fence
         FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::text[], $4::integer[], $5::text[], $6::smallint[], $7::jsonb[], $8::bigint[])
              AS s (id, job_id, kind, version, tenant, next_step, data, fence)
         ORDER BY id
         ON CONFLICT (id) DO NOTHING",
    )
    .bind(sagas.iter().map(|s| s.id).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.job_id.0).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.kind.clone()).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.definition_version).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.tenant.clone()).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.next_step).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.data.clone()).collect::<Vec<_>>())
    .bind(sagas.iter().map(|s| s.fence.0).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes the versions and returns those that were not there. A run that has turned back stages nothing any more: its caller is
/// gone, and nothing would withdraw the version.
async fn insert_versions(
    connection: &mut PgConnection,
    items: &[&Stage],
) -> Result<HashSet<Uuid>, sqlx::Error> {
    let versions: Vec<&NewVersion> = items.iter().map(|item| &item.version).collect();
    let staged: Vec<Uuid> = sqlx::query_scalar(
        "INSERT INTO document_versions
             (id, document_id, tenant, doc_order, saga_id, state, title, body, metadata, content_hash, model, dimensions,
              collection, chunk_count)
         SELECT id, document_id, tenant, doc_order, saga_id, 'staged', title, body, metadata, content_hash, model,
                dimensions, collection, chunk_count
         FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::text[], $4::bigint[], $5::uuid[], $6::text[], $7::text[], $8::jsonb[],
                     $9::bytea[], $10::text[], $11::integer[], $12::text[], $13::integer[])
              AS v (id, document_id, tenant, doc_order, saga_id, title, body, metadata, content_hash, model, dimensions,
                    collection, chunk_count)
         WHERE (SELECT s.state FROM sagas s WHERE s.id = v.saga_id) = 'running'
         ORDER BY id
         ON CONFLICT (id) DO NOTHING
         RETURNING id",
    )
    .bind(versions.iter().map(|v| v.id).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.document_id).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.saga.tenant.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.doc_order).collect::<Vec<_>>())
    .bind(items.iter().map(|i| i.saga.id).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.title.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.body.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.metadata.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.content_hash.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.model.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.dimensions).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.collection.clone()).collect::<Vec<_>>())
    .bind(versions.iter().map(|v| v.chunks.len() as i32).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    Ok(staged.into_iter().collect())
}

async fn insert_chunks(connection: &mut PgConnection, items: &[&Stage]) -> Result<(), sqlx::Error> {
    let (mut ids, mut numbers, mut bodies) = (vec![], vec![], vec![]);
    for version in items.iter().map(|item| &item.version) {
        for (no, body) in version.chunks.iter().enumerate() {
            ids.push(version.id);
            numbers.push(no as i32);
            bodies.push(body.clone());
        }
    }
    sqlx::query(
        "INSERT INTO chunks (version_id, no, body)
         SELECT * FROM unnest((SELECT $1::uuid[]), $2::integer[], $3::text[]) ON CONFLICT DO NOTHING",
    )
    .bind(ids)
    .bind(numbers)
    .bind(bodies)
    .execute(connection)
    .await?;
    Ok(())
}

impl Postgres {
    /// Writes the first row of a saga whose first step does not do so itself. `false`: the fence refused.
    pub async fn begin_saga(&self, saga: &NewSaga) -> Result<bool, StoreError> {
        Ok(self.begin_sagas(&[saga]).await? == [true])
    }

    /// [`begin_saga`](Self::begin_saga) for many, in one statement; answers in their order. A row that is there already is an
    /// earlier try of the same call whose reply was lost.
    async fn begin_sagas(&self, sagas: &[&NewSaga]) -> Result<Vec<bool>, StoreError> {
        let alive: Vec<Uuid> = sqlx::query_scalar(crate::fenced_sql!(
            "WITH held AS (
                SELECT * FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::text[], $4::integer[], $5::text[], $6::smallint[], $7::jsonb[], $8::bigint[])
                     AS s (id, job_id, kind, version, tenant, next_step, data, fence)
                ORDER BY job_id
             ), alive AS (
                SELECT j.id FROM held CROSS JOIN LATERAL (
                    SELECT j.id FROM jobs j
                    WHERE j.id = held.job_id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
                ) AS j
             ), begun AS (
                INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, next_step, data, fence)
                SELECT held.id, held.job_id, kind, version, tenant, 'running', next_step, data, fence
                FROM held JOIN alive ON alive.id = held.job_id ORDER BY held.id
                ON CONFLICT (id) DO NOTHING
             )
             SELECT id FROM alive",
            "j.fence = held.fence AND j.state = 'running'"
        ))
        .bind(sagas.iter().map(|s| s.id).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.job_id.0).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.kind.as_str()).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.definition_version).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.tenant.as_str()).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.next_step).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| &s.data).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.fence.0).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        crate::fault_point!("engine.begin.inside");
        let alive: HashSet<Uuid> = alive.into_iter().collect();
        Ok(sagas.iter().map(|saga| alive.contains(&saga.job_id.0)).collect())
    }

    /// The texts of a version's chunks, in order.
    pub async fn chunks(&self, version: Uuid) -> Result<Vec<String>, StoreError> {
        Ok(sqlx::query_scalar("SELECT body FROM chunks WHERE version_id = $1 ORDER BY no")
            .bind(version)
            .fetch_all(&self.pool)
            .await?)
    }

    /// What a tenant's staged version is to be embedded as.
    pub async fn staged_version(
        &self,
        tenant: &str,
        version: Uuid,
    ) -> Result<Option<StagedVersion>, StoreError> {
        let row: Option<(Uuid, String, i32, String)> = sqlx::query_as(
            "SELECT document_id, model, dimensions, collection FROM document_versions
             WHERE id = $1 AND tenant = $2 AND state = 'staged'",
        )
        .bind(version)
        .bind(tenant)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|(document_id, model, dimensions, collection)| StagedVersion {
            document_id,
            model,
            dimensions: dimensions.unsigned_abs() as usize,
            collection,
        }))
    }

    /// Withdraws a staged version: readers never saw it and never will; the janitor removes what a late writer may still
    /// put into the other stores. `false`: the fence refused.
    pub async fn abandon_version(
        &self,
        job: JobId,
        fence: Fence,
        version: Uuid,
        sweep_after: Duration,
    ) -> Result<bool, StoreError> {
        Ok(self.abandon_all(&[Abandoned { job, fence, version, sweep_after }]).await? == [true])
    }

    /// [`abandon_version`](Self::abandon_version) for many, in one transaction; answers in their order.
    async fn abandon_all(&self, items: &[Abandoned]) -> Result<Vec<bool>, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("SELECT FROM document_versions WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE")
            .bind(items.iter().map(|item| item.version).collect::<Vec<_>>())
            .execute(&mut *tx)
            .await?;
        let held: Vec<_> = items.iter().map(|item| (item.job, item.fence)).collect();
        let alive = lock_alive(&mut tx, &held).await?;
        let live: Vec<&Abandoned> = items.iter().filter(|item| alive.contains_key(&item.job)).collect();
        if !live.is_empty() {
            let versions: Vec<Uuid> = live.iter().map(|item| item.version).collect();
            sqlx::query("DELETE FROM chunks WHERE version_id = ANY($1)")
                .bind(&versions)
                .execute(&mut *tx)
                .await?;
            sqlx::query(
                "UPDATE document_versions v SET state = 'abandoned', body = NULL, sweep_after = now() + make_interval(secs => live.sweep_after)
                 FROM unnest((SELECT $1::uuid[]), $2::float8[]) AS live (id, sweep_after)
                 WHERE v.id = live.id AND v.state = 'staged'",
            )
            .bind(&versions)
            .bind(live.iter().map(|item| item.sweep_after.as_secs_f64()).collect::<Vec<_>>())
            .execute(&mut *tx)
            .await?;
        }
        crate::fault_point!("ingest.unstage.inside");
        tx.commit().await?;
        Ok(items.iter().map(|item| alive.contains_key(&item.job)).collect())
    }
}
