//! `flotilla dlq`: jobs that will not be tried again without a person.

mod many;

use anyhow::{Context as _, bail};
use chrono::{DateTime, Utc};
use producer::{Client, ClientSettings};
use sagas::{
    StoreError,
    redaction::{Redaction, is_redacted},
    stores::postgres::{
        Postgres,
        dead_letters::{DeadLetter, DeadLetterFilter, LetterStory, Replay, Resolved},
    },
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::enqueue::read_payload;
use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, fields, short, time},
    times,
};

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
        /// The next page: only letters before this one, the last of the page before
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
    },
    /// Show one dead letter with its chain of errors, its attempts and its timeline
    Show {
        /// The letter, or its job
        id: Uuid,
        /// Also show the payload, a sealed one opened with the keys that are there, without the fields that FLOTILLA_REDACT
        /// names
        #[arg(long)]
        payload: bool,
    },
    /// Enqueue the dead job again, as a new job in the same place of its document's order
    Replay {
        /// The letter, or its job
        #[arg(required_unless_present = "all")]
        id: Option<Uuid>,
        /// Replay all open letters that the filters let through, oldest first
        #[arg(long, conflicts_with_all = ["id", "payload", "as_kind"])]
        all: bool,
        #[command(flatten)]
        filter: Filter,
        /// Letters at most
        #[arg(long, requires = "all", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
        /// Letters a second at most
        #[arg(long, requires = "all", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
        rate: Option<u32>,
        /// Only say what would be replayed
        #[arg(long, requires = "all")]
        dry_run: bool,
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
        #[arg(required_unless_present = "all")]
        id: Option<Uuid>,
        /// Close all open letters that the filters let through
        #[arg(long, conflicts_with = "id")]
        all: bool,
        #[command(flatten)]
        filter: Filter,
        /// Only say what would be closed
        #[arg(long, requires = "all")]
        dry_run: bool,
        /// Why, for the audit log
        #[arg(long)]
        reason: String,
    },
    /// Write letters with all that is known of their jobs to stdout, one JSON object a line, oldest first
    Export {
        #[command(flatten)]
        filter: Filter,
        /// open, replayed, discarded or all
        #[arg(long, default_value = "all", value_parser = ["open", "replayed", "discarded", "all"])]
        state: String,
        /// Also the payloads, as `dlq show --payload` shows them
        #[arg(long)]
        payload: bool,
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
    /// Only letters written then or later: a time, or how long ago, such as 2h
    #[arg(long, value_name = "TIME", value_parser = times::past)]
    since: Option<DateTime<Utc>>,
    /// Only letters written before: a time, or how long ago
    #[arg(long, value_name = "TIME", value_parser = times::past)]
    until: Option<DateTime<Utc>>,
    /// Only letters with this text in their reason or chain of errors, in any case
    #[arg(long)]
    text: Option<String>,
}

impl Filter {
    /// Refuses filters beside a letter's id, which alone would decide.
    fn goes_with_all(&self) -> anyhow::Result<()> {
        let Self { tenant, kind, class, since, until, text } = self;
        let texts = [tenant, kind, class, text].into_iter().any(Option::is_some);
        if texts || since.is_some() || until.is_some() {
            bail!("a filter goes with --all, not with a letter's id");
        }
        Ok(())
    }

    fn with(self, state: &str, limit: i64) -> DeadLetterFilter {
        let state = (state != "all").then(|| state.to_owned());
        let Self { tenant, kind, class, since, until, text } = self;
        DeadLetterFilter { tenant, kind, class, state, since, until, text, from: None, limit }
    }
}

/// What of payloads is not shown.
fn redaction(context: &Context) -> Redaction {
    context.settings.get("FLOTILLA_REDACT").map_or_else(Redaction::default, |names| match names.trim() {
        "none" => Redaction::parse(""),
        names => Redaction::parse(names),
    })
}

