//! Order and fairness: priorities, tenants, ageing, schedule, window.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{collections::HashMap, time::Duration};

use queue::{Envelope, Priority, Pushed, TenantId, TraceContext};
use support::{Stage, ids, job, jobs, name};

/// A round time for tests that set the clock.
const NOW: i64 = 1_800_000_000_000;

#[tokio::test]
async fn a_job_comes_back_as_it_was_pushed() {
    let stage = Stage::new().await;
    let plain = job("acme", 3);
    let full = Envelope {
        run_at_ms: Some(1_700_000_000_123),
        trace: Some(TraceContext {
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
            tracestate: Some("vendor=1".to_owned()),
        }),
        fast: Some(serde_json::json!({"text": "Grüße \"quoted\"", "n": [1, 2, 3]})),
        ..job("acme", 3)
    };
    let pushed = stage.queue.push(&[plain.clone(), full.clone()]).await.unwrap();
    assert_eq!(pushed, [Pushed::Queued, Pushed::Queued]);
    let claims = stage.claim(10).await;
    assert_eq!(*claims[0].envelope, plain);
    assert_eq!(*claims[1].envelope, full);
}

#[tokio::test]
async fn higher_priorities_are_served_first_and_one_priority_in_order() {
    let stage = Stage::new().await;
    let mut pushed: Vec<Envelope> =
        [5, 0, 9, 3, 9, 5, 0].into_iter().map(|level| job("acme", level)).collect();
    stage.queue.push(&pushed).await.unwrap();
    let mut claims = stage.claim(4).await;
    claims.extend(stage.claim(10).await);
    pushed.sort_by_key(|envelope| std::cmp::Reverse(envelope.priority)); // stable
    assert_eq!(ids(&claims), pushed.iter().map(|envelope| envelope.id).collect::<Vec<_>>());
}

#[tokio::test]
async fn rule_7_tenants_of_one_priority_take_turns() {
    let stage = Stage::new().await;
    let mut all: Vec<Envelope> = (0..100).map(|_| job("loud", 5)).collect();
    all.extend((0..3).map(|_| job("small", 5)));
    all.extend((0..2).map(|_| job("tiny", 5)));
    stage.queue.push(&all).await.unwrap();
    let mut order = String::new();
    for size in [1, 4, 2, 5] {
        for claim in stage.claim(size).await {
            order.push(claim.envelope.tenant.as_str().chars().next().unwrap());
        }
    }
    assert_eq!(order, "lstlstlsllll");
}

#[tokio::test]
async fn rule_7_the_ring_survives_more_tenants_than_one_claim_reaches() {
    let stage = Stage::new().await;
    let all: Vec<Envelope> =
        (0..2).flat_map(|_| (0..40).map(|tenant| job(&format!("t{tenant}"), 5))).collect();
    stage.queue.push(&all).await.unwrap();
    let mut order = Vec::new();
    while order.len() < 80 {
        let claims = stage.claim(7).await;
        assert!(!claims.is_empty(), "claimed only {} of 80", order.len());
        order.extend(claims.iter().map(|claim| claim.envelope.tenant.to_string()));
    }
    let expected: Vec<String> = (0..2).flat_map(|_| (0..40).map(|tenant| format!("t{tenant}"))).collect();
    assert_eq!(order, expected);
    assert!(stage.claim(7).await.is_empty());
}

/// Nine priorities without a job would cost an idle fleet nine commands for each job that comes.
#[tokio::test]
async fn a_claim_reads_the_rings_of_those_priorities_alone_that_have_jobs() {
    let stage = Stage::new().await;
    let reads = || stage.calls(|name| name == "lrange");
    let [low, high] = [job("acme", 2), job("acme", 5)];
    stage.queue.push(&[low.clone(), high.clone()]).await.unwrap();
    let before = reads().await;
    assert_eq!(ids(&stage.claim(10).await), [high.id, low.id]);
    assert_eq!(reads().await - before, 2);

    // An entry that a change of priority left behind keeps its tenant in the old ring until a claim drops it there.
    let moved = job("acme", 7);
    stage.queue.push(std::slice::from_ref(&moved)).await.unwrap();
    stage.queue.reprioritise(&[(name(), moved.id, Priority::LOWEST)]).await.unwrap();
    let before = reads().await;
    assert_eq!(ids(&stage.claim(10).await), [moved.id]);
    assert!(reads().await - before > 1, "the stale entry was left where it is");
    assert!(stage.claim(10).await.is_empty());
}

