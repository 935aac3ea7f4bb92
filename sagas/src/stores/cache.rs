//! The cache Redis: bodies of published versions, by version. A wrong entry can't exist, because a version never changes;
//! an absent one is filled from Postgres. Each document has a tag with the versions that have entries.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use metrics::counter;
use queue::{Access, address::redacted};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    error::{Class, Dependency, StoreError},
    stores::{
        announcer::{Announcement, Announcer},
        cache_line::CacheLine,
    },
};

/// Longest time a lost entry can stand (PROTOCOL.md 9). Entries that are read stay worth their memory far shorter.
const TTL: Duration = Duration::from_secs(24 * 3600);
/// Versions that a document's tag names at most: the latest.
const TAGGED: isize = 64;
/// What a reader waits for the cache at most, and as long again where it has to connect first: Postgres has the text, too.
const READ_WITHIN: Duration = Duration::from_millis(250);
/// How long readers leave a cache alone that has failed one of them.
const LEFT_ALONE: Duration = Duration::from_secs(1);

/// How to connect.
#[derive(Clone)]
pub struct CacheConfig {
    /// `redis://…`, from `REDIS_CACHE_URL`; the [forms of the queue](queue::address), but for a cluster.
    pub url: String,
    /// What is needed besides the URL: certificates, the Sentinels' password.
    pub access: Access,
    /// Prefix of all keys.
    pub prefix: String,
    /// No reply within this time is an outage.
    pub call_timeout: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            access: Access::default(),
            prefix: "flotilla".to_owned(),
            call_timeout: Duration::from_secs(5),
        }
    }
}

impl std::fmt::Debug for CacheConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may hold a password.
        f.debug_struct("CacheConfig")
            .field("url", &redacted(&self.url))
            .field("access", &self.access)
            .field("prefix", &self.prefix)
            .field("call_timeout", &self.call_timeout)
            .finish()
    }
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
    line: CacheLine,
    prefix: String,
    announcer: Announcer,
    reads: LeftAlone,
    fills: LeftAlone,
}

/// Whether readers leave the cache alone, and why. Once that is over one of them asks, and the others go on without the cache
/// until that one has heard from it. Clones are the same.
#[derive(Clone, Default)]
struct LeftAlone(Arc<Mutex<Option<(Instant, StoreError)>>>);

impl LeftAlone {
    fn lock(&self) -> MutexGuard<'_, Option<(Instant, StoreError)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error says that the caller goes on without the cache.
    fn may_ask(&self) -> Result<(), StoreError> {
        if let Some((until, error)) = self.lock().as_mut() {
            let now = Instant::now();
            if now < *until {
                return Err(error.clone());
            }
            *until = now + LEFT_ALONE;
        }
        Ok(())
    }

    fn heard<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        *self.lock() = answer.as_ref().err().map(|error| (Instant::now() + LEFT_ALONE, error.clone()));
        answer
    }
}

impl Cache {
    /// Makes the handle; connects when needed.
    pub fn lazy(config: &CacheConfig) -> Result<Self, StoreError> {
        let (line, prefix) = (CacheLine::new(config)?, config.prefix.clone());
        let announcer = Announcer::new(line.clone(), format!("{prefix}:events"));
        Ok(Self { line, prefix, announcer, reads: LeftAlone::default(), fills: LeftAlone::default() })
    }

