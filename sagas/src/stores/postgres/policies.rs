//! The policies of queues and tenants: the truth, of which Redis holds a copy (PROTOCOL.md 17).

use queue::{Mode, Priority, QueueName, QueuePolicy, Rate, TenantId, TenantPolicy};
use serde_json::{Value, json};
use sqlx::{PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use super::Postgres;
use crate::error::{Class, Dependency, StoreError};

/// A queue's policy as it is in the ledger.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QueueRow {
    /// The queue.
    pub queue: QueueName,
    /// What holds.
    pub policy: QueuePolicy,
    /// Grows with every change of any policy.
    pub revision: i64,
}

/// A tenant's policy as it is in the ledger.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TenantRow {
    /// The tenant.
    pub tenant: TenantId,
    /// The queue; `None`: every queue, each by itself, that has no row of its own.
    pub queue: Option<QueueName>,
    /// What holds; `None`: the row was removed.
    pub policy: Option<TenantPolicy>,
    /// Grows with every change of any policy.
    pub revision: i64,
}

/// What changed after a revision.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicyChanges {
    /// Queues.
    pub queues: Vec<QueueRow>,
    /// Tenants.
    pub tenants: Vec<TenantRow>,
}

const QUEUE: &str =
    "queue, paused_at, draining_at, weights, max_concurrency, rate_per_s, burst, max_depth, revision";
const TENANT: &str =
    "tenant, queue, paused_at, weight, max_concurrency, rate_per_s, burst, max_depth, removed_at, revision";
/// The name that stands for every queue.
const EVERY: &str = "*";

