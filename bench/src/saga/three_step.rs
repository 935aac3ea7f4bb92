//! The workload `three-step`: a user's own saga through the public API. A row of about 1 KB of JSON in Postgres, a vector in
//! a second table, a key in Redis. The calls of sagas that run at the same time are coalesced, as Flotilla's own sagas do it.

use std::{sync::Arc, time::Duration};

use redis::aio::MultiplexedConnection;
use sagas::{
    Class, Dependency, Saga, Step, StepContext, StepError, StoreError, TakenJob, async_trait,
    coalescing::{Batch, Coalescer, Limits},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

/// The job kind, and its queue.
pub const KIND: &str = "three-step";
/// What the saga writes to; a schema of its own, as if it were another application's.
pub const TABLES: &str = "
    CREATE SCHEMA shop;
    CREATE TABLE shop.rows (id uuid PRIMARY KEY, body jsonb NOT NULL);
    CREATE TABLE shop.vectors (id uuid PRIMARY KEY, vector bytea NOT NULL);";
/// Of so many jobs one fails in its third step.
pub const FAILS_EACH: u64 = 100;
const DIMENSIONS: usize = 384;
pub const EXPIRES_S: u64 = 3600;

/// The user's Redis.
pub const KEYS: Dependency = Dependency::Other("keys");

/// What a job writes.
pub fn row(number: u64) -> Value {
    let words = ["pelican", "harbour", "lantern", "orchard", "granite", "meadow", "copper", "violet"];
    let text: Vec<&str> =
        (0..128).map(|n| words[(number.wrapping_mul(31).wrapping_add(n * 7) % 8) as usize]).collect();
    json!({ "number": number, "title": format!("row {number}"), "text": text.join(" ") })
}

/// 384 floats, as bytes.
pub fn vector(number: u64) -> Vec<u8> {
    (0..DIMENSIONS).flat_map(|n| ((number as f32 + n as f32).sin()).to_le_bytes()).collect()
}

/// Name and value of the key, about 200 bytes.
pub fn key(number: u64) -> (String, String) {
    (format!("bench:{number}"), format!("{number:0>184}"))
}

/// The user's stores.
#[derive(Clone)]
pub struct Sinks {
    pub postgres: PgPool,
    pub redis: MultiplexedConnection,
}

impl Sinks {
    pub async fn insert_rows(&self, ids: &[Uuid], bodies: &[Value]) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO shop.rows (id, body) SELECT * FROM unnest($1::uuid[], $2::jsonb[]) ON CONFLICT DO NOTHING",
        )
        .bind(ids)
        .bind(bodies)
        .execute(&self.postgres)
        .await?;
        Ok(())
    }

    pub async fn insert_vectors(&self, ids: &[Uuid], vectors: &[Vec<u8>]) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO shop.vectors (id, vector) SELECT * FROM unnest($1::uuid[], $2::bytea[]) ON CONFLICT DO NOTHING",
        )
        .bind(ids)
        .bind(vectors)
        .execute(&self.postgres)
        .await?;
        Ok(())
    }

    pub async fn set(&self, numbers: impl Iterator<Item = u64>) -> Result<(), redis::RedisError> {
        let mut pipe = redis::pipe();
        for (key, value) in numbers.map(key) {
            pipe.set_ex(key, value, EXPIRES_S).ignore();
        }
        pipe.query_async::<()>(&mut self.redis.clone()).await
    }
}

/// A job's request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Its number, from which all that it writes follows.
    pub number: u64,
}

/// What is carried from step to step. The row's id is made before the first step, so that a second delivery writes the same
/// row, and a compensation knows it after a crash.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Draft {
    number: u64,
    id: Uuid,
}

/// The saga.
pub struct ThreeStep(Vec<Arc<dyn Step<Draft>>>);

impl ThreeStep {
    /// Of the steps' calls a share `errors` fails and would succeed when tried again.
    pub fn new(sinks: &Sinks, errors: f64) -> Self {
        let limits = Limits::default;
        Self(vec![
            Arc::new(Table {
                name: "row",
                insert: Coalescer::spawn(Rows(sinks.clone()), limits()),
                delete: Coalescer::spawn(NoRows(sinks.clone()), limits()),
                errors,
            }),
            Arc::new(Table {
                name: "vector",
                insert: Coalescer::spawn(Vectors(sinks.clone()), limits()),
                delete: Coalescer::spawn(NoVectors(sinks.clone()), limits()),
                errors,
            }),
            Arc::new(Key {
                sinks: sinks.clone(),
                set: Coalescer::spawn(Keys(sinks.clone()), limits()),
                errors,
            }),
        ])
    }
}

impl Saga for ThreeStep {
    type Data = Draft;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<Draft>>] {
        &self.0
    }

    /// None: all three can be undone.
    fn pivot(&self) -> usize {
        3
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Draft, StepError> {
        let request = Request::deserialize(&job.payload)
            .map_err(|error| StepError::permanent("bad_payload", format!("payload: {error}")))?;
        Ok(Draft { number: request.number, id: job.id.0 })
    }

    fn repeatable(&self) -> bool {
        true
    }
}

