//! The history checker: what was accepted, what the ledger says became of it, and what was seen to happen, against each other.
//!
//! It asks no store and no code of the fleet: everything that it gets is a plain record, so that it can be given a bad
//! history, too.

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use super::marks;

/// How a job is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Succeeds,
    Dies,
}

/// A job that the fleet has accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub id: Uuid,
    pub fate: Fate,
    /// Somebody asked for its cancellation.
    pub cancelled: bool,
}

/// A job as the ledger has it in the end.
#[derive(Debug, Clone, Default, sqlx::FromRow)]
pub struct JobRow {
    pub id: Uuid,
    pub kind: String,
    pub state: String,
    pub outcome: Option<String>,
    /// The version that its result names.
    pub version: Option<Uuid>,
    pub document_id: Option<Uuid>,
    pub doc_order: Option<i64>,
    pub parent: Option<Uuid>,
    /// The class of its dead letter.
    pub class: Option<String>,
    pub lost_deliveries: i32,
    pub last_error: Option<String>,
}

/// An effect of a `mark` job, or its undoing.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct MarkRow {
    pub job: Uuid,
    pub step: String,
    pub fence: i64,
    pub change: i32,
}

/// A change of what readers see of a document, recorded by a trigger.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct ShownRow {
    pub document_id: Uuid,
    pub version: Option<Uuid>,
    pub doc_order: i64,
    pub deleted_order: Option<i64>,
}

/// Everything that was recorded, each list in its order.
#[derive(Debug, Clone, Default)]
pub struct History {
    pub accepted: Vec<Accepted>,
    pub jobs: Vec<JobRow>,
    pub marks: Vec<MarkRow>,
    pub shown: Vec<ShownRow>,
    /// What the reader complained about.
    pub half_visible: Vec<String>,
    /// What the auditor found, and what else went wrong.
    pub other: Vec<String>,
}

/// What the checker says; each list holds one sentence for each violation.
#[derive(Debug, Default)]
pub struct Verdict {
    pub accepted: usize,
    pub ended: usize,
    /// Accepted jobs that are not in the ledger, or have no end.
    pub lost: Vec<String>,
    /// Effects that stand more often than their job's end allows, or were written by a zombie.
    pub duplicate_effects: Vec<String>,
    /// What no reader may see.
    pub half_visible: Vec<String>,
    /// Missing effects, wrong ends, older content over newer, disagreements of the stores.
    pub other: Vec<String>,
}

impl Verdict {
    /// All of them.
    pub fn violations(&self) -> impl Iterator<Item = (&'static str, &String)> {
        self.lost
            .iter()
            .map(|v| ("lost", v))
            .chain(self.duplicate_effects.iter().map(|v| ("duplicate effect", v)))
            .chain(self.half_visible.iter().map(|v| ("half visible", v)))
            .chain(self.other.iter().map(|v| ("other", v)))
    }
}

const ENDED: [&str; 4] = ["succeeded", "cancelled", "dead", "parked"];
/// A job that kills its workers is given up after two lost deliveries and three more while it runs alone (PROTOCOL.md 13). When
/// workers are killed at random, an innocent job can meet that.
const POISON_LOSSES: i32 = 5;

/// Whether a job was given up because its workers died: dead, or parked when that happened while it was undone. What then stands is
/// said by its record.
pub fn is_poison(job: &JobRow) -> bool {
    let said = match job.state.as_str() {
        "dead" => job.class.as_deref() == Some("poison"),
        "parked" => job.last_error.as_deref().is_some_and(|error| error.contains("kills its workers")),
        _ => false,
    };
    said && job.lost_deliveries >= POISON_LOSSES
}

/// Judges a history.
pub fn judge(history: &History) -> Verdict {
    let mut verdict = Verdict {
        half_visible: history.half_visible.clone(),
        other: history.other.clone(),
        ..Verdict::default()
    };
    let jobs: HashMap<Uuid, &JobRow> = history.jobs.iter().map(|job| (job.id, job)).collect();
    ends(history, &jobs, &mut verdict);
    effects(history, &jobs, &mut verdict);
    publications(history, &jobs, &mut verdict);
    superseded(history, &mut verdict);
    order(history, &mut verdict);
    verdict
}

