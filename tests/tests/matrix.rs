//! The fault matrix: at every point of every saga, there and back, around and inside every store call and every write of the
//! log, a worker is killed, gets an error, hangs, or stops until its successor has ended the job. Each time the effect is there
//! exactly once, or not at all; a reader sees the old state or the new one; and what a zombie does changes nothing.
//!
//! The points are those that the sagas pass when they are run; their number, and that of the cases, is printed. `make test` runs
//! some of the cases, `make test-chaos` all: `FLOTILLA_MATRIX=all`. Any other value runs the cases whose name it is part of.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fmt,
    panic::AssertUnwindSafe,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use e2e::{Faults, Fleet, LONG, Outcome, PROBES, Place, Subject, Way, WorkerBuilder, wait_until};
use futures::{FutureExt, future::join_all};
use queue::JobId;

/// Cases that run side by side, each on a queue of its own.
const LANES: usize = 6;
/// Where a run is parked, and only Redis doesn't know it.
const PARKED: &str = "engine.park.after";
/// The action of a step that fails for good, whenever it is reached.
const FOR_GOOD: &str = "permanent*9";
/// Of the cases, so many run in `make test`.
const SOME: usize = 48;
/// Of those of a hand-over.
const SOME_HANDED_OVER: usize = 10;
/// Fleets on which those run side by side, if they are many: all embeddings of one fleet wait in one queue.
const FLEETS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// SIGKILL; another worker goes on.
    Kill,
    /// The point returns an error, once.
    Error,
    /// The point never returns, once.
    Hang,
    /// SIGSTOP until a successor has taken the run on and the job is published; then SIGCONT.
    ZombieAfterPublish,
    /// SIGSTOP until a successor has undone the run and another run is published; then SIGCONT.
    ZombieAfterThird,
}

impl Trouble {
    const ALL: [Self; 5] =
        [Self::Kill, Self::Error, Self::Hang, Self::ZombieAfterPublish, Self::ZombieAfterThird];

    /// Whether it can come here and differs from the others.
    fn fits(self, place: &Place) -> bool {
        match self {
            // Only a run that has not passed its pivot can still be undone, and only of a saga that has a step to undo.
            Self::ZombieAfterThird => {
                !place.way.leads_back()
                    && !place.past_pivot
                    && (matches!(place.kind.as_str(), "ingest" | "embed_document")
                        || PROBES.contains(&place.kind.as_str()))
            }
            _ => true,
        }
    }
}

#[derive(Clone)]
struct Case {
    place: Place,
    trouble: Trouble,
    subject: Subject,
    /// Whether an `ingest` job hands its embedding over to a job of the queue `embed`: the trouble comes to either.
    handed_over: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = if self.handed_over { " handed over" } else { "" };
        let cancelled = if self.place.way == Way::Cancelled { " cancelled" } else { "" };
        write!(f, "{}{over}{cancelled} {:?} at {}", self.place.kind, self.trouble, self.place.point)
    }
}

impl Case {
    fn all(places: &[Place], handed_over: bool) -> Vec<Self> {
        let mut cases: Vec<Self> = vec![];
        for trouble in Trouble::ALL {
            for place in places.iter().filter(|place| trouble.fits(place)) {
                let name = format!("case-{}", cases.len());
                // An ingest replaces a version that readers see all the while.
                let mut subject = match place.kind.as_str() {
                    "ingest" => Subject::again(&name, "lane"),
                    kind => Subject::new(kind, &name, "lane"),
                };
                if trouble == Trouble::Hang {
                    // Enough for the attempt after the hang, on a busy machine, too.
                    subject.timeout = Duration::from_secs(5);
                }
                cases.push(Self { place: place.clone(), trouble, subject, handed_over });
            }
        }
        cases
    }

    async fn run(&self, fleet: &Fleet, no: usize) {
        let reader = fleet.reader_of(&self.subject);
        let job = match self.trouble {
            Trouble::Kill => self.killed(fleet, no).await,
            Trouble::Error | Trouble::Hang => self.failed(fleet, no).await,
            Trouble::ZombieAfterPublish | Trouble::ZombieAfterThird => self.zombie(fleet, no).await,
        };
        fleet.audit_clean_of(&self.subject, job).await;
        if let Some(reader) = reader {
            reader.finish().await;
        }
    }

