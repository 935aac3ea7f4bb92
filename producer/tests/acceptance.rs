//! Acceptance: what enqueue promises, with everything in order.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use producer::{
    Cancel, Change, Changed, Client, ClientSettings, Durability, EnqueueError, NewJob, Selection, WaitError,
    new_job,
};
use queue::{JobId, Priority};
use sagas::JobState;
use serde_json::json;
use support::{Stage, eventually, ids, ids_of, ingest, report, tenant, with_key};

#[tokio::test]
async fn the_same_id_twice_is_one_job() {
    let stage = Stage::new().await;
    let job = ingest("a", "one");
    for _ in 0..2 {
        let receipt = stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap();
        assert_eq!((receipt.id, receipt.duplicate), (job.id, false));
    }
    assert_eq!(stage.rows().await, 1);
    let seen = stage.postgres.job(job.id, None).await.unwrap().unwrap();
    assert_eq!(seen.doc_order, Some(1), "the second call took no place in the document's order");
    assert_eq!(ids_of(&stage.claim("ingest", 10).await), [job.id]);
}

#[tokio::test]
async fn a_key_with_the_same_request_is_a_duplicate_and_with_another_a_conflict() {
    let stage = Stage::new().await;
    let first = with_key(ingest("a", "one"), "upload-1");
    stage.client.enqueue(first.clone(), Durability::Durable).await.unwrap();
    let again =
        stage.client.enqueue(with_key(ingest("a", "one"), "upload-1"), Durability::Durable).await.unwrap();
    assert_eq!((again.id, again.duplicate), (first.id, true));
    let other = stage.client.enqueue(with_key(ingest("a", "two"), "upload-1"), Durability::Durable).await;
    assert!(matches!(&other, Err(EnqueueError::Conflict { job }) if *job == first.id), "{other:?}");
    // Another tenant's keys are its own.
    let mut theirs = with_key(ingest("a", "three"), "upload-1");
    theirs.tenant = tenant("globex");
    assert!(!stage.client.enqueue(theirs, Durability::Durable).await.unwrap().duplicate);
    assert_eq!(stage.rows().await, 2);
    assert_eq!(stage.depth("ingest").await, 2);
}

#[tokio::test]
async fn duplicates_inside_one_batch_are_folded() {
    let stage = Stage::new().await;
    let jobs = vec![
        with_key(ingest("a", "one"), "k"),
        with_key(ingest("a", "one"), "k"),
        with_key(ingest("a", "two"), "k"),
        ingest("a", "three"),
    ];
    let first = jobs[0].id;
    let outcomes = stage.client.enqueue_many(jobs, Durability::Durable).await.unwrap();
    assert!(!outcomes[0].as_ref().unwrap().duplicate);
    let folded = outcomes[1].as_ref().unwrap();
    assert_eq!((folded.id, folded.duplicate), (first, true));
    assert!(matches!(outcomes[2], Err(EnqueueError::Conflict { job }) if job == first));
    assert!(outcomes[3].is_ok());
    assert_eq!(stage.rows().await, 2);
    assert_eq!(stage.depth("ingest").await, 2);
}

#[tokio::test]
async fn array_order_is_the_order_of_jobs_on_one_document() {
    let stage = Stage::new().await;
    stage.client.enqueue(ingest("a", "zero"), Durability::Durable).await.unwrap();
    let delete = new_job("delete", tenant("acme"), json!({ "document": "a" })).unwrap();
    let jobs = vec![ingest("a", "one"), ingest("b", "one"), delete, ingest("a", "two")];
    let ids = ids(&jobs);
    for outcome in stage.client.enqueue_many(jobs, Durability::Durable).await.unwrap() {
        outcome.unwrap();
    }
    let mut orders = vec![];
    for id in ids {
        let job = stage.postgres.job(id, None).await.unwrap().unwrap();
        orders.push((job.document.unwrap(), job.doc_order.unwrap()));
    }
    let expected =
        [("a", 2), ("b", 1), ("a", 3), ("a", 4)].map(|(document, order)| (document.to_owned(), order));
    assert_eq!(orders, expected);
}

