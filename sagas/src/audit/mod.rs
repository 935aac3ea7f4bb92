//! The auditor: compares the three stores, the ledger, the saga log and the queue for every document and version, reports
//! every disagreement and, when asked, mends what can be mended.
//!
//! It reads the stores themselves and compares content: a text with the hash recorded beside it, the stored vectors with
//! the hash recorded at publish, a cache entry with its version. Memory is bounded: everything is read in pages by key.
//!
//! It may run while the fleet works. The stores can't be read at one instant, so what one reading finds is read again
//! after a pause and reported only when it is still so. Work that is under way by design (sweeps, staged versions of
//! unfinished sagas, jobs that wait) is counted apart, in [`Pending`].

mod cached;
mod dispatch;
mod documents;
mod log;
mod points;
mod repair;
mod report;

use std::time::{Duration, Instant};

use embedding::Embedder;
use queue::{Queue, QueueError};
use report::Findings;
pub use report::{Counts, Finding, FindingKind, ParkedSaga, Pending, Report};
use uuid::Uuid;

use crate::{error::StoreError, kinds::Stores};

/// How to audit.
#[derive(Debug, Clone)]
pub struct AuditSettings {
    /// Documents, jobs, points or entries read at once.
    pub page: u32,
    /// How long to wait at most, before looking, until the janitor has nothing left to do that is due by then. What has been due
    /// for half of that time is a disagreement ([`FindingKind::JanitorOverdue`]). Zero: don't wait; pending work is only counted.
    pub wait_for_janitor: Duration,
    /// The pause after which a suspicion is looked at again.
    pub confirm_after: Duration,
    /// How long a job may be on its way between ledger and Redis. `None`: the queue's lease time.
    pub dispatch_grace: Option<Duration>,
    /// Collections to look at beside those that versions and models name and those whose names begin with `flotilla-`.
    pub collections: Vec<String>,
    /// Findings listed at most; all are counted.
    pub max_listed: usize,
    /// Documents, points, cache entries and jobs looked at a second, at most. `None`: as fast as it goes.
    pub rate: Option<u32>,
    /// Mend what can be mended.
    pub repair: bool,
    /// Who asks, for the audit log.
    pub actor: String,
}

impl Default for AuditSettings {
    /// Pages of 500; no wait; 500 ms between two looks; 1,000 findings listed; as fast as it goes; no repair.
    fn default() -> Self {
        Self {
            page: 500,
            wait_for_janitor: Duration::ZERO,
            confirm_after: Duration::from_millis(500),
            dispatch_grace: None,
            collections: vec![],
            max_listed: 1000,
            rate: None,
            repair: false,
            actor: "auditor".to_owned(),
        }
    }
}

/// Why an audit could not be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuditError {
    /// A store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The queue's Redis failed.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

/// Compares the stores. Holds handles only.
#[derive(Clone)]
pub struct Auditor {
    stores: Stores,
    queue: Option<Queue>,
}

/// One run of an audit.
struct Run<'a> {
    stores: &'a Stores,
    queue: Option<&'a Queue>,
    settings: &'a AuditSettings,
    findings: Findings,
    counts: Counts,
    pending: Pending,
    /// When the next page may be read.
    next_page: tokio::time::Instant,
}

/// Something that one reading found.
struct Suspect {
    finding: Finding,
    /// What to read again: a document, version, point or job.
    key: Uuid,
    /// Points that the finding names.
    points: Vec<Uuid>,
    mend: repair::Mend,
}

impl Suspect {
    fn new(key: Uuid, finding: Finding, mend: repair::Mend) -> Self {
        let finding = Finding { repairable: !matches!(mend, repair::Mend::None), ..finding };
        Self { finding, key, points: vec![], mend }
    }

    fn is_same_as(&self, other: &Self) -> bool {
        self.finding.kind == other.finding.kind && self.finding.subject == other.finding.subject
    }
}

/// The second reading's suspects that the first one had, too.
fn confirmed(first: &[Suspect], second: Vec<Suspect>) -> Vec<Suspect> {
    second.into_iter().filter(|again| first.iter().any(|suspect| suspect.is_same_as(again))).collect()
}

