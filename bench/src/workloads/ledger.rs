//! (b) and (c) again with the ledger. Enqueueing with it is measured by `flotilla bench enqueue`.

use std::time::{Duration, Instant};

use anyhow::ensure;
use devstack::testing::TestServices;

use super::{
    CALLERS, Plan,
    pickup::{WARM_UP, sample},
    say,
};
use crate::{
    fleet::Fleet,
    payload::Payload,
    report::{Figure, median, percentiles},
    server::Server,
    sides::{BATCH, Side, ledger::Producer},
};
use futures::{StreamExt, TryStreamExt, stream};
use sqlx::Connection;

const WORKERS: [usize; 2] = [1, 2];

pub async fn measure(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let jobs = plan.jobs / 10;
    let mut figures = vec![];
    for workers in WORKERS {
        let (mut rates, mut fast) = (vec![], vec![]);
        for _ in 0..plan.rounds {
            fast.push(super::drain::fast_rate(server, workers, jobs).await?);
            rates.push(drain(server, workers, jobs).await?);
        }
        figures.push(Figure::new(
            format!("drain.ledger.{workers}-workers"),
            "jobs/s",
            median(rates),
            "the same without a ledger",
            median(fast),
        ));
    }
    let (times, commits) = pick_ups(server, plan.samples).await?;
    let ((p50, p99), (least_p50, least_p99)) = (percentiles(times.clone()), percentiles(commits));
    let reference = "two commits of one row, one after the other";
    figures.push(Figure::new("pickup.ledger.p50", "ms", p50, reference, least_p50).times(times.clone()));
    figures.push(Figure::new("pickup.ledger.p99", "ms", p99, reference, least_p99).times(times));
    Ok(figures)
}

/// A fresh database for each run, so that none works on the rows of those before it.
async fn open(server: &Server) -> anyhow::Result<(TestServices, Producer)> {
    server.clear().await?;
    let services = TestServices::builder().postgres().start().await?;
    let producer = Producer::open(server.url(), services.postgres().url()).await?;
    Ok((services, producer))
}

async fn drain(server: &Server, workers: usize, jobs: u64) -> anyhow::Result<f64> {
    let (services, producer) = open(server).await?;
    let producer = &producer;
    stream::iter((0..jobs).step_by(BATCH))
        .map(|first| async move {
            let batch: Vec<_> = (first..(first + BATCH as u64).min(jobs)).map(Payload::now).collect();
            producer.push(&batch).await
        })
        .buffer_unordered(CALLERS)
        .try_collect::<()>()
        .await?;
    let database = Some(services.postgres().url());
    let mut fleet = Fleet::start(Side::Ledger, server.url(), database, workers, 2, false).await?;
    let rate = jobs as f64 / fleet.drain(jobs).await?.as_secs_f64();
    let handled: u64 = fleet.stop().await?.iter().map(|one| one.handled).sum();
    ensure!(handled == jobs, "{jobs} jobs were enqueued, {handled} handled");
    producer.check_all_ended(jobs).await?;
    say(format!("drain of {jobs} with the ledger, {workers} workers: {rate:.0}/s"));
    Ok(rate)
}

/// From before the enqueue until the handler runs; and, in turns with it, what the two commits in between take at the least on
/// this disk: one accepts a job, the other takes it.
async fn pick_ups(server: &Server, samples: u64) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (services, producer) = open(server).await?;
    let mut bare = sqlx::PgConnection::connect(services.postgres().url()).await?;
    sqlx::query("CREATE TABLE bare (id bigint PRIMARY KEY)").execute(&mut bare).await?;
    let database = Some(services.postgres().url());
    let mut fleet = Fleet::start(Side::Ledger, server.url(), database, 2, 1, true).await?;
    fleet.go().await?;
    let mut commits = vec![];
    let times = sample(&mut fleet, samples, async |number| {
        let start = Instant::now();
        for id in [2 * number, 2 * number + 1] {
            sqlx::query("INSERT INTO bare VALUES ($1)").bind(id as i64).execute(&mut bare).await?;
        }
        commits.push(start.elapsed());
        producer.push(&[Payload::now(number)]).await
    })
    .await?;
    let commits = commits.split_off(WARM_UP as usize);
    fleet.stop().await?;
    producer.check_all_ended(samples + WARM_UP).await?;
    let ((p50, p99), (least_p50, least_p99)) = (percentiles(times.clone()), percentiles(commits.clone()));
    say(format!(
        "pick-up with the ledger, two commits included: p50 {p50} ms, p99 {p99} ms; two bare commits: {least_p50} ms, {least_p99} ms"
    ));
    Ok((times, commits))
}
