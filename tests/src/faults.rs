//! Armed fault points, and what is told from their names.

use std::{collections::BTreeSet, path::PathBuf};

use futures::future::join_all;
use queue::JobId;
use sagas::stores::postgres::ledger::Cancel;

use crate::{Fleet, LONG, Outcome, Subject, text, wait_until};

/// Where a job waits for others.
const CHILDREN: &str = "engine.children.inside";
/// Where the job that embeds for another begins its work.
const EMBEDS: &str = "embed_version.vectors.before";

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

/// How a job comes by a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// On the way to its end, with nothing in between.
    There,
    /// On the way back: it fails at the point named.
    Back(String),
    /// On the way back, which it can't go to its end without a person: it fails at the first point named, and its compensation at
    /// the second.
    Stuck(String, String),
    /// It is given back, because the worker doesn't know its kind.
    GivenBack,
    /// On the way back: a person wants its end while the job that embeds for it hangs.
    Cancelled,
}

impl Way {
    /// What makes a job come this way, in the form of `FLOTILLA_FAULTS`: where it leads back, its step fails with `failure`, and
    /// where it is stuck, its compensation with `stuck`.
    pub fn spec(&self, failure: &str, stuck: &str) -> String {
        match self {
            Self::There | Self::GivenBack => String::new(),
            Self::Cancelled => format!("{EMBEDS}=hang*99"),
            Self::Back(fails_at) => format!("{fails_at}={failure}"),
            Self::Stuck(fails_at, stuck_at) => format!("{fails_at}={failure};{stuck_at}={stuck}"),
        }
    }

    /// Whether it leads back.
    pub const fn leads_back(&self) -> bool {
        matches!(self, Self::Back(_) | Self::Stuck(..) | Self::Cancelled)
    }

    /// How a job that comes this way ends, with a person's help if it is stuck.
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::There | Self::GivenBack => Outcome::Done,
            Self::Back(_) | Self::Stuck(..) => Outcome::Dead,
            Self::Cancelled => Outcome::Cancelled,
        }
    }
}

/// A fault point together with the kind of job that comes by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The job's kind.
    pub kind: String,
    /// The point's name.
    pub point: String,
    /// The first of all ways that leads there.
    pub way: Way,
    /// Whether the run's effect stands when it gets there.
    pub past_pivot: bool,
}

impl Place {
    /// Whether a person must have had the run go on before it gets there: of a run that is stuck, that is so for all that a run
    /// on its way back doesn't come by anyway, but for its being parked.
    pub fn is_after_a_retry(&self) -> bool {
        matches!(self.way, Way::Stuck(..)) && !self.point.starts_with("engine.park.")
    }
}

