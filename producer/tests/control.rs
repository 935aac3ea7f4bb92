//! What people change about waiting jobs, and what the second of two equal requests is told.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use chrono::Utc;
use producer::{Change, Changed, Client, ClientSettings, Durability, Idempotency, NewJob, Until};
use queue::{JobId, Priority, WorkerId};
use sagas::{
    coalescing::Batch,
    stores::postgres::{
        ending::Run,
        take::{Take, TakeBatch, TakeItem},
    },
};
use serde_json::{Value, json};
use support::{Stage, eventually, ids, ids_of, quick, report};

const HOUR: Duration = Duration::from_secs(3600);

fn priority(number: u8) -> Change {
    Change { priority: Some(Priority::try_from(number).unwrap()), run_at: None }
}

async fn enqueue(stage: &Stage, count: usize) -> Vec<JobId> {
    let jobs: Vec<NewJob> = (0..count).map(report).collect();
    let ids = ids(&jobs);
    for outcome in stage.client.enqueue_many(jobs, Durability::Durable).await.unwrap() {
        outcome.unwrap();
    }
    ids
}

async fn flushall(stage: &Stage) {
    redis::cmd("FLUSHALL").exec_async(&mut stage.redis().await).await.unwrap();
}

/// Takes a job and ends it, as a worker does.
async fn succeed(stage: &Stage, id: JobId, result: Value) {
    let batch = TakeBatch::new(stage.postgres.clone(), WorkerId::new("w"));
    let taken = match batch.flush(&[TakeItem { id, fast: None }]).await.unwrap().remove(0) {
        Take::Taken(job) => job,
        other => panic!("not taken: {other:?}"),
    };
    let run = Run {
        job_id: id,
        fence: taken.fence,
        saga_id: None,
        worker: WorkerId::new("w"),
        started_at: Utc::now(),
    };
    assert!(stage.postgres.complete(&run, &result, &[]).await.unwrap());
}

#[tokio::test]
async fn a_new_priority_counts_at_once_and_keeps_the_jobs_age() {
    let stage = Stage::new().await;
    let ids = enqueue(&stage, 4).await;
    let changed = stage.client.change(&[ids[3], ids[2]], Some("acme"), priority(9)).await.unwrap();
    assert_eq!(changed, [Changed::Done, Changed::Done]);
    assert_eq!(
        stage.client.change(&ids[..1], Some("globex"), priority(9)).await.unwrap(),
        [Changed::Unknown]
    );
    let claims = stage.claim("report", 10).await;
    assert_eq!(claims.len(), 4);
    let first: std::collections::BTreeSet<_> = ids_of(&claims[..2]).into_iter().collect();
    assert_eq!(first, [ids[2], ids[3]].into_iter().collect());
    assert_eq!(ids_of(&claims[2..]), ids[..2]);
}

#[tokio::test]
async fn rule_17_a_new_priority_survives_the_loss_of_redis() {
    let stage = Stage::new().await;
    let loops = stage.maintain(quick());
    let ids = enqueue(&stage, 3).await;
    stage.client.change(&ids[2..], None, priority(9)).await.unwrap();
    flushall(&stage).await;
    eventually(|| async {
        let depth = stage.depth("report").await;
        if depth == 3 { Ok(()) } else { Err(format!("{depth} of 3")) }
    })
    .await;
    let claims = stage.claim("report", 10).await;
    assert_eq!(claims[0].envelope.id, ids[2]);
    assert_eq!(claims[0].envelope.priority.get(), 9);
    loops.stop().await;
}

