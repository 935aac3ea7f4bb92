//! PROTOCOL.md 21: a limit over several partitions is lent to them; the sum of what they may use never exceeds it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use proptest::prelude::*;
use queue::{Claim, Envelope, Lender, PolicySet, Queue, QueueConfig, QueuePolicy, TenantId, TenantPolicy};
use support::{Stage, eventually, job, jobs, name, property, worker};
use tokio_util::sync::CancellationToken;

const PARTITIONS: u16 = 4;

fn limit(limit: u32) -> QueuePolicy {
    QueuePolicy { max_concurrency: Some(limit), ..QueuePolicy::default() }
}

fn partitioned(config: &mut QueueConfig) {
    config.partitions = PARTITIONS;
}

async fn stage() -> Stage {
    Stage::with(partitioned).await
}

async fn ack(queue: &Queue, claims: &[Claim]) {
    let refs: Vec<_> = claims.iter().map(Claim::lease_ref).collect();
    queue.ack(&refs).await.unwrap();
}

/// What each partition may use, and what the record says it may.
async fn grants(queue: &Queue, raw: &mut redis::aio::MultiplexedConnection) -> (Vec<i64>, Vec<i64>) {
    let prefix = &queue.config().prefix;
    let (mut has, mut lent) = (Vec::new(), Vec::new());
    for partition in 0..PARTITIONS {
        let grant: Option<i64> = redis::cmd("HGET")
            .arg(format!("{{{prefix}:ingest:{partition}}}:p"))
            .arg("conc")
            .query_async(raw)
            .await
            .unwrap();
        has.push(grant.unwrap_or(0));
        let record: Option<i64> = redis::cmd("HGET")
            .arg(format!("{{{prefix}:ingest:lend}}"))
            .arg(format!("g{partition}"))
            .query_async(raw)
            .await
            .unwrap();
        lent.push(record.unwrap_or(0));
    }
    (has, lent)
}

#[tokio::test]
async fn rule_21_a_queues_concurrency_holds_over_all_partitions_and_all_of_it_is_used() {
    let stage = stage().await;
    stage.queue.set_policy(&name(), &limit(10), 1).await.unwrap();
    stage.queue.push(&jobs(200)).await.unwrap();
    let (mut held, mut done) = (Vec::new(), 0);
    for _ in 0..200 {
        held.extend(stage.claim(50).await);
        assert!(held.len() <= 10, "{} jobs are leased", held.len());
        stage.queue.lend(&name()).await.unwrap();
        held.extend(stage.claim(50).await);
        assert!(held.len() <= 10, "{} jobs are leased", held.len());
        if held.len() == 10 {
            done += 5;
            let ended: Vec<Claim> = held.drain(..5).collect();
            ack(&stage.queue, &ended).await;
        }
        if done >= 150 {
            return;
        }
    }
    panic!("only {done} of 150 jobs were done: the limit is not used");
}

#[tokio::test]
async fn rule_21_a_limit_below_the_number_of_partitions_goes_round() {
    let stage = stage().await;
    stage.queue.set_policy(&name(), &limit(1), 1).await.unwrap();
    stage.queue.push(&jobs(60)).await.unwrap();
    let mut by_partition: HashMap<u16, u32> = HashMap::new();
    for _ in 0..400 {
        let mut claims = stage.claim(10).await;
        // Lent while the job runs, so that nothing is spare.
        stage.queue.lend(&name()).await.unwrap();
        claims.extend(stage.claim(10).await);
        assert!(claims.len() <= 1, "{} jobs are leased", claims.len());
        for claim in &claims {
            *by_partition.entry(claim.partition).or_default() += 1;
        }
        ack(&stage.queue, &claims).await;
    }
    assert_eq!(by_partition.values().sum::<u32>(), 60, "every partition's jobs are done: {by_partition:?}");
}

