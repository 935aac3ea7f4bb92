//! Acceptance while a store is down or hangs, and when a commit's reply is lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use devstack::testing::TestServices;
use producer::{Client, ClientSettings, Durability, EnqueueError, Selection};
use queue::Queue;
use sagas::stores::postgres::{Postgres, PostgresConfig};
use support::{
    Maintenance, Stage, eventually, ids, ingest, migrated,
    proxy::{Next, Proxy},
    queue_config, quick, report, with_key,
};

/// A client whose way to Postgres can be broken, and a ledger handle of the test's own.
struct Broken {
    proxy: Proxy,
    client: Client,
    ledger: Postgres,
    queue: Queue,
    _services: TestServices,
}

impl Broken {
    async fn new(settings: ClientSettings) -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let ledger = migrated(&services).await;
        let port = services.postgres().port();
        let proxy = Proxy::to(port).await;
        let way = Postgres::lazy(&PostgresConfig::new(proxy.url(services.postgres().url(), port))).unwrap();
        let queue = Queue::lazy(queue_config(&services)).unwrap();
        let client = Client::new(way, Some(queue.clone()), settings);
        Self { proxy, client, ledger, queue, _services: services }
    }

    async fn rows(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM jobs").fetch_one(self.ledger.pool()).await.unwrap()
    }

    async fn depth(&self, queue: &str) -> u64 {
        self.queue.stats(&support::name(queue)).await.unwrap().depth()
    }
}

#[tokio::test]
async fn a_commit_whose_reply_was_lost_is_found_and_not_done_twice() {
    let stage = Broken::new(ClientSettings::default()).await;
    for lost in [Next::LoseReply, Next::LoseCommit] {
        let before = (stage.rows().await, stage.depth("ingest").await);
        let job = with_key(ingest("a", "one"), &format!("{lost:?}"));
        stage.proxy.set(lost);
        let receipt = stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap();
        assert!(stage.proxy.is(Next::Pass), "{lost:?}: the fault never came");
        assert_eq!((receipt.id, receipt.duplicate), (job.id, false), "{lost:?}");
        assert_eq!(
            (stage.rows().await, stage.depth("ingest").await),
            (before.0 + 1, before.1 + 1),
            "{lost:?}"
        );
    }
}

#[tokio::test]
async fn a_batch_whose_commit_reply_was_lost_is_found_with_its_duplicates() {
    let stage = Broken::new(ClientSettings::default()).await;
    for lost in [Next::LoseReply, Next::LoseCommit] {
        let key = format!("{lost:?}");
        let jobs =
            vec![with_key(report(1), &key), report(2), with_key(report(1), &key), with_key(report(9), &key)];
        let ids = ids(&jobs);
        stage.proxy.set(lost);
        let outcomes = stage.client.enqueue_many(jobs, Durability::Durable).await.unwrap();
        assert!(stage.proxy.is(Next::Pass), "{lost:?}: the fault never came");
        let receipts: Vec<_> =
            outcomes[..3].iter().map(|o| o.as_ref().map(|r| (r.id, r.duplicate)).unwrap()).collect();
        assert_eq!(receipts, [(ids[0], false), (ids[1], false), (ids[0], true)], "{lost:?}");
        assert!(
            matches!(outcomes[3], Err(EnqueueError::Conflict { job }) if job == ids[0]),
            "{:?}",
            outcomes[3]
        );
    }
    assert_eq!((stage.rows().await, stage.depth("report").await), (4, 4));
}

#[tokio::test]
async fn an_outcome_that_nobody_can_tell_is_not_called_a_failure() {
    let settings = ClientSettings { settle_within: Duration::from_millis(700), ..ClientSettings::default() };
    let stage = Broken::new(settings).await;
    let job = with_key(report(1), "k");
    stage.proxy.set(Next::LoseReplyAndAll);
    let error = stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap_err();
    assert!(matches!(error, EnqueueError::OutcomeUnknown { job: id, .. } if id == job.id), "{error:?}");
    assert_eq!(stage.rows().await, 1, "it was committed, and the error names the job to ask for");
    stage.proxy.set(Next::Pass);
    eventually(|| async {
        let again = stage.client.enqueue(job.clone(), Durability::Durable).await;
        again.map(|receipt| assert_eq!(receipt.id, job.id)).map_err(|error| error.to_string())
    })
    .await;
    assert_eq!((stage.rows().await, stage.depth("report").await), (1, 1));
}

