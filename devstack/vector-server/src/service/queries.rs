//! The universal query: nearest to a vector or a point, fusion of prefetches, order by a field, random sample.

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::filters::optional_in;
use crate::convert::payload::with_payload_in;
use crate::convert::queries::{
    Target, fusion_in, limit_in, order_by_in, rrf_in, search_params_in, target_in,
};
use crate::convert::vectors::{scored_out, with_vectors_in};
use crate::status::{Answer, from_engine, invalid};
use crate::store::Collection;
use crate::unsupported::{absent, unsupported};

/// Answers one query, best first. Its name and timeout are the caller's.
pub fn query(collection: &Collection, query: pb::QueryPoints) -> Answer<Vec<pb::ScoredPoint>> {
    let request = request_in(collection, query)?;
    let points = collection.shard().query(request).map_err(from_engine)?;
    Ok(points.into_iter().map(scored_out).collect())
}

/// Answers several queries over one state of the collection.
pub fn query_batch(
    collection: &Collection,
    queries: Vec<pb::QueryPoints>,
) -> Answer<Vec<Vec<pb::ScoredPoint>>> {
    let requests = queries.into_iter().map(|query| request_in(collection, query)).collect::<Answer<_>>()?;
    let answers =
        collection.shard().query_batch(edge::QueryBatchRequest::new(requests)).map_err(from_engine)?;
    Ok(answers.into_iter().map(|points| points.into_iter().map(scored_out).collect()).collect())
}

fn request_in(collection: &Collection, query: pb::QueryPoints) -> Answer<edge::QueryRequest> {
    let pb::QueryPoints {
        collection_name: _,
        prefetch,
        query,
        using,
        filter,
        params,
        score_threshold,
        limit,
        offset,
        with_vectors,
        with_payload,
        read_consistency: _,
        shard_key_selector,
        lookup_from,
        timeout: _,
    } = query;
    absent("QueryPoints.shard_key_selector", &shard_key_selector)?;
    absent("QueryPoints.lookup_from", &lookup_from)?;
    let mut request = edge::QueryRequest::new(limit_in("limit", limit)?);
    let Scoring { query, exclude } =
        scoring_in(collection, query, &using.unwrap_or_default(), prefetch.len())?;
    request.query = query;
    request.prefetches = prefetches_in(collection, prefetch)?;
    request.filter = excluding(optional_in(filter)?, exclude);
    request.params = search_params_in(params)?;
    request.score_threshold = score_threshold;
    request.offset = usize::try_from(offset.unwrap_or(0)).unwrap_or(usize::MAX);
    request.with_payload = with_payload_in(with_payload, false)?;
    request.with_vector = with_vectors_in(with_vectors, collection.shape())?;
    Ok(request)
}

fn prefetches_in(collection: &Collection, prefetches: Vec<pb::PrefetchQuery>) -> Answer<Vec<edge::Prefetch>> {
    prefetches.into_iter().map(|prefetch| prefetch_in(collection, prefetch)).collect()
}

fn prefetch_in(collection: &Collection, prefetch: pb::PrefetchQuery) -> Answer<edge::Prefetch> {
    let pb::PrefetchQuery { prefetch, query, using, filter, params, score_threshold, limit, lookup_from } =
        prefetch;
    absent("PrefetchQuery.lookup_from", &lookup_from)?;
    let mut result = edge::Prefetch::new(limit_in("prefetch.limit", limit)?);
    let Scoring { query, exclude } =
        scoring_in(collection, query, &using.unwrap_or_default(), prefetch.len())?;
    result.query = query;
    result.prefetches = prefetches_in(collection, prefetch)?;
    result.filter = excluding(optional_in(filter)?, exclude);
    result.params = search_params_in(params)?;
    result.score_threshold = score_threshold;
    Ok(result)
}

/// How results are ranked, and the point that the ranking is about, which is not a result itself.
struct Scoring {
    query: Option<edge::ScoringQuery>,
    exclude: Option<edge::PointId>,
}

fn scoring_in(
    collection: &Collection,
    query: Option<pb::Query>,
    using: &str,
    prefetches: usize,
) -> Answer<Scoring> {
    use edge::ScoringQuery as Engine;
    use pb::query::Variant;
    let mut exclude = None;
    let query = match query.map(|pb::Query { variant }| variant) {
        None => None,
        Some(None) => return Err(invalid("`query` is empty")),
        Some(Some(variant)) => Some(match variant {
            Variant::Nearest(input) => {
                let vector = match target_in(input)? {
                    Target::Vector(vector) => {
                        collection.shape().check_vector(using, &vector)?;
                        edge::VectorInternal::Dense(vector)
                    }
                    Target::Point(id) => {
                        exclude = Some(id);
                        vector_of(collection, id, using)?
                    }
                };
                Engine::Vector(edge::QueryEnum::Nearest(edge::NamedQuery::new(vector, using)))
            }
            Variant::OrderBy(order) => Engine::OrderBy(order_by_in(order)?),
            Variant::Fusion(fusion) => Engine::Fusion(fusion_in(fusion)?),
            Variant::Rrf(rrf) => Engine::Fusion(rrf_in(rrf, prefetches)?),
            Variant::Sample(sample) => match pb::Sample::try_from(sample) {
                Ok(pb::Sample::Random) => Engine::Sample(edge::Sample::Random),
                Err(error) => return Err(invalid(format!("`query.sample`: {error}"))),
            },
            Variant::Recommend(_) => return Err(unsupported("Query.recommend")),
            Variant::Discover(_) => return Err(unsupported("Query.discover")),
            Variant::Context(_) => return Err(unsupported("Query.context")),
            Variant::Formula(_) => return Err(unsupported("Query.formula")),
            Variant::NearestWithMmr(_) => return Err(unsupported("Query.nearest_with_mmr")),
            Variant::RelevanceFeedback(_) => return Err(unsupported("Query.relevance_feedback")),
            Variant::Text(_) => return Err(unsupported("Query.text")),
        }),
    };
    if matches!(query, Some(Engine::Fusion(_))) && prefetches == 0 {
        return Err(invalid("a fusion query needs at least one prefetch"));
    }
    Ok(Scoring { query, exclude })
}

/// The stored vector of a point.
fn vector_of(collection: &Collection, id: edge::PointId, using: &str) -> Answer<edge::VectorInternal> {
    collection.shape().dimension(using)?;
    let mut retrieve = edge::RetrieveRequest::new(vec![id]);
    retrieve.with_payload = Some(false.into());
    retrieve.with_vector = Some(edge::WithVector::Bool(true));
    let record = collection
        .shard()
        .retrieve(retrieve)
        .map_err(from_engine)?
        .pop()
        .ok_or_else(|| tonic::Status::not_found(format!("Not found: No point with id {id} found")))?;
    let vector = record.get_vector_by_name(using).map(edge::VectorRef::to_owned);
    vector.ok_or_else(|| invalid(format!("point {id} has no vector {using:?}")))
}

fn excluding(filter: Option<edge::Filter>, id: Option<edge::PointId>) -> Option<edge::Filter> {
    let Some(id) = id else { return filter };
    let mut filter = filter.unwrap_or_default();
    let excluded = edge::Condition::HasId(std::iter::once(id).collect());
    filter.must_not.get_or_insert_default().push(excluded);
    Some(filter)
}
