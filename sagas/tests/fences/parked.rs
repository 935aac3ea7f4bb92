//! Parked runs: a person lets them go on or closes them, once, and nothing else waits for that.

use queue::{JobId, QueueName, TenantId};
use sagas::stores::postgres::{
    accept::NewJob,
    batches::{BatchId, NewBatch},
    compensation::Turn,
    dead_letters::{Replay, Resolved},
    ending::{Parking, Verdict},
    inspect::SagaFilter,
    parked::Handled,
    publish::Published,
    stage::Stage,
    take::TakenJob,
    waits::{Awaited, Signalled},
};
use serde_json::json;
use uuid::Uuid;

use crate::ledger::{HOUR, Ledger, TENANT, failure, ingest, parking, publish_of, retry, run_of, saga_of};

impl Ledger {
    /// A job whose run was turned back and is parked.
    async fn parked(&self, document: &str, verdict: &Verdict) -> (TakenJob, std::sync::Arc<Stage>) {
        let job = self.take("w", self.ingest(document).await).await;
        let stage = self.staged(&job).await;
        let run = run_of(&job, Some(stage.saga.id));
        assert_eq!(
            self.postgres.begin_compensation(&run, verdict, "refused", None, 1, 1).await.unwrap(),
            Turn::Back
        );
        assert!(self.postgres.park(&run, &parking(Some(verdict), "an undo failed"), &[]).await.unwrap());
        (job, stage)
    }

    async fn resolve(&self, saga: Uuid) -> Handled {
        self.postgres.resolve_parked(saga, "a test", "seen to", HOUR).await.unwrap()
    }

    async fn actions(&self, action: &str) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM audit_log WHERE action = $1")
            .bind(action)
            .fetch_one(self.postgres.pool())
            .await
            .unwrap()
    }
}

fn dead() -> Verdict {
    Verdict::Dead { failure: failure() }
}

fn done(job: &TakenJob, state: &str) -> Handled {
    Handled::Done(job.id, state.to_owned())
}

#[tokio::test]
async fn a_retry_goes_on_backward_under_a_new_fence_and_of_two_operators_one_does_it() {
    let ledger = Ledger::start().await;
    let (job, stage) = ledger.parked("a", &dead()).await;
    let saga = stage.saga.id;
    sqlx::query("UPDATE sagas SET lost_compensating = 3").execute(ledger.postgres.pool()).await.unwrap();
    sqlx::query("UPDATE jobs SET lost_alone = 3").execute(ledger.postgres.pool()).await.unwrap();
    assert!(
        ledger
            .takes("w", &[job.id])
            .await
            .iter()
            .all(|take| matches!(take, sagas::stores::postgres::take::Take::Gone))
    );

    let asked = (0..8).map(|n| {
        let postgres = ledger.postgres.clone();
        async move { postgres.retry_parked(saga, &format!("operator {n}")).await.unwrap() }
    });
    let answers = futures::future::join_all(asked).await;
    let won = answers.iter().filter(|answer| **answer == done(&job, "waiting")).count();
    let lost = answers.iter().filter(|answer| **answer == Handled::Not("compensating".to_owned())).count();
    assert_eq!((won, lost), (1, 7), "{answers:?}");
    assert_eq!(ledger.actions("saga.retry").await, 1);

    let again = ledger.take("v", job.id).await;
    assert!(again.fence > job.fence);
    let open = again.saga.clone().expect("the same run");
    assert_eq!((open.id, open.compensating, open.lost_compensating, again.lost_alone), (saga, true, 0, 0));
    assert_eq!(open.verdict, Some(json!(dead())));
    // The one that parked it has an old fence.
    assert!(!ledger.postgres.finish(&run_of(&job, Some(saga)), &dead(), &[]).await.unwrap());
    assert!(ledger.postgres.finish(&run_of(&again, Some(saga)), &dead(), &[]).await.unwrap());
    assert_eq!(ledger.state(job.id).await.0, "dead");
    assert_eq!(ledger.resolve(saga).await, Handled::Not("compensated".to_owned()));
    assert_eq!(ledger.postgres.retry_parked(Uuid::now_v7(), "a test").await.unwrap(), Handled::Unknown);
}

