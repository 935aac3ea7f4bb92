//! Drift in the vector store and in the cache.

use std::time::Duration;

use qdrant_client::{
    Payload,
    qdrant::{
        CountPointsBuilder, CreateCollectionBuilder, Distance, PointId, PointStruct, PointsIdsList,
        SetPayloadPointsBuilder, UpsertPointsBuilder, VectorParamsBuilder,
    },
};
use sagas::{
    audit::{AuditSettings, FindingKind as Kind},
    stores::{
        cache::Entry,
        point_id,
        vectors::{Point, Vectors, VectorsConfig},
    },
};
use serde_json::json;
use uuid::Uuid;

use crate::stage::{COLLECTION, Doc, Stage, TENANT, TEXT, settings};

/// Writes over a point, which Flotilla itself never does.
async fn overwrite(stage: &Stage, id: impl Into<PointId>, doc: &Doc, vector: Vec<f32>) {
    let payload = json!({ "tenant": TENANT, "document": doc.document, "version": doc.version, "chunk": 2, "ledger": doc.ledger });
    let point = PointStruct::new(id, vector, Payload::try_from(payload).unwrap());
    stage.qdrant().upsert_points(UpsertPointsBuilder::new(COLLECTION, vec![point]).wait(true)).await.unwrap();
}

async fn set_payload(stage: &Stage, point: Uuid, payload: serde_json::Value) {
    let ids = PointsIdsList { ids: vec![PointId::from(point.to_string())] };
    let set = SetPayloadPointsBuilder::new(COLLECTION, Payload::try_from(payload).unwrap());
    stage.qdrant().set_payload(set.points_selector(ids).wait(true)).await.unwrap();
}

#[tokio::test]
async fn every_drift_of_points_is_named_and_mended() {
    let stage = Stage::new().await;
    let report = stage.audit().await;
    assert!(report.is_clean() && report.queue_audited, "an empty system: {:#?}", report.findings);

    let doc = stage.ingest("story", TEXT).await;
    let other = stage.ingest("other", "Another text, about trains.").await;
    let report = stage.clean().await;
    let counts = &report.counts;
    assert_eq!(
        (
            counts.documents,
            counts.versions,
            counts.chunks,
            counts.points,
            counts.cache_entries,
            counts.jobs,
            counts.sagas
        ),
        (2, 2, 5, 5, 2, 2, 2)
    );
    assert_eq!(report.pending, sagas::audit::Pending::default());

    let second = point_id(doc.version, 2);
    stage.stores.vectors.remove_ids(COLLECTION, &[second]).await.unwrap();
    let report = stage.names(Kind::PointMissing).await;
    let finding = &report.findings[0];
    assert_eq!(
        (finding.version, finding.document.as_deref()),
        (Some(doc.version), Some("story")),
        "{finding:?}"
    );
    assert!(finding.detail.contains("chunk 2"), "{finding:?}");
    stage.names_and_mends(Kind::PointMissing).await;

    let all: Vec<Uuid> = (0..4).map(|no| point_id(doc.version, no)).collect();
    stage.stores.vectors.remove_ids(COLLECTION, &all).await.unwrap();
    stage.names_and_mends(Kind::PointMissing).await;

    overwrite(&stage, second.to_string(), &doc, doc.vectors[0].clone()).await;
    stage.names_and_mends(Kind::VectorChanged).await;

    // The last bit of one number.
    let mut vector = doc.vectors[2].clone();
    let at = vector.iter().position(|x| *x != 0.0).unwrap();
    vector[at] = f32::from_bits(vector[at].to_bits() ^ 1);
    overwrite(&stage, second.to_string(), &doc, vector).await;
    stage.names_and_mends(Kind::VectorChanged).await;

    set_payload(&stage, second, json!({ "tenant": "intruder" })).await;
    stage.names_and_mends(Kind::PointWrongTenant).await;
    set_payload(&stage, second, json!({ "document": other.document })).await;
    stage.names_and_mends(Kind::PointWrongDocument).await;
    set_payload(&stage, second, json!({ "chunk": 1 })).await;
    stage.names_and_mends(Kind::PointWrongChunk).await;
    set_payload(&stage, second, json!({ "version": other.version })).await;
    stage.names_and_mends(Kind::PointWrongChunk).await;

    // Of no version, beyond a version's chunks, and under an id of no chunk.
    let stray = Point { version: Uuid::now_v7(), ..doc.point(0) };
    stage.insert(stray).await;
    stage.names_and_mends(Kind::PointExtra).await;
    stage.insert(Point { chunk: 99, ..doc.point(0) }).await;
    stage.names_and_mends(Kind::PointExtra).await;
    overwrite(&stage, Uuid::now_v7().to_string(), &doc, doc.vectors[0].clone()).await;
    stage.names_and_mends(Kind::PointExtra).await;

    let lines: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM audit_log WHERE actor = 'test' AND action LIKE 'audit.repair.point%'",
    )
    .fetch_one(stage.stores.postgres.pool())
    .await
    .unwrap();
    assert_eq!(lines, 9, "each repair writes a line");
}