impl Fleet {
    /// Every place: a job of each kind is run on each way by a worker that writes down which points it passes. Fails the test if a
    /// point that the code names is not among them.
    pub async fn places(&self) -> Vec<Place> {
        let mut named = self.fault_points();
        // Only who hands over waits for children.
        named.retain(|point| point != CHILDREN);
        assert!(named.iter().any(|point| point.ends_with(".before")), "build with --features cli/faults");
        let kinds: BTreeSet<&str> = named
            .iter()
            .filter(|point| !sagas::fault::INSIDE.contains(&point.as_str()))
            .filter_map(|point| point.split('.').next())
            .collect();
        let mut ways: Vec<(&str, Way)> = kinds.iter().map(|kind| (*kind, Way::There)).collect();
        let failing: Vec<_> =
            kinds.iter().filter_map(|kind| Some((*kind, fails_at(kind, &named)?))).collect();
        ways.extend(failing.iter().map(|(kind, fails_at)| (*kind, Way::Back(fails_at.clone()))));
        ways.extend(failing.into_iter().map(|(kind, at)| (kind, Way::Stuck(at, stuck_at(kind, &named)))));
        ways.extend(kinds.iter().map(|kind| (*kind, Way::GivenBack)));
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
                .map(|(no, (way, subject))| self.trace(no, &way.1, subject)),
        )
        .await;
        let mut places: Vec<Place> = vec![];
        for ((kind, way), points) in ways.into_iter().zip(traced) {
            let pivot = pivot(kind, &named);
            let (mut at_pivot, mut past_pivot, mut announced) = (false, false, false);
            for point in points {
                at_pivot |= pivot.as_ref().is_some_and(|pivot| point == format!("{pivot}.before"));
                past_pivot |= announced || at_pivot && point.rsplit('.').next() == Some("after");
                // The end of a run that has no pivot.
                past_pivot |= point == "engine.complete.inside";
                announced |= ANNOUNCED_AFTER.contains(&point.as_str());
                if !places.iter().any(|place| place.kind == kind && place.point == point) {
                    let past_pivot = past_pivot && way == Way::There;
                    places.push(Place { kind: kind.to_owned(), point, way: way.clone(), past_pivot });
                }
            }
        }
        let missed: Vec<&String> =
            named.iter().filter(|point| !places.iter().any(|place| place.point == **point)).collect();
        assert!(missed.is_empty(), "no run passes these points: {missed:?}");
        places
    }

    /// The points that a job of this subject passes on this way, in order, each once.
    async fn trace(&self, no: usize, way: &Way, subject: &Subject) -> Vec<String> {
        let faults = self.faults(&format!("trace-{no}"), way.spec("permanent", "permanent"));
        let path = faults.dir.join("trace");
        let mut worker = self
            .worker()
            .queues(&[subject.queue.as_str()])
            .armed(&faults)
            .patient()
            .env("FLOTILLA_FAULTS_TRACE", path.display().to_string());
        if *way == Way::GivenBack {
            worker = worker.ignorant_of(&subject.kind);
        }
        let worker = worker.start();
        let job = self.begin(subject).await;
        if *way == Way::GivenBack {
            self.given_back(job).await;
            // Nobody who knows it comes.
            assert_eq!(self.postgres.cancel(job, None).await.expect("a cancel"), Cancel::Cancelled);
        } else {
            self.comes_to_its_end(subject, job, way).await;
        }
        assert!(worker.terminate().await.success(), "{}", worker.tail());
        let trace = std::fs::read_to_string(path).expect("the trace");
        each_once(trace.lines().filter(|point| passes(&subject.kind, point)))
    }

    /// Every place of an `ingest` job and of the job that embeds for it: on the way to their ends; on the way back when the
    /// embedding has failed for good; and on the way back when a person wants the end while it is under way. Fails the test if a point that the code names for their steps is not among them.
    pub async fn places_of_a_hand_over(&self) -> Vec<Place> {
        let there = self.trace_hand_over(&Way::There).await;
        let back = Way::Back("embed_version.vectors.after".to_owned());
        let undone = self.trace_hand_over(&back).await;
        let cancelled = self.trace_hand_over(&Way::Cancelled).await;
        let before = there.iter().position(|point| point == "ingest.publish.before").expect("its pivot");
        let ends = |point: &String| point.rsplit('.').next() == Some("after");
        let published = before + there[before..].iter().position(ends).expect("its end");
        // What is passed on the way there, too, is passed there first.
        let only = |points: Vec<String>| points.into_iter().filter(|point| !there.contains(point));
        let undone: Vec<_> = only(undone).map(|point| (point, &back)).collect();
        let cancelled: Vec<_> = only(cancelled).map(|point| (point, &Way::Cancelled)).collect();
        let ways = there.into_iter().map(|point| (point, &Way::There));
        let places = ways.chain(undone).chain(cancelled).enumerate();
        let places: Vec<Place> = places
            .map(|(no, (point, way))| Place {
                kind: "ingest".to_owned(),
                point,
                way: way.clone(),
                past_pivot: *way == Way::There && no >= published,
            })
            .collect();
        let named = self.fault_points_of(true);
        let steps = named.iter().filter(|point| {
            let of = point.split('.').next();
            !point.ends_with(".inside") && (of == Some("ingest") || of == Some("embed_version"))
        });
        let missed: Vec<&String> =
            steps.filter(|point| !places.iter().any(|place| place.point == **point)).collect();
        assert!(missed.is_empty(), "no run passes these points: {missed:?}");
        assert!(places.iter().any(|place| place.point.starts_with("engine.suspend.")), "{places:?}");
        assert!(places.iter().any(|place| place.point == CHILDREN), "{places:?}");
        let alive = ["engine.cancel_children.inside", "embed_version.vectors.compensate.before"];
        let cancelled =
            |point: &str| places.iter().any(|place| place.way == Way::Cancelled && place.point == point);
        assert!(alive.into_iter().all(cancelled), "{places:?}");
        places
    }

    /// The points that an `ingest` job and its embedding pass on this way, in order, each once.
    async fn trace_hand_over(&self, way: &Way) -> Vec<String> {
        let name = format!("trace-hand-over-{:?}", way.outcome());
        let faults = self.faults(&name, way.spec("permanent", "permanent"));
        let path = faults.dir.join("trace");
        let worker = self.worker().queues(&["ingest", "embed"]).handing_over().armed(&faults).patient();
        let worker = worker.env("FLOTILLA_FAULTS_TRACE", path.display().to_string()).start();
        let job = self.ingest(&name, &text(&name, 1)).await;
        if *way == Way::Cancelled {
            self.cancel_while_it_embeds(job, &faults).await;
        }
        assert_eq!(self.ended(job).await, way.outcome().state(), "{}", self.describe(job).await);
        worker.ready().await;
        assert!(worker.terminate().await.success(), "{}", worker.tail());
        let trace = std::fs::read_to_string(path).expect("the trace");
        let of = ["ingest", "embed_version", "engine"].map(Some);
        each_once(trace.lines().filter(|point| of.contains(&point.split('.').next())))
    }

    /// Wants a job's end, as a person does, when the job that embeds for it hangs.
    pub async fn cancel_while_it_embeds(&self, job: JobId, faults: &Faults) {
        wait_until("the embedding hangs", LONG, async || match faults.fired(EMBEDS) {
            0 => Err(self.describe(job).await),
            _ => Ok(()),
        })
        .await;
        assert_eq!(self.postgres.cancel(job, None).await.expect("a cancel"), Cancel::Requested);
    }
}

