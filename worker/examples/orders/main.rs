//! A worker with a saga of one's own beside Flotilla's, in a crate of one's own: [`order`] is the saga, the
//! line with `.with(...)` registers it; [`serve`] is the process around it.
//!
//! `DATABASE_URL=… REDIS_QUEUE_URL=… REDIS_CACHE_URL=… QDRANT_URL=… SHOP_DATABASE_URL=… PAYMENTS_URL=… cargo run -p worker --example orders`
//!
//! `SHOP_DATABASE_URL` is any Postgres database with the tables that `order::TABLES` makes; `PAYMENTS_URL` a service that
//! takes `POST /charges` and `POST /refunds` with an `Idempotency-Key`. Jobs come by `flotilla enqueue order '{…}'`, and a
//! `flotilla producer` has to run, which keeps Redis in step with the ledger. SIGINT drains the worker.

mod order;
mod serve;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    serve::serve(|registry, shop, payments| registry.with(order::Order::new(shop, payments))).await
}