    /// What arms the point, and makes the saga come by it.
    fn spec(&self, action: &str) -> String {
        // Where it is being parked when it is met with trouble, the first time doesn't get into the log, but for the last place.
        let logged = self.place.is_after_a_retry() || self.place.point == PARKED;
        let stuck = if logged { "permanent" } else { "permanent*2" };
        format!("{}={action};{}", self.place.point, self.place.way.spec(FOR_GOOD, stuck))
    }

    /// Enqueues the job, and helps it to get to the point.
    async fn begin(&self, fleet: &Fleet, faults: &Faults) -> JobId {
        let job = fleet.begin(&self.subject).await;
        if self.place.way == Way::Cancelled {
            fleet.cancel_while_it_embeds(job, faults).await;
        }
        if self.place.is_after_a_retry() {
            fleet.retry_parked(job).await;
        }
        job
    }

    /// Waits for the job's end after the trouble.
    async fn comes_to_its_end(&self, fleet: &Fleet, job: JobId) {
        if self.place.is_after_a_retry() {
            fleet.assert_outcome(&self.subject, job, Outcome::Dead).await;
        } else {
            fleet.comes_to_its_end(&self.subject, job, &self.place.way).await;
        }
    }

    /// A worker that brings the job to its end.
    fn worker(&self, fleet: &Fleet) -> WorkerBuilder {
        let queue = self.subject.queue.as_str();
        let worker = fleet.worker();
        // On the way back the job's time does not count: what is no call ends with its step's own time.
        let hangs_back = self.trouble == Trouble::Hang && self.place.way.leads_back();
        let worker = if hangs_back { worker.env("FLOTILLA_FAULTS_STEP_MS", "3000") } else { worker };
        if self.handed_over {
            worker.queues(&[queue, "embed"]).handing_over()
        } else {
            worker.queues(&[queue])
        }
    }

    /// The worker that comes by the point.
    fn first(&self, fleet: &Fleet) -> WorkerBuilder {
        let worker = self.worker(fleet);
        if self.place.way == Way::GivenBack { worker.ignorant_of(&self.place.kind) } else { worker }
    }

    /// A failure that may pass, of a step that can still be undone, for one run's tries.
    fn passing_failure(&self) -> String {
        match self.place.kind.as_str() {
            // What its child has to undo.
            _ if self.place.way.leads_back() && self.place.point.starts_with("embed_version.") => {
                "embed_version.vectors.after=error*3".to_owned()
            }
            // Its pivot is announced: an error there that may pass doesn't turn the run back.
            kind @ ("probe" | "nap") => format!("{kind}.second.after=error*3"),
            kind @ ("revocable" | "gather") => format!("{kind}.third.after=error*3"),
            kind => format!("{kind}.publish.before=error*3"),
        }
    }

    /// One worker dies there; another, started only then, brings the job to its end.
    async fn killed(&self, fleet: &Fleet, no: usize) -> JobId {
        let faults = fleet.faults(&format!("case-{no}"), self.spec("kill"));
        let queue = self.subject.queue.as_str();
        let first = self.first(fleet).armed(&faults).start();
        let job = self.begin(fleet, &faults).await;
        first.killed().await;
        assert_eq!(faults.fired(&self.place.point), 1);
        let second = self.worker(fleet).armed(&faults).start();
        self.comes_to_its_end(fleet, job).await;
        let lost = fleet.postgres.job(job, None).await.unwrap().unwrap().lost_deliveries;
        assert!(lost <= 1, "{}", fleet.describe(job).await);
        fleet.let_go(queue, job).await;
        second.kill9().await;
        job
    }

    /// The point fails or hangs once; the job comes to the end that it would have come to.
    async fn failed(&self, fleet: &Fleet, no: usize) -> JobId {
        let action = if self.trouble == Trouble::Hang { "hang" } else { "error" };
        let faults = fleet.faults(&format!("case-{no}"), self.spec(action));
        let queue = self.subject.queue.as_str();
        let mut worker = self.first(fleet).armed(&faults).start();
        let job = self.begin(fleet, &faults).await;
        if self.place.way == Way::GivenBack {
            fleet.given_back(job).await;
            assert!(worker.terminate().await.success(), "{}", worker.tail());
            worker = self.worker(fleet).armed(&faults).start();
        }
        self.comes_to_its_end(fleet, job).await;
        assert_eq!(faults.fired(&self.place.point), 1, "{}", worker.tail());
        fleet.let_go(queue, job).await;
        worker.kill9().await;
        job
    }

