//! The cache's connection: one server or a Sentinels' master, opened when needed and again after an error.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use queue::{
    Dialer, QueueError,
    dial::{Topology, Wire},
};
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, ServerErrorKind};
use tokio::{sync::Mutex, time::timeout};

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
    state: Arc<Mutex<State>>,
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
        Ok(Self { dialer, limit: config.call_timeout, state: Arc::default() })
    }

    /// Opens a connection of its own; the caller bounds it.
    pub(super) async fn open(&self) -> Result<Wire, StoreError> {
        self.dialer.connect().await.map_err(told)
    }

    /// Runs one command.
    pub(super) async fn command<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        let (number, mut wire) = self.wire().await?;
        let answer = timeout(self.limit, command.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, answer).await
    }

    /// Runs several commands in one round trip.
    pub(super) async fn pipeline<T: FromRedisValue>(&self, pipeline: &Pipeline) -> Result<T, StoreError> {
        let (number, mut wire) = self.wire().await?;
        let answer = timeout(self.limit, pipeline.query_async(&mut wire.redis)).await.ok();
        self.keep_or_drop(number, answer).await
    }

    async fn keep_or_drop<T>(
        &self,
        number: u64,
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
            None => (self.late("answer"), true),
        };
        if broken {
            let mut state = self.state.lock().await;
            if state.live.as_ref().is_some_and(|(current, _)| *current == number) {
                state.live = None;
            }
        }
        Err(error)
    }

    async fn wire(&self) -> Result<(u64, Wire), StoreError> {
        let mut state = self.state.lock().await;
        if let Some(live) = &state.live {
            return Ok(live.clone());
        }
        if let Some((at, error)) = &state.failed
            && at.elapsed() < CONNECT_PAUSE
        {
            return Err(error.clone());
        }
        let opened = timeout(self.limit, self.open()).await.unwrap_or_else(|_| Err(self.late("connection")));
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

    fn late(&self, what: &str) -> StoreError {
        let text = format!("no {what} within {:?}", self.limit);
        StoreError::new(Dependency::Cache, Class::Unavailable, text)
    }
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
