//! (e) Redis memory of a waiting job: that of the whole instance over the number of jobs, less the payload.

use super::{Plan, fill, say};
use crate::{
    payload::Payload,
    report::Figure,
    server::Server,
    sides::{Producer, Side, Spread},
};

pub async fn measure(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let deep = Spread { tenants: plan.tenants, priorities: 10 };
    let peer = overhead(server, Side::Peer, plan.jobs, Spread::NONE).await?;
    let mut figures = vec![];
    for (name, jobs, spread) in [("flat", plan.jobs, Spread::NONE), ("deep", plan.deep, deep)] {
        let value = overhead(server, Side::Ours, jobs, spread).await?;
        figures.push(Figure::new(format!("memory.{name}"), "bytes/job", value, "apalis-redis", peer));
    }
    Ok(figures)
}

async fn overhead(server: &Server, side: Side, jobs: u64, spread: Spread) -> anyhow::Result<f64> {
    server.clear().await?;
    let producer = Producer::open(side, server.url(), spread).await?;
    fill(&producer, 0..jobs).await?;
    let payload = Payload::now(jobs / 2).size() as f64;
    let whole = server.memory().await? / jobs as f64;
    say(format!(
        "memory of {jobs} waiting jobs, {}: {whole:.0} bytes each, of which {payload} payload",
        side.name()
    ));
    Ok(whole - payload)
}
