//! `flotilla tenants`: owners of documents and jobs.

use queue::{QueueName, TenantId, TenantPolicy};
use sagas::stores::postgres::{
    Postgres,
    classes::{Classified, MAX_CLASSES},
    policies::TenantRow,
};
use serde_json::json;

use super::queues::{self, Limits};
use crate::{
    context::{Context, actor},
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
    /// Put a tenant into a class, a label of metrics; `default` takes it out again
    Class {
        /// Its name
        tenant: TenantId,
        /// 1 to 64 characters of A-Z a-z 0-9 _ . -
        #[arg(value_parser = class_name)]
        class: String,
    },
    /// List tenants' policies
    List,
    /// Set a tenant's weight and limits; those that are not named stay as they are
    Set {
        /// Its name
        tenant: TenantId,
        /// In this queue only; what it has here comes in place of what it has in every queue
        #[arg(long)]
        queue: Option<QueueName>,
        /// How many jobs it gets in its turn
        #[arg(long, value_name = "1-100", value_parser = clap::value_parser!(u8).range(1..=100))]
        weight: Option<u8>,
        #[command(flatten)]
        limits: Limits,
    },
    /// Remove what was set for a tenant
    Reset {
        /// Its name
        tenant: TenantId,
        /// In this queue only; what it has in every queue holds there again
        #[arg(long)]
        queue: Option<QueueName>,
    },
    /// Claim none of a tenant's jobs; those that run go on, and new ones are accepted
    Pause {
        /// Its name
        tenant: TenantId,
        /// In this queue only
        #[arg(long)]
        queue: Option<QueueName>,
    },
    /// End a pause
    Resume {
        /// Its name
        tenant: TenantId,
        /// In this queue only
        #[arg(long)]
        queue: Option<QueueName>,
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
            let rows = rows_of(&postgres, Some(&tenant)).await?;
            let depth = |row: &TenantRow| row.policy.and_then(|policy| policy.max_depth);
            let everywhere = rows.iter().find(|row| row.queue.is_none()).and_then(depth);
            context.out.data(&found, || {
                let limit = everywhere
                    .map(|depth| depth.to_string())
                    .or_else(|| found.max_waiting.map(|waiting| waiting.to_string()))
                    .unwrap_or_else(|| "the producer's default".to_owned());
                let own =
                    rows.iter().filter_map(|row| Some(format!("{} in {}", depth(row)?, row.queue.as_ref()?)));
                let own: Vec<String> = own.collect();
                output::fields(&[
                    ("tenant", Some(found.id.clone())),
                    ("class", Some(found.class.clone())),
                    (
                        "waiting jobs at most",
                        Some(std::iter::once(limit).chain(own).collect::<Vec<_>>().join("; ")),
                    ),
                ])
            })?;
        }
        Command::Class { tenant, class } => {
            match postgres.set_class(tenant.as_str(), &class, &actor()).await? {
                Classified::Done => {}
                Classified::UnknownTenant => return Err(unknown(&tenant).into()),
                Classified::TooMany => {
                    let why =
                        format!("there are {MAX_CLASSES} classes already, and each is a label of metrics");
                    return Err(Refused(why).into());
                }
            }
            context.out.data(&json!({ "tenant": tenant, "class": class }), || {
                format!("{tenant} is counted as {class}")
            })?;
        }
        Command::List => show(context, &rows_of(&postgres, None).await?)?,
        Command::Set { tenant, queue, weight, limits } => {
            if weight.is_none() && limits.is_empty() {
                return Err(Refused("name a limit: see `flotilla tenants set --help`".to_owned()).into());
            }
            let edit = |policy: &mut Option<TenantPolicy>| {
                let policy = policy.get_or_insert_default();
                policy.weight = weight.unwrap_or(policy.weight);
                limits.apply(&mut policy.max_concurrency, &mut policy.rate, &mut policy.max_depth);
            };
            let place = queue.as_ref();
            let row = postgres.edit_tenant_policy(&tenant, place, &actor(), "tenants.set", edit).await?;
            show(context, &[row.ok_or_else(|| unknown(&tenant))?])?;
        }
        Command::Reset { tenant, queue } => {
            let edit = |policy: &mut Option<TenantPolicy>| *policy = None;
            let place = queue.as_ref();
            let row = postgres.edit_tenant_policy(&tenant, place, &actor(), "tenants.reset", edit).await?;
            row.ok_or_else(|| unknown(&tenant))?;
            show(context, &rows_of(&postgres, Some(&tenant)).await?)?;
        }
        Command::Pause { tenant, queue } => pause(context, &postgres, &tenant, queue, true).await?,
        Command::Resume { tenant, queue } => pause(context, &postgres, &tenant, queue, false).await?,
    }
    Ok(Ending::Fine)
}

/// Pauses or resumes a tenant in one queue, or wherever it has jobs: then also in the queues where it has limits of its own.
async fn pause(
    context: &Context,
    postgres: &Postgres,
    tenant: &TenantId,
    queue: Option<QueueName>,
    paused: bool,
) -> anyhow::Result<()> {
    let mut places = vec![queue.clone()];
    if queue.is_none() {
        let own = rows_of(postgres, Some(tenant)).await?.into_iter().filter(|row| row.queue.is_some());
        places.extend(own.map(|row| row.queue));
    }
    let action = if paused { "tenants.pause" } else { "tenants.resume" };
    let mut rows = Vec::new();
    for place in places {
        let edit = |policy: &mut Option<TenantPolicy>| policy.get_or_insert_default().paused = paused;
        let row = postgres.edit_tenant_policy(tenant, place.as_ref(), &actor(), action, edit).await?;
        rows.push(row.ok_or_else(|| unknown(tenant))?);
    }
    show(context, &rows)
}

async fn rows_of(postgres: &Postgres, tenant: Option<&TenantId>) -> anyhow::Result<Vec<TenantRow>> {
    let mut rows = postgres.policies_since(0).await?.tenants;
    rows.retain(|row| row.policy.is_some() && tenant.is_none_or(|wanted| row.tenant == *wanted));
    rows.sort_by(|a, b| (&a.tenant, &a.queue).cmp(&(&b.tenant, &b.queue)));
    Ok(rows)
}

fn show(context: &Context, rows: &[TenantRow]) -> anyhow::Result<()> {
    context.out.data(rows, || {
        let mut table =
            output::table(&["TENANT", "QUEUE", "STATE", "WEIGHT", "RUNNING", "PER SECOND", "WAITING"]);
        for row in rows {
            let policy = row.policy.unwrap_or_default();
            let [running, rate, waiting] =
                queues::limits(policy.max_concurrency, policy.rate, policy.max_depth);
            table.add_row([
                row.tenant.to_string(),
                row.queue.as_ref().map_or("*".to_owned(), ToString::to_string),
                if policy.paused { "paused" } else { "open" }.to_owned(),
                policy.weight.to_string(),
                running,
                rate,
                waiting,
            ]);
        }
        output::rows(&table, "nothing is set: nothing is held back")
    })
}

/// A class has the same characters as a tenant.
fn class_name(text: &str) -> Result<String, &'static str> {
    let name = TenantId::new(text).map_err(|_| "1 to 64 characters of A-Z a-z 0-9 _ . - are allowed")?;
    Ok(name.to_string())
}

/// The error for a tenant that isn't there.
pub fn unknown(tenant: &TenantId) -> Refused {
    Refused(format!("there is no tenant {tenant}: make it with `flotilla tenants create {tenant}`"))
}
