//! What survives a stop, a kill -9 and a second server. Always against a server of our own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ::qdrant_client::Qdrant;
use ::qdrant_client::qdrant::*;
use parking_lot::Mutex;
use support::*;

const NAME: &str = "documents";

/// Small segments and an early index, so that optimisations run all the time, and frequent flushes.
async fn restless(data: &Path) -> Server {
    let server = Server::start_with(data, &["--flush-interval-ms", "150"]);
    let client = server.client();
    create(&client, NAME).await;
    let optimizers = OptimizersConfigDiffBuilder::default().indexing_threshold(300).default_segment_number(2);
    client.update_collection(UpdateCollectionBuilder::new(NAME).optimizers_config(optimizers)).await.unwrap();
    server
}

/// What writers were told, in batches of [`BATCH`] points.
#[derive(Clone, Default)]
struct Acknowledged {
    inserted: Vec<u64>,
    deleted: Vec<u64>,
    /// Sent and not answered: may have happened or not.
    open: Vec<u64>,
}

const BATCH: u64 = 50;

/// Inserts and deletes until the server goes away. Each task owns the batches it takes from `next`.
async fn write_until_it_fails(client: Qdrant, next: Arc<AtomicU64>, log: Arc<Mutex<Acknowledged>>) {
    loop {
        let batch = next.fetch_add(1, Ordering::SeqCst);
        let numbers = batch * BATCH..(batch + 1) * BATCH;
        let request =
            UpsertPointsBuilder::new(NAME, numbers.clone().map(point).collect::<Vec<_>>()).wait(true);
        // Every other batch the way Flotilla writes.
        let mode = if batch.is_multiple_of(2) { UpdateMode::InsertOnly } else { UpdateMode::Upsert };
        log.lock().open.push(batch);
        if client.upsert_points(request.update_mode(mode)).await.is_err() {
            return;
        }
        log.lock().inserted.push(batch);
        if batch % 5 == 4 {
            let points = PointsIdsList { ids: ids(numbers) };
            if client.delete_points(DeletePointsBuilder::new(NAME).points(points).wait(true)).await.is_err() {
                return;
            }
            log.lock().deleted.push(batch);
        }
        log.lock().open.retain(|open| *open != batch);
    }
}

