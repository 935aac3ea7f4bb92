//! The janitor: removes what no reader sees any more, and whatever a late writer put there after it (PROTOCOL.md 9, 10).

use std::{collections::BTreeMap, time::Duration};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{error::StoreError, kinds::Stores};

/// Settings of the janitor.
#[derive(Debug, Clone, Copy)]
pub struct JanitorSettings {
    /// Between rounds that found nothing to do.
    pub every: Duration,
    /// How long finished jobs keep their records.
    pub keep_jobs: Duration,
    /// How long the audit log is kept.
    pub keep_audit_log: Duration,
}

impl Default for JanitorSettings {
    /// 1 s; 7 days; 400 days.
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self { every: Duration::from_secs(1), keep_jobs: 7 * day, keep_audit_log: 400 * day }
    }
}

const BATCH: i64 = 200;
/// Rounds between two looks at retention.
const EXPIRE_EVERY: u32 = 60;

/// Runs until `shutdown`. Several janitors share the work: rows are locked, and locked rows skipped.
pub async fn run(stores: Stores, settings: JanitorSettings, shutdown: CancellationToken) {
    let mut round = 0u32;
    while !shutdown.is_cancelled() {
        let swept = match sweep(&stores).await {
            Ok(swept) => swept,
            Err(error) => {
                tracing::debug!(%error, "the janitor waits");
                0
            }
        };
        if round.is_multiple_of(EXPIRE_EVERY)
            && let Err(error) =
                stores.postgres.expire(settings.keep_jobs, settings.keep_audit_log, 1000).await
        {
            tracing::debug!(%error, "retention waits");
        }
        round = round.wrapping_add(1);
        if swept < BATCH as usize {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(settings.every) => {}
            }
        }
    }
}

/// One round: sweeps what is due, at most 200 versions; returns how many.
pub async fn sweep(stores: &Stores) -> Result<usize, StoreError> {
    let sweeps = stores.postgres.due_sweeps(BATCH).await?;
    if sweeps.due.is_empty() {
        return Ok(0);
    }
    let mut by_collection: BTreeMap<&str, Vec<(Uuid, i32)>> = BTreeMap::new();
    for sweep in &sweeps.due {
        by_collection.entry(&sweep.collection).or_default().push((sweep.version, sweep.chunk_count));
    }
    for (collection, versions) in by_collection {
        stores.vectors.remove(collection, &versions).await?;
    }
    let versions: Vec<Uuid> = sweeps.due.iter().map(|sweep| sweep.version).collect();
    stores.cache.remove(&versions, "retired").await?;
    let count = versions.len();
    sweeps.done(stores.settings.sweep_bound).await?;
    Ok(count)
}