/// Every accepted job is in the ledger and has ended, as it should.
fn ends(history: &History, jobs: &HashMap<Uuid, &JobRow>, verdict: &mut Verdict) {
    let mut accepted: HashMap<Uuid, &Accepted> = HashMap::new();
    for one in &history.accepted {
        accepted.insert(one.id, one);
        if !jobs.contains_key(&one.id) {
            verdict.lost.push(format!("job {}: accepted, and not in the ledger", one.id));
        }
    }
    verdict.accepted =
        accepted.len() + history.jobs.iter().filter(|job| !accepted.contains_key(&job.id)).count();
    for job in &history.jobs {
        let named = format!("{} job {}", job.kind, job.id);
        if !ENDED.contains(&job.state.as_str()) {
            verdict.lost.push(format!("{named}: still {}, {:?}", job.state, job.last_error));
            continue;
        }
        verdict.ended += 1;
        let (fate, cancelled) = match (accepted.get(&job.id), job.parent) {
            (Some(one), _) => (one.fate, one.cancelled),
            (None, Some(parent)) if jobs.contains_key(&parent) => (Fate::Succeeds, false),
            (None, _) => {
                verdict.other.push(format!("{named}: in the ledger, and nobody enqueued it"));
                continue;
            }
        };
        let right = match job.state.as_str() {
            "succeeded" => fate == Fate::Succeeds,
            "dead" => fate == Fate::Dies || is_poison(job),
            "cancelled" => cancelled,
            _ => is_poison(job),
        };
        if !right {
            verdict.other.push(format!(
                "{named}: {} ({:?}, {:?}, {} lost deliveries), and it should have {fate:?}",
                job.state, job.class, job.last_error, job.lost_deliveries
            ));
        }
    }
}

/// Each step of a `mark` job has its effect once if the job has succeeded, and not at all otherwise; never twice in between;
/// and no older fence writes after a newer one.
fn effects(history: &History, jobs: &HashMap<Uuid, &JobRow>, verdict: &mut Verdict) {
    let mut net: BTreeMap<(Uuid, &str), i32> = BTreeMap::new();
    let mut fences: HashMap<Uuid, i64> = HashMap::new();
    for mark in &history.marks {
        let sum = net.entry((mark.job, &mark.step)).or_default();
        *sum += mark.change;
        if *sum > 1 {
            verdict
                .duplicate_effects
                .push(format!("step {} of mark job {}: {sum} effects", mark.step, mark.job));
        } else if *sum < 0 {
            verdict.other.push(format!("step {} of mark job {}: undone and not done", mark.step, mark.job));
        }
        let newest = fences.entry(mark.job).or_default();
        if mark.fence < *newest {
            verdict.duplicate_effects.push(format!(
                "step {} of mark job {}: fence {} wrote after fence {newest}",
                mark.step, mark.job, mark.fence
            ));
        }
        *newest = mark.fence.max(*newest);
    }
    let ended = |job: &&&JobRow| job.kind == marks::KIND && ENDED.contains(&job.state.as_str());
    for job in jobs.values().filter(ended).filter(|job| job.state != "parked" || !is_poison(job)) {
        let wanted = i32::from(job.state == "succeeded");
        for step in marks::STEPS {
            let stands = net.get(&(job.id, step)).copied().unwrap_or_default();
            if stands > wanted {
                verdict.duplicate_effects.push(format!(
                    "step {step} of mark job {}: {stands} effects stand, and it is {}",
                    job.id, job.state
                ));
            } else if stands < wanted {
                verdict
                    .other
                    .push(format!("step {step} of mark job {}: succeeded without its effect", job.id));
            }
        }
    }
    for job in net.keys().map(|(job, _)| job).filter(|job| !jobs.contains_key(job)).collect::<HashSet<_>>() {
        verdict.duplicate_effects.push(format!("mark job {job}: effects, and not in the ledger"));
    }
}

/// The highest order number under which each document was ever shown, or deleted.
fn newest(history: &History) -> HashMap<Uuid, i64> {
    let mut newest: HashMap<Uuid, i64> = HashMap::new();
    for row in &history.shown {
        let last = newest.entry(row.document_id).or_default();
        *last = row.doc_order.max(*last);
    }
    newest
}

