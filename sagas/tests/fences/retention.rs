//! What goes with age, and what stays however old it is.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use embedding::hashing::HashingEmbedder;
use queue::{JobId, TenantId};
use sagas::{
    janitor::{self, JanitorSettings},
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{
            accept::{Idempotency, NewJob, Until},
            batches::{BatchId, Created, NewBatch},
            ending::Verdict,
            retention::Place,
        },
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::ledger::{HOUR, Ledger, TENANT, failure, ingest, job, parking, run_of, saga_of};

impl Ledger {
    async fn report(&self, parent: Option<JobId>) -> JobId {
        self.accept(&[NewJob { parent, ..job("report", json!({})) }]).await[0]
    }

    async fn succeeded(&self, id: JobId, result: Value) {
        let taken = self.take("w", id).await;
        assert!(self.postgres.complete(&run_of(&taken, None), &result, &[]).await.unwrap());
    }

    async fn aged(&self, by: &str) {
        sqlx::query("UPDATE jobs SET finished_at = finished_at - $1::interval")
            .bind(by)
            .execute(self.postgres.pool())
            .await
            .unwrap();
    }

    async fn result(&self, id: JobId) -> Option<Value> {
        self.postgres.job(id, None).await.unwrap().unwrap().result
    }
}

#[tokio::test]
async fn results_go_after_their_time_in_bounded_batches_and_the_jobs_stay() {
    let ledger = Ledger::start().await;
    let mut ids = vec![];
    for number in 0..5 {
        let id = ledger.report(None).await;
        ledger.succeeded(id, json!({ "number": number })).await;
        ids.push(id);
    }
    assert_eq!(ledger.result(ids[4]).await, Some(json!({ "number": 4 })));
    assert_eq!(ledger.postgres.expire_results(HOUR, 100, &mut Place::default()).await.unwrap(), 0);
    ledger.aged("61 minutes").await;
    let fresh = ledger.report(None).await;
    ledger.succeeded(fresh, json!([1])).await;
    assert_eq!(ledger.postgres.expire_results(HOUR, 3, &mut Place::default()).await.unwrap(), 3);
    assert_eq!(ledger.postgres.expire_results(HOUR, 3, &mut Place::default()).await.unwrap(), 2);
    assert_eq!(ledger.postgres.expire_results(HOUR, 3, &mut Place::default()).await.unwrap(), 0);
    for id in ids {
        assert_eq!((ledger.result(id).await, ledger.state(id).await.0.as_str()), (None, "succeeded"));
    }
    assert_eq!(ledger.result(fresh).await, Some(json!([1])));
    // No result is no result, and nothing to clear later.
    let none = ledger.report(None).await;
    ledger.succeeded(none, Value::Null).await;
    assert_eq!(ledger.result(none).await, None);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs WHERE result = 'null'").await, 0);
}

#[tokio::test]
async fn a_job_stays_as_long_as_a_letter_a_run_or_a_child_needs_it() {
    let ledger = Ledger::start().await;
    let plain = ledger.report(None).await;
    ledger.succeeded(plain, Value::Null).await;
    let dead = ledger.report(None).await;
    let taken = ledger.take("w", dead).await;
    ledger.postgres.finish(&run_of(&taken, None), &Verdict::Dead { failure: failure() }, &[]).await.unwrap();
    let parent = ledger.report(None).await;
    let child = ledger.report(Some(parent)).await;
    ledger.succeeded(parent, Value::Null).await;
    let parked = ledger.report(None).await;
    let taken = ledger.take("w", parked).await;
    let saga = saga_of(&taken, uuid::Uuid::now_v7());
    assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
    assert!(
        ledger.postgres.park(&run_of(&taken, Some(saga.id)), &parking(None, "a test's"), &[]).await.unwrap()
    );
    let waiting = ledger.ingest("a").await;

    ledger.aged("2 hours").await;
    assert_eq!(ledger.postgres.expire_jobs(HOUR, 100, &mut Place::default()).await.unwrap(), 1);
    assert!(ledger.postgres.job(plain, None).await.unwrap().is_none());
    // The child has ended: it and its parent may go. So may the dead one, when a person has dealt with it.
    ledger.succeeded(child, Value::Null).await;
    ledger.postgres.discard(dead.0, "a test", "").await.unwrap();
    ledger.aged("2 hours").await;
    assert_eq!(
        ledger.postgres.expire_jobs(HOUR, 2, &mut Place::default()).await.unwrap(),
        2,
        "no more than asked for"
    );
    assert_eq!(ledger.postgres.expire_jobs(HOUR, 100, &mut Place::default()).await.unwrap(), 1);
    for id in [parked, waiting] {
        assert!(ledger.postgres.job(id, None).await.unwrap().is_some());
    }
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 2);
}

