//! One queue over the nodes of a real Redis Cluster.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use queue::{
    Acker, Beat, Claimer, ClaimerConfig, Done, Envelope, Gates, Heartbeat, HeartbeatConfig, JobId, Priority,
    Pushed, Queue, QueueConfig, Reaper, Scheduler, TenantId,
};
use support::{
    eventually, ids, job, jobs, name,
    servers::{Cluster, PATIENCE, ask, patient, raw},
    worker,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const PARTITIONS: u16 = 8;

fn config(cluster: &Cluster) -> QueueConfig {
    QueueConfig { url: cluster.url(), partitions: PARTITIONS, ..patient() }
}

fn partition(number: u16) -> String {
    format!("{{flotilla:ingest:{number}}}")
}

#[tokio::test]
async fn rule_21_every_operation_works_over_partitions_on_three_nodes() {
    let cluster = Cluster::start().await;
    let mut owners = HashSet::new();
    for number in 0..PARTITIONS {
        owners.insert(cluster.owner(&partition(number)).await);
    }
    assert_eq!(owners.len(), 3, "the partitions must be on all nodes, or this proves little");

    let queue = Queue::connect(config(&cluster)).await.unwrap();
    queue.ping().await.unwrap();
    assert!(!queue.stamped().await.unwrap());
    queue.stamp(Uuid::now_v7()).await.unwrap();
    assert!(queue.stamped().await.unwrap());
    let mut all = jobs(200);
    all.extend((0..40).map(|n| Envelope { run_at_ms: Some(i64::MAX / 4096), ..job(&format!("t{n}"), 2) }));
    assert!(queue.push(&all).await.unwrap().iter().all(|pushed| *pushed == Pushed::Queued));
    assert!(queue.push(&all).await.unwrap().iter().all(|pushed| *pushed == Pushed::Present));
    for node in &cluster.nodes {
        let size: u64 = redis::from_redis_value(ask(&mut raw(node).await, "DBSIZE").await.unwrap()).unwrap();
        // Of each partition: its counters, its records, and lists, rings or the schedule.
        assert!(size > 3, "a node holds {size} keys");
    }
    let places: Vec<_> = all.iter().map(|envelope| (name(), envelope.id)).collect();
    assert!(queue.missing(&places).await.unwrap().is_empty());
    let mut unknown = places[..5].to_vec();
    unknown.push((name(), JobId::new()));
    assert_eq!(queue.missing(&unknown).await.unwrap(), [unknown[5].1]);
    assert!(queue.places(&places).await.unwrap().iter().all(Option::is_some));
    assert_eq!(queue.tenant_depth(&name(), &TenantId::new("acme").unwrap()).await.unwrap(), 200);

    let claims = queue.claim(&name(), &worker(), 100).await.unwrap();
    assert_eq!(claims.len(), 100);
    let leases: Vec<_> = claims.iter().map(queue::Claim::lease_ref).collect();
    assert_eq!(queue.heartbeat(&leases).await.unwrap(), [Beat::Extended; 100]);
    assert!(queue.ack(&leases[..40]).await.unwrap().iter().all(|acked| *acked));
    let given: Vec<_> = leases[40..60].iter().map(|lease| (lease.clone(), Duration::ZERO)).collect();
    assert!(queue.release(&given).await.unwrap().iter().all(|released| *released));
    assert_eq!(queue.leases(&name()).await.unwrap().len(), 40);
    let waiting: Vec<_> = places.iter().filter(|(_, id)| !ids(&claims).contains(id)).cloned().collect();
    queue.forget(&waiting[..10]).await.unwrap();
    queue
        .reprioritise(
            &waiting[10..20].iter().map(|(q, id)| (q.clone(), *id, Priority::HIGHEST)).collect::<Vec<_>>(),
        )
        .await
        .unwrap();
    let stats = queue.stats(&name()).await.unwrap();
    assert_eq!((stats.in_flight, stats.scheduled), (40, 40));
    let far = queue.at(i64::MAX / 4096 + 1);
    assert_eq!(far.reap(&name()).await.unwrap().len(), 40);
    assert_eq!(far.promote(&name()).await.unwrap(), 40);
    for node in &cluster.nodes {
        ask(&mut raw(node).await, "FLUSHALL").await.unwrap();
    }
    assert_eq!(queue.heartbeat(&leases[90..]).await.unwrap(), [Beat::Reregistered; 10]);
}

/// The roles of a worker process, and how often each job ran.
struct Worker {
    runs: Arc<Mutex<HashMap<JobId, u32>>>,
    shutdown: CancellationToken,
    claimer: Claimer,
}

fn run_worker(queue: &Queue) -> Worker {
    let config = queue.config().clone();
    let interval = HeartbeatConfig { interval: config.lease / 5 };
    let heartbeat = Heartbeat::spawn(config, interval).unwrap();
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let shutdown = CancellationToken::new();
    Reaper::spawn(queue.clone(), vec![name()], shutdown.clone());
    Scheduler::spawn(queue.clone(), vec![name()], shutdown.clone());
    let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 16, slots: 64 };
    let (claimer, mut inbox) =
        Claimer::spawn(queue.clone(), heartbeat, config, Gates::new(), shutdown.clone());
    let runs = Arc::new(Mutex::new(HashMap::new()));
    let counts = Arc::clone(&runs);
    tokio::spawn(async move {
        while let Some(job) = inbox.recv().await {
            *counts.lock().unwrap().entry(job.envelope.id).or_insert(0) += 1;
            acker.done(&job.lease, Done::Ack).await;
        }
    });
    Worker { runs, shutdown, claimer }
}

