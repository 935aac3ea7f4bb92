//! Readers while a store hangs, and while what they read is replaced.

use std::time::{Duration, Instant};

use sagas::search::Query;

use super::stage::{Stage, TENANT};

const WITHIN: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_hung_cache_delays_one_reader_a_second_for_a_moment_and_no_other() {
    let stage = Stage::new().await;
    stage.ingest("story", "The text that readers see.").await;
    let read = async || stage.stores.document(TENANT, "story").await.unwrap().unwrap();
    let cached = async || {
        let begun = Instant::now();
        while !read().await.cached {
            assert!(begun.elapsed() < WITHIN, "no reader gets the text from the cache");
            tokio::task::yield_now().await;
        }
    };
    cached().await;
    stage.services.redis_cache().pause().await.unwrap();
    let begun = Instant::now();
    for _ in 0..50 {
        let seen = read().await;
        assert_eq!((seen.text.as_str(), seen.cached), ("The text that readers see.", false));
    }
    // The stage's calls have 5 s, and each read would make two.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    stage.services.redis_cache().resume().await.unwrap();
    cached().await;
}

#[tokio::test]
async fn a_search_finds_a_document_that_is_replaced_between_its_looks_at_the_points_and_at_the_ledger() {
    let stage = Stage::new().await;
    let old = stage.ingest("story", "Harbours and ships in the morning.").await;
    stage.accept("story").await;
    let (_, job) = stage.take().await;
    let new = stage.stage(&job, "Lighthouses and ships in the evening.").await;
    // Holds the search up once it has the points, of which those of the new version are none yet.
    let mut holder = stage.stores.postgres.begin().await.unwrap();
    sqlx::query("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE").execute(&mut *holder).await.unwrap();
    let stores = stage.stores.clone();
    let search = tokio::spawn(async move {
        let query = Query { tenant: TENANT, text: "ships", k: 5, model: None, collection: None };
        stores.search(&query).await
    });
    let begun = Instant::now();
    loop {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
        let waiting: i64 = sqlx::query_scalar(sql).fetch_one(stage.stores.postgres.pool()).await.unwrap();
        if waiting > 0 {
            break;
        }
        assert!(begun.elapsed() < WITHIN, "the search does not ask the ledger");
        tokio::task::yield_now().await;
    }
    for no in 0..new.vectors.len() {
        stage.insert(new.point(no)).await;
    }
    let retire = "UPDATE document_versions SET state = 'retired', sweep_after = now() + interval '1 minute' WHERE id = $1";
    let publish =
        "UPDATE document_versions SET state = 'published', published_at = now(), vectors_hash = sha256('x')
                   WHERE id = $1";
    let show = "UPDATE documents d SET current_version = v.id, current_order = v.doc_order
                FROM document_versions v WHERE v.id = $1 AND d.id = v.document_id";
    for (sql, version) in [(retire, old.version), (publish, new.version), (show, new.version)] {
        assert_eq!(sqlx::query(sql).bind(version).execute(&mut *holder).await.unwrap().rows_affected(), 1);
    }
    holder.commit().await.unwrap();
    let hits = search.await.unwrap().unwrap();
    assert!(!hits.is_empty(), "a document that was published all the time is not found");
    assert!(hits.iter().all(|hit| hit.document == "story" && hit.version == new.version), "{hits:?}");
}
