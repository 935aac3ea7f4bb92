//! Rules 1, 5, 13 and 15: the take, and what a delivery counts.

use std::time::Duration;

use queue::WorkerId;
use sagas::{
    coalescing::Batch,
    stores::postgres::{
        ending::{GivenBack, Verdict},
        take::{Take, TakeBatch, TakeItem},
    },
};

use crate::ledger::{HOUR, Ledger, after, ingest, job, parking, retry, run_of, saga_of};
use serde_json::json;

fn waits(take: &Take) -> Option<Duration> {
    match take {
        Take::NotYet(wait) => Some(*wait),
        _ => None,
    }
}

/// Nobody gets such a payload past the checks of today; a row may be older than they are.
#[tokio::test]
async fn protocol_12_a_payload_that_nobody_can_read_keeps_no_other_job_from_its_worker() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[job("report", json!({})), job("report", json!({ "n": 1 }))]).await;
    sqlx::query("UPDATE jobs SET payload = (repeat('[', 200) || repeat(']', 200))::jsonb WHERE id = $1")
        .bind(ids[0].0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    let takes = ledger.takes("w", &ids).await;
    let [Take::Taken(deep), Take::Taken(plain)] = &takes[..] else { panic!("{takes:?}") };
    assert!(deep.unreadable.as_ref().unwrap().contains("recursion limit"), "{deep:?}");
    assert_eq!((&plain.unreadable, &plain.payload), (&None, &json!({ "n": 1 })));
}

#[tokio::test]
async fn protocol_12_a_run_whose_data_nobody_can_read_keeps_no_other_job_from_its_worker() {
    let ledger = Ledger::start().await;
    let mut ids = vec![];
    for document in ["a", "b"] {
        let taken = ledger.take("w", ledger.ingest(document).await).await;
        assert!(ledger.postgres.begin_saga(&saga_of(&taken, uuid::Uuid::now_v7())).await.unwrap());
        ids.push(taken.id);
    }
    for (column, told) in [("data", true), ("verdict", false)] {
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "UPDATE sagas SET {column} = (repeat('[', 200) || repeat(']', 200))::jsonb WHERE job_id = $1"
        )))
        .bind(ids[0].0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
        let takes = ledger.takes("w", &ids).await;
        let [Take::Taken(deep), Take::Taken(plain)] = &takes[..] else { panic!("{column}: {takes:?}") };
        let (deep, plain) = (deep.saga.as_ref().unwrap(), plain.saga.as_ref().unwrap());
        assert_eq!(deep.unreadable.is_some(), told, "{deep:?}");
        assert_eq!((&deep.data, &deep.verdict, &plain.unreadable), (&None, &None, &None));
        sqlx::query(sqlx::AssertSqlSafe(format!("UPDATE sagas SET {column} = NULL")))
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn protocol_01_an_ended_or_unknown_job_is_never_taken() {
    let ledger = Ledger::start().await;
    let mut ended = vec![];
    for verdict in [Verdict::Cancelled, Verdict::Superseded] {
        let taken = ledger.take("w", ledger.accept(&[job("embed", json!({ "all": true }))]).await[0]).await;
        assert!(ledger.postgres.finish(&run_of(&taken, None), &verdict, &[]).await.unwrap());
        ended.push(taken.id);
    }
    let parked = ledger.take("w", ledger.ingest("p").await).await;
    assert!(ledger.postgres.park(&run_of(&parked, None), &parking(None, "a test's"), &[]).await.unwrap());
    let dead = ledger.take("w", ledger.ingest("d").await).await;
    let verdict = Verdict::Dead { failure: crate::ledger::failure() };
    assert!(ledger.postgres.finish(&run_of(&dead, None), &verdict, &[]).await.unwrap());
    // Of the last, only the push into Redis outlived the transaction that would have accepted it.
    ended.extend([parked.id, dead.id, queue::JobId::new()]);
    let before = ledger.snapshot().await;
    for take in ledger.takes("v", &ended).await {
        assert!(matches!(take, Take::Gone), "{take:?}");
    }
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_01_a_job_that_is_not_due_is_not_taken() {
    let ledger = Ledger::start().await;
    let mut later = ingest("a");
    later.run_at = Some(chrono::Utc::now() + HOUR);
    let id = ledger.accept(&[later]).await[0];
    let before = ledger.snapshot().await;
    let take = ledger.takes("w", &[id]).await.remove(0);
    let wait = waits(&take).unwrap_or_else(|| panic!("{take:?}"));
    assert!((HOUR * 59 / 60..=HOUR).contains(&wait), "{wait:?}");
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_01_the_fence_grows_with_every_take_and_the_newest_alone_counts() {
    let ledger = Ledger::start().await;
    let id = ledger.ingest("a").await;
    let (one, two) = tokio::join!(ledger.take("one", id), ledger.take("two", id));
    assert_ne!(one.fence, two.fence);
    let (old, new) = if one.fence < two.fence { (one, two) } else { (two, one) };
    assert_eq!(new.fence, after(old.fence));
    assert!(!ledger.postgres.mark_alone(id, old.fence).await.unwrap());
    assert!(ledger.postgres.mark_alone(id, new.fence).await.unwrap());
    let third = ledger.take("one", id).await;
    assert_eq!(third.fence, after(new.fence));
}

#[tokio::test]
async fn protocol_01_08_jobs_of_one_document_run_one_at_a_time_in_order() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("a"), ingest("b")]).await;
    // In one batch, and the later first.
    let takes = ledger.takes("w", &[ids[1], ids[0], ids[2]]).await;
    assert!(matches!(&takes[..], [Take::NotYet(_), Take::Taken(_), Take::Taken(_)]), "{takes:?}");
    assert!(waits(&takes[0]).unwrap() < Duration::from_secs(1));
    // While the first runs.
    let take = ledger.takes("w", &[ids[1]]).await.remove(0);
    assert!(matches!(take, Take::NotYet(_)), "{take:?}");
    // Once it has ended.
    let Take::Taken(first) = &takes[1] else { unreachable!() };
    assert!(ledger.postgres.finish(&run_of(first, None), &Verdict::Cancelled, &[]).await.unwrap());
    ledger.take("w", ids[1]).await;
}

