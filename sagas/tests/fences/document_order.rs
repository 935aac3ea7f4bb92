//! Rules 8, 9, 10 and 14: the order of jobs on one document, deletions, and the pivot against a cancel.

use std::{sync::Arc, time::Duration};

use queue::JobId;
use sagas::{
    coalescing::{Coalescer, Limits},
    error::Class,
    stores::postgres::{
        compensation::Turn,
        dead_letters::{Replay, Resolved},
        ending::{GivenBack, Verdict},
        ledger::Cancel,
        publish::{Condition, PublishBatch, Published},
        retention::Place,
        take::Take,
    },
};
use uuid::Uuid;

use crate::ledger::{HOUR, Ledger, TENANT, delete, failure, ingest, publish_of, retry, run_of};

#[tokio::test]
async fn protocol_08_order_numbers_follow_acceptance_and_array_order() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("b"), delete("a"), ingest("a")]).await;
    let next = ledger.ingest("a").await;
    let mut orders = vec![];
    for id in ids.into_iter().chain([next]) {
        orders.push(ledger.postgres.job(id, None).await.unwrap().unwrap().doc_order.unwrap());
    }
    assert_eq!(orders, [1, 1, 2, 3, 4]);
}

#[tokio::test]
async fn protocol_08_of_concurrent_acceptances_no_two_get_the_same_number() {
    let ledger = Ledger::start().await;
    let accepts = (0..8).map(|_| async {
        let ids = ledger.accept(&[ingest("a"), ingest("a")]).await;
        (ledger.postgres.job(ids[0], None).await.unwrap(), ledger.postgres.job(ids[1], None).await.unwrap())
    });
    let mut orders = vec![];
    for (first, second) in futures::future::join_all(accepts).await {
        let (first, second) = (first.unwrap().doc_order.unwrap(), second.unwrap().doc_order.unwrap());
        assert_eq!(second, first + 1);
        orders.extend([first, second]);
    }
    orders.sort_unstable();
    assert_eq!(orders, (1..=16).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_version_that_is_not_staged_fails_its_own_publish_alone() {
    let ledger = Ledger::start().await;
    let [gone, ours] = [ledger.ingest("a").await, ledger.ingest("b").await];
    let [gone, ours] = [ledger.take("w", gone).await, ledger.take("w", ours).await];
    let [gone_stage, ours_stage] = [ledger.staged(&gone).await, ledger.staged(&ours).await];
    assert!(ledger.postgres.abandon_version(gone.id, gone.fence, gone_stage.version.id, HOUR).await.unwrap());
    let publish = Coalescer::spawn(PublishBatch(ledger.postgres.clone()), Limits::default());
    let deadline = tokio::time::Instant::now() + HOUR;
    let (refused, published) = tokio::join!(
        publish.call(Arc::new(publish_of(&gone, &gone_stage)), deadline),
        publish.call(Arc::new(publish_of(&ours, &ours_stage)), deadline)
    );
    assert_eq!(refused.unwrap_err().class, Class::Data);
    assert_eq!(published.unwrap(), Published::Yes);
}

#[tokio::test]
async fn protocol_08_a_lower_order_never_replaces_a_higher_one() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("a")]).await;
    let low = ledger.take("w", ids[0]).await;
    let low_stage = ledger.staged(&low).await;
    // Put off, the first lets the second go before it.
    ledger.give_back(&low, HOUR, GivenBack::Asked).await;
    let high = ledger.take("w", ids[1]).await;
    let high_stage = ledger.staged(&high).await;
    assert_eq!(ledger.publish(&[publish_of(&high, &high_stage)]).await, [Published::Yes]);
    sqlx::query("UPDATE jobs SET run_at = now()").execute(ledger.postgres.pool()).await.unwrap();
    let low = ledger.take("w", ids[0]).await;
    assert_eq!(ledger.publish(&[publish_of(&low, &low_stage)]).await, [Published::Superseded]);
    let shown = ledger.postgres.current_version(TENANT, "a").await.unwrap().unwrap();
    assert_eq!((shown.version, shown.doc_order), (high_stage.version.id, 2));
    // It removes what it staged and ends as a success.
    let run = run_of(&low, Some(low_stage.saga.id));
    assert_eq!(
        ledger.postgres.begin_compensation(&run, &Verdict::Superseded, "", None, 1, 1).await.unwrap(),
        Turn::Back
    );
    assert!(ledger.postgres.abandon_version(low.id, low.fence, low_stage.version.id, HOUR).await.unwrap());
    assert!(ledger.postgres.finish(&run, &Verdict::Superseded, &[]).await.unwrap());
    assert_eq!(ledger.state(low.id).await, ("succeeded".to_owned(), Some("superseded".to_owned())));
    assert_eq!(ledger.postgres.sagas_of(low.id).await.unwrap()[0].state, "compensated");
    assert_eq!(ledger.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn protocol_08_a_lost_job_and_an_earlier_one_that_has_come_due_do_not_wait_for_each_other() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("a")]).await;
    let due = async |id: JobId, at: &str| {
        sqlx::query("UPDATE jobs SET run_at = now() + $2::interval WHERE id = $1")
            .bind(id.0)
            .bind(at)
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
    };
    // The first is put off, so the second goes; its worker dies, and meanwhile the first is due.
    due(ids[0], "1 hour").await;
    let second = ledger.take("w", ids[1]).await;
    due(ids[0], "0").await;
    let takes = ledger.takes("another", &ids).await;
    let [Take::NotYet(_), Take::Taken(again)] = &takes[..] else { panic!("{takes:?}") };
    assert_eq!((again.id, again.lost_deliveries), (second.id, 1));
    let takes = ledger.takes("third", &ids[..1]).await;
    assert!(matches!(takes[..], [Take::NotYet(_)]), "beside one that runs: {takes:?}");
    assert!(ledger.postgres.complete(&run_of(again, None), &serde_json::json!({}), &[]).await.unwrap());
    ledger.take("third", ids[0]).await;
}

