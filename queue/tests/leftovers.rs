//! Nothing in Redis grows for ever: of jobs that have ended, however they came to that, nothing is left.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use queue::{Envelope, Priority, QueueName};
use support::{Stage, job, name, worker};

/// Every key.
async fn keys(stage: &Stage) -> Vec<String> {
    let mut keys: Vec<String> =
        redis::cmd("KEYS").arg("*").query_async(&mut stage.raw().await).await.unwrap();
    keys.sort();
    keys
}

/// What grows with tenants or jobs has one of their names in its key, or as a field of a hash.
async fn assert_nothing_of(stage: &Stage, jobs: &[Envelope]) {
    let mut raw = stage.raw().await;
    for key in keys(stage).await {
        let names = jobs
            .iter()
            .find(|job| key.contains(&job.id.to_string()) || key.ends_with(&format!(":{}", job.tenant)));
        assert!(names.is_none(), "{key} is left of {names:?}");
        let kind: String = redis::cmd("TYPE").arg(&key).query_async(&mut raw).await.unwrap();
        match kind.as_str() {
            "hash" => {
                let fields: Vec<String> = redis::cmd("HKEYS").arg(&key).query_async(&mut raw).await.unwrap();
                assert!(
                    !fields.iter().any(|field| jobs.iter().any(|job| *field == job.tenant.to_string())),
                    "{key}: {fields:?}"
                );
            }
            // One entry for each queue, however many jobs it had.
            "zset" if key.ends_with("registry}:q") => {
                let queues: Vec<String> =
                    redis::cmd("ZRANGE").arg(&key).arg(0).arg(-1).query_async(&mut raw).await.unwrap();
                assert_eq!(queues, [name().as_str()]);
            }
            "list" | "zset" | "set" => panic!("{key}, a {kind}, is left"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn jobs_of_many_tenants_leave_nothing_behind_whatever_way_they_ended() {
    let stage = Stage::new().await;
    let jobs: Vec<Envelope> = (0..600_u32)
        .map(|number| {
            let mut one = job(&format!("tenant-{}", number % 60), (number % 10) as u8);
            one.kind = format!("kind-{}", number % 7);
            one
        })
        .collect();
    stage.queue.push(&jobs).await.unwrap();
    let named: Vec<(QueueName, queue::JobId)> = jobs.iter().map(|job| (name(), job.id)).collect();
    // Cancelled while they wait; moved to another priority; put off and cancelled then; run and failed once; crashed.
    stage.queue.forget(&named[..100]).await.unwrap();
    let moved: Vec<_> = named[100..200]
        .iter()
        .map(|(queue, id)| (queue.clone(), *id, Priority::try_from(9_u8).unwrap()))
        .collect();
    stage.queue.reprioritise(&moved).await.unwrap();
    let mut round = 0_u32;
    let mut later = stage.queue.clone();
    loop {
        let claims = later.claim(&name(), &worker(), 64).await.unwrap();
        if claims.is_empty() {
            let stats = later.stats(&name()).await.unwrap();
            if stats.depth() + stats.scheduled + stats.in_flight == 0 {
                break;
            }
            // Time goes on: what was put off is due, and leases of the crashed are over.
            round += 1;
            assert!(round < 50, "{stats:?}");
            let now: (i64, i64) = redis::cmd("TIME").query_async(&mut stage.raw().await).await.unwrap();
            later = stage.queue.at(now.0 * 1000 + i64::from(round) * 3_600_000);
            later.promote(&name()).await.unwrap();
            later.reap(&name()).await.unwrap();
            continue;
        }
        let mut acks = vec![];
        let mut back = vec![];
        for (number, claim) in claims.iter().enumerate() {
            match (number % 5, round) {
                (0, 0) => back.push((claim.lease_ref(), Duration::from_secs(60))),
                (1, 0) => back.push((claim.lease_ref(), Duration::ZERO)),
                (2, 0) => {} // its worker dies
                _ => acks.push(claim.lease_ref()),
            }
        }
        later.ack(&acks).await.unwrap();
        if round == 0 {
            later.release(&back).await.unwrap();
        }
        // A few of the scheduled ones are cancelled.
        stage.queue.forget(&named[200..220]).await.unwrap();
    }
    assert_nothing_of(&stage, &jobs).await;
    assert!(keys(&stage).await.len() <= 3, "{:?}", keys(&stage).await);
}
