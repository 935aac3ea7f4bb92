//! What a run says to the log on its way forward: the data that it keeps, and that its pivot is about to begin.
//!
//! A flush may go on when its callers are gone. Each of these writes finds out for itself whether it comes too late: when the run
//! has turned back, or has gone further.

use std::{collections::HashSet, sync::Arc};

use async_trait::async_trait;
use serde_json::Value;
use uuid::Uuid;

use super::{
    Postgres,
    ending::{Run, log_runs},
    lock_alive,
};
use crate::{
    coalescing::Batch,
    error::{Dependency, StoreError},
};

/// How far a run is.
#[derive(Debug, Clone)]
pub struct Advance {
    /// The run.
    pub run: Run,
    /// The first step that is not done.
    pub next_step: i16,
    /// The data as it is now.
    pub data: Value,
}

/// The coalesced keeping of data. The reply is `false` where the fence refused.
#[derive(Debug, Clone)]
pub struct KeepBatch(pub Postgres);

#[async_trait]
impl Batch for KeepBatch {
    type Item = Arc<Advance>;
    type Reply = bool;
    const OP: &'static str = "keep";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<bool>, StoreError> {
        self.0.keep_all(&items.iter().map(AsRef::as_ref).collect::<Vec<_>>()).await
    }
}

/// The coalesced announcement of pivots. The reply is as [`Postgres::begin_pivot`]'s.
#[derive(Debug, Clone)]
pub struct PivotBatch(pub Postgres);

#[async_trait]
impl Batch for PivotBatch {
    type Item = Arc<Advance>;
    type Reply = Option<bool>;
    const OP: &'static str = "pivot";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Option<bool>>, StoreError> {
        self.0.begin_pivots(&items.iter().map(AsRef::as_ref).collect::<Vec<_>>()).await
    }
}

impl Postgres {
    /// Keeps what a run has done so far, without giving it back. `false`: the fence refused.
    pub async fn keep(&self, run: &Run, next_step: i16, data: &Value) -> Result<bool, StoreError> {
        let one = Advance { run: run.clone(), next_step, data: data.clone() };
        Ok(self.keep_all(&[&one]).await? == [true])
    }

    /// [`keep`](Self::keep) for many, in one statement; answers in their order.
    async fn keep_all(&self, items: &[&Advance]) -> Result<Vec<bool>, StoreError> {
        let runs: Vec<&Run> = items.iter().map(|item| &item.run).collect();
        log_runs(&self.pool, &runs).await?;
        let kept: Vec<Uuid> = sqlx::query_scalar(crate::fenced_sql!(
            "WITH alive AS (
                SELECT held.* FROM (
                    SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::uuid[], $4::smallint[], $5::jsonb[])
                         AS held (id, fence, saga, next_step, data)
                    ORDER BY id
                ) AS held
                CROSS JOIN LATERAL (
                    SELECT j.id FROM jobs j
                    WHERE j.id = held.id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
                ) AS j
             )
             UPDATE sagas s SET next_step = alive.next_step, data = alive.data, done = '{}', updated_at = now(), fence = alive.fence
             FROM alive
             WHERE s.id = alive.saga AND s.job_id = alive.id AND s.state = 'running' AND s.next_step <= alive.next_step
             RETURNING alive.id",
            "j.fence = held.fence AND j.state = 'running'"
        ))
        .bind(items.iter().map(|item| item.run.job_id.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.run.fence.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.run.saga_id).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.next_step).collect::<Vec<_>>())
        .bind(items.iter().map(|item| &item.data).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        crate::fault_point!("engine.keep.inside");
        let kept: HashSet<Uuid> = kept.into_iter().collect();
        Ok(items.iter().map(|item| kept.contains(&item.run.job_id.0)).collect())
    }

    /// Records that a pivot which doesn't commit itself is about to begin, unless a person asked for the job's end: then
    /// `Some(false)`. From this commit on the run only goes forward. `None`: the fence refused.
    pub async fn begin_pivot(
        &self,
        run: &Run,
        next_step: i16,
        data: &Value,
    ) -> Result<Option<bool>, StoreError> {
        let one = Advance { run: run.clone(), next_step, data: data.clone() };
        Ok(self.begin_pivots(&[&one]).await?.remove(0))
    }

    /// [`begin_pivot`](Self::begin_pivot) for many, in one transaction; answers in their order.
    async fn begin_pivots(&self, items: &[&Advance]) -> Result<Vec<Option<bool>>, StoreError> {
        let mut tx = self.begin().await?;
        let held: Vec<_> = items.iter().map(|item| (item.run.job_id, item.run.fence)).collect();
        let alive = lock_alive(&mut tx, &held).await?;
        let live: Vec<&Advance> =
            items.iter().filter(|item| alive.contains_key(&item.run.job_id)).copied().collect();
        let begun: Vec<Uuid> = if live.is_empty() {
            vec![]
        } else {
            log_runs(&mut *tx, &live.iter().map(|item| &item.run).collect::<Vec<_>>()).await?;
            let wanted = |item: &&Advance| alive[&item.run.job_id].cancel_requested;
            sqlx::query_scalar(
                "UPDATE sagas s SET pivot_at = coalesce(pivot_at, now()), next_step = live.next_step, data = live.data, done = '{}',
                        updated_at = now(), fence = live.fence
                 FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::smallint[], $4::jsonb[], $5::boolean[])
                      AS live (saga, fence, next_step, data, cancel_wanted)
                 WHERE s.id = live.saga AND s.state = 'running' AND s.next_step <= live.next_step
                   AND (s.pivot_at IS NOT NULL OR NOT live.cancel_wanted)
                 RETURNING s.job_id",
            )
            .bind(live.iter().map(|item| item.run.saga_id).collect::<Vec<_>>())
            .bind(live.iter().map(|item| item.run.fence.0).collect::<Vec<_>>())
            .bind(live.iter().map(|item| item.next_step).collect::<Vec<_>>())
            .bind(live.iter().map(|item| &item.data).collect::<Vec<_>>())
            .bind(live.iter().map(wanted).collect::<Vec<_>>())
            .fetch_all(&mut *tx)
            .await?
        };
        crate::fault_point!("engine.pivot.inside");
        tx.commit().await?;
        let begun: HashSet<Uuid> = begun.into_iter().collect();
        Ok(items
            .iter()
            .map(|item| alive.contains_key(&item.run.job_id).then(|| begun.contains(&item.run.job_id.0)))
            .collect())
    }
}