#[tokio::test]
async fn protocol_01_08_a_job_that_waits_for_a_later_time_does_not_block_its_document() {
    let ledger = Ledger::start().await;
    let mut later = ingest("a");
    later.run_at = Some(chrono::Utc::now() + HOUR);
    let ids = ledger.accept(&[later, ingest("a")]).await;
    ledger.take("w", ids[1]).await;
}

#[tokio::test]
async fn protocol_01_08_an_earlier_job_that_comes_due_waits_for_the_one_that_runs() {
    let ledger = Ledger::start().await;
    let mut later = ingest("a");
    later.run_at = Some(chrono::Utc::now() + HOUR);
    let ids = ledger.accept(&[later, ingest("a")]).await;
    ledger.take("w", ids[1]).await;
    sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
        .bind(ids[0].0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    let take = ledger.takes("w", &[ids[0]]).await.remove(0);
    assert!(matches!(take, Take::NotYet(_)), "{take:?}");
}

#[tokio::test]
async fn protocol_13_a_delivery_counts_only_when_taken_and_is_lost_only_to_another_worker() {
    let ledger = Ledger::start().await;
    let id = ledger.ingest("a").await;
    let job = ledger.postgres.job(id, None).await.unwrap().unwrap();
    assert_eq!((job.deliveries, job.lost_deliveries), (0, 0));
    let taken = ledger.take("one", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone), (1, 0, 0));
    // The same living worker: its first answer was lost on the way.
    let taken = ledger.take("one", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone), (2, 0, 0));
    // Another: the first lost its lease, but not alone.
    let taken = ledger.take("two", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone), (3, 1, 0));
    // Lost while it ran alone.
    assert!(ledger.postgres.mark_alone(id, taken.fence).await.unwrap());
    let taken = ledger.take("three", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone), (4, 2, 1));
    // To have run alone once says nothing of the next delivery.
    let taken = ledger.take("four", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone), (5, 3, 1));
    // Given back: nothing is lost and nothing charged.
    ledger.give_back(&taken, Duration::ZERO, GivenBack::Asked).await;
    let taken = ledger.take("five", id).await;
    assert_eq!((taken.deliveries, taken.lost_deliveries, taken.lost_alone, taken.attempts), (6, 3, 1, 0));
}

#[tokio::test]
async fn protocol_15_a_job_of_an_unknown_kind_goes_back_uncharged_and_its_clock_runs_on() {
    let ledger = Ledger::start().await;
    let id = ledger.accept(&[job("embed", json!({ "all": true }))]).await[0];
    let taken = ledger.take("w", id).await;
    assert_eq!(taken.unroutable_for, None);
    ledger.give_back(&taken, Duration::ZERO, GivenBack::Unroutable(Duration::ZERO)).await;
    let first = ledger.take("w", id).await;
    let since = first.unroutable_for.expect("unroutable since the first release");
    ledger.give_back(&first, Duration::ZERO, GivenBack::Unroutable(Duration::ZERO)).await;
    let second = ledger.take("w", id).await;
    assert!(second.unroutable_for.unwrap() > since, "the second release set the clock anew");
    assert_eq!((second.attempts, second.lost_deliveries), (0, 0));
    // A worker that knows the kind gives it back for another reason.
    ledger.give_back(&second, Duration::ZERO, GivenBack::Asked).await;
    let third = ledger.take("w", id).await;
    assert_eq!(third.unroutable_for, None);
    // One that knows the kind has tried it; one that knows it has taken it, whatever comes of that.
    ledger.give_back(&third, Duration::ZERO, GivenBack::Unroutable(Duration::ZERO)).await;
    let fourth = ledger.take("w", id).await;
    ledger.postgres.finish(&run_of(&fourth, None), &retry(Duration::ZERO), &[]).await.unwrap();
    let fifth = ledger.take("w", id).await;
    assert_eq!(fifth.unroutable_for, None);
    ledger.give_back(&fifth, Duration::ZERO, GivenBack::Unroutable(Duration::ZERO)).await;
    let knows = TakeBatch::new(ledger.postgres.clone(), WorkerId::new("w")).knowing(vec!["embed"]);
    knows.flush(&[TakeItem { id, fast: None }]).await.unwrap();
    assert_eq!(ledger.take("w", id).await.unroutable_for, None);
    // The delay holds in the ledger, not only in Redis.
    let taken = ledger.take("w", id).await;
    ledger.give_back(&taken, HOUR, GivenBack::Unroutable(Duration::ZERO)).await;
    let take = ledger.takes("w", &[id]).await.remove(0);
    assert!(waits(&take).is_some_and(|wait| wait > HOUR / 2), "{take:?}");
}
