//! `order` in its second version: the goods are packed before they are charged for.

use std::sync::Arc;

use sagas::{Dependency, Saga, Step, StepContext, StepError, StoreError, TakenJob, async_trait};
use serde_json::Value;
use sqlx::PgPool;

use crate::order::{Basket, Order, Payments, SHOP};

/// The saga: that of the first version, with a step inserted.
pub struct PackedOrder {
    first: Order,
    steps: Vec<Arc<dyn Step<Basket>>>,
}

impl PackedOrder {
    /// Over the shop's database and the payment service.
    pub fn new(shop: PgPool, payments: Payments) -> Self {
        let first = Order::new(shop.clone(), payments);
        let mut steps = first.steps().to_vec();
        steps.insert(1, Arc::new(Pack(shop)));
        Self { first, steps }
    }
}

impl Saga for PackedOrder {
    type Data = Basket;

    fn kind(&self) -> &'static str {
        self.first.kind()
    }

    fn version(&self) -> i32 {
        self.first.version() + 1
    }

    fn steps(&self) -> &[Arc<dyn Step<Basket>>] {
        &self.steps
    }

    fn pivot(&self) -> usize {
        self.first.pivot() + 1
    }

    fn needs(&self) -> &[Dependency] {
        self.first.needs()
    }

    fn prepare(&self, job: &TakenJob) -> Result<Basket, StepError> {
        self.first.prepare(job)
    }

    fn repeatable(&self) -> bool {
        self.first.repeatable()
    }

    fn result(&self, data: &Basket) -> Value {
        self.first.result(data)
    }
}

/// Makes a parcel of the goods.
struct Pack(PgPool);

impl Pack {
    /// Writes the parcel's state, once and for all if it is unpacked: a worker that comes late packs nothing.
    async fn put(&self, ctx: &StepContext, state: &str) -> Result<(), StepError> {
        let key = ctx.idempotency_key("pack");
        ctx.call(SHOP, |_| async {
            sqlx::query(
                "INSERT INTO parcels (key, state) VALUES ($1, $2)
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state WHERE parcels.state <> 'unpacked'",
            )
            .bind(&key)
            .bind(state)
            .execute(&self.0)
            .await
            .map_err(|error| StoreError::from(error).of(SHOP))
        })
        .await?;
        Ok(())
    }
}

#[async_trait]
impl Step<Basket> for Pack {
    fn name(&self) -> &'static str {
        "pack"
    }

    async fn execute(&self, ctx: &StepContext, _: &mut Basket) -> Result<(), StepError> {
        self.put(ctx, "packed").await
    }

    async fn compensate(&self, ctx: &StepContext, _: &Basket) -> Result<(), StepError> {
        self.put(ctx, "unpacked").await
    }
}
