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
    /// How long jobs that have ended keep their result.
    pub keep_results: Duration,
    /// How long open dead letters wait for a person. `None`: for ever.
    pub keep_letters: Option<Duration>,
    /// How long the audit log is kept.
    pub keep_audit_log: Duration,
    /// How long events for other services are kept.
    pub keep_events: Duration,
}

impl Default for JanitorSettings {
    /// 1 s; 7 days; 1 day; for ever; 400 days; 7 days.
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            every: Duration::from_secs(1),
            keep_jobs: 7 * day,
            keep_results: day,
            keep_letters: None,
            keep_audit_log: 400 * day,
            keep_events: 7 * day,
        }
    }
}

const BATCH: i64 = 200;
/// How long a collection is left alone whose points can't be removed.
const PUT_OFF: Duration = Duration::from_secs(60);
/// Rounds between two looks at retention, unless the last one left something.
const EXPIRE_EVERY: u32 = 60;
/// Records of a sort that one look at retention removes.
const EXPIRED: i64 = 1000;

/// Runs until `shutdown`. Several janitors share the work: rows are locked, and locked rows skipped.
pub async fn run(stores: Stores, settings: JanitorSettings, shutdown: CancellationToken) {
    let (mut round, mut more) = (0u32, false);
    while !shutdown.is_cancelled() {
        let swept = match sweep(&stores).await {
            Ok(swept) => swept,
            Err(error) => {
                tracing::debug!(%error, "the janitor waits");
                0
            }
        };
        if more || round.is_multiple_of(EXPIRE_EVERY) {
            more = expire(&stores, &settings, round.is_multiple_of(EXPIRE_EVERY)).await;
        }
        round = round.wrapping_add(1);
        if !more && swept < BATCH as usize {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(settings.every) => {}
            }
        }
    }
}

/// One look at retention; whether there is more to remove. Each task is on its own: one that fails keeps no other from its
/// turn. The audit log's partitions need no look so often.
async fn expire(stores: &Stores, settings: &JanitorSettings, audit_log: bool) -> bool {
    let postgres = &stores.postgres;
    // First, because whoever closes a letter writes into this month's partition.
    if audit_log {
        let made = postgres.expire_audit_log(settings.keep_audit_log).await;
        full("audit log", made.map(|()| 0));
    }
    let letters = match settings.keep_letters {
        Some(keep) => full("dead letters", postgres.expire_letters(keep, EXPIRED).await),
        None => false,
    };
    let gone = [
        letters,
        full("results", postgres.expire_results(settings.keep_results, EXPIRED).await),
        full("jobs", postgres.expire_jobs(settings.keep_jobs, EXPIRED).await),
        full("idempotency keys", postgres.expire_keys(EXPIRED).await),
        full("batches", postgres.expire_batches(settings.keep_jobs, EXPIRED).await),
        full("events", postgres.expire_events(settings.keep_events, EXPIRED).await),
    ];
    gone.contains(&true)
}

/// Whether a task removed as many records as it may at once. One that failed is tried again at the next look.
fn full(records: &'static str, gone: Result<u64, StoreError>) -> bool {
    match gone {
        Ok(gone) => gone == EXPIRED as u64,
        Err(error) => {
            tracing::warn!(%error, records, "retention waits");
            false
        }
    }
}

/// One round: sweeps what is due, at most 200 versions; returns how many.
pub async fn sweep(stores: &Stores) -> Result<usize, StoreError> {
    let mut sweeps = stores.postgres.due_sweeps(BATCH).await?;
    if sweeps.due.is_empty() {
        return Ok(0);
    }
    let mut by_collection: BTreeMap<&str, Vec<(Uuid, i32)>> = BTreeMap::new();
    for sweep in &sweeps.due {
        by_collection.entry(&sweep.collection).or_default().push((sweep.version, sweep.chunk_count));
    }
    let mut left: Vec<String> = vec![];
    for (collection, versions) in by_collection {
        match stores.vectors.remove(collection, &versions).await {
            Ok(()) => {}
            Err(error) if error.is_unavailable() && stores.vectors.probe().await.is_err() => {
                return Err(error);
            }
            // One collection that fails keeps no other from being swept, and its server may call that what it likes.
            Err(error) => {
                tracing::warn!(%error, collection, versions = versions.len(), "versions are swept later");
                left.push(collection.to_owned());
            }
        }
    }
    sweeps.put_off(&left, PUT_OFF).await?;
    let versions: Vec<Uuid> = sweeps.due.iter().map(|sweep| sweep.version).collect();
    stores.cache.remove(&versions, "retired").await?;
    let count = versions.len();
    sweeps.done(stores.settings.sweep_bound).await?;
    Ok(count)
}