impl Postgres {
    /// The policies that changed after `revision`; 0 gives all. Revisions become visible in their order, so that nothing
    /// is missed by asking for what came after the last one seen.
    pub async fn policies_since(&self, revision: i64) -> Result<PolicyChanges, StoreError> {
        // Both tables as of one moment.
        let mut tx = self.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?;
        let queues = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {QUEUE} FROM queue_policies WHERE revision > $1 ORDER BY revision"
        )))
        .bind(revision)
        .fetch_all(&mut *tx)
        .await?;
        let tenants = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {TENANT} FROM tenant_policies WHERE revision > $1 ORDER BY revision"
        )))
        .bind(revision)
        .fetch_all(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(PolicyChanges {
            queues: queues.iter().map(queue_row).collect::<Result<_, _>>()?,
            tenants: tenants.iter().map(tenant_row).collect::<Result<_, _>>()?,
        })
    }

    /// Changes a queue's policy and records who did it, in one transaction. Concurrent changes happen one after the other.
    pub async fn edit_queue_policy(
        &self,
        queue: &QueueName,
        actor: &str,
        action: &str,
        edit: impl FnOnce(&mut QueuePolicy) + Send,
    ) -> Result<QueueRow, StoreError> {
        let mut tx = self.begin().await?;
        lock(&mut tx).await?;
        let row =
            sqlx::query(sqlx::AssertSqlSafe(format!("SELECT {QUEUE} FROM queue_policies WHERE queue = $1")))
                .bind(queue.as_str())
                .fetch_optional(&mut *tx)
                .await?;
        let mut policy = row.as_ref().map(queue_row).transpose()?.map(|row| row.policy).unwrap_or_default();
        edit(&mut policy);
        policy.check().map_err(|error| data(&error))?;
        let weights = match policy.mode {
            Mode::Strict => None,
            Mode::Weighted(weights) => Some(weights.map(i16::from).to_vec()),
        };
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "INSERT INTO queue_policies AS p (queue, paused_at, draining_at, mode, weights, max_concurrency, rate_per_s,
                                              burst, max_depth, revision)
             VALUES ($1, CASE WHEN $2 THEN now() END, CASE WHEN $3 THEN now() END, $4, $5, $6, $7, $8, $9, 0)
             ON CONFLICT (queue) DO UPDATE SET
                 paused_at = CASE WHEN $2 THEN coalesce(p.paused_at, now()) END,
                 draining_at = CASE WHEN $3 THEN coalesce(p.draining_at, now()) END,
                 mode = $4, weights = $5, max_concurrency = $6, rate_per_s = $7, burst = $8, max_depth = $9
             RETURNING {QUEUE}"
        )))
        .bind(queue.as_str())
        .bind(policy.paused)
        .bind(policy.draining)
        .bind(if weights.is_some() { "weighted" } else { "strict" })
        .bind(weights)
        .bind(policy.max_concurrency.map(i32::try_from).transpose().map_err(|e| data(&e))?)
        .bind(policy.rate.map(|rate| rate.per_second))
        .bind(policy.rate.map(|rate| i32::try_from(rate.burst)).transpose().map_err(|e| data(&e))?)
        .bind(policy.max_depth.map(i64::try_from).transpose().map_err(|e| data(&e))?)
        .fetch_one(&mut *tx)
        .await?;
        let row = queue_row(&row)?;
        record(&mut tx, actor, None, action, queue.as_str(), &json!({ "policy": row.policy })).await?;
        tx.commit().await?;
        Ok(row)
    }

    /// Changes a tenant's policy in one queue, or in every queue, and records who did it, in one transaction. What a queue
    /// gets of its own starts as a copy of what holds in every queue. A policy that `edit` makes `None` is removed.
    /// `None`: there is no such tenant.
    pub async fn edit_tenant_policy(
        &self,
        tenant: &TenantId,
        queue: Option<&QueueName>,
        actor: &str,
        action: &str,
        edit: impl FnOnce(&mut Option<TenantPolicy>) + Send,
    ) -> Result<Option<TenantRow>, StoreError> {
        let place = queue.map_or(EVERY, QueueName::as_str);
        let mut tx = self.begin().await?;
        lock(&mut tx).await?;
        let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM tenants WHERE id = $1)")
            .bind(tenant.as_str())
            .fetch_one(&mut *tx)
            .await?;
        if !known {
            return Ok(None);
        }
        // The queue's own row, else that of every queue.
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {TENANT} FROM tenant_policies WHERE tenant = $1 AND queue IN ($2, '*') AND removed_at IS NULL
             ORDER BY queue = '*' LIMIT 1"
        )))
        .bind(tenant.as_str())
        .bind(place)
        .fetch_optional(&mut *tx)
        .await?;
        let mut policy = row.as_ref().map(tenant_row).transpose()?.and_then(|row| row.policy);
        edit(&mut policy);
        let set = policy.unwrap_or_default();
        set.check().map_err(|error| data(&error))?;
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "INSERT INTO tenant_policies AS p (tenant, queue, paused_at, weight, max_concurrency, rate_per_s, burst,
                                               max_depth, removed_at, revision)
             VALUES ($1, $2, CASE WHEN $3 THEN now() END, $4, $5, $6, $7, $8, CASE WHEN $9 THEN now() END, 0)
             ON CONFLICT (tenant, queue) DO UPDATE SET
                 paused_at = CASE WHEN $3 THEN coalesce(p.paused_at, now()) END,
                 weight = $4, max_concurrency = $5, rate_per_s = $6, burst = $7, max_depth = $8,
                 removed_at = CASE WHEN $9 THEN coalesce(p.removed_at, now()) END
             RETURNING {TENANT}"
        )))
        .bind(tenant.as_str())
        .bind(place)
        .bind(set.paused)
        .bind(i16::from(set.weight))
        .bind(set.max_concurrency.map(i32::try_from).transpose().map_err(|e| data(&e))?)
        .bind(set.rate.map(|rate| rate.per_second))
        .bind(set.rate.map(|rate| i32::try_from(rate.burst)).transpose().map_err(|e| data(&e))?)
        .bind(set.max_depth.map(i64::try_from).transpose().map_err(|e| data(&e))?)
        .bind(policy.is_none())
        .fetch_one(&mut *tx)
        .await?;
        let row = tenant_row(&row)?;
        let detail = json!({ "queue": place, "policy": row.policy });
        record(&mut tx, actor, Some(tenant), action, tenant.as_str(), &detail).await?;
        tx.commit().await?;
        Ok(Some(row))
    }
}