#[tokio::test]
async fn what_a_parent_that_has_not_ended_or_is_parked_may_still_look_at_stays() {
    let ledger = Ledger::start().await;
    let parent = ledger.report(None).await;
    let batch = |name: &str| NewBatch {
        id: BatchId::new(),
        tenant: TenantId::new(TENANT).unwrap(),
        name: name.to_owned(),
        parent: Some(parent),
        callback: None,
    };
    let child = NewJob { parent: Some(parent), ..job("report", json!({})) };
    // As a replay is: a member without a parent of its own.
    let replay = job("report", json!({}));
    for (batch, jobs) in [(batch("children"), vec![child.clone(), replay.clone()]), (batch("none"), vec![])] {
        let created = ledger.postgres.create_batch(&batch, &jobs, true, true).await.unwrap();
        assert!(matches!(created, Created::Batch { .. }), "{created:?}");
    }
    let alone = ledger.report(Some(parent)).await;
    let ids = [child.id, replay.id, alone];
    for id in ids {
        ledger.succeeded(id, json!({ "kept": true })).await;
    }
    ledger.collect().await;
    let expired = async || {
        ledger.aged("2 hours").await;
        sqlx::query("UPDATE batches SET finished_at = finished_at - interval '2 hours'")
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
        let results = ledger.postgres.expire_results(HOUR, 100, &mut Place::default()).await.unwrap();
        let jobs = ledger.postgres.expire_jobs(HOUR, 100, &mut Place::default()).await.unwrap();
        (results, jobs, ledger.postgres.expire_batches(HOUR, 100, &mut Place::default()).await.unwrap())
    };
    assert_eq!(expired().await, (0, 0, 0), "the parent waits");
    let taken = ledger.take("w", parent).await;
    assert_eq!(expired().await, (0, 0, 0), "the parent runs");
    let saga = saga_of(&taken, uuid::Uuid::now_v7());
    assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
    assert!(
        ledger.postgres.park(&run_of(&taken, Some(saga.id)), &parking(None, "a test's"), &[]).await.unwrap()
    );
    assert_eq!(expired().await, (0, 0, 0), "the parent may go on");
    for id in ids {
        assert_eq!(ledger.result(id).await, Some(json!({ "kept": true })));
    }
    ledger.postgres.resolve_parked(saga.id, "a test", "", HOUR).await.unwrap();
    assert_eq!(expired().await, (3, 3, 2));
    assert_eq!(expired().await, (0, 1, 0), "the parent goes last");
}

#[tokio::test]
async fn a_parent_goes_after_its_children_however_long_ago_it_ended() {
    let ledger = Ledger::start().await;
    let parent = ledger.report(None).await;
    ledger.succeeded(parent, Value::Null).await;
    for _ in 0..3 {
        let child = ledger.report(Some(parent)).await;
        ledger.succeeded(child, Value::Null).await;
    }
    ledger.aged("2 hours").await;
    // To take the parent out of its children's rows would be a write for each, in one statement.
    let without = "SELECT count(*) FROM jobs WHERE parent IS NULL";
    let mut place = Place::default();
    for (gone, parents) in [(2, 1), (1, 1), (1, 0)] {
        assert_eq!(ledger.postgres.expire_jobs(HOUR, 2, &mut place).await.unwrap(), gone);
        assert_eq!(ledger.count(without).await, parents);
    }
}

#[tokio::test]
async fn what_batches_refer_to_goes_after_them() {
    let ledger = Ledger::start().await;
    let parent = ledger.report(None).await;
    ledger.succeeded(parent, Value::Null).await;
    ledger.aged("2 hours").await;
    sqlx::query(
        "WITH around AS (
             INSERT INTO batches (id, tenant, name, parent, sealed_at, finished_at)
             SELECT uuid7(), tenant, 'outer', id, now(), now() - interval '3 hours' FROM jobs RETURNING *)
         INSERT INTO batches (id, tenant, name, outer_batch, sealed_at, finished_at)
         SELECT uuid7(), tenant, 'inner', id, now(), now() - interval '2 hours' FROM around",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    for (batches, jobs) in [(1, 0), (1, 1)] {
        assert_eq!(ledger.postgres.expire_jobs(HOUR, 9, &mut Place::default()).await.unwrap(), 0);
        assert_eq!(ledger.postgres.expire_batches(HOUR, 9, &mut Place::default()).await.unwrap(), batches);
        let left =
            ledger.count("SELECT count(*) FROM batches WHERE name = 'outer' AND parent IS NOT NULL").await;
        assert_eq!(left, 1 - jobs);
    }
    assert_eq!(ledger.postgres.expire_jobs(HOUR, 9, &mut Place::default()).await.unwrap(), 1);
}

