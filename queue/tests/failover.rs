//! The master that Sentinels name, before and after it changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use devstack::{
    RedisProcess,
    testing::{TestServices, fake_sentinel},
};
use queue::{Queue, QueueConfig, QueueError};
use support::{
    eventually, jobs, name,
    servers::{OPTIONS, PATIENCE, ask, patient, raw, text},
};
use tokio::net::TcpListener;

/// A master and its replica, with a password.
struct Pair {
    servers: [RedisProcess; 2],
    dir: TestServices,
}

impl Pair {
    async fn start() -> Self {
        let dir = TestServices::builder().start().await.unwrap();
        let servers = ["a", "b"].map(|name| RedisProcess::reserve(&dir.dir().join(name)).unwrap());
        let options = |port| format!("port {port}\nrepl-diskless-sync-delay 0\n{OPTIONS}");
        servers[0].start(&options(servers[0].port()), &[]).await.unwrap();
        let replica = format!("{}\nreplicaof 127.0.0.1 {}", options(servers[1].port()), servers[0].port());
        servers[1].start(&replica, &[]).await.unwrap();
        let mut raw = raw(&servers[1]).await;
        eventually(
            PATIENCE,
            async || text(&mut raw, "INFO replication").await.contains("master_link_status:up").then_some(()),
            async || servers[1].log(),
        )
        .await;
        Self { servers, dir }
    }
}

#[tokio::test]
async fn rule_16_the_same_client_goes_on_after_sentinels_replaced_the_master() {
    let pair = Pair::start().await;
    let [master, replica] = &pair.servers;
    let sentinels: Vec<_> = (0..3)
        .map(|number| RedisProcess::reserve(&pair.dir.dir().join(format!("sentinel{number}"))).unwrap())
        .collect();
    for sentinel in &sentinels {
        // With a password of their own.
        let options = format!(
            "port {}\nrequirepass watch\nsentinel sentinel-pass watch\nsentinel monitor main 127.0.0.1 {} 2\n\
             sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 4000\n\
             sentinel parallel-syncs main 1",
            sentinel.port(),
            master.port()
        );
        sentinel.start(&options, &["--sentinel"]).await.unwrap();
    }
    for sentinel in &sentinels {
        let mut raw =
            support::servers::raw_at(&format!("redis://:watch@127.0.0.1:{}", sentinel.port()), sentinel)
                .await;
        eventually(
            PATIENCE,
            async || {
                let info = text(&mut raw, "INFO sentinel").await;
                info.contains("slaves=1,sentinels=3").then_some(())
            },
            async || sentinel.log(),
        )
        .await;
    }
    let hosts: Vec<_> = sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port())).collect();
    let url = format!("redis-sentinel://{}/main?db=1", hosts.join(","));
    let mut config = QueueConfig { url, ..patient() };
    let error = Queue::connect(config.clone()).await.unwrap_err().to_string();
    assert!(error.contains("127.0.0.1"), "without the Sentinels' password: {error}");
    config.access.sentinel_password = Some("watch".to_owned());
    let unknown = QueueConfig { url: config.url.replace("/main", "/other"), ..config.clone() };
    let error = Queue::connect(unknown).await.unwrap_err().to_string();
    assert!(error.contains("REDIS_QUEUE_URL is \"other\""), "{error}");

    let queue = Queue::connect(config).await.unwrap();
    let first = jobs(10);
    queue.push(&first).await.unwrap();
    let before = queue.run_id().await.unwrap();
    ask(&mut raw(master).await, "WAIT 1 20000").await.unwrap();
    master.kill9().await.unwrap();
    let more = jobs(5);
    eventually(
        PATIENCE,
        async || queue.push(&more).await.ok(),
        async || format!("{:?}; {}", queue.push(&jobs(1)).await, sentinels[0].log()),
    )
    .await;
    // Sentinels close the connections of a server whose role they change, so each call may have to be repeated.
    let places: Vec<_> = first.iter().chain(&more).map(|envelope| (name(), envelope.id)).collect();
    let missing = eventually(
        PATIENCE,
        async || queue.missing(&places).await.ok(),
        async || format!("{:?}", queue.missing(&places).await),
    )
    .await;
    assert!(missing.is_empty(), "what was replicated is there, but for {missing:?}");
    assert_ne!(queue.run_id().await.unwrap(), before);
    eventually(
        PATIENCE,
        async || {
            let info = ask(&mut raw(replica).await, "INFO replication").await.ok()?;
            redis::from_redis_value::<String>(info).ok()?.contains("role:master").then_some(())
        },
        async || replica.log(),
    )
    .await;
    // The old one comes back, and nobody is led to it.
    let now = queue.run_id().await.unwrap();
    master.restart(&[]).await.unwrap();
    raw(master).await;
    eventually(
        PATIENCE,
        async || (queue.push(&jobs(1)).await.is_ok() && queue.ping().await.is_ok()).then_some(()),
        async || format!("{:?}", queue.push(&jobs(1)).await),
    )
    .await;
    assert_eq!(queue.run_id().await.unwrap(), now);
}

#[tokio::test]
async fn rule_16_a_master_that_became_a_replica_is_left_and_a_replica_is_never_taken_for_the_master() {
    let pair = Pair::start().await;
    let [a, b] = &pair.servers;
    let named = Arc::new(AtomicU16::new(a.port()));
    let sentinel = fake_sentinel(Arc::clone(&named)).await.unwrap();
    // One of the Sentinels hangs: it accepts connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "redis-sentinel://127.0.0.1:{},127.0.0.1:{sentinel}/main",
        silent.local_addr().unwrap().port()
    );
    let queue = Queue::connect(QueueConfig { url: url.clone(), ..patient() }).await.unwrap();
    queue.push(&jobs(3)).await.unwrap();
    // The roles change without a connection being closed.
    ask(&mut raw(b).await, "REPLICAOF NO ONE").await.unwrap();
    ask(&mut raw(a).await, &format!("REPLICAOF 127.0.0.1 {}", b.port())).await.unwrap();
    named.store(b.port(), Ordering::Relaxed);
    let error = queue.push(&jobs(1)).await.unwrap_err();
    assert!(matches!(error, QueueError::Unavailable(_)), "{error}");
    queue.push(&jobs(1)).await.unwrap();
    // A Sentinel that has not heard of it yet.
    named.store(a.port(), Ordering::Relaxed);
    let config = QueueConfig { url, ..patient() };
    let error = Queue::connect(config.clone()).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    named.store(b.port(), Ordering::Relaxed);
    Queue::connect(config).await.unwrap();
}
