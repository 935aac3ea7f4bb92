//! `flotilla dlq`: jobs that will not be tried again without a person.

use anyhow::{Context as _, bail};
use sagas::stores::postgres::{
    Postgres,
    dead_letters::{DeadLetter, DeadLetterFilter, Replay, Resolved},
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::enqueue::read_payload;
use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, fields, short, time},
};

/// Letters that `replay --all` takes at once.
const ALL_AT_MOST: i64 = 1000;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List dead letters, newest first
    List {
        #[command(flatten)]
        filter: Filter,
        /// open, replayed, discarded or all
        #[arg(long, default_value = "open", value_parser = ["open", "replayed", "discarded", "all"])]
        state: String,
        /// Letters at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Show one dead letter with its payload and its chain of errors
    Show {
        /// The letter, or its job
        id: Uuid,
    },
    /// Enqueue the dead job again, as a new job in the same place of its document's order
    Replay {
        /// The letter, or its job
        #[arg(required_unless_present = "all")]
        id: Option<Uuid>,
        /// Replay all open letters that the filters let through, at most 1,000
        #[arg(long, conflicts_with_all = ["id", "payload", "as_kind"])]
        all: bool,
        #[command(flatten)]
        filter: Filter,
        /// A mended payload: JSON, @FILE, or - for stdin
        #[arg(long, value_name = "JSON")]
        payload: Option<String>,
        /// A mended kind
        #[arg(long, value_name = "KIND")]
        as_kind: Option<String>,
        /// Take a new place at the end of the document's order, so that the replay wins over what came since
        #[arg(long)]
        as_latest: bool,
    },
    /// Close a dead letter without a replay
    Discard {
        /// The letter, or its job
        id: Uuid,
        /// Why, for the audit log
        #[arg(long)]
        reason: String,
    },
}

#[derive(Debug, Default, clap::Args)]
pub struct Filter {
    /// Only this tenant's letters
    #[arg(long)]
    tenant: Option<String>,
    /// Only letters of jobs of this kind
    #[arg(long)]
    kind: Option<String>,
    /// Only letters with this reason, such as `not_utf8` or `poison`
    #[arg(long)]
    class: Option<String>,
}

impl Filter {
    fn with(self, state: &str, limit: i64) -> DeadLetterFilter {
        let state = (state != "all").then(|| state.to_owned());
        DeadLetterFilter { tenant: self.tenant, kind: self.kind, class: self.class, state, limit }
    }
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { filter, state, limit } => {
            let letters = postgres.dead_letters(&filter.with(&state, limit)).await?;
            context.out.data(&letters, || output::rows(&letter_table(&letters), "no such dead letters"))?;
            Ok(Ending::Fine)
        }
        Command::Show { id } => {
            let Some(letter) = postgres.dead_letter(id).await? else { return Err(unknown(id).into()) };
            context.out.data(&letter, || described(&letter))?;
            Ok(Ending::Fine)
        }
        Command::Replay { id, all, filter, payload, as_kind, as_latest } => {
            let how = Replay {
                actor: actor(),
                payload: payload.as_deref().map(read_payload).transpose()?,
                kind: as_kind,
                as_latest,
            };
            let ids = match id {
                Some(id) if !all => vec![id],
                _ => {
                    let open = postgres.dead_letters(&filter.with("open", ALL_AT_MOST)).await?;
                    open.iter().map(|letter| letter.id).collect()
                }
            };
            replay(&ids, &how, &postgres, context).await
        }
        Command::Discard { id, reason } => {
            if reason.trim().is_empty() {
                bail!("--reason is empty: say why, for whoever reads the audit log");
            }
            match postgres.discard(id, &actor(), &reason).await? {
                Resolved::Done(_) => {
                    context
                        .out
                        .data(&json!({ "id": id, "state": "discarded" }), || format!("{id} discarded"))?;
                    Ok(Ending::Fine)
                }
                Resolved::Already(state) => Err(already(id, &state).into()),
                Resolved::Unknown => Err(unknown(id).into()),
            }
        }
    }
}