/// Each version that was ever shown belongs to one job that has succeeded with it, and was shown once; each tombstone to one
/// deletion.
fn publications(history: &History, jobs: &HashMap<Uuid, &JobRow>, verdict: &mut Verdict) {
    let mut owners: HashMap<Uuid, Vec<&JobRow>> = HashMap::new();
    let mut deletions: HashMap<(Uuid, i64), &JobRow> = HashMap::new();
    for job in jobs.values().filter(|job| job.state == "succeeded" && job.outcome.is_none()) {
        if let Some(version) = job.version {
            owners.entry(version).or_default().push(job);
        }
        if job.kind == "delete"
            && let (Some(document), Some(order)) = (job.document_id, job.doc_order)
        {
            deletions.insert((document, order), job);
        }
    }
    let mut shown: HashMap<Uuid, usize> = HashMap::new();
    let mut buried: HashMap<(Uuid, i64), usize> = HashMap::new();
    let mut tombstones: HashMap<Uuid, i64> = HashMap::new();
    let newest = newest(history);
    for row in &history.shown {
        if let Some(version) = row.version {
            *shown.entry(version).or_default() += 1;
        }
        if let Some(order) = row.deleted_order
            && tombstones.insert(row.document_id, order) != Some(order)
        {
            *buried.entry((row.document_id, order)).or_default() += 1;
        }
    }
    for (version, times) in &shown {
        if *times > 1 {
            verdict.duplicate_effects.push(format!("version {version}: published {times} times"));
        }
        match owners.get(version).map_or(0, Vec::len) {
            1 => {}
            0 => verdict
                .duplicate_effects
                .push(format!("version {version}: published, and no job has succeeded with it")),
            more => verdict.duplicate_effects.push(format!("version {version}: the result of {more} jobs")),
        }
    }
    for (version, jobs) in &owners {
        for job in jobs.iter().filter(|_| !shown.contains_key(version)) {
            // Replaced within the same transaction: no reader could see it.
            let replaced =
                job.document_id.and_then(|document| newest.get(&document)) > job.doc_order.as_ref();
            if !replaced {
                verdict
                    .other
                    .push(format!("{} job {}: succeeded, and its version was never shown", job.kind, job.id));
            }
        }
    }
    for (key, times) in &buried {
        let owned = deletions.contains_key(key);
        if *times > 1 || !owned {
            verdict.duplicate_effects.push(format!(
                "document {}: deleted {times} times under order {}, by a job that {}",
                key.0,
                key.1,
                if owned { "succeeded" } else { "did not succeed" }
            ));
        }
    }
    for job in deletions.iter().filter(|(key, _)| !buried.contains_key(*key)).map(|(_, job)| job) {
        verdict.other.push(format!("delete job {}: succeeded, and nothing was deleted", job.id));
    }
}

/// A job that says it was superseded gave way to one with a higher order number, and that one has taken place.
fn superseded(history: &History, verdict: &mut Verdict) {
    let stands = newest(history);
    // A re-embedding gives way to whatever replaced the version that it copied.
    let gave_way = |job: &&JobRow| {
        job.outcome.as_deref() == Some("superseded") && matches!(job.kind.as_str(), "ingest" | "delete")
    };
    for job in history.jobs.iter().filter(gave_way) {
        let newest = job.document_id.and_then(|document| stands.get(&document)).copied();
        if newest <= job.doc_order {
            verdict.other.push(format!(
                "{} job {}: superseded with order {:?}, and its document stands at {newest:?}",
                job.kind, job.id, job.doc_order
            ));
        }
    }
}