impl Worker {
    fn ran(&self) -> usize {
        self.runs.lock().unwrap().len()
    }

    /// Waits until this many jobs have run and Redis holds none.
    async fn drained(&self, queue: &Queue, count: usize) {
        eventually(
            PATIENCE,
            async || {
                let stats = queue.stats(&name()).await.ok()?;
                let left = stats.depth() + stats.in_flight + stats.scheduled;
                (self.ran() == count && left == 0).then_some(())
            },
            async || format!("{} of {count} ran; {:?}", self.ran(), queue.stats(&name()).await),
        )
        .await;
    }

    async fn end(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.claimer.join()).await.expect("the claimer didn't end");
    }
}

#[tokio::test]
async fn rule_24_a_wake_up_from_any_node_reaches_an_idle_worker() {
    let cluster = Cluster::start().await;
    // Longer than the test may take: only wake-ups can make the worker look.
    let config = QueueConfig { safety_poll: Duration::from_secs(600), ..config(&cluster) };
    let queue = Queue::connect(config).await.unwrap();
    let worker = run_worker(&queue);
    for count in 1..=40 {
        // The first looks come before the subscription stands; from then on each job needs its own wake-up.
        queue.push(&jobs(1)).await.unwrap();
        worker.drained(&queue, count).await;
    }
    worker.end().await;
}

#[tokio::test]
async fn rule_21_a_worker_drains_partitions_on_three_nodes_of_which_one_is_killed_and_comes_back() {
    let cluster = Cluster::start().await;
    let queue = Queue::connect(config(&cluster)).await.unwrap();
    let mut all = jobs(1500);
    all.extend((0..500).map(|n| job(&format!("t{}", n % 7), (n % 10) as u8)));
    queue.push(&all).await.unwrap();
    let worker = run_worker(&queue);
    eventually(PATIENCE, async || (worker.ran() > 100).then_some(()), async || "nothing ran".to_owned())
        .await;
    cluster.nodes[1].kill9().await.unwrap();
    // What the others hold goes on: pushed, claimed, run and acked.
    let mut elsewhere = Vec::new();
    for _ in 0..60 {
        let one = jobs(1);
        if queue.push(&one).await.is_ok() {
            elsewhere.extend(one);
        }
    }
    assert!(elsewhere.len() > 10, "{} jobs could be pushed", elsewhere.len());
    let places: Vec<_> = elsewhere.iter().map(|envelope| (name(), envelope.id)).collect();
    eventually(
        PATIENCE,
        async || (queue.missing(&places).await.ok()?.len() == places.len()).then_some(()),
        async || format!("not done: {:?}", queue.places(&places).await),
    )
    .await;
    assert!(elsewhere.iter().all(|envelope| worker.runs.lock().unwrap().contains_key(&envelope.id)));
    all.extend(elsewhere);
    let on_all = jobs(200);
    queue.push(&on_all).await.unwrap_err();
    cluster.nodes[1].restart(&[]).await.unwrap();
    eventually(
        PATIENCE,
        async || queue.push(&on_all).await.ok(),
        async || format!("no push after the restart: {:?}", queue.push(&jobs(1)).await),
    )
    .await;
    worker.drained(&queue, all.len() + on_all.len()).await;
    worker.end().await;
}

