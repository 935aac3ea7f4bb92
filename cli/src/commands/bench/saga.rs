//! Sagas per second: three steps through the public API, and the real ingest saga with feature hashing.

use super::{Provider, Report, ingest, program};
use crate::context::Context;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tiny sizes: shows that everything works, measures nothing
    #[arg(long)]
    quick: bool,
    /// Sagas of one run of `three-step`
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(400..=1_000_000))]
    jobs: u64,
    /// Rounds, of which a figure is the median
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only the latencies, at so many sagas a second instead of half of what a drain reaches
    #[arg(long)]
    rate: Option<u32>,
    /// Worker processes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: u8,
}

/// What `flotilla-bench` measures of `three-step`, then the workload `ingest-hash`: documents of 1 KB.
pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let mut forwarded: Vec<String> = [
        ("--jobs", args.jobs.to_string()),
        ("--rounds", args.rounds.to_string()),
        ("--workers", args.workers.to_string()),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.to_owned(), value])
    .collect();
    if args.quick {
        forwarded.push("--quick".to_owned());
    }
    if let Some(rate) = args.rate {
        forwarded.extend(["--rate".to_owned(), rate.to_string()]);
        return program::run("saga", &forwarded).await;
    }
    let mut report = program::run("saga", &forwarded).await?;
    let documents = if args.quick { 100 } else { 5000 };
    let ingest = ingest::Args {
        documents,
        words: KILOBYTE,
        embedder: Provider::Hash,
        workers: 2,
        concurrency: ingest::CONCURRENCY,
    };
    for mut figure in Box::pin(ingest::measure(ingest, context)).await?.results {
        "ingest-hash".clone_into(&mut figure.name);
        report.results.push(figure);
    }
    Ok(report)
}

/// Words of about 1 KB of text.
const KILOBYTE: u16 = 150;
