//! Pages of the jobs in one state, for people.

use crate::{
    STATS_TENANTS,
    envelope::Envelope,
    error::QueueError,
    ids::{JobId, QueueName},
    partition::partition_key,
    queue::{CHUNK, Queue, text},
    record::read_record,
    reply::Reply,
    scripts,
};

/// Values per job in the answer of `list.lua`.
const FIELDS: usize = 13;

/// Where a listed job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListedState {
    /// In a list.
    Waiting,
    /// Until its time comes.
    Scheduled,
    /// With a worker.
    Leased,
}

impl ListedState {
    fn letter(self) -> &'static str {
        match self {
            Self::Waiting => "w",
            Self::Scheduled => "s",
            Self::Leased => "l",
        }
    }
}

/// One job of a page.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// What it is.
    pub envelope: Envelope,
    /// Where it is.
    pub state: ListedState,
    /// The worker that has it, if it is leased.
    pub owner: Option<String>,
    /// When it is due, or when its lease ends, in unix ms of Redis' clock.
    pub at_ms: Option<i64>,
}

impl Queue {
    /// A page of the jobs in one state: at most `limit` (500) after `skip`. Waiting jobs come by priority, then tenant
    /// (the first [`STATS_TENANTS`] of a priority); the others by time; all of it per partition, one after the other.
    /// The queue moves on between two pages, so a job may be on both or on neither.
    pub async fn list(
        &self,
        queue: &QueueName,
        state: ListedState,
        skip: u64,
        limit: usize,
    ) -> Result<Vec<Listed>, QueueError> {
        let (mut skip, limit) = (skip, limit.min(CHUNK));
        let mut page = Vec::new();
        for partition in 0..self.config().partitions {
            if page.len() >= limit {
                break;
            }
            let args = [text(state.letter()), text(skip), text(limit - page.len()), text(STATS_TENANTS)];
            let mut reply = Reply::new(self.script(&scripts::LIST, queue, partition, &args).await?.value)?;
            let held = reply.integer()?.unsigned_abs();
            while !reply.is_empty() {
                let mut record = reply.take(FIELDS)?;
                let id: JobId = record.parsed("a job id")?;
                let owner = Some(record.text()?).filter(|owner| !owner.is_empty());
                let at_ms = record.text()?.parse().ok();
                page.push(Listed { envelope: read_record(&mut record, id, queue)?, state, owner, at_ms });
            }
            skip = skip.saturating_sub(held);
        }
        Ok(page)
    }

    /// One job that Redis knows, wherever it is.
    pub async fn find(&self, queue: &QueueName, id: JobId) -> Result<Option<Listed>, QueueError> {
        let key = partition_key(self.config(), queue, self.partition_of(id));
        let mut get = redis::cmd("HMGET");
        get.arg(format!("{key}:j:{id}"));
        for field in ["s", "o", "k", "p", "t", "r", "e", "c", "d", "f", "a", "n"] {
            get.arg(field);
        }
        let mut reply = Reply::new(self.shared.link.command(&get).await?.value)?;
        let state = match reply.optional()?.as_deref() {
            None => return Ok(None),
            Some("w") => ListedState::Waiting,
            Some("s") => ListedState::Scheduled,
            Some("l") => ListedState::Leased,
            Some(other) => return Err(QueueError::Protocol(format!("a job's state is {other:?}"))),
        };
        let owner = reply.optional()?;
        Ok(Some(Listed { envelope: read_record(&mut reply, id, queue)?, state, owner, at_ms: None }))
    }
}
