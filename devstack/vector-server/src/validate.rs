//! Checks that must pass before an operation reaches the engine.
//!
//! The engine writes an operation to its log and then applies it point by point: one point of a wrong dimension
//! would leave the points before it in place, and NaN would be stored. So each batch is checked whole, first.

use std::collections::HashMap;

use qdrant_edge::{EdgeConfig, PointId, PointStructPersisted, VectorPersisted, VectorStructPersisted};

use crate::status::{Answer, invalid};

/// The names and dimensions of a collection's vectors, fixed when the collection is created.
#[derive(Clone, Debug, Default)]
pub struct VectorShape {
    dimensions: HashMap<String, usize>,
}

impl VectorShape {
    /// The shape that the engine's configuration declares.
    pub fn of(config: &EdgeConfig) -> Self {
        Self { dimensions: config.vectors.iter().map(|(name, params)| (name.clone(), params.size)).collect() }
    }

    /// Refuses the whole batch if any vector has an unknown name, a wrong dimension, NaN or an infinity.
    pub fn check_points(&self, points: &[PointStructPersisted]) -> Answer<()> {
        points.iter().try_for_each(|point| self.check_point(point))
    }

    fn check_point(&self, point: &PointStructPersisted) -> Answer<()> {
        match &point.vector {
            VectorStructPersisted::Single(vector) => self.check_stored(point.id, "", vector),
            VectorStructPersisted::Named(named) => named.iter().try_for_each(|(name, vector)| match vector {
                VectorPersisted::Dense(vector) => self.check_stored(point.id, name, vector),
                VectorPersisted::Sparse(_) | VectorPersisted::MultiDense(_) => Err(not_dense(point.id)),
            }),
            VectorStructPersisted::MultiDense(_) => Err(not_dense(point.id)),
        }
    }

    fn check_stored(&self, id: PointId, name: &str, vector: &[f32]) -> Answer<()> {
        self.check_vector(name, vector).map_err(|status| invalid(format!("point {id}: {}", status.message())))
    }

    /// Checks a vector that is stored under, or searched for under, this name (`""`: the unnamed vector).
    pub fn check_vector(&self, name: &str, vector: &[f32]) -> Answer<()> {
        let expected = self.dimension(name)?;
        if vector.len() != expected {
            return Err(invalid(format!(
                "Wrong input: Vector dimension error: expected dim: {expected}, got {}",
                vector.len()
            )));
        }
        match vector.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(invalid(format!(
                "Wrong input: element {at} of the vector is {}; every element must be a finite number",
                vector[at]
            ))),
        }
    }

    /// The dimension of the vector of this name, or INVALID_ARGUMENT if the collection has none.
    pub fn dimension(&self, name: &str) -> Answer<usize> {
        self.dimensions.get(name).copied().ok_or_else(|| {
            let mut known: Vec<_> = self.dimensions.keys().collect();
            known.sort();
            invalid(format!(
                "Wrong input: Not existing vector name error: {name:?}; this collection has {known:?}"
            ))
        })
    }
}

fn not_dense(id: PointId) -> tonic::Status {
    crate::unsupported::unsupported(&format!("a sparse or multi-vector (point {id})"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shape() -> VectorShape {
        VectorShape { dimensions: HashMap::from([(String::new(), 2), ("text".into(), 3)]) }
    }

    #[test]
    fn names_what_is_wrong() {
        assert!(shape().check_vector("", &[0.0, 1.0]).is_ok());
        let message =
            |name, vector: &[f32]| shape().check_vector(name, vector).unwrap_err().message().to_owned();
        assert!(message("", &[0.0]).contains("expected dim: 2, got 1"));
        assert!(message("text", &[0.0, f32::NAN, 1.0]).contains("element 1 of the vector is NaN"));
        assert!(message("", &[f32::NEG_INFINITY, 0.0]).contains("element 0"));
        assert!(message("image", &[0.0]).contains("image"));
    }
}
