//! Relay and reconciler: every accepted job reaches Redis, whatever Redis forgets.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{collections::BTreeSet, time::Duration};

use producer::{ClientSettings, Durability, MaintainSettings};
use queue::{Envelope, JobId, LeaseRef, Queue, QueueConfig, QueueError};
use support::{
    Maintenance, Stage, eventually, ids, ids_of, ingest, name, queue_config, quick, report, tenant,
};
use uuid::Uuid;

#[tokio::test]
async fn sql_enqueue_belongs_to_the_callers_transaction() {
    let stage = Stage::new().await;
    let maintenance = stage.maintain(quick());
    let sql = r#"SELECT flotilla.enqueue('ingest', '{"document": "a", "text": "x"}', 'acme')"#;
    let mut tx = stage.postgres.pool().begin().await.unwrap();
    let undone: Uuid = sqlx::query_scalar(sql).fetch_one(&mut *tx).await.unwrap();
    tx.rollback().await.unwrap();
    let mut tx = stage.postgres.pool().begin().await.unwrap();
    let done: Uuid = sqlx::query_scalar(sql).fetch_one(&mut *tx).await.unwrap();
    assert_eq!(stage.depth("ingest").await, 0, "nothing is dispatched before the commit");
    tx.commit().await.unwrap();
    eventually(|| async {
        let depth = stage.depth("ingest").await;
        if depth == 1 { Ok(()) } else { Err(format!("depth {depth}")) }
    })
    .await;
    assert_eq!(ids_of(&stage.claim("ingest", 10).await), [JobId(done)]);
    assert!(stage.postgres.job(JobId(undone), None).await.unwrap().is_none());
    let job = stage.postgres.job(JobId(done), None).await.unwrap().unwrap();
    assert_eq!((job.document.as_deref(), job.doc_order), (Some("a"), Some(1)));
    maintenance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_side_by_side_dispatch_each_job_once() {
    const JOBS: usize = 3000;
    let stage = Stage::new().await;
    let jobs: Vec<_> = (0..JOBS).map(report).collect();
    for part in jobs.chunks(1000) {
        stage.postgres.accept(part, false).await.unwrap();
    }
    // Nothing but the relays dispatches here: jobs are acked below without an end in the ledger, so that the
    // reconciler would rightly dispatch them again, by its regular pass or, the prefix being new, by the other one.
    let hour = Duration::from_secs(3600);
    let settings = MaintainSettings { relay_batch: 50, grace: hour, heartbeat: hour, ..quick() };
    let relays: Vec<_> = (0..3)
        .map(|_| {
            Maintenance::start(
                stage.postgres.clone(),
                Queue::lazy(queue_config(&stage.services)).unwrap(),
                settings.clone(),
            )
        })
        .collect();
    let mut seen: Vec<JobId> = vec![];
    while seen.len() < JOBS {
        let claims = eventually(|| async {
            let claims = stage.claim("report", 256).await;
            if claims.is_empty() {
                let left = stage.postgres.undispatched_count().await.unwrap();
                return Err(format!("nothing to claim, {left} jobs are not relayed"));
            }
            Ok(claims)
        })
        .await;
        seen.extend(ids_of(&claims));
        // Acked at once: a second dispatch of the same job would be claimed again.
        let leases: Vec<LeaseRef> = claims
            .into_iter()
            .map(|claim| LeaseRef {
                id: claim.envelope.id,
                queue: claim.queue,
                partition: claim.partition,
                token: claim.token,
                envelope: claim.envelope,
                epoch: claim.epoch,
            })
            .collect();
        stage.queue.ack(&leases).await.unwrap();
    }
    eventually(|| async {
        let left = stage.postgres.undispatched_count().await.unwrap();
        if left == 0 { Ok(()) } else { Err(format!("{left} jobs are not relayed")) }
    })
    .await;
    for relay in relays {
        relay.stop().await;
    }
    assert_eq!(stage.claim("report", 256).await.len(), 0);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>(), ids(&jobs).iter().collect());
    assert_eq!(seen.len(), JOBS);
}

