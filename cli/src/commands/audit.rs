//! `flotilla audit`: do the stores agree?

use std::time::Duration;

use ::sagas::{
    audit::{AuditSettings, Auditor, Report},
    stores::postgres::Postgres,
};
use serde_json::json;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, short, span, time},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Mend what can be mended; exit code 0 if nothing is left
    #[arg(long)]
    repair: bool,
    /// Wait at most so long for sweeps that are due by then; one that is not made is a disagreement
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Collections to look at beside those that are known
    #[arg(long, value_name = "NAME")]
    collection: Vec<String>,
    /// Disagreements listed at most; all are counted
    #[arg(long, value_name = "N", default_value_t = 1000)]
    list: usize,
    /// Show the last report of the auditor in the workers instead of looking now
    #[arg(long, conflicts_with_all = ["repair", "wait", "collection", "list", "without_queue"])]
    last: bool,
    /// Leave the queue's Redis out
    #[arg(long)]
    without_queue: bool,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    if args.last {
        return last(&postgres, context).await;
    }
    let queue = if args.without_queue { None } else { Some(context.queue().await?) };
    if let Some(queue) = &queue
        && !queue.is_stamped_by(postgres.ledger_id().await?).await?
    {
        output::say(format!(
            "Redis has no stamp of this ledger under the prefix {:?}: nobody has served it yet, Redis has lost its data, or \
             FLOTILLA_PREFIX or REDIS_QUEUE_URL is not the fleet's",
            queue.config().prefix
        ));
    }
    let auditor = Auditor::new(context.stores(postgres)?, queue);
    let settings = AuditSettings {
        wait_for_janitor: Duration::from_secs(args.wait),
        collections: args.collection,
        max_listed: args.list,
        repair: args.repair,
        actor: actor(),
        ..AuditSettings::default()
    };
    let report = Box::pin(auditor.run(&settings)).await?;
    context.out.data(&report, || described(&report))?;
    Ok(Ending::fine_if(report.unrepaired() == 0))
}

/// What the fleet's auditor found when it last looked.
async fn last(postgres: &Postgres, context: &Context) -> Outcome {
    let drift = postgres.drift().await?;
    let Some((report, at)) = postgres.last_audit().await?.zip(drift.finished_at) else {
        return Err(Refused("no audit has come to its end yet: does a worker run?".to_owned()).into());
    };
    let report: Report = serde_json::from_value(report)?;
    context.out.data(&json!({ "finished_at": at, "report": report }), || {
        format!("audited {} ({})\n{}", time(at), ago(at), described(&report))
    })?;
    Ok(Ending::fine_if(report.unrepaired() == 0))
}

fn described(report: &Report) -> String {
    let counts = &report.counts;
    let mut text = format!(
        "looked at {} documents, {} versions, {} chunks, {} points, {} cache entries, {} jobs and {} sagas in {}{}\n",
        counts.documents,
        counts.versions,
        counts.chunks,
        counts.points,
        counts.cache_entries,
        counts.jobs,
        counts.sagas,
        span(Duration::from_millis(report.took_ms)),
        if report.queue_audited { "" } else { ", the queue left out" },
    );
    let pending = &report.pending;
    if pending.unfinished + pending.sweeps + pending.finishing > 0 {
        text = format!(
            "{text}under way: {} unfinished jobs, {} versions to be swept, {} sagas that wait for a sweep\n",
            pending.unfinished, pending.sweeps, pending.finishing
        );
    }
    if !pending.parked_sagas.is_empty() {
        let mut table = output::table(&["PARKED SAGA", "JOB", "DOCUMENT", "WHAT STANDS"]);
        for one in &pending.parked_sagas {
            table.add_row([
                one.saga.to_string(),
                one.job.to_string(),
                one.document.clone().unwrap_or_default(),
                one.error.clone().unwrap_or_default(),
            ]);
        }
        text = format!("{text}\n{}", output::tidy(&table));
    }
    if report.is_clean() {
        return format!("{text}the stores agree\n");
    }
    let mut table = output::table(&["DISAGREEMENT", "SUBJECT", "DOCUMENT", "REPAIR", "DETAIL"]);
    for one in &report.findings {
        let repair = match (one.repaired, one.repairable) {
            (true, _) => "done",
            (false, true) => "possible",
            (false, false) => "no",
        };
        table.add_row([
            one.kind.name().into(),
            (&one.subject).into(),
            short(one.document.as_deref().unwrap_or_default(), 40).into(),
            repair.into(),
            comfy_table::Cell::new(&one.detail),
        ]);
    }
    format!(
        "{text}\n{}\n{} disagreements, {} mended, {} left\n",
        output::tidy(&table),
        report.total(),
        report.repaired,
        report.unrepaired()
    )
}
