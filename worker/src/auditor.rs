//! The auditor: compares the stores again and again, slowly, and leaves what it found in the ledger, where every process
//! reads it for its gauges.
//!
//! Every worker runs one and only one of the fleet audits at a time: the ledger grants the place for a while, and its holder
//! keeps it as long as it audits. One that dies loses it by the clock. Should two audit at once after a pause of the holder,
//! that costs reads and nothing else: repairs are checked against what was published, one by one.

use std::time::Duration;

use queue::{Queue, WorkerId};
use sagas::{
    StoreError,
    audit::{AuditError, AuditSettings, Auditor, Report},
    kinds::Stores,
};
use tokio_util::sync::CancellationToken;

/// Settings of the auditor.
#[derive(Debug, Clone, Copy)]
pub struct AuditorSettings {
    /// From the end of an audit to the beginning of the next. Zero: this process makes none.
    pub every: Duration,
    /// Documents, points, cache entries and jobs looked at a second, at most.
    pub rate: u32,
    /// Mend what can be mended, instead of only reporting it.
    pub repair: bool,
}

impl Default for AuditorSettings {
    /// 1 h; 1,000 a second; no repair.
    fn default() -> Self {
        Self { every: Duration::from_secs(3600), rate: 1000, repair: false }
    }
}

/// The place is lost when its holder is not heard of for so long.
const HOLD: Duration = Duration::from_secs(60);
/// How often the holder is heard of.
const KEEP_EVERY: Duration = Duration::from_secs(15);
/// Longest time between two looks whether an audit is due, and from an audit that failed to the next.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Findings kept with the report.
const LISTED: usize = 100;

/// How an audit ended.
enum Done {
    Audited(Box<Report>),
    Failed(AuditError),
    /// Somebody else has the place.
    Lost,
}

/// Runs until `shutdown`. An audit under way is given up then; its place is free at once.
pub(crate) async fn run(
    stores: Stores,
    queue: Queue,
    settings: AuditorSettings,
    worker: WorkerId,
    shutdown: CancellationToken,
) {
    if settings.every.is_zero() {
        return;
    }
    let who = worker.to_string();
    let look_every = LOOK_EVERY.min(settings.every);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(look_every) => {}
        }
        match stores.postgres.begin_audit(&who, HOLD).await {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                tracing::debug!(%error, "the auditor waits");
                continue;
            }
        }
        let done = tokio::select! {
            done = Box::pin(audit(&stores, &queue, settings, &who)) => Some(done),
            () = shutdown.cancelled() => None,
        };
        if let Err(error) = settle(&stores, settings, &who, done).await {
            tracing::warn!(%error, "an audit's end is not in the ledger; its place is free after a while");
        }
    }
}

/// One audit, while the place is ours.
async fn audit(stores: &Stores, queue: &Queue, settings: AuditorSettings, who: &str) -> Done {
    let how = AuditSettings {
        rate: Some(settings.rate),
        max_listed: LISTED,
        repair: settings.repair,
        actor: format!("auditor:{who}"),
        ..AuditSettings::default()
    };
    let auditor = Auditor::new(stores.clone(), Some(queue.clone()));
    let audited = Box::pin(auditor.run(&how));
    tokio::select! {
        report = audited => match report {
            Ok(report) => Done::Audited(Box::new(report)),
            Err(error) => Done::Failed(error),
        },
        () = lost(stores, who) => Done::Lost,
    }
}

/// Keeps the place; returns when somebody else has it.
async fn lost(stores: &Stores, who: &str) {
    loop {
        tokio::time::sleep(KEEP_EVERY).await;
        match stores.postgres.keep_audit(who, HOLD).await {
            Ok(true) => {}
            Ok(false) => return,
            // The audit itself will meet the outage.
            Err(error) => tracing::debug!(%error, "the auditor's place was not kept"),
        }
    }
}

async fn settle(
    stores: &Stores,
    settings: AuditorSettings,
    who: &str,
    done: Option<Done>,
) -> Result<(), StoreError> {
    let soon = LOOK_EVERY.min(settings.every);
    match done {
        Some(Done::Audited(report)) => {
            stores.postgres.end_audit(who, Some(&report), settings.every).await?;
            let (found, left) = (report.total(), report.unrepaired());
            if left > 0 {
                tracing::warn!(found, left, took_ms = report.took_ms, "audited: the stores disagree");
            } else {
                tracing::info!(found, took_ms = report.took_ms, "audited: the stores agree");
            }
        }
        Some(Done::Failed(error)) => {
            tracing::warn!(%error, again_in = ?soon, "a store could not be audited");
            stores.postgres.end_audit(who, None, soon).await?;
        }
        Some(Done::Lost) => tracing::info!("another worker audits"),
        None => {
            stores.postgres.end_audit(who, None, Duration::ZERO).await?;
        }
    }
    Ok(())
}
