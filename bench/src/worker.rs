//! A worker process: says `ready`, waits for a line on stdin, runs one side, says how far it is, and ends when stdin
//! ends.

use std::time::Duration;

use anyhow::Context as _;
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_util::sync::CancellationToken;

use crate::sides::{Counter, Side, floor, ledger, ours, peer};

/// How often a worker says how many jobs it has handled.
const TELL_EVERY: Duration = Duration::from_millis(5);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    pub side: Side,
    /// The Redis server
    #[arg(long)]
    pub url: String,
    /// The Postgres server; for the ledger
    #[arg(long)]
    pub database: Option<String>,
    /// Print how long each job took from its enqueue to its handler
    #[arg(long)]
    pub tell: bool,
    /// Threads of the runtime
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
}

/// Runs to the end of stdin.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut builder = match args.threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    builder.enable_all().build()?.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let counter = Counter::new(args.tell);
    println!("ready");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    lines.next_line().await?.context("stdin ended before the start")?;

    let stop = CancellationToken::new();
    let work = async {
        let (url, counter, stop) = (&args.url, counter.clone(), stop.clone());
        match args.side {
            Side::Ours => ours::work(url, counter, stop).await,
            Side::Ledger => {
                let database = args.database.as_deref().context("--database is missing")?;
                ledger::work(url, database, counter, stop).await
            }
            Side::Peer => peer::work(url, counter, stop).await,
            Side::Floor => floor::work(url, counter, stop).await,
            Side::FloorPlain => floor::work_plain(url, counter, stop).await,
        }
    };
    let tell = async {
        let mut told = 0;
        loop {
            tokio::select! {
                line = lines.next_line() => if line?.is_none() { break },
                () = tokio::time::sleep(TELL_EVERY) => {}
            }
            let handled = counter.handled();
            if handled != told && !args.tell {
                println!("handled {handled}");
                told = handled;
            }
        }
        stop.cancel();
        anyhow::Ok(())
    };
    tokio::try_join!(work, tell)?;

    let used = used()?;
    println!("ended {} {} {}", counter.handled(), used.cpu.as_micros(), used.peak_rss_kb);
    Ok(())
}

/// CPU and memory of one process.
pub struct Usage {
    pub cpu: Duration,
    pub peak_rss_kb: u64,
}

/// What this process has used so far.
pub fn used() -> anyhow::Result<Usage> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let cpu_us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Usage { cpu: Duration::from_micros(cpu_us.unsigned_abs()), peak_rss_kb: peak_rss_kb() })
}

/// The most memory that this process ever had resident, in KiB; 0 where /proc doesn't say.
fn peak_rss_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