#[tokio::test]
async fn a_ledger_that_may_only_be_read_from_has_begun_nothing() {
    let stage = Stage::new().await;
    for sql in ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"] {
        sqlx::raw_sql(sql).execute(stage.client.postgres().pool()).await.unwrap();
    }
    // The server's sessions hear of it one after the other.
    eventually(|| async {
        match stage.client.enqueue(report(1), Durability::Durable).await {
            Ok(_) => Err("it was accepted"),
            Err(error) => {
                assert!(matches!(error, EnqueueError::Unavailable { .. }), "{error:?}");
                Ok(())
            }
        }
        .map_err(str::to_owned)
    })
    .await;
}

#[tokio::test]
async fn a_fast_job_whose_push_got_no_answer_is_not_called_a_failure() {
    let stage = Stage::with(ClientSettings::default(), |config| {
        config.response_timeout = Duration::from_millis(500);
    })
    .await;
    stage.client.enqueue(report(0), Durability::Durable).await.unwrap();
    // Redis can be looked at, but the push hangs; and then the ledger isn't there either.
    let mut redis = stage.redis().await;
    redis::cmd("CLIENT").arg("PAUSE").arg(60_000).arg("WRITE").exec_async(&mut redis).await.unwrap();
    stage.services.postgres().kill9().await.unwrap();
    let job = report(1);
    let error = stage.client.enqueue(job.clone(), Durability::Fast).await.unwrap_err();
    assert!(matches!(error, EnqueueError::OutcomeUnknown { job: id, .. } if id == job.id), "{error:?}");
    redis::cmd("CLIENT").arg("UNPAUSE").exec_async(&mut redis).await.unwrap();
    stage.services.postgres().restart().await.unwrap();
}

#[tokio::test]
async fn a_job_that_the_ledger_does_not_know_may_be_in_a_queue_that_is_away() {
    let stage = Stage::new().await;
    let job = stage.client.enqueue(report(0), Durability::Fast).await.unwrap().id;
    stage.services.redis_queue().pause().await.unwrap();
    let gone = stage.client.job(job, None).await.unwrap_err();
    assert!(gone.is_unavailable(), "{gone}");
    let gone = stage.client.cancel(job, None).await.unwrap_err();
    assert!(gone.is_unavailable(), "{gone}");
    let gone = stage.client.settle_all_fast(&Selection::default()).await.unwrap_err();
    assert!(gone.is_unavailable(), "{gone}");
    let without = Client::new(stage.postgres.clone(), None, ClientSettings::default());
    assert!(without.settle_all_fast(&Selection::default()).await.unwrap_err().is_unavailable());
    stage.services.redis_queue().resume().await.unwrap();
    eventually(|| async { stage.client.cancel(job, None).await.map_err(|error| error.to_string()) }).await;
}

