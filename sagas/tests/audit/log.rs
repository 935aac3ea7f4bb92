//! Drift between the ledger, the saga log and the dead letters.

use sagas::audit::FindingKind as Kind;

use crate::stage::{Stage, TEXT};

#[tokio::test]
async fn every_drift_of_ledger_and_log_is_named() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    stage.clean().await;

    stage.sql("UPDATE sagas SET state = 'finishing', finished_at = NULL WHERE id = $1", doc.saga).await;
    stage.names_and_mends(Kind::FinishingStuck).await;

    stage
        .sql(
            "UPDATE jobs SET state = 'waiting', finished_at = NULL, dispatched_at = NULL WHERE id = $1",
            doc.job.0,
        )
        .await;
    stage.names(Kind::SagaDoneJobOpen).await;
    stage
        .sql(
            "UPDATE jobs SET state = 'succeeded', finished_at = now(), dispatched_at = now() WHERE id = $1",
            doc.job.0,
        )
        .await;
    stage.clean().await;

    stage.sql("UPDATE document_versions SET state = 'abandoned', body = NULL, sweep_after = now() + interval '1 h' WHERE id = $1", doc.version).await;
    stage.sql("DELETE FROM chunks WHERE version_id = $1", doc.version).await;
    stage.sql("UPDATE documents SET current_version = NULL WHERE id = $1", doc.document).await;
    stage.names(Kind::EffectMissing).await;
    stage.sql("UPDATE documents SET deleted_order = last_order WHERE id = $1", doc.document).await;
    stage.sql("UPDATE document_versions SET state = 'erased' WHERE id = $1", doc.version).await;
    stage.clean().await; // a tombstone explains it

    stage.sql("DELETE FROM sagas WHERE id = $1", doc.saga).await;
    stage.names(Kind::SucceededWithoutSaga).await;
    stage.sql("UPDATE jobs SET outcome = 'superseded' WHERE id = $1", doc.job.0).await;
    stage.clean().await;
}

#[tokio::test]
async fn a_saga_of_an_ended_job_and_a_parked_one_are_told_apart() {
    let stage = Stage::new().await;
    stage.accept("story").await;
    let (claim, job) = stage.take().await;
    let staged = stage.stage(&job, TEXT).await;
    stage.queue.ack(&[claim.lease_ref()]).await.unwrap();

    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = $1", staged.job.0).await;
    stage.names(Kind::SagaOpenAfterJob).await;

    stage.sql("UPDATE sagas SET state = 'parked', verdict = '{}', error = 'the points could not be removed' WHERE id = $1", staged.saga).await;
    stage.names(Kind::ParkedDisagrees).await;
    stage.sql("UPDATE jobs SET state = 'parked' WHERE id = $1", staged.job.0).await;
    let report = stage.clean().await;
    assert_eq!(report.pending.parked, 1);
    let record = &report.pending.parked_sagas[0];
    assert_eq!((record.saga, record.document.as_deref()), (staged.saga, Some("story")));
    assert_eq!(record.error.as_deref(), Some("the points could not be removed"));
}

#[tokio::test]
async fn dead_jobs_and_dead_letters_must_belong_together() {
    let stage = Stage::new().await;
    let id = stage.accept_only("story").await;
    stage
        .sql(
            "UPDATE jobs SET state = 'dead', finished_at = now(), last_error = 'no such model' WHERE id = $1",
            id.0,
        )
        .await;
    stage.names_and_mends(Kind::DeadWithoutLetter).await;
    let letter = stage.stores.postgres.dead_letter(id.0).await.unwrap().unwrap();
    assert_eq!((letter.class.as_str(), letter.reason.as_str()), ("letter_lost", "no such model"));
    stage.sql("UPDATE jobs SET state = 'cancelled' WHERE id = $1", id.0).await;
    stage.names(Kind::LetterWithoutDeath).await;
}