#[tokio::test]
async fn protocol_08_in_one_batch_the_higher_order_wins_whichever_comes_first() {
    for reversed in [false, true] {
        let ledger = Ledger::start().await;
        let ids = ledger.accept(&[ingest("a"), ingest("a")]).await;
        let mut items = vec![];
        for id in &ids {
            // Both at once, as a lost lease can have it.
            sqlx::query(
                "UPDATE jobs SET state = 'waiting', worker = NULL,
                        run_at = now() + CASE WHEN id = $1 THEN interval '0' ELSE interval '1 hour' END",
            )
            .bind(id.0)
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
            let job = ledger.take("w", *id).await;
            items.push(publish_of(&job, ledger.staged(&job).await.as_ref()));
        }
        sqlx::query("UPDATE jobs SET state = 'running', worker = 'w'")
            .execute(ledger.postgres.pool())
            .await
            .unwrap();
        let high = items[1].version;
        if reversed {
            items.reverse();
        }
        let expected =
            if reversed { [Published::Yes, Published::Superseded] } else { [Published::Yes, Published::Yes] };
        assert_eq!(ledger.publish(&items).await, expected);
        let shown = ledger.postgres.current_version(TENANT, "a").await.unwrap().unwrap();
        assert_eq!((shown.version, shown.doc_order), (high, 2));
        assert_eq!(ledger.count("SELECT count(*) FROM document_versions WHERE state = 'published'").await, 1);
    }
}

