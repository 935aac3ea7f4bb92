//! What the tests of this crate share: private services, a client over them, and a breakable way to Postgres.
#![allow(dead_code)] // each test program uses a part

pub mod proxy;

use std::time::{Duration, Instant};

use devstack::testing::TestServices;
use producer::{Client, ClientSettings, MaintainError, MaintainSettings, NewJob, maintain, new_job};
use queue::{Claim, JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::stores::postgres::{Postgres, PostgresConfig};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest a condition may take to come true; far more than it needs on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Postgres with the schema and the tenants `acme` and `globex`, a queue Redis, and a client. Dropping it ends the servers.
pub struct Stage {
    pub services: TestServices,
    pub postgres: Postgres,
    pub queue: Queue,
    pub client: Client,
}

impl Stage {
    pub async fn new() -> Self {
        Self::with(ClientSettings::default(), |_| ()).await
    }

    pub async fn with(settings: ClientSettings, change: impl FnOnce(&mut QueueConfig)) -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let postgres = migrated(&services).await;
        let mut config = queue_config(&services);
        change(&mut config);
        let queue = Queue::lazy(config).unwrap();
        let client = Client::new(postgres.clone(), Some(queue.clone()), settings);
        Self { services, postgres, queue, client }
    }

    /// Runs relay, reconciler and gauges until the handle is stopped.
    pub fn maintain(&self, settings: MaintainSettings) -> Maintenance {
        Maintenance::start(self.postgres.clone(), self.queue.clone(), settings)
    }

    pub async fn depth(&self, queue: &str) -> u64 {
        self.queue.stats(&name(queue)).await.unwrap().depth()
    }

    pub async fn scheduled(&self, queue: &str) -> u64 {
        self.queue.stats(&name(queue)).await.unwrap().scheduled
    }

    pub async fn claim(&self, queue: &str, max: usize) -> Vec<Claim> {
        self.queue.claim(&name(queue), &WorkerId::new("test:1"), max).await.unwrap()
    }

    /// Rows of the ledger.
    pub async fn rows(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM jobs").fetch_one(self.postgres.pool()).await.unwrap()
    }

    /// A connection of the test's own, for doing harm to the queue.
    pub async fn redis(&self) -> redis::aio::MultiplexedConnection {
        redis::Client::open(self.services.redis_queue().url())
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .unwrap()
    }
}

pub async fn migrated(services: &TestServices) -> Postgres {
    let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
    postgres.migrate_up().await.unwrap();
    for tenant in ["acme", "globex"] {
        postgres.create_tenant(tenant).await.unwrap();
    }
    postgres
}

/// With deadlines far beyond what a busy machine needs: a push whose answer is given up is made again, by the relay if there
/// is one, and tests count.
pub fn queue_config(services: &TestServices) -> QueueConfig {
    QueueConfig {
        url: services.redis_queue().url().to_owned(),
        connect_timeout: Duration::from_secs(10),
        response_timeout: Duration::from_secs(10),
        ..QueueConfig::default()
    }
}

pub struct Maintenance {
    pub stop: CancellationToken,
    pub ended: JoinHandle<Result<(), MaintainError>>,
}

impl Maintenance {
    pub fn start(postgres: Postgres, queue: Queue, settings: MaintainSettings) -> Self {
        let stop = CancellationToken::new();
        Self { ended: tokio::spawn(maintain(postgres, queue, settings, stop.clone())), stop }
    }

    /// Stops the loops, which must end without an error.
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.ended).await.expect("the loops did not end").unwrap().unwrap();
    }
}

/// Loops that are quick enough for tests.
pub fn quick() -> MaintainSettings {
    MaintainSettings {
        reconcile_every: Duration::from_millis(500),
        heartbeat: Duration::from_millis(500),
        relay_every: Duration::from_millis(20),
        ..MaintainSettings::default()
    }
}

pub fn name(queue: &str) -> QueueName {
    QueueName::new(queue).unwrap()
}

pub fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

/// A job of a kind of the tests' own, in the queue `report`.
pub fn report(number: usize) -> NewJob {
    new_job("report", tenant("acme"), json!({ "number": number })).unwrap()
}

pub fn ingest(document: &str, text: &str) -> NewJob {
    new_job("ingest", tenant("acme"), json!({ "document": document, "text": text })).unwrap()
}

pub fn with_key(mut job: NewJob, key: &str) -> NewJob {
    job.idempotency =
        Some(producer::Idempotency { key: key.into(), scope: "test".into(), ttl: Duration::from_secs(60) });
    job
}

pub fn ids(jobs: &[NewJob]) -> Vec<JobId> {
    jobs.iter().map(|job| job.id).collect()
}

pub fn ids_of(claims: &[Claim]) -> Vec<JobId> {
    claims.iter().map(|claim| claim.envelope.id).collect()
}

/// Waits until `check` returns something; panics with the last state otherwise.
pub async fn eventually<T, F: Future<Output = Result<T, String>>>(mut check: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    loop {
        match check().await {
            Ok(value) => return value,
            Err(state) => assert!(begun.elapsed() < DEADLINE, "not within {DEADLINE:?}: {state}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn object(value: &Value) -> &serde_json::Map<String, Value> {
    value.as_object().unwrap()
}