/// Takes the payload out of a letter, or shows what may be seen of it.
async fn show_payload(
    letter: &mut DeadLetter,
    shown: bool,
    postgres: &Postgres,
    redaction: &Redaction,
) -> Result<(), StoreError> {
    letter.payload = Value::Null;
    if shown {
        letter.payload = postgres.letter_payload(letter).await?;
        redaction.apply(&mut letter.payload);
    }
    Ok(())
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { filter, state, limit, before } => {
            let mut filter = filter.with(&state, limit);
            if let Some(id) = before {
                let Some(letter) = postgres.dead_letter(id).await? else { return Err(unknown(id).into()) };
                filter.from = Some((letter.created_at, letter.id));
            }
            let mut letters = postgres.dead_letters(&filter).await?;
            for letter in &mut letters {
                letter.payload = Value::Null;
            }
            context.out.data(&letters, || output::rows(&letter_table(&letters), "no such dead letters"))?;
            Ok(Ending::Fine)
        }
        Command::Show { id, payload } => {
            let Some(mut story) = postgres.letter_story(id).await? else { return Err(unknown(id).into()) };
            show_payload(&mut story.letter, payload, &postgres, &redaction(context)).await?;
            context.out.data(&story, || described(&story, payload))?;
            Ok(Ending::Fine)
        }
        Command::Replay { id, all: _, filter, limit, rate, dry_run, payload, as_kind, as_latest } => {
            let how = Replay {
                actor: actor(),
                payload: payload.as_deref().map(read_payload).transpose()?,
                kind: as_kind,
                as_latest,
                within_tenant: false,
            };
            if let Some(id) = id {
                filter.goes_with_all()?;
                return replay(id, &how, &postgres, context).await;
            }
            let filter = filter.with("open", many::PAGE);
            let pace = many::Pace { limit, rate };
            many::replay(filter, &how, pace, dry_run, &postgres, context).await
        }
        Command::Discard { id, all: _, filter, dry_run, reason } => {
            if reason.trim().is_empty() {
                bail!("--reason is empty: say why, for whoever reads the audit log");
            }
            let Some(id) = id else {
                let filter = filter.with("open", many::PAGE);
                return many::discard(filter, &reason, dry_run, &postgres, context).await;
            };
            filter.goes_with_all()?;
            match postgres.discard(id, &actor(), &reason).await? {
                Resolved::Done(_) => {
                    context
                        .out
                        .data(&json!({ "id": id, "state": "discarded" }), || format!("{id} discarded"))?;
                    Ok(Ending::Fine)
                }
                Resolved::OtherDocument(dead) => Err(other_document(&dead).into()),
                Resolved::ForEveryTenant => Err(for_every_tenant(id).into()),
                Resolved::Already(state) => Err(already(id, &state).into()),
                Resolved::Unknown => Err(unknown(id).into()),
            }
        }
        Command::Export { filter, state, payload } => {
            many::export(filter.with(&state, many::EXPORTED), payload, &postgres, &redaction(context)).await
        }
    }
}

fn letter_table(letters: &[DeadLetter]) -> comfy_table::Table {
    let mut table =
        output::table(&["ID", "JOB", "KIND", "TENANT", "DOCUMENT", "CLASS", "STATE", "DIED", "REASON"]);
    for letter in letters {
        table.add_row([
            letter.id.into(),
            letter.job_id.into(),
            (&letter.kind).into(),
            (&letter.tenant).into(),
            short(letter.document.as_deref().unwrap_or_default(), 40).into(),
            (&letter.class).into(),
            output::state(&letter.state),
            ago(letter.created_at).into(),
            short(&letter.reason, 100).into(),
        ]);
    }
    table
}

