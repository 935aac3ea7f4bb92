//! Rules 18, 19 and 20: acceptance, idempotency keys and the outbox.

use std::{collections::BTreeSet, time::Duration};

use queue::{Envelope, JobId, Priority, QueueName};
use sagas::stores::postgres::{
    accept::{Accepted, Idempotency, NewJob, Until},
    ending::GivenBack,
};
use serde_json::json;
use uuid::Uuid;

use crate::{
    ledger::{HOUR, Ledger, ingest, job, retry, run_of},
    lookups::{entries_read, one_session_of},
};

fn reports(count: usize) -> Vec<NewJob> {
    (0..count).map(|_| job("report", json!({}))).collect()
}

fn keyed(key: &str, document: &str, ttl: Duration) -> NewJob {
    let idempotency = Idempotency { key: key.to_owned(), scope: "s".to_owned(), ttl, until: Until::Accepted };
    NewJob { idempotency: Some(idempotency), ..ingest(document) }
}

#[tokio::test]
async fn protocol_18_the_relay_finds_a_job_that_was_committed_late() {
    let ledger = Ledger::start().await;
    let (early, late) = (ingest("a"), ingest("b"));
    // Ids and times are older than what the relay has already dispatched.
    ledger.postgres.accept(std::slice::from_ref(&late), false).await.unwrap();
    let batch = ledger.postgres.undispatched(10, &[], &[]).await.unwrap();
    assert_eq!(batch.envelopes.iter().map(|e| e.id).collect::<Vec<_>>(), [late.id]);
    batch.done(&[late.id]).await.unwrap();
    ledger.postgres.accept(std::slice::from_ref(&early), false).await.unwrap();
    sqlx::query("UPDATE jobs SET created_at = created_at - interval '1 minute' WHERE id = $1")
        .bind(early.id.0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    let batch = ledger.postgres.undispatched(10, &[], &[]).await.unwrap();
    assert_eq!(batch.envelopes.iter().map(|e| e.id).collect::<Vec<_>>(), [early.id]);
}

#[tokio::test]
async fn protocol_12_sql_accepts_no_payload_that_a_worker_could_not_read() {
    let ledger = Ledger::start().await;
    let enqueue = async |levels: i32| {
        sqlx::query_scalar::<_, Uuid>(
            "SELECT enqueue('report', (repeat('{\"in\":', $1 - 1) || '{\"n\":1}' || repeat('}', $1 - 1))::jsonb, 'acme')",
        )
        .bind(levels)
        .fetch_one(ledger.postgres.pool())
        .await
    };
    let id = JobId(enqueue(126).await.unwrap());
    assert!(ledger.take("w", id).await.unreadable.is_none());
    let refused = enqueue(127).await.unwrap_err().to_string();
    assert!(refused.contains("payload: nested deeper than 126 levels"), "{refused}");
}

#[tokio::test]
async fn sql_accepts_no_time_that_a_relay_could_not_read() {
    let ledger = Ledger::start().await;
    for (run_at, fine) in [
        ("9999-12-31 23:59Z", true),
        ("infinity", false),
        ("-infinity", false),
        ("10000-01-01 00:00Z", false),
    ] {
        let done = sqlx::query("SELECT enqueue('report', '{}', 'acme', run_at => $1::text::timestamptz)")
            .bind(run_at)
            .execute(ledger.postgres.pool())
            .await;
        let code = done.err().and_then(|error| Some(error.as_database_error()?.code()?.into_owned()));
        assert_eq!(code.as_deref(), if fine { None } else { Some("22023") }, "{run_at}");
    }
}

#[tokio::test]
async fn a_job_that_waits_beyond_the_years_waits_until_their_end() {
    let far = Duration::from_secs(400_000_000_000);
    let ledger = Ledger::start().await;
    let (put_back, failed) = (ledger.ingest("a").await, ledger.ingest("b").await);
    let (one, other) = (ledger.take("w", put_back).await, ledger.take("w", failed).await);
    assert!(ledger.postgres.release(&run_of(&one, None), far, GivenBack::Asked).await.unwrap().is_some());
    assert!(ledger.postgres.finish(&run_of(&other, None), &retry(far), &[]).await.unwrap());
    for id in [put_back, failed] {
        let run_at = ledger.postgres.job(id, None).await.unwrap().unwrap().run_at;
        assert_eq!(run_at.to_rfc3339(), "9999-12-31T23:59:00+00:00");
    }
}

#[tokio::test]
async fn protocol_18_two_relays_never_take_the_same_jobs_and_neither_waits() {
    let ledger = Ledger::start().await;
    let jobs: Vec<NewJob> = (0..10).map(|n| ingest(&format!("d{n}"))).collect();
    ledger.postgres.accept(&jobs, false).await.unwrap();
    let one = ledger.postgres.undispatched(6, &[], &[]).await.unwrap();
    let two = ledger.postgres.undispatched(6, &[], &[]).await.unwrap();
    let ids = |batch: &[Envelope]| batch.iter().map(|e| e.id).collect::<BTreeSet<JobId>>();
    let (one_ids, two_ids) = (ids(&one.envelopes), ids(&two.envelopes));
    assert_eq!((one_ids.len(), two_ids.len()), (6, 4));
    assert!(one_ids.is_disjoint(&two_ids));
    // A relay that dies leaves its jobs to the next.
    drop(one);
    let all: Vec<JobId> = two_ids.into_iter().collect();
    two.done(&all).await.unwrap();
    let three = ledger.postgres.undispatched(10, &[], &[]).await.unwrap();
    assert_eq!(ids(&three.envelopes), one_ids);
}

#[tokio::test]
async fn protocol_18_the_reconciler_skips_what_changed_within_the_grace_period() {
    let ledger = Ledger::start().await;
    let id = ledger.ingest("a").await;
    let unfinished = async |grace| ledger.postgres.unfinished(Uuid::nil(), 10, grace).await.unwrap().settled;
    assert!(unfinished(HOUR).await.is_empty());
    assert_eq!(unfinished(Duration::ZERO).await[0].id, id);
    sqlx::query(
        "UPDATE jobs SET created_at = now() - interval '2 hours', dispatched_at = now() - interval '2 hours'",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    assert_eq!(unfinished(HOUR).await.len(), 1);
    ledger.take("w", id).await;
    assert!(unfinished(HOUR).await.is_empty());
}

#[tokio::test]
async fn protocol_18_the_reconciler_passes_what_waits_for_the_relay() {
    let ledger = Ledger::start().await;
    let first = ledger.ingest("a").await;
    ledger.postgres.accept(&reports(25), false).await.unwrap();
    let last = ledger.ingest("b").await;
    let (mut after, mut found) = (Uuid::nil(), vec![]);
    loop {
        let page = ledger.postgres.unfinished(after, 10, Duration::ZERO).await.unwrap();
        found.push(page.settled.iter().map(|e| e.id).collect::<Vec<_>>());
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(found, [vec![first], vec![], vec![last]], "ten are looked at each time");
}

#[tokio::test]
async fn protocol_19_the_same_key_with_the_same_request_is_the_same_job() {
    let ledger = Ledger::start().await;
    let first = keyed("k", "a", HOUR);
    assert_eq!(
        ledger.postgres.accept(std::slice::from_ref(&first), true).await.unwrap(),
        [Accepted::New(first.id)]
    );
    let accepts = [keyed("k", "a", HOUR), keyed("k", "b", HOUR), keyed("l", "a", HOUR)];
    let replies = ledger.postgres.accept(&accepts, true).await.unwrap();
    let expected =
        [Accepted::Duplicate(first.id), Accepted::Conflict(first.id), Accepted::New(accepts[2].id)];
    assert_eq!(replies, expected);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 2);
}

#[tokio::test]
async fn protocol_19_duplicates_inside_one_batch_are_folded() {
    let ledger = Ledger::start().await;
    let batch = [keyed("k", "a", HOUR), keyed("k", "a", HOUR), keyed("k", "b", HOUR)];
    let replies = ledger.postgres.accept(&batch, true).await.unwrap();
    let id = batch[0].id;
    assert_eq!(replies, [Accepted::New(id), Accepted::Duplicate(id), Accepted::Conflict(id)]);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 1);
}

#[tokio::test]
async fn protocol_19_concurrent_requests_with_one_key_make_one_job() {
    let ledger = Ledger::start().await;
    let jobs: Vec<NewJob> = (0..8).map(|_| keyed("k", "a", HOUR)).collect();
    let accepts = jobs.iter().map(|job| ledger.postgres.accept(std::slice::from_ref(job), true));
    let replies: Vec<Accepted> =
        futures::future::join_all(accepts).await.into_iter().flat_map(Result::unwrap).collect();
    let new: Vec<JobId> =
        replies.iter().filter_map(|r| if let Accepted::New(id) = r { Some(*id) } else { None }).collect();
    assert_eq!(new.len(), 1, "{replies:?}");
    assert_eq!(replies.iter().filter(|r| **r == Accepted::Duplicate(new[0])).count(), 7, "{replies:?}");
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 1);
}

