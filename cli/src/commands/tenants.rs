//! `flotilla tenants`: owners of documents and jobs.

use queue::TenantId;
use serde_json::json;

use crate::{
    context::Context,
    failure::{Ending, Outcome, Refused},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a tenant; nothing happens if it is there
    Create {
        /// 1 to 64 characters of A-Z a-z 0-9 _ . -
        tenant: TenantId,
    },
    /// Show a tenant's settings
    Show {
        /// Its name
        tenant: TenantId,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::Create { tenant } => {
            let created = postgres.create_tenant(tenant.as_str()).await?;
            context.out.data(&json!({ "tenant": tenant, "created": created }), || {
                format!("tenant {tenant} {}", if created { "made" } else { "was there before" })
            })?;
        }
        Command::Show { tenant } => {
            let Some(found) = postgres.tenant(tenant.as_str()).await? else {
                return Err(unknown(&tenant).into());
            };
            context.out.data(&found, || {
                let limit = found.max_waiting.map_or("the producer's default".to_owned(), |n| n.to_string());
                output::fields(&[("tenant", Some(found.id.clone())), ("waiting jobs at most", Some(limit))])
            })?;
        }
    }
    Ok(Ending::Fine)
}

/// The error for a tenant that isn't there.
pub fn unknown(tenant: &TenantId) -> Refused {
    Refused(format!("there is no tenant {tenant}: make it with `flotilla tenants create {tenant}`"))
}
