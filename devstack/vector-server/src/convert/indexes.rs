//! Payload indexes: their kinds and parameters, in both directions. Geographical indexes, and parameters of
//! full-text indexes, are not served.

#![expect(deprecated, reason = "both sides still carry `on_disk`, replaced by `memory` in Qdrant 1.19")]

use pb::payload_index_params::IndexParams;
use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::collections::{memory_in, memory_out};
use crate::convert::payload::path_in;
use crate::status::{Answer, invalid};
use crate::unsupported::unsupported;

/// The index to build, from the bare kind, the parameters, or both if they agree.
pub fn schema_in(
    field_type: Option<i32>,
    params: Option<pb::PayloadIndexParams>,
) -> Answer<edge::PayloadFieldSchema> {
    let kind = field_type
        .map(|number| {
            pb::FieldType::try_from(number).map_err(|error| invalid(format!("`field_type`: {error}")))
        })
        .transpose()?
        .map(kind_in)
        .transpose()?;
    let params =
        params.and_then(|pb::PayloadIndexParams { index_params }| index_params).map(params_in).transpose()?;
    match (kind, params) {
        (None, None) => Err(invalid("`field_type` or `field_index_params` is required")),
        (Some(kind), None) => Ok(edge::PayloadFieldSchema::FieldType(kind)),
        (Some(kind), Some(params)) if params.kind() != kind => Err(invalid(format!(
            "`field_type` is {kind:?} but `field_index_params` is for {:?}",
            params.kind()
        ))),
        (_, Some(params)) => Ok(edge::PayloadFieldSchema::FieldParams(params)),
    }
}

fn kind_in(field_type: pb::FieldType) -> Answer<edge::PayloadSchemaType> {
    use edge::PayloadSchemaType as Engine;
    Ok(match field_type {
        pb::FieldType::Keyword => Engine::Keyword,
        pb::FieldType::Integer => Engine::Integer,
        pb::FieldType::Float => Engine::Float,
        pb::FieldType::Text => Engine::Text,
        pb::FieldType::Bool => Engine::Bool,
        pb::FieldType::Datetime => Engine::Datetime,
        pb::FieldType::Uuid => Engine::Uuid,
        pb::FieldType::Geo => return Err(unsupported("CreateFieldIndexCollection.field_type = Geo")),
    })
}

