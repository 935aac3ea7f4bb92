//! `flotilla migrate`: the database's schema, forward and back.

use anyhow::{Context as _, bail};
use sagas::stores::postgres::Postgres;
use serde_json::{Value, json};

use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output,
};

/// The tenant that commands use when none is named.
pub const DEFAULT_TENANT: &str = "default";

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Apply what is missing, and make the tenant `default`
    Up,
    /// Revert the newest migration, or all after --to; what they hold is lost
    Down {
        /// Keep the migrations up to this one; 0 reverts all
        #[arg(long, value_name = "N")]
        to: Option<i64>,
    },
    /// Show which migrations are applied; exit code 1 if one is missing
    Status,
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::Up => {
            let before = applied(&postgres).await?;
            if let Some(newest) = postgres.migrate_up().await.context("can't migrate")? {
                output::say(format!(
                    "the database is of a newer release: it has migration {newest}, and lacks none of this one's"
                ));
                return Ok(Ending::Fine);
            }
            let count = applied(&postgres).await?.len() - before.len();
            output::say(format!("{} applied", output::counted(count, "migration")));
            if postgres.create_tenant(DEFAULT_TENANT).await? {
                output::say(format!("tenant {DEFAULT_TENANT} made"));
            }
            Ok(Ending::Fine)
        }
        Command::Down { to } => {
            let before = applied(&postgres).await?;
            let Some(newest) = before.last() else {
                output::say("nothing is applied");
                return Ok(Ending::Fine);
            };
            let target = to.unwrap_or_else(|| before.iter().rev().nth(1).copied().unwrap_or(0));
            if target > *newest || target < 0 {
                bail!("--to {target}: the newest migration applied is {newest}");
            }
            postgres.migrate_down(target).await.context("can't revert")?;
            let count = before.len() - applied(&postgres).await?.len();
            output::say(format!("{} reverted", output::counted(count, "migration")));
            Ok(Ending::Fine)
        }
        Command::Status => {
            let migrations = postgres.migrations().await?;
            let data: Vec<Value> = migrations
                .iter()
                .map(|(version, name, applied)| json!({ "version": version, "name": name, "applied": applied }))
                .collect();
            context.out.data(&data, || {
                let mut table = output::table(&["VERSION", "NAME", "STATE"]);
                for (version, name, applied) in &migrations {
                    let state = output::state(if *applied { "applied" } else { "pending" });
                    table.add_row([output::number(version), name.into(), state]);
                }
                output::tidy(&table)
            })?;
            Ok(Ending::fine_if(migrations.iter().all(|(_, _, applied)| *applied)))
        }
    }
}

async fn applied(postgres: &Postgres) -> anyhow::Result<Vec<i64>> {
    let migrations = postgres.migrations().await.context("can't read which migrations are applied")?;
    Ok(migrations.into_iter().filter(|(_, _, applied)| *applied).map(|(version, _, _)| version).collect())
}
