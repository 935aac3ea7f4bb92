//! The description of a collection.

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::{collections, indexes};
use crate::status::{Answer, from_engine};
use crate::store::Collection;

/// Describes a collection: configuration, indexes, exact number of points. Status is yellow while an optimisation
/// runs or is due, and green when there is nothing left to do.
#[expect(deprecated, reason = "`on_disk_payload` is still part of the answer")]
pub fn describe(collection: &Collection) -> Answer<pb::CollectionInfo> {
    let shard = collection.shard();
    let info = shard.info().map_err(from_engine)?;
    // The engine's own number counts a point twice while a segment is being rewritten.
    let points = shard.count(edge::CountRequest::new()).map_err(from_engine)?;
    let settled = collection.is_settled();
    let spec = collection.spec();
    let config = shard.config().clone();
    let optimizers = config.optimizers();
    let number = |value: Option<usize>| value.map(|value| value as u64);
    Ok(pb::CollectionInfo {
        status: if settled { pb::CollectionStatus::Green } else { pb::CollectionStatus::Yellow } as i32,
        optimizer_status: Some(pb::OptimizerStatus { ok: true, error: String::new() }),
        segments_count: info.segments_count as u64,
        config: Some(pb::CollectionConfig {
            params: Some(pb::CollectionParams {
                shard_number: 1,
                on_disk_payload: config.on_disk_payload(),
                vectors_config: spec.vectors_config,
                replication_factor: Some(1),
                write_consistency_factor: Some(1),
                ..Default::default()
            }),
            hnsw_config: Some(collections::hnsw_out(config.hnsw_config())),
            optimizer_config: Some(pb::OptimizersConfigDiff {
                deleted_threshold: optimizers.deleted_threshold,
                vacuum_min_vector_number: number(optimizers.vacuum_min_vector_number),
                default_segment_number: Some(optimizers.get_number_segments() as u64),
                max_segment_size: number(optimizers.max_segment_size),
                indexing_threshold: Some(optimizers.get_indexing_threshold_kb() as u64),
                ..Default::default()
            }),
            metadata: spec.metadata,
            ..Default::default()
        }),
        payload_schema: info
            .payload_schema
            .into_iter()
            .map(|(path, index)| (path.to_string(), indexes::schema_out(index)))
            .collect(),
        points_count: Some(points as u64),
        indexed_vectors_count: Some(info.indexed_vectors_count as u64),
        ..Default::default()
    })
}