#[tokio::test]
async fn rule_21_a_partition_that_has_nothing_calls_a_grant_back_from_a_busy_one() {
    let stage = Stage::with(|config| config.partitions = 2).await;
    stage.queue.set_policy(&name(), &limit(1), 1).await.unwrap();
    stage.queue.push(&jobs(60)).await.unwrap();
    let mut served = Vec::new();
    for _ in 0..20 {
        let mut claims = stage.claim(10).await;
        stage.queue.lend(&name()).await.unwrap();
        claims.extend(stage.claim(10).await);
        assert!(claims.len() <= 1, "{} jobs are leased", claims.len());
        served.extend(claims.iter().map(|claim| claim.partition));
        ack(&stage.queue, &claims).await;
    }
    // Once before it is called back, and once more while it is.
    let again = served.windows(3).any(|three| three[0] == three[1] && three[1] == three[2]);
    assert!(!again, "the grant came back to who had given it: {served:?}");
    served.truncate(6);
    assert!(served.contains(&0) && served.contains(&1), "one partition has the only grant: {served:?}");
}

#[tokio::test]
async fn rule_21_a_grant_that_was_called_back_for_nothing_stops_no_partition() {
    let stage = Stage::with(|config| config.partitions = 2).await;
    stage.queue.set_policy(&name(), &limit(2), 1).await.unwrap();
    stage.queue.push(&jobs(40)).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    let running = stage.claim(10).await;
    assert_eq!(running.iter().map(|claim| claim.partition).collect::<HashSet<_>>().len(), 2);
    // One grant is called back for the lower limit, which is gone before the job ends.
    stage.queue.set_policy(&name(), &limit(1), 2).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    stage.queue.set_policy(&name(), &limit(2), 3).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    ack(&stage.queue, &running).await;
    let mut done = running.len();
    for _ in 0..100 {
        stage.queue.lend(&name()).await.unwrap();
        let claims = stage.claim(10).await;
        assert!(claims.len() <= 2, "{} jobs are leased", claims.len());
        done += claims.len();
        ack(&stage.queue, &claims).await;
    }
    assert_eq!(done, 40, "a partition stands still");
}

#[tokio::test]
async fn rule_21_a_tenants_concurrency_holds_over_all_partitions() {
    let stage = stage().await;
    let policy = TenantPolicy { max_concurrency: Some(3), ..TenantPolicy::default() };
    let few = TenantId::new("few").unwrap();
    stage.queue.set_tenant_policy(&name(), &few, &policy, 1).await.unwrap();
    let mut all: Vec<Envelope> = (0..40).map(|_| job("few", 5)).collect();
    all.extend((0..40).map(|_| job("other", 1)));
    stage.queue.push(&all).await.unwrap();
    let (mut running, mut done, mut others) = (Vec::new(), 0, 0);
    for _ in 0..200 {
        stage.queue.lend(&name()).await.unwrap();
        let (mine, theirs): (Vec<Claim>, Vec<Claim>) =
            stage.claim(20).await.into_iter().partition(|claim| claim.envelope.tenant == few);
        others += theirs.len();
        ack(&stage.queue, &theirs).await;
        running.extend(mine);
        assert!(running.len() <= 3, "{} jobs of the tenant are leased", running.len());
        if !running.is_empty() {
            ack(&stage.queue, &running[..1]).await;
            running.remove(0);
            done += 1;
        }
        if done == 40 {
            assert_eq!(others, 40);
            return;
        }
    }
    panic!("only {done} of the tenant's 40 jobs were done");
}

#[tokio::test]
async fn rule_21_every_tenant_is_lent_to_in_turn_however_many_wait() {
    const TENANTS: usize = 150;
    const EACH: usize = 12;
    let stage = stage().await;
    let one = TenantPolicy { max_concurrency: Some(1), ..TenantPolicy::default() };
    let whose: Vec<String> = (0..TENANTS).map(|number| format!("t{number:03}")).collect();
    let tenants = whose.iter().map(|tenant| (TenantId::new(tenant).unwrap(), one, 1)).collect();
    let set = PolicySet { queue: name(), policy: (QueuePolicy::default(), 1), tenants };
    stage.queue.sync_policies(&set).await.unwrap();
    let all: Vec<Envelope> = (0..EACH).flat_map(|_| whose.iter().map(|tenant| job(tenant, 5))).collect();
    stage.queue.push(&all).await.unwrap();
    assert!(stage.claim(200).await.is_empty(), "nothing is lent yet");
    let mut served: HashMap<TenantId, usize> = HashMap::new();
    for _ in 0..8 {
        stage.queue.lend(&name()).await.unwrap();
        let claims = stage.claim(200).await;
        for claim in &claims {
            *served.entry(claim.envelope.tenant.clone()).or_default() += 1;
        }
        ack(&stage.queue, &claims).await;
    }
    assert!(
        served.values().all(|jobs| *jobs < EACH),
        "some are done, so that this proves nothing: {served:?}"
    );
    assert_eq!(served.len(), TENANTS, "the others wait until the first have no jobs left");
}

