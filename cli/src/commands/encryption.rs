//! `flotilla encryption`: the keys that payloads at rest are sealed with.

use producer::Client;
use sagas::{
    StoreError, encryption,
    stores::postgres::{
        control::Selection,
        sealing::{KeyUse, Rotated},
    },
};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print a new random key, for `FLOTILLA_ENCRYPTION_KEYS=ID:KEY`
    NewKey,
    /// Show which keys are in use, and which this process has
    Status,
    /// Wrap unfinished jobs, dead letters and callbacks with the first key, and seal plain ones
    Rotate {
        /// Records in one transaction
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(i64).range(1..=1000))]
        page: i64,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    match command {
        Command::NewKey => {
            let key = encryption::new_key();
            context.out.data(&json!({ "key": key }), || key.clone())?;
            Ok(Ending::Fine)
        }
        Command::Status => status(context).await,
        Command::Rotate { page } => rotate(page, context).await,
    }
}

/// The records of one key.
#[derive(Serialize)]
struct InUse {
    #[serde(flatten)]
    ledger: KeyUse,
    /// Fast jobs that no worker has claimed; nothing where Redis could not be asked.
    only_in_redis: Option<u64>,
}

/// What becomes of the fast jobs that only Redis has; nothing once it is said why that is not known.
async fn fast_jobs<T>(
    context: &Context,
    ask: impl AsyncFnOnce(Client) -> Result<T, StoreError>,
) -> Option<T> {
    let asked = async { anyhow::Ok(ask(super::enqueue::client(context).await?).await?) };
    asked.await.inspect_err(|error| super::jobs::say_left_out(format!("{error:#}"))).ok()
}

async fn status(context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    let fast = fast_jobs(context, async |client| client.fast_by_key().await).await;
    let mut used: Vec<InUse> = postgres
        .keys_in_use()
        .await?
        .into_iter()
        .map(|ledger| InUse { only_in_redis: fast.as_ref().map(|_| 0), ledger })
        .collect();
    for (key_id, count) in fast.iter().flatten() {
        if let Some(one) = used.iter_mut().find(|one| one.ledger.key_id == *key_id) {
            one.only_in_redis = Some(*count);
        } else {
            let ledger = KeyUse { key_id: key_id.clone(), ..KeyUse::default() };
            used.push(InUse { ledger, only_in_redis: Some(*count) });
        }
    }
    let known = postgres.cipher().ids();
    let missing: Vec<&str> =
        used.iter().filter_map(|one| one.ledger.key_id.as_deref()).filter(|id| !known.contains(id)).collect();
    context.out.data(&json!({ "keys": known, "in_use": used, "missing": missing }), || {
        let keys = if known.is_empty() { "none: payloads stay plain".to_owned() } else { known.join(", ") };
        format!("keys here, the first seals: {keys}\n{}", output::rows(&table(&used, &known), "no jobs"))
    })?;
    Ok(Ending::fine_if(missing.is_empty() && fast.is_some()))
}

fn table(used: &[InUse], known: &[&str]) -> comfy_table::Table {
    let heads = [
        "KEY",
        "HERE",
        "UNFINISHED JOBS",
        "ENDED JOBS",
        "RESULTS",
        "DEAD LETTERS",
        "CALLBACKS",
        "SIGNALS",
        "ONLY IN REDIS",
    ];
    let mut table = output::table(&heads);
    for InUse { ledger: one, only_in_redis } in used {
        let here = match &one.key_id {
            None => "",
            Some(id) if known.contains(&id.as_str()) => "yes",
            Some(_) => "no",
        };
        table.add_row([
            one.key_id.as_deref().unwrap_or("(plain)").into(),
            here.into(),
            output::number(one.unfinished),
            output::number(one.ended),
            output::number(one.results),
            output::number(one.dead_letters),
            output::number(one.callbacks),
            output::number(one.signals),
            only_in_redis.map_or("?".into(), output::number),
        ]);
    }
    table
}

async fn rotate(page: i64, context: &Context) -> Outcome {
    let postgres = context.migrated_postgres().await?;
    let settle = async |client: Client| client.settle_all_fast(&Selection::default()).await;
    // Without a key the first page says so.
    let complete = postgres.cipher().current().is_none() || fast_jobs(context, settle).await.is_some();
    let mut all = Rotated::default();
    let mut after = Uuid::nil();
    while let Some((last, rotated)) = postgres.rotate_page(after, page).await? {
        after = last;
        all.jobs += rotated.jobs;
        all.dead_letters += rotated.dead_letters;
        all.callbacks += rotated.callbacks;
        if rotated == Rotated::default() {
            break;
        }
    }
    let key = postgres.cipher().current().unwrap_or_default().to_owned();
    postgres.record_action(&actor(), "encryption.rotate", &key, &json!(all)).await?;
    context.out.data(&json!({ "key": key, "rotated": all, "complete": complete }), || {
        format!(
            "wrapped with {key}: {} jobs, {} dead letters, {} callbacks",
            all.jobs, all.dead_letters, all.callbacks
        )
    })?;
    Ok(Ending::fine_if(complete))
}