#[tokio::test]
async fn protocol_19_an_expired_key_is_free_again() {
    let ledger = Ledger::start().await;
    let (first, second) = (keyed("k", "a", Duration::ZERO), keyed("k", "b", HOUR));
    ledger.postgres.accept(std::slice::from_ref(&first), true).await.unwrap();
    assert_eq!(
        ledger.postgres.accept(std::slice::from_ref(&second), true).await.unwrap(),
        [Accepted::New(second.id)]
    );
}

#[tokio::test]
async fn protocol_20_accepting_again_after_an_unknown_outcome_accepts_nothing_twice() {
    let ledger = Ledger::start().await;
    let jobs = [ingest("a"), keyed("k", "b", HOUR), job("embed", json!({ "all": true }))];
    let first = ledger.postgres.accept(&jobs, false).await.unwrap();
    let before = ledger.snapshot().await;
    assert_eq!(ledger.postgres.accept(&jobs, false).await.unwrap(), first);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn the_relay_takes_urgent_jobs_first_and_a_few_of_each_priority() {
    let ledger = Ledger::start().await;
    let of = |priority: u8, count: usize| -> Vec<_> {
        let one = || NewJob {
            priority: Priority::try_from(i64::from(priority)).unwrap(),
            ..job("report", json!({}))
        };
        (0..count).map(|_| one()).collect()
    };
    // A large batch, then what is more urgent, then another large one.
    for jobs in [of(3, 200), of(9, 2), of(5, 200), of(0, 1)] {
        ledger.postgres.accept(&jobs, false).await.unwrap();
    }
    let counted = |batch: &[Envelope]| {
        [9, 5, 3, 0].map(|priority| batch.iter().filter(|e| e.priority.get() == priority).count())
    };
    let one = ledger.postgres.undispatched(100, &[], &[]).await.unwrap();
    assert_eq!(counted(&one.envelopes), [2, 92, 5, 1]);
    // Another relay meanwhile takes others.
    let two = ledger.postgres.undispatched(100, &[], &[]).await.unwrap();
    assert_eq!(counted(&two.envelopes), [0, 95, 5, 0]);
    let mut seen: Vec<_> = one.envelopes.iter().chain(&two.envelopes).map(|e| e.id).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 200);
    let (done, others): (Vec<_>, Vec<_>) =
        (one.envelopes.iter().map(|e| e.id).collect(), two.envelopes.iter().map(|e| e.id).collect());
    one.done(&done).await.unwrap();
    two.done(&others).await.unwrap();
    let rest = ledger.postgres.undispatched(1000, &[], &[]).await.unwrap();
    assert_eq!(counted(&rest.envelopes), [0, 13, 190, 0]);
}

