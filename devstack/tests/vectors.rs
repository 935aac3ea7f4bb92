//! The vector server, alone and with the other services. The first run builds it, which takes minutes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use devstack::testing::TestServices;
use devstack::{ProcessId, Service, Vectors, VectorsOptions};
use qdrant_client::Qdrant;
use qdrant_client::qdrant::{
    CountPointsBuilder, CreateCollectionBuilder, Distance, PointStruct, UpsertPointsBuilder,
    VectorParamsBuilder,
};

/// How long a paused server is given to show that it doesn't answer.
const HANG: Duration = Duration::from_millis(300);

fn client(url: &str) -> Qdrant {
    Qdrant::from_url(url).skip_compatibility_check().build().unwrap()
}

async fn create(url: &str) {
    let vectors = VectorParamsBuilder::new(4, Distance::Cosine);
    client(url).create_collection(CreateCollectionBuilder::new("c").vectors_config(vectors)).await.unwrap();
}

async fn put(url: &str, id: u64) {
    let point = PointStruct::new(id, vec![1.0, 0.5, 0.25, 0.125], qdrant_client::Payload::new());
    client(url).upsert_points(UpsertPointsBuilder::new("c", vec![point]).wait(true)).await.unwrap();
}

async fn count(url: &str) -> u64 {
    client(url).count(CountPointsBuilder::new("c").exact(true)).await.unwrap().result.unwrap().count
}

#[tokio::test]
async fn acknowledged_points_survive_kill_9_and_a_paused_server_hangs() {
    let services = TestServices::builder().vectors().start().await.unwrap();
    let vectors = services.vectors();
    create(vectors.url()).await;
    for id in 1..=3 {
        put(vectors.url(), id).await;
        vectors.kill9().await.unwrap();
        assert!(client(vectors.url()).health_check().await.is_err());
        vectors.restart().await.unwrap();
        assert_eq!(count(vectors.url()).await, id);
    }
    vectors.pause().await.unwrap();
    assert!(tokio::time::timeout(HANG, client(vectors.url()).health_check()).await.is_err(), "it answered");
    vectors.resume().await.unwrap();
    client(vectors.url()).health_check().await.unwrap();
    vectors.stop().await.unwrap();
    vectors.restart().await.unwrap();
    assert_eq!(count(vectors.url()).await, 3);
}

#[tokio::test]
async fn all_four_services_start_together() {
    let services = TestServices::start().await.unwrap();
    let names: Vec<_> = services.env().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, Service::ALL.map(Service::variable));
    let process = ProcessId::of(services.vectors().pid()).unwrap();
    drop(services);
    assert!(!process.is_alive());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let options =
        VectorsOptions { program: Some("/nowhere/flotilla-vectors".into()), ..VectorsOptions::default() };
    let text = Vectors::start(dir.path(), options).await.unwrap_err().to_string();
    for word in
        ["/nowhere/flotilla-vectors", "scripts/build-vectors.sh", "FLOTILLA_VECTORS_BIN", "QDRANT_URL"]
    {
        assert!(text.contains(word), "{word} is missing in: {text}");
    }
}
