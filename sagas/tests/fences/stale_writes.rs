//! Rule 2: each write of a saga, under a fence that is not the newest any more, writes nothing at all; and neither does one
//! for a job that has ended. One test for each write: removing the fence from one of them fails its test.

use std::time::Duration;

use queue::{
    QueueName, TenantId, WorkerId,
    ledger::{End, Grant, Ledger as _},
};
use sagas::{
    coalescing::Batch,
    stores::postgres::{
        accept::NewJob,
        batches::{BatchId, NewBatch},
        compensation::Turn,
        ending::{GivenBack, Verdict},
        plain::PlainLedger,
        publish::Published,
        stage::{Stage, StageBatch},
        take::{Take, TakeBatch, TakeItem, TakenJob},
        waits::{Awaited, Due},
    },
};
use serde_json::json;
use uuid::Uuid;

use crate::ledger::{HOUR, Ledger, failure, parking, publish_of, retry, run_of, saga_of, stage_of};

/// A run that holds its fence, or held it.
struct Running<'a> {
    ledger: &'a Ledger,
    job: TakenJob,
    stage: Stage,
    /// What readers see of its document.
    shown: Uuid,
}

/// How a run came to lose its fence.
#[derive(Clone, Copy, Debug)]
enum Lost {
    /// Another worker has taken the job.
    Retaken,
    /// The same worker has, after an answer got lost.
    RetakenBySelf,
    /// The job was given back and waits.
    Released,
    /// The job has ended, under this very fence.
    Ended,
}

/// Tries `write` under lost fences: it must say so and change no row. Under the newest fence it must change some.
async fn check(kind: &str, begun: bool, write: impl AsyncFn(&Running<'_>) -> bool) {
    let ledger = Ledger::start().await;
    check_in(&ledger, kind, begun, write).await;
}

async fn check_in(ledger: &Ledger, kind: &str, begun: bool, write: impl AsyncFn(&Running<'_>) -> bool) {
    for lost in [Lost::Retaken, Lost::RetakenBySelf, Lost::Released, Lost::Ended] {
        let running = begin(ledger, kind, begun).await;
        let job = &running.job;
        let run = run_of(job, None);
        match lost {
            Lost::Retaken => drop(ledger.take("another", job.id).await),
            Lost::RetakenBySelf => drop(ledger.take("w", job.id).await),
            Lost::Released => {
                assert!(
                    ledger.postgres.release(&run, Duration::ZERO, GivenBack::Asked).await.unwrap().is_some()
                );
            }
            Lost::Ended => assert!(ledger.postgres.complete(&run, &json!({}), &[]).await.unwrap()),
        }
        let before = ledger.snapshot().await;
        assert!(!write(&running).await, "{lost:?}: not refused");
        assert_eq!(ledger.snapshot().await, before, "{lost:?}: refused, and yet something was written");
    }
    let running = begin(ledger, kind, begun).await;
    let before = ledger.snapshot().await;
    assert!(write(&running).await, "refused under the newest fence");
    assert_ne!(ledger.snapshot().await, before, "wrote nothing under the newest fence");
}

/// A job of `kind` on a document of its own, taken, and staged if it has `begun`.
async fn begin<'a>(ledger: &'a Ledger, kind: &str, begun: bool) -> Running<'a> {
    let document = Uuid::now_v7().to_string();
    // So that a delete has something to erase.
    let shown = ledger.ingested(&document).await;
    let id = if kind == "delete" { ledger.delete(&document).await } else { ledger.ingest(&document).await };
    let job = ledger.take("w", id).await;
    let stage = stage_of(&job);
    if begun {
        let stage = std::sync::Arc::new(stage.clone());
        assert_eq!(StageBatch(ledger.postgres.clone()).flush(&[stage]).await.unwrap(), [true]);
    }
    Running { ledger, job, stage, shown }
}

