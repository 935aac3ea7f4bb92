//! Rule 6: a version belongs to one run; a run that has begun to compensate never goes forward again.

use std::{sync::Arc, time::Duration};

use sagas::stores::postgres::take::TakenJob;
use sagas::{
    coalescing::Batch,
    error::Class,
    stores::{
        point_id,
        postgres::{
            compensation::Turn,
            ending::Verdict,
            forward::{Advance, KeepBatch, PivotBatch},
            ledger::Cancel,
            stage::{AbandonBatch, Abandoned, StageBatch},
        },
    },
};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::{
    ledger::{HOUR, Ledger, failure, retry, run_of, stage_of},
    lock_order::until_someone_waits,
};

#[tokio::test]
async fn protocol_06_the_decision_to_compensate_outlives_the_worker_that_made_it() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let run = run_of(&job, Some(stage.saga.id));
    assert_eq!(
        ledger.postgres.begin_compensation(&run, &Verdict::Cancelled, "a test's", None, 1, 1).await.unwrap(),
        Turn::Back
    );
    // Before anything is undone another worker takes over, and knows.
    let next = ledger.take("another", job.id).await;
    let open = next.saga.clone().expect("the open run");
    assert!(open.compensating);
    assert_eq!(open.id, stage.saga.id);
    let verdict: Verdict = serde_json::from_value(open.verdict.expect("the verdict")).unwrap();
    assert_eq!(verdict, Verdict::Cancelled);
    // The losses that follow are counted by themselves, and only those while it ran alone (rule 13).
    assert_eq!(open.lost_compensating, 0);
    assert!(ledger.postgres.mark_alone(job.id, next.fence).await.unwrap());
    assert_eq!(ledger.take("third", job.id).await.saga.unwrap().lost_compensating, 1);
    assert_eq!(ledger.take("fourth", job.id).await.saga.unwrap().lost_compensating, 1, "not alone");
}

#[tokio::test]
async fn protocol_20_a_run_whose_pivot_committed_without_an_answer_is_not_turned_back() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let (run, pivot) = (run_of(&job, Some(stage.saga.id)), stage.saga.next_step - 1);
    let turn =
        ledger.postgres.begin_compensation(&run, &Verdict::Cancelled, "", None, pivot, 1).await.unwrap();
    assert_eq!(turn, Turn::TooLate);
    let open = ledger.take("another", job.id).await.saga.expect("the open run");
    assert_eq!((open.compensating, open.verdict), (false, None));
}

#[tokio::test]
async fn protocol_20_a_job_given_back_after_a_stage_without_an_answer_goes_on_from_the_stage() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    // The worker took the stage for failed, and gives the job back before its first step.
    let (run, data) = (run_of(&job, Some(stage.saga.id)), serde_json::json!({ "older": true }));
    let given_back = ledger.postgres.suspend(&run, Duration::ZERO, Some((0, &data, &[])), &[]).await.unwrap();
    assert_eq!(given_back, Some(Duration::ZERO));
    let open = ledger.take("another", job.id).await.saga.expect("the open run");
    assert_eq!((open.next_step, open.data), (stage.saga.next_step, Some(stage.saga.data.clone())));
}

/// Does `work` while the holder of the job's fence writes as `sql` says, and commits only when `work` waits for the job. The
/// parameters of `sql` are the run and the job.
async fn during_a_write<T>(
    ledger: &Ledger,
    job: &TakenJob,
    saga: Uuid,
    sql: &'static str,
    work: impl Future<Output = T>,
) -> T {
    let mut holder = PgConnection::connect_with(&ledger.postgres.pool().connect_options()).await.unwrap();
    let mut tx = holder.begin().await.unwrap();
    sqlx::query("SELECT FROM jobs WHERE id = $1 FOR NO KEY UPDATE")
        .bind(job.id.0)
        .execute(&mut *tx)
        .await
        .unwrap();
    sqlx::query(sql).bind(saga).bind(job.id.0).execute(&mut *tx).await.unwrap();
    let mut work = std::pin::pin!(work);
    until_someone_waits(ledger, &mut work).await;
    tx.commit().await.unwrap();
    work.await
}

const BEGINS: &str =
    "INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, next_step, data, fence)
                      SELECT $1, id, kind, 1, tenant, 'running', 1, '{}', fence FROM jobs WHERE id = $2";

