//! What Flotilla expects of a vector server's collections, aliases and refusals. Set `QDRANT_URL` to run the same
//! assertions against a Qdrant server.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::qdrant_client::qdrant::*;
use alias_operations::Action;
use collections_client::CollectionsClient;
use points_client::PointsClient;
use support::*;
use tonic::{Code, Status};

#[tokio::test]
async fn a_collection_from_creation_to_deletion() {
    let subject = Subject::start("lifecycle");
    let (client, name) = (&subject.client, &subject.collection);
    assert!(!client.collection_exists(name).await.unwrap());
    let missing = || async { refusal(client.count(CountPointsBuilder::new(name)).await).0 };
    assert_eq!(missing().await, Code::NotFound);
    let (code, message) = refusal(client.collection_info(name).await);
    assert_eq!(code, Code::NotFound, "{message}");
    assert!(message.contains(name), "the refusal names the collection: {message}");
    let (code, _) = refusal(client.upsert_points(UpsertPointsBuilder::new(name, vec![point(0)])).await);
    assert_eq!(code, Code::NotFound);

    create(client, name).await;
    assert!(client.collection_exists(name).await.unwrap());
    let listed = client.list_collections().await.unwrap().collections;
    assert!(listed.iter().any(|collection| collection.name == *name));
    let again = CreateCollectionBuilder::new(name).vectors_config(VectorParamsBuilder::new(4, Distance::Dot));
    assert_eq!(refusal(client.create_collection(again).await).0, Code::AlreadyExists);

    upsert(client, name, (0..30).map(point).collect()).await;
    let info = client.collection_info(name).await.unwrap().result.unwrap();
    assert_eq!(info.points_count, Some(30));
    let params = info.config.unwrap().params.unwrap();
    match params.vectors_config.unwrap().config.unwrap() {
        vectors_config::Config::Params(params) => {
            assert_eq!((params.size, params.distance()), (DIMENSIONS as u64, Distance::Dot));
        }
        vectors_config::Config::ParamsMap(other) => panic!("{other:?}"),
    }
    let schema = &info.payload_schema["tenant"];
    assert_eq!(schema.data_type(), PayloadSchemaType::Keyword);
    match schema.params.as_ref().unwrap().index_params.as_ref().unwrap() {
        payload_index_params::IndexParams::KeywordIndexParams(params) => {
            assert_eq!(params.is_tenant, Some(true));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(info.payload_schema["version"].data_type(), PayloadSchemaType::Uuid);
    assert_eq!(info.payload_schema["n"].points, Some(30));
    client.delete_field_index(DeleteFieldIndexCollectionBuilder::new(name, "n").wait(true)).await.unwrap();
    let info = client.collection_info(name).await.unwrap().result.unwrap();
    assert!(!info.payload_schema.contains_key("n") && info.payload_schema.len() == 2);

    let change = UpdateCollectionBuilder::new(name)
        .hnsw_config(HnswConfigDiffBuilder::default().m(24))
        .optimizers_config(OptimizersConfigDiffBuilder::default().indexing_threshold(5_000));
    client.update_collection(change).await.unwrap();
    let config = client.collection_info(name).await.unwrap().result.unwrap().config.unwrap();
    let hnsw = config.hnsw_config.unwrap();
    assert_eq!((hnsw.m, hnsw.ef_construct), (Some(24), Some(100)), "what was not named stays");
    assert_eq!(config.optimizer_config.unwrap().indexing_threshold, Some(5_000));

    assert!(client.delete_collection(name).await.unwrap().result);
    assert!(!client.delete_collection(name).await.unwrap().result, "there is nothing left to delete");
    assert_eq!(missing().await, Code::NotFound);
    // Its successor starts empty.
    create(client, name).await;
    assert_eq!(count(client, name, Filter::default()).await, 0);
    subject.finish(&[]).await;
}

#[tokio::test]
async fn bad_settings_create_nothing() {
    let subject = Subject::start("settings");
    let (client, name) = (&subject.client, &subject.collection);
    let with = |size, distance| {
        CreateCollectionBuilder::new(name).vectors_config(VectorParamsBuilder::new(size, distance))
    };
    for request in [with(0, Distance::Dot), with(70_000, Distance::Dot), with(4, Distance::UnknownDistance)] {
        let (code, message) = refusal(client.create_collection(request).await);
        assert_eq!(code, Code::InvalidArgument, "{message}");
    }
    for bad in ["", "a/b", "..\\up", "what?", "tab\u{1f}"] {
        let request =
            CreateCollectionBuilder::new(bad).vectors_config(VectorParamsBuilder::new(4, Distance::Dot));
        let (code, message) = refusal(client.create_collection(request).await);
        assert_eq!(code, Code::InvalidArgument, "{bad:?}: {message}");
    }
    assert!(!client.collection_exists(name).await.unwrap());
    // Names that would be trouble as paths and are none here.
    if subject.is_own() {
        for odd in ["..", ".", "con", "ünïcode 名前", &"x".repeat(255)] {
            create(client, odd).await;
            upsert(client, odd, vec![point(1)]).await;
            assert_eq!(count(client, odd, Filter::default()).await, 1);
            assert!(client.delete_collection(odd).await.unwrap().result);
        }
    }
}

#[tokio::test]
async fn an_alias_switches_without_a_gap() {
    let subject = Subject::start("aliases");
    let client = Arc::new(support::client(&subject.url));
    let names: Vec<String> =
        ["old", "new"].iter().map(|half| format!("{}_{half}", subject.collection)).collect();
    let alias = format!("{}_live", subject.collection);
    for (name, points) in names.iter().zip([10, 20]) {
        create(&client, name).await;
        upsert(&client, name, (0..points).map(point).collect()).await;
    }
    let point_at = |target: &str| {
        Action::CreateAlias(CreateAlias { collection_name: target.to_owned(), alias_name: alias.clone() })
    };
    let remove = || Action::DeleteAlias(DeleteAlias { alias_name: alias.clone() });
    let mut raw = CollectionsClient::connect(subject.url.clone()).await.unwrap();
    let mut apply = async |actions: Vec<Action>| {
        let actions = actions.into_iter().map(|action| AliasOperations { action: Some(action) }).collect();
        raw.update_aliases(ChangeAliases { actions, timeout: None }).await
    };
    apply(vec![point_at(&names[0])]).await.unwrap();
    assert_eq!(count(&client, &alias, Filter::default()).await, 10);

    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (client, alias, done) = (Arc::clone(&client), alias.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            while !done.load(Ordering::SeqCst) {
                let seen = count(&client, &alias, Filter::default()).await;
                assert!(seen == 10 || seen == 20, "{seen}");
            }
        })
    };
    for turn in 0..50 {
        apply(vec![remove(), point_at(&names[(turn + 1) % 2])]).await.unwrap();
        let expected = if turn % 2 == 0 { 20 } else { 10 };
        assert_eq!(count(&client, &alias, Filter::default()).await, expected);
    }
    done.store(true, Ordering::SeqCst);
    reader.await.unwrap();

    // One bad action refuses all of them.
    let refused =
        apply(vec![point_at(&names[1]), point_at("there-is-no-such-collection")]).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(count(&client, &alias, Filter::default()).await, 10, "the alias did not move");

    let of = async |name: &str| client.list_collection_aliases(name).await;
    let listed = of(&names[0]).await.unwrap().aliases;
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].alias_name, &listed[0].collection_name), (&alias, &names[0]));
    assert!(of(&names[1]).await.unwrap().aliases.is_empty());
    // Writes through the alias, and the alias goes with its collection.
    upsert(&client, &alias, vec![point(77)]).await;
    assert_eq!(count(&client, &names[0], Filter::default()).await, 11);
    client.delete_collection(&names[0]).await.unwrap();
    assert_eq!(refusal(client.count(CountPointsBuilder::new(&alias)).await).0, Code::NotFound);
    let all = client.list_aliases().await.unwrap().aliases;
    assert!(all.iter().all(|entry| entry.alias_name != alias));
    subject.finish(&[&names[1]]).await;
}