#[tokio::test]
async fn protocol_02_stage_with_a_stale_fence_writes_nothing() {
    check("ingest", false, async |r| {
        let batch = StageBatch(r.ledger.postgres.clone());
        batch.flush(&[r.stage.clone().into()]).await.unwrap()[0]
    })
    .await;
}

#[tokio::test]
async fn protocol_02_begin_saga_with_a_stale_fence_writes_nothing() {
    check("ingest", false, async |r| {
        r.ledger.postgres.begin_saga(&saga_of(&r.job, r.stage.saga.id)).await.unwrap()
    })
    .await;
}

/// Of the run that a take begins.
#[tokio::test]
async fn protocol_02_log_run_with_a_stale_fence_writes_nothing() {
    let ledger = Ledger::start().await;
    let take = TakeBatch::new(ledger.postgres.clone(), WorkerId::new("w")).beginning(vec![("ingest", 1)]);
    for stale in [true, false] {
        let id = ledger.ingest(&Uuid::now_v7().to_string()).await;
        let Take::Taken(job) = take.flush(&[TakeItem { id, fast: None }]).await.unwrap().remove(0) else {
            panic!("not taken");
        };
        let run = run_of(&job, Some(job.saga.as_ref().unwrap().id));
        if stale {
            assert!(ledger.postgres.complete(&run_of(&job, None), &json!({}), &[]).await.unwrap());
        }
        let before = ledger.snapshot().await;
        ledger.postgres.log_run(&run).await.unwrap();
        assert_eq!(ledger.snapshot().await == before, stale);
    }
}

#[tokio::test]
async fn protocol_02_publish_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| match r.ledger.publish(&[publish_of(&r.job, &r.stage)]).await[0] {
        Published::Yes => true,
        Published::LeaseLost => false,
        other => panic!("{other:?}"),
    })
    .await;
}

#[tokio::test]
async fn protocol_02_bury_with_a_stale_fence_writes_nothing() {
    check("delete", false, async |r| match r.ledger.bury(&r.job, r.stage.saga.id).await {
        (Published::Yes, doomed) => {
            assert_eq!(doomed.len(), 1);
            true
        }
        (Published::LeaseLost, _) => false,
        (other, _) => panic!("{other:?}"),
    })
    .await;
}

#[tokio::test]
async fn protocol_02_erase_text_with_a_stale_fence_writes_nothing() {
    // A published version must have a text, so the database itself refuses that it is erased.
    check("delete", false, async |r| {
        // What the test itself does to documents is no news for other services.
        sqlx::query("ALTER TABLE documents DISABLE TRIGGER documents_events")
            .execute(r.ledger.postgres.pool())
            .await
            .unwrap();
        let hidden = "UPDATE documents SET current_version = NULL WHERE current_version = $1";
        let erased = "UPDATE document_versions SET state = 'erased', sweep_after = now() WHERE id = $1";
        for sql in [hidden, erased] {
            sqlx::query(sql).bind(r.shown).execute(r.ledger.postgres.pool()).await.unwrap();
        }
        let before = r.ledger.snapshot().await;
        let done = r.ledger.postgres.erase_text(r.job.id, r.job.fence, &[r.shown]).await.unwrap();
        assert_eq!(r.ledger.snapshot().await != before, done, "the answer and the rows disagree");
        if !done {
            let published =
                "UPDATE document_versions SET state = 'published', sweep_after = NULL WHERE id = $1";
            let shown = "UPDATE documents d SET current_version = v.id FROM document_versions v
                         WHERE v.id = $1 AND d.id = v.document_id";
            for sql in [published, shown] {
                sqlx::query(sql).bind(r.shown).execute(r.ledger.postgres.pool()).await.unwrap();
            }
        }
        done
    })
    .await;
}

#[tokio::test]
async fn protocol_02_begin_compensation_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        let turn =
            r.ledger.postgres.begin_compensation(&run, &Verdict::Cancelled, "a test's", None, 1, 1).await;
        turn.unwrap() == Turn::Back
    })
    .await;
}