#[tokio::test]
async fn a_run_parked_past_its_pivot_goes_on_forward_from_where_it_stood() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let saga = saga_of(&job, Uuid::now_v7());
    assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
    let data = json!({ "seen": 3 });
    let parking = Parking { verdict: None, error: "refused", past_pivot: true, progress: Some((3, &data)) };
    assert!(ledger.postgres.park(&run_of(&job, Some(saga.id)), &parking, &[]).await.unwrap());
    assert_eq!(ledger.postgres.retry_parked(saga.id, "a test").await.unwrap(), done(&job, "waiting"));
    let open = ledger.take("v", job.id).await.saga.expect("the same run");
    assert_eq!((open.compensating, open.next_step, open.data, open.verdict), (false, 3, Some(data), None));
}

#[tokio::test]
async fn a_closed_run_gives_its_job_the_end_that_its_effects_have() {
    let ledger = Ledger::start().await;
    let cases = [
        (dead(), "dead", None),
        // Another attempt would be a run of its own: for that there is the letter.
        (retry(HOUR), "dead", None),
        (Verdict::Cancelled, "cancelled", None),
        (Verdict::Superseded, "succeeded", Some("superseded")),
    ];
    for (n, (verdict, state, outcome)) in cases.into_iter().enumerate() {
        let (job, stage) = ledger.parked(&format!("d{n}"), &verdict).await;
        assert_eq!(ledger.resolve(stage.saga.id).await, done(&job, state), "{verdict:?}");
        assert_eq!(ledger.state(job.id).await, (state.to_owned(), outcome.map(str::to_owned)));
        let saga = ledger.postgres.saga(stage.saga.id).await.unwrap().unwrap();
        assert_eq!((saga.state.as_str(), saga.resolution.as_deref()), ("compensated", Some("seen to")));
        assert_eq!(saga.resolved_by.as_deref(), Some("a test"));
        let letter = ledger.postgres.dead_letter(job.id.0).await.unwrap();
        assert_eq!(letter.is_some(), state == "dead");
        if let Some(letter) = letter {
            assert_eq!((letter.reason.as_str(), letter.saga_id), ("a test's", Some(stage.saga.id)));
            assert_eq!(letter.error_chain, json!(["an undo failed"]));
            assert_eq!(ledger.postgres.attempts(job.id).await.unwrap().len(), 1);
        }
        // The staged version is the janitor's, but not before late writers are through.
        let (staged, due): (i64, i64) = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE state = 'staged'), count(*) FILTER (WHERE state = 'abandoned' AND sweep_after > now() + interval '59 min')
             FROM document_versions WHERE saga_id = $1",
        )
        .bind(stage.saga.id)
        .fetch_one(ledger.postgres.pool())
        .await
        .unwrap();
        assert_eq!((staged, due), (0, 1));
        assert_eq!(
            ledger.postgres.retry_parked(stage.saga.id, "x").await.unwrap(),
            Handled::Not("compensated".to_owned())
        );
    }
    assert_eq!(ledger.count("SELECT count(*) FROM chunks").await, 0);
    assert_eq!(ledger.actions("saga.resolve").await, 4);

    // Past the pivot the effect stands, and what was published stays.
    let job = ledger.take("w", ledger.ingest("b").await).await;
    let saga = saga_of(&job, Uuid::now_v7());
    assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
    assert!(
        ledger.postgres.park(&run_of(&job, Some(saga.id)), &parking(None, "refused"), &[]).await.unwrap()
    );
    assert_eq!(ledger.resolve(saga.id).await, done(&job, "succeeded"));
    assert_eq!(ledger.state(job.id).await, ("succeeded".to_owned(), Some("resolved".to_owned())));
    assert_eq!(ledger.postgres.saga(saga.id).await.unwrap().unwrap().state, "completed");

    // A run whose data can't be read may be before its pivot.
    let job = ledger.take("w", ledger.ingest("c").await).await;
    let saga = saga_of(&job, Uuid::now_v7());
    assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
    let parking = Parking { verdict: None, error: "unreadable", past_pivot: false, progress: None };
    assert!(ledger.postgres.park(&run_of(&job, Some(saga.id)), &parking, &[]).await.unwrap());
    assert_eq!(ledger.resolve(saga.id).await, done(&job, "dead"));
    assert_eq!(ledger.postgres.dead_letter(job.id.0).await.unwrap().unwrap().class, "parked");
    let replayed = ledger.postgres.replay(job.id.0, &Replay::default()).await.unwrap();
    assert!(matches!(replayed, Resolved::Done(Some(_))), "{replayed:?}");
}

