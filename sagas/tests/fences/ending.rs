//! Rules 12, 17 and 20: how jobs end, what a retry keeps, and answers that got lost.

use std::{sync::Arc, time::Duration};

use sagas::{
    coalescing::{Batch, Coalescer, Limits},
    error::Class,
    stores::postgres::{
        ending::Verdict,
        publish::Published,
        stage::StageBatch,
        take::{StepRecord, Take},
    },
};
use tokio::time::Instant;

use crate::ledger::{HOUR, Ledger, failure, publish_of, retry, run_of, stage_of};

fn step(name: &str) -> StepRecord {
    let now = chrono::Utc::now();
    StepRecord {
        step: name.to_owned().into(),
        compensation: false,
        attempts: 1,
        started_at: now,
        ended_at: now,
        error: None,
    }
}

#[tokio::test]
async fn protocol_12_death_is_one_transaction_job_letter_and_run_or_nothing() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let (run, dead) = (run_of(&job, Some(stage.saga.id)), Verdict::Dead { failure: failure() });
    // A letter that is in the way fails the last of its writes.
    sqlx::query(
        "INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload)
         SELECT uuid7(), id, tenant, kind, queue, 'in_the_way', '', '{}' FROM jobs",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    let before = ledger.snapshot().await;
    ledger.postgres.finish(&run, &dead, &[step("stage")]).await.unwrap_err();
    assert_eq!(ledger.snapshot().await, before, "half a death");
    sqlx::query("DELETE FROM dead_letters").execute(ledger.postgres.pool()).await.unwrap();

    assert!(ledger.postgres.finish(&run, &dead, &[step("stage")]).await.unwrap());
    assert_eq!(ledger.state(job.id).await.0, "dead");
    let letter = ledger.postgres.dead_letter(job.id.0).await.unwrap().unwrap();
    assert_eq!((letter.class.as_str(), letter.saga_id), ("test", Some(stage.saga.id)));
    assert_eq!(ledger.postgres.saga(stage.saga.id).await.unwrap().unwrap().state, "compensated");
    assert_eq!(ledger.postgres.attempts(job.id).await.unwrap().len(), 1);
    assert_eq!(ledger.postgres.steps(stage.saga.id).await.unwrap().len(), 1);
}

#[tokio::test]
async fn protocol_12_a_job_without_a_run_dies_through_the_same_function_once() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let (run, dead) = (run_of(&job, None), Verdict::Dead { failure: failure() });
    assert!(ledger.postgres.finish(&run, &dead, &[]).await.unwrap());
    assert!(!ledger.postgres.finish(&run, &dead, &[]).await.unwrap());
    assert_eq!(ledger.count("SELECT count(*) FROM dead_letters").await, 1);
    let letter = ledger.postgres.dead_letter(job.id.0).await.unwrap().unwrap();
    assert_eq!((letter.saga_id, letter.state.as_str()), (None, "open"));
}

#[tokio::test]
async fn protocol_17_a_retry_due_in_an_hour_stays_due_in_an_hour_in_the_ledger() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    assert!(ledger.postgres.finish(&run_of(&job, None), &retry(HOUR), &[]).await.unwrap());
    let view = ledger.postgres.job(job.id, None).await.unwrap().unwrap();
    assert_eq!((view.state.as_str(), view.attempts), ("waiting", 1));
    // What Redis says of it does not count.
    let take = ledger.takes("w", &[job.id]).await.remove(0);
    let Take::NotYet(wait) = take else { panic!("{take:?}") };
    assert!((HOUR * 59 / 60..=HOUR).contains(&wait), "{wait:?}");
}

#[tokio::test]
async fn protocol_20_a_publish_whose_reply_was_lost_is_read_back_not_repeated() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let publish = publish_of(&job, &stage);
    assert_eq!(ledger.publish(std::slice::from_ref(&publish)).await, [Published::Yes]);
    let before = ledger.snapshot().await;
    assert_eq!(ledger.publish(&[publish]).await, [Published::LeaseLost]);
    assert_eq!(ledger.snapshot().await, before);
    let standing = ledger.postgres.standing(job.id).await.unwrap();
    assert_eq!(standing, Some(("succeeded".to_owned(), job.fence)));
}

#[tokio::test]
async fn protocol_20_a_stage_whose_reply_was_lost_is_the_same_stage() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let before = ledger.snapshot().await;
    assert_eq!(StageBatch(ledger.postgres.clone()).flush(&[stage]).await.unwrap(), [true]);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_20_a_bad_item_of_a_coalesced_stage_fails_alone() {
    let ledger = Ledger::start().await;
    let limits = Limits { in_flight: 1, ..Limits::default() };
    let coalescer = Coalescer::spawn(StageBatch(ledger.postgres.clone()), limits);
    let mut stages = vec![];
    for n in 0..16 {
        let job = ledger.take("w", ledger.ingest(&format!("d{n}")).await).await;
        let mut stage = stage_of(&job);
        if n == 11 {
            // 22021: Postgres has no NUL in a text.
            stage.version.chunks[1] = "a\0b".to_owned();
        }
        stages.push(Arc::new(stage));
    }
    // One connection is held up, so that the others meet in batches.
    let deadline = Instant::now() + Duration::from_secs(20);
    let calls = stages.iter().map(|stage| coalescer.call(Arc::clone(stage), deadline));
    for (n, reply) in futures::future::join_all(calls).await.into_iter().enumerate() {
        match reply {
            Ok(staged) => assert!(staged && n != 11, "{n}: {staged}"),
            Err(error) => assert!(n == 11 && error.class == Class::Data, "{n}: {error}"),
        }
    }
    assert_eq!(ledger.count("SELECT count(*) FROM sagas").await, 15);
    assert_eq!(ledger.count("SELECT count(*) FROM chunks").await, 30);
}

#[tokio::test]
async fn protocol_20_a_begin_that_was_given_up_takes_no_later_write_with_it() {
    let services = devstack::testing::TestServices::builder().postgres().start().await.unwrap();
    let mut config = sagas::stores::postgres::PostgresConfig::new(services.postgres().url());
    config.max_connections = 1;
    let postgres = sagas::stores::postgres::Postgres::connect(&config).await.unwrap();
    postgres.migrate_up().await.unwrap();
    for begin in ["BEGIN", "BEGIN READ ONLY"] {
        // The connection is there, so that only the answer to the BEGIN is missing. It goes back by a task of its own.
        sqlx::query("SELECT 1").execute(postgres.pool()).await.unwrap();
        while postgres.pool().num_idle() == 0 {
            tokio::task::yield_now().await;
        }
        services.postgres().pause().await.unwrap();
        let given_up =
            tokio::time::timeout(std::time::Duration::from_millis(300), postgres.begin_with(begin)).await;
        services.postgres().resume().await.unwrap();
        assert!(given_up.is_err(), "it was answered while the server was paused");
        let tenant = if begin == "BEGIN" { "one" } else { "two" };
        postgres.create_tenant(tenant).await.unwrap();
        let other = sagas::stores::postgres::Postgres::connect(&config).await.unwrap();
        let seen: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM tenants WHERE id = $1)")
            .bind(tenant)
            .fetch_one(other.pool())
            .await
            .unwrap();
        assert!(seen, "after a {begin} that was given up, a write was acknowledged and is not there");
    }
}
