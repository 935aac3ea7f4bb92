//! Rule 17 for batches: a member counts in the transaction that ends it, and the callback is enqueued once whatever dies.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use queue::{JobId, TenantId};
use sagas::stores::postgres::{
    accept::{Accepted, Idempotency, NewJob, Until},
    batches::{BatchId, BatchView, Callback, CallbackOn, Changed, Created, NewBatch},
    dead_letters::{Replay, Resolved},
    ending::{GivenBack, Verdict},
    publish::Published,
    retention::Place,
};
use serde_json::json;
use uuid::Uuid;

use crate::{
    ledger::{HOUR, Ledger, TENANT, failure, ingest, job, parking, publish_of, retry, run_of},
    lock_order::until_someone_waits,
};

fn batch(on: Option<CallbackOn>) -> NewBatch {
    NewBatch {
        id: BatchId::new(),
        tenant: TenantId::new(TENANT).unwrap(),
        name: "a test's".to_owned(),
        parent: None,
        callback: on.map(|on| Callback { on, job: job("after", json!({ "mark": 7 })) }),
    }
}

fn member(batch: &NewBatch) -> NewJob {
    NewJob { batch: Some(batch.id), ..job("member", json!({})) }
}

fn dead() -> Verdict {
    Verdict::Dead { failure: failure() }
}

impl Ledger {
    async fn open(&self, batch: &NewBatch, jobs: &[NewJob], seal: bool) -> Vec<JobId> {
        let created = self.postgres.create_batch(batch, jobs, seal, true).await.unwrap();
        assert!(matches!(created, Created::Batch { .. }), "{created:?}");
        jobs.iter().map(|job| job.id).collect()
    }

    async fn view(&self, id: BatchId) -> BatchView {
        self.postgres.batch(id, Some(TENANT)).await.unwrap().expect("the batch")
    }

    /// Total, succeeded, failed, cancelled.
    async fn counts(&self, id: BatchId) -> (i64, i64, i64, i64) {
        let view = self.view(id).await;
        (view.total, view.succeeded, view.failed, view.cancelled)
    }

    /// Folds everything that there is to fold.
    pub async fn collect(&self) {
        loop {
            let due = self.postgres.batches_to_fold(100, &[]).await.unwrap();
            if due.is_empty() {
                return;
            }
            for id in due {
                self.postgres.fold_batch(id).await.unwrap();
            }
        }
    }

    async fn succeed(&self, id: JobId) {
        let taken = self.take("w", id).await;
        assert!(self.postgres.complete(&run_of(&taken, None), &json!({}), &[]).await.unwrap());
    }

    async fn end(&self, id: JobId, verdict: &Verdict) {
        let taken = self.take("w", id).await;
        assert!(self.postgres.finish(&run_of(&taken, None), verdict, &[]).await.unwrap());
    }

    async fn callbacks(&self) -> i64 {
        self.count("SELECT count(*) FROM jobs WHERE kind = 'after'").await
    }
}

