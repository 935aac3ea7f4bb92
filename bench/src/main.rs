#![doc = include_str!("../README.md")]

mod fleet;
mod payload;
mod report;
mod saga;
mod server;
mod sides;
mod worker;
mod workloads;

use std::process::ExitCode;

use clap::Parser;
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    report::Report,
    workloads::{Plan, Workload},
};

/// As the product has it, for all sides.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Measures the queue beside apalis-redis and two minimal scripts, and sagas beside plain writes, on private services
#[derive(Debug, Parser)]
#[command(name = "flotilla-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the workloads and print their figures
    Queue(Args),
    /// Run sagas of three steps beside the same writes without them
    Saga(saga::Args),
    /// Be a worker process of one side
    #[command(hide = true)]
    Work(worker::Args),
    /// Be a worker process of the sagas
    #[command(hide = true)]
    SagaWork(saga::worker::Args),
}

#[derive(Debug, clap::Args)]
struct Args {
    /// Print JSON (there is no other form; `flotilla bench queue` makes a table of it)
    #[arg(long)]
    json: bool,
    /// Tiny sizes: shows that everything works, measures nothing
    #[arg(long)]
    quick: bool,
    /// Only these workloads
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Rounds, instead of the plan's
    #[arg(long)]
    rounds: Option<usize>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Work(args) => worker::run(args),
        Command::Queue(args) => queue(args),
        Command::Saga(args) => print("saga", saga::measure(&args)),
        Command::SagaWork(args) => saga::worker::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flotilla-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn queue(args: Args) -> anyhow::Result<()> {
    let mut plan = if args.quick { Plan::QUICK } else { Plan::FULL };
    plan.rounds = args.rounds.unwrap_or(plan.rounds).max(1);
    print("queue", workloads::run(plan, &args.only))
}

fn print(
    bench: &'static str,
    measure: impl Future<Output = anyhow::Result<Vec<report::Figure>>>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let results = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            results = measure => results,
            _ = terminate.recv() => anyhow::bail!("interrupted by SIGTERM"),
            _ = interrupt.recv() => anyhow::bail!("interrupted by SIGINT"),
        }
    })?;
    println!("{}", serde_json::to_string(&Report { bench, results })?);
    Ok(())
}
