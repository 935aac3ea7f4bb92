//! Leases and their tokens, stale entries, lost data, full and foreign servers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{collections::HashSet, time::Duration};

use devstack::{RedisOptions, testing::TestServices};
use metrics_exporter_prometheus::PrometheusBuilder;
use queue::{
    Beat, Claim, Envelope, JobId, LeaseRef, LeaseToken, ListedState, Place, Priority, Pushed, Queue,
    QueueConfig, QueueError, TenantId,
};
use support::{Stage, ids, job, jobs, name, worker};
use uuid::Uuid;

const NOW: i64 = 1_800_000_000_000;

fn refs(claims: &[Claim]) -> Vec<LeaseRef> {
    claims.iter().map(Claim::lease_ref).collect()
}

#[tokio::test]
async fn rule_1_a_wrong_token_does_nothing() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(1)).await.unwrap();
    let claims = stage.claim(1).await;
    let right = claims[0].lease_ref();
    let wrong = LeaseRef { token: LeaseToken::from("forged"), ..right.clone() };
    assert_eq!(stage.queue.ack(std::slice::from_ref(&wrong)).await.unwrap(), [false]);
    assert_eq!(stage.queue.release(&[(wrong.clone(), Duration::ZERO)]).await.unwrap(), [false]);
    assert_eq!(stage.queue.heartbeat(&[wrong, right.clone()]).await.unwrap(), [Beat::Lost, Beat::Extended]);
    assert_eq!(stage.queue.stats(&name()).await.unwrap().in_flight, 1);
    assert_eq!(stage.queue.ack(std::slice::from_ref(&right)).await.unwrap(), [true]);
    assert_eq!(stage.queue.ack(&[right]).await.unwrap(), [false], "an ack counts once");
    assert_eq!(stage.queue.stats(&name()).await.unwrap().in_flight, 0);
}

#[tokio::test]
async fn rule_1_an_expired_lease_is_reaped_redelivered_with_a_new_token_and_lost_to_its_old_holder() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(30)).await;
    let all = jobs(3);
    let at = |ms: i64| stage.queue.at(NOW + ms);
    at(0).push(&all).await.unwrap();
    let old = at(0).claim(&name(), &worker(), 2).await.unwrap();
    assert!(at(29_999).reap(&name()).await.unwrap().is_empty());
    let reaped: HashSet<JobId> = at(30_001).reap(&name()).await.unwrap().into_iter().collect();
    assert_eq!(reaped, ids(&old).into_iter().collect());
    assert_eq!(at(30_002).heartbeat(&refs(&old)).await.unwrap(), [Beat::Lost, Beat::Lost]);

    let new = at(30_003).claim(&name(), &worker(), 3).await.unwrap();
    assert_eq!(
        ids(&new),
        all.iter().map(|envelope| envelope.id).collect::<Vec<_>>(),
        "reaped jobs go to the front"
    );
    assert_ne!(new[0].token, old[0].token);
    assert_eq!(at(30_004).ack(&refs(&old)).await.unwrap(), [false, false]);
    assert_eq!(at(30_005).ack(&refs(&new)).await.unwrap(), [true, true, true]);
    // Finished by somebody else: lost as well, not lost data.
    assert_eq!(at(30_006).heartbeat(&refs(&old)).await.unwrap(), [Beat::Lost, Beat::Lost]);
}

#[tokio::test]
async fn a_heartbeat_extends_the_lease_by_its_full_time() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(30)).await;
    stage.queue.at(NOW).push(&jobs(1)).await.unwrap();
    let claims = stage.queue.at(NOW).claim(&name(), &worker(), 1).await.unwrap();
    assert_eq!(stage.queue.leases(&name()).await.unwrap(), [(claims[0].envelope.id, NOW + 30_000)]);
    assert_eq!(stage.queue.at(NOW + 20_000).heartbeat(&refs(&claims)).await.unwrap(), [Beat::Extended]);
    assert_eq!(stage.queue.leases(&name()).await.unwrap(), [(claims[0].envelope.id, NOW + 50_000)]);
    assert!(stage.queue.at(NOW + 49_000).reap(&name()).await.unwrap().is_empty());
    assert_eq!(stage.queue.at(NOW + 51_000).reap(&name()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn rule_5_one_call_takes_more_leases_than_one_script() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(1200)).await.unwrap();
    let mut claims = Vec::new();
    while claims.len() < 1200 {
        claims.extend(stage.claim(200).await);
    }
    let mut leases = refs(&claims);
    leases[777].token = LeaseToken::from("forged");
    let beats = stage.queue.heartbeat(&leases).await.unwrap();
    assert_eq!(beats.iter().position(|beat| *beat == Beat::Lost), Some(777), "answers keep their order");
    assert_eq!(beats.iter().filter(|beat| **beat == Beat::Extended).count(), 1199);
}