#[tokio::test]
async fn protocol_17_a_member_counts_in_the_transaction_that_ends_it_however_it_ends() {
    let ledger = Ledger::start().await;
    let it = batch(None);
    let mut jobs: Vec<NewJob> = (0..7).map(|_| member(&it)).collect();
    jobs.push(NewJob { batch: Some(it.id), ..ingest("a") });
    let ids = ledger.open(&it, &jobs, true).await;
    assert_eq!(ledger.counts(it.id).await, (8, 0, 0, 0));
    ledger.succeed(ids[0]).await;
    ledger.end(ids[1], &Verdict::Superseded).await;
    ledger.end(ids[2], &dead()).await;
    let taken = ledger.take("w", ids[3]).await;
    assert!(ledger.postgres.park(&run_of(&taken, None), &parking(None, "a test's"), &[]).await.unwrap());
    assert_eq!(ledger.counts(it.id).await, (8, 2, 2, 0));
    ledger.collect().await;
    assert_eq!(ledger.counts(it.id).await, (8, 2, 2, 0), "folding changes no count");
    ledger.end(ids[4], &Verdict::Cancelled).await;
    ledger.postgres.cancel(ids[5], None).await.unwrap();
    // A retry is no end.
    ledger.end(ids[6], &retry(HOUR)).await;
    assert_eq!(ledger.counts(it.id).await, (8, 2, 2, 2));
    // Nor is an end that is rolled back: a letter that is in the way fails the last of its writes.
    let taken = ledger.take("w", ids[7]).await;
    sqlx::query(
        "INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload)
         SELECT uuid7(), id, tenant, kind, queue, 'in_the_way', '', '{}' FROM jobs WHERE id = $1",
    )
    .bind(ids[7].0)
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    ledger.postgres.finish(&run_of(&taken, None), &dead(), &[]).await.unwrap_err();
    assert_eq!(ledger.counts(it.id).await, (8, 2, 2, 2));
    // The pivot ends jobs by a statement of its own.
    let stage = ledger.staged(&taken).await;
    assert_eq!(ledger.publish(&[publish_of(&taken, &stage)]).await, [Published::Yes]);
    assert_eq!(ledger.counts(it.id).await, (8, 3, 2, 2));
    ledger.collect().await;
    let view = ledger.view(it.id).await;
    assert_eq!((view.state.as_str(), view.finished_at), ("sealed", None), "one waits for its retry");
    assert!((view.percent - 87.5).abs() < 0.01, "{}", view.percent);
}

#[tokio::test]
async fn protocol_17_the_callback_comes_once_and_only_when_sealed_and_all_have_ended() {
    let ledger = Ledger::start().await;
    let it = batch(Some(CallbackOn::Complete));
    let ids = ledger.open(&it, &[member(&it), member(&it)], false).await;
    ledger.succeed(ids[0]).await;
    ledger.end(ids[1], &dead()).await;
    ledger.collect().await;
    assert_eq!(ledger.callbacks().await, 0, "an open batch may get more members");
    let late = ledger.accept(&[member(&it)]).await[0];
    assert_eq!(ledger.postgres.seal_batch(it.id, Some(TENANT)).await.unwrap(), Changed::Done);
    ledger.collect().await;
    assert_eq!(ledger.callbacks().await, 0, "one member has not ended");
    ledger.succeed(late).await;
    ledger.collect().await;
    assert_eq!(ledger.callbacks().await, 1);
    let view = ledger.view(it.id).await;
    assert_eq!((view.state.as_str(), view.percent), ("finished", 100.0));
    let wanted = it.callback.as_ref().unwrap().job.id;
    assert_eq!(view.callback_job, Some(wanted.0));
    let called = ledger.take("w", wanted).await;
    let counts =
        json!({ "id": it.id, "name": "a test's", "total": 3, "succeeded": 2, "failed": 1, "cancelled": 0 });
    assert_eq!(called.payload, json!({ "mark": 7, "batch": counts }));
    // However often it is looked at, also after the callback's own record has expired.
    sqlx::query("DELETE FROM jobs WHERE kind = 'after'").execute(ledger.postgres.pool()).await.unwrap();
    for _ in 0..3 {
        ledger.postgres.seal_batch(it.id, None).await.unwrap();
        sqlx::query("INSERT INTO batch_events (batch) VALUES ($1)")
            .bind(it.id.0)
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
        ledger.collect().await;
    }
    assert_eq!(ledger.callbacks().await, 0, "enqueued a second time");
}

#[tokio::test]
async fn a_callback_whose_parent_is_gone_comes_without_one() {
    let ledger = Ledger::start().await;
    let parent = ledger.accept(&[job("parent", json!({}))]).await[0];
    ledger.succeed(parent).await;
    let template = NewJob { parent: Some(parent), ..job("after", json!({})) };
    let callback = Some(Callback { on: CallbackOn::Complete, job: template });
    let it = NewBatch { callback, ..batch(None) };
    let member = ledger.open(&it, &[member(&it)], true).await[0];
    assert_eq!(
        ledger.postgres.expire_jobs(Duration::ZERO, 10, &mut Place::default()).await.unwrap(),
        1,
        "the parent stays"
    );
    ledger.succeed(member).await;
    ledger.collect().await;
    assert_eq!(ledger.callbacks().await, 1);
    assert!(ledger.view(it.id).await.finished_at.is_some());
}