#[tokio::test]
async fn with_the_queue_down_a_durable_enqueue_goes_on_and_the_relay_dispatches_later() {
    let stage = Stage::new().await;
    stage.client.enqueue(report(0), Durability::Durable).await.unwrap();
    stage.services.redis_queue().kill9().await.unwrap();
    let maintenance = stage.maintain(quick());
    for number in 1..4 {
        stage.client.enqueue(report(number), Durability::Durable).await.unwrap();
    }
    // It can't be in Redis, so it is in the ledger.
    stage.client.enqueue(report(4), Durability::Fast).await.unwrap();
    let batch = (5..8).map(report).collect();
    for outcome in stage.client.enqueue_many(batch, Durability::Durable).await.unwrap() {
        outcome.unwrap();
    }
    assert_eq!(stage.rows().await, 8);
    assert_eq!(stage.postgres.undispatched_count().await.unwrap(), 7);
    stage.services.redis_queue().restart().await.unwrap();
    // All eight: a killed Redis may have lost even the first, which it had not written yet; then the reconciler finds it.
    eventually(|| async {
        let left = stage.postgres.undispatched_count().await.unwrap();
        if left > 0 {
            return Err(format!("{left} jobs are not relayed"));
        }
        let depth = stage.depth("report").await;
        if depth == 8 { Ok(()) } else { Err(format!("depth {depth}")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_hung_queue_delays_the_first_enqueue_only() {
    // Long enough not to be mistaken for a commit on a busy machine.
    const HANG: Duration = Duration::from_secs(3);
    let stage = Stage::with(ClientSettings::default(), |config| {
        config.response_timeout = HANG;
        config.connect_timeout = HANG;
    })
    .await;
    stage.client.enqueue(report(0), Durability::Durable).await.unwrap();
    stage.services.redis_queue().pause().await.unwrap();
    let first = Instant::now();
    stage.client.enqueue(report(1), Durability::Durable).await.unwrap();
    assert!(first.elapsed() < HANG * 2, "{:?}: waited more than once", first.elapsed());
    // Not each of them: after two seconds one caller tries the queue again, and those may be over on a busy machine.
    let mut quickest = Duration::MAX;
    for number in 2..5 {
        let next = Instant::now();
        stage.client.enqueue(report(number), Durability::Durable).await.unwrap();
        quickest = quickest.min(next.elapsed());
    }
    assert!(quickest < HANG, "{quickest:?}: waited for a queue known to hang");
    stage.services.redis_queue().resume().await.unwrap();
    let maintenance = stage.maintain(quick());
    eventually(|| async {
        let stats = stage.queue.stats(&support::name("report")).await.map_err(|error| error.to_string())?;
        if stats.depth() == 5 { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn without_the_ledger_enqueue_says_so_in_time_and_nothing_was_accepted() {
    let stage = Stage::new().await;
    stage.client.enqueue(report(0), Durability::Durable).await.unwrap();
    for hang in [true, false] {
        if hang {
            stage.services.postgres().pause().await.unwrap();
        } else {
            stage.services.postgres().kill9().await.unwrap();
        }
        let begun = Instant::now();
        let error = stage.client.enqueue(report(1), Durability::Durable).await.unwrap_err();
        assert!(matches!(error, EnqueueError::Unavailable { .. }), "hang {hang}: {error:?}");
        assert!(error.retry_after().is_some_and(|after| !after.is_zero()));
        let error = stage.client.enqueue_many(vec![report(2)], Durability::Durable).await.unwrap_err();
        assert!(matches!(error, EnqueueError::Unavailable { .. }), "hang {hang}: {error:?}");
        // Twice `connect_within`; an acceptance that was begun would be asked for much longer.
        assert!(begun.elapsed() < Duration::from_secs(10), "hang {hang}: {:?}", begun.elapsed());
        // Accepted means nothing but Redis here, and Redis is there.
        stage.client.enqueue(report(3), Durability::Fast).await.unwrap();
        if hang {
            stage.services.postgres().resume().await.unwrap();
        } else {
            stage.services.postgres().restart().await.unwrap();
        }
        eventually(|| async {
            stage.postgres.probe().await.map_err(|error| error.to_string())?;
            let rows = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM jobs")
                .fetch_one(stage.postgres.pool())
                .await;
            rows.map(|rows| assert_eq!(rows, 1, "hang {hang}")).map_err(|error| error.to_string())
        })
        .await;
    }
}

#[tokio::test]
async fn the_loops_wait_for_both_stores_and_end_when_told() {
    let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
    let ledger = migrated(&services).await;
    ledger.accept(&[report(1)], false).await.unwrap();
    services.postgres().kill9().await.unwrap();
    services.redis_queue().kill9().await.unwrap();
    let postgres = Postgres::lazy(&PostgresConfig::new(services.postgres().url())).unwrap();
    let queue = Queue::lazy(queue_config(&services)).unwrap();
    // Without either store: started, and stopped.
    Maintenance::start(postgres.clone(), queue.clone(), quick()).stop().await;
    let maintenance = Maintenance::start(postgres, queue.clone(), quick());
    services.postgres().restart().await.unwrap();
    services.redis_queue().restart().await.unwrap();
    eventually(|| async {
        let stats = queue.stats(&support::name("report")).await.map_err(|error| error.to_string())?;
        if stats.depth() == 1 { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    maintenance.stop().await;
}