#[tokio::test]
async fn a_released_job_comes_back_first_or_after_its_delay() {
    let stage = Stage::new().await;
    let queue = stage.queue.at(NOW);
    let all = jobs(3);
    queue.push(&all).await.unwrap();
    let claims = queue.claim(&name(), &worker(), 2).await.unwrap();
    let given = [(claims[0].lease_ref(), Duration::ZERO), (claims[1].lease_ref(), Duration::from_secs(5))];
    assert_eq!(queue.release(&given).await.unwrap(), [true, true]);
    assert_eq!(queue.tenant_depth(&name(), &TenantId::new("acme").unwrap()).await.unwrap(), 3);
    assert_eq!(ids(&queue.claim(&name(), &worker(), 9).await.unwrap()), [all[0].id, all[2].id]);
    let later = stage.queue.at(NOW + 5001);
    assert_eq!(later.promote(&name()).await.unwrap(), 1);
    assert_eq!(ids(&later.claim(&name(), &worker(), 9).await.unwrap()), [all[1].id]);
}

#[tokio::test]
async fn rule_23_a_cancelled_job_is_never_claimed_and_its_stale_entry_is_dropped() {
    let stage = Stage::new().await;
    let all = jobs(4);
    stage.queue.push(&all).await.unwrap();
    let scheduled = Envelope { run_at_ms: Some(i64::MAX / 4096), ..job("acme", 5) };
    stage.queue.push(std::slice::from_ref(&scheduled)).await.unwrap();
    let leased = stage.claim(1).await;
    let gone = [&all[0], &all[1], &scheduled].map(|envelope| (name(), envelope.id));
    stage.queue.forget(&gone).await.unwrap();
    assert_eq!(stage.queue.missing(&gone).await.unwrap(), [all[1].id, scheduled.id], "a leased job stays");
    assert_eq!(stage.queue.heartbeat(&refs(&leased)).await.unwrap(), [Beat::Extended]);
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth(), stats.scheduled, stats.in_flight), (2, 0, 1));

    // Pushed again, it goes to the end; the entry it left behind must not bring it forward or twice.
    assert_eq!(stage.queue.push(&all[1..2]).await.unwrap(), [Pushed::Queued]);
    assert_eq!(ids(&stage.claim(9).await), [all[2].id, all[3].id, all[1].id]);
}

#[tokio::test]
async fn rule_23_a_reprioritised_job_is_served_once_and_in_its_new_place() {
    let stage = Stage::new().await;
    let all = jobs(3);
    stage.queue.push(&all).await.unwrap();
    let changes = [
        (name(), all[2].id, Priority::HIGHEST),
        (name(), all[0].id, Priority::LOWEST),
        (name(), JobId::new(), Priority::LOWEST),
    ];
    stage.queue.reprioritise(&changes).await.unwrap();
    stage.queue.reprioritise(&changes).await.unwrap();
    let claims = stage.claim(9).await;
    assert_eq!(ids(&claims), [all[2].id, all[1].id, all[0].id]);
    assert_eq!(claims[0].envelope.priority, Priority::HIGHEST);
    // While leased only the record changes, for the next time.
    stage.queue.reprioritise(&[(name(), all[1].id, Priority::LOWEST)]).await.unwrap();
    stage.queue.release(&[(claims[1].lease_ref(), Duration::ZERO)]).await.unwrap();
    assert_eq!(stage.claim(9).await[0].envelope.priority, Priority::LOWEST);
}