fn params_in(params: IndexParams) -> Answer<edge::PayloadSchemaParams> {
    use edge::PayloadSchemaParams as Engine;
    let nested = |nested: Option<String>| nested.as_deref().map(path_in).transpose();
    Ok(match params {
        IndexParams::KeywordIndexParams(p) => {
            let pb::KeywordIndexParams { is_tenant, on_disk, enable_hnsw, prefix, memory, nested: inner } = p;
            Engine::Keyword(edge::KeywordIndexParams {
                is_tenant,
                on_disk,
                enable_hnsw,
                prefix: prefix.map(|pb::KeywordPrefixParams {}| true),
                memory: memory_in("KeywordIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::IntegerIndexParams(p) => {
            let pb::IntegerIndexParams {
                lookup,
                range,
                is_principal,
                on_disk,
                enable_hnsw,
                memory,
                nested: inner,
            } = p;
            Engine::Integer(edge::IntegerIndexParams {
                lookup,
                range,
                is_principal,
                on_disk,
                enable_hnsw,
                memory: memory_in("IntegerIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::FloatIndexParams(p) => {
            let pb::FloatIndexParams { on_disk, is_principal, enable_hnsw, memory, nested: inner } = p;
            Engine::Float(edge::FloatIndexParams {
                is_principal,
                on_disk,
                enable_hnsw,
                memory: memory_in("FloatIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::BoolIndexParams(p) => {
            let pb::BoolIndexParams { on_disk, enable_hnsw, memory, nested: inner } = p;
            Engine::Bool(edge::BoolIndexParams {
                on_disk,
                enable_hnsw,
                memory: memory_in("BoolIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::DatetimeIndexParams(p) => {
            let pb::DatetimeIndexParams { on_disk, is_principal, enable_hnsw, memory, nested: inner } = p;
            Engine::Datetime(edge::DatetimeIndexParams {
                is_principal,
                on_disk,
                enable_hnsw,
                memory: memory_in("DatetimeIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::UuidIndexParams(p) => {
            let pb::UuidIndexParams { is_tenant, on_disk, enable_hnsw, memory, nested: inner } = p;
            Engine::Uuid(edge::UuidIndexParams {
                is_tenant,
                on_disk,
                enable_hnsw,
                memory: memory_in("UuidIndexParams.memory", memory)?,
                nested: nested(inner)?,
                ..Default::default()
            })
        }
        IndexParams::GeoIndexParams(_) => return Err(unsupported("PayloadIndexParams.geo_index_params")),
        IndexParams::TextIndexParams(_) => return Err(unsupported("PayloadIndexParams.text_index_params")),
    })
}

/// An existing index, for a collection's description.
pub fn schema_out(index: edge::PayloadIndexInfo) -> pb::PayloadSchemaInfo {
    use edge::PayloadSchemaType as Engine;
    use pb::PayloadSchemaType as Kind;
    let kind = match index.data_type {
        Engine::Keyword => Kind::Keyword,
        Engine::Integer => Kind::Integer,
        Engine::Float => Kind::Float,
        Engine::Geo => Kind::Geo,
        Engine::Text => Kind::Text,
        Engine::Bool => Kind::Bool,
        Engine::Datetime => Kind::Datetime,
        Engine::Uuid => Kind::Uuid,
    };
    let params =
        index.params.and_then(params_out).map(|params| pb::PayloadIndexParams { index_params: Some(params) });
    pb::PayloadSchemaInfo { data_type: kind as i32, params, points: Some(index.points as u64) }
}

fn params_out(params: edge::PayloadSchemaParams) -> Option<IndexParams> {
    use edge::PayloadSchemaParams as Engine;
    let nested = |path: Option<edge::JsonPath>| path.map(|path| path.to_string());
    Some(match params {
        Engine::Keyword(p) => IndexParams::KeywordIndexParams(pb::KeywordIndexParams {
            is_tenant: p.is_tenant,
            on_disk: p.on_disk,
            enable_hnsw: p.enable_hnsw,
            prefix: p.prefix.unwrap_or(false).then_some(pb::KeywordPrefixParams {}),
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        Engine::Integer(p) => IndexParams::IntegerIndexParams(pb::IntegerIndexParams {
            lookup: p.lookup,
            range: p.range,
            is_principal: p.is_principal,
            on_disk: p.on_disk,
            enable_hnsw: p.enable_hnsw,
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        Engine::Float(p) => IndexParams::FloatIndexParams(pb::FloatIndexParams {
            on_disk: p.on_disk,
            is_principal: p.is_principal,
            enable_hnsw: p.enable_hnsw,
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        Engine::Bool(p) => IndexParams::BoolIndexParams(pb::BoolIndexParams {
            on_disk: p.on_disk,
            enable_hnsw: p.enable_hnsw,
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        Engine::Datetime(p) => IndexParams::DatetimeIndexParams(pb::DatetimeIndexParams {
            on_disk: p.on_disk,
            is_principal: p.is_principal,
            enable_hnsw: p.enable_hnsw,
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        Engine::Uuid(p) => IndexParams::UuidIndexParams(pb::UuidIndexParams {
            is_tenant: p.is_tenant,
            on_disk: p.on_disk,
            enable_hnsw: p.enable_hnsw,
            memory: memory_out(p.memory),
            nested: nested(p.nested),
        }),
        // Never created through this server.
        Engine::Geo(_) | Engine::Text(_) => return None,
    })
}
