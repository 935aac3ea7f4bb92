//! `flotilla encryption`: the keys that payloads at rest are sealed with.

use sagas::{
    encryption,
    stores::postgres::{
        control::Selection,
        sealing::{KeyUse, Rotated},
    },
};
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

/// Has the ledger know the jobs that so far only Redis has: their records are sealed, too.
async fn settle_fast(context: &Context) -> anyhow::Result<()> {
    let client = super::enqueue::client(context).await?;
    super::jobs::settle_fast(&client, &Selection::default()).await;
    Ok(())
}

async fn status(context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    settle_fast(context).await?;
    let used = postgres.keys_in_use().await?;
    let known = postgres.cipher().ids();
    let missing: Vec<&str> =
        used.iter().filter_map(|one| one.key_id.as_deref()).filter(|id| !known.contains(id)).collect();
    context.out.data(&json!({ "keys": known, "in_use": used, "missing": missing }), || {
        let keys = if known.is_empty() { "none: payloads stay plain".to_owned() } else { known.join(", ") };
        format!("keys here, the first seals: {keys}\n{}", output::rows(&table(&used, &known), "no jobs"))
    })?;
    Ok(Ending::fine_if(missing.is_empty()))
}

fn table(used: &[KeyUse], known: &[&str]) -> comfy_table::Table {
    let mut table = output::table(&["KEY", "HERE", "UNFINISHED JOBS", "ENDED JOBS", "DEAD LETTERS"]);
    for one in used {
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
            output::number(one.dead_letters),
        ]);
    }
    table
}

async fn rotate(page: i64, context: &Context) -> Outcome {
    let postgres = context.migrated_postgres().await?;
    settle_fast(context).await?;
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
    context.out.data(&json!({ "key": key, "rotated": all }), || {
        format!(
            "wrapped with {key}: {} jobs, {} dead letters, {} callbacks",
            all.jobs, all.dead_letters, all.callbacks
        )
    })?;
    Ok(Ending::Fine)
}