#[tokio::test]
async fn an_audit_sees_where_each_job_is() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(30)).await;
    let queue = stage.queue.at(NOW);
    let mut all = jobs(2);
    all.push(Envelope { run_at_ms: Some(NOW + 60_000), ..job("acme", 5) });
    queue.push(&all).await.unwrap();
    queue.claim(&name(), &worker(), 1).await.unwrap();
    all.push(job("acme", 5));
    let wanted: Vec<_> = all.iter().map(|envelope| (name(), envelope.id)).collect();
    assert_eq!(
        stage.queue.at(NOW + 31_000).places(&wanted).await.unwrap(),
        [Some(Place::Leased { left_ms: Some(-1000) }), Some(Place::Waiting), Some(Place::Scheduled), None]
    );
}

#[tokio::test]
async fn rule_23_a_claim_drops_a_bounded_number_of_stale_entries() {
    let stage = Stage::new().await;
    let all = jobs(2501);
    stage.queue.push(&all).await.unwrap();
    let gone: Vec<_> = all[..2500].iter().map(|envelope| (name(), envelope.id)).collect();
    stage.queue.forget(&gone).await.unwrap();
    let mut raw = stage.raw().await;
    let list = "{flotilla:ingest:0}:w:5:acme";
    let left: [usize; 2] = [1501, 501];
    for expected in left {
        assert!(stage.claim(1).await.is_empty());
        let length: usize = redis::cmd("LLEN").arg(list).query_async(&mut raw).await.unwrap();
        assert_eq!(length, expected);
    }
    assert_eq!(ids(&stage.claim(1).await), [all[2500].id]);
}

#[tokio::test]
async fn contract_1_after_flushall_leases_are_registered_again_and_the_stamp_is_gone() {
    let stage = Stage::new().await;
    stage.queue.stamp(Uuid::now_v7()).await.unwrap();
    assert!(stage.queue.stamped().await.unwrap());
    let all: Vec<Envelope> = (0..4).map(|n| job(&format!("t{n}"), 7)).collect();
    stage.queue.push(&all).await.unwrap();
    let claims = stage.claim(3).await;
    let mut raw = stage.raw().await;
    let () = redis::cmd("FLUSHALL").query_async(&mut raw).await.unwrap();
    assert!(!stage.queue.stamped().await.unwrap());
    // An idle worker, and a ledger that puts a running job back before its worker's heartbeat.
    assert!(stage.claim(9).await.is_empty());
    stage.queue.push(&all[1..2]).await.unwrap();

    assert_eq!(stage.queue.heartbeat(&refs(&claims)).await.unwrap(), [Beat::Reregistered; 3]);
    assert_eq!(
        stage.queue.push(&all).await.unwrap()[..3],
        [Pushed::Present; 3],
        "they are leased, not missing"
    );
    assert_eq!(ids(&stage.claim(9).await), [all[3].id], "a running job was claimed a second time");
    assert_eq!(stage.queue.ack(&refs(&claims)[..2]).await.unwrap(), [true, true]);
    // The third worker dies: its job comes back whole.
    let far = stage.queue.at(i64::MAX / 4096);
    assert!(far.reap(&name()).await.unwrap().contains(&all[2].id));
    let again = far.claim(&name(), &worker(), 9).await.unwrap();
    let whole = Envelope { lost: 1, ..all[2].clone() };
    assert!(again.iter().any(|claim| *claim.envelope == whole), "{again:?}");
}

#[tokio::test]
async fn rule_13_without_a_ledger_redis_counts_which_leases_were_lost_alone() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(30)).await;
    let envelope = job("acme", 5);
    stage.queue.push(std::slice::from_ref(&envelope)).await.unwrap();
    let (early, late) = (stage.queue.at(NOW), stage.queue.at(NOW + 31_000));
    let claim = async || early.claim(&name(), &worker(), 1).await.unwrap().pop().unwrap();
    let counts = |claim: &queue::Claim| (claim.envelope.lost, claim.envelope.lost_alone);

    for _ in 0..3 {
        claim().await;
        late.reap(&name()).await.unwrap();
    }
    let alone = claim().await;
    assert_eq!(counts(&alone), (3, 0), "none of them had said that it runs alone");
    assert_eq!(early.runs_alone(&refs(std::slice::from_ref(&alone))).await.unwrap(), [true]);
    late.reap(&name()).await.unwrap();
    assert_eq!(early.runs_alone(&refs(std::slice::from_ref(&alone))).await.unwrap(), [false], "lost since");

    let given_back = claim().await;
    assert_eq!(counts(&given_back), (4, 1));
    early.runs_alone(&refs(std::slice::from_ref(&given_back))).await.unwrap();
    early.release(&[(given_back.lease_ref(), Duration::ZERO)]).await.unwrap();
    claim().await;
    late.reap(&name()).await.unwrap();
    assert_eq!(counts(&claim().await), (5, 1), "this time it had not begun");
}

