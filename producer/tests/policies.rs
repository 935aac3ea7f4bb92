//! Policies are committed in Postgres first; Redis holds a copy that comes back by itself (PROTOCOL.md 17).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use producer::{ClientSettings, Durability, EnqueueError};
use queue::{Claim, QueuePolicy, Rate, TenantPolicy};
use sagas::stores::postgres::policies::{QueueRow, TenantRow};
use support::{Stage, eventually, name, quick, report, tenant};

async fn edit(stage: &Stage, queue: &str, edit: impl FnOnce(&mut QueuePolicy) + Send) -> QueueRow {
    stage.postgres.edit_queue_policy(&name(queue), "tester", "queues.test", edit).await.unwrap()
}

async fn edit_tenant(
    stage: &Stage,
    queue: Option<&str>,
    edit: impl FnOnce(&mut Option<TenantPolicy>) + Send,
) -> TenantRow {
    let queue = queue.map(name);
    stage
        .postgres
        .edit_tenant_policy(&tenant("acme"), queue.as_ref(), "tester", "tenants.test", edit)
        .await
        .unwrap()
        .unwrap()
}

/// A claim that finds policies missing asks for them, as a worker's does each second.
async fn claims_until(stage: &Stage, count: usize) -> Vec<Claim> {
    let held = std::sync::Mutex::new(Vec::new());
    eventually(|| async {
        let claims = stage.claim("report", 10).await;
        let mut held = held.lock().unwrap();
        held.extend(claims);
        if held.len() >= count { Ok(()) } else { Err(format!("{} jobs were claimed", held.len())) }
    })
    .await;
    held.into_inner().unwrap()
}