    /// One worker stops there; when its successors have published and nothing is left to sweep, it goes on.
    async fn zombie(&self, fleet: &Fleet, no: usize) -> JobId {
        let queue = self.subject.queue.as_str();
        // What is undone is tried again, and published by another run.
        let fails = match &self.place.way {
            Way::There | Way::GivenBack => String::new(),
            way @ Way::Cancelled => way.spec(FOR_GOOD, FOR_GOOD),
            Way::Back(_) => self.passing_failure(),
            Way::Stuck(_, stuck_at) => format!("{};{stuck_at}=permanent", self.passing_failure()),
        };
        let stops = format!("{}=stop;{fails}", self.place.point);
        let stops = fleet.faults(&format!("case-{no}"), stops);
        let cancelled = self.place.way == Way::Cancelled;
        // An embedding that hangs has a slot of its own.
        let slots = if cancelled { 2 } else { 1 };
        let zombie = self.first(fleet).concurrency(slots).armed(&stops).start();
        let job = self.begin(fleet, &stops).await;
        wait_until("the fault point acts", LONG, async || match stops.fired(&self.place.point) {
            1 => Ok(()),
            _ => Err(format!("{}\n{}", fleet.describe(job).await, zombie.tail())),
        })
        .await;
        zombie.stopped().await;
        let fails = match self.trouble {
            Trouble::ZombieAfterThird => self.passing_failure(),
            _ if cancelled => self.place.way.spec(FOR_GOOD, FOR_GOOD),
            _ => String::new(),
        };
        let fails = fleet.faults(&format!("case-{no}-successor"), fails);
        let successor = self.worker(fleet).armed(&fails).start();
        if self.place.point == PARKED {
            fleet.retry_parked(job).await;
        }
        let outcome = if cancelled { Outcome::Cancelled } else { Outcome::Done };
        fleet.assert_outcome(&self.subject, job, outcome).await;
        let runs = fleet.postgres.sagas_of(job).await.unwrap();
        if self.trouble == Trouble::ZombieAfterThird {
            let undone = runs.iter().filter(|run| run.state == "compensated").count();
            let attempts = fleet.postgres.attempts(job).await.unwrap().len();
            assert_eq!(attempts, 1, "{}", fleet.describe(job).await);
            // A run that was stopped before its first row left nothing; then the successor's own was undone.
            assert_eq!(undone, 1, "{}", fleet.describe(job).await);
        }
        fleet.swept(&self.subject).await;
        let before = fleet.snapshot(&self.subject, job).await;
        assert_eq!(before.contains("embed_version"), self.handed_over, "{before}");
        // Where the job had ended before the zombie stopped, the successor may not listen to signals yet.
        successor.ready().await;
        assert!(successor.terminate().await.success(), "{}", successor.tail());

        zombie.resume();
        // When it has brought another job to its end in its one slot, it has done with the old one; with two, when it has ended.
        let kind = if self.place.kind == "probe" { "nap" } else { "probe" };
        let next = fleet.begin(&Subject::new(kind, &format!("next-{no}"), queue)).await;
        assert_eq!(fleet.ended(next).await, "succeeded", "{}", zombie.tail());
        if cancelled {
            assert!(zombie.terminate().await.success(), "{}", zombie.tail());
        }
        let after = fleet.snapshot(&self.subject, job).await;
        assert_eq!(before, after, "the zombie changed something\n{}", zombie.tail());
        fleet.let_go(queue, next).await;
        if !cancelled {
            zombie.kill9().await;
        }
        job
    }
}