#[tokio::test]
async fn the_relay_passes_over_a_full_queue_at_no_cost_however_many_wait_there() {
    const WAIT: usize = 3000;
    let ledger = Ledger::start().await;
    let of = |queue: &str, later: bool| NewJob {
        queue: QueueName::new(queue).unwrap(),
        run_at: later.then(|| chrono::Utc::now() + HOUR),
        ..job("report", json!({}))
    };
    let [due, other] = [of("later-full", false), NewJob { priority: Priority::LOWEST, ..of("other", false) }];
    for jobs in [vec![of("full", false); WAIT], vec![of("later-full", true); WAIT]] {
        let jobs: Vec<NewJob> = jobs.into_iter().map(|job| NewJob { id: JobId::new(), ..job }).collect();
        ledger.postgres.accept(&jobs, false).await.unwrap();
    }
    ledger.postgres.accept(&[due.clone(), other.clone()], false).await.unwrap();
    sqlx::query("ANALYZE jobs").execute(ledger.postgres.pool()).await.unwrap();
    let ledger = one_session_of(ledger).await;
    let before = entries_read(&ledger.postgres, "jobs_undispatched").await;
    let (full, later_full) = (["full".to_owned()], ["later-full".to_owned()]);
    let batch = ledger.postgres.undispatched(100, &full, &later_full).await.unwrap();
    let found: BTreeSet<JobId> = batch.envelopes.iter().map(|e| e.id).collect();
    assert_eq!(found, BTreeSet::from([due.id, other.id]));
    drop(batch);
    let read = entries_read(&ledger.postgres, "jobs_undispatched").await - before;
    assert!((1..100).contains(&read), "{read} entries");
}

#[tokio::test]
async fn queues_of_one_priority_share_what_it_has_for_itself_in_each_batch_of_the_relay() {
    let ledger = Ledger::start().await;
    for (queue, priority) in [("large", 3_i64), ("small", 3), ("urgent", 9)] {
        let jobs: Vec<NewJob> = (reports(300).into_iter())
            .map(|job| NewJob {
                queue: QueueName::new(queue).unwrap(),
                priority: Priority::try_from(priority).unwrap(),
                ..job
            })
            .collect();
        ledger.postgres.accept(&jobs, false).await.unwrap();
    }
    let batch = ledger.postgres.undispatched(200, &[], &[]).await.unwrap();
    let counted = ["large", "small", "urgent"]
        .map(|name| batch.envelopes.iter().filter(|e| e.queue.to_string() == name).count());
    assert_eq!(counted, [5, 5, 190]);
}
