//! Rule 19, keys that are held until their job has ended.

use std::time::Duration;

use queue::JobId;
use sagas::stores::postgres::{
    accept::{Accepted, Idempotency, NewJob, Until},
    ending::Verdict,
};
use serde_json::json;
use sqlx::Row;

use crate::ledger::{HOUR, Ledger, failure, ingest, retry, run_of};

fn held(document: &str, ttl: Duration) -> NewJob {
    let idempotency = Idempotency { key: "k".to_owned(), scope: "s".to_owned(), ttl, until: Until::Finished };
    NewJob { idempotency: Some(idempotency), ..ingest(document) }
}

async fn accept(ledger: &Ledger, job: &NewJob) -> Accepted {
    ledger.postgres.accept(std::slice::from_ref(job), true).await.unwrap().remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_19_fifty_at_once_with_one_key_are_one_job_and_after_its_end_one_again() {
    let ledger = Ledger::start().await;
    for round in 1..=3 {
        let jobs: Vec<NewJob> = (0..50).map(|_| held("a", Duration::ZERO)).collect();
        let accepts = jobs.iter().map(|job| ledger.postgres.accept(std::slice::from_ref(job), true));
        let replies: Vec<Accepted> =
            futures::future::join_all(accepts).await.into_iter().flat_map(Result::unwrap).collect();
        let new: Vec<JobId> =
            replies.iter().filter_map(|r| if let Accepted::New(id) = r { Some(*id) } else { None }).collect();
        assert_eq!(new.len(), 1, "round {round}: {replies:?}");
        assert_eq!(replies.iter().filter(|r| **r == Accepted::Duplicate(new[0])).count(), 49);
        assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, round);
        let taken = ledger.take("w", new[0]).await;
        assert!(ledger.postgres.complete(&run_of(&taken, None), &json!({}), &[]).await.unwrap());
    }
}

#[tokio::test]
async fn rule_19_a_key_is_held_as_long_as_its_job_waits_runs_and_is_tried_again() {
    let ledger = Ledger::start().await;
    let first = held("a", Duration::ZERO);
    assert_eq!(accept(&ledger, &first).await, Accepted::New(first.id));
    let same = || held("a", Duration::ZERO);
    assert_eq!(accept(&ledger, &same()).await, Accepted::Duplicate(first.id), "it waits");
    let taken = ledger.take("w", first.id).await;
    assert_eq!(accept(&ledger, &same()).await, Accepted::Duplicate(first.id), "it runs");
    assert_eq!(accept(&ledger, &held("b", Duration::ZERO)).await, Accepted::Conflict(first.id));
    ledger.postgres.finish(&run_of(&taken, None), &retry(Duration::ZERO), &[]).await.unwrap();
    assert_eq!(accept(&ledger, &same()).await, Accepted::Duplicate(first.id), "it waits for its next try");
    let taken = ledger.take("w", first.id).await;
    let dead = Verdict::Dead { failure: failure() };
    ledger.postgres.finish(&run_of(&taken, None), &dead, &[]).await.unwrap();
    // Freed by the end, whatever it was; also for another request.
    let next = held("b", Duration::ZERO);
    assert_eq!(accept(&ledger, &next).await, Accepted::New(next.id));
}

#[tokio::test]
async fn rule_19_after_its_jobs_end_a_key_is_held_for_its_time() {
    let ledger = Ledger::start().await;
    let first = held("a", HOUR);
    accept(&ledger, &first).await;
    let taken = ledger.take("w", first.id).await;
    ledger.postgres.complete(&run_of(&taken, None), &json!({ "n": 1 }), &[]).await.unwrap();
    assert_eq!(accept(&ledger, &held("a", HOUR)).await, Accepted::Duplicate(first.id));
    // The janitor leaves it, too.
    assert_eq!(ledger.postgres.expire_keys(100).await.unwrap(), 0);
    sqlx::query("UPDATE jobs SET finished_at = now() - interval '61 minutes'")
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    let next = held("a", HOUR);
    assert_eq!(accept(&ledger, &next).await, Accepted::New(next.id));
}