/// Every acknowledged insert is there bit by bit, every acknowledged delete is not.
async fn check(client: &Qdrant, log: &Acknowledged) {
    for batch in &log.inserted {
        let numbers = batch * BATCH..(batch + 1) * BATCH;
        let found = fetch(client, NAME, numbers.clone()).await;
        if log.deleted.contains(batch) {
            assert!(found.is_empty(), "batch {batch}: {} deleted points are back", found.len());
        } else if log.open.contains(batch) {
            // An unanswered delete of a batch: gone or there, nothing else is known.
        } else {
            assert_eq!(found.len() as u64, BATCH, "batch {batch} lost points");
            for (point, n) in found.into_iter().zip(numbers) {
                assert_eq!(point.payload, payload(n), "point {n}");
                assert_eq!(elements(point.vectors), vector(n), "point {n}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    const CYCLES: u64 = 5;
    let data = tempfile::tempdir().unwrap();
    let mut server = restless(data.path()).await;
    let next = Arc::new(AtomicU64::new(0));
    let log = Arc::new(Mutex::new(Acknowledged::default()));
    for cycle in 0..CYCLES {
        let writers: Vec<_> = (0..3)
            .map(|_| tokio::spawn(write_until_it_fails(server.client(), Arc::clone(&next), Arc::clone(&log))))
            .collect();
        // Different moments of a flush, of an optimisation and of an update in each cycle.
        let (goal, deadline) =
            (next.load(Ordering::SeqCst) + 25 + cycle * 7, Instant::now() + Duration::from_mins(1));
        while next.load(Ordering::SeqCst) < goal {
            assert!(Instant::now() < deadline, "writers are stuck before batch {goal}: {}", server.log());
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        server.kill();
        for writer in writers {
            writer.await.unwrap();
        }
        server = Server::start_with(data.path(), &["--flush-interval-ms", "150"]);
        let so_far = log.lock().clone();
        check(&server.client(), &so_far).await;
    }
    let log = log.lock().clone();
    assert!(log.inserted.len() as u64 > CYCLES * 20 && !log.deleted.is_empty());
    settled(&server.client(), NAME).await;
    check(&server.client(), &log).await;
    // And after an orderly stop.
    assert!(server.terminate().success());
    let server = Server::start(data.path());
    check(&server.client(), &log).await;
}

/// An operation on many points, cut short by a kill between flushes, is there for all of its points or for none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_operation_is_recovered_whole() {
    const POINTS: u64 = 1_500;
    const CYCLES: i64 = 6;
    let data = tempfile::tempdir().unwrap();
    let options = ["--flush-interval-ms", "30"];
    let mut server = Server::start_with(data.path(), &options);
    create(&server.client(), NAME).await;
    upsert(&server.client(), NAME, (0..POINTS).map(point).collect()).await;
    let mut generation = 0;
    for cycle in 1..=CYCLES {
        let acknowledged = Arc::new(AtomicU64::new(generation));
        let writer = {
            let (client, acknowledged) = (server.client(), Arc::clone(&acknowledged));
            tokio::spawn(async move {
                loop {
                    let next = acknowledged.load(Ordering::SeqCst) + 1;
                    let payload = serde_json::json!({ "generation": next });
                    let all = SetPayloadPointsBuilder::new(
                        NAME,
                        ::qdrant_client::Payload::try_from(payload).unwrap(),
                    )
                    .points_selector(Filter::default())
                    .wait(true);
                    if client.set_payload(all).await.is_err() {
                        return;
                    }
                    acknowledged.store(next, Ordering::SeqCst);
                }
            })
        };
        let (goal, deadline) = (generation + 8 + cycle as u64, Instant::now() + Duration::from_mins(1));
        while acknowledged.load(Ordering::SeqCst) < goal {
            assert!(Instant::now() < deadline, "the writer is stuck: {}", server.log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.kill();
        writer.await.unwrap();
        generation = acknowledged.load(Ordering::SeqCst);
        server = Server::start_with(data.path(), &options);
        let stored: Vec<i64> = fetch(&server.client(), NAME, 0..POINTS)
            .await
            .iter()
            .map(|point| point.payload.get("generation").map_or(0, |value| value.as_integer().unwrap()))
            .collect();
        let old = stored.iter().filter(|stored| **stored < generation as i64).count();
        assert_eq!(old, 0, "cycle {cycle}: points older than the acknowledged generation {generation}");
        // An operation that was not acknowledged is replayed whole or is not there.
        generation = stored[0] as u64;
        assert!(stored.iter().all(|stored| *stored as u64 == generation), "cycle {cycle}: half an operation");
    }
}

#[tokio::test]
async fn sigterm_ends_with_success_and_everything_is_there_again() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path());
    let client = server.client();
    create(&client, NAME).await;
    upsert(&client, NAME, (0..200).map(point).collect()).await;
    client.create_alias(CreateAliasBuilder::new(NAME, "live")).await.unwrap();
    let change = UpdateCollectionBuilder::new(NAME).hnsw_config(HnswConfigDiffBuilder::default().m(20));
    client.update_collection(change).await.unwrap();
    let before = client.collection_info(NAME).await.unwrap().result.unwrap();
    // The client is still connected and idle.
    assert_eq!(server.terminate().code(), Some(0));

    let server = Server::start(data.path());
    let client = server.client();
    let points = fetch(&client, "live", 0..200).await;
    assert_eq!(points.len(), 200);
    for (point, n) in points.into_iter().zip(0..) {
        assert_eq!((point.payload, elements(point.vectors)), (payload(n), vector(n)));
    }
    let after = client.collection_info(NAME).await.unwrap().result.unwrap();
    assert_eq!(after.config, before.config);
    assert_eq!(after.payload_schema, before.payload_schema);
}

#[tokio::test]
async fn leftovers_of_a_crash_are_removed() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path());
    create(&server.client(), NAME).await;
    upsert(&server.client(), NAME, vec![point(1)]).await;
    create(&server.client(), "half").await;
    server.kill();
    let collections = data.path().join("collections");
    let half_built = collections.join("00000001/shard/temp_segments/half-built");
    std::fs::create_dir_all(&half_built).unwrap();
    // As if the creation of the second had not finished, or its deletion had begun.
    std::fs::remove_file(collections.join("00000002/collection.pb")).unwrap();
    std::fs::write(data.path().join("aliases.json"), r#"{"dangling": "half", "live": "documents"}"#).unwrap();

    let server = Server::start(data.path());
    let client = server.client();
    assert!(!half_built.exists());
    assert!(!collections.join("00000002").exists());
    let names: Vec<String> =
        client.list_collections().await.unwrap().collections.into_iter().map(|c| c.name).collect();
    assert_eq!(names, [NAME]);
    let aliases = client.list_aliases().await.unwrap().aliases;
    assert_eq!(aliases.iter().map(|alias| alias.alias_name.as_str()).collect::<Vec<_>>(), ["live"]);
    assert_eq!(count(&client, "live", Filter::default()).await, 1);
}

#[tokio::test]
async fn a_deleted_collection_leaves_no_files() {
    let data = tempfile::tempdir().unwrap();
    let server = restless(data.path()).await;
    let client = server.client();
    let done = Arc::new(AtomicBool::new(false));
    // Deleted while it is written to, read, flushed and optimised.
    let busy: Vec<_> = (0..3u64)
        .map(|task| {
            let (client, done) = (server.client(), Arc::clone(&done));
            tokio::spawn(async move {
                let mut n = task * 1_000_000;
                while !done.load(Ordering::SeqCst) {
                    let points: Vec<_> = (n..n + 50).map(point).collect();
                    n += 50;
                    let written =
                        client.upsert_points(UpsertPointsBuilder::new(NAME, points).wait(true)).await;
                    let read = client.query(QueryPointsBuilder::new(NAME).query(vector(n))).await.map(|_| ());
                    for result in [written.map(|_| ()), read] {
                        if result.is_err() {
                            assert_eq!(refusal(result).0, tonic::Code::NotFound);
                        }
                    }
                }
            })
        })
        .collect();
    for _ in 0..5 {
        let deadline = Instant::now() + Duration::from_mins(1);
        while count(&client, NAME, Filter::default()).await < 400 {
            assert!(Instant::now() < deadline, "the writers are stuck: {}", server.log());
        }
        assert!(client.delete_collection(NAME).await.unwrap().result);
        create(&client, NAME).await;
    }
    done.store(true, Ordering::SeqCst);
    for task in busy {
        task.await.unwrap();
    }
    assert!(client.delete_collection(NAME).await.unwrap().result);
    let collections = data.path().join("collections");
    let left =
        || std::fs::read_dir(&collections).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !left().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}\n{}", left(), server.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(server.terminate().success());
}

/// What the program says when it refuses to start.
fn refusal_to_start(data: &Path, listen: &str) -> String {
    let mut child = spawn(data, listen, &[]);
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert!(!child.wait().unwrap().success(), "{message}");
    message
}

#[tokio::test]
async fn refuses_a_shared_directory_a_taken_port_and_a_public_address() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path());
    assert!(refusal_to_start(data.path(), "127.0.0.1:0").contains("in use by another flotilla-vectors"));
    let other = tempfile::tempdir().unwrap();
    let taken = server.url.strip_prefix("http://").unwrap();
    let message = refusal_to_start(other.path(), taken);
    assert!(message.contains("cannot listen on") && message.contains(taken), "{message}");
    assert!(refusal_to_start(other.path(), "0.0.0.0:0").contains("not a loopback address"));
    // A killed server leaves nothing that keeps the next one out.
    server.kill();
    assert_eq!(Server::start(data.path()).client().list_collections().await.unwrap().collections.len(), 0);
}