/// The message of an UNIMPLEMENTED refusal.
fn unimplemented<T: std::fmt::Debug>(result: Result<T, Status>) -> String {
    let status = result.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    status.message().to_owned()
}

#[tokio::test]
#[expect(deprecated, reason = "refused, not used")]
async fn what_is_not_served_is_refused_by_name() {
    let subject = Subject::with_collection("unsupported").await;
    if !subject.is_own() {
        return subject.finish(&[]).await;
    }
    let name = subject.collection.clone();
    let mut points = PointsClient::connect(subject.url.clone()).await.unwrap();
    let mut collections = CollectionsClient::connect(subject.url.clone()).await.unwrap();
    let shard_key_selector = Some(ShardKeySelector::default());
    let selector = || Some(PointsSelector { points_selector_one_of: Some(Filter::default().into()) });
    let mut seen = Vec::new();
    macro_rules! refused {
        ($client:ident.$method:ident($request:expr) names $what:expr) => {{
            let message = unimplemented($client.$method($request).await);
            assert!(message.contains($what), "expected {:?} in {message:?}", $what);
            seen.push(message);
        }};
    }
    macro_rules! with_shard_key {
        ($($method:ident: $message:ident { $($more:tt)* };)*) => {$(
            refused!(points.$method($message {
                collection_name: name.clone(), shard_key_selector: shard_key_selector.clone(), $($more)*
                ..Default::default()
            }) names concat!(stringify!($message), ".shard_key_selector"));
        )*};
    }
    with_shard_key! {
        upsert: UpsertPoints { points: vec![point(1)], };
        delete: DeletePoints { points: selector(), };
        get: GetPoints { ids: ids([1]), };
        set_payload: SetPayloadPoints { points_selector: selector(), };
        overwrite_payload: SetPayloadPoints { points_selector: selector(), };
        delete_payload: DeletePayloadPoints { points_selector: selector(), };
        clear_payload: ClearPayloadPoints { points: selector(), };
        scroll: ScrollPoints { };
        count: CountPoints { };
        query: QueryPoints { };
    }
    let query = || QueryPoints { collection_name: name.clone(), ..Default::default() };
    let lookup_from = Some(LookupLocation { collection_name: name.clone(), ..Default::default() });
    refused!(points.query(QueryPoints { lookup_from: lookup_from.clone(), ..query() }) names "QueryPoints.lookup_from");
    let prefetch = vec![PrefetchQuery { lookup_from, ..Default::default() }];
    refused!(points.query(QueryPoints { prefetch, ..query() }) names "PrefetchQuery.lookup_from");
    let quantization = Some(QuantizationSearchParams::default());
    let params = Some(SearchParams { quantization, ..Default::default() });
    refused!(points.query(QueryPoints { params, ..query() }) names "SearchParams.quantization");
    let sparse = vector_input::Variant::Sparse(SparseVector { values: vec![1.0], indices: vec![1] });
    let nearest = query::Variant::Nearest(VectorInput { variant: Some(sparse) });
    let sparse_query = Some(Query { variant: Some(nearest) });
    refused!(points.query(QueryPoints { query: sparse_query, ..query() }) names "VectorInput.sparse");
    let recommend = Some(Query { variant: Some(query::Variant::Recommend(RecommendInput::default())) });
    refused!(points.query(QueryPoints { query: recommend, ..query() }) names "Query.recommend");
    let slice =
        Condition { condition_one_of: Some(condition::ConditionOneOf::Slice(SliceCondition::default())) };
    refused!(points.query(QueryPoints { filter: Some(Filter::must([slice])), ..query() }) names "Condition.slice");
    let geo =
        FieldCondition { key: "at".into(), geo_radius: Some(GeoRadius::default()), ..Default::default() };
    let filter = Some(Filter::must([Condition::from(geo)]));
    refused!(points.count(CountPoints { collection_name: name.clone(), filter, ..Default::default() }) names "geo");
    let order_by = Some(OrderBy {
        key: "n".into(),
        start_from: Some(start_from::Value::Integer(1).into()),
        direction: None,
    });
    refused!(points.scroll(ScrollPoints { collection_name: name.clone(), order_by, ..Default::default() })
        names "OrderBy.start_from");
    let sparse_point = PointStruct::new(id(1), Vector::new_sparse(vec![1], vec![1.0]), payload(1));
    refused!(points.upsert(UpsertPoints {
        collection_name: name.clone(), points: vec![point(2), sparse_point], ..Default::default()
    }) names "Vector.sparse");
    let index = |field_type, field_index_params| CreateFieldIndexCollection {
        collection_name: name.clone(),
        field_name: "x".into(),
        field_type,
        field_index_params,
        ..Default::default()
    };
    refused!(points.create_field_index(index(Some(FieldType::Geo as i32), None)) names "Geo");
    refused!(points.search(SearchPoints::default()) names "search");
    refused!(points.update_batch(UpdateBatchPoints::default()) names "update_batch");
    refused!(points.recommend(RecommendPoints::default()) names "recommend");

    let create = || CreateCollection {
        collection_name: "refused".into(),
        vectors_config: Some(VectorParamsBuilder::new(4, Distance::Dot).build().into()),
        ..Default::default()
    };
    macro_rules! with_setting {
        ($($field:ident: $value:expr;)*) => {$(
            refused!(collections.create(CreateCollection { $field: Some($value), ..create() })
                names concat!("CreateCollection.", stringify!($field)));
        )*};
    }
    with_setting! {
        wal_config: WalConfigDiff::default();
        quantization_config: QuantizationConfig::default();
        sparse_vectors_config: SparseVectorConfig::default();
        strict_mode_config: StrictModeConfig::default();
        shard_number: 2;
        replication_factor: 2;
        sharding_method: ShardingMethod::Custom as i32;
    }
    let optimizers_config = Some(OptimizersConfigDiff { flush_interval_sec: Some(1), ..Default::default() });
    refused!(collections.create(CreateCollection { optimizers_config, ..create() }) names "flush_interval_sec");
    refused!(collections.update(UpdateCollection {
        collection_name: name.clone(), params: Some(CollectionParamsDiff::default()), ..Default::default()
    }) names "UpdateCollection.params");
    refused!(collections.create_shard_key(CreateShardKeyRequest::default()) names "create_shard_key");

    assert!(seen.iter().all(|message| message.contains("flotilla-vectors")), "{seen:#?}");
    assert_eq!(count(&subject.client, &name, Filter::default()).await, 0, "a refused request did something");
    assert!(!subject.client.collection_exists("refused").await.unwrap());
    subject.finish(&[]).await;
}