#[tokio::test]
async fn protocol_02_abandon_version_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        r.ledger.postgres.abandon_version(r.job.id, r.job.fence, r.stage.version.id, HOUR).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_finish_with_a_stale_fence_writes_nothing() {
    let dead = Verdict::Dead { failure: failure() };
    let ledger = Ledger::start().await;
    for verdict in [retry(HOUR), dead, Verdict::Cancelled, Verdict::Superseded] {
        check_in(&ledger, "ingest", true, async |r| {
            r.ledger.postgres.finish(&run_of(&r.job, Some(r.stage.saga.id)), &verdict, &[]).await.unwrap()
        })
        .await;
    }
}

#[tokio::test]
async fn protocol_02_complete_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        r.ledger.postgres.complete(&run_of(&r.job, Some(r.stage.saga.id)), &json!({}), &[]).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_park_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        r.ledger
            .postgres
            .park(&run_of(&r.job, Some(r.stage.saga.id)), &parking(None, "a test's"), &[])
            .await
            .unwrap()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_release_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        let why = GivenBack::Unroutable(Duration::ZERO);
        r.ledger.postgres.release(&run, HOUR, why).await.unwrap().is_some()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_mark_alone_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| r.ledger.postgres.mark_alone(r.job.id, r.job.fence).await.unwrap()).await;
}

#[tokio::test]
async fn protocol_02_07_the_fenced_handle_of_user_steps_opens_only_under_the_newest_fence() {
    check("ingest", true, async |r| {
        let Some(mut fenced) = r.ledger.postgres.fenced(r.job.id, r.job.fence).await.unwrap() else {
            return false;
        };
        sqlx::query("INSERT INTO tenants (id) VALUES ('theirs')").execute(fenced.connection()).await.unwrap();
        fenced.commit().await.unwrap();
        true
    })
    .await;
}

#[tokio::test]
async fn protocol_02_in_a_batch_only_the_stale_item_is_refused() {
    let ledger = Ledger::start().await;
    let (stale, fresh) =
        (ledger.take("w", ledger.ingest("a").await).await, ledger.take("w", ledger.ingest("b").await).await);
    ledger.take("another", stale.id).await;
    let stages = [stage_of(&stale), stage_of(&fresh)];
    let items: Vec<_> = stages.iter().cloned().map(Into::into).collect();
    assert_eq!(StageBatch(ledger.postgres.clone()).flush(&items).await.unwrap(), [false, true]);
    assert_eq!(ledger.count("SELECT count(*) FROM sagas").await, 1);
    let items = [publish_of(&stale, &stages[0]), publish_of(&fresh, &stages[1])];
    assert_eq!(ledger.publish(&items).await, [Published::LeaseLost, Published::Yes]);
}

#[tokio::test]
async fn protocol_02_nobody_takes_a_job_between_the_check_of_its_fence_and_the_write() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let mut fenced = ledger.postgres.fenced(job.id, job.fence).await.unwrap().expect("the newest fence");
    let stalled = async {
        let mut taking = std::pin::pin!(ledger.take("another", job.id));
        // Waits in Postgres for the row; it must not be through before the write is.
        crate::lock_order::until_someone_waits(&ledger, &mut taking).await;
        sqlx::query("INSERT INTO tenants (id) VALUES ('theirs')").execute(fenced.connection()).await.unwrap();
        fenced.commit().await.unwrap();
        taking.await
    };
    let taken = stalled.await;
    assert_eq!(taken.fence, crate::ledger::after(job.fence));
    assert_eq!(ledger.count("SELECT count(*) FROM tenants WHERE id = 'theirs'").await, 1);
}

