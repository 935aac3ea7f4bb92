//! A transaction for users' own steps that write to Postgres: open only while the run holds its fence (PROTOCOL.md 7).

use queue::JobId;
use sqlx::{PgConnection, Postgres as Db, Transaction};

use super::{Fence, Postgres, lock_alive};
use crate::error::StoreError;

/// A transaction that holds its job's row locked under the fence. Whatever is written through it is committed as long as
/// nobody else has taken the job, and not at all otherwise. Dropped without [`commit`](Self::commit), nothing was written.
pub struct Fenced(Transaction<'static, Db>);

impl Fenced {
    /// What to write through. Its search path is Flotilla's schema: name other schemas.
    pub fn connection(&mut self) -> &mut PgConnection {
        &mut self.0
    }

    /// Commits. After an error the outcome is unknown, so what was written must be idempotent by the step's key.
    pub async fn commit(self) -> Result<(), StoreError> {
        Ok(self.0.commit().await?)
    }
}

impl Postgres {
    /// Opens a fenced transaction; steps pass their context's job and fence. `None`: the job is somebody else's by now, and
    /// the step ends with [`StepError::LeaseLost`](crate::StepError::LeaseLost).
    pub async fn fenced(&self, job: JobId, fence: Fence) -> Result<Option<Fenced>, StoreError> {
        let mut tx = self.begin().await?;
        let alive = lock_alive(&mut tx, &[(job, fence)]).await?;
        Ok((!alive.is_empty()).then_some(Fenced(tx)))
    }
}
