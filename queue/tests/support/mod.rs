//! What the tests of this crate share: a private Redis and a queue on it.
#![allow(dead_code)] // each test program uses a part

pub mod servers;

use std::time::{Duration, Instant};

use devstack::{Redis, RedisOptions, testing::TestServices};
use proptest::{prelude::ProptestConfig, strategy::Strategy, test_runner::TestRunner};
use queue::{Claim, Envelope, JobId, Priority, Queue, QueueConfig, QueueName, TenantId, WorkerId};

/// Longest a condition may take to come true; far more than it needs on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A private Redis and a queue on it. Dropping it ends the server.
pub struct Stage {
    services: TestServices,
    pub config: QueueConfig,
    pub queue: Queue,
}

impl Stage {
    pub async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// With other settings than the tests' own.
    pub async fn with(change: impl FnOnce(&mut QueueConfig)) -> Self {
        Self::on(RedisOptions::queue(), change).await
    }

    pub async fn on(options: RedisOptions, change: impl FnOnce(&mut QueueConfig)) -> Self {
        let services = TestServices::builder().redis_queue_with(options).start().await.unwrap();
        // Deadlines far beyond what a busy machine needs; tests of outages have their own.
        let mut config = QueueConfig {
            url: services.redis_queue().url().to_owned(),
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(10),
            ..QueueConfig::default()
        };
        change(&mut config);
        let queue = eventually(
            DEADLINE,
            async || Queue::connect(config.clone()).await.ok(),
            async || format!("{:?}", Queue::connect(config.clone()).await),
        )
        .await;
        Self { services, config, queue }
    }

    pub fn redis(&self) -> &Redis {
        self.services.redis_queue()
    }

    /// A connection of the test's own, for looking behind the queue.
    pub async fn raw(&self) -> redis::aio::MultiplexedConnection {
        redis::Client::open(self.config.url.as_str())
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .unwrap()
    }

    /// Calls so far of the commands whose names are chosen, those inside scripts too.
    pub async fn calls(&self, chosen: impl Fn(&str) -> bool) -> u64 {
        let mut raw = self.raw().await;
        let info: String = redis::cmd("INFO").arg("commandstats").query_async(&mut raw).await.unwrap();
        info.lines()
            .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="))
            .filter(|(name, _)| chosen(name))
            .map(|(_, rest)| rest.split(',').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Returns when all that was answered so far would survive SIGKILL: with `everysec` a write may wait while an fsync is
    /// under way.
    pub async fn written(&self) {
        let raw = self.raw().await;
        let written = async || {
            let info: String =
                redis::cmd("INFO").arg("persistence").query_async(&mut raw.clone()).await.unwrap();
            info.contains("aof_buffer_length:0\r").then_some(())
        };
        eventually(DEADLINE, written, async || "the buffer was never written".to_owned()).await;
    }

    pub async fn claim(&self, max: usize) -> Vec<Claim> {
        self.queue.claim(&name(), &worker(), max).await.unwrap()
    }
}

/// The queue that the tests use.
pub fn name() -> QueueName {
    QueueName::new("ingest").unwrap()
}

pub fn worker() -> WorkerId {
    WorkerId::new("test:1")
}

pub fn job(tenant: &str, priority: u8) -> Envelope {
    Envelope {
        priority: Priority::try_from(priority).unwrap(),
        ..Envelope::new("ingest", name(), TenantId::new(tenant).unwrap())
    }
}

pub fn jobs(count: usize) -> Vec<Envelope> {
    (0..count).map(|_| job("acme", 5)).collect()
}

pub fn ids(claims: &[Claim]) -> Vec<JobId> {
    claims.iter().map(|claim| claim.envelope.id).collect()
}

/// Runs a property over random inputs, on a private Redis with these settings; each case has a prefix of its own.
pub fn property<S: Strategy>(
    cases: u32,
    settings: impl FnOnce(&mut QueueConfig),
    input: S,
    holds: impl AsyncFn(QueueConfig, S::Value),
) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stage = runtime.block_on(Stage::with(settings));
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..ProptestConfig::default()
    });
    let number = std::cell::Cell::new(0);
    let outcome = runner.run(&input, |value| {
        number.set(number.get() + 1);
        let config = QueueConfig { prefix: format!("case{}", number.get()), ..stage.config.clone() };
        runtime.block_on(holds(config, value));
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// Waits until `check` returns something; panics with `state` after the deadline.
pub async fn eventually<T>(
    within: Duration,
    mut check: impl AsyncFnMut() -> Option<T>,
    state: impl AsyncFnOnce() -> String,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        if begun.elapsed() > within {
            let state = state().await;
            panic!("not within {within:?}: {state}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
