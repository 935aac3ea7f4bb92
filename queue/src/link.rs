//! The way to Redis: one connection for a server or a Sentinels' master, one for each master of a cluster.
//!
//! Whatever the topology, an answer comes with the `run_id` of the server that gave it, every call ends within its
//! deadlines, and a connection that failed is opened again by the next call.

mod cluster;
mod node;

use std::{sync::Arc, time::Duration};

use redis::{Cmd, Pipeline, Value, aio::PubSub};
use tokio::time::timeout;

use crate::{
    address::{Host, Topology},
    config::QueueConfig,
    dial::Dialer,
    error::QueueError,
    scripts::Script,
};
use cluster::Cluster;
use node::{Fault, Node};

/// Connects to whatever the settings lead to. Owned by whoever uses it; the connections' tasks end when this is
/// dropped. Cancel-safe: an abandoned call may still have run in Redis.
pub(crate) struct Link {
    dialer: Arc<Dialer>,
    deadlines: Deadlines,
    route: Route,
}

enum Route {
    One(Box<Node>),
    Cluster(Box<Cluster>),
}

/// How long opening a connection and waiting for an answer may take.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    connect: Duration,
    response: Duration,
}

/// An answer, and the `run_id` of the server that gave it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub value: Value,
    pub run_id: Arc<str>,
}

/// What to send.
#[derive(Clone, Copy)]
enum Call<'a> {
    Command(&'a Cmd),
    /// A script on one partition.
    Script {
        script: &'a Script,
        partition: &'a str,
        args: &'a [Vec<u8>],
    },
}

impl Call<'_> {
    /// The script by its hash, or with its text.
    fn eval(script: &Script, partition: &str, args: &[Vec<u8>], whole: bool) -> Cmd {
        let (name, text) = if whole { ("EVAL", &script.source) } else { ("EVALSHA", &script.sha) };
        let mut command = redis::cmd(name);
        command.arg(text).arg(1).arg(partition).arg(args);
        command
    }
}

impl Link {
    pub(crate) fn new(config: &QueueConfig) -> Result<Self, QueueError> {
        Self::with_deadlines(config, config.connect_timeout, config.response_timeout)
    }

    /// Opens nothing; fails only on settings that can't work.
    pub(crate) fn with_deadlines(
        config: &QueueConfig,
        connect_timeout: Duration,
        response_timeout: Duration,
    ) -> Result<Self, QueueError> {
        let dialer = Arc::new(Dialer::new("REDIS_QUEUE_URL", &config.url, &config.access)?);
        let deadlines = Deadlines { connect: connect_timeout, response: response_timeout };
        let route = match &dialer.address().topology {
            Topology::Cluster { seeds } => {
                Route::Cluster(Box::new(Cluster::new(Arc::clone(&dialer), seeds.clone(), deadlines)))
            }
            _ => Route::One(Box::new(Node::new(Arc::clone(&dialer), None, deadlines))),
        };
        Ok(Self { dialer, deadlines, route })
    }

    /// Connects, and refuses servers that are too old or may evict. In a cluster one master that can't be reached is
    /// no reason to fail.
    pub(crate) async fn check(&self) -> Result<(), QueueError> {
        match &self.route {
            Route::One(node) => node.run_id().await.map(drop),
            Route::Cluster(cluster) => cluster.check().await,
        }
    }

    /// Runs one command. In a cluster it goes to the owner of its key, or to any node if it has none.
    pub(crate) async fn command(&self, command: &Cmd) -> Result<Answer, QueueError> {
        match &self.route {
            Route::One(node) => alone(node.call(Call::Command(command)).await),
            Route::Cluster(cluster) => cluster.command(command).await,
        }
    }

    /// Runs a pipeline of plain commands (no scripts) in one round trip, in a cluster one per node; any refused
    /// command fails the whole.
    pub(crate) async fn pipeline(&self, pipeline: &Pipeline) -> Result<Vec<Value>, QueueError> {
        match &self.route {
            Route::One(node) => {
                alone(node.pipeline(pipeline.cmd_iter()).await)?.into_iter().map(|value| Ok(value?)).collect()
            }
            Route::Cluster(cluster) => cluster.pipeline(pipeline).await,
        }
    }

    /// Runs a script on one partition. Where Redis doesn't know it (new server, `SCRIPT FLUSH`), the call is sent
    /// again with the script's text, which loads it; other calls in flight are not touched.
    pub(crate) async fn script(
        &self,
        script: &Script,
        partition: &str,
        args: &[Vec<u8>],
    ) -> Result<Answer, QueueError> {
        match &self.route {
            Route::One(node) => alone(node.call(Call::Script { script, partition, args }).await),
            Route::Cluster(cluster) => cluster.script(script, partition, args).await,
        }
    }

    /// The `run_id` of the server that holds this key, opening a connection if there is none.
    pub(crate) async fn run_id(&self, key: &str) -> Result<Arc<str>, QueueError> {
        match &self.route {
            Route::One(node) => node.run_id().await,
            Route::Cluster(cluster) => cluster.owner_of(key).await?.run_id().await,
        }
    }

    /// Which server holds this key, as a name that tells servers apart; the same for all keys unless in a cluster.
    pub(crate) async fn server(&self, key: &str) -> Result<Arc<str>, QueueError> {
        match &self.route {
            Route::One(_) => Ok("".into()),
            Route::Cluster(cluster) => Ok(cluster.owner_of(key).await?.name()),
        }
    }

    /// Whether the partitions may be on several servers, of which one can fail while the others serve.
    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self.route, Route::Cluster(_))
    }

    /// Opens a connection that hears what scripts publish: in a cluster any node hears all of it.
    pub(crate) async fn subscribe(&self) -> Result<PubSub, QueueError> {
        let opening = async |host: Option<&Host>| {
            let opening = async {
                match host {
                    Some(host) => self.dialer.subscribe_at(host).await,
                    None => self.dialer.subscribe().await,
                }
            };
            timeout(self.deadlines.connect, opening)
                .await
                .map_err(|_| QueueError::Unavailable("no subscription in time".to_owned()))?
        };
        let Route::Cluster(cluster) = &self.route else { return opening(None).await };
        let mut last = QueueError::Unavailable("no node of the cluster is known".to_owned());
        for host in cluster.hosts().await {
            match opening(Some(&host)).await {
                Ok(subscription) => return Ok(subscription),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// What a server that is meant to stand alone answered.
fn alone<T>(result: Result<T, Fault>) -> Result<T, QueueError> {
    result.map_err(|fault| match fault {
        Fault::Error { error, .. } => error,
        Fault::Redirect { host, .. } => QueueError::Config {
            setting: "REDIS_QUEUE_URL",
            value: format!("a node of a cluster, which sends us to {host}"),
            allowed: "write redis-cluster:// or rediss-cluster:// for a cluster",
        },
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
}