#[tokio::test]
async fn a_closed_run_short_of_its_pivot_has_its_children_cancelled_and_one_past_it_has_not() {
    let ledger = Ledger::start().await;
    for (n, past_pivot) in [false, true].into_iter().enumerate() {
        let job = ledger.take("w", ledger.ingest(&format!("d{n}")).await).await;
        let saga = saga_of(&job, Uuid::now_v7());
        assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
        let run = run_of(&job, Some(saga.id));
        let tenant = TenantId::new(TENANT).unwrap();
        let batch = NewBatch {
            id: BatchId::new(),
            tenant: tenant.clone(),
            name: "parts".to_owned(),
            parent: Some(job.id),
            callback: None,
        };
        let child = NewJob::new("probe", QueueName::new("probe").unwrap(), tenant, json!({}));
        let child = NewJob { batch: Some(batch.id), ..child };
        let waits = ledger
            .postgres
            .await_children(&run, "parts", &batch, std::slice::from_ref(&child))
            .await
            .unwrap();
        assert!(matches!(waits, Awaited::NotYet(_)), "{waits:?}");
        // Its worker has begun it, and may write for a while yet.
        let taken = ledger.take("v", child.id).await;
        let verdict = dead();
        let parking = if past_pivot {
            parking(None, "refused")
        } else {
            let turned =
                ledger.postgres.begin_compensation(&run, &verdict, "refused", None, 1, 1).await.unwrap();
            assert_eq!(turned, Turn::Back);
            parking(Some(&verdict), "an undo failed")
        };
        assert!(ledger.postgres.park(&run, &parking, &[]).await.unwrap());
        let state = if past_pivot { "succeeded" } else { "dead" };
        assert_eq!(ledger.resolve(saga.id).await, done(&job, state));
        // As the collector does.
        for id in ledger.postgres.batches_to_cancel(BatchId(Uuid::nil()), 10).await.unwrap() {
            ledger.postgres.cancel_members(id, Uuid::nil(), 10).await.unwrap();
        }
        let child = ledger.postgres.job(taken.id, None).await.unwrap().unwrap();
        assert_eq!((child.state.as_str(), child.cancel_requested_at.is_some()), ("running", !past_pivot));
    }
}

#[tokio::test]
async fn of_a_retry_and_a_close_at_once_one_is_done() {
    let ledger = Ledger::start().await;
    for n in 0..10 {
        let (job, stage) = ledger.parked(&format!("d{n}"), &Verdict::Cancelled).await;
        let (retried, closed) = tokio::join!(
            async { ledger.postgres.retry_parked(stage.saga.id, "one").await.unwrap() },
            async { ledger.postgres.resolve_parked(stage.saga.id, "two", "seen to", HOUR).await.unwrap() },
        );
        let done = [&retried, &closed].iter().filter(|answer| matches!(answer, Handled::Done(..))).count();
        assert_eq!(done, 1, "{retried:?} {closed:?}");
        let state = ledger.state(job.id).await.0;
        assert_eq!(state, if matches!(retried, Handled::Done(..)) { "waiting" } else { "cancelled" });
    }
}

#[tokio::test]
async fn a_parked_run_holds_up_no_later_job_on_its_document() {
    let ledger = Ledger::start().await;
    let (job, stage) = ledger.parked("a", &dead()).await;
    let later = ledger.ingested("a").await;
    // It goes on after that and still changes nothing that readers see.
    ledger.postgres.retry_parked(stage.saga.id, "a test").await.unwrap();
    let again = ledger.take("v", job.id).await;
    assert!(again.doc_order < Some(2), "the original number is kept: {:?}", again.doc_order);
    let published = ledger.publish(&[publish_of(&again, &stage)]).await;
    assert_ne!(published, [Published::Yes], "an older order number won");
    let shown: Uuid = sqlx::query_scalar("SELECT current_version FROM documents WHERE key = 'a'")
        .fetch_one(ledger.postgres.pool())
        .await
        .unwrap();
    assert_eq!(shown, later);
}

