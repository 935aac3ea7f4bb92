//! Point ids and selections of points.

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;
use qdrant_edge::external::uuid::Uuid;

use crate::convert::filters;
use crate::status::{Answer, invalid};

/// A point id: an unsigned number, or a UUID in any of its usual spellings.
pub fn id_in(id: pb::PointId) -> Answer<edge::PointId> {
    use pb::point_id::PointIdOptions as Kind;
    let pb::PointId { point_id_options } = id;
    match point_id_options {
        Some(Kind::Num(number)) => Ok(edge::PointId::NumId(number)),
        Some(Kind::Uuid(text)) => text
            .parse::<Uuid>()
            .map(edge::PointId::Uuid)
            .map_err(|error| invalid(format!("Unable to parse UUID: {text}: {error}"))),
        None => Err(invalid("a point id is empty; give a number or a UUID")),
    }
}

/// Point ids, refused as a whole if one of them is wrong.
pub fn ids_in(ids: Vec<pb::PointId>) -> Answer<Vec<edge::PointId>> {
    ids.into_iter().map(id_in).collect()
}

/// The reverse of [`id_in`]; UUIDs are spelled with hyphens.
pub fn id_out(id: edge::PointId) -> pb::PointId {
    use pb::point_id::PointIdOptions as Kind;
    pb::PointId {
        point_id_options: Some(match id {
            edge::PointId::NumId(number) => Kind::Num(number),
            edge::PointId::Uuid(uuid) => Kind::Uuid(uuid.to_string()),
        }),
    }
}

/// The points that a delete or a payload change applies to.
pub enum Selection {
    Ids(Vec<edge::PointId>),
    Filter(edge::Filter),
}

impl Selection {
    /// As the pair of options that the engine's payload operations take.
    pub fn into_options(self) -> (Option<Vec<edge::PointId>>, Option<edge::Filter>) {
        match self {
            Self::Ids(ids) => (Some(ids), None),
            Self::Filter(filter) => (None, Some(filter)),
        }
    }
}

/// A selection; `field` names the request's field when it is missing.
pub fn selection_in(field: &str, selector: Option<pb::PointsSelector>) -> Answer<Selection> {
    use pb::points_selector::PointsSelectorOneOf as Kind;
    let selected = selector.and_then(|pb::PointsSelector { points_selector_one_of }| points_selector_one_of);
    match selected {
        Some(Kind::Points(pb::PointsIdsList { ids })) => Ok(Selection::Ids(ids_in(ids)?)),
        Some(Kind::Filter(filter)) => Ok(Selection::Filter(filters::filter_in(filter)?)),
        None => Err(invalid(format!("`{field}` is required: give ids or a filter"))),
    }
}
