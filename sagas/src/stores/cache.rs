//! The cache Redis: bodies of published versions, by version. A wrong entry can't exist, because a version never changes;
//! an absent one is filled from Postgres.

use std::time::Duration;

use metrics::counter;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Class, Dependency, StoreError};

/// Longest time a lost entry can stand (PROTOCOL.md 9). Entries that are read stay worth their memory far shorter.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// How to connect.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// `redis://…`, from `REDIS_CACHE_URL`.
    pub url: String,
    /// Prefix of all keys.
    pub prefix: String,
    /// No reply within this time is an outage.
    pub call_timeout: Duration,
}

/// The cached body of a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The whole text.
    pub body: String,
    /// SHA-256 of the body, hex.
    pub content_hash: String,
    /// Owner; a reader checks it.
    pub tenant: String,
}

/// The handle; clones share one connection, over which concurrent calls are pipelined.
#[derive(Clone)]
pub struct Cache {
    connection: ConnectionManager,
    client: redis::Client,
    prefix: String,
}

impl Cache {
    /// Makes the handle; connects in the background.
    pub fn lazy(config: &CacheConfig) -> Result<Self, StoreError> {
        let client = redis::Client::open(config.url.as_str()).map_err(|e| {
            StoreError::new(
                Dependency::Cache,
                Class::Permanent,
                format!("REDIS_CACHE_URL can't be read: {e}"),
            )
        })?;
        let settings = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(config.call_timeout))
            .set_response_timeout(Some(config.call_timeout))
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(500));
        let connection = ConnectionManager::new_lazy_with_config(client.clone(), settings)?;
        Ok(Self { connection, client, prefix: config.prefix.clone() })
    }

    /// Whether the server answers within a second, on a connection of its own.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let work = async {
            let mut connection = self.client.get_multiplexed_async_connection().await?;
            redis::cmd("PING").exec_async(&mut connection).await
        };
        match tokio::time::timeout(Duration::from_secs(1), work).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(StoreError::new(Dependency::Cache, Class::Unavailable, "no answer within 1 s")),
        }
    }

    /// The key of a version's entry.
    pub fn key(&self, version: Uuid) -> String {
        format!("{}:doc:{version}", self.prefix)
    }

    /// Writes a version's entry.
    pub async fn put(&self, version: Uuid, entry: &Entry) -> Result<(), StoreError> {
        let json = serde_json::to_string(entry)
            .map_err(|e| StoreError::new(Dependency::Cache, Class::Permanent, e.to_string()))?;
        // A tenth of spread, so that what was written together does not expire together.
        let ttl = TTL.as_secs() - rand::random_range(0..TTL.as_secs() / 10);
        let mut connection = self.connection.clone();
        redis::cmd("SET")
            .arg(self.key(version))
            .arg(json)
            .arg("EX")
            .arg(ttl)
            .exec_async(&mut connection)
            .await?;
        Ok(())
    }

    /// Reads a version's entry and counts the hit or miss.
    pub async fn get(&self, version: Uuid) -> Result<Option<Entry>, StoreError> {
        let entry = self.peek(version).await?;
        counter!(if entry.is_some() { "redis_cache_hits_total" } else { "redis_cache_misses_total" })
            .increment(1);
        Ok(entry)
    }

    /// Reads without counting; an entry that can't be read as one counts as wrong content, not as absent.
    pub async fn peek(&self, version: Uuid) -> Result<Option<Entry>, StoreError> {
        let mut connection = self.connection.clone();
        let text: Option<String> =
            redis::cmd("GET").arg(self.key(version)).query_async(&mut connection).await?;
        Ok(text.map(|text| {
            serde_json::from_str(&text).unwrap_or(Entry {
                body: text,
                content_hash: String::new(),
                tenant: String::new(),
            })
        }))
    }

    /// Removes versions' entries. `event` says why, for the metric: `compensated`, `retired`, `deleted`, `repaired`.
    pub async fn remove(&self, versions: &[Uuid], event: &'static str) -> Result<(), StoreError> {
        if versions.is_empty() {
            return Ok(());
        }
        let mut pipe = redis::pipe();
        for version in versions {
            pipe.cmd("UNLINK").arg(self.key(*version)).ignore();
        }
        let mut connection = self.connection.clone();
        pipe.exec_async(&mut connection).await?;
        counter!("redis_cache_invalidations_total", "event" => event).increment(versions.len() as u64);
        Ok(())
    }

    /// A page of all versions that have an entry, for the auditor: the versions and the next cursor (0: the end). Keys that
    /// name no version come back as text.
    pub async fn scan(&self, cursor: u64) -> Result<(Vec<Result<Uuid, String>>, u64), StoreError> {
        let mut connection = self.connection.clone();
        let prefix = format!("{}:doc:", self.prefix);
        let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
            .arg(cursor)
            .arg("MATCH")
            .arg(format!("{prefix}*"))
            .arg("COUNT")
            .arg(1000)
            .query_async(&mut connection)
            .await?;
        let versions = keys
            .into_iter()
            .map(|key| key.strip_prefix(&prefix).and_then(|v| v.parse().ok()).ok_or(key))
            .collect();
        Ok((versions, next))
    }
}
