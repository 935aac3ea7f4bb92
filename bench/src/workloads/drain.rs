//! (b) and (d) Draining a queue with worker processes.

use std::{collections::HashMap, time::Duration};

use anyhow::ensure;

use super::{Plan, fill, say};
use crate::{
    fleet::Fleet,
    report::{Figure, median},
    server::Server,
    sides::{Producer, Side, Spread},
};

const SIDES: [Side; 4] = [Side::Ours, Side::Peer, Side::Floor, Side::FloorPlain];
const WORKERS: [usize; 2] = [1, 2];

/// What one drain took.
#[derive(Debug, Clone, Copy)]
struct Drained {
    jobs: u64,
    took: Duration,
    /// CPU time of all workers and of Redis for one job, in µs.
    worker_us: f64,
    redis_us: f64,
    /// The most memory that any worker had.
    rss_mb: f64,
}

impl Drained {
    fn rate(&self) -> f64 {
        self.jobs as f64 / self.took.as_secs_f64()
    }
}

/// Every job is handled once, by processes that existed before the clock started, and nothing is left behind.
async fn drain(
    server: &Server,
    side: Side,
    workers: usize,
    jobs: u64,
    spread: Spread,
) -> anyhow::Result<Drained> {
    server.clear().await?;
    let producer = Producer::open(side, server.url(), spread).await?;
    fill(&producer, 0..jobs).await?;
    producer.settle().await?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (cores / workers).max(1);
    let mut fleet = Fleet::start(side, server.url(), None, workers, threads, false).await?;
    let redis = server.cpu().await?;
    let took = fleet.drain(jobs).await?;
    let redis_us = (server.cpu().await? - redis) * 1e6 / jobs as f64;
    let used = fleet.stop().await?;
    let handled: u64 = used.iter().map(|one| one.handled).sum();
    ensure!(handled == jobs, "{}: {jobs} jobs were enqueued, {handled} handled", side.name());
    let left = producer.left().await?;
    ensure!(left == 0, "{}: {left} jobs were left behind", side.name());
    let drained = Drained {
        jobs,
        took,
        worker_us: used.iter().map(|one| one.cpu.as_secs_f64()).sum::<f64>() * 1e6 / jobs as f64,
        redis_us,
        rss_mb: used.iter().map(|one| one.peak_rss_kb).max().unwrap_or(0) as f64 / 1024.0,
    };
    say(format!(
        "drain of {jobs}, {workers} workers, {}: {:.0}/s; CPU of a job: workers {:.2} µs, Redis {:.2} µs; {:.1} MB",
        side.name(),
        drained.rate(),
        drained.worker_us,
        drained.redis_us,
        drained.rss_mb,
    ));
    Ok(drained)
}

/// Jobs per second of this queue without a ledger.
pub async fn fast_rate(server: &Server, workers: usize, jobs: u64) -> anyhow::Result<f64> {
    Ok(drain(server, Side::Ours, workers, jobs, Spread::NONE).await?.rate())
}

fn of(runs: &[Drained], read: impl Fn(&Drained) -> f64) -> f64 {
    median(runs.iter().map(read))
}

/// (b)
pub async fn measure(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let mut runs = HashMap::<(Side, usize), Vec<Drained>>::new();
    for round in 1..=plan.rounds {
        say(format!("round {round}: drain"));
        for workers in WORKERS {
            for side in SIDES {
                let drained = drain(server, side, workers, plan.jobs, Spread::NONE).await?;
                runs.entry((side, workers)).or_default().push(drained);
            }
        }
    }
    let mut figures = vec![];
    for workers in WORKERS {
        let ours = &runs[&(Side::Ours, workers)];
        for (side, reference) in [
            (Side::Peer, "apalis-redis without leases"),
            (Side::Floor, "floor: two minimal scripts through apalis"),
            (Side::FloorPlain, "the same scripts without apalis"),
        ] {
            let other = &runs[&(side, workers)];
            figures.push(Figure::new(
                format!("drain.fast.{workers}-workers.vs-{}", side.name()),
                "jobs/s",
                of(ours, Drained::rate),
                reference,
                of(other, Drained::rate),
            ));
        }
        for (what, read) in [
            ("worker-cpu", (|run: &Drained| run.worker_us) as fn(&Drained) -> f64),
            ("redis-cpu", |run: &Drained| run.redis_us),
        ] {
            figures.push(Figure::new(
                format!("drain.fast.{workers}-workers.{what}"),
                "µs/job",
                of(ours, read),
                "apalis-redis without leases",
                of(&runs[&(Side::Peer, workers)], read),
            ));
        }
        let most = |side| runs[&(side, workers)].iter().map(|run| run.rss_mb).fold(0.0, f64::max);
        figures.push(Figure::new(
            format!("drain.fast.{workers}-workers.worker-rss"),
            "MB",
            most(Side::Ours),
            "apalis-redis without leases",
            most(Side::Peer),
        ));
    }
    Ok(figures)
}

/// (d)
pub async fn measure_deep(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let spread = Spread { tenants: plan.tenants, priorities: 10 };
    let mut figures = vec![];
    for workers in WORKERS {
        let (mut flat, mut deep) = (vec![], vec![]);
        // A deep round takes as long as several others.
        for _ in 0..plan.rounds.div_ceil(2) {
            flat.push(drain(server, Side::Ours, workers, plan.jobs, Spread::NONE).await?);
            deep.push(drain(server, Side::Ours, workers, plan.deep, spread).await?);
        }
        figures.push(Figure::new(
            format!("drain-deep.fast.{workers}-workers"),
            "µs/job",
            1e6 / of(&deep, Drained::rate),
            format!(
                "the same with {} jobs of one tenant and priority instead of {} of {} and 10",
                plan.jobs, plan.deep, plan.tenants
            ),
            1e6 / of(&flat, Drained::rate),
        ));
    }
    Ok(figures)
}
