//! The delete saga's writes: the tombstone, which is its pivot, and the removal of text (PROTOCOL.md 9).

use std::time::Duration;

use queue::JobId;
use sqlx::Row;
use uuid::Uuid;

use super::{Fence, Postgres, lock_alive, publish::Published, stage::NewSaga};
use crate::{error::StoreError, fault::without};

/// A version whose points, cache entry and text must go.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Doomed {
    /// The version.
    pub version: Uuid,
    /// Its Qdrant collection.
    pub collection: String,
    /// Its number of points.
    pub chunk_count: i32,
}

impl Postgres {
    /// The pivot of a delete: from this commit on, readers get 404, and every ingest with a lower order number is
    /// superseded. Begins the saga's log in the same transaction, with the versions to erase in `data`.
    pub async fn bury(
        &self,
        saga: &NewSaga,
        document: Uuid,
        order: i64,
        sweep_after: Duration,
    ) -> Result<(Published, Vec<Doomed>), StoreError> {
        let mut tx = self.begin().await?;
        let row =
            sqlx::query("SELECT current_order, deleted_order FROM documents WHERE id = $1 FOR NO KEY UPDATE")
                .bind(document)
                .fetch_one(&mut *tx)
                .await?;
        let settled: i64 = row.try_get("current_order")?;
        let deleted: Option<i64> = row.try_get("deleted_order")?;
        sqlx::query("SELECT FROM document_versions WHERE document_id = $1 ORDER BY id FOR NO KEY UPDATE")
            .bind(document)
            .execute(&mut *tx)
            .await?;
        match lock_alive(&mut tx, &[(saga.job_id, saga.fence)]).await?.get(&saga.job_id) {
            None => return Ok((Published::LeaseLost, vec![])),
            Some(job) if job.cancel_requested => return Ok((Published::Cancelled, vec![])),
            Some(_) => {}
        }
        // An earlier try of this call whose reply was lost has done it all.
        let done: Option<serde_json::Value> = sqlx::query_scalar("SELECT data FROM sagas WHERE id = $1")
            .bind(saga.id)
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(mut data) = done {
            let doomed =
                serde_json::from_value(data["doomed"].take()).map_err(|e| sqlx::Error::Decode(e.into()))?;
            return Ok((Published::Yes, doomed));
        }
        let newer = settled > order || deleted.is_some_and(|deleted| deleted >= order);
        if newer && !without("bury.order") {
            return Ok((Published::Superseded, vec![]));
        }
        sqlx::query(
            "UPDATE documents SET current_version = NULL, current_order = $2, deleted_order = $2, updated_at = now() WHERE id = $1",
        )
        .bind(document)
        .bind(order)
        .execute(&mut *tx)
        .await?;
        // Staged versions stay with their own runs, which this tombstone supersedes; everything readers could see goes.
        let rows = sqlx::query(
            "UPDATE document_versions SET state = 'erased', sweep_after = now() + make_interval(secs => $2), sweeps = 0, sweep_missed = NULL
             WHERE document_id = $1 AND state IN ('published', 'retired')
             RETURNING id, collection, chunk_count",
        )
        .bind(document)
        .bind(sweep_after.as_secs_f64())
        .fetch_all(&mut *tx)
        .await?;
        let doomed = rows
            .iter()
            .map(|row| {
                Ok(Doomed {
                    version: row.try_get("id")?,
                    collection: row.try_get("collection")?,
                    chunk_count: row.try_get("chunk_count")?,
                })
            })
            .collect::<Result<Vec<_>, sqlx::Error>>()?;
        // A retired version's own saga waited for its sweep; the deletion does that work now.
        sqlx::query(
            "UPDATE sagas s SET state = 'completed', finished_at = now(), updated_at = now()
             FROM document_versions v WHERE v.id = ANY($1) AND v.retired_by = s.id AND s.state = 'finishing'",
        )
        .bind(doomed.iter().map(|d| d.version).collect::<Vec<_>>())
        .execute(&mut *tx)
        .await?;
        let saga =
            NewSaga { data: serde_json::json!({ "doomed": doomed, "document": document }), ..saga.clone() };
        super::stage::insert_sagas(&mut tx, &[&saga]).await?;
        // The tombstone is the pivot: whoever doesn't know this kind's steps reads it here.
        sqlx::query("UPDATE sagas SET pivot_at = now() WHERE id = $1")
            .bind(saga.id)
            .execute(&mut *tx)
            .await?;
        crate::fault_point!("delete.tombstone.inside");
        tx.commit().await?;
        Ok((Published::Yes, doomed))
    }

    /// Removes the text of erased versions. `false`: the fence refused.
    pub async fn erase_text(&self, job: JobId, fence: Fence, versions: &[Uuid]) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("SELECT FROM document_versions WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE")
            .bind(versions)
            .execute(&mut *tx)
            .await?;
        if lock_alive(&mut tx, &[(job, fence)]).await?.is_empty() {
            return Ok(false);
        }
        sqlx::query("DELETE FROM chunks WHERE version_id = ANY($1)").bind(versions).execute(&mut *tx).await?;
        sqlx::query(
            "UPDATE document_versions SET body = NULL, title = NULL, metadata = '{}' WHERE id = ANY($1)",
        )
        .bind(versions)
        .execute(&mut *tx)
        .await?;
        crate::fault_point!("delete.erase.inside");
        tx.commit().await?;
        Ok(true)
    }
}