fn described(story: &LetterStory, shown: bool) -> String {
    let letter = &story.letter;
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
    let payload = match &letter.payload_key_id {
        _ if shown => serde_json::to_string_pretty(&letter.payload).unwrap_or_default(),
        Some(key) => format!("sealed with key {key}; --payload opens it"),
        None => "hidden; --payload shows it".to_owned(),
    };
    let text = fields(&[
        ("dead letter", Some(letter.id.to_string())),
        ("job", Some(letter.job_id.to_string())),
        ("saga", letter.saga_id.map(|id| id.to_string())),
        ("kind", Some(letter.kind.clone())),
        ("queue", Some(letter.queue.clone())),
        ("tenant", Some(letter.tenant.clone())),
        ("document", letter.document.clone()),
        ("class", Some(letter.class.clone())),
        ("reason", Some(letter.reason.clone())),
        ("errors", chain),
        ("attempts", lines(&story.attempts, attempt)),
        ("runs", lines(&story.runs, run_lines)),
        ("died", Some(format!("{} ({})", time(letter.created_at), ago(letter.created_at)))),
        ("state", Some(letter.state.clone())),
        ("resolved", letter.resolved_at.map(time)),
        ("resolved by", letter.resolved_by.clone()),
        ("note", letter.note.clone()),
        ("replayed as", letter.replay_job.map(|id| id.to_string())),
        ("traceparent", letter.traceparent.clone()),
        ("payload", Some(payload)),
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

/// Lines about each entry of a JSON array; `None`: there are none.
fn lines(all: &Value, line: fn(&Value) -> String) -> Option<String> {
    let all = all.as_array().filter(|all| !all.is_empty())?;
    Some(all.iter().map(line).collect::<Vec<_>>().join("\n"))
}

fn text<'a>(entry: &'a Value, name: &str) -> &'a str {
    entry[name].as_str().unwrap_or_default()
}

fn attempt(entry: &Value) -> String {
    format!(
        "{} by {}, {} to {}: {}: {}",
        entry["attempt"],
        text(entry, "worker"),
        text(entry, "started_at"),
        text(entry, "ended_at"),
        text(entry, "class"),
        text(entry, "error")
    )
}

fn run_lines(run: &Value) -> String {
    let step = |step: &Value| {
        let undo = if step["direction"] == "compensate" { "undo " } else { "" };
        let error = step["error"].as_str().map(|error| format!(": {error}")).unwrap_or_default();
        format!(
            "  {} {undo}{} {}{error}",
            text(step, "started_at"),
            text(step, "step_name"),
            text(step, "state")
        )
    };
    let steps = run["steps"].as_array().into_iter().flatten().map(step);
    let head = format!("{} {}", text(run, "id"), text(run, "state"));
    [head].into_iter().chain(steps).collect::<Vec<_>>().join("\n")
}

async fn replay(id: Uuid, how: &Replay, postgres: &Postgres, context: &Context) -> Outcome {
    if let Some(payload) = &how.payload {
        if is_redacted(payload) {
            return Err(redacted(id).into());
        }
        let Some(letter) = postgres.dead_letter(id).await? else { return Err(unknown(id).into()) };
        let kind = how.kind.as_ref().unwrap_or(&letter.kind);
        let settings = ClientSettings::from_lookup(|name| context.settings.get(name))?;
        let client = Client::new(postgres.clone(), None, settings);
        client.check_payload(kind, payload).map_err(|error| Refused(error.to_string()))?;
    }
    let queue = context.dispatcher(postgres).await?;
    match postgres.replay(id, how).await.context("the letter was not replayed")? {
        Resolved::Done(Some(job)) => {
            context.dispatch(queue.as_ref(), job, postgres).await;
            context.out.data(&json!([{ "id": id, "job": job }]), || format!("{id} replayed as job {job}"))?;
            Ok(Ending::Fine)
        }
        Resolved::Done(None) => Ok(Ending::Fine),
        Resolved::OtherDocument(dead) => Err(other_document(&dead).into()),
        Resolved::ForEveryTenant => Err(for_every_tenant(id).into()),
        Resolved::Already(state) => Err(already(id, &state).into()),
        Resolved::Unknown => Err(unknown(id).into()),
    }
}

fn unknown(id: Uuid) -> Refused {
    Refused(format!("there is no dead letter {id}, nor one of a job {id}"))
}

fn already(id: Uuid, state: &str) -> Refused {
    Refused(format!("dead letter {id} is {state} already: nothing was done"))
}

fn for_every_tenant(id: Uuid) -> Refused {
    Refused(format!("dead letter {id} is for every tenant: nothing was done"))
}

fn redacted(id: Uuid) -> Refused {
    Refused(format!(
        "the payload has \"[redacted]\" where a value was hidden: mend the real one, `.payload` of \
         `FLOTILLA_REDACT=none flotilla dlq show {id} --payload --json`"
    ))
}

fn other_document(dead: &str) -> Refused {
    Refused(format!(
        "payload.document: the replay would be about the dead job's document {dead:?}: enqueue this as a job of its own, and \
         discard the letter"
    ))
}
