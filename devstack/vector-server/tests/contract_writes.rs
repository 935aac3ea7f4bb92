//! What Flotilla expects of a vector server when it writes. Set `QDRANT_URL` to run the same assertions against a
//! Qdrant server.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::qdrant_client::qdrant::*;
use support::*;
use tonic::Code;

fn marked(n: u64, mark: &str) -> PointStruct {
    let mut payload = payload(n);
    payload.insert("mark".into(), mark.into());
    PointStruct::new(id(n), vector(n + 7_000), payload)
}

fn mark(point: &RetrievedPoint) -> Option<&str> {
    point.payload.get("mark").map(|mark| mark.as_str().unwrap().as_str())
}

#[tokio::test]
async fn insert_only_never_changes_a_point() {
    let subject = Subject::with_collection("insert_only").await;
    let (client, name) = (&subject.client, &subject.collection);
    let insert =
        |points| UpsertPointsBuilder::new(name, points).wait(true).update_mode(UpdateMode::InsertOnly);
    client.upsert_points(insert((0..5).map(|n| marked(n, "first")).collect())).await.unwrap();
    // A late writer: five points exist, five don't.
    let late: Vec<_> =
        (0..10).map(|n| PointStruct::new(id(n), vector(n + 8_000), marked(n, "late").payload)).collect();
    client.upsert_points(insert(late)).await.unwrap();
    let points = fetch(client, name, 0..10).await;
    assert_eq!(points.len(), 10);
    for point in points {
        let n = number(&point.payload);
        assert_eq!(mark(&point), Some(if n < 5 { "first" } else { "late" }), "point {n}");
        let expected = vector(n + if n < 5 { 7_000 } else { 8_000 });
        assert_eq!(elements(point.vectors), expected, "point {n}");
    }
    // The same after the points moved into an optimised segment, and for a point that was deleted in between.
    settled(client, name).await;
    client.upsert_points(insert(vec![marked(3, "again")])).await.unwrap();
    client
        .delete_points(DeletePointsBuilder::new(name).points(PointsIdsList { ids: ids([4]) }).wait(true))
        .await
        .unwrap();
    client.upsert_points(insert(vec![marked(4, "again")])).await.unwrap();
    let points = fetch(client, name, 3..5).await;
    assert_eq!(points.iter().map(|p| mark(p).unwrap()).collect::<Vec<_>>(), ["first", "again"]);
    subject.finish(&[]).await;
}

#[tokio::test]
async fn one_of_many_racing_inserts_wins() {
    let subject = Subject::with_collection("insert_race").await;
    let (client, name) = (Arc::new(support::client(&subject.url)), subject.collection.clone());
    let racers = (0..8).map(|racer| {
        let (client, name) = (Arc::clone(&client), name.clone());
        tokio::spawn(async move {
            let points = (0..20).map(|n| marked(n, &format!("racer {racer}"))).collect::<Vec<_>>();
            let request =
                UpsertPointsBuilder::new(name, points).wait(true).update_mode(UpdateMode::InsertOnly);
            client.upsert_points(request).await.unwrap();
        })
    });
    for racer in racers.collect::<Vec<_>>() {
        racer.await.unwrap();
    }
    let marks: BTreeSet<String> =
        fetch(&client, &name, 0..20).await.iter().map(|p| mark(p).unwrap().to_owned()).collect();
    assert_eq!(marks.len(), 1, "a batch is applied as a whole: {marks:?}");
    subject.finish(&[]).await;
}

#[tokio::test]
async fn update_only_and_filtered_upserts() {
    let subject = Subject::with_collection("update_only").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, (0..5).map(|n| marked(n, "old")).collect()).await;
    let request =
        UpsertPointsBuilder::new(name, (3..8).map(|n| marked(n, "new")).collect::<Vec<_>>()).wait(true);
    client.upsert_points(request.clone().update_mode(UpdateMode::UpdateOnly)).await.unwrap();
    let marks = |points: Vec<RetrievedPoint>| {
        points.iter().map(|p| (number(&p.payload), mark(p).unwrap().to_owned())).collect::<Vec<_>>()
    };
    let expected =
        |of: fn(u64) -> &'static str, until| (0..until).map(|n| (n, of(n).to_owned())).collect::<Vec<_>>();
    let old_new = |n| if n < 3 { "old" } else { "new" };
    assert_eq!(marks(fetch(client, name, 0..10).await), expected(old_new, 5));

    // With a filter: points that exist change only if they match; new points are stored.
    let only_old = Filter::must([Condition::matches("mark", "old".to_owned())]);
    let request = UpsertPointsBuilder::new(name, (0..6).map(|n| marked(n, "newer")).collect::<Vec<_>>());
    client.upsert_points(request.wait(true).update_filter(only_old)).await.unwrap();
    let newer = |n| if n < 3 || n == 5 { "newer" } else { "new" };
    assert_eq!(marks(fetch(client, name, 0..10).await), expected(newer, 6));

    // The plain mode replaces vector and payload as a whole.
    upsert(client, name, vec![PointStruct::new(id(0), vector(0), payload(0))]).await;
    let point = fetch(client, name, [0]).await.remove(0);
    assert_eq!((mark(&point), elements(point.vectors.clone())), (None, vector(0)));
    subject.finish(&[]).await;
}

