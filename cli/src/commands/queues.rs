//! `flotilla queues`: what holds for a queue as a whole, and how fast it is worked off. Changes are committed in Postgres; the processes that run jobs
//! follow within a second or two.

use std::time::Duration;

use queue::{Mode, Priority, Queue, QueueError, QueueName, QueuePolicy, Rate, Rates};
use sagas::stores::postgres::policies::QueueRow;
use serde::Serialize;
use serde_json::json;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List the queues that have a policy
    List,
    /// Show what holds for a queue
    Show {
        /// The queue
        queue: QueueName,
    },
    /// Show how fast queues are worked off; up to ten seconds behind
    Rates {
        /// Only these; without a name, all that somebody served or pushed to within a week
        queues: Vec<QueueName>,
    },
    /// Claim nothing from a queue; jobs that run go on, and new ones are accepted
    Pause {
        /// The queue
        queue: QueueName,
    },
    /// End a pause, and a drain
    Resume {
        /// The queue
        queue: QueueName,
    },
    /// Accept no new jobs, and run what is there
    Drain {
        /// The queue
        queue: QueueName,
    },
    /// Set limits; those that are not named stay as they are
    Limit {
        /// The queue
        queue: QueueName,
        #[command(flatten)]
        limits: Limits,
    },
    /// Choose how priorities share the workers
    Mode {
        /// The queue
        queue: QueueName,
        /// `strict` (the highest first) or `weighted`
        mode: ModeName,
        /// Weights of the priorities 0 to 9, from 1 to 100, for `weighted`
        #[arg(long, value_delimiter = ',', value_name = "W0,…,W9", value_parser = clap::value_parser!(u8).range(1..=100))]
        weights: Vec<u8>,
    },
}

/// The modes by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModeName {
    Strict,
    Weighted,
}

/// A limit or its absence.
#[derive(Debug, Clone, Copy)]
pub struct Limit<T>(Option<T>);

impl<T: std::str::FromStr + PartialOrd + From<u8>> std::str::FromStr for Limit<T> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<T>() {
            _ if text == "none" => Ok(Self(None)),
            Ok(number) if number > T::from(0) => Ok(Self(Some(number))),
            _ => Err("a number above 0, or `none`, is needed".to_owned()),
        }
    }
}

/// The limits that queues and tenants have in common.
#[derive(Debug, clap::Args)]
pub struct Limits {
    /// Jobs that run at one time over the whole fleet, or `none`
    #[arg(long, value_name = "N")]
    max_concurrency: Option<Limit<u32>>,
    /// Jobs started per second, e.g. 0.5 or 100, or `none`
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<Limit<f64>>,
    /// Jobs that may start at once after a quiet time; without it, what one second allows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    burst: Option<u32>,
    /// Jobs that wait or are scheduled; more are answered 429. Or `none`
    #[arg(long, value_name = "N")]
    max_waiting: Option<Limit<u64>>,
}

impl Limits {
    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.max_concurrency.is_none()
            && self.rate.is_none()
            && self.burst.is_none()
            && self.max_waiting.is_none()
    }

    /// Changes the limits that are named.
    pub fn apply(
        &self,
        max_concurrency: &mut Option<u32>,
        rate: &mut Option<Rate>,
        max_depth: &mut Option<u64>,
    ) {
        if let Some(Limit(limit)) = self.max_concurrency {
            *max_concurrency = limit;
        }
        if let Some(Limit(limit)) = self.rate {
            *rate = limit.map(Rate::per_second);
        }
        if let (Some(rate), Some(burst)) = (rate.as_mut(), self.burst) {
            rate.burst = burst;
        }
        if let Some(Limit(limit)) = self.max_waiting {
            *max_depth = limit;
        }
    }
}

/// What a command does to a policy.
type Change = Box<dyn FnOnce(&mut QueuePolicy) + Send>;

/// How a queue does, as Redis knows it.
#[derive(Debug, Serialize)]
struct Pace {
    queue: QueueName,
    waiting: u64,
    running: u64,
    oldest_ms: Option<u64>,
    #[serde(flatten)]
    rates: Rates,
}

/// What a table of queues says without a row.
pub const NONE_KNOWN: &str = "nobody has served or pushed to a queue within a week";

/// These queues; without a name, all that somebody served or pushed to within a week.
pub async fn or_all(only: &[QueueName], queue: &Queue) -> Result<Vec<QueueName>, QueueError> {
    if only.is_empty() { queue.queues().await } else { Ok(only.to_vec()) }
}

