//! Places that take no more jobs from SQL's enqueue (`migrations/0015_refusals.up.sql`).

use std::{collections::HashMap, time::Duration};

use queue::{QueueName, TenantId};

use super::Postgres;
use crate::error::StoreError;

/// A queue, or what a tenant has in it.
pub type Place = (QueueName, Option<TenantId>);

/// The tenant that stands for all.
const EVERYBODY: &str = "*";

fn names(places: &[Place]) -> (Vec<&str>, Vec<&str>) {
    places
        .iter()
        .map(|(queue, tenant)| (queue.as_str(), tenant.as_ref().map_or(EVERYBODY, TenantId::as_str)))
        .unzip()
}

impl Postgres {
    /// Has SQL's enqueue refuse jobs for some places until a time from now, and take them again for others.
    pub async fn refuse(&self, full: &[Place], free: &[Place], lasting: Duration) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        // Both in one order, because several relays write the same rows.
        let (queues, tenants) = names(full);
        sqlx::query(
            "INSERT INTO refusals (queue, tenant, until)
             SELECT queue, tenant, clock_timestamp() + make_interval(secs => $3)
             FROM unnest($1::text[], $2::text[]) AS p (queue, tenant) ORDER BY queue, tenant
             ON CONFLICT (queue, tenant) DO UPDATE SET until = EXCLUDED.until",
        )
        .bind(queues)
        .bind(tenants)
        .bind(lasting.as_secs_f64())
        .execute(&mut *tx)
        .await?;
        let (queues, tenants) = names(free);
        sqlx::query(
            "WITH free AS (
                 SELECT queue, tenant FROM refusals
                 JOIN unnest($1::text[], $2::text[]) AS p (queue, tenant) USING (queue, tenant)
                 ORDER BY queue, tenant FOR UPDATE OF refusals)
             DELETE FROM refusals USING free WHERE refusals.queue = free.queue AND refusals.tenant = free.tenant",
        )
        .bind(queues)
        .bind(tenants)
        .execute(&mut *tx)
        .await?;
        Ok(tx.commit().await?)
    }

    /// How many jobs these tenants may have waiting, of those that have a limit of their own.
    pub async fn waiting_limits(&self, tenants: &[&str]) -> Result<HashMap<String, u64>, StoreError> {
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "SELECT id, max_waiting FROM tenants WHERE id = ANY ($1) AND max_waiting IS NOT NULL",
        )
        .bind(tenants)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|(id, limit)| (id, limit.unsigned_abs())).collect())
    }
}
