//! The queue beside a peer and a floor. Measured by `flotilla-bench`, a program of its own, so that this one depends on no
//! other queue.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, anyhow, bail};
use tokio::process::Command;

use super::{Report, enqueue};
use crate::context::Context;

const PROGRAM: &str = "flotilla-bench";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tiny sizes: shows that everything works, measures nothing
    #[arg(long)]
    quick: bool,
    /// Only these workloads: enqueue, drain, pickup, deep, memory, ledger
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds, of which a figure is the median (default 3)
    #[arg(long)]
    rounds: Option<u32>,
}

/// What `flotilla-bench` measures, and enqueueing with the ledger, which takes the product's own producer.
pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let wanted = |workload: &str| args.only.is_empty() || args.only.iter().any(|one| one == workload);
    let mut report = run(&args).await?;
    if wanted("ledger") {
        let jobs = if args.quick { 200 } else { 20_000 };
        for mut figure in Box::pin(enqueue::measure(enqueue::Args { jobs }, context)).await?.results {
            figure.name += ".ledger";
            report.results.push(figure);
        }
    }
    Ok(report)
}

async fn run(args: &Args) -> anyhow::Result<Report> {
    let own = std::env::current_exe()?;
    let program = find(&own).ok_or_else(|| {
        anyhow!(
            "{PROGRAM} is not beside {}: build both with `make bench`, or `cargo build --release -p bench -p cli`",
            own.display()
        )
    })?;
    let mut command = Command::new(&program);
    command.args(["queue", "--json"]);
    if args.quick {
        command.arg("--quick");
    }
    if !args.only.is_empty() {
        command.arg("--only").arg(args.only.join(","));
    }
    if let Some(rounds) = args.rounds {
        command.arg("--rounds").arg(rounds.to_string());
    }
    // Its progress goes to our stderr; it is ended with us.
    let running = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let output = running.with_context(|| format!("{} can't be started", program.display()))?;
    let output = output.wait_with_output().await?;
    if !output.status.success() {
        bail!("{PROGRAM} ended with {}; what it said is above", output.status);
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("{PROGRAM} printed no report"))
}

/// Beside this program, or in the folder above, where cargo puts programs of a test's.
fn find(own: &Path) -> Option<PathBuf> {
    let folder = own.parent()?;
    [Some(folder), folder.parent()]
        .into_iter()
        .flatten()
        .map(|dir| dir.join(PROGRAM))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_program_is_found_beside_this_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("bin/flotilla");
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        assert_eq!(find(&own), None);
        std::fs::write(dir.path().join("bin").join(PROGRAM), "").unwrap();
        assert_eq!(find(&own), Some(dir.path().join("bin").join(PROGRAM)));
    }
}