#[tokio::test]
async fn a_killed_redis_comes_back_with_its_queues_and_leases() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(3)).await.unwrap();
    let claims = stage.claim(1).await;
    let before = stage.queue.run_id().await.unwrap();
    stage.written().await;
    stage.redis().kill9().await.unwrap();
    let error = stage.queue.push(&jobs(1)).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert!(stage.queue.ping().await.is_err());
    stage.redis().restart().await.unwrap();
    // Right after a refused connection the same answer is given for 50 ms.
    support::eventually(
        support::DEADLINE,
        async || stage.queue.ping().await.ok(),
        async || format!("{:?}", stage.queue.ping().await),
    )
    .await;
    assert_ne!(stage.queue.run_id().await.unwrap(), before);
    assert_eq!(stage.queue.heartbeat(&refs(&claims)).await.unwrap(), [Beat::Extended]);
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 2);
}

#[tokio::test]
async fn rule_22_a_full_redis_refuses_pushes_and_lets_everything_else_drain() {
    let options = RedisOptions { max_memory_mb: 4, ..RedisOptions::queue() };
    let stage = Stage::on(options, |_| ()).await;
    let fat = |n: usize| -> Vec<Envelope> {
        (0..n).map(|_| Envelope { fast: Some("x".repeat(1000).into()), ..job("acme", 5) }).collect()
    };
    let mut pushed = 0_u64;
    let error = loop {
        match stage.queue.push(&fat(100)).await {
            Ok(_) => pushed += 100,
            Err(error) => break error,
        }
        assert!(pushed < 20_000, "Redis never became full");
    };
    assert_eq!(error, QueueError::Full);
    assert!(error.is_unavailable(), "rule 16: a full Redis charges no job");
    assert_eq!(
        stage.queue.stats(&name()).await.unwrap().depth(),
        pushed,
        "an error means that nothing was stored"
    );

    let claims = stage.claim(5).await;
    assert_eq!(claims.len(), 5);
    let leases = refs(&claims);
    assert_eq!(stage.queue.heartbeat(&leases).await.unwrap(), [Beat::Extended; 5]);
    let given = [(leases[0].clone(), Duration::ZERO), (leases[1].clone(), Duration::from_millis(1))];
    assert_eq!(stage.queue.release(&given).await.unwrap(), [true, true]);
    let far = stage.queue.at(i64::MAX / 4096);
    assert_eq!(far.promote(&name()).await.unwrap(), 1);
    assert_eq!(far.reap(&name()).await.unwrap().len(), 3);
    stage.queue.stats(&name()).await.unwrap();
    let mut rest = 0;
    loop {
        let claims = stage.claim(200).await;
        if claims.is_empty() {
            break;
        }
        rest += stage.queue.ack(&refs(&claims)).await.unwrap().into_iter().filter(|acked| *acked).count();
    }
    assert_eq!(rest as u64, pushed);

    // It becomes full in the middle of a push of several calls: then each job is told what became of it.
    let told = stage.queue.push(&fat(10_000)).await.unwrap();
    let stored = told.iter().filter(|told| **told == Pushed::Queued).count() as u64;
    let refused = told.iter().filter(|told| **told == Pushed::Full).count() as u64;
    assert!(stored > 0 && stored + refused == 10_000, "{stored} stored, {refused} refused");
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), stored);
    assert_eq!(stage.queue.push(&fat(1)).await.unwrap(), [Pushed::Queued], "there is room again");
}

