//! `flotilla keys`: API keys, each of which speaks for one tenant.

use queue::TenantId;
use serde_json::json;
use uuid::Uuid;

use super::tenants;
use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago},
};

/// Random characters of a key: 190 bits.
const LENGTH: usize = 32;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a key and print it; it is not stored and can't be shown again
    Create {
        /// Whom the key speaks for
        tenant: TenantId,
        /// What the key is for, for people
        #[arg(long)]
        name: String,
    },
    /// List keys, newest first; the keys themselves are not stored
    List {
        /// Only this tenant's
        #[arg(long)]
        tenant: Option<TenantId>,
        /// Revoked ones, too
        #[arg(long)]
        revoked: bool,
        /// Keys at most
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Make a key useless
    Revoke {
        /// The key's id, as `create` and `list` print it
        id: Uuid,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::Create { tenant, name } => {
            if postgres.tenant(tenant.as_str()).await?.is_none() {
                return Err(tenants::unknown(&tenant).into());
            }
            let key = new_key();
            let id = postgres.create_api_key(tenant.as_str(), &name, &key).await?;
            postgres
                .record_action(
                    &actor(),
                    "keys.create",
                    &id.to_string(),
                    &json!({ "tenant": tenant, "name": name }),
                )
                .await?;
            context
                .out
                .data(&json!({ "id": id, "tenant": tenant, "name": name, "key": key }), || key.clone())?;
            output::say(format!("key {id} of tenant {tenant}: keep it now, it is not shown again"));
        }
        Command::List { tenant, revoked, limit } => {
            let keys = postgres.api_keys(tenant.as_ref().map(TenantId::as_str), revoked, limit).await?;
            context.out.data(&keys, || {
                let mut table = output::table(&["ID", "TENANT", "NAME", "MADE", "REVOKED"]);
                for key in &keys {
                    table.add_row([
                        key.id.to_string(),
                        key.tenant.clone(),
                        key.name.clone(),
                        ago(key.created_at),
                        key.revoked_at.map(ago).unwrap_or_default(),
                    ]);
                }
                output::rows(&table, "no keys")
            })?;
        }
        Command::Revoke { id } => {
            if !postgres.revoke_api_key(id).await? {
                return Err(Refused(format!("there is no valid key {id}")).into());
            }
            postgres.record_action(&actor(), "keys.revoke", &id.to_string(), &json!({})).await?;
            context.out.data(&json!({ "id": id, "revoked": true }), || format!("key {id} revoked"))?;
        }
    }
    Ok(Ending::Fine)
}

/// `flk_` and letters and digits from the system's cryptographic generator.
fn new_key() -> String {
    use rand::{Rng, distr::Alphanumeric};
    let random: String = rand::rng().sample_iter(Alphanumeric).take(LENGTH).map(char::from).collect();
    format!("flk_{random}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn keys_are_recognisable_and_differ() {
        let (one, other) = (super::new_key(), super::new_key());
        assert!(one.starts_with("flk_") && one.len() == 36, "{one}");
        assert_ne!(one, other);
    }
}