#[tokio::test]
async fn deletes_by_id_and_by_filter() {
    let subject = Subject::with_collection("deletes").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, (0..500).map(point).collect()).await;
    settled(client, name).await;
    let delete = |selection: points_selector::PointsSelectorOneOf| {
        client.delete_points(DeletePointsBuilder::new(name).points(selection).wait(true))
    };
    // An unknown id among them is no error.
    delete(PointsIdsList { ids: ids([0, 1, 2, 77_777]) }.into()).await.unwrap();
    assert_eq!(count(client, name, Filter::default()).await, 497);
    let of_tenant = Filter::must([Condition::matches("tenant", "tenant-3".to_owned())]);
    delete(of_tenant.clone().into()).await.unwrap();
    assert_eq!(count(client, name, of_tenant.clone()).await, 0);
    assert_eq!(count(client, name, Filter::default()).await, 397);
    let request = QueryPointsBuilder::new(name).query(vector(3)).limit(500).with_payload(true);
    let left: BTreeSet<u64> =
        client.query(request).await.unwrap().result.iter().map(|hit| number(&hit.payload)).collect();
    assert_eq!(left, (3..500).filter(|n| n % 5 != 3).collect());
    // Nothing left to delete is no error either, and a deleted point can come back.
    delete(of_tenant.into()).await.unwrap();
    upsert(client, name, vec![point(3)]).await;
    assert_eq!(fetch(client, name, [3]).await.len(), 1);
    subject.finish(&[]).await;
}

#[tokio::test]
async fn payload_changes() {
    let subject = Subject::with_collection("payload_changes").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, (0..20).map(point).collect()).await;
    let some = |numbers: std::ops::Range<u64>| PointsIdsList { ids: ids(numbers) };
    let object = |json: serde_json::Value| ::qdrant_client::Payload::try_from(json).unwrap();
    let payload_of = async |n| fetch(client, name, [n]).await.remove(0).payload;

    let set =
        SetPayloadPointsBuilder::new(name, object(serde_json::json!({"state": "kept", "box": {"a": 1}})));
    client.set_payload(set.points_selector(some(0..10)).wait(true)).await.unwrap();
    assert_eq!(count(client, name, Filter::must([Condition::matches("state", "kept".to_owned())])).await, 10);
    assert_eq!(payload_of(0).await.len(), payload(0).len() + 2, "set merges");

    let filter = Filter::must([Condition::matches("tenant", "tenant-0".to_owned())]);
    let set = SetPayloadPointsBuilder::new(name, object(serde_json::json!({"b": 2}))).key("box");
    client.set_payload(set.points_selector(filter.clone()).wait(true)).await.unwrap();
    let boxed = payload_of(5).await["box"].clone().into_json();
    assert_eq!(boxed, serde_json::json!({"a": 1, "b": 2}), "set under a key, by filter");

    // The index follows the payload.
    let set = SetPayloadPointsBuilder::new(name, object(serde_json::json!({"tenant": "moved"})));
    client.set_payload(set.points_selector(some(0..1)).wait(true)).await.unwrap();
    assert_eq!(count(client, name, filter).await, 3);
    assert_eq!(
        count(client, name, Filter::must([Condition::matches("tenant", "moved".to_owned())])).await,
        1
    );

    let overwrite = SetPayloadPointsBuilder::new(name, object(serde_json::json!({"n": 1})));
    client.overwrite_payload(overwrite.points_selector(some(1..2)).wait(true)).await.unwrap();
    assert_eq!(payload_of(1).await, HashMap::from([("n".to_owned(), Value::from(1))]));

    let delete = DeletePayloadPointsBuilder::new(name, vec!["price".into(), "box".into()]);
    client.delete_payload(delete.points_selector(some(2..3)).wait(true)).await.unwrap();
    let keys = payload_of(2).await.into_keys().collect::<BTreeSet<_>>();
    assert_eq!(keys, ["n", "tenant", "version", "state"].map(str::to_owned).into());

    client.clear_payload(ClearPayloadPointsBuilder::new(name).points(some(3..4)).wait(true)).await.unwrap();
    assert!(payload_of(3).await.is_empty());

    let set = SetPayloadPointsBuilder::new(name, object(serde_json::json!({"a": 1})));
    let (code, _) = refusal(client.set_payload(set.points_selector(some(700..701)).wait(true)).await);
    assert_eq!(code, Code::NotFound, "a payload for a point that is not there");
    subject.finish(&[]).await;
}

