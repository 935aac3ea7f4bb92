//! Filters: every condition but the geographical ones and slices.

use edge::external::ordered_float::OrderedFloat;
use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use crate::convert::ids;
use crate::convert::payload::path_in;
use crate::status::{Answer, invalid};
use crate::unsupported::unsupported;

/// A filter that may be left out.
pub fn optional_in(filter: Option<pb::Filter>) -> Answer<Option<edge::Filter>> {
    filter.map(filter_in).transpose()
}

/// A filter.
pub fn filter_in(filter: pb::Filter) -> Answer<edge::Filter> {
    let pb::Filter { should, must, must_not, min_should } = filter;
    let min_should = min_should
        .map(|pb::MinShould { conditions, min_count }| {
            if min_count == 0 {
                return Err(invalid("`min_should.min_count` is 0; it must be at least 1"));
            }
            let conditions = conditions.into_iter().map(condition_in).collect::<Answer<_>>()?;
            Ok(edge::MinShould { conditions, min_count: min_count as usize })
        })
        .transpose()?;
    Ok(edge::Filter {
        should: conditions_in(should)?,
        must: conditions_in(must)?,
        must_not: conditions_in(must_not)?,
        min_should,
    })
}

/// The engine reads an absent list as "no such clause", and an empty `should` as "nothing matches".
fn conditions_in(conditions: Vec<pb::Condition>) -> Answer<Option<Vec<edge::Condition>>> {
    if conditions.is_empty() {
        return Ok(None);
    }
    conditions.into_iter().map(condition_in).collect::<Answer<_>>().map(Some)
}

fn condition_in(condition: pb::Condition) -> Answer<edge::Condition> {
    use pb::condition::ConditionOneOf as Kind;
    let pb::Condition { condition_one_of } = condition;
    Ok(match condition_one_of.ok_or_else(|| invalid("a filter condition is empty"))? {
        Kind::Field(field) => edge::Condition::Field(field_in(field)?),
        Kind::IsEmpty(pb::IsEmptyCondition { key }) => edge::Condition::IsEmpty(path_in(&key)?.into()),
        Kind::IsNull(pb::IsNullCondition { key }) => edge::Condition::IsNull(path_in(&key)?.into()),
        Kind::HasId(pb::HasIdCondition { has_id }) => {
            edge::Condition::HasId(ids::ids_in(has_id)?.into_iter().collect())
        }
        Kind::HasVector(pb::HasVectorCondition { has_vector }) => {
            edge::Condition::HasVector(has_vector.into())
        }
        Kind::Filter(filter) => edge::Condition::Filter(filter_in(filter)?),
        Kind::Nested(pb::NestedCondition { key, filter }) => {
            let filter = filter.ok_or_else(|| invalid("a nested condition has no filter"))?;
            let nested = edge::Nested { key: path_in(&key)?, filter: filter_in(filter)? };
            edge::Condition::Nested(edge::NestedCondition::new(nested))
        }
        Kind::Slice(_) => return Err(unsupported("Condition.slice")),
    })
}

fn field_in(condition: pb::FieldCondition) -> Answer<edge::FieldCondition> {
    use edge::FieldCondition as Engine;
    let pb::FieldCondition {
        key,
        r#match,
        range,
        geo_bounding_box,
        geo_radius,
        values_count,
        geo_polygon,
        datetime_range,
        is_empty,
        is_null,
    } = condition;
    if geo_bounding_box.is_some() || geo_radius.is_some() || geo_polygon.is_some() {
        return Err(unsupported("FieldCondition.geo_*"));
    }
    let path = path_in(&key)?;
    let mut predicates = Vec::new();
    if let Some(value) = r#match {
        predicates.push(Engine::new_match(path.clone(), match_in(value)?));
    }
    if let Some(range) = range {
        predicates.push(Engine::new_range(path.clone(), range_in(range)));
    }
    if let Some(range) = datetime_range {
        predicates.push(Engine::new_datetime_range(path.clone(), datetime_range_in(range)?));
    }
    if let Some(pb::ValuesCount { lt, gt, gte, lte }) = values_count {
        let count = |bound: Option<u64>| bound.map(|bound| bound as usize);
        let bounds = edge::ValuesCount { lt: count(lt), gt: count(gt), gte: count(gte), lte: count(lte) };
        predicates.push(Engine::new_values_count(path.clone(), bounds));
    }
    if let Some(expected) = is_empty {
        predicates.push(Engine::new_is_empty(path.clone(), expected));
    }
    if let Some(expected) = is_null {
        predicates.push(Engine::new_is_null(path, expected));
    }
    match predicates.len() {
        0 => Err(invalid(format!("the condition on {key:?} says nothing about it"))),
        1 => Ok(predicates.remove(0)),
        // The engine would look at one of them only.
        _ => Err(unsupported("FieldCondition with more than one predicate")),
    }
}

fn range_in(range: pb::Range) -> edge::Range<OrderedFloat<f64>> {
    let pb::Range { lt, gt, gte, lte } = range;
    let bound = |value: Option<f64>| value.map(OrderedFloat);
    edge::Range { lt: bound(lt), gt: bound(gt), gte: bound(gte), lte: bound(lte) }
}

fn datetime_range_in(range: pb::DatetimeRange) -> Answer<edge::Range<edge::DateTimeWrapper>> {
    let pb::DatetimeRange { lt, gt, gte, lte } = range;
    Ok(edge::Range { lt: instant_in(lt)?, gt: instant_in(gt)?, gte: instant_in(gte)?, lte: instant_in(lte)? })
}

fn instant_in(instant: Option<prost_types::Timestamp>) -> Answer<Option<edge::DateTimeWrapper>> {
    instant
        .map(|prost_types::Timestamp { seconds, nanos }| {
            u32::try_from(nanos)
                .ok()
                .and_then(|nanos| chrono::DateTime::from_timestamp(seconds, nanos))
                .map(edge::DateTimeWrapper::from)
                .ok_or_else(|| invalid(format!("the timestamp {seconds} s + {nanos} ns is out of range")))
        })
        .transpose()
}

fn match_in(value: pb::Match) -> Answer<edge::Match> {
    use edge::{AnyVariants, Match as Engine, ValueVariants};
    use pb::r#match::MatchValue as Kind;
    let strings = |list: pb::RepeatedStrings| AnyVariants::Strings(list.strings.into_iter().collect());
    let integers = |list: pb::RepeatedIntegers| AnyVariants::Integers(list.integers.into_iter().collect());
    let pb::Match { match_value } = value;
    Ok(match match_value.ok_or_else(|| invalid("a match condition is empty"))? {
        Kind::Keyword(value) => Engine::new_value(ValueVariants::String(value)),
        Kind::Integer(value) => Engine::new_value(ValueVariants::Integer(value)),
        Kind::Boolean(value) => Engine::new_value(ValueVariants::Bool(value)),
        Kind::Keywords(list) => Engine::new_any(strings(list)),
        Kind::Integers(list) => Engine::new_any(integers(list)),
        Kind::ExceptKeywords(list) => Engine::new_except(strings(list)),
        Kind::ExceptIntegers(list) => Engine::new_except(integers(list)),
        Kind::Text(text) => Engine::new_text(&text),
        Kind::TextAny(text_any) => Engine::TextAny(edge::MatchTextAny { text_any }),
        Kind::Phrase(phrase) => Engine::Phrase(edge::MatchPhrase { phrase }),
        Kind::Prefix(prefix) => Engine::new_prefix(&prefix),
        Kind::Substring(substring) => Engine::new_substring(&substring),
    })
}