fn letter_table(letters: &[DeadLetter]) -> comfy_table::Table {
    let mut table = output::table(&["ID", "JOB", "KIND", "TENANT", "CLASS", "STATE", "DIED", "REASON"]);
    for letter in letters {
        table.add_row([
            letter.id.into(),
            letter.job_id.into(),
            (&letter.kind).into(),
            (&letter.tenant).into(),
            (&letter.class).into(),
            output::state(&letter.state),
            ago(letter.created_at).into(),
            short(&letter.reason, 100).into(),
        ]);
    }
    table
}

fn described(letter: &DeadLetter) -> String {
    let chain = match &letter.error_chain {
        Value::Array(chain) if !chain.is_empty() => Some(
            chain
                .iter()
                .map(|e| e.as_str().map_or(e.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join("\n"),
        ),
        _ => None,
    };
    let payload = serde_json::to_string_pretty(&letter.payload).unwrap_or_default();
    let text = fields(&[
        ("dead letter", Some(letter.id.to_string())),
        ("job", Some(letter.job_id.to_string())),
        ("saga", letter.saga_id.map(|id| id.to_string())),
        ("kind", Some(letter.kind.clone())),
        ("queue", Some(letter.queue.clone())),
        ("tenant", Some(letter.tenant.clone())),
        ("class", Some(letter.class.clone())),
        ("reason", Some(letter.reason.clone())),
        ("errors", chain),
        ("died", Some(format!("{} ({})", time(letter.created_at), ago(letter.created_at)))),
        ("state", Some(letter.state.clone())),
        ("resolved", letter.resolved_at.map(time)),
        ("resolved by", letter.resolved_by.clone()),
        ("note", letter.note.clone()),
        ("replayed as", letter.replay_job.map(|id| id.to_string())),
        ("traceparent", letter.traceparent.clone()),
        (
            "payload",
            Some(if payload.len() > 4000 { short(&letter.payload.to_string(), 4000) } else { payload }),
        ),
    ]);
    if letter.state == "open" {
        return format!(
            "{text}\nreplay it with `flotilla dlq replay {0}` (`--payload @FILE` mends the request),\n\
             or close it with `flotilla dlq discard {0} --reason …`\n",
            letter.id
        );
    }
    text
}

async fn replay(ids: &[Uuid], how: &Replay, postgres: &Postgres, context: &Context) -> Outcome {
    let mut replayed = vec![];
    let mut refused = vec![];
    for id in ids {
        match postgres
            .replay(*id, how)
            .await
            .with_context(|| format!("{} of {} were replayed", replayed.len(), ids.len()))?
        {
            Resolved::Done(Some(job)) => {
                dispatch(job, postgres, context).await;
                replayed.push((*id, job));
            }
            Resolved::Done(None) => {}
            Resolved::Already(state) => refused.push(already(*id, &state)),
            Resolved::Unknown => refused.push(unknown(*id)),
        }
    }
    let data: Vec<Value> = replayed.iter().map(|(id, job)| json!({ "id": id, "job": job })).collect();
    if context.out.json || !replayed.is_empty() {
        context.out.data(&data, || {
            let lines: Vec<String> =
                replayed.iter().map(|(id, job)| format!("{id} replayed as job {job}")).collect();
            lines.join("\n")
        })?;
    } else if refused.is_empty() {
        output::say("no open dead letters");
    }
    match refused.into_iter().next() {
        Some(first) => Err(first.into()),
        None => Ok(Ending::Fine),
    }
}

/// Puts a replayed job into Redis at once. Where that fails, the producer's relay does it: the job is in the ledger.
async fn dispatch(job: queue::JobId, postgres: &Postgres, context: &Context) {
    let pushed = async {
        let envelope = postgres.envelope(job).await?.into_iter().collect::<Vec<_>>();
        context.lazy_queue()?.push_accepted(&envelope).await?;
        anyhow::Ok(())
    };
    if let Err(error) = pushed.await {
        tracing::debug!(%job, %error, "left to the relay");
    }
}

fn unknown(id: Uuid) -> Refused {
    Refused(format!("there is no dead letter {id}, nor one of a job {id}"))
}

fn already(id: Uuid, state: &str) -> Refused {
    Refused(format!("dead letter {id} is {state} already: nothing was done"))
}