#[tokio::test]
async fn a_bad_point_refuses_its_whole_batch() {
    let subject = Subject::with_collection("refusals").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, vec![point(0)]).await;
    let wrong = |vector: Vec<f32>| PointStruct::new(id(500), vector, payload(500));
    let mut bad: Vec<(&str, PointStruct)> = vec![
        ("too short", wrong(vec![1.0; 3])),
        ("too long", wrong(vec![0.5; DIMENSIONS + 1])),
        ("empty", wrong(vec![])),
        (
            "unknown vector name",
            PointStruct::new(id(500), HashMap::from([("image".to_owned(), vector(0))]), payload(500)),
        ),
        ("id is not a UUID", PointStruct::new("not-a-uuid", vector(1), payload(1))),
        ("no id", PointStruct { id: None, ..point(500) }),
    ];
    if subject.is_own() {
        // A Qdrant server stores these; Flotilla would rather know.
        let mut nan = vector(1);
        nan[383] = f32::NAN;
        let mut infinite = vector(1);
        infinite[0] = f32::INFINITY;
        bad.extend([("NaN", wrong(nan)), ("infinite", wrong(infinite))]);
        let payload = HashMap::from([("price".to_owned(), Value::from(f64::NAN))]);
        bad.push(("NaN in the payload", PointStruct::new(id(500), vector(1), payload)));
        bad.push(("no vectors", PointStruct { vectors: None, ..point(500) }));
    }
    for (label, bad) in bad {
        for mode in [UpdateMode::Upsert, UpdateMode::InsertOnly] {
            // In the middle: neither the points before it nor those after it may be stored.
            let mut batch: Vec<_> = (100..150).map(point).collect();
            batch.push(bad.clone());
            batch.extend((150..200).map(point));
            let request = UpsertPointsBuilder::new(name, batch).wait(true).update_mode(mode);
            let (code, message) = refusal(client.upsert_points(request).await);
            assert_eq!(code, Code::InvalidArgument, "{label}: {message}");
            if subject.is_own() {
                assert_eq!(count(client, name, Filter::default()).await, 1, "{label}: part of it was stored");
            }
        }
    }
    for (label, target, using) in [("length", vec![1.0; 3], None), ("name", vector(0), Some("image"))] {
        let mut request = QueryPointsBuilder::new(name).query(target);
        if let Some(using) = using {
            request = request.using(using);
        }
        let (code, message) = refusal(client.query(request).await);
        assert_eq!(code, Code::InvalidArgument, "query with a wrong {label}: {message}");
    }
    subject.finish(&[]).await;
}

#[tokio::test]
async fn an_acknowledged_batch_is_visible_and_counts_never_fall() {
    let subject = Subject::with_collection("visibility").await;
    let (client, name) = (&subject.client, &subject.collection);
    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (client, name, done) = (support::client(&subject.url), name.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            let mut last = 0;
            while !done.load(Ordering::SeqCst) {
                let now = count(&client, &name, Filter::default()).await;
                assert!(now >= last, "points went away: {last}, then {now}");
                last = now;
            }
        })
    };
    for batch in 0..40 {
        upsert(client, name, (batch * 25..batch * 25 + 25).map(point).collect()).await;
        assert_eq!(count(client, name, Filter::default()).await, (batch + 1) * 25);
    }
    done.store(true, Ordering::SeqCst);
    reader.await.unwrap();
    subject.finish(&[]).await;
}
