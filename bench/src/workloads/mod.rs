//! What is measured. Sides take turns in every round, so that a change in the machine's mood hits all of them, and a
//! figure is the median of its rounds.

mod drain;
mod enqueue;
mod ledger;
mod memory;
mod pickup;

use std::ops::Range;

use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    payload::Payload,
    report::Figure,
    server::Server,
    sides::{BATCH, Producer},
};

/// Calls under way at once while jobs are enqueued in batches.
const CALLERS: usize = 4;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Every side gets so many turns.
    pub rounds: usize,
    /// Jobs enqueued in batches, and drained.
    pub jobs: u64,
    /// Jobs enqueued one by one.
    pub singles: u64,
    /// Jobs that wait in the deep queue, and their tenants.
    pub deep: u64,
    pub tenants: u64,
    /// Single jobs whose pick-up is timed.
    pub samples: u64,
}

impl Plan {
    pub const FULL: Self =
        Self { rounds: 3, jobs: 200_000, singles: 20_000, deep: 1_000_000, tenants: 1000, samples: 500 };
    pub const QUICK: Self =
        Self { rounds: 1, jobs: 2000, singles: 200, deep: 4000, tenants: 20, samples: 20 };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// (a) Jobs enqueued one by one and in batches
    Enqueue,
    /// (b) Jobs that do nothing, drained by one and two worker processes
    Drain,
    /// (c) From the enqueue of a single job to its handler, on an idle fleet
    Pickup,
    /// (d) As (b), with a deep queue of many tenants and all priorities
    Deep,
    /// (e) Redis memory of a waiting job
    Memory,
    /// (b) and (c) again with the ledger in Postgres
    Ledger,
}

/// Runs the workloads; all if none is named.
pub async fn run(plan: Plan, only: &[Workload]) -> anyhow::Result<Vec<Figure>> {
    let wanted = |workload| only.is_empty() || only.contains(&workload);
    let server = Server::start().await?;
    let mut figures = vec![];
    if wanted(Workload::Enqueue) {
        figures.extend(enqueue::measure(&server, plan).await?);
    }
    if wanted(Workload::Drain) {
        figures.extend(drain::measure(&server, plan).await?);
    }
    if wanted(Workload::Pickup) {
        figures.extend(pickup::measure(&server, plan).await?);
    }
    if wanted(Workload::Deep) {
        figures.extend(drain::measure_deep(&server, plan).await?);
    }
    if wanted(Workload::Memory) {
        figures.extend(memory::measure(&server, plan).await?);
    }
    if wanted(Workload::Ledger) {
        figures.extend(ledger::measure(&server, plan).await?);
    }
    Ok(figures)
}

fn say(what: impl std::fmt::Display) {
    eprintln!("{what}");
}

/// Enqueues jobs in batches, a few calls side by side.
async fn fill(producer: &Producer, numbers: Range<u64>) -> anyhow::Result<()> {
    let end = numbers.end;
    stream::iter(numbers.step_by(BATCH))
        .map(|first| {
            let batch = (first..(first + BATCH as u64).min(end)).map(Payload::now).collect();
            producer.push(batch)
        })
        .buffer_unordered(CALLERS)
        .try_collect()
        .await
}
