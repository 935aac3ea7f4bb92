//! What an audit says.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// Kinds of disagreement between the stores.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum FindingKind {
            $($(#[$doc])* $kind,)*
        }

        impl FindingKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// The name in reports and metrics.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }
    };
}

kinds! {
    /// A version says it is published and its document shows another one, or none.
    PublishedNotCurrent = "published_not_current",
    /// A document shows a version that is not one of its published versions.
    CurrentNotPublished = "current_not_published",
    /// An order number is higher than the last one given out, or a document's is not that of the version it shows.
    OrderDisagrees = "order_disagrees",
    /// A deleted document shows a version.
    TombstoneWithVersion = "tombstone_with_version",
    /// Rows that belong together name different tenants.
    RowWrongTenant = "row_wrong_tenant",
    /// Chunk rows of a version are not there.
    ChunkMissing = "chunk_missing",
    /// Chunk rows beyond a version's count, or of a version that has none any more.
    ChunkExtra = "chunk_extra",
    /// A chunk's text is not part of its version's text.
    ChunkChanged = "chunk_changed",
    /// A version's text does not have the hash recorded with it.
    BodyChanged = "body_changed",
    /// A staged version whose saga has ended or is not there.
    StagedOrphan = "staged_orphan",
    /// Points of a published version are not there.
    PointMissing = "point_missing",
    /// A point that belongs to no chunk of any version.
    PointExtra = "point_extra",
    /// The stored vectors do not have the hash recorded at publish.
    VectorChanged = "vector_changed",
    /// A point's payload names another tenant than its version's.
    PointWrongTenant = "point_wrong_tenant",
    /// A point's payload names another document than its version's.
    PointWrongDocument = "point_wrong_document",
    /// A point's payload names another version or chunk than its id was made of.
    PointWrongChunk = "point_wrong_chunk",
    /// A cache entry holds another text, or another hash, than its version.
    CacheStale = "cache_stale",
    /// A cache entry names another tenant than its version's.
    CacheWrongTenant = "cache_wrong_tenant",
    /// A cache entry of no version.
    CacheExtra = "cache_extra",
    /// The ledger says that a job runs, and nobody in Redis has it.
    RunningWithoutLease = "running_without_lease",
    /// The ledger says that a job is in Redis, and Redis doesn't know it.
    MissingInQueue = "missing_in_queue",
    /// A lease in Redis of a job that has ended or that the ledger doesn't know.
    LeaseWithoutJob = "lease_without_job",
    /// A saga is under way and its job has ended.
    SagaOpenAfterJob = "saga_open_after_job",
    /// A saga has passed its pivot and its job has not succeeded.
    SagaDoneJobOpen = "saga_done_job_open",
    /// A saga waits for the sweep of a version that will not be swept.
    FinishingStuck = "finishing_stuck",
    /// A saga is under way and has not moved for an hour beyond its job's time.
    SagaStuck = "saga_stuck",
    /// A saga is parked and its job is not.
    ParkedDisagrees = "parked_disagrees",
    /// A dead job has no dead letter.
    DeadWithoutLetter = "dead_without_letter",
    /// A dead letter's job is not dead.
    LetterWithoutDeath = "letter_without_death",
    /// A job has succeeded and no saga of it passed its pivot.
    SucceededWithoutSaga = "succeeded_without_saga",
    /// A job has succeeded, its effect does not stand, and no later job on the document explains that.
    EffectMissing = "effect_missing",
    /// The janitor has not removed what it should have removed by now.
    JanitorOverdue = "janitor_overdue",
}

/// One disagreement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What kind.
    pub kind: FindingKind,
    /// The id of what it is about: a version, document, point, job, saga or letter.
    pub subject: String,
    /// Owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The caller's name for the document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<String>,
    /// The version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<Uuid>,
    /// The job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<Uuid>,
    /// What was seen and what was expected; after a repair that did not succeed, also why.
    pub detail: String,
    /// Whether `--repair` has a way to mend it. It may still find that it can't, and then says `false`.
    pub repairable: bool,
    /// Whether this audit mended it.
    pub repaired: bool,
}

impl Finding {
    pub(super) fn new(kind: FindingKind, subject: impl ToString, detail: impl Into<String>) -> Self {
        Self {
            kind,
            subject: subject.to_string(),
            tenant: None,
            document: None,
            version: None,
            job: None,
            detail: detail.into(),
            repairable: false,
            repaired: false,
        }
    }
}