#[tokio::test]
async fn rule_7_the_work_of_a_claim_does_not_grow_with_tenants_or_backlog() {
    let stage = Stage::new().await;
    let commands_per_claim = async || {
        let before = stage.calls(|_| true).await;
        let claims = stage.claim(10).await;
        assert_eq!(claims.len(), 10);
        let refs: Vec<_> = claims.iter().map(queue::Claim::lease_ref).collect();
        let spent = stage.calls(|_| true).await - before;
        stage.queue.ack(&refs).await.unwrap();
        spent
    };
    let few: Vec<Envelope> = (0..20).map(|n| job(&format!("t{n}"), 5)).collect();
    stage.queue.push(&few).await.unwrap();
    let small = commands_per_claim().await;
    let many: Vec<Envelope> = (0..20_000).map(|n| job(&format!("t{}", n % 2000), 5)).collect();
    stage.queue.push(&many).await.unwrap();
    let large = commands_per_claim().await;
    assert!(
        large <= small + 10,
        "a claim of 10 took {small} commands in a small queue and {large} in a large one"
    );
}

#[tokio::test]
async fn rule_7_an_old_low_priority_job_gets_one_of_four_claims() {
    let stage = Stage::with(|config| config.aging = Duration::from_mins(1)).await;
    let early = stage.queue.at(NOW);
    early.push(&(0..10).map(|_| job("acme", 0)).collect::<Vec<_>>()).await.unwrap();
    early.push(&(0..10).map(|_| job("acme", 2)).collect::<Vec<_>>()).await.unwrap();
    let mut later = stage.queue.at(NOW + 59_000);
    later.push(&(0..100).map(|_| job("acme", 9)).collect::<Vec<_>>()).await.unwrap();
    let claims = later.claim(&name(), &support::worker(), 20).await.unwrap();
    assert!(claims.iter().all(|claim| claim.envelope.priority.get() == 9), "nothing is old yet");

    later = stage.queue.at(NOW + 61_000);
    let mut counts = HashMap::new();
    for _ in 0..4 {
        for claim in later.claim(&name(), &support::worker(), 10).await.unwrap() {
            *counts.entry(claim.envelope.priority.get()).or_insert(0) += 1;
        }
    }
    let low = |counts: &HashMap<u8, i32>| {
        counts.get(&0).copied().unwrap_or(0) + counts.get(&2).copied().unwrap_or(0)
    };
    assert_eq!((counts[&9], low(&counts)), (30, 10));
    for claim in later.claim(&name(), &support::worker(), 40).await.unwrap() {
        *counts.entry(claim.envelope.priority.get()).or_insert(0) += 1;
    }
    assert_eq!(counts, HashMap::from([(9, 60), (2, 10), (0, 10)]));
}

#[tokio::test]
async fn rule_7_the_lowest_priority_does_not_wait_for_all_that_is_older_in_those_between() {
    let stage = Stage::with(|config| config.aging = Duration::from_mins(1)).await;
    let early = stage.queue.at(NOW);
    for priority in 1..9 {
        early.push(&(0..100).map(|_| job("acme", priority)).collect::<Vec<_>>()).await.unwrap();
    }
    stage.queue.at(NOW + 1).push(&[job("acme", 0)]).await.unwrap();
    let later = stage.queue.at(NOW + 61_000);
    later.push(&(0..100).map(|_| job("acme", 9)).collect::<Vec<_>>()).await.unwrap();
    let claims = later.claim(&name(), &support::worker(), 72).await.unwrap();
    let counted =
        |priority: u8| claims.iter().filter(|claim| claim.envelope.priority.get() == priority).count();
    assert_eq!((counted(9), counted(0)), (54, 1));
    assert!((1..9).all(|priority| counted(priority) > 0));
}

#[tokio::test]
async fn a_push_is_idempotent_by_job_id_in_every_state() {
    let stage = Stage::new().await;
    let queue = stage.queue.at(NOW);
    let waiting = job("acme", 5);
    let later = Envelope { run_at_ms: Some(NOW + 60_000), ..job("acme", 5) };
    let both = [waiting.clone(), later.clone()];
    assert_eq!(queue.push(&both).await.unwrap(), [Pushed::Queued, Pushed::Queued]);
    assert_eq!(queue.push(&both).await.unwrap(), [Pushed::Present, Pushed::Present]);
    let changed = Envelope { priority: Priority::HIGHEST, ..waiting.clone() };
    assert_eq!(queue.push(&[changed]).await.unwrap(), [Pushed::Present]);
    let claims = queue.claim(&name(), &support::worker(), 10).await.unwrap();
    assert_eq!(ids(&claims), [waiting.id]);
    assert_eq!(claims[0].envelope.priority, Priority::default());
    assert_eq!(queue.push(&both).await.unwrap(), [Pushed::Present, Pushed::Present]);
    assert!(queue.claim(&name(), &support::worker(), 10).await.unwrap().is_empty());
    assert_eq!(queue.ack(&[claims[0].lease_ref()]).await.unwrap(), [true]);
    assert_eq!(queue.push(&both).await.unwrap(), [Pushed::Queued, Pushed::Present]);
}