/// Changes of policies happen one after the other; see the triggers in `0007_policies`.
async fn lock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT pg_advisory_xact_lock(hashtext('flotilla.policies'))").execute(connection).await?;
    Ok(())
}

async fn record(
    connection: &mut PgConnection,
    actor: &str,
    tenant: Option<&TenantId>,
    action: &str,
    subject: &str,
    detail: &Value,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit_log (id, actor, tenant, action, subject, detail) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(Uuid::now_v7())
    .bind(actor)
    .bind(tenant.map(TenantId::as_str))
    .bind(action)
    .bind(subject)
    .bind(detail)
    .execute(connection)
    .await?;
    Ok(())
}

fn data(error: &dyn std::fmt::Display) -> StoreError {
    StoreError::new(Dependency::Postgres, Class::Data, error.to_string())
}

fn odd(what: &str, error: &dyn std::fmt::Display) -> StoreError {
    // The columns' checks allow nothing that these types refuse.
    StoreError::new(
        Dependency::Postgres,
        Class::Permanent,
        format!("a policy's {what} can't be read: {error}"),
    )
}

fn set(row: &PgRow, column: &str) -> Result<bool, sqlx::Error> {
    Ok(row.try_get::<Option<chrono::DateTime<chrono::Utc>>, _>(column)?.is_some())
}

type Limits = (Option<u32>, Option<Rate>, Option<u64>);

fn limits(row: &PgRow) -> Result<Limits, sqlx::Error> {
    let concurrency: Option<i32> = row.try_get("max_concurrency")?;
    let rate: Option<f64> = row.try_get("rate_per_s")?;
    let burst: Option<i32> = row.try_get("burst")?;
    let depth: Option<i64> = row.try_get("max_depth")?;
    Ok((
        concurrency.map(i32::unsigned_abs),
        rate.zip(burst).map(|(per_second, burst)| Rate { per_second, burst: burst.unsigned_abs() }),
        depth.map(i64::unsigned_abs),
    ))
}

fn queue_row(row: &PgRow) -> Result<QueueRow, StoreError> {
    let (max_concurrency, rate, max_depth) = limits(row)?;
    let mode = match row.try_get::<Option<Vec<i16>>, _>("weights")? {
        None => Mode::Strict,
        Some(weights) => {
            let mut levels = [1; Priority::LEVELS];
            for (level, weight) in levels.iter_mut().zip(weights) {
                *level = u8::try_from(weight).map_err(|e| odd("weights", &e))?;
            }
            Mode::Weighted(levels)
        }
    };
    Ok(QueueRow {
        queue: QueueName::new(row.try_get::<String, _>("queue")?).map_err(|e| odd("queue", &e))?,
        policy: QueuePolicy {
            paused: set(row, "paused_at")?,
            draining: set(row, "draining_at")?,
            mode,
            max_concurrency,
            rate,
            max_depth,
        },
        revision: row.try_get("revision")?,
    })
}

fn tenant_row(row: &PgRow) -> Result<TenantRow, StoreError> {
    let (max_concurrency, rate, max_depth) = limits(row)?;
    let queue: String = row.try_get("queue")?;
    let weight = u8::try_from(row.try_get::<i16, _>("weight")?).map_err(|e| odd("weight", &e))?;
    let policy = TenantPolicy { paused: set(row, "paused_at")?, weight, max_concurrency, rate, max_depth };
    Ok(TenantRow {
        tenant: TenantId::new(row.try_get::<String, _>("tenant")?).map_err(|e| odd("tenant", &e))?,
        queue: (queue != EVERY).then(|| QueueName::new(queue)).transpose().map_err(|e| odd("queue", &e))?,
        policy: (!set(row, "removed_at")?).then_some(policy),
        revision: row.try_get("revision")?,
    })
}
