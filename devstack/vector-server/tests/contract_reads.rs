//! What Flotilla expects of a vector server when it reads. Set `QDRANT_URL` to run the same assertions against a
//! Qdrant server.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use ::qdrant_client::qdrant::*;
use support::*;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test]
async fn health_names_a_version_that_the_client_accepts() {
    let subject = Subject::start("health");
    let reply = subject.client.health_check().await.unwrap();
    let major_minor: Vec<u64> = reply.version.split('.').take(2).map(|part| part.parse().unwrap()).collect();
    assert!(major_minor[0] == 1 && major_minor[1] >= 16, "{reply:?}");

    // The standard protocol too, for probes that know nothing of Qdrant.
    let channel = tonic::transport::Endpoint::new(subject.url.clone()).unwrap().connect().await.unwrap();
    let mut standard = HealthClient::new(channel);
    let answer = standard.check(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
}

#[tokio::test]
async fn vectors_come_back_bit_by_bit() {
    let subject = Subject::with_collection("bits").await;
    let (client, name) = (&subject.client, &subject.collection);
    // Among unit vectors, the values that a lossy path would change first.
    let mut odd = vector(0);
    odd[..4].copy_from_slice(&[-0.0, f32::MIN_POSITIVE / 4.0, f32::EPSILON, -f32::MIN_POSITIVE]);
    let mut points: Vec<_> = (1..300).map(point).collect();
    points.push(PointStruct::new(id(0), odd.clone(), payload(0)));
    upsert(client, name, points).await;
    let bits = |elements: &[f32]| elements.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let expected = |n: u64| if n == 0 { odd.clone() } else { vector(n) };

    for optimised in [false, true] {
        if optimised {
            settled(client, name).await;
        }
        let fetched = fetch(client, name, 0..300).await;
        assert_eq!(fetched.len(), 300);
        for point in fetched {
            let n = number(&point.payload);
            assert_eq!(bits(&elements(point.vectors)), bits(&expected(n)), "point {n} by id");
        }
        let request = ScrollPointsBuilder::new(name).limit(300).with_vectors(true).with_payload(true);
        for point in client.scroll(request).await.unwrap().result {
            let n = number(&point.payload);
            assert_eq!(bits(&elements(point.vectors)), bits(&expected(n)), "point {n} by scrolling");
        }
        let request = QueryPointsBuilder::new(name).query(odd.clone()).limit(300);
        for point in client.query(request.with_vectors(true).with_payload(true)).await.unwrap().result {
            let n = number(&point.payload);
            assert_eq!(bits(&elements(point.vectors)), bits(&expected(n)), "point {n} by query");
        }
    }
    subject.finish(&[]).await;
}

#[tokio::test]
async fn payloads_come_back_as_they_went() {
    let subject = Subject::with_collection("payloads").await;
    let (client, name) = (&subject.client, &subject.collection);
    let sent: ::qdrant_client::Payload = serde_json::json!({
        "n": 1, "text": "Grüße, 世界 \u{1F680}", "empty": "", "nothing": null, "yes": true, "big": i64::MAX, "small": i64::MIN,
        "float": 0.1, "whole": 3.0, "tiny": 5e-324, "list": [1, "two", [3.5, null], {}], "deep": {"a": {"b": [{"c": 1}]}},
    })
    .try_into()
    .unwrap();
    upsert(client, name, vec![PointStruct::new(7u64, vector(7), sent.clone())]).await;
    let request = GetPointsBuilder::new(name, vec![PointId::from(7u64)]).with_payload(true);
    let got = client.get_points(request).await.unwrap().result.remove(0);
    let sent: std::collections::HashMap<String, Value> = sent.into();
    assert_eq!(got.payload, sent);

    let only = |selector| GetPointsBuilder::new(name, vec![PointId::from(7u64)]).with_payload(selector);
    let include = with_payload_selector::SelectorOptions::Include(PayloadIncludeSelector {
        fields: vec!["deep.a".into(), "n".into()],
    });
    let keys = |point: &RetrievedPoint| point.payload.keys().cloned().collect::<BTreeSet<_>>();
    let got = client.get_points(only(include)).await.unwrap().result.remove(0);
    assert_eq!(keys(&got), BTreeSet::from(["deep".into(), "n".into()]));
    let exclude = with_payload_selector::SelectorOptions::Exclude(PayloadExcludeSelector {
        fields: vec!["text".into()],
    });
    let got = client.get_points(only(exclude)).await.unwrap().result.remove(0);
    assert!(!got.payload.contains_key("text") && got.payload.len() == sent.len() - 1);
    subject.finish(&[]).await;
}

/// A filter, and what it means for a point's number.
type Case = (&'static str, Filter, Box<dyn Fn(u64) -> bool>);

fn filters() -> Vec<Case> {
    let two = || Condition::matches("tenant", "tenant-2".to_owned());
    let range = |gte: f64, lt: f64| {
        Condition::range("n", Range { gte: Some(gte), lt: Some(lt), ..Default::default() })
    };
    vec![
        ("no filter", Filter::default(), Box::new(|_| true)),
        ("must tenant", Filter::must([two()]), Box::new(|n| n % 5 == 2)),
        (
            "must any of the versions",
            Filter::must([Condition::matches("version", vec![version(5), version(45), version(999)])]),
            Box::new(|n| [0, 4, 99].contains(&(n / 10))),
        ),
        (
            "must and range and must_not",
            Filter {
                must: vec![two(), range(100.0, 900.0)],
                must_not: vec![Condition::matches("version", version(450))],
                ..Default::default()
            },
            Box::new(|n| n % 5 == 2 && (100..900).contains(&n) && n / 10 != 45),
        ),
        (
            "should, on a field without an index",
            Filter::should([two(), Condition::range("price", Range { lt: Some(2.0), ..Default::default() })]),
            Box::new(|n| n % 5 == 2 || n < 16),
        ),
        (
            "min_should two of three",
            Filter {
                min_should: Some(MinShould {
                    conditions: vec![two(), range(0.0, 500.0), range(400.0, 900.0)],
                    min_count: 2,
                }),
                ..Default::default()
            },
            Box::new(|n| {
                let met = [n % 5 == 2, n < 500, (400..900).contains(&n)];
                met.into_iter().filter(|met| *met).count() >= 2
            }),
        ),
        ("ids", Filter::must([Condition::has_id(ids((0..1_000).step_by(37)))]), Box::new(|n| n % 37 == 0)),
        (
            "nested filter",
            Filter::must([Filter::should([two(), range(0.0, 10.0)]).into()]),
            Box::new(|n| n % 5 == 2 || n < 10),
        ),
        ("is_empty", Filter::must([Condition::is_empty("missing")]), Box::new(|_| true)),
        (
            "nothing matches",
            Filter::must([Condition::matches("tenant", "x".to_owned())]),
            Box::new(|_| false),
        ),
    ]
}

#[tokio::test]
async fn search_agrees_with_brute_force_under_every_filter() {
    const POINTS: u64 = 1_000;
    let subject = Subject::with_collection("search").await;
    let (client, name) = (&subject.client, &subject.collection);
    for start in (0..POINTS).step_by(250) {
        upsert(client, name, (start..start + 250).map(point).collect()).await;
    }
    settled(client, name).await;
    for (label, filter, matches) in filters() {
        let matching: Vec<u64> = (0..POINTS).filter(|n| matches(*n)).collect();
        assert_eq!(count(client, name, filter.clone()).await, matching.len() as u64, "count: {label}");
        for exact in [true, false] {
            let (mut found, mut wanted) = (0, 0);
            for q in 0..10 {
                let target = vector(5_000 + q);
                let mut best: Vec<(f32, u64)> =
                    matching.iter().map(|n| (dot(&target, &vector(*n)), *n)).collect();
                best.sort_by(|a, b| b.0.total_cmp(&a.0));
                let expected: Vec<u64> = best.iter().take(10).map(|(_, n)| *n).collect();
                let request = QueryPointsBuilder::new(name)
                    .query(target.clone())
                    .limit(10)
                    .with_payload(true)
                    .filter(filter.clone())
                    .params(SearchParamsBuilder::default().exact(exact));
                let hits = client.query(request).await.unwrap().result;
                assert!(hits.is_sorted_by(|a, b| a.score >= b.score), "{label}: best first");
                for hit in &hits {
                    let n = number(&hit.payload);
                    assert!(matches(n), "{label}: point {n} does not match");
                    let score = dot(&target, &vector(n));
                    assert!(
                        (hit.score - score).abs() < 1e-5,
                        "{label}: point {n}: {} and {score}",
                        hit.score
                    );
                }
                let got: Vec<u64> = hits.iter().map(|hit| number(&hit.payload)).collect();
                if exact {
                    assert_eq!(got, expected, "{label}");
                }
                found += expected.iter().filter(|n| got.contains(n)).count();
                wanted += expected.len();
            }
            assert!(found * 100 >= wanted * 95, "{label}, exact = {exact}: recall {found} of {wanted}");
        }
    }
    subject.finish(&[]).await;
}

#[tokio::test]
async fn an_hnsw_index_finds_what_brute_force_finds() {
    const POINTS: u64 = 4_000;
    let subject = Subject::with_collection("hnsw").await;
    let (client, name) = (&subject.client, &subject.collection);
    // 4,000 x 384 x 4 bytes is 6 MB; the threshold is in KB.
    let optimizers =
        OptimizersConfigDiffBuilder::default().indexing_threshold(1_000).default_segment_number(1);
    client.update_collection(UpdateCollectionBuilder::new(name).optimizers_config(optimizers)).await.unwrap();
    for start in (0..POINTS).step_by(500) {
        upsert(client, name, (start..start + 500).map(point).collect()).await;
    }
    settled(client, name).await;
    let info = client.collection_info(name).await.unwrap().result.unwrap();
    assert_eq!(info.points_count, Some(POINTS));
    if subject.is_own() {
        // A Qdrant server may decide otherwise for so few points.
        assert!(info.indexed_vectors_count.unwrap() >= POINTS / 2, "{info:?}");
    }
    let filter = Filter::must([Condition::matches("tenant", "tenant-3".to_owned())]);
    let mut found = 0;
    for q in 0..20 {
        let target = vector(90_000 + q);
        let mut best: Vec<(f32, u64)> =
            (0..POINTS).filter(|n| n % 5 == 3).map(|n| (dot(&target, &vector(n)), n)).collect();
        best.sort_by(|a, b| b.0.total_cmp(&a.0));
        let expected: Vec<u64> = best.iter().take(10).map(|(_, n)| *n).collect();
        let request = QueryPointsBuilder::new(name).query(target).limit(10).with_payload(true);
        for hit in client.query(request.filter(filter.clone())).await.unwrap().result {
            let n = number(&hit.payload);
            assert_eq!(n % 5, 3);
            found += usize::from(expected.contains(&n));
        }
    }
    assert!(found >= 190, "recall {found} of 200");
    subject.finish(&[]).await;
}

#[tokio::test]
async fn scrolling_sees_each_point_once() {
    let subject = Subject::with_collection("scroll").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, (0..530).map(point).collect()).await;
    let filter =
        Filter::must([Condition::matches("tenant", vec!["tenant-1".to_owned(), "tenant-4".to_owned()])]);
    let (mut seen, mut pages, mut offset) = (Vec::new(), 0, None::<PointId>);
    loop {
        let mut request = ScrollPointsBuilder::new(name).limit(50).filter(filter.clone()).with_payload(true);
        if let Some(offset) = offset {
            request = request.offset(offset);
        }
        let page = client.scroll(request).await.unwrap();
        assert!(page.result.len() <= 50);
        pages += 1;
        seen.extend(page.result.iter().map(|point| number(&point.payload)));
        match page.next_page_offset {
            Some(next) => offset = Some(next),
            None => break,
        }
    }
    assert_eq!(pages, 5, "212 points in pages of 50");
    assert_eq!(seen.iter().copied().collect::<BTreeSet<_>>().len(), seen.len(), "a point came twice");
    seen.sort_unstable();
    assert_eq!(seen, (0..530).filter(|n| [1, 4].contains(&(n % 5))).collect::<Vec<_>>());

    let order = OrderByBuilder::new("n").direction(Direction::Desc as i32);
    let request = ScrollPointsBuilder::new(name).limit(3).order_by(order).with_payload(true);
    let top: Vec<u64> =
        client.scroll(request).await.unwrap().result.iter().map(|p| number(&p.payload)).collect();
    assert_eq!(top, [529, 528, 527]);
    let (code, _) = refusal(client.scroll(ScrollPointsBuilder::new(name).limit(0)).await);
    assert_eq!(code, Code::InvalidArgument);
    subject.finish(&[]).await;
}

#[tokio::test]
async fn queries_by_point_by_fusion_and_in_batches() {
    let subject = Subject::with_collection("queries").await;
    let (client, name) = (&subject.client, &subject.collection);
    upsert(client, name, (0..200).map(point).collect()).await;
    let numbers = |hits: Vec<ScoredPoint>| hits.iter().map(|hit| number(&hit.payload)).collect::<Vec<_>>();
    let nearest = |target: &[f32], limit: usize, skip: Option<u64>| {
        let mut best: Vec<(f32, u64)> =
            (0..200).filter(|n| Some(*n) != skip).map(|n| (dot(target, &vector(n)), n)).collect();
        best.sort_by(|a, b| b.0.total_cmp(&a.0));
        best.into_iter().take(limit).map(|(_, n)| n).collect::<Vec<_>>()
    };
    let request = || QueryPointsBuilder::new(name).with_payload(true);

    let hits = client.query(request().query(PointId::from(id(9))).limit(5)).await.unwrap().result;
    assert_eq!(numbers(hits), nearest(&vector(9), 5, Some(9)), "by point, without the point itself");
    let (code, _) = refusal(client.query(request().query(PointId::from(id(12_345)))).await);
    assert_eq!(code, Code::NotFound);

    let hits = client.query(request().query(vector(500)).limit(5).offset(3)).await.unwrap().result;
    assert_eq!(numbers(hits), nearest(&vector(500), 8, None)[3..]);
    let threshold = dot(&vector(500), &vector(nearest(&vector(500), 3, None)[2])) - 1e-6;
    let hits = client.query(request().query(vector(500)).score_threshold(threshold)).await.unwrap().result;
    assert_eq!(numbers(hits), nearest(&vector(500), 3, None));

    // Reciprocal rank fusion with k = 2, ranks from 0: score = sum of 1 / (2 + rank).
    let (a, b) = (vector(500), vector(532));
    let prefetch = |v: &[f32]| PrefetchQueryBuilder::default().query(v.to_vec()).limit(20u64).build();
    let mut fused = BTreeMap::<u64, f32>::new();
    for target in [&a, &b] {
        for (rank, n) in nearest(target, 20, None).into_iter().enumerate() {
            *fused.entry(n).or_default() += 1.0 / (2 + rank) as f32;
        }
    }
    let fusion = || request().prefetch(vec![prefetch(&a), prefetch(&b)]).limit(10);
    for query in [Query::new_fusion(Fusion::Rrf), Query::new_rrf(RrfBuilder::with_k(2))] {
        let hits = client.query(fusion().query(query)).await.unwrap().result;
        let mut expected: Vec<f32> = fused.values().copied().collect();
        expected.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(hits.len(), 10);
        for (hit, expected) in hits.iter().zip(expected) {
            let own = fused[&number(&hit.payload)];
            assert!((hit.score - own).abs() < 1e-5 && (hit.score - expected).abs() < 1e-5, "{hit:?}");
        }
    }

    let batch = [510u64, 511].map(|q| request().query(vector(q)).limit(4).build());
    let answers =
        client.query_batch(QueryBatchPointsBuilder::new(name, batch.to_vec())).await.unwrap().result;
    for (answer, q) in answers.into_iter().zip([510, 511]) {
        assert_eq!(numbers(answer.result), nearest(&vector(q), 4, None));
    }
    let everything = client.query(request().limit(500)).await.unwrap().result;
    assert_eq!(everything.len(), 200, "no query: all points");
    subject.finish(&[]).await;
}
