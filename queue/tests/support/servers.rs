//! Redis servers in other arrangements than one alone: a cluster, a master with a replica.

use std::time::Duration;

use devstack::{RedisProcess, testing::TestServices};
use redis::{Value, aio::MultiplexedConnection};

use super::eventually;

/// Deadlines far beyond what a busy machine needs.
pub fn patient() -> queue::QueueConfig {
    queue::QueueConfig {
        connect_timeout: Duration::from_secs(10),
        response_timeout: Duration::from_secs(10),
        ..queue::QueueConfig::default()
    }
}

/// Generous: these tests run beside others on slow machines.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What every server of these tests is told.
pub const OPTIONS: &str =
    "protected-mode no\nsave \"\"\nappendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction";

/// A connection of the test's own to a server, once it answers.
pub async fn raw(server: &RedisProcess) -> MultiplexedConnection {
    raw_at(&format!("redis://127.0.0.1:{}", server.port()), server).await
}

pub async fn raw_at(url: &str, server: &RedisProcess) -> MultiplexedConnection {
    eventually(
        PATIENCE,
        async || {
            let mut raw = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.ok()?;
            redis::cmd("PING").exec_async(&mut raw).await.ok().map(|()| raw)
        },
        async || format!("no answer at {url}: {}", server.log()),
    )
    .await
}

/// Sends words, separated by spaces, as a command.
pub async fn ask(raw: &mut MultiplexedConnection, words: &str) -> redis::RedisResult<Value> {
    let mut words = words.split(' ');
    let mut command = redis::cmd(words.next().unwrap());
    words.for_each(|word| {
        command.arg(word);
    });
    command.query_async(raw).await
}

pub async fn text(raw: &mut MultiplexedConnection, words: &str) -> String {
    redis::from_redis_value(ask(raw, words).await.unwrap()).unwrap()
}

/// Three masters that share the slots.
pub struct Cluster {
    pub nodes: Vec<RedisProcess>,
    pub ids: Vec<String>,
    _dir: TestServices,
}

impl Cluster {
    pub async fn start() -> Self {
        let dir = TestServices::builder().start().await.unwrap();
        let nodes: Vec<_> = (0..3)
            .map(|number| RedisProcess::reserve(&dir.dir().join(format!("node{number}"))).unwrap())
            .collect();
        for node in &nodes {
            // Without full coverage a node that is away costs only its own slots.
            let options = format!(
                "port {}\ncluster-enabled yes\ncluster-port {}\ncluster-node-timeout 3000\n\
                 cluster-require-full-coverage no\n{OPTIONS}",
                node.port(),
                node.second_port()
            );
            node.start(&options, &[]).await.unwrap();
        }
        let mut ids = Vec::new();
        for (node, slots) in nodes.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
            let mut raw = raw(node).await;
            ask(&mut raw, &format!("CLUSTER ADDSLOTSRANGE {slots}")).await.unwrap();
            ids.push(text(&mut raw, "CLUSTER MYID").await);
        }
        let mut first = raw(&nodes[0]).await;
        for (number, node) in nodes.iter().enumerate().skip(1) {
            ask(&mut first, &format!("CLUSTER SET-CONFIG-EPOCH {number}")).await.ok();
            let meet = format!("CLUSTER MEET 127.0.0.1 {} {}", node.port(), node.second_port());
            ask(&mut first, &meet).await.unwrap();
        }
        let cluster = Self { nodes, ids, _dir: dir };
        cluster.whole().await;
        cluster
    }

    /// Waits until every node knows every slot's owner.
    pub async fn whole(&self) {
        for node in &self.nodes {
            let mut raw = raw(node).await;
            let ok = |info: &str| {
                info.contains("cluster_state:ok")
                    && info.contains("cluster_slots_ok:16384")
                    && info.contains("cluster_known_nodes:3")
            };
            eventually(
                PATIENCE,
                async || ok(&text(&mut raw, "CLUSTER INFO").await).then_some(()),
                async || format!("not whole: {}", node.log()),
            )
            .await;
        }
    }

    /// A URL that names only one of the nodes: the others must be learnt.
    pub fn url(&self) -> String {
        format!("redis-cluster://127.0.0.1:{}", self.nodes[0].port())
    }

    /// Which node's slots hold this key.
    pub async fn owner(&self, key: &str) -> usize {
        match self.slot(key).await {
            ..5461 => 0,
            5461..10923 => 1,
            _ => 2,
        }
    }

    pub async fn slot(&self, key: &str) -> u16 {
        let mut raw = raw(&self.nodes[0]).await;
        redis::from_redis_value(ask(&mut raw, &format!("CLUSTER KEYSLOT {key}")).await.unwrap()).unwrap()
    }
}