#[tokio::test]
async fn protocol_06_a_run_that_commits_while_its_job_is_taken_again_is_not_missed() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let saga = Uuid::now_v7();
    let again = during_a_write(&ledger, &job, saga, BEGINS, ledger.take("another", job.id)).await;
    assert_eq!(again.saga.map(|open| open.id), Some(saga), "a second run would begin beside it");
}

#[tokio::test]
async fn protocol_20_a_run_that_commits_while_it_is_turned_back_goes_on_from_its_log() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let (saga, verdict) = (Uuid::now_v7(), retry(Duration::ZERO));
    let run = run_of(&job, Some(saga));
    // The first step's answer was lost.
    let turning = ledger.postgres.begin_compensation(&run, &verdict, "", None, 1, 1);
    assert_eq!(during_a_write(&ledger, &job, saga, BEGINS, turning).await.unwrap(), Turn::TooLate);
    // And the pivot's.
    let passes = "UPDATE sagas SET next_step = 2 WHERE id = $1 AND job_id = $2";
    let turning = ledger.postgres.begin_compensation(&run, &verdict, "", None, 1, 1);
    assert_eq!(during_a_write(&ledger, &job, saga, passes, turning).await.unwrap(), Turn::TooLate);
    let open = ledger.take("another", job.id).await.saga.expect("the open run");
    assert_eq!((open.id, open.next_step, open.compensating), (saga, 2, false));
}

#[tokio::test]
async fn protocol_12_a_stage_that_arrives_after_its_run_has_turned_back_stages_nothing() {
    let ledger = Ledger::start().await;
    let batch = StageBatch(ledger.postgres.clone());
    let verdict = Verdict::Dead { failure: failure() };
    let good = ledger.take("w", ledger.ingest("good").await).await;
    let good = Arc::new(stage_of(&good));
    // Its first try never came, or came and only its answer was lost.
    for (document, came) in [("a", false), ("b", true)] {
        let job = ledger.take("w", ledger.ingest(document).await).await;
        let late = if came { ledger.staged(&job).await } else { Arc::new(stage_of(&job)) };
        let run = run_of(&job, Some(late.saga.id));
        let turned =
            ledger.postgres.begin_compensation(&run, &verdict, "no answer", None, 2, 1).await.unwrap();
        assert_eq!(turned, Turn::Back);
        assert!(ledger.postgres.abandon_version(job.id, job.fence, late.version.id, HOUR).await.unwrap());
        batch.flush(&[Arc::clone(&late), Arc::clone(&good)]).await.unwrap();
        assert!(ledger.postgres.finish(&run, &verdict, &[]).await.unwrap());
        let saga =
            ledger.postgres.saga(late.saga.id).await.unwrap().expect("the log has the run that turned back");
        assert_eq!(saga.state, "compensated");
        let staged: Vec<(Uuid, i64)> = sqlx::query_as(
            "SELECT id, (SELECT count(*) FROM chunks WHERE version_id = id) FROM document_versions WHERE state = 'staged'",
        )
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
        assert_eq!(staged, [(good.version.id, good.version.chunks.len() as i64)]);
        assert_eq!(ledger.count("SELECT count(*) FROM chunks").await, good.version.chunks.len() as i64);
    }
}

#[tokio::test]
async fn protocol_06_a_retry_is_a_new_run_with_a_new_version() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let first = ledger.staged(&job).await;
    // While a run is open there is no other.
    let error = StageBatch(ledger.postgres.clone()).flush(&[stage_of(&job).into()]).await.unwrap_err();
    assert_eq!(error.class, Class::Data, "{error}");
    assert_eq!(ledger.take("w", job.id).await.saga.map(|saga| saga.id), Some(first.saga.id));
    let job = ledger.take("w", job.id).await;
    let run = run_of(&job, Some(first.saga.id));
    assert_eq!(
        ledger
            .postgres
            .begin_compensation(&run, &retry(Duration::ZERO), "a test's", None, 1, 1)
            .await
            .unwrap(),
        Turn::Back
    );
    assert!(ledger.postgres.abandon_version(job.id, job.fence, first.version.id, HOUR).await.unwrap());
    assert!(ledger.postgres.finish(&run, &retry(Duration::ZERO), &[]).await.unwrap());
    let job = ledger.take("w", job.id).await;
    assert!(job.saga.is_none(), "an ended run goes on");
    assert_eq!(job.attempts, 1);
    let second = ledger.staged(&job).await;
    assert_ne!((first.saga.id, first.version.id), (second.saga.id, second.version.id));
    let states: Vec<String> = sqlx::query_scalar("SELECT state FROM document_versions ORDER BY id")
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
    assert_eq!(states, ["abandoned", "staged"]);
}

