//! The crash matrix: a worker is killed at every point of every step, on the way there and on the way back, and inside the
//! store writes. Another worker resumes or compensates, and the effect is there exactly once, or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Instant;

use e2e::{Fleet, Outcome, Place, Subject};
use futures::future::join_all;

/// Cases that run side by side, each on a queue of its own.
const LANES: usize = 4;

struct Case {
    place: Place,
    subject: Subject,
}

impl Case {
    fn outcome(&self) -> Outcome {
        if self.place.fails_at.is_some() { Outcome::Dead } else { Outcome::Done }
    }

    /// One worker dies there; another, started only then, brings the job to its end.
    async fn run(&self, fleet: &Fleet, no: usize) {
        let began = Instant::now();
        let Place { kind, point, fails_at } = &self.place;
        let fails = fails_at.as_ref().map(|at| format!(";{at}=permanent")).unwrap_or_default();
        let faults = fleet.faults(&format!("case-{no}"), format!("{point}=kill{fails}"));
        let queue = self.subject.queue.as_str();
        let first = fleet.worker().queues(&[queue]).armed(&faults).start();
        let job = fleet.begin(&self.subject).await;
        first.killed().await;
        assert_eq!(faults.fired(point), 1, "{point}");
        let second = fleet.worker().queues(&[queue]).armed(&faults).start();
        fleet.assert_outcome(&self.subject, job, self.outcome()).await;
        let lost = fleet.postgres.job(job, None).await.unwrap().unwrap().lost_deliveries;
        assert!(lost <= 1, "{}", fleet.describe(job).await);
        // No other worker serves this queue any more, once the last case is over.
        fleet.let_go(queue, job).await;
        second.kill9().await;
        println!(
            "case {no}: {kind} killed at {point}: {:?}, {:.1} s",
            self.outcome(),
            began.elapsed().as_secs_f64()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_anywhere_leaves_exactly_one_effect_or_none() {
    let began = Instant::now();
    let fleet = Fleet::start().await;
    let places = Place::all(&fleet.fault_points());
    let mut subjects: Vec<Subject> = places
        .iter()
        .enumerate()
        .map(|(no, place)| {
            Subject::new(&place.kind, &format!("{}-{no}", place.kind), &format!("lane-{}", no % LANES))
        })
        .collect();
    fleet.seed(&mut subjects).await;
    // Documents that are embedded anew are readable all the while, whatever is killed.
    let watched = subjects.iter().filter(|subject| subject.kind.starts_with("embed"));
    let reader = fleet.reader(watched.map(|subject| (subject.document.clone(), vec![subject.text()])));
    let cases: Vec<Case> =
        places.into_iter().zip(subjects).map(|(place, subject)| Case { place, subject }).collect();
    let lane = async |lane: usize| {
        let mut passed = 0;
        for (no, case) in cases.iter().enumerate().filter(|(no, _)| no % LANES == lane) {
            case.run(&fleet, no).await;
            passed += 1;
        }
        passed
    };
    let passed: usize = join_all((0..LANES).map(lane)).await.into_iter().sum();
    let janitor = fleet.worker().start();
    janitor.ready().await;
    let report = fleet.audit_clean().await;
    let history = reader.finish().await;
    println!(
        "{passed} of {} cases passed in {:.0} s; {} looks of a reader; audited {:?}",
        cases.len(),
        began.elapsed().as_secs_f64(),
        history.looks,
        report.counts
    );
    assert!(janitor.terminate().await.success());
    drop(janitor);
    fleet.end();
}
