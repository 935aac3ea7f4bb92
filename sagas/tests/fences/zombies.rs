//! Rules 6 and 9 in the stores that can't check a fence: what a zombie writes late changes nothing and does not stay.

use std::{sync::Arc, time::Duration};

use devstack::testing::TestServices;
use embedding::hashing::HashingEmbedder;
use sagas::{
    janitor,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig, Entry},
        postgres::publish::Published,
        vectors::{Point, Vectors, VectorsConfig},
    },
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::ledger::{Ledger, TENANT, publish_of, saga_of};

const CALL: Duration = Duration::from_secs(10);

fn vectors(services: &TestServices) -> Vectors {
    let url = services.vectors().url().to_owned();
    Vectors::lazy(&VectorsConfig { url, api_key: None, call_timeout: CALL }).unwrap()
}

fn points(version: Uuid, vector: [f32; 3]) -> Vec<Point> {
    (0..2)
        .map(|chunk| Point {
            version,
            chunk,
            document_id: Uuid::nil(),
            tenant: TENANT.to_owned(),
            ledger: Uuid::nil(),
            vector: vector.to_vec(),
        })
        .collect()
}

async fn insert(vectors: &Vectors, version: Uuid, vector: [f32; 3]) {
    vectors.insert("c", 3, points(version, vector), Instant::now() + CALL).await.unwrap();
}

#[tokio::test]
async fn protocol_06_a_late_writer_cannot_change_a_point() {
    let services = TestServices::builder().vectors().start().await.unwrap();
    let vectors = vectors(&services);
    let version = Uuid::now_v7();
    insert(&vectors, version, [1.0, 0.0, 0.0]).await;
    insert(&vectors, version, [0.0, 1.0, 0.0]).await;
    let stored = vectors.points("c", version, 2).await.unwrap();
    assert_eq!(stored.len(), 2);
    for point in stored {
        assert_eq!(point.vector.as_deref(), Some(&[1.0, 0.0, 0.0][..]), "a point was changed");
    }
}

#[tokio::test]
async fn protocol_09_what_a_zombie_writes_after_a_delete_is_swept_within_the_bound() {
    let ledger =
        Ledger::over(TestServices::builder().postgres().redis_cache().vectors().start().await.unwrap()).await;
    let cache = CacheConfig {
        url: ledger.services.redis_cache().url().to_owned(),
        call_timeout: CALL,
        ..CacheConfig::default()
    };
    let bound = Duration::from_millis(200);
    let stores = Stores::new(
        ledger.postgres.clone(),
        vectors(&ledger.services),
        Cache::lazy(&cache).unwrap(),
        Arc::new(HashingEmbedder::new()),
        vec![],
        DocumentSettings { sweep_bound: bound, ..DocumentSettings::default() },
    );
    let entry =
        Entry { body: "some text".to_owned(), content_hash: "01".repeat(32), tenant: TENANT.to_owned() };

    let job = ledger.take("w", ledger.ingest("a").await).await;
    let stage = ledger.staged(&job).await;
    let version = stage.version.id;
    assert_eq!(ledger.publish(&[publish_of(&job, &stage)]).await, [Published::Yes]);
    let gone = ledger.take("w", ledger.delete("a").await).await;
    let saga = saga_of(&gone, Uuid::now_v7());
    let (buried, _) =
        stores.postgres.bury(&saga, gone.document_id.unwrap(), gone.doc_order.unwrap(), bound).await.unwrap();
    assert_eq!(buried, Published::Yes);
    assert!(stores.postgres.erase_text(gone.id, gone.fence, &[version]).await.unwrap());

    // The delete has done its work in all stores; now the zombie wakes up.
    let zombie = async || {
        insert(&stores.vectors, version, [1.0, 0.0, 0.0]).await;
        stores.cache.put(version, &entry).await.unwrap();
    };
    // Readers don't see what it writes, at no time.
    zombie().await;
    assert!(stores.document(TENANT, "a").await.unwrap().is_none());
    let mut late = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    while ledger.count("SELECT count(*) FROM document_versions").await > 0 {
        if janitor::sweep(&stores).await.unwrap() > 0 && late == 0 {
            // Once more, after the first sweep.
            late += 1;
            zombie().await;
        }
        assert!(Instant::now() < deadline, "not swept: {:#?}", ledger.snapshot().await["document_versions"]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(late, 1);
    assert!(stores.vectors.points("c", version, 2).await.unwrap().is_empty());
    assert_eq!(stores.cache.peek(version).await.unwrap(), None);
    assert!(stores.document(TENANT, "a").await.unwrap().is_none());
}