#[tokio::test]
async fn fields_that_a_single_node_satisfies_are_taken() {
    let subject = Subject::with_collection("satisfied").await;
    let (client, name) = (&subject.client, &subject.collection);
    let strong = WriteOrdering { r#type: WriteOrderingType::Strong as i32 };
    let request = UpsertPointsBuilder::new(name, vec![point(1)]).wait(true).ordering(strong).timeout(30);
    client.upsert_points(request).await.unwrap();
    for consistency in [ReadConsistencyType::All, ReadConsistencyType::Majority, ReadConsistencyType::Quorum]
    {
        let request = GetPointsBuilder::new(name, ids([1]))
            .read_consistency(read_consistency::Value::Type(consistency as i32))
            .timeout(30);
        assert_eq!(client.get_points(request).await.unwrap().result.len(), 1);
    }
    if subject.is_own() {
        // `wait = false` is served as `wait = true`.
        client.upsert_points(UpsertPointsBuilder::new(name, vec![point(2)]).wait(false)).await.unwrap();
        assert_eq!(count(client, name, Filter::default()).await, 2);
    }
    let (code, _) = refusal(client.count(CountPointsBuilder::new(name).timeout(0)).await);
    assert_eq!(code, Code::InvalidArgument);
    subject.finish(&[]).await;
}
