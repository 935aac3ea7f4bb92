//! The next release of the example `orders`: its saga has one more step, [`pack`], in the middle. Orders that the first release
//! has begun are brought to their end by the definition that began them, which is registered, too; others begin with the new
//! one. Once no order of the first version is open, its line can go.
//!
//! Started like `orders`, with `--example orders_v2`; both may run at once.

#[path = "../orders/order.rs"]
mod order;
mod pack;
#[path = "../orders/serve.rs"]
mod serve;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    serve::serve(|registry, shop, payments| {
        registry
            .with(order::Order::new(shop.clone(), payments.clone()))
            .with(pack::PackedOrder::new(shop, payments))
    })
    .await
}