#[tokio::test]
async fn a_refused_job_of_a_batch_keeps_no_other_out() {
    let stage = Stage::new().await;
    let mut jobs: Vec<_> = (0..9).map(report).collect();
    // Refused by the checks; refused by the ledger alone, which knows no such parent; of an unknown tenant.
    jobs[1].payload = json!({ "nul": "\0" });
    jobs[4].parent = Some(JobId::new());
    jobs[7].tenant = tenant("nobody");
    let ids = ids(&jobs);
    let outcomes = stage.client.enqueue_many(jobs, Durability::Durable).await.unwrap();
    for (place, outcome) in outcomes.iter().enumerate() {
        match place {
            1 | 4 => assert!(matches!(outcome, Err(EnqueueError::BadRequest { .. })), "{place}: {outcome:?}"),
            7 => assert!(matches!(outcome, Err(EnqueueError::UnknownTenant)), "{outcome:?}"),
            _ => assert_eq!(outcome.as_ref().unwrap().id, ids[place]),
        }
    }
    assert_eq!(stage.rows().await, 6);
    assert_eq!(stage.depth("report").await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_enqueues_share_transactions_and_a_refused_one_fails_alone() {
    let stage = Stage::new().await;
    // From here on the tenant is known, so that the calls meet at the ledger and don't trickle in from looking it up.
    stage.client.enqueue(report(300), Durability::Durable).await.unwrap();
    let calls: Vec<_> = (0..300)
        .map(|number| {
            let client = stage.client.clone();
            tokio::spawn(async move {
                let mut job = report(number);
                if number == 137 {
                    job.parent = Some(JobId::new());
                }
                client.enqueue(job, Durability::Durable).await
            })
        })
        .collect();
    let mut refused = vec![];
    for (number, call) in calls.into_iter().enumerate() {
        if let Err(error) = call.await.unwrap() {
            refused.push((number, error.to_string()));
        }
    }
    assert_eq!(refused.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [137], "{refused:?}");
    assert_eq!(stage.rows().await, 300);
    assert_eq!(stage.depth("report").await, 300);
    let commits: i64 = sqlx::query_scalar("SELECT count(DISTINCT created_at) FROM jobs")
        .fetch_one(stage.postgres.pool())
        .await
        .unwrap();
    assert!(commits < 150, "{commits} transactions for 300 jobs");
}

#[tokio::test]
async fn a_tenant_over_its_limit_waits_until_its_jobs_have_left() {
    let settings = ClientSettings { max_waiting_per_tenant: 3, ..ClientSettings::default() };
    let stage = Stage::with(settings, |_| ()).await;
    for number in 0..3 {
        stage.client.enqueue(report(number), Durability::Durable).await.unwrap();
    }
    for durability in [Durability::Durable, Durability::Fast] {
        let error = stage.client.enqueue(report(3), durability).await.unwrap_err();
        assert!(
            matches!(error, EnqueueError::TenantFull { retry_after } if !retry_after.is_zero()),
            "{error:?}"
        );
    }
    // Others are not held up, nor is another queue.
    let mut theirs = report(4);
    theirs.tenant = tenant("globex");
    stage.client.enqueue(theirs, Durability::Durable).await.unwrap();
    stage.client.enqueue(ingest("a", "x"), Durability::Durable).await.unwrap();
    let claims = stage.claim("report", 10).await;
    let leases: Vec<_> = claims
        .iter()
        .map(|claim| queue::LeaseRef {
            id: claim.envelope.id,
            queue: claim.queue.clone(),
            partition: claim.partition,
            token: claim.token.clone(),
            envelope: claim.envelope.clone(),
            epoch: claim.epoch.clone(),
        })
        .collect();
    stage.queue.ack(&leases).await.unwrap();
    eventually(|| async {
        stage.client.enqueue(report(5), Durability::Durable).await.map_err(|error| error.to_string())
    })
    .await;
}

#[tokio::test]
async fn a_tenants_own_limit_comes_before_the_default() {
    let stage = Stage::new().await;
    sqlx::query("UPDATE tenants SET max_waiting = 1 WHERE id = 'acme'")
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    let outcomes =
        stage.client.enqueue_many((0..3).map(report).collect(), Durability::Durable).await.unwrap();
    assert!(outcomes[0].is_ok());
    assert!(
        outcomes[1..].iter().all(|outcome| matches!(outcome, Err(EnqueueError::TenantFull { .. }))),
        "{outcomes:?}"
    );
}

#[tokio::test]
async fn a_fast_job_is_in_redis_alone_and_carries_all_of_itself() {
    let stage = Stage::new().await;
    // Retention may have removed the parent by the time a worker takes the job.
    let job = NewJob { parent: Some(JobId::new()), ..report(1) };
    let receipt = stage.client.enqueue(job.clone(), Durability::Fast).await.unwrap();
    assert_eq!(receipt.id, job.id);
    assert_eq!(stage.rows().await, 0);
    let claims = stage.claim("report", 10).await;
    let carried: NewJob = serde_json::from_value(claims[0].envelope.fast.clone().unwrap()).unwrap();
    assert_eq!(carried, job);
    // What a worker does before it takes the job.
    stage.postgres.admit_fast(vec![carried]).await.unwrap();
    assert_eq!(stage.rows().await, 1);
    assert_eq!(stage.client.job(job.id, None).await.unwrap().unwrap().parent, None);
}

#[tokio::test]
async fn protocol_8_a_job_on_a_document_has_its_place_from_acceptance_on_also_when_asked_to_be_fast() {
    let stage = Stage::new().await;
    let older = stage.client.enqueue(ingest("a", "older"), Durability::Fast).await.unwrap().id;
    let batch = vec![ingest("a", "newer"), report(1)];
    let newer = stage.client.enqueue_many(batch, Durability::Fast).await.unwrap()[0].as_ref().unwrap().id;
    let mut orders = vec![];
    for id in [older, newer] {
        orders.push(stage.postgres.job(id, None).await.unwrap().expect("in the ledger").doc_order);
    }
    assert_eq!(orders, [Some(1), Some(2)]);
}

#[tokio::test]
async fn fast_jobs_that_wait_are_among_those_chosen_by_what_they_are() {
    let stage = Stage::with(ClientSettings::default(), |config| config.partitions = 3).await;
    let fast = async |jobs: Vec<NewJob>| {
        for outcome in stage.client.enqueue_many(jobs, Durability::Fast).await.unwrap() {
            outcome.unwrap();
        }
    };
    // More than Redis hands out at once.
    for first in [0, 500, 1000] {
        fast((first..first + 500).map(report).collect()).await;
    }
    let later = Some(chrono::Utc::now() + chrono::Duration::hours(1));
    fast(vec![NewJob { tenant: tenant("globex"), ..report(1) }, NewJob { run_at: later, ..report(2) }]).await;
    assert_eq!(stage.rows().await, 0);
    assert_eq!(stage.client.fast_by_key().await.unwrap(), [(None, 1502)].into());
    let which = |owner: &str| Selection {
        tenant: Some(owner.to_owned()),
        queue: Some(report(0).queue.to_string()),
        kind: Some("report".to_owned()),
        limit: 5000,
        ..Selection::default()
    };
    for (other, rows) in [
        (Selection { kind: Some("ingest".to_owned()), ..which("acme") }, 0),
        (Selection { queue: Some("elsewhere".to_owned()), ..which("acme") }, 0),
        (which("globex"), 1),
    ] {
        stage.client.settle_all_fast(&other).await.unwrap();
        assert_eq!(stage.rows().await, rows, "{other:?}");
    }
    for _ in 0..2 {
        stage.client.settle_all_fast(&which("acme")).await.unwrap();
        assert_eq!(stage.postgres.select_jobs(&which("acme")).await.unwrap().len(), 1501);
    }
    stage.client.settle_all_fast(&Selection::default()).await.unwrap();
    assert_eq!(stage.rows().await, 1502);
    assert_eq!(stage.client.fast_by_key().await.unwrap(), [].into());
}

#[tokio::test]
async fn fast_jobs_that_the_ledger_refuses_leave_redis_when_they_are_looked_for() {
    let stage = Stage::new().await;
    let twice = || with_key(report(1), "k");
    let first = stage.client.enqueue(twice(), Durability::Fast).await.unwrap().id;
    let second = stage.client.enqueue(twice(), Durability::Fast).await.unwrap().id;
    assert_eq!(stage.depth("report").await, 2);
    let met_twice = NewJob { id: first, ..twice() };
    assert_eq!(stage.postgres.admit_fast(vec![met_twice.clone(), met_twice]).await.unwrap(), []);
    stage.client.settle_all_fast(&Selection::default()).await.unwrap();
    assert_eq!(ids_of(&stage.claim("report", 10).await), [first]);
    assert!(stage.client.job(second, None).await.unwrap().is_none());
}

#[tokio::test]
async fn fast_jobs_come_into_the_ledger_in_id_order_so_that_two_who_bring_them_never_wait_for_each_other() {
    let stage = Stage::new().await;
    let (first, second) = (report(1), report(2));
    assert!(first.id < second.id);
    let insert = "INSERT INTO jobs (id, kind, queue, priority, tenant, payload, timeout_ms)
                  VALUES ($1, 'report', 'report', 5, 'acme', '{}', 1000)";
    let mut other = stage.postgres.begin().await.unwrap();
    sqlx::query(insert).bind(first.id.0).execute(&mut *other).await.unwrap();
    let bringing = tokio::spawn({
        let (postgres, jobs) = (stage.postgres.clone(), vec![second.clone(), first.clone()]);
        async move { postgres.admit_fast(jobs).await }
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO jobs%'";
    eventually(|| async {
        let waiting: i64 = sqlx::query_scalar(waits).fetch_one(stage.postgres.pool()).await.unwrap();
        if waiting == 1 { Ok(()) } else { Err(format!("{waiting} wait")) }
    })
    .await;
    // It waits for the first, and so has not the second.
    let mut theirs = stage.postgres.begin().await.unwrap();
    sqlx::query("SET LOCAL lock_timeout = '1s'").execute(&mut *theirs).await.unwrap();
    sqlx::query(insert).bind(second.id.0).execute(&mut *theirs).await.unwrap();
    theirs.rollback().await.unwrap();
    other.rollback().await.unwrap();
    assert_eq!(bringing.await.unwrap().unwrap(), []);
    assert_eq!(stage.rows().await, 2);
}

#[tokio::test]
async fn a_fast_job_that_waits_is_seen_changed_and_cancelled_as_any_other() {
    let stage = Stage::new().await;
    let mut seen = vec![];
    for number in 0..2 {
        seen.push(stage.client.enqueue(report(number), Durability::Fast).await.unwrap().id);
    }
    assert_eq!(stage.rows().await, 0);
    let (cancelled, moved) = (seen[0], seen[1]);
    assert!(stage.client.job(cancelled, Some("other")).await.unwrap().is_none());
    assert_eq!(stage.client.cancel(cancelled, Some("other")).await.unwrap(), Cancel::Unknown);
    assert_eq!(stage.rows().await, 0, "nobody else's");
    let job = stage.client.job(cancelled, Some("acme")).await.unwrap().unwrap();
    assert_eq!((job.state, job.kind.as_str()), (JobState::Waiting, "report"));
    assert_eq!(stage.client.cancel(cancelled, None).await.unwrap(), Cancel::Cancelled);
    let change = Change { priority: Some(Priority::HIGHEST), run_at: None };
    assert_eq!(
        stage.client.change(&[moved, JobId::new()], None, change).await.unwrap(),
        [Changed::Done, Changed::Unknown]
    );

    let claims = stage.claim("report", 10).await;
    assert_eq!(
        claims.iter().map(|claim| (claim.envelope.id, claim.envelope.priority)).collect::<Vec<_>>(),
        [(moved, Priority::HIGHEST)]
    );
    // The worker that claims it brings its record along, which the ledger has by now.
    let carried = serde_json::from_value(claims[0].envelope.fast.clone().unwrap()).unwrap();
    stage.postgres.admit_fast(vec![carried]).await.unwrap();
    assert_eq!(stage.rows().await, 2);
    assert_eq!(stage.client.job(moved, None).await.unwrap().unwrap().priority, 9);
}

#[tokio::test]
async fn a_fast_job_too_large_for_redis_is_accepted_in_the_ledger() {
    let stage = Stage::new().await;
    let large = new_job("report", tenant("acme"), json!({ "text": "x".repeat(5000) })).unwrap();
    stage.client.enqueue(large, Durability::Fast).await.unwrap();
    assert_eq!(stage.rows().await, 1);
    assert_eq!(stage.claim("report", 10).await[0].envelope.fast, None);
}

#[tokio::test]
async fn a_fast_job_finds_a_full_window_and_a_durable_one_waits_in_the_ledger() {
    let stage = Stage::with(ClientSettings::default(), |config| config.window = 2).await;
    for number in 0..2 {
        stage.client.enqueue(report(number), Durability::Fast).await.unwrap();
    }
    let error = stage.client.enqueue(report(2), Durability::Fast).await.unwrap_err();
    assert!(matches!(error, EnqueueError::QueueFull { .. }), "{error:?}");
    stage.client.enqueue(report(3), Durability::Durable).await.unwrap();
    assert_eq!((stage.depth("report").await, stage.postgres.undispatched_count().await.unwrap()), (2, 1));
}

#[tokio::test]
async fn without_a_queue_the_ledger_alone_accepts() {
    let stage = Stage::new().await;
    let client = Client::new(stage.postgres.clone(), None, ClientSettings::default());
    client.enqueue(report(1), Durability::Durable).await.unwrap();
    assert_eq!(stage.postgres.undispatched_count().await.unwrap(), 1);
}

#[tokio::test]
async fn a_waiting_job_is_cancelled_at_once_and_leaves_its_list() {
    let stage = Stage::new().await;
    let mut later = report(1);
    later.run_at = Some(chrono::Utc::now() + Duration::from_secs(3600));
    for job in [report(0), later] {
        stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap();
        assert_eq!(stage.client.cancel(job.id, Some("globex")).await.unwrap(), Cancel::Unknown);
        assert_eq!(stage.client.cancel(job.id, Some("acme")).await.unwrap(), Cancel::Cancelled);
        assert_eq!(stage.client.cancel(job.id, Some("acme")).await.unwrap(), Cancel::Ended);
        let seen = stage.client.wait(job.id, Duration::from_secs(1)).await.unwrap();
        assert_eq!(seen.state, "cancelled");
    }
    assert_eq!((stage.depth("report").await, stage.scheduled("report").await), (0, 0));
}

#[tokio::test]
async fn waiting_ends_in_time_and_says_what_was_seen() {
    let stage = Stage::new().await;
    let job = report(1);
    stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap();
    let error = stage.client.wait(job.id, Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(&error, WaitError::Timeout { state: JobState::Waiting, .. }), "{error:?}");
    let nobody = JobId::new();
    assert_eq!(stage.client.wait(nobody, Duration::ZERO).await.unwrap_err(), WaitError::Unknown(nobody));
}

#[tokio::test]
async fn limits_are_named_with_the_value_seen() {
    let settings =
        ClientSettings { max_payload: 100, max_batch: 2, max_batch_bytes: 150, ..ClientSettings::default() };
    let stage = Stage::with(settings, |_| ()).await;
    let large = ingest("a", &"x".repeat(100));
    let error = stage.client.enqueue(large, Durability::Durable).await.unwrap_err();
    assert!(matches!(error, EnqueueError::TooLarge { limit: 100, .. }), "{error:?}");
    let three = (0..3).map(report).collect();
    let error = stage.client.enqueue_many(three, Durability::Durable).await.unwrap_err();
    assert_eq!(error.to_string(), "the batch has 3 jobs: at most 2 are allowed");
    let heavy = (0..2).map(|n| ingest(&n.to_string(), &"x".repeat(60))).collect();
    let error = stage.client.enqueue_many(heavy, Durability::Durable).await.unwrap_err();
    assert!(matches!(error, EnqueueError::TooLarge { limit: 150, .. }), "{error:?}");
    assert_eq!(stage.rows().await, 0);
}
