//! The side table `effects` in which the `probe` saga leaves a trace of all it did, for tests only; the test makes it. Rows
//! are only ever added: `change` is 1 for an effect, -1 for its undoing, 0 for a try that found its work done.

use queue::JobId;

use super::{Fence, Postgres};
use crate::error::StoreError;

impl Postgres {
    /// Has the effect of a step, or undoes it, unless a try with the same key did so before. `false`: the fence refused.
    pub(crate) async fn effect(
        &self,
        job: JobId,
        fence: Fence,
        step: &str,
        key: &str,
        undo: bool,
    ) -> Result<bool, StoreError> {
        let Some(mut fenced) = self.fenced(job, fence).await? else { return Ok(false) };
        sqlx::query(
            "INSERT INTO effects (job, step, key, fence, change)
             SELECT $1, $2, $3, $4, CASE WHEN $5 THEN -net ELSE 1 - net END
             FROM (SELECT coalesce(sum(change), 0)::integer AS net FROM effects WHERE key = $3) AS before",
        )
        .bind(job.0)
        .bind(step)
        .bind(key)
        .bind(fence.0)
        .bind(undo)
        .execute(fenced.connection())
        .await?;
        crate::fault_point!("probe.effect.inside");
        fenced.commit().await?;
        Ok(true)
    }
}