#[tokio::test]
async fn protocol_08_retries_and_replays_keep_the_order_number() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("a")]).await;
    let job = ledger.take("w", ids[0]).await;
    assert!(ledger.postgres.finish(&run_of(&job, None), &retry(Duration::ZERO), &[]).await.unwrap());
    let job = ledger.take("w", ids[0]).await;
    assert_eq!(job.doc_order, Some(1));
    let dead = Verdict::Dead { failure: failure() };
    assert!(ledger.postgres.finish(&run_of(&job, None), &dead, &[]).await.unwrap());
    let replay = Replay { actor: "a test".to_owned(), ..Replay::default() };
    let Resolved::Done(Some(again)) = ledger.postgres.replay(ids[0].0, &replay).await.unwrap() else {
        panic!("not replayed")
    };
    let replayed = ledger.postgres.job(again, None).await.unwrap().unwrap();
    assert_eq!((replayed.doc_order, replayed.replay_of), (Some(1), Some(ids[0].0)));
    assert_eq!(
        ledger.postgres.replay(ids[0].0, &replay).await.unwrap(),
        Resolved::Already("replayed".to_owned())
    );

    let second = ledger.take("w", again).await;
    assert!(ledger.postgres.finish(&run_of(&second, None), &dead, &[]).await.unwrap());
    let replay = Replay { as_latest: true, ..replay };
    let Resolved::Done(Some(again)) = ledger.postgres.replay(again.0, &replay).await.unwrap() else {
        panic!("not replayed")
    };
    assert_eq!(ledger.postgres.job(again, None).await.unwrap().unwrap().doc_order, Some(3));
}

#[tokio::test]
async fn protocol_08_a_re_embedding_replaces_only_the_version_it_copied() {
    let ledger = Ledger::start().await;
    let first = ledger.ingested("a").await;
    let second = ledger.ingested("a").await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let mut publish = publish_of(&job, &stage);
    publish.condition = Condition::Replaces(first);
    assert_eq!(ledger.publish(&[publish.clone()]).await, [Published::Superseded]);
    publish.condition = Condition::Replaces(second);
    assert_eq!(ledger.publish(&[publish]).await, [Published::Yes]);
}

#[tokio::test]
async fn protocol_09_a_tombstone_stops_older_ingests_and_newer_ones_recreate_the_document() {
    let ledger = Ledger::start().await;
    let shown = ledger.ingested("a").await;
    let ids = ledger.accept(&[ingest("a"), delete("a"), ingest("a")]).await;
    let old = ledger.take("w", ids[0]).await;
    let old_stage = ledger.staged(&old).await;
    ledger.give_back(&old, HOUR, GivenBack::Asked).await;
    let gone = ledger.take("w", ids[1]).await;
    let (buried, doomed) = ledger.bury(&gone, Uuid::now_v7()).await;
    assert_eq!(buried, Published::Yes);
    // The staged version stays with its own run.
    assert_eq!(doomed.iter().map(|d| d.version).collect::<Vec<_>>(), [shown]);
    assert_eq!(ledger.postgres.current_version(TENANT, "a").await.unwrap(), None);
    assert!(ledger.postgres.complete(&run_of(&gone, None), &serde_json::json!({}), &[]).await.unwrap());

    sqlx::query("UPDATE jobs SET run_at = now()").execute(ledger.postgres.pool()).await.unwrap();
    let old = ledger.take("w", ids[0]).await;
    assert_eq!(ledger.publish(&[publish_of(&old, &old_stage)]).await, [Published::Superseded]);
    assert_eq!(ledger.postgres.current_version(TENANT, "a").await.unwrap(), None);
    assert!(ledger.postgres.finish(&run_of(&old, None), &Verdict::Superseded, &[]).await.unwrap());

    let new = ledger.take("w", ids[2]).await;
    let stage = ledger.staged(&new).await;
    assert_eq!(ledger.publish(&[publish_of(&new, &stage)]).await, [Published::Yes]);
    assert_eq!(
        ledger.postgres.current_version(TENANT, "a").await.unwrap().unwrap().version,
        stage.version.id
    );
}

