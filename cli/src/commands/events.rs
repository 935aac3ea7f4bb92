//! `flotilla events`: what other services hear of documents.

use std::time::Duration;

use anyhow::anyhow;
use queue::TenantId;
use sagas::stores::postgres::{
    Postgres,
    events::{Event, Events, FIRST},
};
use serde_json::json;

use crate::{
    context::Context,
    failure::{Ending, Outcome, Refused},
    output, signals,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print events after a cursor, the oldest first
    List {
        /// A cursor, as printed with each event; `now` for the cursor of now [default: the oldest event that is kept]
        #[arg(long)]
        after: Option<String>,
        /// Events at most
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
        limit: i32,
        /// Only of this tenant
        #[arg(long)]
        tenant: Option<TenantId>,
    },
    /// Print events as they come, one JSON object a line with --json, until interrupted
    Tail {
        /// A cursor to begin after [default: now]
        #[arg(long)]
        after: Option<String>,
        /// Only of this tenant
        #[arg(long)]
        tenant: Option<TenantId>,
    },
}

const PAGE: i32 = 1000;
/// Between two looks that found nothing.
const EVERY: Duration = Duration::from_millis(500);

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { after, limit, tenant } => {
            let after = match after.as_deref() {
                Some("now") => {
                    let next = postgres.events_now().await?;
                    context.out.data(&json!({ "events": [], "next": next }), || next.clone())?;
                    return Ok(Ending::Fine);
                }
                Some(cursor) => cursor.to_owned(),
                None => FIRST.to_owned(),
            };
            let (events, next) = page(&postgres, &after, tenant.as_ref(), limit).await?;
            context.out.data(&json!({ "events": events, "next": next }), || {
                let mut table =
                    output::table(&["CURSOR", "AT", "EVENT", "TENANT", "DOCUMENT", "VERSION", "ORDER"]);
                for one in &events {
                    table.add_row([
                        (&one.cursor).into(),
                        output::time(one.at).into(),
                        (&one.event).into(),
                        (&one.tenant).into(),
                        (&one.document).into(),
                        one.version.to_string().into(),
                        output::number(one.order),
                    ]);
                }
                output::rows(&table, "no events after this cursor")
            })?;
            Ok(Ending::Fine)
        }
        Command::Tail { after, tenant } => {
            let mut after = match after {
                Some(after) => after,
                None => postgres.events_now().await?,
            };
            let stop = signals::drain_on_signal()?;
            while !stop.is_cancelled() {
                let (events, next) = page(&postgres, &after, tenant.as_ref(), PAGE).await?;
                for one in &events {
                    let line = || {
                        format!(
                            "{} {} {}/{} {}",
                            one.cursor, one.event, one.tenant, one.document, one.version
                        )
                    };
                    context.out.data(one, line)?;
                }
                after = next;
                if events.is_empty() {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = tokio::time::sleep(EVERY) => {}
                    }
                }
            }
            Ok(Ending::Fine)
        }
    }
}

/// Events, and the cursor to go on with.
async fn page(
    postgres: &Postgres,
    after: &str,
    tenant: Option<&TenantId>,
    limit: i32,
) -> anyhow::Result<(Vec<Event>, String)> {
    let (events, next) = postgres.events_page(after, tenant.map(TenantId::as_str), limit).await?;
    match events {
        Events::Page(events) => Ok((events, next)),
        Events::Expired => Err(Refused(format!(
            "events after {after} were removed by retention: take `flotilla events list --after now`, read what you keep again, then go on"
        ))
        .into()),
        Events::NoCursor => Err(anyhow!("--after is {after:?}: a cursor is allowed, as printed with each event")),
    }
}