#[tokio::test]
async fn protocol_17_an_empty_batch_completes_when_it_is_sealed() {
    let ledger = Ledger::start().await;
    let it = batch(Some(CallbackOn::Success));
    ledger.open(&it, &[], false).await;
    ledger.collect().await;
    assert_eq!(ledger.view(it.id).await.state, "open");
    ledger.postgres.seal_batch(it.id, None).await.unwrap();
    ledger.collect().await;
    assert_eq!(ledger.view(it.id).await.state, "finished");
    assert_eq!(ledger.callbacks().await, 1);
}

#[tokio::test]
async fn protocol_19_20_a_batch_that_is_made_again_is_the_same_and_a_sealed_or_foreign_one_takes_nobody() {
    let ledger = Ledger::start().await;
    ledger.postgres.create_tenant("globex").await.unwrap();
    let it = batch(Some(CallbackOn::Complete));
    let jobs = [member(&it), member(&it)];
    ledger.open(&it, &jobs, true).await;
    let before = ledger.snapshot().await;
    ledger.open(&it, &jobs, true).await;
    assert_eq!(ledger.snapshot().await, before, "a retried call");
    let late = member(&it);
    let replies = ledger.postgres.accept(std::slice::from_ref(&late), true).await.unwrap();
    assert_eq!(replies, [Accepted::BatchSealed(it.id)]);
    let foreign = NewJob { tenant: TenantId::new("globex").unwrap(), ..member(&it) };
    let nobodys = NewJob { batch: Some(BatchId::new()), ..late };
    let replies = ledger.postgres.accept(&[foreign, nobodys.clone()], true).await.unwrap();
    assert_eq!(replies, [Accepted::UnknownBatch(it.id), Accepted::UnknownBatch(nobodys.batch.unwrap())]);
    let theirs = NewBatch { tenant: TenantId::new("globex").unwrap(), ..it.clone() };
    assert_eq!(ledger.postgres.create_batch(&theirs, &[], false, true).await.unwrap(), Created::Taken);
    assert!(ledger.postgres.batch(it.id, Some("globex")).await.unwrap().is_none());
    assert_eq!(ledger.postgres.seal_batch(it.id, Some("globex")).await.unwrap(), Changed::Unknown);
    assert_eq!(ledger.postgres.cancel_batch(it.id, Some("globex")).await.unwrap(), Changed::Unknown);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_19_20_a_call_that_is_made_again_with_other_ids_gets_the_answers_of_the_first_by_its_keys() {
    let ledger = Ledger::start().await;
    // As over HTTP, where each call makes its jobs' ids anew.
    let call = |id: BatchId| {
        let it = NewBatch { id, ..batch(Some(CallbackOn::Complete)) };
        let jobs = ["a", "b"].map(|key| {
            let (key, scope) = (key.to_owned(), "s".to_owned());
            NewJob {
                idempotency: Some(Idempotency { key, scope, ttl: HOUR, until: Until::Accepted }),
                ..member(&it)
            }
        });
        (it, jobs)
    };
    let (it, jobs) = call(BatchId::new());
    let callback = Some(it.callback.as_ref().unwrap().job.id);
    let made = ledger.postgres.create_batch(&it, &jobs, true, true).await.unwrap();
    assert_eq!(
        made,
        Created::Batch { jobs: jobs.iter().map(|job| Accepted::New(job.id)).collect(), callback }
    );
    for ended in [false, true] {
        if ended {
            for job in &jobs {
                ledger.succeed(job.id).await;
            }
            ledger.collect().await;
            assert!(ledger.view(it.id).await.called_at.is_some());
        }
        let before = ledger.snapshot().await;
        let (again, mut same) = call(it.id);
        same[1].payload = json!({ "other": true });
        let mut late = same.to_vec();
        late.push(member(&again));
        let answer = ledger.postgres.create_batch(&again, &late, true, true).await.unwrap();
        let replies = vec![
            Accepted::Duplicate(jobs[0].id),
            Accepted::Conflict(jobs[1].id),
            Accepted::BatchSealed(it.id),
        ];
        assert_eq!(answer, Created::Batch { jobs: replies, callback }, "ended: {ended}");
        assert_eq!(ledger.snapshot().await, before);
    }
    // A key that nobody holds stays free.
    let mut free = call(it.id).1[0].clone();
    free.idempotency.as_mut().unwrap().key = "c".to_owned();
    let refused = ledger.postgres.accept(std::slice::from_ref(&free), true).await.unwrap();
    assert_eq!(refused, [Accepted::BatchSealed(it.id)]);
    assert_eq!(ledger.count("SELECT count(*) FROM idempotency_keys").await, 2);
}

#[tokio::test]
async fn protocol_20_of_two_calls_that_make_the_same_batch_at_once_the_later_finds_it_there() {
    let ledger = Ledger::start().await;
    ledger.postgres.create_tenant("globex").await.unwrap();
    for owner in [TENANT, "globex"] {
        let it = batch(Some(CallbackOn::Complete));
        let jobs = [member(&it)];
        // The quicker one has not committed yet.
        let mut quicker = ledger.postgres.begin().await.unwrap();
        sqlx::query("INSERT INTO batches (id, tenant, name) VALUES ($1, $2, 'a test''s')")
            .bind(it.id.0)
            .bind(owner)
            .execute(&mut *quicker)
            .await
            .unwrap();
        let mut later = std::pin::pin!(ledger.postgres.create_batch(&it, &jobs, true, true));
        until_someone_waits(&ledger, &mut later).await;
        quicker.commit().await.unwrap();
        let wanted = if owner == TENANT {
            Created::Batch { jobs: vec![Accepted::New(jobs[0].id)], callback: None }
        } else {
            Created::Taken
        };
        assert_eq!(later.await.unwrap(), wanted);
    }
}

#[tokio::test]
async fn a_replay_takes_the_dead_jobs_place_and_can_still_bring_the_success_callback() {
    let ledger = Ledger::start().await;
    let (on_success, on_complete) = (batch(Some(CallbackOn::Success)), batch(Some(CallbackOn::Complete)));
    for it in [&on_success, &on_complete] {
        let ids = ledger.open(it, &[member(it), member(it)], true).await;
        ledger.succeed(ids[0]).await;
        ledger.end(ids[1], &dead()).await;
    }
    ledger.collect().await;
    assert_eq!(ledger.callbacks().await, 1, "only the one for all ends");
    for it in [&on_success, &on_complete] {
        assert_eq!(ledger.view(it.id).await.state, "finished");
        assert_eq!(ledger.counts(it.id).await, (2, 1, 1, 0));
    }
    for round in 0..2 {
        let letters: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM dead_letters WHERE state = 'open'")
            .fetch_all(ledger.postgres.pool())
            .await
            .unwrap();
        assert_eq!(letters.len(), 2);
        for letter in letters {
            let replayed = ledger.postgres.replay(letter, &Replay::default()).await.unwrap();
            let Resolved::Done(Some(replay)) = replayed else { panic!("{replayed:?}") };
            let it = ledger.take("w", replay).await;
            let it = it.batch.expect("a member");
            assert_eq!(ledger.counts(it).await, (2, 1, 0, 0), "the failure is taken back");
            // The first replay fails, too.
            if round == 0 {
                ledger.end(replay, &dead()).await;
            } else {
                ledger.succeed(replay).await;
            }
            ledger.collect().await;
            assert_eq!(ledger.counts(it).await, if round == 0 { (2, 1, 1, 0) } else { (2, 2, 0, 0) });
        }
    }
    assert_eq!(ledger.callbacks().await, 2, "one for each batch");
    assert!(ledger.view(on_success.id).await.called_at.is_some());
}

#[tokio::test]
async fn a_batch_of_a_member_counts_as_one_member_of_the_outer_batch() {
    let ledger = Ledger::start().await;
    let outer = batch(Some(CallbackOn::Success));
    let parent = ledger.open(&outer, &[member(&outer)], true).await[0];
    let taken = ledger.take("w", parent).await;
    let inner = NewBatch { parent: Some(parent), ..batch(None) };
    let ids = ledger.open(&inner, &[member(&inner), member(&inner)], true).await;
    assert!(ledger.postgres.complete(&run_of(&taken, None), &json!({}), &[]).await.unwrap());
    ledger.collect().await;
    assert_eq!(ledger.counts(outer.id).await, (2, 1, 0, 0), "the parent and its batch");
    assert_eq!(ledger.callbacks().await, 0);
    for id in ids {
        ledger.succeed(id).await;
    }
    ledger.collect().await;
    assert_eq!(ledger.counts(outer.id).await, (2, 2, 0, 0));
    assert_eq!(ledger.callbacks().await, 1);
    // Once the parent has ended, its batch may have completed: nothing is hung into it any more.
    let late = NewBatch { parent: Some(parent), ..batch(None) };
    let created = ledger.postgres.create_batch(&late, &[], false, true).await.unwrap();
    assert_eq!(created, Created::NoParent(parent));
}

#[tokio::test]
async fn protocol_14_cancelling_a_batch_cancels_each_member_in_pages_and_its_inner_batches() {
    let ledger = Ledger::start().await;
    let it = batch(Some(CallbackOn::Complete));
    let mut jobs: Vec<NewJob> = (0..25).map(|_| member(&it)).collect();
    jobs.push(NewJob { batch: Some(it.id), ..ingest("a") });
    let ids = ledger.open(&it, &jobs, false).await;
    ledger.succeed(ids[0]).await;
    let running = ledger.take("w", ids[1]).await;
    let inner = NewBatch { parent: Some(running.id), ..batch(Some(CallbackOn::Success)) };
    let inside = ledger.open(&inner, &[member(&inner)], true).await[0];
    // A waiting member with effects has to undo them first.
    let staged = ledger.take("w", ids[25]).await;
    let stage = ledger.staged(&staged).await;
    let run = run_of(&staged, Some(stage.saga.id));
    assert!(ledger.postgres.release(&run, HOUR, GivenBack::Later).await.unwrap().is_some());

    assert_eq!(ledger.postgres.cancel_batch(it.id, Some(TENANT)).await.unwrap(), Changed::Done);
    let late = ledger.postgres.accept(&[member(&it)], true).await.unwrap();
    assert_eq!(late, [Accepted::BatchSealed(it.id)], "no member comes later");
    let asked = async || {
        let sql = "SELECT id, state, dispatched_at IS NULL FROM jobs WHERE cancel_requested_at IS NOT NULL AND state <> 'cancelled' ORDER BY id";
        sqlx::query_as::<_, (Uuid, String, bool)>(sql).fetch_all(ledger.postgres.pool()).await.unwrap()
    };
    let (mut cancelled, mut before) = (0, 0);
    for _ in 0..10 {
        for id in ledger.postgres.batches_to_cancel(BatchId(Uuid::nil()), 10).await.unwrap() {
            let page = ledger.postgres.cancel_members(id, Uuid::nil(), 10).await.unwrap();
            let requested = asked().await.len();
            assert!(page.cancelled.len() + requested - before <= 10);
            cancelled += page.cancelled.len();
            before = requested;
        }
    }
    assert_eq!(cancelled, 24, "23 here and one in the inner batch");
    // The relay tells Redis of the one that waited for an hour.
    let requested = [(ids[1].0, "running".to_owned(), false), (ids[25].0, "waiting".to_owned(), true)];
    assert_eq!(asked().await, requested);
    assert_eq!(ledger.state(inside).await.0, "cancelled");
    assert_eq!(ledger.callbacks().await, 0);
    // The one with effects is due now.
    let again = ledger.take("w", ids[25]).await;
    assert!(again.cancel_requested);
    let run = run_of(&again, Some(stage.saga.id));
    assert!(ledger.postgres.finish(&run, &Verdict::Cancelled, &[]).await.unwrap());
    assert!(
        ledger.postgres.finish(&run_of(&running, None), &Verdict::Cancelled, &[]).await.unwrap(),
        "it runs on until it heeds the request"
    );
    ledger.collect().await;
    assert_eq!(ledger.counts(it.id).await, (27, 1, 0, 26));
    assert!(ledger.view(it.id).await.finished_at.is_some());
    assert_eq!(ledger.callbacks().await, 1, "the one for all ends; the inner batch's is for success only");
    assert_eq!(ledger.postgres.cancel_batch(it.id, None).await.unwrap(), Changed::Finished);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_is_added_to_a_batch_once_it_is_sealed() {
    let ledger = Arc::new(Ledger::start().await);
    for _ in 0..10 {
        let it = batch(Some(CallbackOn::Success));
        ledger.open(&it, &[], false).await;
        let adders: Vec<_> = (0..6)
            .map(|_| {
                let (ledger, it) = (Arc::clone(&ledger), it.clone());
                tokio::spawn(async move {
                    let mut added = 0;
                    loop {
                        let jobs = [member(&it), member(&it)];
                        match ledger.postgres.accept(&jobs, true).await.unwrap()[0] {
                            Accepted::New(_) => added += 2,
                            Accepted::BatchSealed(_) => return added,
                            ref other => panic!("{other:?}"),
                        }
                    }
                })
            })
            .collect();
        // A collector at work meanwhile.
        ledger.postgres.fold_batch(it.id).await.unwrap();
        ledger.postgres.seal_batch(it.id, None).await.unwrap();
        let sealed_with = ledger.counts(it.id).await.0;
        let mut added = 0;
        for adder in adders {
            added += adder.await.unwrap();
        }
        assert_eq!(ledger.counts(it.id).await.0, added);
        assert_eq!(sealed_with, added, "members came after the seal");
    }
}

#[tokio::test]
async fn who_makes_a_batch_again_and_seals_it_waits_for_those_who_have_found_it_open() {
    let ledger = Ledger::start().await;
    let it = batch(None);
    ledger.open(&it, &[], false).await;
    // An adder that has looked, and has not committed yet.
    let late = JobId::new();
    let mut adder = ledger.postgres.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO jobs (id, kind, queue, priority, tenant, payload, timeout_ms, batch_id)
         VALUES ($1, 'member', 'member', 5, 'acme', '{}', 1000, $2)",
    )
    .bind(late.0)
    .bind(it.id.0)
    .execute(&mut *adder)
    .await
    .unwrap();
    let jobs = [member(&it)];
    {
        let mut again = std::pin::pin!(ledger.postgres.create_batch(&it, &jobs, true, true));
        until_someone_waits(&ledger, &mut again).await;
        adder.commit().await.unwrap();
        assert!(matches!(again.await.unwrap(), Created::Batch { .. }));
    }
    ledger.succeed(jobs[0].id).await;
    ledger.collect().await;
    let view = ledger.view(it.id).await;
    assert_eq!((view.state.as_str(), view.total, view.succeeded), ("sealed", 2, 1));
    ledger.succeed(late).await;
    ledger.collect().await;
    assert_eq!(ledger.view(it.id).await.state, "finished");
}

/// Backends of this database that are in the middle of a transaction die all the time.
async fn kill_backends(ledger: Arc<Ledger>, over: Arc<AtomicBool>, killed: Arc<AtomicUsize>) {
    use sqlx::{Connection, PgConnection};
    let mut own = PgConnection::connect(ledger.services.postgres().url()).await.unwrap();
    while !over.load(Ordering::SeqCst) {
        let dead: i64 = sqlx::query_scalar(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
                 SELECT pid FROM pg_stat_activity
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'
                 ORDER BY random() LIMIT 1) victim",
        )
        .fetch_one(&mut own)
        .await
        .unwrap();
        killed.fetch_add(usize::try_from(dead).unwrap(), Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn protocol_17_5000_members_with_connections_killed_at_random_count_exactly_and_call_once() {
    const MEMBERS: usize = 5000;
    let ledger = Arc::new(Ledger::start().await);
    let it = batch(Some(CallbackOn::Complete));
    ledger.open(&it, &[], false).await;
    let (over, killed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let killer = tokio::spawn(kill_backends(Arc::clone(&ledger), Arc::clone(&over), Arc::clone(&killed)));
    let collectors: Vec<_> = (0..3)
        .map(|_| {
            let (ledger, over) = (Arc::clone(&ledger), Arc::clone(&over));
            tokio::spawn(async move {
                while !over.load(Ordering::SeqCst) {
                    for id in ledger.postgres.batches_to_fold(10, &[]).await.unwrap_or_default() {
                        // One that dies leaves its transaction to the server.
                        if let Err(error) = ledger.postgres.fold_batch(id).await {
                            assert!(error.is_unavailable(), "{error}");
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
            })
        })
        .collect();
    // Members come and end at the same time; each call is made again until its outcome is known (PROTOCOL.md 20).
    let enders: Vec<_> = (0..5)
        .map(|part| {
            let (ledger, it) = (Arc::clone(&ledger), it.clone());
            tokio::spawn(async move {
                for page in 0..MEMBERS / 5 / 100 {
                    let jobs: Vec<NewJob> = (0..100).map(|_| member(&it)).collect();
                    while ledger.postgres.accept(&jobs, true).await.is_err() {}
                    end_somehow(&ledger, &jobs, part + page).await;
                }
            })
        })
        .collect();
    for ender in enders {
        ender.await.unwrap();
    }
    while !matches!(ledger.postgres.seal_batch(it.id, None).await, Ok(Changed::Done)) {}
    let begun = Instant::now();
    loop {
        let view = ledger.postgres.batch(it.id, None).await;
        if matches!(&view, Ok(Some(view)) if view.called_at.is_some()) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "not called: {view:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    over.store(true, Ordering::SeqCst);
    killer.await.unwrap();
    for collector in collectors {
        collector.await.unwrap();
    }
    ledger.collect().await;
    println!("{} connections were killed", killed.load(Ordering::SeqCst));
    assert!(killed.load(Ordering::SeqCst) > 20, "nothing was killed");
    let real: (i64, i64, i64, i64) = sqlx::query_as(
        "SELECT count(*), count(*) FILTER (WHERE state = 'succeeded'), count(*) FILTER (WHERE state = 'dead'),
                count(*) FILTER (WHERE state = 'cancelled') FROM jobs WHERE batch_id = $1",
    )
    .bind(it.id.0)
    .fetch_one(ledger.postgres.pool())
    .await
    .unwrap();
    assert_eq!(real, (5000, 2500, 1250, 1250));
    assert_eq!(ledger.counts(it.id).await, real);
    let stored: (i64, i64, i64, i64) =
        sqlx::query_as("SELECT total, succeeded, failed, cancelled FROM batches WHERE id = $1")
            .bind(it.id.0)
            .fetch_one(ledger.postgres.pool())
            .await
            .unwrap();
    assert_eq!(stored, real, "all is folded");
    assert_eq!(ledger.callbacks().await, 1);
}

/// Takes and ends members, again and again until the ledger says that all have ended.
async fn end_somehow(ledger: &Ledger, members: &[NewJob], turn: usize) {
    use queue::WorkerId;
    use sagas::{
        coalescing::Batch,
        stores::postgres::take::{Take, TakeBatch, TakeItem},
    };
    let batch = TakeBatch::new(ledger.postgres.clone(), WorkerId::new("w"));
    let items: Vec<TakeItem> = members.iter().map(|job| TakeItem { id: job.id, fast: None }).collect();
    loop {
        let Ok(takes) = batch.flush(&items).await else { continue };
        let mut open = 0;
        for (place, take) in takes.into_iter().enumerate() {
            let Take::Taken(taken) = take else { continue };
            open += 1;
            let run = run_of(&taken, None);
            // One that fails may have been committed all the same: the next take says.
            let ended = match (turn + place) % 4 {
                0 | 1 => ledger.postgres.complete(&run, &json!({}), &[]).await,
                2 => ledger.postgres.finish(&run, &dead(), &[]).await,
                _ => ledger.postgres.finish(&run, &Verdict::Cancelled, &[]).await,
            };
            assert!(ended.as_ref().map_or_else(sagas::StoreError::is_unavailable, |held| *held), "{ended:?}");
        }
        if open == 0 {
            return;
        }
    }
}
