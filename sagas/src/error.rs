//! What can go wrong, sorted by what must be done about it.

use std::time::Duration;

use embedding::EmbedError;
use serde::{Deserialize, Serialize};

/// Something outside this process that a saga needs. Each has a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependency {
    /// The ledger, the saga log and the documents.
    Postgres,
    /// Qdrant, or the development vector server.
    Vectors,
    /// The cache Redis.
    Cache,
    /// The embedding provider.
    Embedder,
    /// A store of the user's own, by its name in metrics, errors and dead letters' classes. It has a breaker if the
    /// registry got a probe for it ([`Registry::probe`](crate::engine::Registry::probe)).
    Other(&'static str),
}

impl Dependency {
    /// Flotilla's own dependencies, in the order of declaration.
    pub const ALL: [Self; 4] = [Self::Postgres, Self::Vectors, Self::Cache, Self::Embedder];

    /// The name in metrics, errors and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Vectors => "vectors",
            Self::Cache => "cache",
            Self::Embedder => "embedder",
            Self::Other(name) => name,
        }
    }
}

impl std::fmt::Display for Dependency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// An outage: wait for the dependency, charge nobody (PROTOCOL.md 16).
    Unavailable,
    /// No reply in time while the dependency answers its probe: try again, charged.
    Timeout,
    /// May well work the next time: try again, charged.
    Transient,
    /// Too many requests: try again when told, charged.
    RateLimited,
    /// The data was refused (SQLSTATE 22, 23; invalid argument): never works again for this item, and a batch that
    /// holds such an item is split to find it.
    Data,
    /// Will not work however often it is tried.
    Permanent,
}

impl Class {
    /// The name in dead letters and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Transient => "transient",
            Self::RateLimited => "rate_limited",
            Self::Data => "data",
            Self::Permanent => "permanent",
        }
    }

    /// Whether another attempt can succeed.
    pub fn is_retryable(self) -> bool {
        !matches!(self, Self::Data | Self::Permanent)
    }
}

/// An error of a dependency. Cheap to clone: one failed batch answers many callers.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{dependency}: {message}")]
pub struct StoreError {
    /// Who failed.
    pub dependency: Dependency,
    /// What to do about it.
    pub class: Class,
    /// What happened, with its causes.
    pub message: String,
    /// When the dependency wants to be asked again.
    pub retry_after: Option<Duration>,
    /// It was undone as a whole, because another transaction stood in its way (a deadlock, or what it read has changed), and may be
    /// asked again at once.
    pub conflict: bool,
    /// The server is in trouble with something that was asked for, as a damaged page. Whoever asks in one batch with it is asked for
    /// without it.
    pub trouble: bool,
}

impl StoreError {
    /// An error without a wish for a later time.
    pub fn new(dependency: Dependency, class: Class, message: impl Into<String>) -> Self {
        Self {
            dependency,
            class,
            message: message.into(),
            retry_after: None,
            conflict: false,
            trouble: false,
        }
    }

    /// The same error as another dependency's: errors of sqlx and of redis convert as those of Flotilla's own Postgres and
    /// cache, and a user's database may be another one.
    #[must_use]
    pub fn of(self, dependency: Dependency) -> Self {
        Self { dependency, ..self }
    }

    /// Whether this is an outage.
    pub fn is_unavailable(&self) -> bool {
        self.class == Class::Unavailable
    }
}

/// An error and its causes on one line, outermost first.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

