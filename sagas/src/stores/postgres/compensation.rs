//! The decision to compensate, committed before the first compensating call (PROTOCOL.md 6).

use serde_json::{Value, json};

use super::{
    Postgres,
    ending::{Run, Verdict},
    lock_alive,
};
use crate::error::StoreError;

impl Postgres {
    /// Turns a run backward, for good, and keeps the data as it is now, if given: a compensation that is delivered again has
    /// what the first one had. `false`: the fence refused.
    pub async fn begin_compensation(
        &self,
        run: &Run,
        verdict: &Verdict,
        error: &str,
        data: Option<&Value>,
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
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
        Ok(true)
    }
}