async fn rates(only: &[QueueName], context: &Context) -> Outcome {
    let queue = context.queue().await?;
    let mut paces = vec![];
    for name in or_all(only, &queue).await? {
        let stats = queue.stats(&name).await?;
        paces.push(Pace {
            waiting: stats.depth(),
            running: stats.in_flight,
            oldest_ms: stats.oldest_ms(),
            rates: queue.rates(&name).await?,
            queue: name,
        });
    }
    context.out.data(&paces, || {
        let mut table = output::table(&[
            "QUEUE",
            "WAITING",
            "RUNNING",
            "OLDEST",
            "ENDED/S",
            "DEAD/S",
            "ENDED/H",
            "DEAD/H",
            "ENDED TODAY",
        ]);
        for one in &paces {
            let Rates { minute, hour, days } = &one.rates;
            table.add_row([
                one.queue.to_string().into(),
                output::number(one.waiting),
                output::number(one.running),
                one.oldest_ms.map(|ms| output::span(Duration::from_millis(ms))).unwrap_or_default().into(),
                output::number(format!("{:.1}", minute.per_second())),
                output::number(format!("{:.1}", minute.dead_per_second())),
                output::number(hour.ended),
                output::number(hour.dead),
                output::number(days.last().copied().unwrap_or_default()),
            ]);
        }
        output::rows(&table, NONE_KNOWN)
    })?;
    Ok(Ending::Fine)
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let (queue, action, change): (QueueName, &str, Change) = match command {
        Command::Rates { queues } => return rates(&queues, context).await,
        Command::List => {
            let postgres = context.postgres().await?;
            let rows = postgres.policies_since(0).await?.queues;
            context.out.data(&rows, || {
                let mut table =
                    output::table(&["QUEUE", "STATE", "MODE", "RUNNING", "PER SECOND", "WAITING"]);
                for row in &rows {
                    table.add_row(cells(row));
                }
                output::rows(&table, "no queue has a policy: nothing is held back")
            })?;
            return Ok(Ending::Fine);
        }
        Command::Show { queue } => {
            let postgres = context.postgres().await?;
            let rows = postgres.policies_since(0).await?.queues;
            let row = rows.into_iter().find(|row| row.queue == queue).unwrap_or(QueueRow {
                queue,
                policy: QueuePolicy::default(),
                revision: 0,
            });
            return show(context, &row);
        }
        Command::Pause { queue } => (queue, "queues.pause", Box::new(|policy| policy.paused = true)),
        Command::Resume { queue } => {
            (queue, "queues.resume", Box::new(|policy| (policy.paused, policy.draining) = (false, false)))
        }
        Command::Drain { queue } => (queue, "queues.drain", Box::new(|policy| policy.draining = true)),
        Command::Limit { queue, limits } => {
            if limits.is_empty() {
                return Err(Refused("name a limit: see `flotilla queues limit --help`".to_owned()).into());
            }
            let change = move |policy: &mut QueuePolicy| {
                limits.apply(&mut policy.max_concurrency, &mut policy.rate, &mut policy.max_depth);
            };
            (queue, "queues.limit", Box::new(change))
        }
        Command::Mode { queue, mode, weights } => {
            let mode = match (mode, <[u8; Priority::LEVELS]>::try_from(weights)) {
                (ModeName::Weighted, Ok(weights)) => Mode::Weighted(weights),
                (ModeName::Strict, Err(none)) if none.is_empty() => Mode::Strict,
                (ModeName::Weighted, Err(some)) => {
                    let count = some.len();
                    return Err(Refused(format!("--weights has {count} numbers: 10 are needed")).into());
                }
                (ModeName::Strict, _) => {
                    return Err(Refused("--weights goes with `weighted` only".to_owned()).into());
                }
            };
            (queue, "queues.mode", Box::new(move |policy| policy.mode = mode))
        }
    };
    let row = context.postgres().await?.edit_queue_policy(&queue, &actor(), action, change).await?;
    show(context, &row)
}

fn show(context: &Context, row: &QueueRow) -> Outcome {
    context.out.data(
        &json!({ "queue": row.queue, "policy": row.policy, "revision": row.revision }),
        || {
            let [queue, state, mode, running, rate, waiting] = cells(row);
            output::fields(&[
                ("queue", Some(queue)),
                ("state", Some(state)),
                ("priorities", Some(mode)),
                ("running at most", Some(running)),
                ("per second at most", Some(rate)),
                ("waiting at most", Some(waiting)),
            ])
        },
    )?;
    Ok(Ending::Fine)
}

fn cells(row: &QueueRow) -> [String; 6] {
    let policy = &row.policy;
    let state = match (policy.paused, policy.draining) {
        (false, false) => "open",
        (true, false) => "paused",
        (false, true) => "draining",
        (true, true) => "paused, draining",
    };
    let mode = match policy.mode {
        Mode::Strict => "strict".to_owned(),
        Mode::Weighted(weights) => format!("weighted {}", weights.map(|weight| weight.to_string()).join(",")),
    };
    let [running, rate, waiting] = limits(policy.max_concurrency, policy.rate, policy.max_depth);
    [row.queue.to_string(), state.to_owned(), mode, running, rate, waiting]
}

/// Limits for people: concurrency, rate, depth.
pub fn limits(concurrency: Option<u32>, rate: Option<Rate>, depth: Option<u64>) -> [String; 3] {
    let text = |limit: Option<String>| limit.unwrap_or_else(|| "no limit".to_owned());
    [
        text(concurrency.map(|limit| limit.to_string())),
        text(rate.map(|rate| format!("{}, {} at once", rate.per_second, rate.burst))),
        text(depth.map(|limit| limit.to_string())),
    ]
}
