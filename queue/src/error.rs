//! What can go wrong on the Redis side, sorted by what the caller should do.

use redis::{ErrorKind, RedisError, ServerErrorKind};
use uuid::Uuid;

use crate::ids::JobId;

/// An error of the queue. [`is_unavailable`](QueueError::is_unavailable) tells outages, which are nobody's fault
/// and never charged to a job, from everything else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Redis can't serve us now: refused, reset, no reply in time, `LOADING`, `READONLY`, `MASTERDOWN`,
    /// `CLUSTERDOWN`. The outcome of the call is unknown.
    #[error("the queue's Redis is unavailable: {0}")]
    Unavailable(String),
    /// Refused because Redis is at its `maxmemory`; nothing was stored. Only what adds data is refused: claim, ack,
    /// release, heartbeat, reap, promote and forget go on.
    #[error(
        "the queue's Redis is full (used memory is over its maxmemory): drain the queue or raise maxmemory"
    )]
    Full,
    /// Some of the jobs pushed were not stored: a window or a depth is used up, or the queue is drained.
    #[error("{refused} of {pushed} jobs were not stored: {why}")]
    Refused {
        /// How many.
        refused: usize,
        /// Of how many.
        pushed: usize,
        /// Why the first of them was not.
        why: &'static str,
    },
    /// An apalis task asks for what the queue can't keep; nothing was stored.
    #[error("a task can't have {what}: {instead}")]
    Task {
        /// What it asks for.
        what: String,
        /// What does as much.
        instead: &'static str,
    },
    /// The `fast` record of a job that was pushed is nested deeper than any claim could read it back; nothing was stored.
    #[error("the fast record of job {job} is nested deeper than {} levels", crate::MAX_DEPTH)]
    TooDeep {
        /// Which.
        job: JobId,
    },
    /// The `fast` record of a job that was pushed is larger than [`QueueConfig::max_record`](crate::QueueConfig::max_record);
    /// nothing was stored.
    #[error(
        "the fast record of job {job} has {size} bytes of JSON: at most {limit} are allowed (QueueConfig::max_record)"
    )]
    TooLarge {
        /// Which.
        job: JobId,
        /// Bytes of its JSON.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The server may evict keys, so that jobs could vanish.
    #[error(
        "the queue's Redis has maxmemory-policy {policy}, which may evict jobs: set maxmemory-policy noeviction, \
         or point REDIS_QUEUE_URL at a server that has it"
    )]
    Evicting {
        /// The policy seen.
        policy: String,
    },
    /// The key prefix is stamped by another ledger.
    #[error(
        "key prefix {prefix:?} on this Redis belongs to ledger {found}, and this process uses ledger {ours}: \
         set FLOTILLA_PREFIX to a prefix of its own, or REDIS_QUEUE_URL to the right server"
    )]
    OtherLedger {
        /// The key prefix.
        prefix: String,
        /// The ledger that the prefix belongs to.
        found: String,
        /// The ledger of the caller.
        ours: Uuid,
    },
    /// A setting that can't work.
    #[error("{setting} is {value:?}: {allowed}")]
    Config {
        /// The environment variable or field.
        setting: &'static str,
        /// What was seen.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The system refused what a role needs to start.
    #[error("can't start {0}")]
    Start(String),
    /// Redis answered something this version doesn't understand, or a script failed. A bug or a foreign writer.
    #[error("unexpected answer from the queue's Redis: {0}")]
    Protocol(String),
}

impl QueueError {
    /// Whether this is an outage: wait and try again, charge nobody.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full)
    }
}

impl From<RedisError> for QueueError {
    fn from(error: RedisError) -> Self {
        let text = error.to_string();
        let unavailable = match error.kind() {
            ErrorKind::Io | ErrorKind::ClusterConnectionNotFound => true,
            ErrorKind::Server(kind) => matches!(
                kind,
                ServerErrorKind::BusyLoading
                    | ServerErrorKind::TryAgain
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ReadOnly
            ),
            _ => error.is_io_error() || error.is_timeout() || error.is_connection_dropped(),
        };
        let code = error.code().unwrap_or_default();
        if code == "OOM" {
            return Self::Full;
        }
        // A script that meets a slot on the move; see docs/guides/redis.md on moving slots.
        let moving = text.contains("access a non local key");
        if unavailable
            || moving
            || matches!(
                code,
                "LOADING"
                    | "READONLY"
                    | "MASTERDOWN"
                    | "CLUSTERDOWN"
                    | "BUSY"
                    | "MISCONF"
                    | "TRYAGAIN"
                    | "NOREPLICAS"
            )
        {
            Self::Unavailable(text)
        } else if error.kind() == ErrorKind::AuthenticationFailed
            || matches!(code, "NOAUTH" | "WRONGPASS" | "NOPERM")
            || text.contains("NOPERM")
        {
            Self::Protocol(format!("{text} (docs/guides/redis.md says what the user must be allowed)"))
        } else {
            Self::Protocol(text)
        }
    }
}