#[tokio::test]
async fn rule_21_jobs_that_ran_before_the_limit_count_towards_it() {
    let stage = Stage::with(|config| config.partitions = 2).await;
    stage.queue.push(&jobs(60)).await.unwrap();
    let (mut running, others): (Vec<Claim>, Vec<Claim>) =
        stage.claim(60).await.into_iter().partition(|claim| claim.partition == 0);
    let others: Vec<_> = others.iter().map(|claim| (claim.lease_ref(), Duration::ZERO)).collect();
    stage.queue.release(&others).await.unwrap();
    let ended = running.split_off(6);
    ack(&stage.queue, &ended).await;
    stage.queue.set_policy(&name(), &limit(4), 1).await.unwrap();
    while running.len() >= 4 {
        for _ in 0..5 {
            stage.queue.lend(&name()).await.unwrap();
            assert!(stage.claim(10).await.is_empty(), "{} jobs run already", running.len());
        }
        ack(&stage.queue, &[running.pop().unwrap()]).await;
    }
    let mut started = Vec::new();
    for _ in 0..5 {
        stage.queue.lend(&name()).await.unwrap();
        started.extend(stage.claim(10).await);
    }
    assert_eq!(started.len(), 1, "3 of 4 were running");
}

/// The same queue when it is split into another number of partitions.
async fn split(stage: &Stage, partitions: u16) -> Queue {
    Queue::connect(QueueConfig { partitions, ..stage.config.clone() }).await.unwrap()
}

/// Lends and claims until nothing more comes, and returns how much runs then.
async fn started(queue: &Queue) -> usize {
    let mut running = 0;
    for _ in 0..8 {
        running += queue.claim(&name(), &worker(), 50).await.unwrap().len();
        queue.lend(&name()).await.unwrap();
    }
    running
}

#[tokio::test]
async fn rule_21_after_fewer_partitions_the_whole_limit_is_used() {
    let stage = Stage::with(|config| config.partitions = 8).await;
    stage.queue.set_policy(&name(), &limit(8), 1).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    // The policy is stored again when the processes start, in the same revision.
    let four = split(&stage, 4).await;
    four.set_policy(&name(), &limit(8), 1).await.unwrap();
    four.push(&jobs(100)).await.unwrap();
    assert_eq!(started(&four).await, 8);
}

#[tokio::test]
async fn rule_21_one_partition_needs_no_grant() {
    let stage = stage().await;
    let (few, policy) = (TenantId::new("few").unwrap(), TenantPolicy::default());
    let policy = TenantPolicy { max_concurrency: Some(1), ..policy };
    for queue in [&stage.queue, &split(&stage, 1).await] {
        queue.set_policy(&name(), &limit(3), 1).await.unwrap();
        queue.set_tenant_policy(&name(), &few, &policy, 1).await.unwrap();
    }
    let one = split(&stage, 1).await;
    let mut all = jobs(5);
    all.extend((0..3).map(|_| job("few", 9)));
    one.push(&all).await.unwrap();
    let claims = one.claim(&name(), &worker(), 10).await.unwrap();
    assert_eq!(claims.len(), 3);
    assert_eq!(claims.iter().filter(|claim| claim.envelope.tenant == few).count(), 1);
}

