//! One connection to Redis that comes back by itself.
//!
//! redis-rs has a connection manager too, but it keeps a connection whose answers never come. Here a missed deadline
//! drops the connection, so that a server that hung, or a peer that vanished without a reset, can't wedge us.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{Cmd, RedisError, ServerErrorKind, Value};
use tokio::{sync::Mutex, time::timeout};

use super::{Answer, Call, Deadlines, info};
use crate::{
    address::Host,
    dial::{Dialer, Wire},
    error::QueueError,
};

/// After a failed attempt to connect, callers get the same answer for this long, so that a crowd of them does not
/// wait for one connect timeout each.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Oldest server whose scripts know flags.
const OLDEST_MAJOR: u32 = 7;

/// One multiplexed connection, opened when first needed and again after an error.
pub(super) struct Node {
    dialer: Arc<Dialer>,
    /// A node of a cluster; otherwise wherever the address leads at the time.
    host: Option<Host>,
    deadlines: Deadlines,
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
    wire: Wire,
    run_id: Arc<str>,
    number: u64,
}

/// Why a call brought no answer.
#[derive(Debug)]
pub(super) enum Fault {
    /// The node doesn't serve the key; nothing was run.
    Redirect {
        /// Who does.
        host: Host,
        /// For this call only, because the slot is on its way there.
        ask: bool,
    },
    /// Anything else.
    Error {
        error: QueueError,
        /// The node can't be reached, or doesn't serve as a master should: somebody else may serve its slots.
        broken: bool,
    },
}

impl From<QueueError> for Fault {
    fn from(error: QueueError) -> Self {
        Self::Error { broken: matches!(error, QueueError::Unavailable(_)), error }
    }
}

impl Node {
    pub(super) fn new(dialer: Arc<Dialer>, host: Option<Host>, deadlines: Deadlines) -> Self {
        Self { dialer, host, deadlines, state: Mutex::default() }
    }

    /// Its address in the cluster.
    pub(super) fn name(&self) -> Arc<str> {
        self.host.as_ref().map(ToString::to_string).unwrap_or_default().into()
    }

    /// The `run_id` of the server behind the present connection, opening one if there is none.
    pub(super) async fn run_id(&self) -> Result<Arc<str>, QueueError> {
        Ok(self.live().await?.run_id)
    }

    pub(super) async fn call(&self, call: Call<'_>) -> Result<Answer, Fault> {
        let mut live = self.live().await?;
        let answer = match call {
            Call::Command(command) => self.bounded(command.query_async(&mut live.wire.redis)).await,
            Call::Script { script, partition, args } => {
                let known = Call::eval(script, partition, args, false);
                let answer = self.bounded(known.query_async(&mut live.wire.redis)).await;
                if matches!(&answer, Ok(Err(error)) if error.kind() == ServerErrorKind::NoScript.into()) {
                    let whole = Call::eval(script, partition, args, true);
                    self.bounded(whole.query_async(&mut live.wire.redis)).await
                } else {
                    answer
                }
            }
        };
        let value = self.keep_or_drop(live.number, answer).await?;
        Ok(Answer { value, run_id: live.run_id })
    }

    /// As `call`, at a node to which the key's slot is on its way.
    pub(super) async fn call_asking(&self, call: Call<'_>) -> Result<Answer, Fault> {
        let command = match call {
            Call::Command(command) => command.clone(),
            // With its text: this node may not know it, and one more refusal would need one more permission.
            Call::Script { script, partition, args } => Call::eval(script, partition, args, true),
        };
        let mut live = self.live().await?;
        // One write for both: the permission holds for the next command of the connection.
        let mut pipeline = redis::pipe();
        pipeline.cmd("ASKING").ignore().add_command(command).ignore_errors();
        let answers: Result<Result<Vec<Result<Value, RedisError>>, _>, _> =
            self.bounded(pipeline.query_async(&mut live.wire.redis)).await;
        let answer =
            answers.map(|answers| answers.and_then(|mut answers| answers.pop().unwrap_or(Ok(Value::Nil))));
        let value = self.keep_or_drop(live.number, answer).await?;
        Ok(Answer { value, run_id: live.run_id })
    }