/// Which of the cases run.
fn chosen(cases: Vec<Case>, some: usize) -> Vec<Case> {
    match std::env::var("FLOTILLA_MATRIX") {
        Ok(all) if all == "all" => cases,
        Ok(part) if !part.is_empty() => {
            cases.into_iter().filter(|case| case.to_string().contains(&part)).collect()
        }
        // An odd step, so that no trouble, kind or side of a call is always left out.
        _ => {
            let step = (cases.len() / some) | 1;
            cases
                .into_iter()
                .enumerate()
                .filter(|(no, _)| no % step == step / 2)
                .map(|(_, case)| case)
                .collect()
        }
    }
}

/// Prints how many cases there are of each trouble, and returns those that are chosen.
fn announced(cases: Vec<Case>, some: usize) -> Vec<Case> {
    for trouble in Trouble::ALL {
        println!("{trouble:?}: {} cases", cases.iter().filter(|case| case.trouble == trouble).count());
    }
    let total = cases.len();
    let chosen = chosen(cases, some);
    println!("chosen: {} of {total} cases", chosen.len());
    chosen
}

/// Runs the cases in so many lanes, and audits the stores when all have passed.
async fn run(fleet: &Fleet, mut cases: Vec<Case>, lanes: usize) {
    let began = Instant::now();
    if cases.is_empty() {
        return;
    }
    let mut subjects: Vec<Subject> = cases.iter().map(|case| case.subject.clone()).collect();
    fleet.seed(&mut subjects).await;
    for (case, subject) in cases.iter_mut().zip(subjects) {
        case.subject = subject;
    }
    // A lane takes the next case when it is free, since some last ten times as long as others.
    let next = AtomicUsize::new(0);
    let lane = async |lane: usize| {
        let mut failed = vec![];
        loop {
            let no = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(no) else { return failed };
            let case = Case { subject: case.subject.in_queue(&format!("lane-{lane}")), ..case.clone() };
            let began = Instant::now();
            let done = AssertUnwindSafe(case.run(fleet, no)).catch_unwind().await;
            let word = if done.is_ok() { "passed" } else { "FAILED" };
            println!("case {no}: {case}: {word}, {:.1} s", began.elapsed().as_secs_f64());
            if done.is_err() {
                failed.push(format!("case {no}: {case}"));
                // Its job may still be under way: the lane's next case gets a clean queue.
                return failed;
            }
        }
    };
    let failed: Vec<String> = join_all((0..lanes).map(lane)).await.concat();
    let run = next.load(Ordering::Relaxed).min(cases.len());
    println!(
        "{} of {run} cases passed, of {}, in {:.0} s",
        run - failed.len(),
        cases.len(),
        began.elapsed().as_secs_f64()
    );
    assert!(failed.is_empty(), "{failed:#?}");
    let janitor = fleet.worker().start();
    janitor.ready().await;
    let report = fleet.audit_clean().await;
    println!("audited {:?}", report.counts);
    assert!(janitor.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_at_any_point_leaves_one_effect_or_none_and_no_half_state() {
    let fleet = Fleet::start().await;
    let places = fleet.places().await;
    let points: std::collections::BTreeSet<&str> = places.iter().map(|place| place.point.as_str()).collect();
    let cases = Case::all(&places, false);
    println!(
        "{} points, passed by jobs of all kinds at {} places, make {} cases",
        points.len(),
        places.len(),
        cases.len()
    );
    run(&fleet, announced(cases, SOME), LANES).await;
    fleet.end();
}

/// On each fleet in one lane.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_an_embedding_that_is_handed_over_leaves_one_effect_and_no_half_state() {
    let fleet = Fleet::start().await;
    let places = fleet.places_of_a_hand_over().await;
    let cases = Case::all(&places, true);
    println!("{} points of a job and its embedding make {} cases", places.len(), cases.len());
    let cases = announced(cases, SOME_HANDED_OVER);
    let more = if cases.len() > 10 * FLEETS { FLEETS - 1 } else { 0 };
    let mut fleets = vec![fleet];
    fleets.extend(join_all((0..more).map(|_| Fleet::start())).await);
    let part = |no| cases.iter().skip(no).step_by(fleets.len()).cloned().collect();
    join_all(fleets.iter().enumerate().map(|(no, fleet)| run(fleet, part(no), 1))).await;
    let last = fleets.pop();
    drop(fleets);
    last.into_iter().for_each(Fleet::end);
}