#[tokio::test]
async fn rule_21_more_partitions_than_before_share_one_limit() {
    let stage = stage().await;
    for fewer in [1, 2] {
        let tenant = TenantId::new(format!("t{fewer}")).unwrap();
        let before = split(&stage, fewer).await;
        before.set_policy(&name(), &limit(8), 1).await.unwrap();
        before.lend(&name()).await.unwrap();
        stage.queue.set_policy(&name(), &limit(8), 1).await.unwrap();
        stage.queue.push(&(0..100).map(|_| job(tenant.as_str(), 5)).collect::<Vec<_>>()).await.unwrap();
        // Before anything is lent, too: a partition may still have what it had among other partitions.
        assert_eq!(started(&stage.queue).await, 8);
        let leases = stage.queue.leases(&name()).await.unwrap();
        assert_eq!(leases.len(), 8);
        let () = redis::cmd("FLUSHALL").query_async(&mut stage.raw().await).await.unwrap();
        // Four, then two, then four again.
        stage.queue.set_policy(&name(), &limit(8), 1).await.unwrap();
        stage.queue.lend(&name()).await.unwrap();
    }
}

#[tokio::test]
async fn rule_21_a_lost_record_is_made_again_and_what_was_on_its_way_is_refused() {
    let stage = stage().await;
    let mut raw = stage.raw().await;
    stage.queue.set_policy(&name(), &limit(8), 1).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    assert_eq!(grants(&stage.queue, &mut raw).await, (vec![2; 4], vec![2; 4]));
    let () = redis::cmd("DEL").arg("{flotilla:ingest:lend}").query_async(&mut raw).await.unwrap();
    stage.queue.lend(&name()).await.unwrap();
    let (has, lent) = grants(&stage.queue, &mut raw).await;
    assert_eq!((has.iter().sum::<i64>(), &has), (8, &lent));
}

#[tokio::test]
async fn rule_21_the_role_serves_workers_and_ends_on_shutdown() {
    let stage = stage().await;
    let stop = CancellationToken::new();
    let lender = Lender::spawn(stage.queue.clone(), vec![name()], stop.clone());
    stage.queue.set_policy(&name(), &limit(6), 1).await.unwrap();
    stage.queue.push(&jobs(100)).await.unwrap();
    let mut held = Vec::new();
    eventually(
        Duration::from_secs(10),
        async || {
            held.extend(stage.claim(50).await);
            assert!(held.len() <= 6, "{} jobs are leased", held.len());
            (held.len() == 6).then_some(())
        },
        async || "the whole limit was never lent".to_owned(),
    )
    .await;
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(5), lender).await.unwrap().unwrap();
}

#[tokio::test]
async fn rule_22_a_full_redis_is_lent_in() {
    let options = devstack::RedisOptions { max_memory_mb: 4, ..devstack::RedisOptions::queue() };
    let stage = Stage::on(options, partitioned).await;
    stage.queue.set_policy(&name(), &limit(6), 1).await.unwrap();
    let fat = || Envelope { fast: Some("x".repeat(1000).into()), ..job("acme", 5) };
    let full = async || {
        let pushed = stage.queue.push(&(0..100).map(|_| fat()).collect::<Vec<_>>()).await;
        matches!(pushed, Err(queue::QueueError::Full)).then_some(())
    };
    eventually(Duration::from_secs(30), full, async || "Redis never became full".to_owned()).await;
    let stop = CancellationToken::new();
    let lender = Lender::spawn(stage.queue.clone(), vec![name()], stop.clone());
    let mut held = Vec::new();
    let lent = async || {
        held.extend(stage.claim(50).await);
        (held.len() == 6).then_some(())
    };
    eventually(Duration::from_secs(30), lent, async || "the whole limit was never lent".to_owned()).await;
    stop.cancel();
    lender.await.unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Limit(Option<u32>),
    Push(u8),
    Claim(u8),
    Ack(u8),
    Lend,
    /// Two lenders at once.
    LendTwice,
    /// The record is lost.
    Forget,
    /// A partition is lost with everything in it.
    Lose(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => proptest::option::weighted(0.9, 1..12_u32).prop_map(Step::Limit),
        3 => (1..30_u8).prop_map(Step::Push),
        5 => (1..12_u8).prop_map(Step::Claim),
        5 => (1..6_u8).prop_map(Step::Ack),
        5 => Just(Step::Lend),
        2 => Just(Step::LendTwice),
        1 => Just(Step::Forget),
        1 => (0..PARTITIONS).prop_map(Step::Lose),
    ]
}