#[tokio::test]
async fn points_of_others_are_left_alone_in_a_collection_that_a_job_names_and_in_our_own() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    let qdrant = stage.qdrant();
    // Another application's, with vectors of the same length; a tenant's job names it.
    let shop = CreateCollectionBuilder::new("products")
        .vectors_config(VectorParamsBuilder::new(384, Distance::Cosine));
    qdrant.create_collection(shop).await.unwrap();
    sqlx::query("UPDATE document_versions SET collection = 'products'")
        .execute(stage.stores.postgres.pool())
        .await
        .unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let ours = (0..doc.vectors.len()).map(|no| doc.point(no)).collect();
    stage.stores.vectors.insert("products", 384, ours, deadline).await.unwrap();
    // What was in the collection of our own name is extra there now.
    stage.names_and_mends(Kind::PointExtra).await;

    let vector = || doc.vectors[0].clone();
    let theirs = |id: PointId, payload| PointStruct::new(id, vector(), Payload::try_from(payload).unwrap());
    let products = vec![
        theirs(7.into(), json!({ "price": 12 })),
        theirs(Uuid::now_v7().to_string().into(), json!({ "price": 13, "version": "2.0", "chunk": 1 })),
    ];
    qdrant.upsert_points(UpsertPointsBuilder::new("products", products).wait(true)).await.unwrap();
    // Another fleet has the same names, the same Qdrant, and a ledger of its own.
    let fleet = Point { version: Uuid::now_v7(), ledger: Uuid::now_v7(), ..doc.point(0) };
    let of_fleet = point_id(fleet.version, 0);
    stage.insert(fleet).await;

    stage.clean().await;
    let report = stage.repair().await;
    assert_eq!((report.repaired, report.is_clean()), (0, true), "{:#?}", report.findings);
    let count = async |name: &str| {
        qdrant.count(CountPointsBuilder::new(name).exact(true)).await.unwrap().result.unwrap().count
    };
    assert_eq!(count("products").await, doc.vectors.len() as u64 + 2);
    assert_eq!(count(COLLECTION).await, 1);
    let points = stage.stores.vectors.points_by_id(COLLECTION, &[of_fleet], false).await.unwrap();
    assert_eq!(points.len(), 1);
}

#[tokio::test]
async fn nothing_is_mended_that_the_audit_log_does_not_have() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    let stray = Point { version: Uuid::now_v7(), ..doc.point(0) };
    let id = point_id(stray.version, 0);
    stage.insert(stray).await;
    let postgres = stage.stores.postgres.pool();
    let renamed = async |sql: &'static str| sqlx::query(sql).execute(postgres).await.unwrap();
    renamed("ALTER TABLE flotilla.audit_log RENAME TO away").await;
    stage.auditor().run(&AuditSettings { repair: true, ..settings() }).await.unwrap_err();
    renamed("ALTER TABLE flotilla.away RENAME TO audit_log").await;
    let points = stage.stores.vectors.points_by_id(COLLECTION, &[id], false).await.unwrap();
    assert_eq!(points.len(), 1, "mended, and nobody can say so");
    stage.names_and_mends(Kind::PointExtra).await;
}

