//! Drift in the rows of documents, versions and chunks.

use sagas::audit::FindingKind as Kind;

use crate::stage::{Stage, TEXT};

#[tokio::test]
async fn every_drift_of_texts_and_chunks_is_named_and_mended() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    stage.clean().await;

    stage.sql("DELETE FROM chunks WHERE version_id = $1 AND no = 1", doc.version).await;
    stage.names_and_mends(Kind::ChunkMissing).await;
    stage
        .sql("UPDATE chunks SET body = 'something else' WHERE version_id = $1 AND no = 1", doc.version)
        .await;
    stage.names_and_mends(Kind::ChunkChanged).await;
    stage.sql("INSERT INTO chunks (version_id, no, body) VALUES ($1, 99, 'ships')", doc.version).await;
    stage.names_and_mends(Kind::ChunkExtra).await;
    stage.sql("UPDATE document_versions SET body = body || '.' WHERE id = $1", doc.version).await;
    stage.names_and_mends(Kind::BodyChanged).await;

    // Without a right copy nobody can know the text.
    stage.stores.cache.remove(&[doc.version], "test").await.unwrap();
    stage.sql("UPDATE document_versions SET body = body || '.' WHERE id = $1", doc.version).await;
    let report = stage.repair().await;
    assert_eq!((report.repaired, report.unrepaired()), (0, 1), "{:#?}", report.findings);
    stage.names(Kind::BodyChanged).await;
}

#[tokio::test]
async fn every_drift_of_documents_and_versions_is_named() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    let retired = stage.ingest("replaced", "The first text.").await;
    stage.ingest("replaced", "The second text.").await;
    stage.clean().await;

    stage.sql("UPDATE documents SET current_version = NULL WHERE id = $1", doc.document).await;
    stage.names(Kind::PublishedNotCurrent).await;
    stage
        .sql("UPDATE documents SET current_version = (SELECT id FROM document_versions WHERE document_id = $1) WHERE id = $1", doc.document)
        .await;
    stage.clean().await;

    stage.sql("UPDATE document_versions SET state = 'retired', sweep_after = now() + interval '1 h' WHERE id = $1", doc.version).await;
    stage.names(Kind::CurrentNotPublished).await;
    stage
        .sql(
            "UPDATE document_versions SET state = 'published', sweep_after = NULL WHERE id = $1",
            doc.version,
        )
        .await;

    stage.sql("UPDATE document_versions SET doc_order = 0 WHERE id = $1", doc.version).await;
    stage.names(Kind::OrderDisagrees).await;
    stage.sql("UPDATE document_versions SET doc_order = 1 WHERE id = $1", doc.version).await;
    stage.sql("UPDATE document_versions SET doc_order = 7 WHERE id = $1", retired.version).await;
    stage.names(Kind::OrderDisagrees).await;
    stage.sql("UPDATE document_versions SET doc_order = 1 WHERE id = $1", retired.version).await;
    stage.sql("UPDATE jobs SET doc_order = 7 WHERE id = $1 AND kind = 'ingest'", retired.job.0).await;
    let report = stage.audit().await;
    assert!(report.by_kind.contains_key(&Kind::OrderDisagrees), "{:#?}", report.findings);
    stage.sql("UPDATE jobs SET doc_order = 1 WHERE id = $1", retired.job.0).await;
    stage.clean().await;

    stage.stores.postgres.create_tenant("other").await.unwrap();
    stage.sql("UPDATE jobs SET tenant = 'other' WHERE id = $1", doc.job.0).await;
    stage.names(Kind::RowWrongTenant).await;
    stage.sql("UPDATE jobs SET tenant = 'acme' WHERE id = $1", doc.job.0).await;

    // The table itself refuses this one.
    sqlx::raw_sql(
        "DO $$ DECLARE name text; BEGIN
           FOR name IN SELECT conname FROM pg_constraint WHERE conrelid = 'documents'::regclass AND contype = 'c'
                        AND pg_get_constraintdef(oid) LIKE '%deleted_order%' LOOP
             EXECUTE format('ALTER TABLE documents DROP CONSTRAINT %I', name);
           END LOOP;
         END $$",
    )
    .execute(stage.stores.postgres.pool())
    .await
    .unwrap();
    stage.sql("UPDATE documents SET deleted_order = current_order WHERE id = $1", doc.document).await;
    stage.names(Kind::TombstoneWithVersion).await;
    stage.sql("UPDATE documents SET deleted_order = NULL WHERE id = $1", doc.document).await;
    stage.clean().await;
}

#[tokio::test]
async fn a_staged_version_without_its_saga_is_withdrawn() {
    let stage = Stage::new().await;
    stage.ingest("story", "The text that readers see.").await;
    stage.accept("story").await;
    let (claim, job) = stage.take().await;
    let staged = stage.stage(&job, TEXT).await;
    stage.insert(staged.point(0)).await;
    let report = stage.clean().await;
    assert_eq!(
        (report.pending.unseen_points, report.pending.unfinished),
        (1, 1),
        "a saga under way is no drift"
    );

    stage.queue.ack(&[claim.lease_ref()]).await.unwrap();
    stage.sql("DELETE FROM jobs WHERE id = $1", staged.job.0).await;
    stage.names_and_mends(Kind::StagedOrphan).await;
    assert_eq!(stage.audit().await.pending.sweeps, 1);
    let seen = stage.stores.document("acme", "story").await.unwrap().unwrap();
    assert_eq!(seen.text, "The text that readers see.");
}

#[tokio::test]
async fn a_text_too_long_for_the_server_is_searched_all_the_same() {
    let stage = Stage::with(|settings| settings.chunking.max_chunks = 1000).await;
    let sentences: Vec<String> =
        (0..700).map(|n| format!("Sentence number {n} of a long text that goes on and on.")).collect();
    let text = sentences.join(" ");
    let doc = stage.ingest("long", &text).await;
    let report = stage.clean().await;
    assert!(report.counts.chunks as usize * text.len() > 16 << 20, "{:?}", report.counts);
    stage
        .sql("UPDATE chunks SET body = 'something else' WHERE version_id = $1 AND no = 1", doc.version)
        .await;
    stage.names_and_mends(Kind::ChunkChanged).await;
}
