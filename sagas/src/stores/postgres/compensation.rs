//! The decision to compensate, committed before the first compensating call (PROTOCOL.md 6).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Postgres,
    ending::{Run, Verdict},
};
use crate::{
    coalescing::Batch,
    error::{Dependency, StoreError},
};

/// What became of the decision to compensate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The run goes backward from now on.
    Back,
    /// Its pivot has committed, and only the answer was lost: it goes forward.
    TooLate,
    /// The fence refused.
    LeaseLost,
}

/// A run that is to go backward.
#[derive(Debug, Clone)]
pub struct Turning {
    /// The run.
    pub run: Run,
    /// How the job ends then.
    pub verdict: Verdict,
    /// What turned it.
    pub error: String,
    /// The data as it is now: a compensation that is delivered again has what the first one had. `None`: as the log has it.
    pub data: Option<Value>,
    /// The pivot's place among the steps.
    pub pivot: i16,
    /// Version of the saga's definition, for a run that the log doesn't know yet.
    pub definition_version: i32,
}

/// The coalesced decision.
#[derive(Debug, Clone)]
pub struct TurnBatch(pub Postgres);

#[async_trait]
impl Batch for TurnBatch {
    type Item = Arc<Turning>;
    type Reply = Turn;
    const OP: &'static str = "turn";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Turn>, StoreError> {
        self.0.turn_all(&items.iter().map(AsRef::as_ref).collect::<Vec<_>>()).await
    }
}

impl Postgres {
    /// Turns a run backward, for good, unless the log says that its pivot is done.
    pub async fn begin_compensation(
        &self,
        run: &Run,
        verdict: &Verdict,
        error: &str,
        data: Option<&Value>,
        pivot: i16,
        definition_version: i32,
    ) -> Result<Turn, StoreError> {
        let (run, verdict, error) = (run.clone(), verdict.clone(), error.to_owned());
        let one = Turning { run, verdict, error, data: data.cloned(), pivot, definition_version };
        Ok(self.turn_all(&[&one]).await?.remove(0))
    }

    /// [`begin_compensation`](Self::begin_compensation) for many, in one statement; answers in their order. A run that the log
    /// doesn't know is logged as turned: its first row may still be on its way, and must find that it comes too late.
    async fn turn_all(&self, items: &[&Turning]) -> Result<Vec<Turn>, StoreError> {
        let rows: Vec<(Uuid, bool)> = sqlx::query_as(crate::fenced_sql!(
            "WITH alive AS (
                SELECT held.*, j.* FROM (
                    SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::uuid[], $4::jsonb[], $5::text[], $6::jsonb[], $7::smallint[], $8::integer[])
                         AS held (id, fence, saga, verdict, error, data, pivot, version)
                    ORDER BY id
                ) AS held
                CROSS JOIN LATERAL (
                    SELECT j.kind, j.tenant, j.begun_version, j.taken_at FROM jobs j
                    WHERE j.id = held.id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
                ) AS j
             ), turned AS (
                UPDATE sagas s SET state = 'compensating', verdict = alive.verdict, error = alive.error, updated_at = now(),
                       fence = alive.fence, data = coalesce(alive.data, s.data)
                FROM alive
                WHERE s.id = alive.saga AND (s.state = 'compensating' OR (s.state = 'running' AND s.next_step <= alive.pivot))
                RETURNING s.id
             ), logged AS (
                INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, verdict, error, data, fence, created_at)
                SELECT saga, id, kind, coalesce(begun_version, version), tenant, 'compensating', verdict, error, data, fence, taken_at
                FROM alive WHERE saga IS NOT NULL AND NOT EXISTS (SELECT FROM sagas s WHERE s.id = alive.saga)
                ON CONFLICT DO NOTHING
                RETURNING id
             )
             SELECT alive.id, EXISTS (SELECT FROM turned WHERE turned.id = alive.saga) OR EXISTS (SELECT FROM logged WHERE logged.id = alive.saga)
             FROM alive",
            "j.fence = held.fence AND j.state = 'running'"
        ))
        .bind(items.iter().map(|item| item.run.job_id.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.run.fence.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.run.saga_id).collect::<Vec<_>>())
        .bind(items.iter().map(|item| json!(item.verdict)).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.error.as_str()).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.data.as_ref()).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.pivot).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.definition_version).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        crate::fault_point!("engine.turn.inside");
        let turned: HashMap<Uuid, bool> = rows.into_iter().collect();
        let turned = |item: &Turning| turned.get(&item.run.job_id.0).copied();
        let unturned: Vec<Uuid> = items
            .iter()
            .filter(|item| turned(item) == Some(false))
            .filter_map(|item| item.run.saga_id)
            .collect();
        let known = if unturned.is_empty() { HashSet::new() } else { self.known_runs(&unturned).await? };
        Ok(items
            .iter()
            .map(|item| match turned(item) {
                None => Turn::LeaseLost,
                Some(false) if item.run.saga_id.is_some_and(|saga| known.contains(&saga)) => Turn::TooLate,
                Some(_) => Turn::Back,
            })
            .collect())
    }

    /// Which of these runs the log knows: past the pivot, or begun by a step whose answer was lost, in which case the statement
    /// above did not see them while it waited for their jobs.
    async fn known_runs(&self, sagas: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        let known: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM sagas WHERE id = ANY($1)")
            .bind(sagas)
            .fetch_all(&self.pool)
            .await?;
        Ok(known.into_iter().collect())
    }
}