#[tokio::test]
async fn protocol_09_a_delete_older_than_what_is_shown_is_superseded() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[delete("a"), ingest("a")]).await;
    let early = ledger.take("w", ids[0]).await;
    ledger.give_back(&early, HOUR, GivenBack::Asked).await;
    let job = ledger.take("w", ids[1]).await;
    let stage = ledger.staged(&job).await;
    assert_eq!(ledger.publish(&[publish_of(&job, &stage)]).await, [Published::Yes]);
    sqlx::query("UPDATE jobs SET run_at = now()").execute(ledger.postgres.pool()).await.unwrap();
    let early = ledger.take("w", ids[0]).await;
    let before = ledger.snapshot().await;
    assert_eq!(ledger.bury(&early, Uuid::now_v7()).await.0, Published::Superseded);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_09_20_burying_again_with_the_same_run_gives_the_same_answer_and_writes_nothing() {
    let ledger = Ledger::start().await;
    let shown = ledger.ingested("a").await;
    let job = ledger.take("w", ledger.delete("a").await).await;
    let saga = Uuid::now_v7();
    let (published, doomed) = ledger.bury(&job, saga).await;
    assert_eq!((published, doomed.len(), doomed[0].version), (Published::Yes, 1, shown));
    let before = ledger.snapshot().await;
    let (published, again) = ledger.bury(&job, saga).await;
    assert_eq!((published, again.len(), again[0].version), (Published::Yes, 1, shown));
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_09_tombstones_outlive_the_retention_of_their_jobs() {
    let ledger = Ledger::start().await;
    ledger.ingested("a").await;
    let old = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&old).await;
    ledger.give_back(&old, HOUR, GivenBack::Asked).await;
    let gone = ledger.take("w", ledger.delete("a").await).await;
    let saga = Uuid::now_v7();
    assert_eq!(ledger.bury(&gone, saga).await.0, Published::Yes);
    assert!(ledger.postgres.complete(&run_of(&gone, Some(saga)), &serde_json::json!({}), &[]).await.unwrap());
    assert_eq!(ledger.postgres.expire_jobs(Duration::ZERO, 100, &mut Place::default()).await.unwrap(), 2);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 1);
    sqlx::query("UPDATE jobs SET run_at = now()").execute(ledger.postgres.pool()).await.unwrap();
    let old = ledger.take("w", old.id).await;
    assert_eq!(ledger.publish(&[publish_of(&old, &stage)]).await, [Published::Superseded]);
}

#[tokio::test]
async fn protocol_10_publish_ends_the_job_and_the_run_goes_on_until_the_old_version_is_swept() {
    let ledger = Ledger::start().await;
    let old = ledger.ingested("a").await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    assert_eq!(ledger.publish(&[publish_of(&job, &stage)]).await, [Published::Yes]);
    assert_eq!(ledger.state(job.id).await.0, "succeeded");
    let run = || async { ledger.postgres.saga(stage.saga.id).await.unwrap().unwrap().state };
    assert_eq!(run().await, "finishing");
    // Within the grace period the version that was replaced stays for readers under way.
    assert!(ledger.postgres.due_sweeps(10).await.unwrap().due.is_empty());
    assert_eq!(ledger.postgres.body(old).await.unwrap().as_deref(), Some("some text"));
    // A finished job whose run is not finished is not expired.
    assert_eq!(ledger.postgres.expire_jobs(Duration::ZERO, 100, &mut Place::default()).await.unwrap(), 1);
    sqlx::query("UPDATE document_versions SET sweep_after = now() WHERE state = 'retired'")
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    let sweeps = ledger.postgres.due_sweeps(10).await.unwrap();
    assert_eq!(sweeps.due.iter().map(|s| (s.version, s.last)).collect::<Vec<_>>(), [(old, false)]);
    // Two janitors never sweep the same version at once.
    assert!(ledger.postgres.due_sweeps(10).await.unwrap().due.is_empty());
    sweeps.done(Duration::ZERO).await.unwrap();
    assert_eq!(run().await, "completed");
    // Once more after the bound, for what a zombie may have written; then the row goes.
    let sweeps = ledger.postgres.due_sweeps(10).await.unwrap();
    assert_eq!(sweeps.due.iter().map(|s| (s.version, s.last)).collect::<Vec<_>>(), [(old, true)]);
    sweeps.done(Duration::ZERO).await.unwrap();
    assert_eq!(ledger.count("SELECT count(*) FROM document_versions").await, 1);
}