fn each_once<'a>(passed: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut points: Vec<String> = vec![];
    for point in passed {
        if !points.iter().any(|known| known == point) {
            points.push(point.to_owned());
        }
    }
    points
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
    let undone = undone(kind, points);
    let last = undone.last()?;
    Some(pivot(kind, points).map_or_else(|| format!("{last}.after"), |pivot| format!("{pivot}.before")))
}

/// A compensation of the kind.
fn stuck_at(kind: &str, points: &[String]) -> String {
    format!("{}.compensate.before", undone(kind, points)[0])
}

/// The kind's steps that can be undone, as `kind.step`.
fn undone<'a>(kind: &str, points: &'a [String]) -> Vec<&'a str> {
    let steps = points.iter().filter_map(|point| point.strip_suffix(".compensate.before"));
    steps.filter(|step| step.split('.').next() == Some(kind)).collect()
}

/// The kind's first step that can't be undone, as `kind.step`: one without a fault point at its compensation. Of `delete`, whose
/// steps can all not be undone, the tombstone.
fn pivot(kind: &str, points: &[String]) -> Option<String> {
    let mut steps = points.iter().filter_map(|point| point.strip_suffix(".before")).filter(|step| {
        step.split('.').next() == Some(kind)
            && !step.ends_with(".compensate")
            && !points.contains(&format!("{step}.compensate.before"))
    });
    let first = steps.clone().find(|step| *step == "delete.tombstone").or_else(|| steps.next());
    first.map(str::to_owned)
}
