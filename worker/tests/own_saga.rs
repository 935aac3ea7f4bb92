//! The example `orders`: a worker process with a user's own saga over stores that Flotilla doesn't have, beside Flotilla's own.
//! The payment service and the shop's database are real servers on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::HashMap,
    path::PathBuf,
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use devstack::testing::TestServices;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use queue::{JobId, Queue, QueueConfig, QueueName, TenantId};
use sagas::stores::postgres::{Postgres, PostgresConfig, accept::NewJob, inspect::JobView};
use serde_json::{Value, json};
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};

#[allow(dead_code)]
#[path = "../examples/orders/order.rs"]
mod order;

const DEADLINE: Duration = Duration::from_secs(60);

/// A payment service that keeps its keys: a charge is made once for each, and none after its refund.
#[derive(Default)]
struct Bank {
    charges: Mutex<HashMap<String, Charge>>,
    /// Killed when its next charge is made, before it is answered.
    victim: AtomicI32,
}

#[derive(Debug, Default, Clone)]
struct Charge {
    amount: i64,
    asked: u32,
    refunded: bool,
}

async fn charge(
    State(bank): State<Arc<Bank>>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> (StatusCode, Json<Value>) {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let amount = body["amount"].as_i64().unwrap();
    if amount > 1000 {
        return (StatusCode::PAYMENT_REQUIRED, Json(json!("no cover")));
    }
    {
        let mut charges = bank.charges.lock().unwrap();
        let charge = charges.entry(key.clone()).or_default();
        charge.asked += 1;
        if charge.refunded {
            return (StatusCode::CONFLICT, Json(json!("refunded")));
        }
        charge.amount = amount;
    }
    let victim = bank.victim.swap(0, Ordering::SeqCst);
    if victim > 0 {
        kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
        std::future::pending::<()>().await;
    }
    (StatusCode::OK, Json(json!({ "id": format!("charge of {key}") })))
}

async fn refund(State(bank): State<Arc<Bank>>, headers: HeaderMap) -> (StatusCode, Json<Value>) {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    bank.charges.lock().unwrap().entry(key).or_default().refunded = true;
    (StatusCode::OK, Json(json!({})))
}

struct Shop {
    services: TestServices,
    postgres: Postgres,
    queue: Queue,
    database: PgPool,
    url: String,
    bank: Arc<Bank>,
    bank_url: String,
}

struct Worker(Child);

impl Worker {
    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have been killed already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Shop {
    async fn open() -> Self {
        let services = TestServices::start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        // A database of its own on the same server.
        postgres.pool().execute("CREATE DATABASE shop").await.unwrap();
        let (server, _) = services.postgres().url().rsplit_once('/').unwrap();
        let shop_url = format!("{server}/shop");
        let shop = PgPoolOptions::new().max_connections(2).connect(&shop_url).await.unwrap();
        let mut tables = shop.acquire().await.unwrap();
        tables.execute(order::TABLES).await.unwrap();
        tables.execute("INSERT INTO stock VALUES ('apple', 10)").await.unwrap();
        drop(tables);
        let config = QueueConfig {
            url: services.redis_queue().url().to_owned(),
            lease: Duration::from_secs(3),
            ..QueueConfig::default()
        };
        let queue = Queue::connect(config).await.unwrap();
        let bank = Arc::new(Bank::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bank_url = format!("http://{}", listener.local_addr().unwrap());
        let routes = Router::new()
            .route("/health", get(|| async {}))
            .route("/charges", post(charge))
            .route("/refunds", post(refund))
            .with_state(Arc::clone(&bank));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { services, postgres, queue, database: shop, url: shop_url, bank, bank_url }
    }

    fn worker(&self) -> Worker {
        self.worker_of("orders")
    }

    /// A worker of this example's program.
    fn worker_of(&self, example: &str) -> Worker {
        // …/deps/own_saga-… and …/examples/orders
        let here = std::env::current_exe().unwrap();
        let program: PathBuf = here.parent().unwrap().parent().unwrap().join("examples").join(example);
        assert!(program.exists(), "{} is missing: cargo build -p worker --examples", program.display());
        let child = Command::new(program)
            .envs(self.services.env())
            .env("SHOP_DATABASE_URL", &self.url)
            .env("PAYMENTS_URL", &self.bank_url)
            .env("FLOTILLA_LEASE_MS", "3000")
            .env("FLOTILLA_WORKER_ADDR", "127.0.0.1:0")
            .spawn()
            .unwrap();
        Worker(child)
    }

    async fn enqueue(&self, kind: &str, payload: Value) -> JobId {
        let name = QueueName::new(kind).unwrap();
        let mut job = NewJob::new(kind, name, TenantId::new("acme").unwrap(), payload);
        job.document = sagas::kinds::document_of(kind, &job.payload);
        self.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        let envelope = self.postgres.envelope(job.id).await.unwrap().unwrap();
        self.queue.push(&[envelope]).await.unwrap();
        job.id
    }

    async fn order(&self, quantity: i64, amount: i64) -> JobId {
        self.enqueue("order", json!({ "sku": "apple", "quantity": quantity, "amount": amount })).await
    }

    async fn ended(&self, id: JobId) -> JobView {
        let begun = Instant::now();
        loop {
            let job = self.postgres.job(id, None).await.unwrap().unwrap();
            if job.finished_at.is_some() {
                return job;
            }
            assert!(begun.elapsed() < DEADLINE, "not ended in time: {job:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn free(&self) -> i64 {
        sqlx::query_scalar("SELECT free FROM stock").fetch_one(&self.database).await.unwrap()
    }

    /// How many reservations are in each state.
    async fn reservations(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT state, count(*) FROM reservations GROUP BY state ORDER BY state")
            .fetch_all(&self.database)
            .await
            .unwrap()
    }

    /// Lets an order's worker be killed when it has charged, before it hears so.
    async fn killed_at_the_charge(&self, worker: &Worker) -> JobId {
        self.bank.victim.store(worker.pid(), Ordering::SeqCst);
        let id = self.order(3, 30).await;
        let begun = Instant::now();
        while self.bank.victim.load(Ordering::SeqCst) > 0 {
            assert!(begun.elapsed() < DEADLINE, "no charge was asked for");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        id
    }

    /// The steps that a run's deliveries have brought to their end, in order.
    async fn ran(&self, run: uuid::Uuid) -> Vec<String> {
        let steps = self.postgres.steps(run).await.unwrap();
        steps.into_iter().filter(|step| step.state == "succeeded").map(|step| step.step_name).collect()
    }

    async fn parcels(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM parcels WHERE state = 'packed'")
            .fetch_one(&self.database)
            .await
            .unwrap()
    }

    fn charges(&self) -> Vec<Charge> {
        self.bank.charges.lock().unwrap().values().cloned().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_of_ones_own_succeeds_or_undoes_what_it_did_in_stores_of_ones_own() {
    let shop = Shop::open().await;
    let _worker = shop.worker();
    let job = shop.ended(shop.order(3, 30).await).await;
    assert_eq!((job.state.as_str(), job.attempts), ("succeeded", 0), "{job:?}");
    assert!(job.result.unwrap()["charge"].as_str().unwrap().starts_with("charge of "));
    assert_eq!(shop.free().await, 7);
    assert_eq!(shop.reservations().await, [("sold".to_owned(), 1)]);

    // Declined: what was reserved is free again.
    let job = shop.ended(shop.order(2, 5000).await).await;
    assert_eq!(job.state, "dead");
    assert_eq!(shop.postgres.dead_letter(job.id).await.unwrap().unwrap().class, "declined");
    assert_eq!(shop.free().await, 7);
    assert_eq!(shop.reservations().await, [("released".to_owned(), 1), ("sold".to_owned(), 1)]);

    // Never begun: nothing to undo, and undone all the same.
    let job = shop.ended(shop.order(8, 80).await).await;
    assert_eq!(shop.postgres.dead_letter(job.id).await.unwrap().unwrap().class, "sold_out");
    assert_eq!(shop.free().await, 7);
    let made: Vec<_> = shop.charges().into_iter().filter(|charge| charge.amount > 0).collect();
    assert_eq!(made.len(), 1, "{made:?}");

    // Flotilla's own sagas run beside it.
    let job = shop.ended(shop.enqueue("ingest", json!({ "document": "a", "text": "apples" })).await).await;
    assert_eq!(job.state, "succeeded", "{job:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_of_a_step_of_ones_own_leaves_one_effect() {
    let shop = Shop::open().await;
    let first = shop.worker();
    let id = shop.killed_at_the_charge(&first).await;
    let _second = shop.worker();
    let job = shop.ended(id).await;
    assert_eq!((job.state.as_str(), job.attempts, job.deliveries), ("succeeded", 0, 2), "{job:?}");
    let charges = shop.charges();
    assert_eq!((charges.len(), charges[0].amount, charges[0].asked), (1, 30, 2), "{charges:?}");
    assert!(!charges[0].refunded);
    assert_eq!(shop.free().await, 7);
    assert_eq!(shop.reservations().await, [("sold".to_owned(), 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_after_an_effect_of_a_job_that_is_cancelled_leaves_nothing() {
    let shop = Shop::open().await;
    let first = shop.worker();
    let id = shop.killed_at_the_charge(&first).await;
    // Charged, and nobody knows it: the job is to end now, by a request to cancel it.
    shop.postgres.cancel(id, None).await.unwrap();
    let _second = shop.worker();
    let job = shop.ended(id).await;
    assert_eq!(job.state, "cancelled", "{job:?}");
    let charges = shop.charges();
    assert_eq!((charges.len(), charges[0].refunded), (1, true), "{charges:?}");
    assert_eq!(shop.free().await, 10);
    assert_eq!(shop.reservations().await, [("released".to_owned(), 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_one_program_began_is_ended_by_the_next_release_which_has_a_step_more() {
    let shop = Shop::open().await;
    let first = shop.worker_of("orders");
    let id = shop.killed_at_the_charge(&first).await;
    drop(first);
    // By number, the step that was under way is another one in the new definition: it packs.
    let second = shop.worker_of("orders_v2");
    let job = shop.ended(id).await;
    assert_eq!((job.state.as_str(), job.attempts, job.deliveries), ("succeeded", 0, 2), "{job:?}");
    let runs = shop.postgres.sagas_of(id).await.unwrap();
    assert_eq!((runs.len(), runs[0].definition_version), (1, 1), "{runs:?}");
    assert_eq!(shop.ran(runs[0].id).await, ["reserve", "charge", "sell"]);
    let charges = shop.charges();
    assert_eq!((charges.len(), charges[0].amount, charges[0].asked), (1, 30, 2), "{charges:?}");
    assert_eq!((shop.free().await, shop.parcels().await), (7, 0));

    // What begins now has the new step.
    let id = shop.order(2, 20).await;
    assert_eq!(shop.ended(id).await.state, "succeeded");
    let runs = shop.postgres.sagas_of(id).await.unwrap();
    assert_eq!((runs.len(), runs[0].definition_version), (1, 2), "{runs:?}");
    assert_eq!(shop.ran(runs[0].id).await, ["reserve", "pack", "charge", "sell"]);
    assert_eq!((shop.free().await, shop.parcels().await), (5, 1));

    // The new program dies in the middle, and only the old one is left, which doesn't know that definition: the order waits.
    let killed = shop.killed_at_the_charge(&second).await;
    drop(second);
    let old = shop.worker_of("orders");
    let begun = Instant::now();
    loop {
        let job = shop.postgres.job(killed, None).await.unwrap().unwrap();
        if job.last_error.as_ref().is_some_and(|why| why.contains("begun by v2") && why.contains("knows v1"))
        {
            assert_eq!(job.attempts, 0, "{job:?}");
            break;
        }
        assert!(job.finished_at.is_none() && begun.elapsed() < DEADLINE, "not put back: {job:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(old);
    let _new = shop.worker_of("orders_v2");
    assert_eq!(shop.ended(killed).await.state, "succeeded");
    assert_eq!((shop.free().await, shop.parcels().await), (2, 2));
}