#[tokio::test]
async fn protocol_14_a_cancel_before_the_pivot_holds_it_back() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    assert_eq!(ledger.postgres.cancel(job.id, Some(TENANT)).await.unwrap(), Cancel::Requested);
    let before = ledger.snapshot().await;
    assert_eq!(ledger.publish(&[publish_of(&job, &stage)]).await, [Published::Cancelled]);
    assert_eq!(ledger.snapshot().await, before);
    assert_eq!(ledger.postgres.cancel_requests(&[job.id]).await.unwrap(), [job.id]);
    // The request outlives the delivery.
    assert!(ledger.take("another", job.id).await.cancel_requested);

    let gone = ledger.take("w", ledger.delete("b").await).await;
    assert_eq!(ledger.postgres.cancel(gone.id, Some(TENANT)).await.unwrap(), Cancel::Requested);
    let before = ledger.snapshot().await;
    assert_eq!(ledger.bury(&gone, Uuid::now_v7()).await.0, Published::Cancelled);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_14_a_cancel_after_the_pivot_changes_nothing() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    assert_eq!(ledger.publish(&[publish_of(&job, &stage)]).await, [Published::Yes]);
    let gone = ledger.take("w", ledger.delete("b").await).await;
    assert_eq!(ledger.bury(&gone, Uuid::now_v7()).await.0, Published::Yes);
    let before = ledger.snapshot().await;
    assert_eq!(ledger.postgres.cancel(job.id, Some(TENANT)).await.unwrap(), Cancel::PastPivot);
    assert_eq!(ledger.postgres.cancel(gone.id, Some(TENANT)).await.unwrap(), Cancel::PastPivot);
    assert_eq!(ledger.snapshot().await, before);
}

#[tokio::test]
async fn protocol_14_a_waiting_job_is_cancelled_in_the_ledger_alone_and_dropped_at_the_take() {
    let ledger = Ledger::start().await;
    let id = ledger.ingest("a").await;
    assert_eq!(ledger.postgres.cancel(id, Some("other")).await.unwrap(), Cancel::Unknown);
    assert_eq!(ledger.postgres.cancel(id, Some(TENANT)).await.unwrap(), Cancel::Cancelled);
    assert_eq!(ledger.state(id).await.0, "cancelled");
    let take = ledger.takes("w", &[id]).await.remove(0);
    assert!(matches!(take, Take::Gone), "{take:?}");
    assert_eq!(ledger.postgres.cancel(id, Some(TENANT)).await.unwrap(), Cancel::Ended);
}

#[tokio::test]
async fn a_collection_whose_points_can_not_be_removed_keeps_no_other_from_being_swept() {
    let ledger = Ledger::start().await;
    let (stuck, other) = (ledger.ingested("a").await, ledger.ingested("b").await);
    for document in ["a", "b"] {
        ledger.ingested(document).await;
    }
    let sql = "UPDATE document_versions SET sweep_after = now(), collection = CASE WHEN id = $1 THEN 'stuck' ELSE 'fine' END
               WHERE state = 'retired'";
    sqlx::query(sql).bind(stuck).execute(ledger.postgres.pool()).await.unwrap();
    let mut sweeps = ledger.postgres.due_sweeps(10).await.unwrap();
    sweeps.put_off("stuck", Duration::from_secs(60)).await.unwrap();
    assert_eq!(sweeps.due.iter().map(|sweep| sweep.version).collect::<Vec<_>>(), [other]);
    sweeps.done(Duration::from_secs(60)).await.unwrap();
    assert!(ledger.postgres.due_sweeps(10).await.unwrap().due.is_empty(), "both are due later");
    let swept = "SELECT count(*) FROM document_versions WHERE sweeps = 1";
    assert_eq!(ledger.count(swept).await, 1);
}