#[tokio::test]
async fn old_jobs_that_must_stay_keep_no_others_from_going_however_many_they_are() {
    let ledger = Ledger::start().await;
    for _ in 0..12 {
        let dead = ledger.report(None).await;
        let taken = ledger.take("w", dead).await;
        let verdict = Verdict::Dead { failure: failure() };
        ledger.postgres.finish(&run_of(&taken, None), &verdict, &[]).await.unwrap();
    }
    for _ in 0..3 {
        let done = ledger.report(None).await;
        ledger.succeeded(done, Value::Null).await;
    }
    ledger.aged("2 hours").await;
    let (mut place, mut looks) = (Place::default(), vec![]);
    for _ in 0..5 {
        let gone = ledger.postgres.expire_jobs(HOUR, 2, &mut place).await.unwrap();
        looks.push((gone, place.is_under_way()));
    }
    // A look goes through ten. Of one that removes all it may there can be more; the last begins with the oldest again.
    assert_eq!(looks, [(0, true), (2, true), (1, false), (0, true), (0, false)]);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 12);
}

#[tokio::test]
async fn expired_keys_go_in_bounded_batches() {
    let ledger = Ledger::start().await;
    let jobs: Vec<NewJob> = (0..5)
        .map(|number| NewJob {
            idempotency: Some(Idempotency {
                key: format!("k{number}"),
                scope: "s".to_owned(),
                ttl: if number == 0 { HOUR } else { Duration::ZERO },
                until: Until::Accepted,
            }),
            ..ingest("a")
        })
        .collect();
    ledger.accept(&jobs).await;
    assert_eq!(ledger.postgres.expire_keys(3).await.unwrap(), 3);
    assert_eq!(ledger.postgres.expire_keys(3).await.unwrap(), 1);
    assert_eq!(ledger.count("SELECT count(*) FROM idempotency_keys").await, 1);
}

/// A janitor's stores, of which only the ledger is there.
fn stores_of(ledger: &Ledger) -> Stores {
    let call_timeout = Duration::from_millis(300);
    let vectors = VectorsConfig { url: "http://127.0.0.1:1".to_owned(), api_key: None, call_timeout };
    let cache = CacheConfig { url: "redis://127.0.0.1:1".to_owned(), call_timeout, ..CacheConfig::default() };
    Stores::new(
        ledger.postgres.clone(),
        Vectors::lazy(&vectors).unwrap(),
        Cache::lazy(&cache).unwrap(),
        Arc::new(HashingEmbedder::new()),
        vec![],
        DocumentSettings::default(),
    )
}

#[tokio::test]
async fn a_task_of_retention_that_fails_keeps_no_other_from_its_turn_and_partitions_come_first() {
    let ledger = Ledger::start().await;
    let done = ledger.report(None).await;
    ledger.succeeded(done, json!({ "number": 1 })).await;
    let dead = ledger.report(None).await;
    let taken = ledger.take("w", dead).await;
    ledger.postgres.finish(&run_of(&taken, None), &Verdict::Dead { failure: failure() }, &[]).await.unwrap();
    let idempotency = Idempotency {
        key: "k".to_owned(),
        scope: "s".to_owned(),
        ttl: Duration::ZERO,
        until: Until::Accepted,
    };
    ledger.accept(&[NewJob { idempotency: Some(idempotency), ..ingest("a") }]).await;
    ledger.aged("1 minute").await;
    for sql in [
        "UPDATE dead_letters SET created_at = created_at - interval '2 hours'",
        // Nobody has made this month's: a letter can't be closed without it.
        "SELECT drop_audit_partitions(interval '-10 years')",
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a test''s'; END $$",
        "CREATE TRIGGER refuse BEFORE UPDATE OF result ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()",
    ] {
        sqlx::query(sql).execute(ledger.postgres.pool()).await.unwrap();
    }
    let settings = JanitorSettings {
        keep_results: Duration::ZERO,
        keep_letters: Some(HOUR),
        ..JanitorSettings::default()
    };
    let stop = CancellationToken::new();
    let janitor = tokio::spawn(janitor::run(stores_of(&ledger), settings, stop.clone()));
    let begun = Instant::now();
    loop {
        let closed = ledger.count("SELECT count(*) FROM dead_letters WHERE state = 'discarded'").await;
        let keys = ledger.count("SELECT count(*) FROM idempotency_keys").await;
        if (closed, keys) == (1, 0) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{closed} letters closed, {keys} keys left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.cancel();
    janitor.await.unwrap();
    assert_eq!(ledger.result(done).await, Some(json!({ "number": 1 })), "the task that fails");
}
