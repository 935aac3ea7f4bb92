//! Every operation stays in the slot of its partition. A plain server checks nothing; a node in cluster mode refuses a
//! `#!lua` script that leaves its slot.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::HashSet,
    process::{Child, Command, Stdio},
    time::Duration,
};

use devstack::testing::Port;
use queue::{
    Beat, Envelope, Mode, Priority, Pushed, Queue, QueueConfig, QueuePolicy, Rate, TenantId, TenantPolicy,
};
use support::{eventually, ids, job, jobs, name, worker};
use uuid::Uuid;

/// One node that serves all slots. devstack starts plain servers only.
struct Node {
    child: Child,
    url: String,
    _ports: [Port; 2],
    _dir: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Node {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Cluster mode listens on a second one, too.
        let ports = [Port::free().unwrap(), Port::free().unwrap()];
        let [port, bus] = ports.each_ref().map(Port::number);
        let child = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--cluster-port",
                &bus.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--cluster-enabled",
                "yes",
            ])
            .args(["--maxmemory-policy", "noeviction"])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let node = Self { child, url: format!("redis://127.0.0.1:{port}"), _ports: ports, _dir: dir };
        eventually(
            Duration::from_secs(20),
            async || {
                let client = redis::Client::open(node.url.as_str()).unwrap();
                let mut raw = client.get_multiplexed_async_connection().await.ok()?;
                // Refused as "already busy" from the second time on.
                redis::cmd("CLUSTER")
                    .arg(&["ADDSLOTSRANGE", "0", "16383"])
                    .query_async::<redis::Value>(&mut raw)
                    .await
                    .ok();
                let info: String = redis::cmd("CLUSTER").arg("INFO").query_async(&mut raw).await.ok()?;
                info.contains("cluster_state:ok").then_some(())
            },
            async || format!("{} serves no slots", node.url),
        )
        .await;
        node
    }
}

#[tokio::test]
async fn rule_21_every_operation_stays_in_the_slot_of_its_partition() {
    let node = Node::start().await;
    let mut raw =
        redis::Client::open(node.url.as_str()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let leaving = "#!lua\nreturn {redis.call('SET', KEYS[1], '1'), redis.call('SET', '{elsewhere}:x', '1')}";
    let refused: redis::RedisResult<redis::Value> =
        redis::cmd("EVAL").arg(leaving).arg(1).arg("{flotilla:ingest:0}:probe").query_async(&mut raw).await;
    assert!(refused.is_err(), "this server doesn't check slots, so the test would prove nothing");

    let config = QueueConfig { url: node.url.clone(), partitions: 3, ..QueueConfig::default() };
    let queue = Queue::connect(config).await.unwrap();
    queue.stamp(Uuid::now_v7()).await.unwrap();
    assert!(queue.stamped().await.unwrap());
    let mut all = jobs(60);
    all.extend((0..9).map(|n| Envelope { run_at_ms: Some(i64::MAX / 4096), ..job(&format!("t{n}"), 2) }));
    assert!(queue.push(&all).await.unwrap().iter().all(|pushed| *pushed == Pushed::Queued));
    let claims = queue.claim(&name(), &worker(), 30).await.unwrap();
    assert_eq!(claims.len(), 30);
    let leases: Vec<_> = claims.iter().map(queue::Claim::lease_ref).collect();
    assert_eq!(queue.heartbeat(&leases).await.unwrap(), [Beat::Extended; 30]);
    assert!(queue.ack(&leases[..10]).await.unwrap().iter().all(|acked| *acked));
    let given: Vec<_> = leases[10..20]
        .iter()
        .enumerate()
        .map(|(n, lease)| (lease.clone(), Duration::from_secs(n as u64 % 2)))
        .collect();
    assert!(queue.release(&given).await.unwrap().iter().all(|released| *released));
    let left: Vec<_> = all[..5].iter().map(|envelope| (name(), envelope.id)).collect();
    queue.forget(&left).await.unwrap();
    queue
        .reprioritise(&all[30..40].iter().map(|job| (name(), job.id, Priority::HIGHEST)).collect::<Vec<_>>())
        .await
        .unwrap();
    queue.missing(&left).await.unwrap();
    let mut found = HashSet::new();
    for partition in 0..3 {
        let (page, further) = queue.scan(&name(), partition, 0).await.unwrap();
        assert_eq!(further, None);
        found.extend(page.iter().map(|envelope| envelope.id));
    }
    let done: HashSet<_> = leases[..10].iter().map(|lease| lease.id).collect();
    let held: HashSet<_> = leases[20..].iter().map(|lease| lease.id).collect();
    let dropped: HashSet<_> = left.iter().map(|(_, id)| *id).filter(|id| !held.contains(id)).collect();
    let there = all.iter().map(|job| job.id).filter(|id| !done.contains(id) && !dropped.contains(id));
    assert_eq!(found, there.collect());
    // Policies that hold nothing back here, each with its keys.
    let (rate, tenant) = (Some(Rate::per_second(1e6)), TenantId::new("acme").unwrap());
    let all_of = QueuePolicy {
        mode: Mode::Weighted([1; 10]),
        max_concurrency: Some(1000),
        rate,
        max_depth: Some(1000),
        ..QueuePolicy::default()
    };
    queue.set_policy(&name(), &all_of, 1).await.unwrap();
    let limits = TenantPolicy {
        weight: 2,
        max_concurrency: Some(1000),
        rate,
        max_depth: Some(1000),
        ..TenantPolicy::default()
    };
    queue.set_tenant_policy(&name(), &tenant, &limits, 1).await.unwrap();
    queue.lend(&name()).await.unwrap();
    assert_eq!(queue.push(&jobs(1)).await.unwrap(), [Pushed::Queued]);
    let limited = queue.claim(&name(), &worker(), 30).await.unwrap();
    assert!(!limited.is_empty());
    queue.lend(&name()).await.unwrap();
    let back: Vec<_> = limited.iter().map(|claim| (claim.lease_ref(), Duration::ZERO)).collect();
    assert!(queue.release(&back).await.unwrap().iter().all(|released| *released));
    queue.set_policy(&name(), &QueuePolicy::default(), 2).await.unwrap();
    queue.set_tenant_policy(&name(), &tenant, &TenantPolicy::default(), 2).await.unwrap();
    queue.lend(&name()).await.unwrap();
    assert!(queue.depth(&name()).await.unwrap() > 0);
    let stats = queue.stats(&name()).await.unwrap();
    assert_eq!(stats.in_flight, 10);
    assert_eq!(queue.leases(&name()).await.unwrap().len(), 10);
    queue.tenant_depth(&name(), &TenantId::new("acme").unwrap()).await.unwrap();
    let far = queue.at(i64::MAX / 4096 + 1);
    assert_eq!(far.reap(&name()).await.unwrap().len(), 10);
    assert_eq!(far.promote(&name()).await.unwrap(), stats.scheduled);
    let () = redis::cmd("FLUSHALL").query_async(&mut raw).await.unwrap();
    assert_eq!(queue.heartbeat(&leases[..3]).await.unwrap(), [Beat::Reregistered; 3]);
    assert!(ids(&queue.claim(&name(), &worker(), 9).await.unwrap()).is_empty());
}