/// A text as Postgres takes it, in `text` and in `jsonb`: it knows no NUL, which becomes U+FFFD.
pub(crate) fn storable(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// SQLSTATEs, or their beginnings, that are no job's fault: the server is away or full, lets nobody in, or lacks the database; it may
/// only be read from, as one that was the primary until just now (25006); it has ended a session that was idle within a transaction,
/// as that of a process is that was paused (25P). What lasts although its probe is answered is charged.
const OUTAGES: [&str; 8] = ["08", "57P0", "53", "28", "3D", "25006", "25P03", "25P04"];

/// Trouble of the server's with what one statement asks for, as a damaged page.
const TROUBLES: [&str; 2] = ["58", "XX"];

impl From<sqlx::Error> for StoreError {
    /// SQLSTATE classes as PROTOCOL.md 16 and 20 sort them.
    fn from(error: sqlx::Error) -> Self {
        let (mut conflict, mut trouble) = (false, false);
        let class = match &error {
            sqlx::Error::Database(db) => {
                let code = db.code().unwrap_or_default();
                conflict = matches!(code.as_ref(), "40001" | "40P01");
                trouble = TROUBLES.iter().any(|trouble| code.starts_with(trouble));
                match code.as_ref() {
                    c if OUTAGES.iter().any(|outage| c.starts_with(outage)) => Class::Unavailable,
                    "57014" => Class::Timeout,
                    "40001" | "40P01" | "55P03" => Class::Transient,
                    _ if trouble => Class::Transient,
                    c if c.starts_with("22") || c.starts_with("23") => Class::Data,
                    _ => Class::Permanent,
                }
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::Protocol(_) => Class::Unavailable,
            sqlx::Error::Encode(_) | sqlx::Error::InvalidArgument(_) => Class::Data,
            _ => Class::Permanent,
        };
        Self { conflict, trouble, ..Self::new(Dependency::Postgres, class, with_causes(&error)) }
    }
}

impl From<qdrant_client::QdrantError> for StoreError {
    fn from(error: qdrant_client::QdrantError) -> Self {
        use qdrant_client::QdrantError as Q;
        // Code values of the gRPC standard; tonic's own type is not re-exported by the client.
        let class = match &error {
            Q::ResponseError { status } => match i32::from(status.code()) {
                // The client calls a refused connection Internal (13), and a broken one Unknown (2) or Cancelled (1). The
                // probe tells them from the server's own trouble, which is charged when it lasts.
                14 | 13 | 2 | 1 => Class::Unavailable,
                4 => Class::Timeout,
                8 => Class::RateLimited,
                3 | 11 => Class::Data,
                10 => Class::Transient,
                _ => Class::Permanent,
            },
            Q::ResourceExhaustedError { .. } => Class::RateLimited,
            Q::Io(_) => Class::Unavailable,
            _ => Class::Permanent,
        };
        Self::new(Dependency::Vectors, class, with_causes(&error))
    }
}

impl From<redis::RedisError> for StoreError {
    fn from(error: redis::RedisError) -> Self {
        let outage = error.is_io_error()
            || error.is_timeout()
            || error.is_connection_dropped()
            || error.is_connection_refusal()
            || matches!(
                error.code(),
                Some(
                    "LOADING"
                        | "READONLY"
                        | "MASTERDOWN"
                        | "CLUSTERDOWN"
                        | "OOM"
                        | "BUSY"
                        | "MISCONF"
                        | "TRYAGAIN"
                )
            );
        let class = if outage { Class::Unavailable } else { Class::Permanent };
        Self::new(Dependency::Cache, class, with_causes(&error))
    }
}

impl From<EmbedError> for StoreError {
    fn from(error: EmbedError) -> Self {
        let (class, retry_after) = match error.class() {
            embedding::ErrorClass::Unavailable => (Class::Unavailable, None),
            embedding::ErrorClass::RateLimited { retry_after } => (Class::RateLimited, retry_after),
            embedding::ErrorClass::Transient => (Class::Transient, None),
            embedding::ErrorClass::Permanent => (Class::Permanent, None),
        };
        Self { retry_after, ..Self::new(Dependency::Embedder, class, with_causes(&error)) }
    }
}

/// Why a step did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StepError {
    /// A dependency failed; its class decides.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The step itself says no.
    #[error("{message}")]
    Failed {
        /// What to do about it.
        class: Class,
        /// The reason as a word, for filters: `empty_document`, `wrong_dimension`, …
        code: &'static str,
        /// The reason as a sentence.
        message: String,
        /// Not before this time should it be tried again.
        retry_after: Option<Duration>,
    },
    /// Not now: the job goes back for so long, uncharged, and goes on with this step then.
    #[error("put off for {0:?}")]
    Snooze(Duration),
    /// The fence refused a write: somebody else has the job. Nothing more may be done.
    #[error("the lease was lost: another worker has this job")]
    LeaseLost,
    /// A person asked for the job's end.
    #[error("cancelled on request")]
    Cancelled,
    /// A job with a higher order number has already settled this document (PROTOCOL.md 8).
    #[error("superseded by a later job on the same document")]
    Superseded,
    /// This process stops; the job goes back, uncharged.
    #[error("the worker stops")]
    Stopping,
}

impl StepError {
    /// A failure that no retry mends.
    pub fn permanent(code: &'static str, message: impl Into<String>) -> Self {
        Self::Failed { class: Class::Permanent, code, message: message.into(), retry_after: None }
    }

    /// A failure that another attempt may mend.
    pub fn transient(code: &'static str, message: impl Into<String>) -> Self {
        Self::Failed { class: Class::Transient, code, message: message.into(), retry_after: None }
    }

    /// A refusal because of too many requests: another attempt is made after this time at the earliest.
    pub fn rate_limited(code: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        Self::Failed {
            class: Class::RateLimited,
            code,
            message: message.into(),
            retry_after: Some(retry_after),
        }
    }

    /// When it asks to be tried again at the earliest.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Store(error) => error.retry_after,
            Self::Failed { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What to do about it; `None` for the endings that are no failures.
    pub fn class(&self) -> Option<Class> {
        match self {
            Self::Store(error) => Some(error.class),
            Self::Failed { class, .. } => Some(*class),
            Self::Snooze(_) | Self::LeaseLost | Self::Cancelled | Self::Superseded | Self::Stopping => None,
        }
    }

    /// The word for filters.
    pub fn code(&self) -> &str {
        match self {
            Self::Store(error) => error.dependency.name(),
            Self::Failed { code, .. } => code,
            Self::Snooze(_) => "snoozed",
            Self::LeaseLost => "lease_lost",
            Self::Cancelled => "cancelled",
            Self::Superseded => "superseded",
            Self::Stopping => "stopping",
        }
    }
}