#[tokio::test]
async fn rule_17_a_paused_queue_is_paused_after_flushall() {
    let stage = Stage::new().await;
    stage.queue.require_policies();
    edit(&stage, "report", |policy| policy.paused = true).await;
    let maintenance = stage.maintain(quick());
    for number in 0..3 {
        stage.client.enqueue(report(number), Durability::Durable).await.unwrap();
    }
    for _ in 0..20 {
        assert!(stage.claim("report", 10).await.is_empty(), "the queue is paused");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..3 {
        let () = redis::cmd("FLUSHALL").query_async(&mut stage.redis().await).await.unwrap();
        // As fast as workers can, while the reconciler puts the jobs back.
        eventually(|| async {
            assert!(stage.claim("report", 10).await.is_empty(), "claimed from a paused queue");
            match stage.depth("report").await {
                3 => Ok(()),
                depth => Err(format!("{depth} jobs are back")),
            }
        })
        .await;
        for _ in 0..20 {
            assert!(stage.claim("report", 10).await.is_empty(), "claimed from a paused queue");
        }
        assert!(stage.queue.stats(&name("report")).await.unwrap().paused, "the copy is back");
    }
    edit(&stage, "report", |policy| policy.paused = false).await;
    claims_until(&stage, 3).await;
    maintenance.stop().await;
}

/// By SQL; the SQLSTATE and the detail of what refuses it.
async fn by_sql(stage: &Stage, key: Option<&str>) -> Result<uuid::Uuid, (String, String)> {
    sqlx::query_scalar("SELECT flotilla.enqueue('report', '{}', 'acme', idempotency_key => $1)")
        .bind(key)
        .fetch_one(stage.postgres.pool())
        .await
        .map_err(|error| {
            let refused = error.into_database_error().expect("the database answers");
            let refused = refused.downcast::<sqlx::postgres::PgDatabaseError>();
            (refused.code().to_owned(), refused.detail().unwrap_or_default().to_owned())
        })
}

async fn refused(stage: &Stage) -> (String, String) {
    let last = std::sync::Mutex::new(None);
    eventually(|| async {
        let answer = by_sql(stage, None).await.err();
        let refused = answer.is_some();
        *last.lock().unwrap() = answer;
        // A producer that is quicker than the looks would pass the limit by more than this test can hold.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if refused { Ok(()) } else { Err("accepted".to_owned()) }
    })
    .await;
    last.into_inner().unwrap().unwrap()
}

async fn accepted(stage: &Stage) {
    eventually(|| async { by_sql(stage, None).await.map(drop).map_err(|error| format!("{error:?}")) }).await;
}

#[tokio::test]
async fn contract_8_sql_enqueue_is_refused_by_a_full_queue_a_full_tenant_and_a_drain() {
    let stage = Stage::new().await;
    let maintenance = stage.maintain(quick());
    edit(&stage, "report", |policy| policy.max_depth = Some(5)).await;
    let first = by_sql(&stage, Some("first")).await.unwrap();
    assert_eq!(refused(&stage).await, ("53400".to_owned(), "queue_full".to_owned()));
    let waiting = stage.depth("report").await;
    assert!((5..60).contains(&waiting), "refused at {waiting} jobs");
    // What was accepted before is answered, full or not; nothing is half done by what was refused.
    assert_eq!(by_sql(&stage, Some("first")).await, Ok(first));
    assert!(by_sql(&stage, Some("second")).await.is_err());
    let keys: i64 = sqlx::query_scalar("SELECT count(*) FROM idempotency_keys WHERE key = 'second'")
        .fetch_one(stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(keys, 0);
    // Another queue is not concerned.
    sqlx::query("SELECT flotilla.enqueue('other', '{}', 'acme')")
        .execute(stage.postgres.pool())
        .await
        .unwrap();

    edit(&stage, "report", |policy| policy.max_depth = None).await;
    accepted(&stage).await;
    edit_tenant(&stage, None, |policy| policy.get_or_insert_default().max_depth = Some(1)).await;
    assert_eq!(refused(&stage).await, ("53400".to_owned(), "tenant_full".to_owned()));
    let others = "SELECT flotilla.enqueue('report', '{}', 'globex')";
    sqlx::query(others).execute(stage.postgres.pool()).await.unwrap();
    // Jobs that are claimed do not wait any more.
    while !stage.claim("report", 100).await.is_empty() {}
    accepted(&stage).await;

    edit(&stage, "report", |policy| policy.draining = true).await;
    assert_eq!(by_sql(&stage, None).await, Err(("55000".to_owned(), "queue_draining".to_owned())));
    edit(&stage, "report", |policy| policy.draining = false).await;
    assert_eq!(refused(&stage).await.1, "tenant_full");
    // Without a relay nobody knows how many wait.
    maintenance.stop().await;
    accepted(&stage).await;
}

#[tokio::test]
async fn a_queue_without_policies_is_claimed_from_when_that_is_known() {
    let stage = Stage::new().await;
    stage.queue.require_policies();
    stage.client.enqueue(report(1), Durability::Durable).await.unwrap();
    assert!(stage.claim("report", 10).await.is_empty(), "nobody has asked the ledger yet");
    let maintenance = stage.maintain(quick());
    claims_until(&stage, 1).await;
    maintenance.stop().await;
}

#[tokio::test]
async fn rule_17_a_tenants_policy_reaches_every_queue_and_the_queues_own_wins() {
    let stage = Stage::new().await;
    stage.queue.require_policies();
    let maintenance = stage.maintain(quick());
    edit_tenant(&stage, None, |policy| policy.get_or_insert_default().max_concurrency = Some(1)).await;
    for number in 0..6 {
        stage.client.enqueue(report(number), Durability::Durable).await.unwrap();
    }
    let held = claims_until(&stage, 1).await;
    assert_eq!(held.len(), 1);
    assert!(stage.claim("report", 10).await.is_empty());
    let own = edit_tenant(&stage, Some("report"), |policy| {
        let policy = policy.get_or_insert_default();
        assert_eq!(policy.max_concurrency, Some(1), "it starts as a copy");
        policy.max_concurrency = Some(3);
    })
    .await;
    assert_eq!(claims_until(&stage, 2).await.len(), 2);
    // Without it that of every queue holds again: three run, one may.
    let gone = edit_tenant(&stage, Some("report"), |policy| *policy = None).await;
    assert!(gone.revision > own.revision && gone.policy.is_none());
    eventually(|| async {
        let limit: Option<u32> = redis::cmd("HGET")
            .arg("{flotilla:report:0}:p:acme")
            .arg("conc")
            .query_async(&mut stage.redis().await)
            .await
            .unwrap();
        if limit == Some(1) { Ok(()) } else { Err(format!("Redis has the limit {limit:?}")) }
    })
    .await;
    let refs: Vec<_> = held.iter().map(Claim::lease_ref).collect();
    stage.queue.ack(&refs).await.unwrap();
    assert!(stage.claim("report", 10).await.is_empty(), "two still run");
    edit_tenant(&stage, None, |policy| *policy = None).await;
    claims_until(&stage, 3).await;
    maintenance.stop().await;
    let noted: i64 = sqlx::query_scalar("SELECT count(*) FROM audit_log WHERE action = 'tenants.test'")
        .fetch_one(stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(noted, 4, "every change is in the audit log");
}

#[tokio::test]
async fn enqueue_answers_when_a_queue_or_a_tenant_is_full_or_a_queue_drains() {
    let stage = Stage::with(ClientSettings::default(), |_| ()).await;
    edit(&stage, "report", |policy| policy.max_depth = Some(3)).await;
    edit_tenant(&stage, Some("report"), |policy| policy.get_or_insert_default().max_depth = Some(2)).await;
    let enqueue = async |number, whose: &str| {
        let job = producer::NewJob { tenant: tenant(whose), ..report(number) };
        stage.client.enqueue(job, Durability::Durable).await
    };
    enqueue(0, "acme").await.unwrap();
    enqueue(1, "acme").await.unwrap();
    let error = enqueue(2, "acme").await.unwrap_err();
    assert!(matches!(error, EnqueueError::TenantFull { .. }), "{error:?}");
    enqueue(3, "globex").await.unwrap();
    let error = enqueue(4, "globex").await.unwrap_err();
    assert!(matches!(error, EnqueueError::QueueFull { retry_after } if !retry_after.is_zero()), "{error:?}");
    edit(&stage, "report", |policy| (policy.max_depth, policy.draining) = (None, true)).await;
    eventually(|| async {
        match enqueue(5, "globex").await {
            Err(EnqueueError::Draining { queue }) => {
                assert_eq!(queue, name("report"));
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(stage.claim("report", 10).await.len(), 3, "what was accepted runs");
}

#[tokio::test]
async fn accepted_jobs_are_dispatched_whatever_the_policies_say_now() {
    let stage = Stage::new().await;
    let client = producer::Client::new(stage.postgres.clone(), None, ClientSettings::default());
    for number in 0..5 {
        client.enqueue(report(number), Durability::Durable).await.unwrap();
    }
    edit(&stage, "report", |policy| (policy.max_depth, policy.draining) = (Some(1), true)).await;
    let maintenance = stage.maintain(quick());
    claims_until(&stage, 5).await;
    maintenance.stop().await;
}

#[tokio::test]
async fn what_the_ledger_holds_of_a_policy_comes_back_as_it_was_set() {
    let stage = Stage::new().await;
    let set = QueuePolicy {
        paused: true,
        draining: true,
        mode: queue::Mode::Weighted([1, 2, 3, 4, 5, 6, 7, 8, 9, 100]),
        max_concurrency: Some(7),
        rate: Some(Rate { per_second: 0.25, burst: 3 }),
        max_depth: Some(1 << 40),
    };
    let row = edit(&stage, "report", |policy| *policy = set).await;
    assert_eq!(row.policy, set);
    let own = TenantPolicy {
        paused: true,
        weight: 9,
        max_concurrency: Some(2),
        rate: Some(Rate { per_second: 1000.5, burst: 1 }),
        max_depth: Some(5),
    };
    let tenant_row = edit_tenant(&stage, None, |policy| *policy = Some(own)).await;
    let all = stage.postgres.policies_since(0).await.unwrap();
    assert_eq!((all.queues, all.tenants), (vec![row.clone()], vec![tenant_row.clone()]));
    assert!(tenant_row.revision > row.revision);
    let later = stage.postgres.policies_since(row.revision).await.unwrap();
    assert_eq!((later.queues.len(), later.tenants), (0, vec![tenant_row]));
    let error = stage
        .postgres
        .edit_queue_policy(&name("report"), "tester", "queues.test", |policy| {
            policy.max_concurrency = Some(0);
        })
        .await
        .unwrap_err();
    assert!(error.message.contains("max_concurrency is \"0\""), "{}", error.message);
    let unknown = stage
        .postgres
        .edit_tenant_policy(&tenant("nobody"), None, "tester", "tenants.test", |_| ())
        .await
        .unwrap();
    assert_eq!(unknown, None);
}

#[tokio::test]
async fn revisions_become_visible_in_their_order() {
    let stage = Stage::new().await;
    let mut early = stage.postgres.pool().begin().await.unwrap();
    sqlx::query("INSERT INTO queue_policies (queue, revision) VALUES ('early', 0)")
        .execute(&mut *early)
        .await
        .unwrap();
    // Another change waits for the first to be decided: whoever sees the second has seen the first.
    let late = edit(&stage, "late", |policy| policy.paused = true);
    tokio::pin!(late);
    let waited = tokio::time::timeout(Duration::from_millis(300), &mut late).await;
    assert!(waited.is_err(), "a later revision was committed before an earlier one: {waited:?}");
    early.commit().await.unwrap();
    let late = late.await;
    let seen = stage.postgres.policies_since(0).await.unwrap().queues;
    assert_eq!(seen.iter().map(|row| row.queue.as_str()).collect::<Vec<_>>(), ["early", "late"]);
    assert_eq!(seen[1].revision, late.revision);
}