#[tokio::test]
async fn rule_25_a_prefix_belongs_to_one_ledger() {
    let stage = Stage::new().await;
    let (ours, theirs) = (Uuid::now_v7(), Uuid::now_v7());
    assert!(!stage.queue.stamped().await.unwrap());
    stage.queue.stamp(ours).await.unwrap();
    stage.queue.stamp(ours).await.unwrap();
    let error = stage.queue.stamp(theirs).await.unwrap_err();
    assert!(matches!(&error, QueueError::OtherLedger { found, .. } if *found == ours.to_string()), "{error}");
    assert!(!error.is_unavailable());
    let other =
        Queue::connect(QueueConfig { prefix: "other".to_owned(), ..stage.config.clone() }).await.unwrap();
    other.stamp(theirs).await.unwrap();
}

#[tokio::test]
async fn a_redis_that_may_evict_jobs_is_refused() {
    let services = TestServices::builder().redis_cache().start().await.unwrap();
    let config = QueueConfig { url: services.redis_cache().url().to_owned(), ..QueueConfig::default() };
    let error = Queue::connect(config).await.unwrap_err();
    assert_eq!(error, QueueError::Evicting { policy: "allkeys-lru".to_owned() });
    assert!(error.to_string().contains("noeviction"), "{error}");
}

#[tokio::test]
async fn rule_23_forgotten_scripts_are_loaded_again_under_load() {
    let stage = Stage::new().await;
    let mut raw = stage.raw().await;
    let pushes = (0..50).map(|_| {
        let queue = stage.queue.clone();
        tokio::spawn(async move { queue.push(&jobs(10)).await })
    });
    let pushes: Vec<_> = pushes.collect();
    for _ in 0..20 {
        let () = redis::cmd("SCRIPT").arg("FLUSH").query_async(&mut raw).await.unwrap();
        stage.queue.stats(&name()).await.unwrap();
    }
    for push in pushes {
        assert_eq!(push.await.unwrap().unwrap(), [Pushed::Queued; 10]);
    }
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 500);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_dropped_and_blocks_nothing() {
    let stage = Stage::new().await;
    let all = jobs(3);
    stage.queue.push(&all).await.unwrap();
    let mut raw = stage.raw().await;
    let key = "{flotilla:ingest:0}:j";
    let id = all[1].id.to_string();
    let () =
        redis::cmd("HSET").arg(key).arg(id).arg("2 5 0 acme\nnonsense").query_async(&mut raw).await.unwrap();
    let listed = stage.queue.list(&name(), ListedState::Waiting, 0, 9).await.unwrap();
    assert_eq!(listed.iter().map(|job| job.envelope.id).collect::<Vec<_>>(), [all[0].id, all[2].id]);
    assert_eq!(stage.queue.find(&name(), all[1].id).await.unwrap(), None);
    let recorder = PrometheusBuilder::new().build_recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    assert_eq!(ids(&stage.claim(9).await), [all[0].id, all[2].id]);
    assert_eq!(stage.queue.missing(&[(name(), all[1].id)]).await.unwrap(), [all[1].id]);
    let counted = recorder.handle().render();
    assert!(counted.contains(r#"queue_jobs_dropped_total{reason="unreadable"} 1"#), "{counted}");
}

#[tokio::test]
async fn a_record_that_no_claim_could_read_or_that_is_too_large_is_refused_and_nothing_stored() {
    let stage = Stage::with(|config| config.max_record = 1000).await;
    let deep =
        (0..queue::MAX_DEPTH).fold(serde_json::json!({}), |inner, _| serde_json::json!({ "in": inner }));
    let large = serde_json::json!({ "text": "x".repeat(1000) });
    for (fast, words) in
        [(deep, "nested deeper than 127 levels"), (large, "1011 bytes of JSON: at most 1000")]
    {
        let all = [job("acme", 5), Envelope { fast: Some(fast), ..job("acme", 5) }];
        let error = stage.queue.push(&all).await.unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&all[1].id.to_string()), "{error}");
    }
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 0);
}

#[tokio::test]
async fn few_leases_are_found_as_fast_as_many() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(3)).await.unwrap();
    assert_eq!(stage.claim(2).await.len(), 2);
    let mut raw = stage.raw().await;
    let encoding: String =
        redis::cmd("OBJECT").arg(&["ENCODING", "{flotilla:ingest:0}:x"]).query_async(&mut raw).await.unwrap();
    assert_eq!(encoding, "hashtable", "a listpack is searched from its beginning");
}
