//! (a) Enqueueing.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, stream};

use super::{CALLERS, Plan, fill, say};
use crate::{
    payload::Payload,
    report::{Figure, median},
    server::Server,
    sides::{BATCH, Producer, Side, Spread},
};

/// Callers at once of the one-by-one figure.
const SINGLE_CALLERS: usize = 32;
const SIDES: [Side; 3] = [Side::Ours, Side::Peer, Side::Floor];

pub async fn measure(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let (mut singles, mut batched) = (HashMap::<_, Vec<f64>>::new(), HashMap::<_, Vec<f64>>::new());
    let (mut single_times, mut batch_times) = (vec![], vec![]);
    for round in 1..=plan.rounds {
        for side in SIDES {
            server.clear().await?;
            let producer = Producer::open(side, server.url(), Spread::NONE).await?;
            let begun = Instant::now();
            let times = one_by_one(&producer, plan.singles).await?;
            let single = plan.singles as f64 / begun.elapsed().as_secs_f64();
            let cpu = server.cpu().await?;
            let begun = Instant::now();
            fill(&producer, plan.singles..plan.singles + plan.jobs).await?;
            let rate = plan.jobs as f64 / begun.elapsed().as_secs_f64();
            let redis_us = (server.cpu().await? - cpu) * 1e6 / plan.jobs as f64;
            say(format!(
                "round {round}: enqueue, {}: {single:.0}/s one by one, {rate:.0}/s in batches ({redis_us:.2} µs of Redis each)",
                side.name()
            ));
            singles.entry(side).or_default().push(single);
            batched.entry(side).or_default().push(rate);
            if side == Side::Ours {
                single_times.extend(times);
                batch_times.extend(one_batch_at_a_time(&producer, plan).await?);
            }
        }
    }
    let mut figures = vec![];
    for (what, rates, times, how) in [
        ("single", singles, single_times, format!("{SINGLE_CALLERS} callers")),
        ("batched", batched, batch_times, format!("batches of {BATCH}, {CALLERS} callers")),
    ] {
        let rate = |side| median(rates.get(&side).into_iter().flatten().copied());
        for (side, reference) in [(Side::Peer, "apalis-redis"), (Side::Floor, "floor: two minimal scripts")] {
            figures.push(
                Figure::new(
                    format!("enqueue.{what}.fast.vs-{}", side.name()),
                    "jobs/s",
                    rate(Side::Ours),
                    format!("{reference}, {how}"),
                    rate(side),
                )
                .times(times.clone()),
            );
        }
    }
    Ok(figures)
}

async fn one_by_one(producer: &Producer, jobs: u64) -> anyhow::Result<Vec<Duration>> {
    stream::iter(0..jobs)
        .map(|number| async move {
            let begun = Instant::now();
            producer.push(vec![Payload::now(number)]).await?;
            anyhow::Ok(begun.elapsed())
        })
        .buffer_unordered(SINGLE_CALLERS)
        .try_collect()
        .await
}

/// How long one call takes while no other is under way.
async fn one_batch_at_a_time(producer: &Producer, plan: Plan) -> anyhow::Result<Vec<Duration>> {
    let mut times = vec![];
    let first = plan.singles + plan.jobs;
    for number in (first..first + plan.jobs / 10).step_by(BATCH) {
        let batch = (number..number + BATCH as u64).map(Payload::now).collect();
        let begun = Instant::now();
        producer.push(batch).await?;
        times.push(begun.elapsed());
    }
    Ok(times)
}