/// Work under way, which is no disagreement.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pending {
    /// Versions that the janitor still has to sweep, once or for the last time.
    pub sweeps: i64,
    /// Sagas past their pivot that wait for a sweep.
    pub finishing: i64,
    /// Waiting jobs that the relay has not put into Redis yet.
    pub undispatched: i64,
    /// Waiting and running jobs, the undispatched ones included.
    pub unfinished: i64,
    /// Points of versions that readers can't see: staged, or to be swept.
    pub unseen_points: u64,
    /// Cache entries of such versions.
    pub unseen_cache_entries: u64,
    /// Sagas that wait for a person.
    pub parked: i64,
    /// The oldest parked sagas, 100 at most, each with its error: the record of what stands.
    pub parked_sagas: Vec<ParkedSaga>,
}

/// A saga that waits for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct ParkedSaga {
    /// The run.
    pub saga: Uuid,
    /// Its job.
    pub job: Uuid,
    /// Owner.
    pub tenant: String,
    /// The caller's name for the document.
    pub document: Option<String>,
    /// What stands and why.
    pub error: Option<String>,
}

/// How much was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Documents, deleted ones included.
    pub documents: u64,
    /// Versions in any state.
    pub versions: u64,
    /// Chunk rows.
    pub chunks: u64,
    /// Points in all collections looked at.
    pub points: u64,
    /// Cache entries.
    pub cache_entries: u64,
    /// Jobs in the ledger.
    pub jobs: i64,
    /// Sagas in the log.
    pub sagas: i64,
}

/// The result of an audit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// How many disagreements of each kind; kinds without any are left out.
    pub by_kind: BTreeMap<FindingKind, u64>,
    /// The disagreements, at most as many as the settings say.
    pub findings: Vec<Finding>,
    /// How many of all disagreements were mended.
    pub repaired: u64,
    /// Of each kind, how many were not; kinds without any are left out.
    pub left_by_kind: BTreeMap<FindingKind, u64>,
    /// Work under way.
    pub pending: Pending,
    /// How much was looked at.
    pub counts: Counts,
    /// Whether the queue's Redis was part of the audit.
    pub queue_audited: bool,
    /// How long it took.
    pub took_ms: u64,
}

impl Report {
    /// Whether the stores agree: no disagreement was found. One that was mended counts as found. Pending work and parked
    /// sagas are none.
    pub fn is_clean(&self) -> bool {
        self.by_kind.is_empty()
    }

    /// How many disagreements were found.
    pub fn total(&self) -> u64 {
        self.by_kind.values().sum()
    }

    /// How many disagreements stand now.
    pub fn unrepaired(&self) -> u64 {
        self.total() - self.repaired
    }
}

/// At most so many findings are remembered, in order not to count one twice.
const REMEMBERED: usize = 100_000;

/// Collects findings in bounded memory.
#[derive(Default)]
pub(super) struct Findings {
    max_listed: usize,
    seen: HashSet<(FindingKind, String)>,
    /// Points that a finding names; the pass over all points leaves them out.
    points: HashSet<Uuid>,
    pub report: Report,
    unrepaired: BTreeMap<FindingKind, u64>,
}

impl Findings {
    pub fn new(max_listed: usize) -> Self {
        Self { max_listed, ..Self::default() }
    }

    pub fn add(&mut self, finding: Finding) {
        let name = (finding.kind, finding.subject.clone());
        if self.seen.contains(&name) {
            return;
        }
        if self.seen.len() < REMEMBERED {
            self.seen.insert(name);
        }
        *self.report.by_kind.entry(finding.kind).or_default() += 1;
        if finding.repaired {
            self.report.repaired += 1;
        } else {
            *self.unrepaired.entry(finding.kind).or_default() += 1;
        }
        tracing::warn!(
            kind = finding.kind.name(),
            subject = finding.subject,
            detail = finding.detail,
            repaired = finding.repaired,
            "the stores disagree"
        );
        if self.report.findings.len() < self.max_listed {
            self.report.findings.push(finding);
        }
    }

    /// The report of all that was found.
    pub fn done(self) -> Report {
        Report { left_by_kind: self.unrepaired, ..self.report }
    }

    pub fn name_points(&mut self, points: &[Uuid]) {
        let room = REMEMBERED.saturating_sub(self.points.len());
        self.points.extend(points.iter().take(room));
    }

    pub fn names_point(&self, point: Uuid) -> bool {
        self.points.contains(&point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_json_and_all_are_different() {
        let mut names = HashSet::new();
        for kind in FindingKind::ALL {
            assert_eq!(serde_json::json!(kind), kind.name());
            assert!(names.insert(kind.name()));
        }
    }

    #[test]
    fn counts_stay_exact_when_the_list_is_full() {
        let mut findings = Findings::new(2);
        for subject in ["a", "b", "c", "c"] {
            findings.add(Finding::new(FindingKind::PointExtra, subject, ""));
        }
        assert_eq!((findings.report.total(), findings.report.findings.len()), (3, 2));
        assert!(!findings.report.is_clean());
        assert_eq!(serde_json::json!(findings.report)["by_kind"]["point_extra"], 3);
    }
}
