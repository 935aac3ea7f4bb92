//! A thousand tenants of which one has a million waiting jobs: nobody else notices, and no claim works more for it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use queue::{Claim, Envelope, Rate, TenantId, TenantPolicy};
use support::{Stage, job, name};

/// What pushes of one tenant's jobs would leave behind, made inside Redis because a million round trips would take a
/// minute in a debug build. KEYS[1] the partition; ARGV: first number, how many, tenant, priority.
const FILL: &str = "#!lua
local part, first, many, tenant, priority = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local list, entries = part .. ':w:' .. priority .. ':' .. tenant, {}
for n = first, first + many - 1 do
  local id = string.format('00000000-0000-7000-8000-%012x', n)
  redis.call('HSET', part .. ':j', id, (n + 1) .. ' ' .. priority .. ' 1 ' .. tenant .. '\\n6:ingest0:1:10:0:')
  entries[#entries + 1] = id .. ' ' .. (n + 1) .. ' 1'
end
if redis.call('RPUSH', list, unpack(entries)) == many then redis.call('RPUSH', part .. ':r:' .. priority, tenant) end
redis.call('HINCRBY', part, 'w' .. priority, many)
redis.call('HSET', part, 'seq', first + many + 1)
return many";

async fn fill(stage: &Stage, tenant: &str, count: usize) {
    // The driver's own deadline is half a second.
    let patient = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let mut raw = redis::Client::open(stage.config.url.as_str())
        .unwrap()
        .get_multiplexed_async_connection_with_config(&patient)
        .await
        .unwrap();
    // Nobody restarts this server, and the file would be most of the work.
    let () = redis::cmd("CONFIG").arg(&["SET", "appendonly", "no"]).query_async(&mut raw).await.unwrap();
    for first in (0..count).step_by(5000) {
        let many = 5000.min(count - first);
        let filled: usize = redis::cmd("EVAL")
            .arg(FILL)
            .arg(1)
            .arg("{flotilla:ingest:0}")
            .arg(first)
            .arg(many)
            .arg(tenant)
            .arg(5)
            .query_async(&mut raw)
            .await
            .unwrap();
        assert_eq!(filled, many);
    }
}

/// Claims ten jobs and acks them; returns the commands of the claim.
async fn cost_of_ten(stage: &Stage) -> u64 {
    let before = stage.calls(|_| true).await;
    let claims = stage.claim(10).await;
    let spent = stage.calls(|_| true).await - before;
    assert_eq!(claims.len(), 10);
    let refs: Vec<_> = claims.iter().map(Claim::lease_ref).collect();
    stage.queue.ack(&refs).await.unwrap();
    spent
}

/// How many jobs of others are claimed before the next one of `tenant`.
async fn jobs_before(stage: &Stage, tenant: &str) -> usize {
    let mut before = 0;
    loop {
        let claims = stage.claim(100).await;
        assert!(!claims.is_empty(), "it never came, after {before} others");
        let place = claims.iter().position(|claim| claim.envelope.tenant.as_str() == tenant);
        let refs: Vec<_> = claims.iter().map(Claim::lease_ref).collect();
        stage.queue.ack(&refs).await.unwrap();
        match place {
            Some(place) => return before + place,
            None => before += claims.len(),
        }
    }
}

#[tokio::test]
async fn rule_21_one_tenant_with_a_million_jobs_holds_up_nobody_and_costs_no_claim_more() {
    let stage = Stage::with(|config| {
        config.window = 2_000_000;
        config.aging = std::time::Duration::from_hours(24);
    })
    .await;
    let few: Vec<Envelope> = (0..40).map(|n| job(&format!("t{}", n % 20), 5)).collect();
    stage.queue.push(&few).await.unwrap();
    let small = cost_of_ten(&stage).await;

    fill(&stage, "whale", 1_000_000).await;
    let others: Vec<Envelope> = (0..4 * 998).map(|n| job(&format!("t{}", n % 998), 5)).collect();
    stage.queue.push(&others).await.unwrap();
    let large = cost_of_ten(&stage).await;
    assert!(
        large <= small + 5,
        "a claim of 10 took {small} commands in a small queue and {large} in this one"
    );

    // One round: each of the other 999 tenants once.
    stage.queue.push(&[job("late", 5)]).await.unwrap();
    let before = jobs_before(&stage, "late").await;
    assert!(before <= 999, "{before} jobs were served before the single job of another tenant");

    // With weights the round is as long as the weights say.
    let set = async |policy: TenantPolicy, revision| {
        let whale = TenantId::new("whale").unwrap();
        stage.queue.set_tenant_policy(&name(), &whale, &policy, revision).await.unwrap();
    };
    set(TenantPolicy { weight: 50, ..TenantPolicy::default() }, 1).await;
    stage.queue.push(&[job("late", 5)]).await.unwrap();
    let before = jobs_before(&stage, "late").await;
    assert!(before <= 998 + 50, "{before} jobs were served before the single job of another tenant");

    // A limit that holds the million back costs the claims of others one look, and then nothing.
    stage
        .queue
        .push(&others.iter().map(|other| job(other.tenant.as_str(), 5)).collect::<Vec<_>>())
        .await
        .unwrap();
    let limits = [
        TenantPolicy { paused: true, ..TenantPolicy::default() },
        TenantPolicy { max_concurrency: Some(1), ..TenantPolicy::default() },
        TenantPolicy { rate: Some(Rate { per_second: 0.001, burst: 1 }), ..TenantPolicy::default() },
    ];
    for (limit, revision) in limits.into_iter().zip((2..).step_by(2)) {
        set(limit, revision).await;
        jobs_before(&stage, "t7").await;
        let mut held = Vec::new();
        // The claims of one round: the whale is met, and parked when its one job is out.
        for _ in 0..25 {
            let claims = stage.claim(40).await;
            held.extend(claims.iter().filter(|claim| claim.envelope.tenant.as_str() == "whale").cloned());
            let done: Vec<_> = claims
                .iter()
                .filter(|claim| claim.envelope.tenant.as_str() != "whale")
                .map(Claim::lease_ref)
                .collect();
            stage.queue.ack(&done).await.unwrap();
        }
        assert!(held.len() <= 1, "{limit:?} let {} jobs through", held.len());
        let limited = cost_of_ten(&stage).await;
        // Besides: the queue's policy, the clock of parked tenants, and each tenant's policy.
        assert!(
            limited <= small + 20,
            "a claim of 10 took {limited} commands under {limit:?}, {small} without"
        );
        let refs: Vec<_> = held.iter().map(Claim::lease_ref).collect();
        stage.queue.ack(&refs).await.unwrap();
        set(TenantPolicy::default(), revision + 1).await;
        let again: Vec<Envelope> = others.iter().map(|other| job(other.tenant.as_str(), 5)).collect();
        stage.queue.push(&again).await.unwrap();
    }
}
