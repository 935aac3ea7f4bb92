//! `flotilla breakers`: which dependencies the workers find down.

use std::time::Duration;

use queue::{BreakerReport, Queue, WorkerId};
use sagas::Dependency;
use serde::Serialize;

use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output::{self, span},
};

/// What the workers report about one dependency.
#[derive(Debug, Serialize)]
struct Breaker {
    dependency: &'static str,
    /// `closed`, or `open`: at least one worker's breaker is.
    state: &'static str,
    /// Since when, in unix ms.
    open_since_ms: Option<i64>,
    /// Whose turn it is to probe for all.
    prober: Option<WorkerId>,
    /// The workers whose breaker is open.
    workers: Vec<WorkerId>,
}

pub async fn run(context: &Context) -> Outcome {
    let queue = context.queue().await?;
    let mut breakers = Vec::with_capacity(Dependency::ALL.len());
    for dependency in Dependency::ALL {
        breakers.push(look(&queue, dependency).await?);
    }
    context.out.data(&breakers, || {
        let now = chrono::Utc::now().timestamp_millis();
        let mut table = output::table(&["DEPENDENCY", "STATE", "FOR", "WORKERS", "PROBER"]);
        for one in &breakers {
            let since = one.open_since_ms.map(|ms| Duration::from_millis((now - ms).max(0).unsigned_abs()));
            table.add_row([
                one.dependency.into(),
                output::state(one.state),
                since.map(span).unwrap_or_default().into(),
                if one.workers.is_empty() { "".into() } else { output::number(one.workers.len()) },
                one.prober.as_ref().map(ToString::to_string).unwrap_or_default().into(),
            ]);
        }
        output::tidy(&table)
    })?;
    Ok(Ending::Fine)
}

async fn look(queue: &Queue, dependency: Dependency) -> anyhow::Result<Breaker> {
    // Asks only, so whoever asks is not on the board; and forgets who fell silent.
    let asker = WorkerId::new("flotilla breakers");
    let board = queue.report_breaker(&asker, dependency.name(), BreakerReport::Look).await?;
    let workers = queue.open_breakers(dependency.name()).await?;
    Ok(Breaker {
        dependency: dependency.name(),
        state: if board.open == 0 { "closed" } else { "open" },
        open_since_ms: (board.open > 0).then_some(board.since_ms),
        prober: board.turn,
        workers: workers.into_iter().map(|(worker, _)| worker).collect(),
    })
}
