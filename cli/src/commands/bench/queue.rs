//! The queue beside a peer and a floor.

use super::{Report, enqueue, program};
use crate::context::Context;

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

impl Args {
    fn forwarded(&self) -> Vec<String> {
        let mut args = vec![];
        if self.quick {
            args.push("--quick".to_owned());
        }
        if !self.only.is_empty() {
            args.extend(["--only".to_owned(), self.only.join(",")]);
        }
        if let Some(rounds) = self.rounds {
            args.extend(["--rounds".to_owned(), rounds.to_string()]);
        }
        args
    }
}

/// What `flotilla-bench` measures, and enqueueing with the ledger, which takes the product's own producer.
pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let wanted = |workload: &str| args.only.is_empty() || args.only.iter().any(|one| one == workload);
    let mut report = program::run("queue", &args.forwarded()).await?;
    if wanted("ledger") {
        let jobs = if args.quick { 200 } else { 20_000 };
        for mut figure in Box::pin(enqueue::measure(enqueue::Args { jobs }, context)).await?.results {
            figure.name += ".ledger";
            report.results.push(figure);
        }
    }
    Ok(report)
}