#[tokio::test]
async fn a_scheduled_job_waits_for_its_time() {
    let stage = Stage::new().await;
    let queue = stage.queue.at(NOW);
    let later: Vec<Envelope> =
        [30, 10, 20].map(|s| Envelope { run_at_ms: Some(NOW + s * 1000), ..job("acme", 5) }).to_vec();
    queue.push(&later).await.unwrap();
    assert_eq!(queue.promote(&name()).await.unwrap(), 0);
    assert_eq!(queue.stats(&name()).await.unwrap().scheduled, 3);
    assert_eq!(queue.tenant_depth(&name(), &TenantId::new("acme").unwrap()).await.unwrap(), 3);

    let queue = stage.queue.at(NOW + 20_000);
    assert_eq!(queue.promote(&name()).await.unwrap(), 2);
    let stats = queue.stats(&name()).await.unwrap();
    assert_eq!((stats.scheduled, stats.depth()), (1, 2));
    assert_eq!(stats.by_priority[5].oldest_ms, Some(10_000), "it waits since it was due");
    let claims = queue.claim(&name(), &support::worker(), 10).await.unwrap();
    assert_eq!(ids(&claims), [later[1].id, later[2].id]);
}

#[tokio::test]
async fn many_due_jobs_are_promoted_in_bounded_steps() {
    let stage = Stage::new().await;
    let later: Vec<Envelope> =
        (0..3210).map(|_| Envelope { run_at_ms: Some(NOW + 5), ..job("acme", 5) }).collect();
    stage.queue.at(NOW).push(&later).await.unwrap();
    assert_eq!(stage.queue.at(NOW + 6).promote(&name()).await.unwrap(), 3210);
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 3210);
}

#[tokio::test]
async fn rule_25_the_window_bounds_what_waits_in_redis() {
    let stage = Stage::with(|config| config.window = 3).await;
    let pushed = stage.queue.push(&jobs(5)).await.unwrap();
    assert_eq!(pushed, [Pushed::Queued, Pushed::Queued, Pushed::Queued, Pushed::Full, Pushed::Full]);
    let scheduled: Vec<Envelope> =
        jobs(4).into_iter().map(|job| Envelope { run_at_ms: Some(i64::MAX / 4096), ..job }).collect();
    let pushed = stage.queue.push(&scheduled).await.unwrap();
    assert_eq!(pushed, [Pushed::Queued, Pushed::Queued, Pushed::Queued, Pushed::Full]);
    let claims = stage.claim(1).await;
    assert_eq!(claims.len(), 1);
    assert_eq!(stage.queue.push(&jobs(2)).await.unwrap(), [Pushed::Queued, Pushed::Full]);
    // What comes back is never refused.
    assert_eq!(stage.queue.release(&[(claims[0].lease_ref(), Duration::ZERO)]).await.unwrap(), [true]);
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 4);
}

#[tokio::test]
async fn partitions_share_a_queue_and_a_claim_rotates_over_them() {
    let stage = Stage::with(|config| config.partitions = 4).await;
    let all = jobs(400);
    stage.queue.push(&all).await.unwrap();
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 400);
    let mut partitions = std::collections::HashSet::new();
    for _ in 0..4 {
        partitions.extend(stage.claim(5).await.iter().map(|claim| claim.partition));
    }
    assert_eq!(partitions.len(), 4, "four claims reached the partitions {partitions:?}");
    let rest = stage.claim(1000).await;
    assert_eq!(rest.len(), 380);
    let refs: Vec<_> = rest.iter().map(queue::Claim::lease_ref).collect();
    assert!(stage.queue.ack(&refs).await.unwrap().into_iter().all(|acked| acked));
    assert_eq!(stage.queue.leases(&name()).await.unwrap().len(), 20);
    let known: Vec<_> = all.iter().map(|envelope| (name(), envelope.id)).collect();
    assert_eq!(stage.queue.missing(&known).await.unwrap().len(), 380);
}
