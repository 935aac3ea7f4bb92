//! One connection to Redis that comes back by itself.
//!
//! redis-rs has a connection manager too, but it keeps a connection whose answers never come. Here a missed deadline
//! drops the connection, so that a server that hung, or a peer that vanished without a reset, can't wedge us.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{
    AsyncConnectionConfig, Client, Cmd, Pipeline, RedisError, ServerErrorKind, Value,
    aio::MultiplexedConnection,
};
use tokio::{sync::Mutex, time::timeout};

use crate::{config::QueueConfig, error::QueueError, scripts::Script};

/// After a failed attempt to connect, callers get the same answer for this long, so that a crowd of them does not
/// wait for one connect timeout each.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Oldest server whose scripts know flags.
const OLDEST_MAJOR: u32 = 7;

/// One multiplexed connection, opened when first needed and again after an error. Owned by whoever uses it; the
/// connection's task ends when this is dropped. Cancel-safe: an abandoned call may still have run in Redis.
pub(crate) struct Link {
    client: Client,
    connect_timeout: Duration,
    response_timeout: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    live: Option<Live>,
    opened: u64,
    failed: Option<(Instant, QueueError)>,
}

#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    run_id: Arc<str>,
    number: u64,
}

/// An answer, and the `run_id` of the server that gave it.
pub(crate) struct Answer {
    pub value: Value,
    pub run_id: Arc<str>,
}

impl Link {
    pub(crate) fn new(config: &QueueConfig) -> Result<Self, QueueError> {
        Self::with_deadlines(config, config.connect_timeout, config.response_timeout)
    }

    pub(crate) fn with_deadlines(
        config: &QueueConfig,
        connect_timeout: Duration,
        response_timeout: Duration,
    ) -> Result<Self, QueueError> {
        Ok(Self { client: client(config)?, connect_timeout, response_timeout, state: Mutex::default() })
    }

    /// Runs one command.
    pub(crate) async fn command(&self, command: &Cmd) -> Result<Answer, QueueError> {
        let mut live = self.live().await?;
        let value = self.bounded(command.query_async(&mut live.connection)).await;
        let value = self.keep_or_drop(live.number, value).await?;
        Ok(Answer { value, run_id: live.run_id })
    }

    /// Runs a pipeline of plain commands (no scripts) in one round trip; any refused command fails the whole.
    pub(crate) async fn pipeline(&self, pipeline: &Pipeline) -> Result<Vec<Value>, QueueError> {
        let mut live = self.live().await?;
        let values = self.bounded(pipeline.query_async(&mut live.connection)).await;
        self.keep_or_drop(live.number, values).await
    }

    /// Runs a script on one partition. Where Redis doesn't know it (new server, `SCRIPT FLUSH`), the call is sent
    /// again with the script's text, which loads it; other calls in flight are not touched.
    pub(crate) async fn script(
        &self,
        script: &Script,
        partition: &str,
        args: &[Vec<u8>],
    ) -> Result<Answer, QueueError> {
        let build = |name: &str, text: &str| {
            let mut command = redis::cmd(name);
            command.arg(text).arg(1).arg(partition).arg(args);
            command
        };
        let mut live = self.live().await?;
        let known = build("EVALSHA", &script.sha);
        let mut answer = self.bounded(known.query_async(&mut live.connection)).await;
        if matches!(&answer, Ok(Err(error)) if error.kind() == ServerErrorKind::NoScript.into()) {
            let whole = build("EVAL", &script.source);
            answer = self.bounded(whole.query_async(&mut live.connection)).await;
        }
        let value = self.keep_or_drop(live.number, answer).await?;
        Ok(Answer { value, run_id: live.run_id })
    }

    /// The `run_id` of the server behind the present connection, opening one if there is none.
    pub(crate) async fn run_id(&self) -> Result<Arc<str>, QueueError> {
        Ok(self.live().await?.run_id)
    }

    async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<Result<T, RedisError>, QueueError> {
        timeout(self.response_timeout, call)
            .await
            .map_err(|_| QueueError::Unavailable(format!("no answer within {:?}", self.response_timeout)))
    }

    /// Passes an answer on; drops the connection if it can't be trusted any more.
    async fn keep_or_drop<T>(
        &self,
        number: u64,
        answer: Result<Result<T, RedisError>, QueueError>,
    ) -> Result<T, QueueError> {
        let (error, broken) = match answer {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => {
                // READONLY: a failover made this server a replica; the name may lead to the new primary.
                let broken = error.is_io_error()
                    || error.is_unrecoverable_error()
                    || error.kind() == ServerErrorKind::ReadOnly.into();
                (QueueError::from(error), broken)
            }
            Err(late) => (late, true),
        };
        if broken {
            let mut state = self.state.lock().await;
            if state.live.as_ref().is_some_and(|current| current.number == number) {
                state.live = None;
            }
        }
        Err(error)
    }