    /// Whether the server answers within a second, on a connection of its own.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let work = async {
            let mut wire = self.line.open().await?;
            Ok(redis::cmd("PING").exec_async(&mut wire.redis).await?)
        };
        match tokio::time::timeout(Duration::from_secs(1), work).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::new(Dependency::Cache, Class::Unavailable, "no answer within 1 s")),
        }
    }

    /// The key of a version's entry.
    pub fn key(&self, version: Uuid) -> String {
        format!("{}:doc:{version}", self.prefix)
    }

    /// The key of a document's tag: a sorted set of the versions that have entries, the latest last.
    pub fn tag(&self, document: Uuid) -> String {
        format!("{}:tag:{document}", self.prefix)
    }

    /// Writes a version's entry and tags it with its document.
    pub async fn put_tagged(&self, document: Uuid, version: Uuid, entry: &Entry) -> Result<(), StoreError> {
        self.line.pipeline(&self.tagged(document, version, entry)?).await
    }

    /// The same by a reader who missed the entry: it waits a quarter of a second at most, and leaves a cache alone for a second
    /// that an entry could not be written to.
    pub async fn fill(&self, document: Uuid, version: Uuid, entry: &Entry) -> Result<(), StoreError> {
        let pipe = self.tagged(document, version, entry)?;
        self.fills.may_ask()?;
        self.fills.heard(self.line.pipeline_within(READ_WITHIN, &pipe).await)
    }

    fn tagged(&self, document: Uuid, version: Uuid, entry: &Entry) -> Result<redis::Pipeline, StoreError> {
        let tag = self.tag(document);
        let mut pipe = redis::pipe();
        pipe.add_command(self.set(version, entry)?).ignore();
        // Numbers that grow with time; two of the same millisecond stand side by side.
        pipe.cmd("ZADD")
            .arg(&tag)
            .arg(chrono::Utc::now().timestamp_millis())
            .arg(version.to_string())
            .ignore();
        pipe.cmd("ZREMRANGEBYRANK").arg(&tag).arg(0).arg(-TAGGED - 1).ignore();
        pipe.cmd("EXPIRE").arg(&tag).arg(TTL.as_secs()).ignore();
        Ok(pipe)
    }

    /// Writes a version's entry without a tag.
    pub async fn put(&self, version: Uuid, entry: &Entry) -> Result<(), StoreError> {
        self.line.command(&self.set(version, entry)?).await
    }

    fn set(&self, version: Uuid, entry: &Entry) -> Result<redis::Cmd, StoreError> {
        let json = serde_json::to_string(entry)
            .map_err(|e| StoreError::new(Dependency::Cache, Class::Permanent, e.to_string()))?;
        // A tenth of spread, so that what was written together does not expire together.
        let ttl = TTL.as_secs() - rand::random_range(0..TTL.as_secs() / 10);
        let mut set = redis::cmd("SET");
        set.arg(self.key(version)).arg(json).arg("EX").arg(ttl);
        Ok(set)
    }

    /// Reads a version's entry for a reader, and counts the hit or miss. Waits a quarter of a second at most, twice that to
    /// connect. After a failure readers get its error for a second, without a call.
    pub async fn get(&self, version: Uuid) -> Result<Option<Entry>, StoreError> {
        self.reads.may_ask()?;
        let read = self.line.command_within::<Option<String>>(READ_WITHIN, &self.read(version)).await;
        let entry = self.reads.heard(read)?.map(entry_of);
        counter!(if entry.is_some() { "redis_cache_hits_total" } else { "redis_cache_misses_total" })
            .increment(1);
        Ok(entry)
    }

    /// Reads without counting; an entry that can't be read as one counts as wrong content, not as absent.
    pub async fn peek(&self, version: Uuid) -> Result<Option<Entry>, StoreError> {
        let text: Option<String> = self.line.command(&self.read(version)).await?;
        Ok(text.map(entry_of))
    }

    fn read(&self, version: Uuid) -> redis::Cmd {
        let mut get = redis::cmd("GET");
        get.arg(self.key(version));
        get
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
        let () = self.line.pipeline(&pipe).await?;
        counter!("redis_cache_invalidations_total", "event" => event).increment(versions.len() as u64);
        Ok(())
    }

    /// Removes all entries of a document that has been deleted: those that its tag names, and these.
    pub async fn remove_document(&self, document: Uuid, versions: &[Uuid]) -> Result<(), StoreError> {
        let tag = self.tag(document);
        let mut range = redis::cmd("ZRANGE");
        range.arg(&tag).arg(0).arg(-1);
        let tagged: Vec<String> = self.line.command(&range).await?;
        crate::fault_point!("delete.cache.inside");
        let mut all: Vec<Uuid> = tagged.iter().filter_map(|version| version.parse().ok()).collect();
        all.extend(versions);
        all.sort_unstable();
        all.dedup();
        let mut pipe = redis::pipe();
        for version in &all {
            pipe.cmd("UNLINK").arg(self.key(*version)).ignore();
        }
        pipe.cmd("UNLINK").arg(&tag).ignore();
        let () = self.line.pipeline(&pipe).await?;
        counter!("redis_cache_invalidations_total", "event" => "deleted").increment(all.len() as u64);
        Ok(())
    }

    /// Tells everybody who listens that what readers see has changed, in the background. Call it after the commit.
    pub fn announce(&self, announcement: Announcement) {
        self.announcer.tell(announcement);
    }

    /// A page of all versions that have an entry, for the auditor: the versions and the next cursor (0: the end). Keys that
    /// name no version come back as text.
    pub async fn scan(&self, cursor: u64) -> Result<(Vec<Result<Uuid, String>>, u64), StoreError> {
        let prefix = format!("{}:doc:", self.prefix);
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(format!("{prefix}*")).arg("COUNT").arg(1000);
        let (next, keys): (u64, Vec<String>) = self.line.command(&scan).await?;
        let versions = keys
            .into_iter()
            .map(|key| key.strip_prefix(&prefix).and_then(|v| v.parse().ok()).ok_or(key))
            .collect();
        Ok((versions, next))
    }
}

fn entry_of(text: String) -> Entry {
    serde_json::from_str(&text).unwrap_or(Entry {
        body: text,
        content_hash: String::new(),
        tenant: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_cache_that_failed_is_left_alone_and_then_asked_by_one() {
        let alone = LeftAlone::default();
        assert!(alone.may_ask().is_ok() && alone.may_ask().is_ok());
        let failure = StoreError::new(Dependency::Cache, Class::Unavailable, "no answer");
        assert!(alone.heard::<()>(Err(failure)).is_err());
        assert!(alone.may_ask().is_err());
        tokio::time::advance(LEFT_ALONE).await;
        assert!(alone.may_ask().is_ok());
        assert!(alone.may_ask().is_err(), "two ask a cache that has not answered yet");
        assert!(alone.heard(Ok(())).is_ok());
        assert!(alone.may_ask().is_ok() && alone.may_ask().is_ok());
    }
}
