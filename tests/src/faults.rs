//! Armed fault points, and what is told from their names.

use std::{collections::BTreeSet, path::PathBuf};

use futures::future::join_all;

use crate::{Fleet, Outcome, Subject};

/// Armed fault points whose firings are counted on their own, over all workers that carry them.
#[derive(Debug, Clone)]
pub struct Faults {
    /// As in `FLOTILLA_FAULTS`.
    pub spec: String,
    pub(crate) dir: PathBuf,
}

impl Faults {
    /// How often a point has acted.
    pub fn fired(&self, point: &str) -> usize {
        let mut times = 0;
        while self.dir.join(format!("{point}.{times}")).exists() {
            times += 1;
        }
        times
    }
}

/// A fault point together with the kind of job that comes by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The job's kind.
    pub kind: String,
    /// The point's name.
    pub point: String,
    /// The point where the saga is to fail first, for places that are only met on the way back.
    pub fails_at: Option<String>,
    /// Whether the run's effect stands when it gets there.
    pub past_pivot: bool,
}

impl Place {
    /// Whether it is inside a call to a store: then a hang there ends with the call.
    pub fn in_a_call(&self) -> bool {
        [".call", ".undo", ".inside"].iter().any(|part| self.point.contains(part))
    }
}

impl Fleet {
    /// Every place: each kind's jobs are run once, and once there and back, by a worker that writes down which points it passes.
    /// Fails the test if a point that the code names is not among them.
    pub async fn places(&self) -> Vec<Place> {
        let named = self.fault_points();
        let kinds: BTreeSet<&str> = named
            .iter()
            .filter(|point| !point.ends_with(".inside"))
            .filter_map(|point| point.split('.').next())
            .collect();
        let mut ways: Vec<(&str, Option<String>)> = kinds.iter().map(|kind| (*kind, None)).collect();
        ways.extend(kinds.iter().filter_map(|kind| Some((*kind, Some(fails_at(kind, &named)?)))));
        let mut subjects: Vec<Subject> = ways
            .iter()
            .enumerate()
            .map(|(no, (kind, _))| Subject::new(kind, &format!("trace-{no}"), &format!("trace-{no}")))
            .collect();
        self.seed(&mut subjects).await;
        let traced = join_all(
            ways.iter()
                .zip(&subjects)
                .enumerate()
                .map(|(no, (way, subject))| self.trace(no, way.1.as_deref(), subject)),
        )
        .await;
        let mut places: Vec<Place> = vec![];
        for ((kind, fails_at), points) in ways.into_iter().zip(traced) {
            let pivot = pivot(kind, &named);
            let (mut at_pivot, mut past_pivot, mut announced) = (false, false, false);
            for point in points {
                at_pivot |= point == format!("{pivot}.before");
                past_pivot |= announced || at_pivot && point.rsplit('.').next() == Some("after");
                announced |= ANNOUNCED_AFTER.contains(&point.as_str());
                if !places.iter().any(|place| place.kind == kind && place.point == point) {
                    let fails_at = fails_at.clone();
                    places.push(Place {
                        kind: kind.to_owned(),
                        point,
                        past_pivot: past_pivot && fails_at.is_none(),
                        fails_at,
                    });
                }
            }
        }
        let missed: Vec<&String> =
            named.iter().filter(|point| !places.iter().any(|place| place.point == **point)).collect();
        assert!(missed.is_empty(), "no run passes these points: {missed:?}");
        places
    }

    /// The points that a job of this subject passes, in order, each once.
    async fn trace(&self, no: usize, fails_at: Option<&str>, subject: &Subject) -> Vec<String> {
        let faults = self
            .faults(&format!("trace-{no}"), fails_at.map(|at| format!("{at}=permanent")).unwrap_or_default());
        let path = faults.dir.join("trace");
        let worker = self
            .worker()
            .queues(&[subject.queue.as_str()])
            .armed(&faults)
            .patient()
            .env("FLOTILLA_FAULTS_TRACE", path.display().to_string())
            .start();
        let job = self.begin(subject).await;
        let outcome = if fails_at.is_some() { Outcome::Dead } else { Outcome::Done };
        self.assert_outcome(subject, job, outcome).await;
        assert!(worker.terminate().await.success(), "{}", worker.tail());
        let trace = std::fs::read_to_string(path).expect("the trace");
        let mut points: Vec<String> = vec![];
        for point in trace.lines().filter(|point| passes(&subject.kind, point)) {
            if !points.iter().any(|known| known == point) {
                points.push(point.to_owned());
            }
        }
        points
    }
}

/// The pivots of `probe` and `nap` do not commit to the log themselves, so they are announced there, right after the step before.
const ANNOUNCED_AFTER: [&str; 2] = ["probe.second.after", "nap.second.after"];

/// Whether jobs of this kind pass a point that was traced while one of them ran: an `embed` job enqueues others.
fn passes(kind: &str, point: &str) -> bool {
    match point.split('.').next() {
        Some("engine") => true,
        Some("ingest") if point.ends_with(".inside") => matches!(kind, "ingest" | "embed_document"),
        of => of == Some(kind),
    }
}

/// Where a saga fails for good when all its steps that can be undone have had their effects; `None` if it has none.
fn fails_at(kind: &str, points: &[String]) -> Option<String> {
    let undone =
        points.iter().any(|point| point.starts_with(&format!("{kind}.")) && point.contains(".compensate."));
    undone.then(|| format!("{}.before", pivot(kind, points)))
}

/// The kind's first step that can't be undone, as `kind.step`: one without a fault point at its compensation. Of `delete`, whose
/// steps can all not be undone, the tombstone.
fn pivot(kind: &str, points: &[String]) -> String {
    let mut steps = points.iter().filter_map(|point| point.strip_suffix(".before")).filter(|step| {
        step.split('.').next() == Some(kind)
            && !step.ends_with(".compensate")
            && !points.contains(&format!("{step}.compensate.before"))
    });
    let first = steps.clone().find(|step| *step == "delete.tombstone").or_else(|| steps.next());
    first.unwrap_or_else(|| panic!("{kind} has no fault points: build with --features cli/faults")).to_owned()
}