    async fn live(&self) -> Result<Live, QueueError> {
        let mut state = self.state.lock().await;
        if let Some(live) = &state.live {
            return Ok(live.clone());
        }
        if let Some((at, error)) = &state.failed
            && at.elapsed() < CONNECT_PAUSE
        {
            return Err(error.clone());
        }
        match self.open(state.opened + 1).await {
            Ok(live) => {
                state.opened = live.number;
                state.failed = None;
                state.live = Some(live.clone());
                Ok(live)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn open(&self, number: u64) -> Result<Live, QueueError> {
        // Our own deadline covers name lookup, TCP, AUTH and the checks; the driver's own deadlines are off.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(1024);
        let opening = async {
            let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            let mut ask = connection.clone();
            let server: String = redis::cmd("INFO").arg("server").query_async(&mut ask).await?;
            let memory: String = redis::cmd("INFO").arg("memory").query_async(&mut ask).await?;
            let policy = match info(&memory, "maxmemory_policy") {
                Some(policy) => Some(policy.to_owned()),
                None => redis::cmd("CONFIG")
                    .arg("GET")
                    .arg("maxmemory-policy")
                    .query_async::<Vec<String>>(&mut ask)
                    .await?
                    .get(1)
                    .cloned(),
            };
            Ok::<_, RedisError>((connection, server, policy))
        };
        let (connection, server, policy) = timeout(self.connect_timeout, opening)
            .await
            .map_err(|_| QueueError::Unavailable(format!("no connection within {:?}", self.connect_timeout)))?
            .map_err(QueueError::from)?;
        check_server(&server, policy)?;
        let run_id = info(&server, "run_id").unwrap_or_default().into();
        Ok(Live { connection, run_id, number })
    }
}

/// Refuses a server that is too old or that may evict jobs.
fn check_server(server: &str, policy: Option<String>) -> Result<(), QueueError> {
    let version = info(server, "redis_version").unwrap_or("unknown");
    let major: Option<u32> = version.split('.').next().and_then(|major| major.parse().ok());
    if major.is_none_or(|major| major < OLDEST_MAJOR) {
        return Err(QueueError::Config {
            setting: "REDIS_QUEUE_URL",
            value: format!("a server of version {version}"),
            allowed: "Redis 7.0 or newer is needed",
        });
    }
    match policy {
        Some(policy) if policy == "noeviction" => Ok(()),
        Some(policy) => Err(QueueError::Evicting { policy }),
        None => Err(QueueError::Evicting {
            policy: "that can't be read (INFO memory and CONFIG GET both hide it)".to_owned(),
        }),
    }
}

/// Opens nothing; fails only on a URL that can't be read.
pub(crate) fn client(config: &QueueConfig) -> Result<Client, QueueError> {
    Client::open(config.url.as_str()).map_err(|error| QueueError::Config {
        setting: "REDIS_QUEUE_URL",
        // Never the URL itself: it may carry a password.
        value: error.to_string(),
        allowed: "a URL like redis://:password@host:6379/0 is needed",
    })
}

/// One field of an `INFO` answer.
pub(crate) fn info<'a>(text: &'a str, field: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_fields_are_found_by_their_whole_name() {
        let text = "# Memory\r\nmaxmemory_policy_x:1\r\nmaxmemory_policy:noeviction\r\n";
        assert_eq!(info(text, "maxmemory_policy"), Some("noeviction"));
        assert_eq!(info(text, "maxmemory"), None);
    }

    #[test]
    fn old_and_evicting_servers_are_refused() {
        let server = "redis_version:7.0.15\r\n";
        assert_eq!(check_server(server, Some("noeviction".to_owned())), Ok(()));
        assert!(matches!(
            check_server(server, Some("allkeys-lru".to_owned())),
            Err(QueueError::Evicting { .. })
        ));
        assert!(matches!(check_server(server, None), Err(QueueError::Evicting { .. })));
        let error = check_server("redis_version:6.2.7\r\n", Some("noeviction".to_owned()));
        assert!(matches!(error, Err(QueueError::Config { value, .. }) if value.contains("6.2.7")));
    }
}