    /// One answer per command, in order.
    pub(super) async fn pipeline<'a>(
        &self,
        commands: impl Iterator<Item = &'a Cmd>,
    ) -> Result<Vec<Result<Value, RedisError>>, Fault> {
        let mut pipeline = redis::pipe();
        for command in commands {
            pipeline.add_command(command.clone());
        }
        pipeline.ignore_errors();
        let mut live = self.live().await?;
        let values = self.bounded(pipeline.query_async(&mut live.wire.redis)).await;
        self.keep_or_drop(live.number, values).await
    }

    /// Sorts an error of the server or the connection.
    pub(super) fn fault(&self, error: RedisError) -> Fault {
        if let Some((target, _)) = error.redirect_node()
            && let Some((name, port)) = target.rsplit_once(':')
            && let Ok(port) = port.parse()
        {
            let ask = error.kind() == ServerErrorKind::Ask.into();
            let name = match &self.host {
                // The other node knows no name of its own; it is where this one is.
                Some(host) if name.is_empty() => host.name.clone(),
                _ => name.trim_matches(['[', ']']).to_owned(),
            };
            return Fault::Redirect { host: Host { name, port }, ask };
        }
        self.located(error.into()).into()
    }

    async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<Result<T, RedisError>, QueueError> {
        let limit = self.deadlines.response;
        timeout(limit, call)
            .await
            .map_err(|_| self.located(QueueError::Unavailable(format!("no answer within {limit:?}"))))
    }

    /// Passes an answer on; drops the connection if it can't be trusted any more.
    async fn keep_or_drop<T>(
        &self,
        number: u64,
        answer: Result<Result<T, RedisError>, QueueError>,
    ) -> Result<T, Fault> {
        let (fault, broken) = match answer {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => {
                // READONLY: a failover made this server a replica; the name may lead to the new master.
                let broken = error.is_io_error()
                    || error.is_unrecoverable_error()
                    || error.kind() == ServerErrorKind::ReadOnly.into();
                (self.fault(error), broken)
            }
            Err(late) => (late.into(), true),
        };
        if broken {
            let mut state = self.state.lock().await;
            if state.live.as_ref().is_some_and(|current| current.number == number) {
                state.live = None;
            }
        }
        Err(fault)
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
        // The deadline covers name lookup, the Sentinels, TCP, TLS, AUTH and the checks.
        let opening = async {
            let mut wire = match &self.host {
                Some(host) => self.dialer.connect_to(host).await?,
                None => self.dialer.connect().await?,
            };
            let (server, memory): (String, String) = redis::pipe()
                .cmd("INFO")
                .arg("server")
                .cmd("INFO")
                .arg("memory")
                .query_async(&mut wire.redis)
                .await?;
            let policy = match info(&memory, "maxmemory_policy") {
                Some(policy) => Some(policy.to_owned()),
                None => redis::cmd("CONFIG")
                    .arg("GET")
                    .arg("maxmemory-policy")
                    .query_async::<Vec<String>>(&mut wire.redis)
                    .await?
                    .get(1)
                    .cloned(),
            };
            check_server(&server, policy)?;
            let run_id = info(&server, "run_id").unwrap_or_default().into();
            Ok(Live { wire, run_id, number })
        };
        let limit = self.deadlines.connect;
        timeout(limit, opening).await.unwrap_or_else(|_| {
            Err(self.located(QueueError::Unavailable(format!("no connection within {limit:?}"))))
        })
    }

    /// Names the node, where there are several.
    fn located(&self, error: QueueError) -> QueueError {
        match (error, &self.host) {
            (QueueError::Unavailable(text), Some(host)) => QueueError::Unavailable(format!("{host}: {text}")),
            (error, _) => error,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

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
