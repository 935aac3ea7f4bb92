//! Collection settings: vectors, HNSW and optimiser parameters. One shard, one replica, dense `f32` vectors, no
//! quantization.

#![expect(deprecated, reason = "both sides still carry `on_disk`, replaced by `memory` in Qdrant 1.19")]

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::status::{Answer, invalid};
use crate::unsupported::{absent, only, unsupported};

/// The longest vector that a Qdrant server accepts.
const MAX_DIMENSIONS: u64 = 65_536;

/// Refuses the fields of a creation that we don't serve, and returns the engine's configuration for the rest.
/// `collection_name`, `timeout` and `metadata` are left to the caller.
pub fn config_in(spec: &pb::CreateCollection) -> Answer<edge::EdgeConfig> {
    let pb::CreateCollection {
        collection_name: _,
        hnsw_config,
        wal_config,
        optimizers_config,
        shard_number,
        on_disk_payload,
        timeout: _,
        vectors_config,
        replication_factor,
        write_consistency_factor,
        quantization_config,
        sharding_method,
        sparse_vectors_config,
        strict_mode_config,
        metadata: _,
        payload,
        id_tracker,
    } = spec;
    absent("CreateCollection.wal_config", wal_config)?;
    absent("CreateCollection.quantization_config", quantization_config)?;
    absent("CreateCollection.sparse_vectors_config", sparse_vectors_config)?;
    absent("CreateCollection.strict_mode_config", strict_mode_config)?;
    absent("CreateCollection.payload", payload)?;
    absent("CreateCollection.id_tracker", id_tracker)?;
    only("CreateCollection.shard_number other than 1", *shard_number, &1)?;
    only("CreateCollection.replication_factor other than 1", *replication_factor, &1)?;
    only("CreateCollection.write_consistency_factor other than 1", *write_consistency_factor, &1)?;
    only(
        "CreateCollection.sharding_method other than Auto",
        *sharding_method,
        &(pb::ShardingMethod::Auto as i32),
    )?;

    let mut hnsw = edge::HnswIndexConfig::default();
    if let Some(diff) = hnsw_config {
        hnsw = hnsw_in(diff, hnsw)?;
    }
    let mut config = edge::EdgeConfig::builder().hnsw_config(hnsw);
    for (name, params) in vectors_in(vectors_config.as_ref())? {
        config = config.vector(name, vector_params_in(params, hnsw)?);
    }
    if let Some(diff) = optimizers_config {
        config = config.optimizers(optimizers_in(diff, edge::EdgeOptimizersConfig::default())?);
    }
    if let Some(on_disk) = on_disk_payload {
        config = config.on_disk_payload(*on_disk);
    }
    Ok(config.build())
}

/// The declared vectors by name; the unnamed one has the name `""`.
fn vectors_in(config: Option<&pb::VectorsConfig>) -> Answer<Vec<(String, &pb::VectorParams)>> {
    use pb::vectors_config::Config;
    match config.and_then(|pb::VectorsConfig { config }| config.as_ref()) {
        None => Err(unsupported("CreateCollection without vectors_config")),
        Some(Config::Params(params)) => Ok(vec![(edge::DEFAULT_VECTOR_NAME.to_owned(), params)]),
        Some(Config::ParamsMap(pb::VectorParamsMap { map })) => {
            Ok(map.iter().map(|(name, params)| (name.clone(), params)).collect())
        }
    }
}

fn vector_params_in(
    params: &pb::VectorParams,
    base: edge::HnswIndexConfig,
) -> Answer<edge::EdgeVectorParams> {
    let pb::VectorParams {
        size,
        distance,
        hnsw_config,
        quantization_config,
        on_disk,
        datatype,
        multivector_config,
        memory,
    } = params;
    absent("VectorParams.quantization_config", quantization_config)?;
    absent("VectorParams.multivector_config", multivector_config)?;
    match datatype.map(pb::Datatype::try_from) {
        None | Some(Ok(pb::Datatype::Default | pb::Datatype::Float32)) => {}
        Some(_) => return Err(unsupported("VectorParams.datatype other than Float32")),
    }
    if !(1..=MAX_DIMENSIONS).contains(size) {
        return Err(invalid(format!("vector size {size} is not between 1 and {MAX_DIMENSIONS}")));
    }
    Ok(edge::EdgeVectorParams {
        size: *size as usize,
        distance: distance_in(*distance)?,
        on_disk: *on_disk,
        memory: memory_in("VectorParams.memory", *memory)?,
        multivector_config: None,
        datatype: None,
        quantization_config: None,
        hnsw_config: hnsw_config.as_ref().map(|diff| hnsw_in(diff, base)).transpose()?,
    })
}

fn distance_in(distance: i32) -> Answer<edge::Distance> {
    match pb::Distance::try_from(distance) {
        Ok(pb::Distance::Cosine) => Ok(edge::Distance::Cosine),
        Ok(pb::Distance::Dot) => Ok(edge::Distance::Dot),
        Ok(pb::Distance::Euclid) => Ok(edge::Distance::Euclid),
        Ok(pb::Distance::Manhattan) => Ok(edge::Distance::Manhattan),
        Ok(pb::Distance::UnknownDistance) | Err(_) => {
            Err(invalid(format!("distance {distance} is unknown; use Cosine, Euclid, Dot or Manhattan")))
        }
    }
}

