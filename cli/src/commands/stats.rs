//! `flotilla stats`: how deep the queues are and how jobs end.

use std::{collections::BTreeMap, io::IsTerminal, time::Duration};

use queue::{Queue, QueueError, QueueName, QueueStats, Rates};
use sagas::stores::postgres::{Postgres, classes::ClassCount, inspect::JobCounts};
use serde::Serialize;

use super::queues::{NONE_KNOWN, or_all};
use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output::{self, print, span},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these; without it, all that somebody served or pushed to within a week
    #[arg(long, value_delimiter = ',')]
    queues: Vec<QueueName>,
    /// Show it again and again, every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Stats {
    /// `None`: Redis can't be asked.
    queues: Option<BTreeMap<String, One>>,
    /// Why not.
    #[serde(skip)]
    away: Option<String>,
    jobs: JobCounts,
    undispatched: i64,
    dead_letters: Vec<DeadLetters>,
    /// As of the last count; nothing where no tenant has a class.
    tenant_classes: Vec<ClassCount>,
    parked_sagas: i64,
}

#[derive(Debug, Serialize)]
struct One {
    #[serde(flatten)]
    now: QueueStats,
    rates: Rates,
    /// Workers that serve it, heard of within a minute.
    workers: usize,
}

#[derive(Debug, Serialize)]
struct DeadLetters {
    kind: String,
    class: String,
    open: i64,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    let queue = context.lazy_queue()?;
    loop {
        let stats = match (collect(&args.queues, &postgres, &queue).await, args.watch) {
            (Err(error), Some(seconds)) => {
                // Who watches wants to see when it is over.
                output::say(format!("{error:#}"));
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                continue;
            }
            (stats, _) => stats?,
        };
        if args.watch.is_some() && !context.out.json && std::io::stdout().is_terminal() {
            // Home and erase, so that the table stays in its place.
            print("\x1b[H\x1b[2J")?;
        }
        // People read it where the queues would stand: beside the table a clear would erase it.
        if let Some(away) = stats.away.as_ref().filter(|_| context.out.json) {
            output::say(away);
        }
        context.out.data(&stats, || described(&stats))?;
        match args.watch {
            None => return Ok(Ending::fine_if(stats.queues.is_some())),
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
        }
    }
}

async fn collect(only: &[QueueName], postgres: &Postgres, queue: &Queue) -> anyhow::Result<Stats> {
    let (queues, away) = match by_queue(only, queue).await {
        Ok(queues) => (Some(queues), None),
        // The ledger knows the rest, which is asked for most while Redis is away.
        Err(error) if error.is_unavailable() => {
            (None, Some(format!("how deep the queues are can't be told: {error}")))
        }
        Err(error) => return Err(error.into()),
    };
    let dead = postgres.dead_letter_counts().await?;
    Ok(Stats {
        queues,
        away,
        jobs: postgres.job_counts(None).await?,
        undispatched: postgres.undispatched_count().await?,
        dead_letters: dead.into_iter().map(|(kind, class, open)| DeadLetters { kind, class, open }).collect(),
        parked_sagas: postgres.parked_count().await?,
        tenant_classes: postgres.class_counts().await?,
    })
}

async fn by_queue(only: &[QueueName], queue: &Queue) -> Result<BTreeMap<String, One>, QueueError> {
    let living = queue.workers().await?;
    let mut all = BTreeMap::new();
    for name in or_all(only, queue).await? {
        let workers = living.iter().filter(|worker| worker.queues.contains(&name)).count();
        let one = One { now: queue.stats(&name).await?, rates: queue.rates(&name).await?, workers };
        all.insert(name.to_string(), one);
    }
    Ok(all)
}

fn described(stats: &Stats) -> String {
    let mut queues = output::table(&[
        "QUEUE",
        "P9",
        "P8",
        "P7",
        "P6",
        "P5",
        "P4",
        "P3",
        "P2",
        "P1",
        "P0",
        "READY",
        "SCHEDULED",
        "IN FLIGHT",
        "OLDEST",
        "ENDED/S",
        "DEAD/S",
        "WORKERS",
    ]);
    for (name, One { now: one, rates, workers }) in stats.queues.iter().flatten() {
        let mut row = vec![name.into()];
        row.extend(one.by_priority.iter().rev().map(|level| output::number(level.depth)));
        row.push(output::number(one.depth()));
        row.push(output::number(one.scheduled));
        row.push(output::number(one.in_flight));
        row.push(one.oldest_ms().map(|ms| span(Duration::from_millis(ms))).unwrap_or_default().into());
        row.push(output::number(format!("{:.1}", rates.minute.per_second())));
        row.push(output::number(format!("{:.1}", rates.minute.dead_per_second())));
        row.push(output::number(workers));
        queues.add_row(row);
    }
    let jobs = &stats.jobs;
    let mut ledger = output::table(&[
        "WAITING",
        "RUNNING",
        "SUCCEEDED",
        "CANCELLED",
        "DEAD",
        "PARKED",
        "REDELIVERED",
        "UNDISPATCHED",
        "PARKED SAGAS",
    ]);
    ledger.add_row(
        [
            jobs.waiting,
            jobs.running,
            jobs.succeeded,
            jobs.cancelled,
            jobs.dead,
            jobs.parked,
            jobs.redelivered,
            stats.undispatched,
            stats.parked_sagas,
        ]
        .map(output::number),
    );
    let mut text = output::tidy(&ledger);
    let head = stats.away.clone().unwrap_or_else(|| output::rows(&queues, NONE_KNOWN));
    text = format!("{}\n\n{text}", head.trim_end());
    if !stats.dead_letters.is_empty() {
        let mut dead = output::table(&["DEAD LETTERS OF", "CLASS", "OPEN"]);
        for one in &stats.dead_letters {
            dead.add_row([(&one.kind).into(), (&one.class).into(), output::number(one.open)]);
        }
        text = format!("{text}\n{}", output::tidy(&dead));
    }
    if !stats.tenant_classes.is_empty() {
        let mut classes = output::table(&["QUEUE", "CLASS", "READY", "RUNNING", "OLDEST", "ENDED/MIN"]);
        for one in &stats.tenant_classes {
            let oldest = one.oldest_s.map(|s| span(Duration::from_secs_f64(s.max(0.0)))).unwrap_or_default();
            classes.add_row([
                (&one.queue).into(),
                (&one.class).into(),
                output::number(one.waiting),
                output::number(one.running),
                oldest.into(),
                output::number(one.ended),
            ]);
        }
        text = format!("{text}\n{}", output::tidy(&classes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_the_queues_are_missing_stands_in_the_view() {
        let stats = Stats {
            queues: None,
            away: Some("Redis is away".to_owned()),
            jobs: JobCounts::default(),
            undispatched: 1,
            dead_letters: vec![],
            tenant_classes: vec![],
            parked_sagas: 0,
        };
        let view = described(&stats);
        assert!(view.starts_with("Redis is away\n\n") && view.contains("UNDISPATCHED"), "{view}");
    }
}
