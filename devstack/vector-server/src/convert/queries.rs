//! The parts of a query that don't need the collection.

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::ids;
use crate::convert::payload::path_in;
use crate::status::{Answer, invalid};
use crate::unsupported::{absent, unsupported};

/// Results per page or query where the request does not say; Qdrant's default.
pub const DEFAULT_LIMIT: usize = 10;
/// The constant `k` of reciprocal rank fusion where the request does not say; Qdrant's default.
const DEFAULT_RRF_K: usize = 2;

/// A number of results; 0 is refused, as a Qdrant server does.
pub fn limit_in(field: &str, limit: Option<u64>) -> Answer<usize> {
    match limit {
        None => Ok(DEFAULT_LIMIT),
        Some(0) => Err(invalid(format!("`{field}` is 0; it must be at least 1"))),
        Some(limit) => Ok(usize::try_from(limit).unwrap_or(usize::MAX)),
    }
}

/// How to search.
pub fn search_params_in(params: Option<pb::SearchParams>) -> Answer<Option<edge::SearchParams>> {
    let Some(pb::SearchParams { hnsw_ef, exact, quantization, indexed_only, acorn, idf }) = params else {
        return Ok(None);
    };
    absent("SearchParams.quantization", &quantization)?;
    absent("SearchParams.acorn", &acorn)?;
    absent("SearchParams.idf", &idf)?;
    if hnsw_ef == Some(0) {
        return Err(invalid("`hnsw_ef` is 0; it must be at least 1"));
    }
    Ok(Some(edge::SearchParams {
        hnsw_ef: hnsw_ef.map(|ef| ef as usize),
        exact: exact.unwrap_or(false),
        indexed_only: indexed_only.unwrap_or(false),
        ..Default::default()
    }))
}

/// What a nearest-neighbour query starts from.
pub enum Target {
    Vector(Vec<f32>),
    /// The vector of this point, which is itself left out of the results.
    Point(edge::PointId),
}

/// The target of a nearest-neighbour query.
pub fn target_in(input: pb::VectorInput) -> Answer<Target> {
    use pb::vector_input::Variant;
    let pb::VectorInput { variant } = input;
    match variant.ok_or_else(|| invalid("`query.nearest` is empty"))? {
        Variant::Id(id) => Ok(Target::Point(ids::id_in(id)?)),
        Variant::Dense(pb::DenseVector { data }) => Ok(Target::Vector(data)),
        Variant::Sparse(_) => Err(unsupported("VectorInput.sparse")),
        Variant::MultiDense(_) => Err(unsupported("VectorInput.multi_dense")),
        Variant::Document(_) => Err(unsupported("VectorInput.document (inference)")),
        Variant::Image(_) => Err(unsupported("VectorInput.image (inference)")),
        Variant::Object(_) => Err(unsupported("VectorInput.object (inference)")),
    }
}

/// An order by a payload field.
pub fn order_by_in(order: pb::OrderBy) -> Answer<edge::OrderBy> {
    let pb::OrderBy { key, direction, start_from } = order;
    absent("OrderBy.start_from", &start_from)?;
    let direction = match direction.map(pb::Direction::try_from) {
        None => None,
        Some(Ok(pb::Direction::Asc)) => Some(edge::Direction::Asc),
        Some(Ok(pb::Direction::Desc)) => Some(edge::Direction::Desc),
        Some(Err(error)) => return Err(invalid(format!("`order_by.direction`: {error}"))),
    };
    Ok(edge::OrderBy { key: path_in(&key)?, direction, start_from: None })
}

/// Fusion with its default parameters.
pub fn fusion_in(fusion: i32) -> Answer<edge::Fusion> {
    match pb::Fusion::try_from(fusion) {
        Ok(pb::Fusion::Rrf) => Ok(edge::Fusion::Rrf { k: DEFAULT_RRF_K, weights: None }),
        Ok(pb::Fusion::Dbsf) => Ok(edge::Fusion::Dbsf),
        Err(error) => Err(invalid(format!("`query.fusion`: {error}"))),
    }
}

/// Reciprocal rank fusion with its parameters; one weight per prefetch, or none.
pub fn rrf_in(rrf: pb::Rrf, prefetches: usize) -> Answer<edge::Fusion> {
    let pb::Rrf { k, weights } = rrf;
    if !weights.is_empty() && weights.len() != prefetches {
        return Err(invalid(format!(
            "`rrf.weights` has {} values for {prefetches} prefetches; give one for each, or none",
            weights.len()
        )));
    }
    let weights = (!weights.is_empty()).then(|| weights.into_iter().map(Into::into).collect());
    Ok(edge::Fusion::Rrf { k: k.map_or(DEFAULT_RRF_K, |k| k as usize), weights })
}