async fn run(config: QueueConfig, steps: Vec<Step>) {
    let queue = Queue::connect(config.clone()).await.unwrap();
    let mut raw =
        redis::Client::open(config.url.as_str()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut held: Vec<Claim> = Vec::new();
    let (mut now, mut revision) = (None, 0);
    // The highest limit since the sum was last seen within the present one: a lower limit takes rounds to come into force.
    let mut allowed: i64 = i64::MAX;
    // The same with what runs: jobs of before a limit may be more than their partition's grant.
    let mut runs: i64 = i64::MAX;
    for step in steps {
        match step {
            Step::Limit(to) => {
                revision += 1;
                now = to.map(i64::from);
                allowed = allowed.max(now.unwrap_or(i64::MAX));
                runs = runs.max(allowed);
                let policy = to.map(limit).unwrap_or_default();
                queue.set_policy(&name(), &policy, revision).await.unwrap();
            }
            Step::Push(count) => drop(queue.push(&jobs(usize::from(count))).await.unwrap()),
            Step::Claim(max) => {
                let claims = queue.claim(&name(), &worker(), usize::from(max)).await.unwrap();
                let started = !claims.is_empty();
                held.extend(claims);
                assert!(!started || held.len() as i64 <= runs, "{} jobs run of {runs}", held.len());
            }
            Step::Ack(count) => {
                let ended: Vec<Claim> = held.drain(..usize::from(count).min(held.len())).collect();
                ack(&queue, &ended).await;
            }
            Step::Lend => drop(queue.lend(&name()).await.unwrap()),
            Step::LendTwice => {
                let name = name();
                let (one, other) = tokio::join!(queue.lend(&name), queue.lend(&name));
                one.unwrap();
                other.unwrap();
            }
            Step::Forget => {
                let key = format!("{{{}:ingest:lend}}", config.prefix);
                let () = redis::cmd("DEL").arg(key).query_async(&mut raw).await.unwrap();
            }
            Step::Lose(partition) => {
                let keys: Vec<String> = redis::cmd("KEYS")
                    .arg(format!("{{{}:ingest:{partition}}}*", config.prefix))
                    .query_async(&mut raw)
                    .await
                    .unwrap();
                if !keys.is_empty() {
                    let () = redis::cmd("DEL").arg(keys).query_async(&mut raw).await.unwrap();
                }
                held.retain(|claim| claim.partition != partition);
                let policy = now.map(|now| limit(now as u32)).unwrap_or_default();
                queue.set_policy(&name(), &policy, revision).await.unwrap();
            }
        }
        let (has, lent) = grants(&queue, &mut raw).await;
        let sum: i64 = lent.iter().sum::<i64>().max(has.iter().sum());
        if now.is_some_and(|now| sum <= now) {
            allowed = now.unwrap_or(i64::MAX);
        }
        let used =
            |partition| held.iter().filter(|claim| i64::from(claim.partition) == partition).count() as i64;
        let most: i64 =
            (0..).zip(has.iter().zip(&lent)).map(|(p, (has, lent))| *has.max(lent).max(&used(p))).sum();
        if now.is_some_and(|now| most <= now) {
            runs = now.unwrap_or(i64::MAX);
        }
        if now.is_some() {
            assert!(sum <= allowed, "lent {lent:?}, the partitions have {has:?}, allowed are {allowed}");
            assert!(
                lent.iter().sum::<i64>() == 0 || has.iter().zip(&lent).all(|(has, lent)| has <= lent),
                "a partition has more than the record says: {has:?}, lent {lent:?}"
            );
        }
    }
    // Whatever happened, all that waits is done as long as jobs end and somebody lends.
    ack(&queue, &held).await;
    let mut idle = 0;
    while queue.depth(&name()).await.unwrap() > 0 {
        queue.lend(&name()).await.unwrap();
        let claims = queue.claim(&name(), &worker(), 50).await.unwrap();
        idle = if claims.is_empty() { idle + 1 } else { 0 };
        assert!(idle < 20, "jobs wait although none runs: {:?}", grants(&queue, &mut raw).await);
        ack(&queue, &claims).await;
    }
}

#[test]
fn rule_21_no_interleaving_lends_more_than_the_limit_or_leaves_a_job_waiting() {
    property(40, partitioned, proptest::collection::vec(step(), 1..60), run);
}
