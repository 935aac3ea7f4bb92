//! `order`: takes goods from a shop's stock and charges for them. Two stores that Flotilla doesn't have: tables in the shop's own
//! database, through plain sqlx, and a payment service over HTTP.
//!
//! Neither can check a fence, so both get the step's idempotency key, and both remember it: also that it was undone, so that
//! a worker that lost the job and comes late with its reservation or its charge is refused.

use std::{sync::Arc, time::Duration};

use reqwest::StatusCode;
use sagas::{Class, Dependency, Saga, Step, StepContext, StepError, StoreError, TakenJob, async_trait};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgPool, Postgres, Transaction};

/// The shop's database.
pub const SHOP: Dependency = Dependency::Other("shop");
/// The payment service.
pub const PAYMENTS: Dependency = Dependency::Other("payments");

/// What the shop's database needs.
#[allow(dead_code)] // the shop makes them, not this worker
pub const TABLES: &str = "
    CREATE TABLE stock (sku text PRIMARY KEY, free bigint NOT NULL CHECK (free >= 0));
    CREATE TABLE reservations (
        key      text PRIMARY KEY,
        sku      text NOT NULL REFERENCES stock (sku),
        quantity bigint NOT NULL CHECK (quantity > 0),
        state    text NOT NULL CHECK (state IN ('held', 'sold', 'released'))
    );
    -- Of the second version alone.
    CREATE TABLE parcels (
        key      text PRIMARY KEY,
        state    text NOT NULL CHECK (state IN ('packed', 'unpacked'))
    );";

/// The payload of an `order` job, and what its steps carry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Basket {
    sku: String,
    quantity: i64,
    amount: i64,
    /// The payment service's number for the charge.
    #[serde(default)]
    charge: Option<String>,
}

/// The saga.
pub struct Order(Vec<Arc<dyn Step<Basket>>>);

impl Order {
    /// Over the shop's database and the payment service.
    pub fn new(shop: PgPool, payments: Payments) -> Self {
        Self(vec![Arc::new(Reserve(shop.clone())), Arc::new(Charge(payments)), Arc::new(Sell(shop))])
    }
}

impl Saga for Order {
    type Data = Basket;

    fn kind(&self) -> &'static str {
        "order"
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<Basket>>] {
        &self.0
    }

    /// `sell`.
    fn pivot(&self) -> usize {
        2
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres, SHOP, PAYMENTS]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Basket, StepError> {
        Basket::deserialize(&job.payload)
            .map_err(|error| StepError::permanent("bad_payload", format!("payload: {error}")))
    }

    fn repeatable(&self) -> bool {
        true
    }

    fn result(&self, data: &Basket) -> Value {
        json!({ "charge": data.charge })
    }
}

/// Whether the shop's database answers, on a connection of its own.
pub async fn shop_answers(shop: PgPool) -> Result<(), StoreError> {
    use sqlx::{Connection, PgConnection};
    let ask = async {
        let mut connection = PgConnection::connect_with(&shop.connect_options()).await?;
        sqlx::query("SELECT 1").execute(&mut connection).await?;
        Ok::<_, sqlx::Error>(())
    };
    match tokio::time::timeout(Duration::from_secs(1), ask).await {
        Ok(answer) => answer.map_err(at_shop),
        Err(_) => Err(StoreError::new(SHOP, Class::Unavailable, "no answer within a second")),
    }
}

fn at_shop(error: sqlx::Error) -> StoreError {
    StoreError::from(error).of(SHOP)
}

/// Begins in a task of its own, which ends whatever becomes of the call: a `BEGIN` that was given up before its answer came would
/// stay open on its connection without sqlx knowing of it, and what the next user of the connection writes would be lost with it.
async fn begin(shop: &PgPool) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    let shop = shop.clone();
    tokio::spawn(async move { shop.begin().await }).await.map_err(|_| sqlx::Error::WorkerCrashed)?
}

/// Takes the goods from the stock.
struct Reserve(PgPool);

impl Reserve {
    const NAME: &str = "reserve";

    /// `false`: there are not enough.
    async fn hold(&self, key: &str, basket: &Basket) -> Result<bool, sqlx::Error> {
        let mut tx = begin(&self.0).await?;
        let new = sqlx::query(
            "INSERT INTO reservations (key, sku, quantity, state) VALUES ($1, $2, $3, 'held') ON CONFLICT (key) DO NOTHING",
        )
        .bind(key)
        .bind(&basket.sku)
        .bind(basket.quantity)
        .execute(&mut *tx)
        .await?;
        if new.rows_affected() == 1 {
            let taken = sqlx::query("UPDATE stock SET free = free - $2 WHERE sku = $1 AND free >= $2")
                .bind(&basket.sku)
                .bind(basket.quantity)
                .execute(&mut *tx)
                .await?;
            if taken.rows_affected() == 0 {
                return Ok(false);
            }
        }
        tx.commit().await?;
        Ok(true)
    }