#[test]
fn protocol_06_point_ids_derive_from_version_and_chunk_alone() {
    let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
    assert_eq!(point_id(one, 0), point_id(one, 0));
    assert_ne!(point_id(one, 0), point_id(one, 1));
    assert_ne!(point_id(one, 0), point_id(two, 0));
    // Part of the stored data's format: another value here orphans every point of every installation.
    assert_eq!(point_id(one, 7).get_version_num(), 5);
}

#[tokio::test]
async fn protocol_06_a_pivot_announced_after_its_run_has_turned_back_is_not() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let run = run_of(&job, Some(stage.saga.id));
    let turned = json!({ "turned": true });
    let turn = ledger.postgres.begin_compensation(&run, &Verdict::Cancelled, "", Some(&turned), 1, 1).await;
    assert_eq!(turn.unwrap(), Turn::Back);
    let late = json!({ "late": true });
    // Under the same fence: its caller gave it up, and the flush went on.
    assert_eq!(ledger.postgres.begin_pivot(&run, 1, &late).await.unwrap(), Some(false));
    assert!(!ledger.postgres.keep(&run, 1, &late).await.unwrap());
    let open = ledger.take("another", job.id).await.saga.expect("the open run");
    assert_eq!((open.compensating, open.pivot_begun), (true, false));
    assert_eq!(open.data, Some(turned));
}

#[tokio::test]
async fn protocol_20_the_log_does_not_go_back_to_what_was_written_late() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let run = run_of(&job, Some(stage.saga.id));
    let (late, now) = (json!({ "late": true }), json!({ "now": true }));
    assert!(ledger.postgres.keep(&run, 3, &now).await.unwrap());
    assert!(!ledger.postgres.keep(&run, 2, &late).await.unwrap());
    assert_eq!(ledger.postgres.begin_pivot(&run, 2, &late).await.unwrap(), Some(false));
    // The same once more: its answer was lost.
    assert!(ledger.postgres.keep(&run, 3, &now).await.unwrap());
    let open = ledger.take("another", job.id).await.saga.expect("the open run");
    assert_eq!((open.next_step, open.data, open.pivot_begun), (3, Some(now), false));
}

#[tokio::test]
async fn each_of_a_batch_gets_its_own_answer() {
    let ledger = Ledger::start().await;
    let [lost, unwanted, ours] = ["a", "b", "c"].map(|name| ledger.ingest(name));
    let [lost, unwanted, ours] = [lost.await, unwanted.await, ours.await];
    let lost = ledger.take("w", lost).await;
    let stage = ledger.staged(&lost).await;
    let mut items = vec![Advance { run: run_of(&lost, Some(stage.saga.id)), next_step: 2, data: json!({}) }];
    let mut versions = vec![(lost.clone(), stage.version.id)];
    for id in [unwanted, ours] {
        let job = ledger.take("w", id).await;
        let stage = ledger.staged(&job).await;
        items.push(Advance { run: run_of(&job, Some(stage.saga.id)), next_step: 2, data: json!({}) });
        versions.push((job, stage.version.id));
    }
    ledger.take("another", lost.id).await;
    assert_eq!(ledger.postgres.cancel(unwanted, None).await.unwrap(), Cancel::Requested);
    let items: Vec<Arc<Advance>> = items.into_iter().map(Arc::new).collect();
    let kept = KeepBatch(ledger.postgres.clone()).flush(&items).await.unwrap();
    assert_eq!(kept, [false, true, true]);
    let begun = PivotBatch(ledger.postgres.clone()).flush(&items).await.unwrap();
    assert_eq!(begun, [None, Some(false), Some(true)]);
    let abandoned: Vec<Abandoned> = versions
        .iter()
        .map(|(job, version)| Abandoned {
            job: job.id,
            fence: job.fence,
            version: *version,
            sweep_after: HOUR,
        })
        .collect();
    let answers = AbandonBatch(ledger.postgres.clone()).flush(&abandoned).await.unwrap();
    assert_eq!(answers, [false, true, true]);
    let staged: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM document_versions WHERE state = 'staged'")
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
    assert_eq!(staged, [versions[0].1]);
    let chunks: Vec<Uuid> = sqlx::query_scalar("SELECT DISTINCT version_id FROM chunks")
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
    assert_eq!(chunks, staged);
}