#[tokio::test]
async fn a_full_queue_does_not_hold_up_the_others() {
    let stage = Stage::with(ClientSettings::default(), |config| config.window = 5).await;
    let many: Vec<_> = (0..40).map(report).collect();
    stage.postgres.accept(&many, false).await.unwrap();
    stage.postgres.accept(&[ingest("a", "x")], false).await.unwrap();
    let maintenance = stage.maintain(MaintainSettings { relay_batch: 10, ..quick() });
    eventually(|| async {
        let (reports, ingests) = (stage.depth("report").await, stage.depth("ingest").await);
        if (reports, ingests) == (5, 1) {
            Ok(())
        } else {
            Err(format!("{reports} reports, {ingests} ingests"))
        }
    })
    .await;
    // The relay pushes first and commits after; a stop ends the round under way.
    maintenance.stop().await;
    assert_eq!(stage.postgres.undispatched_count().await.unwrap(), 35);
}

#[tokio::test]
async fn later_jobs_of_a_full_schedule_do_not_hold_up_those_that_are_due() {
    let stage = Stage::with(ClientSettings::default(), |config| config.window = 5).await;
    let mut later: Vec<_> = (0..40).map(report).collect();
    for job in &mut later {
        job.run_at = Some(chrono::Utc::now() + Duration::from_secs(3600));
    }
    stage.postgres.accept(&later, false).await.unwrap();
    stage.postgres.accept(&[report(40)], false).await.unwrap();
    let maintenance = stage.maintain(MaintainSettings { relay_batch: 10, ..quick() });
    eventually(|| async {
        let (due, scheduled) = (stage.depth("report").await, stage.scheduled("report").await);
        if (due, scheduled) == (1, 5) { Ok(()) } else { Err(format!("{due} due, {scheduled} scheduled")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_time_that_no_clock_shows_stops_neither_the_relay_nor_a_list() {
    let stage = Stage::new().await;
    let (never, due) = (report(0), report(1));
    stage.postgres.accept(&[never.clone(), due], false).await.unwrap();
    sqlx::query("UPDATE jobs SET run_at = 'infinity' WHERE id = $1")
        .bind(never.id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    let shown = stage.postgres.job(never.id, None).await.unwrap().unwrap();
    assert_eq!(shown.run_at.to_rfc3339(), "9999-12-31T23:59:00+00:00");
    let maintenance = stage.maintain(quick());
    eventually(|| async {
        let (due, scheduled) = (stage.depth("report").await, stage.scheduled("report").await);
        if (due, scheduled) == (1, 1) { Ok(()) } else { Err(format!("{due} due, {scheduled} scheduled")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn after_flushall_everything_is_dispatched_again_and_delayed_jobs_stay_delayed() {
    let stage = Stage::new().await;
    let maintenance = stage.maintain(MaintainSettings { grace: Duration::from_secs(3600), ..quick() });
    stamped(&stage).await;
    let mut jobs: Vec<_> = (0..1500).map(report).collect();
    let due = chrono::Utc::now() + Duration::from_secs(3600);
    for job in &mut jobs[..20] {
        job.run_at = Some(due);
    }
    for part in jobs.chunks(1000) {
        stage.client.enqueue_many(part.to_vec(), Durability::Durable).await.unwrap();
    }
    assert_eq!((stage.depth("report").await, stage.scheduled("report").await), (1480, 20));
    redis::cmd("FLUSHALL").exec_async(&mut stage.redis().await).await.unwrap();
    assert_eq!(stage.depth("report").await, 0);
    stamped(&stage).await;
    assert_eq!((stage.depth("report").await, stage.scheduled("report").await), (1480, 20));
    let next: Vec<f64> = stage
        .redis()
        .await
        .send_packed_command(
            redis::cmd("ZRANGE").arg(schedule_key(&stage).await).arg(0).arg(0).arg("WITHSCORES"),
        )
        .await
        .map(|value| redis::from_redis_value::<(String, f64)>(value).map(|(_, score)| vec![score]).unwrap())
        .unwrap();
    // Postgres keeps microseconds, Redis gets milliseconds.
    assert!((next[0] - due.timestamp_millis() as f64).abs() <= 1.0, "{next:?} against {due}");
    maintenance.stop().await;
}

async fn stamped(stage: &Stage) {
    eventually(|| async {
        if stage.queue.stamped().await.unwrap() {
            Ok(())
        } else {
            Err("the prefix is not stamped".to_owned())
        }
    })
    .await;
}

async fn schedule_key(stage: &Stage) -> String {
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut stage.redis().await).await.unwrap();
    for key in &keys {
        let kind: String = redis::cmd("TYPE").arg(key).query_async(&mut stage.redis().await).await.unwrap();
        if kind == "zset" {
            return key.clone();
        }
    }
    panic!("no schedule among {} keys", keys.len());
}

#[tokio::test]
async fn a_job_that_redis_forgot_is_found_by_the_regular_pass() {
    let stage = Stage::new().await;
    let (forgotten, kept) = (report(0), report(1));
    for job in [&forgotten, &kept] {
        stage.client.enqueue(job.clone(), Durability::Durable).await.unwrap();
    }
    stage.queue.forget(&[(name("report"), forgotten.id)]).await.unwrap();
    let maintenance = stage.maintain(MaintainSettings { grace: Duration::from_millis(100), ..quick() });
    eventually(|| async {
        let missing = stage.queue.missing(&[(name("report"), forgotten.id)]).await.unwrap();
        if missing.is_empty() { Ok(()) } else { Err("still missing".to_owned()) }
    })
    .await;
    assert_eq!(stage.depth("report").await, 2);
    maintenance.stop().await;
}

#[tokio::test]
async fn a_job_that_was_woken_is_brought_forward_although_redis_has_lost_that() {
    let stage = Stage::new().await;
    let job = report(0);
    stage.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
    // As an old RDB, or a replica that takes over, has it.
    let mut asleep = Envelope::new("report", name("report"), tenant("acme"));
    asleep.id = job.id;
    asleep.run_at_ms = Some(chrono::Utc::now().timestamp_millis() + 3_600_000);
    stage.queue.push(&[asleep]).await.unwrap();
    let maintenance = stage.maintain(MaintainSettings { grace: Duration::from_millis(100), ..quick() });
    eventually(|| async {
        let (due, scheduled) = (stage.depth("report").await, stage.scheduled("report").await);
        if (due, scheduled) == (1, 0) { Ok(()) } else { Err(format!("{due} due, {scheduled} scheduled")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_job_whose_lease_was_registered_again_is_not_taken_for_one_that_sleeps() {
    let stage = Stage::new().await;
    let (leased, forgotten) = (report(0), report(1));
    stage.client.enqueue(leased.clone(), Durability::Durable).await.unwrap();
    let claim = stage.claim("report", 1).await.remove(0);
    // The partition's data is lost, and its worker lives.
    let keys: Vec<String> =
        redis::cmd("KEYS").arg("{flotilla:report:0}*").query_async(&mut stage.redis().await).await.unwrap();
    let () = redis::cmd("DEL").arg(&keys).query_async(&mut stage.redis().await).await.unwrap();
    let beats = stage.queue.heartbeat(&[claim.lease_ref()]).await.unwrap();
    assert_eq!(beats, [queue::Beat::Reregistered]);
    let dispatched = async || -> Option<chrono::DateTime<chrono::Utc>> {
        sqlx::query_scalar("SELECT dispatched_at FROM jobs WHERE id = $1")
            .bind(leased.id.0)
            .fetch_one(stage.postgres.pool())
            .await
            .unwrap()
    };
    let before = dispatched().await;
    stage.postgres.accept(std::slice::from_ref(&forgotten), true).await.unwrap();
    let maintenance = stage.maintain(MaintainSettings { grace: Duration::from_millis(100), ..quick() });
    eventually(|| async {
        let depth = stage.depth("report").await;
        if depth == 1 { Ok(()) } else { Err(format!("depth {depth}")) }
    })
    .await;
    maintenance.stop().await;
    assert_eq!((before.is_some(), dispatched().await), (true, before), "the relay was to bring it forward");
}

#[tokio::test]
async fn a_job_changed_just_now_is_left_alone_by_the_regular_pass() {
    let stage = Stage::new().await;
    let job = report(0);
    // Accepted, and its push still on the way.
    stage.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
    stage.queue.stamp(stage.postgres.ledger_id().await.unwrap()).await.unwrap();
    let settings = MaintainSettings {
        grace: Duration::from_secs(3600),
        reconcile_every: Duration::from_millis(50),
        ..quick()
    };
    let maintenance = stage.maintain(settings);
    // A job without grace shows that passes are made.
    let old = report(1);
    stage.postgres.accept(std::slice::from_ref(&old), true).await.unwrap();
    sqlx::query("UPDATE jobs SET dispatched_at = now() - interval '1 day', created_at = now() - interval '1 day' WHERE id = $1")
        .bind(old.id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    eventually(|| async {
        let depth = stage.depth("report").await;
        if depth > 0 { Ok(()) } else { Err("no pass yet".to_owned()) }
    })
    .await;
    assert_eq!(ids_of(&stage.claim("report", 10).await), [old.id]);
    maintenance.stop().await;
}

#[tokio::test]
async fn a_prefix_of_another_ledger_is_refused_before_anything_is_dispatched() {
    let stage = Stage::new().await;
    stage.postgres.accept(&[report(0)], false).await.unwrap();
    stage.queue.stamp(Uuid::now_v7()).await.unwrap();
    let maintenance = stage.maintain(quick());
    let error = maintenance.ended.await.unwrap().unwrap_err();
    let producer::MaintainError::Queue(error) = error;
    assert!(matches!(error, QueueError::OtherLedger { .. }), "{error}");
    assert!(error.to_string().contains("FLOTILLA_PREFIX"), "{error}");
    assert_eq!(stage.depth("report").await, 0);
    // Beside it there is room.
    let config = QueueConfig { prefix: "second".to_owned(), ..queue_config(&stage.services) };
    let second = Queue::lazy(config).unwrap();
    let maintenance = Maintenance::start(stage.postgres.clone(), second.clone(), quick());
    eventually(|| async {
        let depth = second.stats(&name("report")).await.unwrap().depth();
        if depth == 1 { Ok(()) } else { Err(format!("depth {depth}")) }
    })
    .await;
    maintenance.stop().await;
}

#[tokio::test]
async fn a_prefix_that_becomes_another_ledgers_ends_the_loops() {
    let stage = Stage::new().await;
    let maintenance = stage.maintain(quick());
    stamped(&stage).await;
    // As when one Redis replaces another under its name, and another ledger's fleet was the first there.
    redis::cmd("FLUSHALL").exec_async(&mut stage.redis().await).await.unwrap();
    let key = format!("{{{}:ledger}}", queue_config(&stage.services).prefix);
    redis::cmd("SET")
        .arg(key)
        .arg(Uuid::now_v7().to_string())
        .exec_async(&mut stage.redis().await)
        .await
        .unwrap();
    let ended = tokio::time::timeout(support::DEADLINE, maintenance.ended).await.expect("the loops go on");
    let producer::MaintainError::Queue(error) = ended.unwrap().unwrap_err();
    assert!(matches!(error, QueueError::OtherLedger { .. }), "{error}");
}

#[tokio::test]
async fn a_job_that_is_woken_while_its_worker_puts_it_back_is_due_when_the_ledger_says() {
    let stage = Stage::new().await;
    let job = report(1);
    stage.client.enqueue(job.clone(), producer::Durability::Durable).await.unwrap();
    let claim = stage.claim("report", 1).await.remove(0);
    // Its worker has committed that it sleeps for an hour, and has not told Redis yet; meanwhile something wakes it.
    sqlx::query("UPDATE jobs SET run_at = now(), dispatched_at = NULL WHERE id = $1")
        .bind(job.id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    let maintenance = stage.maintain(quick());
    // Another job goes through the relay, so it has been round.
    let other = report(2);
    stage.postgres.accept(std::slice::from_ref(&other), false).await.unwrap();
    eventually(|| async {
        let depth = stage.depth("report").await;
        if depth == 1 { Ok(()) } else { Err(format!("depth {depth}")) }
    })
    .await;
    stage.queue.release(&[(claim.lease_ref(), Duration::from_secs(3600))]).await.unwrap();
    eventually(|| async {
        let (depth, scheduled) = (stage.depth("report").await, stage.scheduled("report").await);
        if (depth, scheduled) == (2, 0) {
            Ok(())
        } else {
            Err(format!("depth {depth}, scheduled {scheduled}"))
        }
    })
    .await;
    maintenance.stop().await;
}