/// Where a component lives: on disk, in the page cache, or pinned in memory.
pub fn memory_in(field: &str, memory: Option<i32>) -> Answer<Option<edge::Memory>> {
    match memory.map(pb::Memory::try_from) {
        None => Ok(None),
        Some(Ok(pb::Memory::Cold)) => Ok(Some(edge::Memory::Cold)),
        Some(Ok(pb::Memory::Cached)) => Ok(Some(edge::Memory::Cached)),
        Some(Ok(pb::Memory::Pinned)) => Ok(Some(edge::Memory::Pinned)),
        Some(Ok(pb::Memory::Unknown) | Err(_)) => {
            Err(invalid(format!("`{field}` is unknown; use Cold, Cached or Pinned")))
        }
    }
}

/// The reverse of [`memory_in`].
pub fn memory_out(memory: Option<edge::Memory>) -> Option<i32> {
    memory.map(|memory| match memory {
        edge::Memory::Cold => pb::Memory::Cold as i32,
        edge::Memory::Cached => pb::Memory::Cached as i32,
        edge::Memory::Pinned => pb::Memory::Pinned as i32,
    })
}

/// HNSW parameters: what the request sets, over `base`.
pub fn hnsw_in(diff: &pb::HnswConfigDiff, base: edge::HnswIndexConfig) -> Answer<edge::HnswIndexConfig> {
    let pb::HnswConfigDiff {
        m,
        ef_construct,
        full_scan_threshold,
        max_indexing_threads,
        on_disk,
        payload_m,
        inline_storage,
        memory,
    } = diff;
    if ef_construct.is_some_and(|ef| ef < 4) {
        return Err(invalid("`hnsw_config.ef_construct` must be at least 4"));
    }
    let or = |value: &Option<u64>, base: usize| value.map_or(base, |value| value as usize);
    Ok(edge::HnswIndexConfig {
        m: or(m, base.m),
        ef_construct: or(ef_construct, base.ef_construct),
        full_scan_threshold: or(full_scan_threshold, base.full_scan_threshold),
        max_indexing_threads: or(max_indexing_threads, base.max_indexing_threads),
        on_disk: on_disk.or(base.on_disk),
        memory: memory_in("HnswConfigDiff.memory", *memory)?.or(base.memory),
        payload_m: payload_m.map(|links| links as usize).or(base.payload_m),
        inline_storage: inline_storage.or(base.inline_storage),
    })
}

/// HNSW parameters as a collection's description shows them.
pub fn hnsw_out(config: edge::HnswIndexConfig) -> pb::HnswConfigDiff {
    pb::HnswConfigDiff {
        m: Some(config.m as u64),
        ef_construct: Some(config.ef_construct as u64),
        full_scan_threshold: Some(config.full_scan_threshold as u64),
        max_indexing_threads: Some(config.max_indexing_threads as u64),
        on_disk: config.on_disk,
        payload_m: config.payload_m.map(|links| links as u64),
        inline_storage: config.inline_storage,
        memory: memory_out(config.memory),
    }
}

/// Optimiser parameters: what the request sets, over `base`.
pub fn optimizers_in(
    diff: &pb::OptimizersConfigDiff,
    base: edge::EdgeOptimizersConfig,
) -> Answer<edge::EdgeOptimizersConfig> {
    let pb::OptimizersConfigDiff {
        deleted_threshold,
        vacuum_min_vector_number,
        default_segment_number,
        max_segment_size,
        memmap_threshold,
        indexing_threshold,
        flush_interval_sec,
        deprecated_max_optimization_threads,
        max_optimization_threads,
        prevent_unoptimized,
    } = diff;
    absent("OptimizersConfigDiff.memmap_threshold", memmap_threshold)?;
    absent("OptimizersConfigDiff.flush_interval_sec", flush_interval_sec)?;
    absent("OptimizersConfigDiff.deprecated_max_optimization_threads", deprecated_max_optimization_threads)?;
    absent("OptimizersConfigDiff.max_optimization_threads", max_optimization_threads)?;
    // It would hide acknowledged points from readers until the optimiser has run.
    only("OptimizersConfigDiff.prevent_unoptimized", *prevent_unoptimized, &false)?;
    if deleted_threshold.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
        return Err(invalid("`optimizers_config.deleted_threshold` must be between 0 and 1"));
    }
    if vacuum_min_vector_number.is_some_and(|number| number < 100) {
        return Err(invalid("`optimizers_config.vacuum_min_vector_number` must be at least 100"));
    }
    let or = |value: &Option<u64>, base: Option<usize>| value.map(|value| value as usize).or(base);
    Ok(edge::EdgeOptimizersConfig {
        deleted_threshold: deleted_threshold.or(base.deleted_threshold),
        vacuum_min_vector_number: or(vacuum_min_vector_number, base.vacuum_min_vector_number),
        default_segment_number: or(default_segment_number, base.default_segment_number),
        max_segment_size: or(max_segment_size, base.max_segment_size),
        indexing_threshold: or(indexing_threshold, base.indexing_threshold),
        prevent_unoptimized: base.prevent_unoptimized,
    })
}
