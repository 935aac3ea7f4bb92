//! (c) How long a single job waits on an idle fleet.

use std::time::Duration;

use anyhow::ensure;

use super::{Plan, say};
use crate::{
    fleet::Fleet,
    payload::Payload,
    report::{Figure, percentiles},
    server::Server,
    sides::{Producer, Side, Spread},
};

const WORKERS: usize = 2;
/// Jobs before the samples, so that every connection stands.
pub const WARM_UP: u64 = 10;

pub async fn measure(server: &Server, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let ours = pick_ups(server, Side::Ours, plan.samples).await?;
    let peer = pick_ups(server, Side::Peer, plan.samples).await?;
    let ((p50, p99), (peer_p50, peer_p99)) = (percentiles(ours.clone()), percentiles(peer));
    Ok(vec![
        Figure::new("pickup.fast.p50", "ms", p50, "apalis-redis, polled every 25 ms", peer_p50)
            .times(ours.clone()),
        Figure::new("pickup.fast.p99", "ms", p99, "apalis-redis, polled every 25 ms", peer_p99).times(ours),
    ])
}

async fn pick_ups(server: &Server, side: Side, samples: u64) -> anyhow::Result<Vec<Duration>> {
    server.clear().await?;
    let producer = Producer::open(side, server.url(), Spread::NONE).await?;
    let mut fleet = Fleet::start(side, server.url(), None, WORKERS, 1, true).await?;
    fleet.go().await?;
    let times =
        sample(&mut fleet, samples, async |number| producer.push(vec![Payload::now(number)]).await).await?;
    let handled: u64 = fleet.stop().await?.iter().map(|one| one.handled).sum();
    ensure!(handled == WARM_UP + samples, "{handled} jobs were handled instead of {}", WARM_UP + samples);
    let (p50, p99) = percentiles(times.clone());
    say(format!("pick-up, {}: p50 {p50} ms, p99 {p99} ms", side.name()));
    Ok(times)
}

/// Enqueues single jobs on an idle fleet, by number, and returns how long each took to its handler, but for the first.
pub async fn sample(
    fleet: &mut Fleet,
    samples: u64,
    mut enqueue: impl AsyncFnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Duration>> {
    let mut times = vec![];
    for number in 0..WARM_UP + samples {
        // Uneven pauses, so that no timer of the other side runs in step.
        tokio::time::sleep(Duration::from_micros(5000 + number * 1777 % 10_000)).await;
        enqueue(number).await?;
        let (picked, after) = fleet.picked().await?;
        ensure!(picked == number, "job {picked} was picked up instead of {number}");
        times.push(after);
    }
    Ok(times.split_off(WARM_UP as usize))
}
