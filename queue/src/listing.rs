//! Pages of the jobs that Redis has: in one state, for people; all of them, for those who look for one kind.

use redis::Value;

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
    /// Some of the jobs that Redis has in a partition of a queue, whatever their state, from the beginning (0) or from where the
    /// call before ended, and where to go on; `None` at the end. A job that is there from the first call to the last is met at
    /// least once, another may be, unless the partition goes to another server meanwhile. What can't be read is logged and left
    /// out.
    pub async fn scan(
        &self,
        queue: &QueueName,
        partition: u16,
        from: u64,
    ) -> Result<(Vec<Envelope>, Option<u64>), QueueError> {
        let mut ask = redis::cmd("HSCAN");
        ask.arg(format!("{}:j", partition_key(self.config(), queue, partition)));
        ask.arg(from).arg("COUNT").arg(CHUNK);
        let mut reply = Reply::new(self.shared.link.command(&ask).await?.value)?;
        let further: u64 = reply.parsed("a cursor")?;
        let mut records = reply.array()?;
        let mut found = Vec::with_capacity(records.len() / 2);
        while !records.is_empty() {
            let (id, record) = (records.text()?, records.bytes()?);
            if let Ok(id) = id.parse() {
                found.extend(readable(&record, id, queue));
            } else {
                tracing::warn!(id, "the name of a record is no job id");
            }
        }
        Ok((found, (further != 0).then_some(further)))
    }

    /// A page of the jobs in one state: at most `limit` (500) after `skip`. Waiting jobs come by priority, then tenant
    /// (the first [`STATS_TENANTS`] of a priority, then as many of those that are held back); the others by time; all of it per
    /// partition, one after the other.
    /// The queue moves on between two pages, so a job may be on both or on neither. What can't be read is logged and left out.
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
                let id: JobId = reply.parsed("a job id")?;
                let owner = owner_of(&reply.text()?);
                let at_ms = reply.text()?.parse().ok();
                let envelope = readable(&reply.bytes()?, id, queue);
                page.extend(envelope.map(|envelope| Listed { envelope, state, owner, at_ms }));
            }
            skip = skip.saturating_sub(held);
        }
        Ok(page)
    }

    /// One job that Redis knows, wherever it is; none if what it has can't be read, which is logged.
    pub async fn find(&self, queue: &QueueName, id: JobId) -> Result<Option<Listed>, QueueError> {
        let key = partition_key(self.config(), queue, self.partition_of(id));
        let mut ask = redis::pipe();
        for hash in ["j", "x"] {
            ask.cmd("HGET").arg(format!("{key}:{hash}")).arg(id.to_string());
        }
        let mut reply = Reply::new(Value::Array(self.shared.link.pipeline(&ask).await?))?;
        let Some(record) = reply.optional()? else { return Ok(None) };
        let holder = reply.optional()?;
        let state = match &holder {
            Some(_) => ListedState::Leased,
            // The sequence of a scheduled job is 0; see `lua/partition.lua`.
            None if record.starts_with("0 ") => ListedState::Scheduled,
            None => ListedState::Waiting,
        };
        let owner = holder.as_deref().and_then(owner_of);
        let envelope = readable(record.as_bytes(), id, queue);
        Ok(envelope.map(|envelope| Listed { envelope, state, owner, at_ms: None }))
    }
}

/// What a record says, or nothing and a line in the log.
fn readable(record: &[u8], id: JobId, queue: &QueueName) -> Option<Envelope> {
    read_record(record, id, queue)
        .inspect_err(|error| tracing::warn!(%id, %error, "a record can't be read"))
        .ok()
}

/// The worker in a holder, which is `<token> <tenant or nothing> <worker>` and spaces. A restored lease names none.
fn owner_of(holder: &str) -> Option<String> {
    holder.splitn(3, ' ').nth(2).map(str::trim_end).filter(|owner| !owner.is_empty()).map(str::to_owned)
}