#[tokio::test]
async fn protocol_02_a_job_without_a_saga_ends_only_under_the_newest_fence() {
    check("ingest", true, async |r| {
        let plain = PlainLedger::new(r.ledger.postgres.clone(), WorkerId::new("w"));
        let grant = Grant {
            payload: json!({}),
            fence: r.job.fence.0,
            attempts: 0,
            max_attempts: None,
            timeout: None,
            lost: 0,
            lost_alone: 0,
            cancelled: false,
        };
        // The answer is also yes for an end under this very fence; what is written tells.
        let before = r.ledger.snapshot().await;
        plain.end(r.job.id, &grant, &End::Succeeded(json!({ "sum": 1 }))).await.unwrap();
        r.ledger.snapshot().await != before
    })
    .await;
}

#[tokio::test]
async fn protocol_02_await_timer_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let (run, due) = (run_of(&r.job, Some(r.stage.saga.id)), Due::In(HOUR));
        !matches!(r.ledger.postgres.await_timer(&run, "nap", due).await.unwrap(), Awaited::LeaseLost)
    })
    .await;
}

#[tokio::test]
async fn protocol_02_await_signal_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        !matches!(r.ledger.postgres.await_signal(&run, "go", HOUR).await.unwrap(), Awaited::LeaseLost)
    })
    .await;
}

/// A batch of one child.
fn children(r: &Running<'_>) -> (NewBatch, NewJob) {
    let tenant = TenantId::new(&r.job.tenant).unwrap();
    let id = BatchId::new();
    let batch = NewBatch {
        id,
        tenant: tenant.clone(),
        name: "children".to_owned(),
        parent: Some(r.job.id),
        callback: None,
    };
    let child = NewJob::new("child", QueueName::new("child").unwrap(), tenant, json!({}));
    (batch, NewJob { batch: Some(id), ..child })
}

#[tokio::test]
async fn protocol_02_await_children_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        let (batch, child) = children(r);
        let answer = r.ledger.postgres.await_children(&run, "them", &batch, &[child]).await.unwrap();
        !matches!(answer, Awaited::LeaseLost)
    })
    .await;
}

#[tokio::test]
async fn protocol_02_await_cancelled_children_with_a_stale_fence_writes_nothing() {
    let ledger = Ledger::start().await;
    let r = begin(&ledger, "ingest", true).await;
    let stale = run_of(&r.job, Some(r.stage.saga.id));
    let (batch, child) = children(&r);
    let waits = ledger.postgres.await_children(&stale, "them", &batch, &[child]).await.unwrap();
    assert!(matches!(waits, Awaited::NotYet(_)), "{waits:?}");
    let heir = ledger.take("another", r.job.id).await;
    let before = ledger.snapshot().await;
    let refused = ledger.postgres.await_cancelled_children(&stale, batch.id).await.unwrap();
    assert!(matches!(refused, Awaited::LeaseLost), "{refused:?}");
    assert_eq!(ledger.snapshot().await, before, "refused, and yet something was written");
    let run = run_of(&heir, Some(r.stage.saga.id));
    let done = ledger.postgres.await_cancelled_children(&run, batch.id).await.unwrap();
    assert!(!matches!(done, Awaited::LeaseLost), "{done:?}");
    assert_ne!(ledger.snapshot().await, before, "wrote nothing under the newest fence");
}

#[tokio::test]
async fn protocol_02_suspend_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        let data = json!({ "put": "off" });
        let progress = Some((2, &data, [].as_slice()));
        r.ledger.postgres.suspend(&run, HOUR, progress, &[]).await.unwrap().is_some()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_keep_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        r.ledger.postgres.keep(&run, 2, &json!({ "kept": true })).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn protocol_02_begin_pivot_with_a_stale_fence_writes_nothing() {
    check("ingest", true, async |r| {
        let run = run_of(&r.job, Some(r.stage.saga.id));
        r.ledger.postgres.begin_pivot(&run, 2, &json!({})).await.unwrap().is_some()
    })
    .await;
}
