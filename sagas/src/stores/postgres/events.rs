//! Events for other services: an outbox that is read by cursor. A trigger writes it, in the transaction that changes what
//! readers see; `migrations/0014_events.up.sql` says how none is missed.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row;
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// Where to begin with the oldest event that is kept.
pub const FIRST: &str = "0-0";
/// Events in one page at most.
pub const MOST: i32 = 10_000;

/// Something that other services have to know.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Event {
    /// Where it stands: what to ask with for the events after it.
    pub cursor: String,
    /// When its transaction began.
    pub at: DateTime<Utc>,
    /// `document.published` or `document.deleted`.
    pub event: String,
    /// Whose document.
    pub tenant: String,
    /// The caller's name for it.
    pub document: String,
    /// Its id.
    pub document_id: Uuid,
    /// What readers see from now on; of a deletion, what they saw before.
    pub version: Uuid,
    /// The order number of the job that did it.
    pub order: i64,
}

/// An answer to a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Events {
    /// The next ones, the oldest first; none if nothing has happened since.
    Page(Vec<Event>),
    /// Some of the events after the cursor were removed by retention: read all documents again, then go on from now.
    Expired,
    /// That is no cursor.
    NoCursor,
}

impl Postgres {
    /// The events after a cursor, of `tenant` if given; at most `limit`, and at most [`MOST`]. An event is shown once all
    /// transactions have ended that could come before it, so one that stays open for long holds everybody's events back.
    pub async fn events_after(
        &self,
        after: &str,
        tenant: Option<&str>,
        limit: i32,
    ) -> Result<Events, StoreError> {
        let rows = sqlx::query("SELECT * FROM events_after($1, $2, $3)")
            .bind(after)
            .bind(tenant)
            .bind(limit)
            .fetch_all(&self.pool)
            .await;
        let rows = match rows {
            Ok(rows) => rows,
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("FT001") => {
                return Ok(Events::Expired);
            }
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22023") => {
                return Ok(Events::NoCursor);
            }
            Err(error) => return Err(error.into()),
        };
        let events = rows
            .iter()
            .map(|row| {
                Ok(Event {
                    cursor: row.try_get("cursor")?,
                    at: row.try_get("at")?,
                    event: row.try_get("event")?,
                    tenant: row.try_get("owner")?,
                    document: row.try_get("document")?,
                    document_id: row.try_get("document_id")?,
                    version: row.try_get("version")?,
                    order: row.try_get("doc_order")?,
                })
            })
            .collect::<Result<Vec<_>, sqlx::Error>>()?;
        Ok(Events::Page(events))
    }

    /// The same, and the cursor to go on with. Whoever begins at [`FIRST`] and finds nothing goes on from the end: of who stayed
    /// at the beginning nobody could tell later whether retention has removed what they never saw.
    pub async fn events_page(
        &self,
        after: &str,
        tenant: Option<&str>,
        limit: i32,
    ) -> Result<(Events, String), StoreError> {
        // Read before the page: what that doesn't show yet comes after it.
        let end = if after == FIRST { Some(self.events_now().await?) } else { None };
        let page = self.events_after(after, tenant, limit).await?;
        let last = match &page {
            Events::Page(events) => events.last().map(|last| last.cursor.clone()),
            Events::Expired | Events::NoCursor => None,
        };
        let next = last.or(end).unwrap_or_else(|| after.to_owned());
        Ok((page, next))
    }

    /// The cursor of now: what is committed later comes after it.
    pub async fn events_now(&self) -> Result<String, StoreError> {
        Ok(sqlx::query_scalar("SELECT events_now()").fetch_one(&self.pool).await?)
    }

    /// Removes events older than `keep`, at most `limit`, and remembers how far.
    pub async fn expire_events(&self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let gone: i64 = sqlx::query_scalar(
            "WITH old AS (
                 SELECT tx, id FROM (SELECT tx, id, at FROM events ORDER BY tx, id LIMIT $2 FOR UPDATE SKIP LOCKED) AS first
                 WHERE at < now() - make_interval(secs => $1)),
             gone AS (DELETE FROM events e USING old WHERE e.tx = old.tx AND e.id = old.id RETURNING e.tx, e.id),
             last AS (SELECT tx, id FROM gone ORDER BY tx DESC, id DESC LIMIT 1),
             moved AS (UPDATE events_expired x SET tx = last.tx, id = last.id FROM last WHERE (x.tx, x.id) < (last.tx, last.id))
             SELECT count(*) FROM gone",
        )
        .bind(keep.as_secs_f64())
        .bind(limit)
        .fetch_one(&self.pool)
        .await?;
        Ok(gone.unsigned_abs())
    }
}
