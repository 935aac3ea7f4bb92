//! The janitor: removes what no reader sees any more, and whatever a late writer put there after it (PROTOCOL.md 9, 10).

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{error::StoreError, kinds::Stores, stores::postgres::retention::Place};

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

/// Versions that one round sweeps at most.
const BATCH: i64 = 200;
/// Their points at most, unless a single version has more: their chunks go in one statement.
const POINTS: i64 = 50_000;
/// How long a collection is left alone whose points can't be removed.
const PUT_OFF: Duration = Duration::from_secs(60);
/// Rounds between two looks at retention, unless the last one left something.
const EXPIRE_EVERY: u32 = 60;
/// Records of a sort that one look at retention removes.
const EXPIRED: i64 = 1000;

/// How far looks at retention have come.
#[derive(Debug, Default)]
struct Looks {
    results: Place,
    jobs: Place,
    batches: Place,
}

impl Looks {
    fn are_under_way(&self) -> bool {
        [self.results, self.jobs, self.batches].iter().any(Place::is_under_way)
    }
}

/// Runs until `shutdown`. Several janitors share the work: rows are locked, and locked rows skipped.
pub async fn run(stores: Stores, settings: JanitorSettings, shutdown: CancellationToken) {
    let (mut turn, mut more, mut looks) = (0u32, false, Looks::default());
    while !shutdown.is_cancelled() {
        let left = match round(&stores).await {
            Ok(round) => round.left,
            Err(error) => {
                tracing::debug!(%error, "the janitor waits");
                false
            }
        };
        if more || looks.are_under_way() || turn.is_multiple_of(EXPIRE_EVERY) {
            more = expire(&stores, &settings, turn.is_multiple_of(EXPIRE_EVERY), &mut looks).await;
        }
        turn = turn.wrapping_add(1);
        if !more && !left {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(settings.every) => {}
            }
        }
    }
}

/// One look at retention; whether there is more to remove. Each task is on its own: one that fails keeps no other from its
/// turn. The audit log's partitions need no look so often.
async fn expire(stores: &Stores, settings: &JanitorSettings, audit_log: bool, looks: &mut Looks) -> bool {
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
    let Looks { results, jobs, batches } = looks;
    let gone = [
        letters,
        full("results", postgres.expire_results(settings.keep_results, EXPIRED, results).await),
        full("jobs", postgres.expire_jobs(settings.keep_jobs, EXPIRED, jobs).await),
        full("idempotency keys", postgres.expire_keys(EXPIRED).await),
        full("batches", postgres.expire_batches(settings.keep_jobs, EXPIRED, batches).await),
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

/// What one round of sweeps did.
struct Round {
    swept: usize,
    /// Whether more is due.
    left: bool,
}

/// One round: sweeps what is due, at most 200 versions; returns how many.
pub async fn sweep(stores: &Stores) -> Result<usize, StoreError> {
    Ok(round(stores).await?.swept)
}

/// What is done when the round's time is over counts, and the rest comes with the next one: however slow some collections are, those
/// behind them get their turn.
async fn round(stores: &Stores) -> Result<Round, StoreError> {
    let begun = Instant::now();
    let time = stores.postgres.call_timeout() * 2;
    let mut sweeps = stores.postgres.due_sweeps(BATCH).await?;
    if sweeps.due.is_empty() {
        return Ok(Round { swept: 0, left: false });
    }
    let mut left = sweeps.due.len() == BATCH as usize;
    let (mut points, mut by_collection): (i64, BTreeMap<String, Vec<(Uuid, i32)>>) = (0, BTreeMap::new());
    for sweep in &sweeps.due {
        points += i64::from(sweep.chunk_count);
        if points > POINTS && !by_collection.is_empty() {
            left = true;
            break;
        }
        by_collection.entry(sweep.collection.clone()).or_default().push((sweep.version, sweep.chunk_count));
    }
    let mut swept: HashSet<Uuid> = HashSet::new();
    for (collection, versions) in by_collection {
        if begun.elapsed() > time {
            left = true;
            break;
        }
        let removed = sweeps.meanwhile(stores.vectors.remove(&collection, &versions)).await?;
        match removed {
            Ok(()) => swept.extend(versions.iter().map(|(version, _)| version)),
            Err(error) if error.is_unavailable() && stores.vectors.probe().await.is_err() => {
                return Err(error);
            }
            // One collection that fails keeps no other from being swept, and its server may call that what it likes.
            Err(error) => {
                tracing::warn!(%error, collection, versions = versions.len(), "versions are swept later");
                sweeps.put_off(&collection, PUT_OFF).await?;
            }
        }
    }
    sweeps.due.retain(|sweep| swept.contains(&sweep.version));
    let versions: Vec<Uuid> = sweeps.due.iter().map(|sweep| sweep.version).collect();
    sweeps.meanwhile(stores.cache.remove(&versions, "retired")).await??;
    sweeps.done(stores.settings.sweep_bound).await?;
    Ok(Round { swept: versions.len(), left })
}