#[tokio::test]
async fn rule_21_a_slot_that_moves_is_followed() {
    let cluster = Cluster::start().await;
    let queue = Queue::connect(QueueConfig { partitions: 1, ..config(&cluster) }).await.unwrap();
    let all = jobs(20);
    queue.push(&all).await.unwrap();
    let slot = cluster.slot(&partition(0)).await;
    let from = cluster.owner(&partition(0)).await;
    let to = (from + 1) % 3;
    let (mut source, mut target) = (raw(&cluster.nodes[from]).await, raw(&cluster.nodes[to]).await);
    let (source_id, target_id) = (&cluster.ids[from], &cluster.ids[to]);
    ask(&mut target, &format!("CLUSTER SETSLOT {slot} IMPORTING {source_id}")).await.unwrap();
    ask(&mut source, &format!("CLUSTER SETSLOT {slot} MIGRATING {target_id}")).await.unwrap();
    loop {
        let keys = ask(&mut source, &format!("CLUSTER GETKEYSINSLOT {slot} 100")).await.unwrap();
        let keys: Vec<String> = redis::from_redis_value(keys).unwrap();
        if keys.is_empty() {
            break;
        }
        let mut migrate = redis::cmd("MIGRATE");
        migrate
            .arg("127.0.0.1")
            .arg(cluster.nodes[to].port())
            .arg("")
            .arg(0)
            .arg(20_000)
            .arg("KEYS")
            .arg(keys);
        migrate.exec_async(&mut source).await.unwrap();
    }
    // The source still owns the slot and says ASK, also for scripts and in pipelines.
    let first = queue.claim(&name(), &worker(), 5).await.unwrap();
    assert_eq!(first.len(), 5);
    let places: Vec<_> = all.iter().map(|envelope| (name(), envelope.id)).collect();
    assert!(queue.missing(&places).await.unwrap().is_empty());
    for raw in [&mut target, &mut source, &mut raw(&cluster.nodes[(from + 2) % 3]).await] {
        ask(raw, &format!("CLUSTER SETSLOT {slot} NODE {target_id}")).await.unwrap();
    }
    // Now it says MOVED, to a client that learnt the map before.
    assert!(queue.missing(&places).await.unwrap().is_empty());
    let second = queue.claim(&name(), &worker(), 50).await.unwrap();
    assert_eq!(second.len(), 15);
    let leases: Vec<_> = first.iter().chain(&second).map(queue::Claim::lease_ref).collect();
    assert!(queue.ack(&leases).await.unwrap().iter().all(|acked| *acked));
    assert_eq!(queue.missing(&places).await.unwrap().len(), 20);
    let left: u64 =
        redis::from_redis_value(ask(&mut source, &format!("CLUSTER COUNTKEYSINSLOT {slot}")).await.unwrap())
            .unwrap();
    assert_eq!(left, 0, "nothing was written at the old place");
}

/// What `docs/guides/redis.md` has people run to move a slot while it is used.
fn the_guides_move() -> &'static str {
    let guide = include_str!("../../docs/guides/redis.md");
    let begin = guide.find("local moved = 0").expect("the guide has no script that moves a slot");
    &guide[begin..begin + guide[begin..].find("\n```").unwrap()]
}

