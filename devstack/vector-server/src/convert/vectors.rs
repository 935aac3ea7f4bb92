//! Vectors and whole points. Only dense vectors are served.

use std::collections::HashMap;

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::{ids, payload};
use crate::status::{Answer, invalid};
use crate::unsupported::{absent, unsupported};
use crate::validate::VectorShape;

/// A point to store. Its vectors are checked separately, by [`VectorShape::check_points`].
pub fn point_in(point: pb::PointStruct) -> Answer<edge::PointStructPersisted> {
    let pb::PointStruct { id, payload, vectors } = point;
    Ok(edge::PointStructPersisted {
        id: ids::id_in(id.ok_or_else(|| invalid("a point has no id"))?)?,
        vector: vectors_in(vectors)?,
        payload: Some(payload::payload_in(payload)?),
    })
}

fn vectors_in(vectors: Option<pb::Vectors>) -> Answer<edge::VectorStructPersisted> {
    use pb::vectors::VectorsOptions as Kind;
    match vectors.and_then(|pb::Vectors { vectors_options }| vectors_options) {
        None => Err(invalid("a point has no vectors")),
        Some(Kind::Vector(vector)) => Ok(edge::VectorStructPersisted::Single(dense_in(vector)?)),
        Some(Kind::Vectors(pb::NamedVectors { vectors })) => vectors
            .into_iter()
            .map(|(name, vector)| Ok((name, edge::VectorPersisted::Dense(dense_in(vector)?))))
            .collect::<Answer<HashMap<_, _>>>()
            .map(edge::VectorStructPersisted::Named),
    }
}

/// The elements of a vector, in the present spelling (`vector.dense`) or the one before Qdrant 1.16 (`data`).
#[expect(deprecated, reason = "clients older than 1.16 send `data`")]
fn dense_in(vector: pb::Vector) -> Answer<Vec<f32>> {
    use pb::vector::Vector as Kind;
    let pb::Vector { data, indices, vectors_count, vector } = vector;
    absent("Vector.indices (sparse vectors)", &indices)?;
    absent("Vector.vectors_count (multi-vectors)", &vectors_count)?;
    match vector {
        None => Ok(data),
        Some(Kind::Dense(pb::DenseVector { data })) => Ok(data),
        Some(Kind::Sparse(_)) => Err(unsupported("Vector.sparse")),
        Some(Kind::MultiDense(_)) => Err(unsupported("Vector.multi_dense")),
        Some(Kind::Document(_)) => Err(unsupported("Vector.document (inference)")),
        Some(Kind::Image(_)) => Err(unsupported("Vector.image (inference)")),
        Some(Kind::Object(_)) => Err(unsupported("Vector.object (inference)")),
    }
}

/// Which vectors a read returns: none where the request does not say. Names must exist.
pub fn with_vectors_in(
    selector: Option<pb::WithVectorsSelector>,
    shape: &VectorShape,
) -> Answer<edge::WithVector> {
    use pb::with_vectors_selector::SelectorOptions as Kind;
    Ok(match selector.and_then(|pb::WithVectorsSelector { selector_options }| selector_options) {
        None => edge::WithVector::Bool(false),
        Some(Kind::Enable(enable)) => edge::WithVector::Bool(enable),
        Some(Kind::Include(pb::VectorsSelector { names })) => {
            names.iter().try_for_each(|name| shape.dimension(name).map(|_| ()))?;
            edge::WithVector::Selector(names)
        }
    })
}

#[expect(deprecated, reason = "the message still has the fields of before Qdrant 1.16")]
fn vector_out(vector: edge::VectorInternal) -> pb::VectorOutput {
    use pb::vector_output::Vector as Kind;
    let vector = match vector {
        edge::VectorInternal::Dense(data) => Kind::Dense(pb::DenseVector { data }),
        edge::VectorInternal::Sparse(sparse) => {
            Kind::Sparse(pb::SparseVector { values: sparse.values, indices: sparse.indices })
        }
        edge::VectorInternal::MultiDense(multi) => {
            let rows = multi.flattened_vectors.chunks(multi.dim.max(1));
            Kind::MultiDense(pb::MultiDenseVector {
                vectors: rows.map(|row| pb::DenseVector { data: row.to_vec() }).collect(),
            })
        }
    };
    pb::VectorOutput { data: vec![], indices: None, vectors_count: None, vector: Some(vector) }
}

fn vectors_out(vectors: edge::VectorStructInternal) -> pb::VectorsOutput {
    use edge::{VectorInternal, VectorStructInternal as Engine};
    use pb::vectors_output::VectorsOptions as Kind;
    pb::VectorsOutput {
        vectors_options: Some(match vectors {
            Engine::Single(dense) => Kind::Vector(vector_out(VectorInternal::Dense(dense))),
            Engine::MultiDense(multi) => Kind::Vector(vector_out(VectorInternal::MultiDense(multi))),
            Engine::Named(named) => Kind::Vectors(pb::NamedVectorsOutput {
                vectors: named.into_iter().map(|(name, vector)| (name, vector_out(vector))).collect(),
            }),
        }),
    }
}

fn order_value_out(value: edge::OrderValue) -> pb::OrderValue {
    use pb::order_value::Variant;
    pb::OrderValue {
        variant: Some(match value {
            edge::OrderValue::Int(value) => Variant::Int(value),
            edge::OrderValue::Float(value) => Variant::Float(value),
        }),
    }
}

/// A hit of a query.
pub fn scored_out(point: edge::ScoredPoint) -> pb::ScoredPoint {
    pb::ScoredPoint {
        id: Some(ids::id_out(point.id)),
        payload: payload::payload_out(point.payload),
        score: point.score,
        version: point.version,
        vectors: point.vector.map(vectors_out),
        shard_key: None,
        order_value: point.order_value.map(order_value_out),
    }
}

/// A point read by id or by scrolling.
pub fn record_out(record: edge::Record) -> pb::RetrievedPoint {
    pb::RetrievedPoint {
        id: Some(ids::id_out(record.id)),
        payload: payload::payload_out(record.payload),
        vectors: record.vector.map(vectors_out),
        shard_key: None,
        order_value: record.order_value.map(order_value_out),
    }
}
