//! Between Qdrant's gRPC messages (`pb`, from qdrant-client) and the engine's types (qdrant-edge). Everything here
//! is pure: no collection is touched.

pub mod collections;
pub mod filters;
pub mod ids;
pub mod indexes;
pub mod info;
pub mod payload;
pub mod queries;
pub mod vectors;
