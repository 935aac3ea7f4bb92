//! The decision to compensate, committed before the first compensating call (PROTOCOL.md 6).

use serde_json::{Value, json};

use super::{
    Postgres,
    ending::{Run, Verdict},
    lock_alive,
};
use crate::error::StoreError;

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

impl Postgres {
    /// Turns a run backward, for good, unless the log says that its `pivot` (the step's place) is done. Keeps the data as it is
    /// now, if given: a compensation that is delivered again has what the first one had.
    pub async fn begin_compensation(
        &self,
        run: &Run,
        verdict: &Verdict,
        error: &str,
        data: Option<&Value>,
        pivot: i16,
    ) -> Result<Turn, StoreError> {
        let mut tx = self.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(Turn::LeaseLost);
        }
        let past_pivot: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM sagas WHERE id = $1 AND state = 'running' AND next_step > $2)",
        )
        .bind(run.saga_id)
        .bind(pivot)
        .fetch_one(&mut *tx)
        .await?;
        if past_pivot {
            return Ok(Turn::TooLate);
        }
        sqlx::query(
            "UPDATE sagas SET state = 'compensating', verdict = $2, error = $3, updated_at = now(), fence = $4, data = coalesce($5, data)
             WHERE id = $1 AND state IN ('running', 'compensating')",
        )
        .bind(run.saga_id)
        .bind(json!(verdict))
        .bind(error)
        .bind(run.fence.0)
        .bind(data)
        .execute(&mut *tx)
        .await?;
        crate::fault_point!("engine.turn.inside");
        tx.commit().await?;
        Ok(Turn::Back)
    }
}