#[tokio::test]
async fn rule_19_a_key_is_held_as_long_as_its_job_is_parked() {
    let ledger = Ledger::start().await;
    let first = held("a", Duration::ZERO);
    accept(&ledger, &first).await;
    let by_sql = async || -> JobId {
        let sql =
            "SELECT enqueue('report', '{}', 'acme', idempotency_key => 'k', idempotency_ttl => interval '0',
                                  idempotency_until => 'finished')";
        JobId(sqlx::query_scalar(sql).fetch_one(ledger.postgres.pool()).await.unwrap())
    };
    let other = by_sql().await;
    for id in [first.id, other] {
        ledger.take("w", id).await;
        let parked =
            sqlx::query("UPDATE jobs SET state = 'parked', finished_at = now() WHERE id = $1").bind(id.0);
        parked.execute(ledger.postgres.pool()).await.unwrap();
    }
    assert_eq!(accept(&ledger, &held("a", Duration::ZERO)).await, Accepted::Duplicate(first.id));
    assert_eq!(by_sql().await, other);
}

#[tokio::test]
async fn rule_19_keys_inside_one_batch_are_folded_whatever_they_are_held_for() {
    let ledger = Ledger::start().await;
    let batch = [held("a", HOUR), held("a", Duration::ZERO), held("b", HOUR)];
    let replies = ledger.postgres.accept(&batch, true).await.unwrap();
    let id = batch[0].id;
    assert_eq!(replies, [Accepted::New(id), Accepted::Duplicate(id), Accepted::Conflict(id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_19_the_sql_function_holds_keys_until_the_end_as_well() {
    let ledger = Ledger::start().await;
    let enqueue = |number: i32| {
        let pool = ledger.postgres.pool().clone();
        async move {
            sqlx::query(
                "SELECT enqueue('report', jsonb_build_object('n', $1::integer), 'acme', idempotency_key => 'k',
                                idempotency_ttl => interval '0', idempotency_until => 'finished') AS id",
            )
            .bind(number)
            .fetch_one(&pool)
            .await
            .map(|row| JobId(row.get("id")))
        }
    };
    let first = enqueue(1).await.unwrap();
    for again in futures::future::join_all((0..20).map(|_| enqueue(1))).await {
        assert_eq!(again.unwrap(), first);
    }
    let error = enqueue(2).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("23505"), "{error}");
    let taken = ledger.take("w", first).await;
    ledger.postgres.complete(&run_of(&taken, None), &json!({}), &[]).await.unwrap();
    let seconds: Vec<JobId> = futures::future::join_all((0..20).map(|_| enqueue(2)))
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(seconds.iter().all(|id| *id == seconds[0] && *id != first), "{seconds:?}");
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 2);
    let odd = sqlx::query(
        "SELECT enqueue('report', '{}', 'acme', idempotency_key => 'x', idempotency_until => 'never')",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap_err();
    assert_eq!(odd.as_database_error().unwrap().code().as_deref(), Some("22023"), "{odd}");
}

#[tokio::test]
async fn a_role_that_holds_no_keys_until_the_end_needs_no_right_to_read_jobs() {
    let ledger = Ledger::start().await;
    for statement in [
        "CREATE ROLE app LOGIN",
        "GRANT USAGE ON SCHEMA flotilla TO app",
        "GRANT SELECT, INSERT, UPDATE ON documents, idempotency_keys TO app",
        "GRANT INSERT ON jobs TO app",
    ] {
        sqlx::query(statement).execute(ledger.postgres.pool()).await.unwrap();
    }
    let call = |until: &'static str| {
        let postgres = ledger.postgres.clone();
        async move {
            let mut tx = postgres.begin().await.unwrap();
            sqlx::query("SET LOCAL ROLE app").execute(&mut *tx).await.unwrap();
            let done = sqlx::query(
                "SELECT enqueue('report', '{}', 'acme', idempotency_key => $1, idempotency_until => $1)",
            )
            .bind(until)
            .execute(&mut *tx)
            .await;
            if done.is_ok() {
                tx.commit().await.unwrap();
            }
            done
        }
    };
    for _ in 0..2 {
        call("accepted").await.unwrap();
    }
    call("finished").await.unwrap();
    // Only to ask whether the key's job has ended.
    assert!(call("finished").await.unwrap_err().to_string().contains("permission denied"));
    sqlx::query("GRANT SELECT (id, finished_at) ON jobs TO app")
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    call("finished").await.unwrap();
}
