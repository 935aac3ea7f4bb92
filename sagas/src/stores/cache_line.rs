//! The cache's connection: one server or a Sentinels' master, opened when needed and again after an error.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use queue::{
    Dialer, QueueError,
    dial::{Topology, Wire},
};
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, ServerErrorKind};
use tokio::time::timeout;

use crate::{
    error::{Class, Dependency, StoreError},
    stores::cache::CacheConfig,
};

/// After a failed attempt to connect, callers get the same answer for this long.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Clones share one connection, which is dropped after a missed deadline, a broken stream, or when its server turns
/// out to be a replica. Cancel-safe.
#[derive(Clone)]
pub(super) struct CacheLine {
    dialer: Dialer,
    limit: Duration,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Held by whoever opens a connection; the others wait for that one.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    live: Option<(u64, Wire)>,
    opened: u64,
    failed: Option<(Instant, StoreError)>,
}

impl CacheLine {
    /// Opens nothing; fails on settings that can't work.
    pub(super) fn new(config: &CacheConfig) -> Result<Self, StoreError> {
        let dialer = Dialer::new("REDIS_CACHE_URL", &config.url, &config.access).map_err(told)?;
        if matches!(dialer.address().topology, Topology::Cluster { .. }) {
            return Err(StoreError::new(
                Dependency::Cache,
                Class::Permanent,
                "REDIS_CACHE_URL names a cluster: the cache takes one server or Sentinels (redis://, rediss://, \
                 redis-sentinel://, rediss-sentinel://)",
            ));
        }
        Ok(Self { dialer, limit: config.call_timeout, shared: Arc::default() })
    }

    /// Opens a connection of its own; the caller bounds it.
    pub(super) async fn open(&self) -> Result<Wire, StoreError> {
        self.dialer.connect().await.map_err(told)
    }

    /// Runs one command.
    pub(super) async fn command<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        let (number, mut wire) = self.wire().await?;
        let answer = timeout(self.limit, command.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, self.limit, answer)
    }

    /// Runs several commands in one round trip.
    pub(super) async fn pipeline<T: FromRedisValue>(&self, pipeline: &Pipeline) -> Result<T, StoreError> {
        let (number, mut wire) = self.wire().await?;
        let answer = timeout(self.limit, pipeline.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, self.limit, answer)
    }

    /// [`command`](Self::command) for who waits no longer than this, and as long before that for a connection if there is
    /// none. One that is being opened by then is there for later calls.
    pub(super) async fn command_within<T: FromRedisValue>(
        &self,
        limit: Duration,
        command: &Cmd,
    ) -> Result<T, StoreError> {
        let limit = limit.min(self.limit);
        let (number, mut wire) = self.wire_within(limit).await?;
        let answer = timeout(limit, command.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, limit, answer)
    }

    /// [`pipeline`](Self::pipeline), in the same way.
    pub(super) async fn pipeline_within<T: FromRedisValue>(
        &self,
        limit: Duration,
        pipeline: &Pipeline,
    ) -> Result<T, StoreError> {
        let limit = limit.min(self.limit);
        let (number, mut wire) = self.wire_within(limit).await?;
        let answer = timeout(limit, pipeline.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, limit, answer)
    }

    fn keep_or_drop<T>(
        &self,
        number: u64,
        limit: Duration,
        answer: Option<Result<T, RedisError>>,
    ) -> Result<T, StoreError> {
        let (error, broken) = match answer {
            Some(Ok(value)) => return Ok(value),
            Some(Err(error)) => {
                let broken = error.is_io_error()
                    || error.is_unrecoverable_error()
                    || error.kind() == ServerErrorKind::ReadOnly.into();
                (error.into(), broken)
            }
            None => (late("answer", limit), true),
        };
        if broken {
            let mut state = self.state();
            if state.live.as_ref().is_some_and(|(current, _)| *current == number) {
                state.live = None;
            }
        }
        Err(error)
    }

    // A plain mutex: it is held for moments and never across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, or why there was none a moment ago.
    fn known(&self) -> Option<Result<(u64, Wire), StoreError>> {
        let state = self.state();
        if let Some(live) = &state.live {
            return Some(Ok(live.clone()));
        }
        let (at, error) = state.failed.as_ref()?;
        (at.elapsed() < CONNECT_PAUSE).then(|| Err(error.clone()))
    }

    async fn wire(&self) -> Result<(u64, Wire), StoreError> {
        if let Some(known) = self.known() {
            return known;
        }
        let _opening = self.shared.opening.lock().await;
        if let Some(known) = self.known() {
            return known;
        }
        let opened =
            timeout(self.limit, self.open()).await.unwrap_or_else(|_| Err(late("connection", self.limit)));
        let mut state = self.state();
        match opened {
            Ok(wire) => {
                state.opened += 1;
                state.failed = None;
                let live = (state.opened, wire);
                state.live = Some(live.clone());
                Ok(live)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn wire_within(&self, limit: Duration) -> Result<(u64, Wire), StoreError> {
        if let Some(known) = self.known() {
            return known;
        }
        let line = self.clone();
        let opening = tokio::spawn(async move { line.wire().await });
        match timeout(limit, opening).await {
            Ok(Ok(wire)) => wire,
            Ok(Err(_)) | Err(_) => Err(late("connection", limit)),
        }
    }
}

fn late(what: &str, limit: Duration) -> StoreError {
    StoreError::new(Dependency::Cache, Class::Unavailable, format!("no {what} within {limit:?}"))
}

/// The dialer's errors speak of the queue; ours are the cache's.
fn told(error: QueueError) -> StoreError {
    match error {
        QueueError::Unavailable(text) => StoreError::new(Dependency::Cache, Class::Unavailable, text),
        QueueError::Protocol(text) => StoreError::new(Dependency::Cache, Class::Permanent, text),
        other => StoreError::new(Dependency::Cache, Class::Permanent, other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_cluster_and_a_bad_url_are_refused_with_the_settings_name_and_no_password() {
        for (url, part) in [
            ("redis-cluster://:hidden@h1,h2", "REDIS_CACHE_URL names a cluster"),
            ("redis://:hidden@h1,h2", "REDIS_CACHE_URL is \"redis://:***@h1,h2\""),
        ] {
            let config = CacheConfig { url: url.to_owned(), ..CacheConfig::default() };
            let error = CacheLine::new(&config).map(drop).unwrap_err().message;
            assert!(error.contains(part) && !error.contains("hidden"), "{error}");
        }
    }
}