#[tokio::test]
async fn a_vector_that_no_provider_gives_again_is_reported_and_left_alone() {
    let stage = Stage::new().await;
    stage.accept("given").await;
    let (claim, job) = stage.take().await;
    let mut given = vec![0.0; 384];
    given[7] = 1.0;
    let doc = stage.publish(&job, "A short text.", Some(vec![given.clone()])).await;
    stage.queue.ack(&[claim.lease_ref()]).await.unwrap();
    stage.clean().await;

    given.swap(7, 8);
    let id = point_id(doc.version, 0);
    overwrite(&stage, id.to_string(), &doc, given).await;
    set_payload(&stage, id, json!({ "chunk": 0 })).await;
    stage.names(Kind::VectorChanged).await;
    let report = stage.repair().await;
    assert_eq!((report.repaired, report.unrepaired()), (0, 1));
    let lines: Vec<String> = sqlx::query_scalar("SELECT action FROM audit_log ORDER BY at")
        .fetch_all(stage.stores.postgres.pool())
        .await
        .unwrap();
    assert_eq!(lines, ["audit.repair.vector_changed", "audit.not_repaired.vector_changed"]);
    let finding = &report.findings[0];
    assert!(!finding.repairable && finding.detail.contains("enqueue an embed job"), "{finding:?}");
    stage.names(Kind::VectorChanged).await;

    // A wrong payload beside right vectors can still be mended, without the provider.
    stage.stores.vectors.remove_ids(COLLECTION, &[id]).await.unwrap();
    stage.insert(Point { tenant: "intruder".to_owned(), ..doc.point(0) }).await;
    stage.names_and_mends(Kind::PointWrongTenant).await;
}

#[tokio::test]
async fn a_repair_that_ends_half_way_has_lost_no_vector() {
    let mut stage = Stage::new().await;
    stage.accept("given").await;
    let (claim, job) = stage.take().await;
    let mut given = vec![0.0; 384];
    given[7] = 1.0;
    // No provider gives it again.
    let doc = stage.publish(&job, "A short text.", Some(vec![given.clone()])).await;
    stage.queue.ack(&[claim.lease_ref()]).await.unwrap();
    let id = point_id(doc.version, 0);
    set_payload(&stage, id, json!({ "tenant": "intruder" })).await;

    // The collection takes no points of this length, as whoever looks at it for the first time sees.
    let url = stage.services.vectors().url().to_owned();
    let config = VectorsConfig { url, api_key: None, call_timeout: Duration::from_secs(5) };
    stage.stores.vectors = Vectors::lazy(&config).unwrap();
    stage.sql("UPDATE document_versions SET dimensions = 8 WHERE id = $1", doc.version).await;
    stage.auditor().run(&AuditSettings { repair: true, ..settings() }).await.unwrap_err();
    let points = stage.stores.vectors.points_by_id(COLLECTION, &[id], true).await.unwrap();
    assert_eq!(points.iter().map(|point| point.vector.clone()).collect::<Vec<_>>(), [Some(given)]);

    stage.sql("UPDATE document_versions SET dimensions = 384 WHERE id = $1", doc.version).await;
    stage.names_and_mends(Kind::PointWrongTenant).await;
}

#[tokio::test]
async fn every_drift_of_the_cache_is_named_and_mended() {
    let stage = Stage::new().await;
    let doc = stage.ingest("story", TEXT).await;
    let cache = &stage.stores.cache;
    let right = cache.peek(doc.version).await.unwrap().unwrap();
    stage.clean().await;

    cache.put(doc.version, &Entry { body: "an older text".to_owned(), ..right.clone() }).await.unwrap();
    stage.names_and_mends(Kind::CacheStale).await;
    assert_eq!(cache.peek(doc.version).await.unwrap(), None, "an absent entry is no disagreement");

    cache.put(doc.version, &Entry { content_hash: "00".repeat(32), ..right.clone() }).await.unwrap();
    stage.names_and_mends(Kind::CacheStale).await;
    cache.put(doc.version, &Entry { tenant: "intruder".to_owned(), ..right.clone() }).await.unwrap();
    stage.names_and_mends(Kind::CacheWrongTenant).await;
    cache.put(Uuid::now_v7(), &right).await.unwrap();
    stage.names_and_mends(Kind::CacheExtra).await;

    let client = redis::Client::open(stage.services.redis_cache().url()).unwrap();
    let mut raw = client.get_multiplexed_async_connection().await.unwrap();
    let set = |key: String, text: &'static str| redis::cmd("SET").arg(key).arg(text).to_owned();
    set(cache.key(doc.version), "no JSON").exec_async(&mut raw).await.unwrap();
    stage.names_and_mends(Kind::CacheStale).await;
    set("flotilla:doc:strange".to_owned(), "x").exec_async(&mut raw).await.unwrap();
    stage.names(Kind::CacheExtra).await;
    // Others may share the server.
    redis::cmd("RENAME").arg("flotilla:doc:strange").arg("theirs:doc:x").exec_async(&mut raw).await.unwrap();
    stage.clean().await;
}
