#![doc = include_str!("../README.md")]

mod commands;
mod config;
mod context;
mod failure;
mod output;
mod signals;
mod times;

use std::{ffi::OsStr, process::ExitCode, time::Duration};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, builder::Resettable};
use telemetry::{Telemetry, TelemetryConfig};
use tikv_jemallocator::Jemalloc;

use crate::{
    commands::{
        audit, batches, bench, breakers, dev, dlq, documents, encryption, enqueue, events, import, jobs,
        keys, migrate, producer, queues, sagas, schedules, search, stats, tenants, worker,
    },
    config::{Settings, StoreArgs},
    context::Context,
    failure::Outcome,
    output::Output,
};

/// A fifth less CPU for a saga than with the C library's (`docs/decisions/0056-jemalloc.md`).
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Flotilla: a fleet of workers that runs jobs as sagas over Postgres, Qdrant and Redis
///
/// Data goes to stdout, messages to stderr. Exit codes: 0 done; 1 what was asked about has a problem or does not exist;
/// 2 it could not be done (usage, or a store that can't be reached).
#[derive(Debug, Parser)]
#[command(name = "flotilla", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Print data as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    stores: StoreArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start, stop and look at private Postgres, Redis and vector servers on this machine
    #[command(subcommand)]
    Dev(dev::Command),
    /// Bring the database's schema up to date, or back
    #[command(subcommand)]
    Migrate(migrate::Command),
    /// Serve the HTTP API, and keep the queue in step with the ledger
    Producer(producer::Args),
    /// Run jobs: claim them from the queues, run each as a saga, drain on SIGTERM
    Worker(worker::Args),
    /// Pause, resume, drain and limit queues
    #[command(subcommand)]
    Queues(queues::Command),
    /// Make, show, pause and limit tenants, the owners of documents and jobs
    #[command(subcommand)]
    Tenants(tenants::Command),
    /// Make and revoke API keys
    #[command(subcommand)]
    Keys(keys::Command),
    /// Enqueue one job
    Enqueue(enqueue::Args),
    /// Enqueue an ingest job for each file of a folder, or each line of a JSONL file
    Import(import::Args),
    /// List, show, cancel, reprioritise and snooze jobs
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// Make, show, pause and remove recurring jobs
    #[command(subcommand)]
    Schedules(schedules::Command),
    /// List, show and cancel batches: jobs that are counted together
    #[command(subcommand)]
    Batches(batches::Command),
    /// List, show, replay and discard dead letters
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// List saga runs, draw their timelines, and deal with parked ones
    #[command(subcommand)]
    Sagas(sagas::Command),
    /// Find the chunks whose meaning is nearest to a text
    Search(search::Args),
    /// Read published documents
    #[command(subcommand)]
    Documents(documents::Command),
    /// Follow what other services hear of documents
    #[command(subcommand)]
    Events(events::Command),
    /// Make, look at and rotate the keys that payloads are sealed with
    #[command(subcommand)]
    Encryption(encryption::Command),
    /// Show how deep the queues are and how jobs end
    Stats(stats::Args),
    /// Show which dependencies the workers find down, and who probes them
    Breakers,
    /// Compare the stores; exit code 1 if they disagree
    Audit(audit::Args),
    /// Measure this machine: embedding, enqueueing, ingesting; and break it on purpose
    #[command(subcommand)]
    Bench(bench::Command),
}

impl Command {
    /// The name in traces and what is logged by default.
    fn telemetry(&self) -> (&'static str, &'static str) {
        match self {
            Self::Producer(_) => ("flotilla-producer", "info"),
            Self::Worker(_) => ("flotilla-worker", "info"),
            _ => ("flotilla", "warn"),
        }
    }
}

fn main() -> ExitCode {
    let mut given = without_empty(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches_mut(&mut given).unwrap_or_else(|error| error.exit());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(Err(error.into())),
    };
    let code = failure::report(runtime.block_on(run(cli)));
    // A thread that waits for stdin must not hold up the end.
    runtime.shutdown_background();
    code
}

/// An empty variable counts as not set, also where a flag of the same meaning would refuse an empty value.
fn without_empty(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if arg.get_env().is_some_and(is_empty) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(without_empty)
}

async fn run(cli: Cli) -> Outcome {
    let (name, filter) = cli.command.telemetry();
    let telemetry = telemetry::init(name, &TelemetryConfig::from_env(filter)?)?;
    let context = Context {
        settings: Settings::new(&cli.stores)?,
        out: Output { json: cli.json },
        dir: cli.stores.dir.clone(),
    };
    context.settings.log_sources();
    let outcome = Box::pin(dispatch(cli.command, context, &telemetry)).await;
    telemetry.shutdown(Duration::from_secs(2)).await;
    outcome
}

async fn dispatch(command: Command, context: Context, telemetry: &Telemetry) -> Outcome {
    match command {
        Command::Dev(command) => Box::pin(dev::run(command, &context)).await,
        Command::Migrate(command) => migrate::run(command, &context).await,
        Command::Producer(args) => Box::pin(producer::run(args, &context, telemetry)).await,
        Command::Worker(args) => Box::pin(worker::run(args, &context, telemetry)).await,
        Command::Queues(command) => queues::run(command, &context).await,
        Command::Tenants(command) => tenants::run(command, &context).await,
        Command::Keys(command) => keys::run(command, &context).await,
        Command::Enqueue(args) => Box::pin(enqueue::run(args, &context)).await,
        Command::Import(args) => Box::pin(import::run(args, &context)).await,
        Command::Jobs(command) => jobs::run(command, &context).await,
        Command::Schedules(command) => Box::pin(schedules::run(command, &context)).await,
        Command::Batches(command) => Box::pin(batches::run(command, &context)).await,
        Command::Dlq(command) => Box::pin(dlq::run(command, &context)).await,
        Command::Sagas(command) => sagas::run(command, &context).await,
        Command::Search(args) => Box::pin(search::run(args, &context)).await,
        Command::Documents(command) => documents::run(command, &context).await,
        Command::Events(command) => events::run(command, &context).await,
        Command::Encryption(command) => encryption::run(command, &context).await,
        Command::Stats(args) => Box::pin(stats::run(args, &context)).await,
        Command::Breakers => breakers::run(&context).await,
        Command::Audit(args) => Box::pin(audit::run(args, &context)).await,
        Command::Bench(command) => Box::pin(bench::run(command, &context, telemetry)).await,
    }
}