/// The keys to read again.
fn keys(suspects: &[Suspect]) -> Vec<Uuid> {
    let mut keys: Vec<Uuid> = suspects.iter().map(|suspect| suspect.key).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

impl Auditor {
    /// An auditor of these stores. Without a queue, ledger and Redis are not compared.
    pub fn new(stores: Stores, queue: Option<Queue>) -> Self {
        Self { stores, queue }
    }

    /// Makes one audit. Fails when a store can't be read: then nothing is known, and what was mended by then is in the
    /// audit log, which has each repair before it is made. Cancel-safe: a repair under way may be left half done, which the next audit finds.
    pub async fn run(&self, settings: &AuditSettings) -> Result<Report, AuditError> {
        let begun = Instant::now();
        let mut run = Run {
            stores: &self.stores,
            queue: self.queue.as_ref(),
            settings: &AuditSettings { page: settings.page.max(1), ..settings.clone() },
            findings: Findings::new(settings.max_listed),
            counts: self.stores.postgres.audit_counts().await?,
            pending: Pending::default(),
            next_page: tokio::time::Instant::now(),
        };
        run.janitor().await?;
        run.documents().await?;
        run.points().await?;
        run.cached().await?;
        run.log().await?;
        run.dispatch().await?;
        let pending = self.stores.postgres.audit_pending().await?;
        let Run { findings, counts, pending: seen, .. } = run;
        let mut report = findings.done();
        report.counts = counts;
        report.pending = Pending {
            unseen_points: seen.unseen_points,
            unseen_cache_entries: seen.unseen_cache_entries,
            ..pending
        };
        report.queue_audited = self.queue.is_some();
        report.took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(report)
    }
}

/// Between two looks at what the janitor has left.
const JANITOR_POLL: Duration = Duration::from_millis(200);

impl Run<'_> {
    fn page(&self) -> i64 {
        i64::from(self.settings.page)
    }

    /// Waits until so many more things may be looked at.
    async fn paced(&mut self, things: usize) {
        let Some(rate) = self.settings.rate else { return };
        tokio::time::sleep_until(self.next_page).await;
        // What a slow page has lost is not made up for: the rate is a limit.
        let share = Duration::from_secs(1).mul_f64(things as f64 / f64::from(rate.max(1)));
        self.next_page = self.next_page.max(tokio::time::Instant::now()) + share;
    }

    async fn pause(&self) {
        tokio::time::sleep(self.settings.confirm_after).await;
    }

    /// Waits for the janitor, if the settings say so.
    async fn janitor(&mut self) -> Result<(), AuditError> {
        let limit = self.settings.wait_for_janitor;
        if limit.is_zero() {
            return Ok(());
        }
        let begun = Instant::now();
        loop {
            let left = self.stores.postgres.audit_sweeps(limit / 2).await?;
            let remaining = limit.saturating_sub(begun.elapsed());
            // The last sweep of a version comes long after the first one: what is due after the wait is not waited for.
            if left.rests_for(remaining) {
                return Ok(());
            }
            if remaining.is_zero() {
                if left.overdue > 0 {
                    let detail = format!(
                        "after {limit:?} there are {} versions whose sweep was due: is a worker running?",
                        left.overdue
                    );
                    self.findings.add(Finding::new(FindingKind::JanitorOverdue, "janitor", detail));
                }
                return Ok(());
            }
            tokio::time::sleep(JANITOR_POLL.min(limit)).await;
        }
    }

    /// Mends what was found, if the settings say so, and reports it.
    async fn settle(&mut self, mut suspects: Vec<Suspect>) -> Result<(), AuditError> {
        if self.settings.repair {
            repair::repair(self.stores, self.queue, &self.settings.actor, &mut suspects).await?;
        }
        for suspect in suspects {
            self.findings.name_points(&suspect.points);
            self.findings.add(suspect.finding);
        }
        Ok(())
    }
}

/// Embeds a version's chunks as its saga did.
async fn embed(embedder: &dyn Embedder, chunks: &[String]) -> Result<Vec<Vec<f32>>, StoreError> {
    Ok(embedder.embed(chunks.to_vec()).await?)
}