#[tokio::test]
async fn a_parked_member_of_a_batch_counts_anew_when_it_goes_on_or_is_closed() {
    let ledger = Ledger::start().await;
    let batch = NewBatch {
        id: BatchId::new(),
        tenant: queue::TenantId::new(TENANT).unwrap(),
        name: "a test's".to_owned(),
        parent: None,
        callback: None,
    };
    let jobs: Vec<_> = ["a", "b", "c"]
        .map(|key| sagas::stores::postgres::accept::NewJob { batch: Some(batch.id), ..ingest(key) })
        .into();
    ledger.postgres.create_batch(&batch, &jobs, true, true).await.unwrap();
    let counts = async || {
        let view = ledger.postgres.batch(batch.id, Some(TENANT)).await.unwrap().unwrap();
        (view.total, view.succeeded, view.failed, view.cancelled)
    };
    let mut parked: Vec<(JobId, Uuid)> = vec![];
    for (job, verdict) in jobs.iter().zip([dead(), Verdict::Cancelled, dead()]) {
        let taken = ledger.take("w", job.id).await;
        let stage = ledger.staged(&taken).await;
        let run = run_of(&taken, Some(stage.saga.id));
        assert!(ledger.postgres.park(&run, &parking(Some(&verdict), "an undo failed"), &[]).await.unwrap());
        parked.push((job.id, stage.saga.id));
    }
    assert_eq!(counts().await, (3, 0, 3, 0));
    ledger.resolve(parked[0].1).await;
    assert_eq!(counts().await, (3, 0, 3, 0), "dead is failed, too");
    ledger.resolve(parked[1].1).await;
    assert_eq!(counts().await, (3, 0, 2, 1));
    ledger.postgres.retry_parked(parked[2].1, "a test").await.unwrap();
    assert_eq!(counts().await, (3, 0, 1, 1), "it is under way again");
    let taken = ledger.take("w", parked[2].0).await;
    let run = run_of(&taken, Some(parked[2].1));
    assert!(ledger.postgres.finish(&run, &dead(), &[]).await.unwrap());
    assert_eq!(counts().await, (3, 0, 2, 1));
}

#[tokio::test]
async fn runs_are_listed_by_what_is_asked_for_in_pages() {
    let ledger = Ledger::start().await;
    let mut sagas = vec![];
    for n in 0..5 {
        sagas.push(ledger.parked(&format!("d{n}"), &dead()).await.1.saga.id);
    }
    ledger.ingested("e").await;
    let parked = SagaFilter {
        state: Some(sagas::RunState::Parked),
        kind: Some("ingest".to_owned()),
        limit: 2,
        ..SagaFilter::default()
    };
    let mut seen = vec![];
    let mut before = None;
    loop {
        let page = ledger.postgres.sagas(&SagaFilter { before, ..parked.clone() }).await.unwrap();
        let Some(last) = page.last() else { break };
        before = Some(last.id);
        seen.extend(page.into_iter().map(|saga| saga.id));
    }
    sagas.reverse();
    assert_eq!(seen, sagas);
    let hour_ago = chrono::Utc::now() - HOUR;
    let none = [
        SagaFilter { tenant: Some("other".to_owned()), limit: 9, ..parked.clone() },
        SagaFilter { kind: Some("delete".to_owned()), limit: 9, ..parked.clone() },
        SagaFilter { until: Some(hour_ago), limit: 9, ..parked.clone() },
        SagaFilter { since: Some(chrono::Utc::now() + HOUR), limit: 9, ..parked.clone() },
    ];
    for filter in none {
        assert!(ledger.postgres.sagas(&filter).await.unwrap().is_empty(), "{filter:?}");
    }
    let all = SagaFilter { since: Some(hour_ago), tenant: Some(TENANT.to_owned()), limit: 9, ..parked };
    assert_eq!(ledger.postgres.sagas(&all).await.unwrap().len(), 5);
}

#[tokio::test]
async fn a_parked_run_takes_signals_since_it_may_go_on_to_wait_for_them() {
    let ledger = Ledger::start().await;
    let (job, stage) = ledger.parked("a", &dead()).await;
    let signal = async |name| ledger.postgres.signal(job.id, None, name, &json!(true)).await.unwrap();
    assert_eq!(signal("early").await, Signalled::Sent);
    ledger.resolve(stage.saga.id).await;
    assert_eq!(signal("late").await, Signalled::Ended);
}
