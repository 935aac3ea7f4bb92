//! The auditor's place in the ledger: who of the fleet audits, when the next audit is due, and what the last one found. One
//! row, and Postgres' clock alone.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::Postgres;
use crate::{audit::Report, error::StoreError};

/// What the last audits of the fleet say.
#[derive(Debug, Clone, PartialEq)]
pub struct Drift {
    /// Disagreements that stood after the last audit that came to its end, by kind; kinds without any are left out.
    pub by_kind: BTreeMap<String, i64>,
    /// When it ended; `None`: there was none yet.
    pub finished_at: Option<DateTime<Utc>>,
    /// Seconds since then, or since the fleet began if there was none.
    pub age_s: f64,
}

impl Postgres {
    /// Takes the auditor's place for so long, if an audit is due and nobody has it.
    pub async fn begin_audit(&self, who: &str, hold: Duration) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE auditor SET holder = $1, held_until = now() + make_interval(secs => $2), started_at = now()
             WHERE due_at <= now() AND (holder IS NULL OR held_until < now())",
        )
        .bind(who)
        .bind(hold.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Keeps the place for so long from now. `false`: somebody else has it.
    pub async fn keep_audit(&self, who: &str, hold: Duration) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE auditor SET held_until = now() + make_interval(secs => $2) WHERE holder = $1",
        )
        .bind(who)
        .bind(hold.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Gives the place back; the next audit is due after `next`. A report is what readers of the drift see from now on.
    /// `false`: somebody else has the place, and nothing was written.
    pub async fn end_audit(
        &self,
        who: &str,
        report: Option<&Report>,
        next: Duration,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE auditor SET holder = NULL, held_until = NULL, due_at = now() + make_interval(secs => $2),
                    finished_at = CASE WHEN $3::jsonb IS NULL THEN finished_at ELSE now() END,
                    drift = coalesce($3, drift), report = coalesce($4, report)
             WHERE holder = $1",
        )
        .bind(who)
        .bind(next.as_secs_f64())
        .bind(report.map(|report| json!(report.left_by_kind)))
        .bind(report.map(|report| json!(report)))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// What the last audit found, for the gauges.
    pub async fn drift(&self) -> Result<Drift, StoreError> {
        let (drift, finished_at, age_s): (sqlx::types::Json<BTreeMap<String, i64>>, _, _) = sqlx::query_as(
            "SELECT drift, finished_at, extract(epoch FROM now() - coalesce(finished_at, created_at))::float8 FROM auditor",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Drift { by_kind: drift.0, finished_at, age_s })
    }

    /// The report of the last audit that came to its end.
    pub async fn last_audit(&self) -> Result<Option<Value>, StoreError> {
        Ok(sqlx::query_scalar("SELECT report FROM auditor").fetch_one(&self.pool).await?)
    }
}
