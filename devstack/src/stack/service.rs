//! The services by name.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::probe;
use crate::server::Engine;
use crate::{PostgresEngine, RedisEngine, VectorsEngine};

/// A service of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// The ledger and everything else that must not be lost.
    Postgres,
    /// Redis in its queue role.
    RedisQueue,
    /// Redis in its cache role.
    RedisCache,
    /// The vector server.
    Vectors,
}

impl Service {
    /// All services, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Postgres, Self::RedisQueue, Self::RedisCache, Self::Vectors];

    /// Its name on the command line, and of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::RedisQueue => "redis-queue",
            Self::RedisCache => "redis-cache",
            Self::Vectors => "vectors",
        }
    }

    /// The environment variable that holds its URL.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Postgres => "DATABASE_URL",
            Self::RedisQueue => "REDIS_QUEUE_URL",
            Self::RedisCache => "REDIS_CACHE_URL",
            Self::Vectors => "QDRANT_URL",
        }
    }

    pub(super) fn dir(self, stack: &Path) -> PathBuf {
        stack.join(self.name())
    }

    pub(super) fn log(self, stack: &Path) -> PathBuf {
        let engine = match self {
            Self::Postgres => PostgresEngine::NAME,
            Self::RedisQueue | Self::RedisCache => RedisEngine::NAME,
            Self::Vectors => VectorsEngine::NAME,
        };
        self.dir(stack).join(format!("{engine}.log"))
    }

    /// Whether a server of this kind answers at the URL within the limit; the error says what came instead.
    pub(super) async fn probe(self, url: &str, limit: Duration) -> Result<(), String> {
        let ask = async {
            match self {
                Self::Postgres => probe::postgres(url).await,
                Self::RedisQueue | Self::RedisCache => probe::redis(url).await.map(|_| ()),
                Self::Vectors => probe::vectors(url).await,
            }
        };
        match tokio::time::timeout(limit, ask).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|service| service.name() == text).ok_or_else(|| {
            format!("unknown service {text:?}: one of {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}