#[tokio::test]
async fn rule_21_slots_move_under_load_and_each_job_runs_once() {
    const MOVES: u16 = 6;
    let cluster = Cluster::start().await;
    let queue = Queue::connect(config(&cluster)).await.unwrap();
    let worker = run_worker(&queue);
    let stop = CancellationToken::new();
    let pushers: Vec<_> = (0..2)
        .map(|pusher| {
            let (queue, stop) = (queue.clone(), stop.clone());
            tokio::spawn(async move {
                let mut pushed = 0_usize;
                while !stop.is_cancelled() {
                    let some: Vec<_> = (0..20)
                        // New tenants all the time, so that lists come and go while a slot moves.
                        .map(|n| job(&format!("t{pusher}-{}", pushed / 50 + n % 5), (n % 10) as u8))
                        .collect();
                    // None may fail: what is pushed again after an unknown outcome could run again.
                    queue.push(&some).await.unwrap();
                    pushed += some.len();
                }
                pushed
            })
        })
        .collect();
    let ran = async |count: usize| {
        eventually(
            PATIENCE,
            async || (worker.ran() >= count).then_some(()),
            async || format!("{} of {count} ran; {:?}", worker.ran(), queue.stats(&name()).await),
        )
        .await;
    };
    let mut moved = 0;
    for number in 0..MOVES {
        ran(worker.ran() + 200).await;
        let slot = cluster.slot(&partition(number)).await;
        let from = cluster.owner(&partition(number)).await;
        let to = (from + 1 + usize::from(number % 2)) % 3;
        let (source_id, target_id) = (&cluster.ids[from], &cluster.ids[to]);
        let (mut source, mut target) = (raw(&cluster.nodes[from]).await, raw(&cluster.nodes[to]).await);
        ask(&mut target, &format!("CLUSTER SETSLOT {slot} IMPORTING {source_id}")).await.unwrap();
        let mut eval = redis::cmd("EVAL");
        eval.arg(the_guides_move()).arg(0).arg(slot).arg(target_id).arg("127.0.0.1");
        let keys: u64 = eval.arg(cluster.nodes[to].port()).query_async(&mut source).await.unwrap();
        moved += keys;
        // Meanwhile the source answers ASK.
        ran(worker.ran() + 200).await;
        for raw in [&mut target, &mut source, &mut raw(&cluster.nodes[3 - from - to]).await] {
            ask(raw, &format!("CLUSTER SETSLOT {slot} NODE {target_id}")).await.unwrap();
        }
        let left = ask(&mut source, &format!("CLUSTER COUNTKEYSINSLOT {slot}")).await.unwrap();
        assert_eq!(
            redis::from_redis_value::<u64>(left).unwrap(),
            0,
            "something was written at the old place"
        );
    }
    ran(worker.ran() + 200).await;
    stop.cancel();
    let mut pushed = 0;
    for pusher in pushers {
        pushed += pusher.await.unwrap();
    }
    worker.drained(&queue, pushed).await;
    let twice: Vec<_> =
        worker.runs.lock().unwrap().iter().filter(|(_, runs)| **runs > 1).map(|(id, _)| *id).collect();
    assert!(twice.is_empty(), "{} of {pushed} ran again", twice.len());
    assert!(moved > u64::from(MOVES) * 3, "{moved} keys moved, which proves little");
    worker.end().await;
}

#[tokio::test]
async fn one_nodes_url_without_cluster_says_what_to_write() {
    let cluster = Cluster::start().await;
    let url = cluster.url().replace("redis-cluster", "redis");
    let queue = Queue::connect(QueueConfig { url, partitions: PARTITIONS, ..patient() }).await.unwrap();
    let error = queue.stats(&name()).await.unwrap_err().to_string();
    assert!(error.contains("redis-cluster://"), "{error}");
}

#[tokio::test]
async fn a_dead_seed_is_no_loss_and_a_cluster_that_is_away_is_an_outage() {
    let cluster = Cluster::start().await;
    let url = format!("redis-cluster://127.0.0.1:1,127.0.0.1:{}", cluster.nodes[2].port());
    let queue = Queue::connect(QueueConfig { url, ..config(&cluster) }).await.unwrap();
    queue.push(&jobs(10)).await.unwrap();
    let away = QueueConfig { url: "redis-cluster://127.0.0.1:1".to_owned(), ..config(&cluster) };
    let error = Queue::connect(away).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
}