    async fn release(&self, key: &str, basket: &Basket) -> Result<(), sqlx::Error> {
        let mut tx = begin(&self.0).await?;
        // Where nothing is held, the key is used up: a late `hold` finds it.
        sqlx::query(
            "INSERT INTO reservations (key, sku, quantity, state) VALUES ($1, $2, $3, 'released') ON CONFLICT (key) DO NOTHING",
        )
        .bind(key)
        .bind(&basket.sku)
        .bind(basket.quantity)
        .execute(&mut *tx)
        .await?;
        let released =
            sqlx::query("UPDATE reservations SET state = 'released' WHERE key = $1 AND state = 'held'")
                .bind(key)
                .execute(&mut *tx)
                .await?;
        if released.rows_affected() == 1 {
            sqlx::query("UPDATE stock SET free = free + $2 WHERE sku = $1")
                .bind(&basket.sku)
                .bind(basket.quantity)
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await
    }
}

#[async_trait]
impl Step<Basket> for Reserve {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn execute(&self, ctx: &StepContext, basket: &mut Basket) -> Result<(), StepError> {
        let key = ctx.idempotency_key(Self::NAME);
        let basket = &*basket;
        let held = ctx.call(SHOP, |_| async { self.hold(&key, basket).await.map_err(at_shop) }).await?;
        if held {
            Ok(())
        } else {
            Err(StepError::permanent("sold_out", format!("there are no {} {}", basket.quantity, basket.sku)))
        }
    }

    async fn compensate(&self, ctx: &StepContext, basket: &Basket) -> Result<(), StepError> {
        let key = ctx.idempotency_key(Self::NAME);
        ctx.call(SHOP, |_| async { self.release(&key, basket).await.map_err(at_shop) }).await
    }
}

/// The payment service's client.
#[derive(Clone)]
pub struct Payments {
    url: String,
    http: reqwest::Client,
}

impl Payments {
    /// At this address.
    pub fn new(url: String) -> anyhow::Result<Self> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            rustls::crypto::ring::default_provider()
                .install_default()
                .map_err(|_| anyhow::anyhow!("another TLS provider was installed meanwhile"))?;
        }
        Ok(Self { url, http: reqwest::Client::builder().tls_certs_only([]).build()? })
    }

    /// Whether it answers.
    pub async fn answers(self) -> Result<(), StoreError> {
        let ask = self.http.get(format!("{}/health", self.url)).timeout(Duration::from_secs(1)).send();
        ask.await.map(drop).map_err(|error| unavailable(&error))
    }

    async fn post(&self, path: &str, key: &str, body: &Value) -> Result<(StatusCode, Value), StoreError> {
        let answer = self
            .http
            .post(format!("{}{path}", self.url))
            .header("Idempotency-Key", key)
            .json(body)
            .send()
            .await
            .map_err(|error| unavailable(&error))?;
        let status = answer.status();
        if status.is_server_error() {
            return Err(StoreError::new(PAYMENTS, Class::Transient, format!("{path}: {status}")));
        }
        let body = answer.json().await.map_err(|error| unavailable(&error))?;
        Ok((status, body))
    }
}

fn unavailable(error: &reqwest::Error) -> StoreError {
    StoreError::new(PAYMENTS, Class::Unavailable, error.to_string())
}

/// Charges the amount.
struct Charge(Payments);

impl Charge {
    const NAME: &str = "charge";
}

#[async_trait]
impl Step<Basket> for Charge {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn execute(&self, ctx: &StepContext, basket: &mut Basket) -> Result<(), StepError> {
        let key = ctx.idempotency_key(Self::NAME);
        let body = json!({ "amount": basket.amount });
        let (status, answer) = ctx.call(PAYMENTS, |_| self.0.post("/charges", &key, &body)).await?;
        if !status.is_success() {
            return Err(StepError::permanent("declined", format!("the charge was declined: {answer}")));
        }
        basket.charge = answer["id"].as_str().map(str::to_owned);
        Ok(())
    }

    async fn compensate(&self, ctx: &StepContext, _: &Basket) -> Result<(), StepError> {
        // By the key and not by the charge's number: after a crash nobody knows the number, or whether there is one.
        let key = ctx.idempotency_key(Self::NAME);
        let body = json!({});
        let (status, answer) = ctx.call(PAYMENTS, |_| self.0.post("/refunds", &key, &body)).await?;
        if status.is_success() {
            Ok(())
        } else {
            Err(StepError::permanent("no_refund", format!("the refund was refused: {status} {answer}")))
        }
    }
}

/// Makes the reservation final.
struct Sell(PgPool);

#[async_trait]
impl Step<Basket> for Sell {
    fn name(&self) -> &'static str {
        "sell"
    }

    async fn execute(&self, ctx: &StepContext, _: &mut Basket) -> Result<(), StepError> {
        let key = ctx.idempotency_key(Reserve::NAME);
        let sold = ctx
            .call(SHOP, |_| async {
                sqlx::query(
                    "UPDATE reservations SET state = 'sold' WHERE key = $1 AND state IN ('held', 'sold')",
                )
                .bind(&key)
                .execute(&self.0)
                .await
                .map_err(at_shop)
            })
            .await?;
        if sold.rows_affected() == 1 {
            Ok(())
        } else {
            Err(StepError::permanent("not_held", "the reservation is gone"))
        }
    }

    async fn compensate(&self, _: &StepContext, _: &Basket) -> Result<(), StepError> {
        // Never called: nothing is undone from the pivot on.
        Ok(())
    }
}
