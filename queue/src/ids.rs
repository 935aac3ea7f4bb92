//! The words of the queue as types: job, tenant, priority, queue, worker and lease token.
//!
//! Names that end up in a Redis key ([`TenantId`], [`QueueName`]) accept only `[A-Za-z0-9_.-]`, so that no
//! name can break out of its key or change the hash tag that keeps a partition in one slot.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest tenant, queue or prefix name, in bytes. Short enough that a Redis hash which stores one stays a
/// listpack (`hash-max-listpack-value` is 64 by default).
pub const MAX_NAME: usize = 64;

/// Whether `name` may be part of a Redis key: 1 to [`MAX_NAME`] characters of `[A-Za-z0-9_.-]`.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// One job's identity, the same in the ledger and in the queue. New ids are UUIDv7, which keeps inserts local in
/// B-trees; their order is never used for correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

impl JobId {
    /// A fresh UUIDv7.
    #[allow(clippy::new_without_default)] // a default that differs on each call would surprise
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for JobId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

impl From<Uuid> for JobId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl From<JobId> for Uuid {
    fn from(id: JobId) -> Self {
        id.0
    }
}

/// A tenant's name that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tenant {0:?} is not allowed: a tenant is 1 to 64 characters of A-Z a-z 0-9 _ . -")]
pub struct InvalidTenant(pub String);

/// A queue's name that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("queue name {0:?} is not allowed: a queue name is 1 to 64 characters of A-Z a-z 0-9 _ . -")]
pub struct InvalidQueueName(pub String);

/// A priority outside 0 to 9.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("priority {0} is not allowed: priorities are 0 to 9, and 9 is served first")]
pub struct InvalidPriority(pub i64);

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $error:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks the name: 1 to 64 characters of `[A-Za-z0-9_.-]`.
            pub fn new(name: impl Into<String>) -> Result<Self, $error> {
                let name = name.into();
                if is_name(&name) { Ok(Self(name.into())) } else { Err($error(name)) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = $error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = $error;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                Self::new(text)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = $error;
            fn try_from(text: &str) -> Result<Self, Self::Error> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

name_type!(
    /// The owner of documents and jobs; tenants of one priority share a queue by round robin. Cheap to clone.
    TenantId,
    InvalidTenant
);
name_type!(
    /// The name of a queue, e.g. `ingest`. Cheap to clone.
    QueueName,
    InvalidQueueName
);

/// 0 to 9; 9 is served first. The default is 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Priority(u8);

impl Priority {
    /// Served last.
    pub const LOWEST: Self = Self(0);
    /// Served first.
    pub const HIGHEST: Self = Self(9);
    /// How many priorities there are.
    pub const LEVELS: usize = 10;

    /// The number, 0 to 9.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(5)
    }
}

impl TryFrom<i64> for Priority {
    type Error = InvalidPriority;
    fn try_from(value: i64) -> Result<Self, Self::Error> {
        match u8::try_from(value) {
            Ok(level @ 0..=9) => Ok(Self(level)),
            _ => Err(InvalidPriority(value)),
        }
    }
}

impl TryFrom<u8> for Priority {
    type Error = InvalidPriority;
    fn try_from(value: u8) -> Result<Self, Self::Error> {
        Self::try_from(i64::from(value))
    }
}

impl From<Priority> for u8 {
    fn from(priority: Priority) -> Self {
        priority.0
    }
}

impl From<Priority> for i16 {
    fn from(priority: Priority) -> Self {
        Self::from(priority.0)
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who claims jobs: one per worker process, e.g. `host:pid:random`. Only for people and audits; no decision
/// depends on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct WorkerId(Arc<str>);

impl WorkerId {
    /// Any text; what exceeds [`MAX_NAME`] bytes is cut off at a character boundary, so that the job's record in
    /// Redis stays small.
    pub fn new(text: impl AsRef<str>) -> Self {
        let text = text.as_ref();
        let mut end = text.len().min(MAX_NAME);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(text[..end].into())
    }

    /// `host:pid:random` of this process. The random part keeps two containers with the same host name and pid apart.
    pub fn for_this_process() -> Self {
        let host = std::env::var("HOSTNAME")
            .ok()
            .or_else(|| std::fs::read_to_string("/etc/hostname").ok())
            .unwrap_or_default();
        let host: String = host.trim().chars().take(32).collect();
        let host = if host.is_empty() { "worker" } else { &host };
        Self::new(format!("{host}:{}:{:08x}", std::process::id(), rand::random::<u32>()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for WorkerId {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl From<WorkerId> for String {
    fn from(worker: WorkerId) -> Self {
        worker.0.as_ref().to_owned()
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A random value that proves who claimed a job, made anew for each claim. It is a hint for ack, release and
/// heartbeat only; what protects data is the fence that the ledger grants.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LeaseToken(pub(crate) Arc<str>);

impl LeaseToken {
    /// The token as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for LeaseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseToken({})", self.0)
    }
}

impl From<&str> for LeaseToken {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_that_could_change_a_key_are_refused() {
        for bad in ["", "a b", "a:b", "a}b", "{", "é", &"x".repeat(65)] {
            assert_eq!(TenantId::new(bad), Err(InvalidTenant(bad.to_owned())), "{bad:?}");
            assert!(QueueName::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(TenantId::new("acme-1_x.Y").unwrap().as_str(), "acme-1_x.Y");
        assert_eq!(QueueName::new("x".repeat(64)).unwrap().as_str().len(), 64);
    }

    #[test]
    fn priorities_are_0_to_9() {
        assert_eq!(Priority::try_from(9_i64), Ok(Priority::HIGHEST));
        assert_eq!(Priority::try_from(10_i64), Err(InvalidPriority(10)));
        assert_eq!(Priority::try_from(-1_i64), Err(InvalidPriority(-1)));
        assert!(serde_json::from_str::<Priority>("10").is_err());
        assert_eq!(Priority::default().get(), 5);
    }

    #[test]
    fn a_worker_id_is_cut_at_a_character_boundary() {
        assert_eq!(WorkerId::new("é".repeat(40)).as_str().len(), 64);
        assert!(WorkerId::for_this_process().as_str().len() <= MAX_NAME);
    }
}
