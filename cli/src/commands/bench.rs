//! `flotilla bench`: what this machine does, each figure beside a plain way to do the same.
//!
//! Everything runs on private servers in a directory of its own, on loopback addresses, and is removed afterwards.

mod audit;
mod chaos;
mod embed;
mod enqueue;
mod ingest;
mod program;
mod queue;
mod saga;
mod sandbox;
mod texts;

use std::{borrow::Cow, time::Duration};

use serde::{Deserialize, Serialize};
use telemetry::Telemetry;

use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Points audited per second, and the memory that it takes, beside a plain scroll
    Audit(audit::Args),
    /// Texts embedded per second, in batches and one by one
    Embed(embed::Args),
    /// Jobs accepted per second, durably: one by one and in batches, beside plain inserts
    Enqueue(enqueue::Args),
    /// Documents ingested per second by worker processes, beside a plain loop that does the same writes
    Ingest(ingest::Args),
    /// The queue alone: enqueue, drain, pick-up, depth, memory, beside apalis-redis and two minimal scripts
    Queue(queue::Args),
    /// Kill, pause and cut off workers and servers at random under load, then check all that happened; exit code 1 if it is
    /// not what it should be
    Chaos(chaos::Args),
    /// Be a worker of `bench chaos`
    #[command(hide = true)]
    ChaosWorker(super::worker::Args),
    /// Sagas per second: three steps through the public API beside plain writes, and documents of 1 KB
    Saga(saga::Args),
}

/// Which embedding provider is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Provider {
    /// Feature hashing: nearly free, so that everything else is measured
    Hash,
    /// The local model
    Local,
}

impl Provider {
    /// Its name in `FLOTILLA_EMBEDDER`.
    fn name(self) -> &'static str {
        match self {
            Self::Hash => "hash",
            Self::Local => "local",
        }
    }

    /// The provider, with the settings of this process for the rest.
    fn open(self, context: &Context) -> anyhow::Result<std::sync::Arc<dyn embedding::Embedder>> {
        let config = embedding::EmbedderConfig::from_variables(|name| match name {
            "FLOTILLA_EMBEDDER" => Some(self.name().to_owned()),
            _ => context.settings.get(name),
        })?;
        Ok(embedding::open(&config)?)
    }
}

/// What is printed.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    bench: Cow<'static, str>,
    results: Vec<Figure>,
}

/// One figure.
#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    name: String,
    value: f64,
    unit: Cow<'static, str>,
    /// What the figure is compared with.
    reference: String,
    /// That, in the same unit.
    reference_value: f64,
    /// The value over the reference's.
    ratio: f64,
    /// Median and 99th percentile of one call or job, in milliseconds.
    p50: f64,
    p99: f64,
}

impl Figure {
    fn new(
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
        times: Vec<Duration>,
        reference: (String, f64),
    ) -> Self {
        let (p50, p99) = percentiles(times);
        let (reference, reference_value) = reference;
        Self {
            name: name.into(),
            value: rounded(value),
            unit: unit.into(),
            reference,
            reference_value: rounded(reference_value),
            ratio: (value / reference_value.max(1e-9) * 1000.0).round() / 1000.0,
            p50,
            p99,
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Median and 99th percentile in milliseconds.
fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
        times.get(index).map_or(0.0, |time| (time.as_secs_f64() * 1e6).round() / 1e3)
    };
    (at(0.5), at(0.99))
}

pub async fn run(command: Command, context: &Context, telemetry: &Telemetry) -> Outcome {
    let report = match command {
        Command::Chaos(args) => return Box::pin(chaos::run(args, context)).await,
        Command::ChaosWorker(args) => return Box::pin(chaos::work(args, context, telemetry)).await,
        Command::Audit(args) => Box::pin(audit::measure(args, context)).await?,
        Command::Embed(args) => Box::pin(embed::measure(args, context)).await?,
        Command::Enqueue(args) => Box::pin(enqueue::measure(args, context)).await?,
        Command::Ingest(args) => Box::pin(ingest::measure(args, context)).await?,
        Command::Queue(args) => Box::pin(queue::measure(args, context)).await?,
        Command::Saga(args) => Box::pin(saga::measure(args, context)).await?,
    };
    context.out.data(&report, || {
        let mut table = output::table(&[
            "FIGURE",
            "VALUE",
            "UNIT",
            "P50 MS",
            "P99 MS",
            "RATIO",
            "REFERENCE",
            "ITS VALUE",
        ]);
        for one in &report.results {
            table.add_row([
                (&one.name).into(),
                output::number(one.value),
                one.unit.as_ref().into(),
                output::number(one.p50),
                output::number(one.p99),
                output::number(one.ratio),
                (&one.reference).into(),
                output::number(one.reference_value),
            ]);
        }
        output::tidy(&table)
    })?;
    Ok(Ending::Fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let times = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(percentiles(times), (100.0, 198.0));
        assert_eq!(percentiles(vec![Duration::from_millis(7)]), (7.0, 7.0));
        assert_eq!(percentiles(vec![]), (0.0, 0.0));
    }
}