/// An error that another try may not meet.
fn mishap(share: f64) -> Result<(), StepError> {
    if rand::random::<f64>() < share {
        return Err(StepError::transient("mishap", "one of the errors that the benchmark asked for"));
    }
    Ok(())
}

/// Puts one thing into a table, and takes it out again.
struct Table<I: Batch, D: Batch> {
    name: &'static str,
    insert: Coalescer<I>,
    delete: Coalescer<D>,
    errors: f64,
}

#[async_trait]
impl<I, D> Step<Draft> for Table<I, D>
where
    I: Batch<Item = (Uuid, u64), Reply = ()>,
    D: Batch<Item = Uuid, Reply = ()>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        mishap(self.errors)?;
        let item = (draft.id, draft.number);
        ctx.call(Dependency::Postgres, |deadline| self.insert.call(item, deadline)).await
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        mishap(self.errors)?;
        ctx.call(Dependency::Postgres, |deadline| self.delete.call(draft.id, deadline)).await
    }
}

struct Key {
    sinks: Sinks,
    set: Coalescer<Keys>,
    errors: f64,
}

#[async_trait]
impl Step<Draft> for Key {
    fn name(&self) -> &'static str {
        "key"
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        if draft.number % FAILS_EACH == FAILS_EACH - 1 {
            return Err(StepError::permanent(
                "refused_key",
                format!("number {} is one that fails", draft.number),
            ));
        }
        mishap(self.errors)?;
        ctx.call(KEYS, |deadline| self.set.call(draft.number, deadline)).await
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        mishap(self.errors)?;
        ctx.call(KEYS, |_| async {
            let mut redis = self.sinks.redis.clone();
            let removed = redis::cmd("DEL").arg(key(draft.number).0).query_async::<()>(&mut redis).await;
            removed.map_err(|error| StoreError::from(error).of(KEYS))
        })
        .await
    }
}

struct Rows(Sinks);

#[async_trait]
impl Batch for Rows {
    type Item = (Uuid, u64);
    type Reply = ();
    const OP: &'static str = "bench_rows";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<()>, StoreError> {
        let (ids, bodies): (Vec<Uuid>, Vec<Value>) =
            items.iter().map(|(id, number)| (*id, row(*number))).unzip();
        self.0.insert_rows(&ids, &bodies).await?;
        Ok(vec![(); items.len()])
    }
}

struct Vectors(Sinks);

#[async_trait]
impl Batch for Vectors {
    type Item = (Uuid, u64);
    type Reply = ();
    const OP: &'static str = "bench_vectors";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<()>, StoreError> {
        let (ids, vectors): (Vec<Uuid>, Vec<Vec<u8>>) =
            items.iter().map(|(id, number)| (*id, vector(*number))).unzip();
        self.0.insert_vectors(&ids, &vectors).await?;
        Ok(vec![(); items.len()])
    }
}

struct Keys(Sinks);

#[async_trait]
impl Batch for Keys {
    type Item = u64;
    type Reply = ();
    const OP: &'static str = "bench_keys";
    const DEPENDENCY: Dependency = KEYS;

    async fn flush(&self, items: &[u64]) -> Result<Vec<()>, StoreError> {
        let set = self.0.set(items.iter().copied()).await;
        set.map_err(|error| StoreError::from(error).of(KEYS))?;
        Ok(vec![(); items.len()])
    }
}

struct NoRows(Sinks);

#[async_trait]
impl Batch for NoRows {
    type Item = Uuid;
    type Reply = ();
    const OP: &'static str = "bench_no_rows";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Uuid]) -> Result<Vec<()>, StoreError> {
        sqlx::query("DELETE FROM shop.rows WHERE id = ANY($1)").bind(items).execute(&self.0.postgres).await?;
        Ok(vec![(); items.len()])
    }
}

struct NoVectors(Sinks);

#[async_trait]
impl Batch for NoVectors {
    type Item = Uuid;
    type Reply = ();
    const OP: &'static str = "bench_no_vectors";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Uuid]) -> Result<Vec<()>, StoreError> {
        sqlx::query("DELETE FROM shop.vectors WHERE id = ANY($1)")
            .bind(items)
            .execute(&self.0.postgres)
            .await?;
        Ok(vec![(); items.len()])
    }
}

/// Whether the user's Redis answers, on a connection of its own.
pub async fn keys_answer(url: String) -> Result<(), StoreError> {
    let ask = async {
        let mut redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
        redis::cmd("PING").query_async::<()>(&mut redis).await
    };
    match tokio::time::timeout(Duration::from_secs(1), ask).await {
        Ok(answer) => answer.map_err(|error| StoreError::from(error).of(KEYS)),
        Err(_) => Err(StoreError::new(KEYS, Class::Unavailable, "no answer within a second")),
    }
}