/// What is shown never goes back to an older order number, nor over a tombstone.
fn order(history: &History, verdict: &mut Verdict) {
    let mut last: HashMap<Uuid, &ShownRow> = HashMap::new();
    for row in &history.shown {
        if let Some(before) = last.insert(row.document_id, row)
            && (row.doc_order < before.doc_order || row.deleted_order < before.deleted_order)
        {
            verdict.other.push(format!(
                "document {}: order {} (deleted {:?}) was shown after order {} (deleted {:?})",
                row.document_id, row.doc_order, row.deleted_order, before.doc_order, before.deleted_order
            ));
        }
        if row.version.is_some() && row.deleted_order.is_some_and(|deleted| deleted >= row.doc_order) {
            verdict.other.push(format!(
                "document {}: order {} is shown although order {:?} deleted it",
                row.document_id, row.doc_order, row.deleted_order
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(no: u128) -> Uuid {
        Uuid::from_u128(no)
    }

    /// An ingest and its successor, a deletion, a mark job that succeeds and one that dies, an embed with its child.
    fn good() -> History {
        let row = |no, kind: &str, state: &str| JobRow {
            id: id(no),
            kind: kind.to_owned(),
            state: state.to_owned(),
            ..JobRow::default()
        };
        let ingest = |no, version, order| JobRow {
            version: Some(id(version)),
            document_id: Some(id(100)),
            doc_order: Some(order),
            ..row(no, "ingest", "succeeded")
        };
        let mark =
            |job, step: &str, fence, change| MarkRow { job: id(job), step: step.to_owned(), fence, change };
        let shown = |version: Option<u128>, doc_order, deleted_order| ShownRow {
            document_id: id(100),
            version: version.map(id),
            doc_order,
            deleted_order,
        };
        History {
            accepted: (1..=6)
                .map(|no| Accepted {
                    id: id(no),
                    fate: if no == 5 { Fate::Dies } else { Fate::Succeeds },
                    cancelled: false,
                })
                .collect(),
            jobs: vec![
                ingest(1, 11, 1),
                ingest(2, 12, 2),
                JobRow { document_id: Some(id(100)), doc_order: Some(3), ..row(3, "delete", "succeeded") },
                row(4, "mark", "succeeded"),
                JobRow { class: Some("permanent".to_owned()), ..row(5, "mark", "dead") },
                row(6, "embed", "succeeded"),
                JobRow {
                    parent: Some(id(6)),
                    outcome: Some("superseded".to_owned()),
                    ..row(7, "embed_document", "succeeded")
                },
            ],
            marks: vec![
                mark(4, "first", 1, 1),
                mark(5, "first", 1, 1),
                mark(5, "second", 1, 1),
                mark(4, "first", 2, 0),
                mark(4, "second", 2, 1),
                mark(5, "second", 2, -1),
                mark(5, "first", 2, -1),
                mark(4, "third", 2, 1),
            ],
            shown: vec![shown(Some(11), 1, None), shown(Some(12), 2, None), shown(None, 3, Some(3))],
            half_visible: vec![],
            other: vec![],
        }
    }

    /// Violations of the good history after `spoil`, by list: lost, duplicate effects, other.
    fn spoiled(spoil: impl FnOnce(&mut History)) -> (usize, usize, usize) {
        let mut history = good();
        spoil(&mut history);
        let verdict = judge(&history);
        (verdict.lost.len(), verdict.duplicate_effects.len(), verdict.other.len())
    }

    #[test]
    fn a_good_history_has_no_violation() {
        let verdict = judge(&good());
        assert_eq!(verdict.violations().collect::<Vec<_>>(), []);
        assert_eq!((verdict.accepted, verdict.ended), (7, 7));
    }

    #[test]
    fn a_job_that_vanished_or_never_ended_is_lost() {
        assert_eq!(spoiled(|h| drop(h.jobs.remove(5))), (1, 0, 1), "and its child is nobody's");
        assert_eq!(spoiled(|h| h.jobs[5].state = "waiting".to_owned()), (1, 0, 0));
        assert_eq!(spoiled(|h| h.jobs[4].state = "running".to_owned()), (1, 0, 0));
    }

    #[test]
    fn a_wrong_end_is_found() {
        assert_eq!(spoiled(|h| h.jobs[5].state = "dead".to_owned()), (0, 0, 1));
        assert_eq!(spoiled(|h| h.jobs[5].state = "parked".to_owned()), (0, 0, 1));
        assert_eq!(spoiled(|h| h.jobs[5].state = "cancelled".to_owned()), (0, 0, 1));
        assert_eq!(spoiled(|h| h.accepted[5].fate = Fate::Dies), (0, 0, 1));
        let cancelled = |h: &mut History| {
            h.jobs[5].state = "cancelled".to_owned();
            h.accepted[5].cancelled = true;
        };
        assert_eq!(spoiled(cancelled), (0, 0, 0));
        let poisoned = |h: &mut History, losses| {
            h.jobs[5].state = "dead".to_owned();
            h.jobs[5].class = Some("poison".to_owned());
            h.jobs[5].lost_deliveries = losses;
        };
        assert_eq!(spoiled(|h| poisoned(h, POISON_LOSSES)), (0, 0, 0));
        assert_eq!(spoiled(|h| poisoned(h, POISON_LOSSES - 1)), (0, 0, 1));
        let parked = |h: &mut History, losses| {
            h.jobs[5].state = "parked".to_owned();
            h.jobs[5].last_error = Some("its compensation kills its workers".to_owned());
            h.jobs[5].lost_deliveries = losses;
        };
        assert_eq!(spoiled(|h| parked(h, POISON_LOSSES)), (0, 0, 0));
        assert_eq!(spoiled(|h| parked(h, POISON_LOSSES - 1)), (0, 0, 1));
    }

    #[test]
    fn an_effect_twice_or_not_at_all_is_found() {
        let again = |h: &mut History, no: usize, change, fence| {
            let mark = MarkRow { fence, change, ..h.marks[no].clone() };
            h.marks.push(mark);
        };
        assert_eq!(spoiled(|h| again(h, 0, 1, 2)), (0, 2, 0), "when it happens, and in the end");
        assert_eq!(spoiled(|h| again(h, 1, 1, 3)), (0, 1, 0), "after it was undone");
        assert_eq!(spoiled(|h| again(h, 0, 0, 1)), (0, 1, 0), "a zombie's, though it changes nothing");
        assert_eq!(spoiled(|h| again(h, 1, -1, 2)), (0, 0, 2), "undone twice, and less than none");
        assert_eq!(spoiled(|h| drop(h.marks.pop())), (0, 0, 1), "succeeded without it");
        assert_eq!(spoiled(|h| drop(h.marks.remove(6))), (0, 1, 0), "dead with it");
    }

    #[test]
    fn a_version_shown_twice_or_by_nobody_is_found() {
        assert_eq!(spoiled(|h| h.shown.insert(1, h.shown[0].clone())), (0, 1, 0));
        assert_eq!(
            spoiled(|h| h.shown[1].version = Some(id(99))),
            (0, 1, 0),
            "and order 3 hides the missing one"
        );
        assert_eq!(spoiled(|h| h.jobs[1].outcome = Some("superseded".to_owned())), (0, 1, 0));
        assert_eq!(
            spoiled(|h| h.jobs[2].outcome = Some("superseded".to_owned())),
            (0, 1, 1),
            "by nothing newer"
        );
        assert_eq!(spoiled(|h| h.shown.truncate(1)), (0, 0, 2), "a version and a deletion that nobody saw");
    }

    #[test]
    fn a_job_that_gave_way_to_nothing_is_found() {
        let gave_way = |no: usize, order| {
            move |h: &mut History| {
                let job = &mut h.jobs[no];
                (job.outcome, job.version) = (Some("superseded".to_owned()), None);
                job.doc_order = Some(order);
                // What it would have shown, or deleted, nobody has seen.
                h.shown.retain(|row| row.doc_order != if no == 2 { 3 } else { 2 });
            }
        };
        assert_eq!(spoiled(gave_way(1, 2)), (0, 0, 0), "the deletion came after it");
        assert_eq!(spoiled(gave_way(1, 3)), (0, 0, 1));
        assert_eq!(spoiled(gave_way(2, 3)), (0, 0, 1), "the last of all");
        assert_eq!(spoiled(gave_way(2, 1)), (0, 0, 0));
        let unknown = |h: &mut History| {
            gave_way(1, 2)(h);
            h.jobs[1].document_id = Some(id(101));
        };
        assert_eq!(spoiled(unknown), (0, 0, 1), "of its document nothing was ever shown");
    }

    #[test]
    fn older_content_over_newer_is_found() {
        assert_eq!(spoiled(|h| h.shown.swap(0, 1)), (0, 0, 1));
        let revived = |h: &mut History| {
            let row = h.shown.remove(1);
            h.shown.push(ShownRow { deleted_order: Some(3), ..row });
        };
        assert_eq!(spoiled(revived), (0, 0, 2), "over a newer one, and over a tombstone");
    }

    #[test]
    fn what_reader_and_auditor_found_counts() {
        let mut history = good();
        history.half_visible.push("half".to_owned());
        history.other.push("drift".to_owned());
        assert_eq!(judge(&history).violations().count(), 2);
    }
}