#[tokio::test]
async fn rule_17_what_redis_did_not_hear_of_the_relay_tells_it() {
    let stage = Stage::new().await;
    let ids = enqueue(&stage, 3).await;
    // A client without a queue stands for one whose Redis is away.
    let deaf = Client::new(stage.postgres.clone(), None, ClientSettings::default());
    deaf.change(&ids[2..], None, priority(9)).await.unwrap();
    deaf.change(&ids[..1], None, Change { priority: None, run_at: Some(Utc::now() + HOUR) }).await.unwrap();
    let loops = stage.maintain(quick());
    eventually(|| async {
        let left = stage.postgres.undispatched_count().await.unwrap();
        if left == 0 { Ok(()) } else { Err(format!("{left} to relay")) }
    })
    .await;
    assert_eq!((stage.depth("report").await, stage.scheduled("report").await), (2, 1));
    assert_eq!(ids_of(&stage.claim("report", 10).await), [ids[2], ids[1]]);
    // And sooner again.
    deaf.change(&ids[..1], None, Change { priority: None, run_at: Some(Utc::now()) }).await.unwrap();
    eventually(|| async {
        let claims = stage.claim("report", 10).await;
        if ids_of(&claims) == ids[..1] { Ok(()) } else { Err(format!("{claims:?}")) }
    })
    .await;
    loops.stop().await;
}

#[tokio::test]
async fn a_running_job_keeps_its_priority_and_says_so() {
    let stage = Stage::new().await;
    let ids = enqueue(&stage, 1).await;
    let batch = TakeBatch::new(stage.postgres.clone(), WorkerId::new("w"));
    batch.flush(&[TakeItem { id: ids[0], fast: None }]).await.unwrap();
    assert_eq!(stage.client.change(&ids, None, priority(9)).await.unwrap(), [Changed::Running]);
    let run_at = chrono::DateTime::<Utc>::MAX_UTC;
    let odd = stage.client.change(&ids, None, Change { priority: None, run_at: Some(run_at) }).await;
    assert!(odd.unwrap_err().to_string().contains("years 1970 to 9999"));
}

fn keyed(until: Until, ttl: Duration) -> NewJob {
    let mut job = report(1);
    job.idempotency = Some(Idempotency { key: "k".into(), scope: "test".into(), ttl, until });
    job
}

#[tokio::test]
async fn the_second_request_is_told_how_the_first_ones_job_stands_and_what_it_returned() {
    let stage = Stage::new().await;
    for until in [Until::Accepted, Until::Finished] {
        let mut first = keyed(until, HOUR);
        first.idempotency.as_mut().unwrap().scope = format!("{until:?}");
        let again = || NewJob { id: JobId::new(), ..first.clone() };
        let receipt = stage.client.enqueue(first.clone(), Durability::Durable).await.unwrap();
        assert_eq!((receipt.duplicate, receipt.job), (false, None));
        let receipt = stage.client.enqueue(again(), Durability::Durable).await.unwrap();
        assert_eq!((receipt.id, receipt.duplicate), (first.id, true));
        let job = receipt.job.expect("the first one's job");
        assert_eq!((job.id, job.state.as_str(), job.result), (first.id.0, "waiting", None));
        succeed(&stage, first.id, json!({ "pages": 7 })).await;
        let receipts =
            stage.client.enqueue_many(vec![report(2), again()], Durability::Durable).await.unwrap();
        assert_eq!(receipts[0].as_ref().unwrap().job, None);
        let job = receipts[1].as_ref().unwrap().job.clone().expect("the first one's job");
        assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(json!({ "pages": 7 }))));
    }
}

#[tokio::test]
async fn a_key_that_is_held_until_the_end_is_free_right_after_it() {
    let stage = Stage::new().await;
    let first = keyed(Until::Finished, Duration::ZERO);
    stage.client.enqueue(first.clone(), Durability::Durable).await.unwrap();
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let client = stage.client.clone();
            tokio::spawn(async move {
                client.enqueue(keyed(Until::Finished, Duration::ZERO), Durability::Durable).await.unwrap()
            })
        })
        .collect();
    for call in calls {
        let receipt = call.await.unwrap();
        assert_eq!((receipt.id, receipt.duplicate), (first.id, true));
    }
    succeed(&stage, first.id, json!({})).await;
    let next =
        stage.client.enqueue(keyed(Until::Finished, Duration::ZERO), Durability::Durable).await.unwrap();
    assert!(!next.duplicate && next.id != first.id);
    assert_eq!(stage.rows().await, 2);
}
