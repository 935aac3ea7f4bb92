//! Payloads, JSON paths, and which parts of a payload a read returns.

use std::collections::HashMap;

use qdrant_client::qdrant as pb;
use qdrant_edge as edge;
use serde_json::{Map, Number, Value as Json};

use crate::status::{Answer, invalid};

/// A path into a payload, such as `a.b[].c`.
pub fn path_in(text: &str) -> Answer<edge::JsonPath> {
    text.parse()
        .map_err(|()| invalid(format!("{text:?} is not a JSON path; expected keys such as `a.b[].c`")))
}

/// A payload; a number that JSON cannot hold (NaN, an infinity) is refused.
pub fn payload_in(payload: HashMap<String, pb::Value>) -> Answer<edge::Payload> {
    Ok(edge::Payload(object_in(payload)?))
}

fn object_in(fields: HashMap<String, pb::Value>) -> Answer<Map<String, Json>> {
    fields.into_iter().map(|(key, value)| Ok((key, value_in(value)?))).collect()
}

fn value_in(value: pb::Value) -> Answer<Json> {
    use pb::value::Kind;
    let pb::Value { kind } = value;
    Ok(match kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(value),
        Some(Kind::IntegerValue(value)) => Json::from(value),
        Some(Kind::DoubleValue(value)) => Number::from_f64(value).map(Json::Number).ok_or_else(|| {
            invalid(format!("a payload holds the number {value}, which JSON cannot express"))
        })?,
        Some(Kind::StringValue(value)) => Json::String(value),
        Some(Kind::ListValue(pb::ListValue { values })) => {
            Json::Array(values.into_iter().map(value_in).collect::<Answer<_>>()?)
        }
        Some(Kind::StructValue(pb::Struct { fields })) => Json::Object(object_in(fields)?),
    })
}

/// The reverse of [`payload_in`]; no payload is an empty one.
pub fn payload_out(payload: Option<edge::Payload>) -> HashMap<String, pb::Value> {
    payload.map(|edge::Payload(fields)| object_out(fields)).unwrap_or_default()
}

fn object_out(fields: Map<String, Json>) -> HashMap<String, pb::Value> {
    fields.into_iter().map(|(key, value)| (key, value_out(value))).collect()
}

fn value_out(value: Json) -> pb::Value {
    use pb::value::Kind;
    let kind = match value {
        Json::Null => Kind::NullValue(pb::NullValue::NullValue as i32),
        Json::Bool(value) => Kind::BoolValue(value),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Kind::IntegerValue(integer),
            (None, Some(double)) => Kind::DoubleValue(double),
            (None, None) => Kind::NullValue(pb::NullValue::NullValue as i32),
        },
        Json::String(value) => Kind::StringValue(value),
        Json::Array(values) => {
            Kind::ListValue(pb::ListValue { values: values.into_iter().map(value_out).collect() })
        }
        Json::Object(fields) => Kind::StructValue(pb::Struct { fields: object_out(fields) }),
    };
    pb::Value { kind: Some(kind) }
}

/// Which payload a read returns; `default` where the request does not say.
pub fn with_payload_in(
    selector: Option<pb::WithPayloadSelector>,
    default: bool,
) -> Answer<edge::WithPayloadInterface> {
    use pb::with_payload_selector::SelectorOptions as Kind;
    let paths = |fields: Vec<String>| fields.iter().map(|field| path_in(field)).collect::<Answer<Vec<_>>>();
    Ok(match selector.and_then(|pb::WithPayloadSelector { selector_options }| selector_options) {
        None => edge::WithPayloadInterface::Bool(default),
        Some(Kind::Enable(enable)) => edge::WithPayloadInterface::Bool(enable),
        Some(Kind::Include(pb::PayloadIncludeSelector { fields })) => {
            edge::PayloadSelectorInclude::new(paths(fields)?).into()
        }
        Some(Kind::Exclude(pb::PayloadExcludeSelector { fields })) => {
            edge::PayloadSelectorExclude::new(paths(fields)?).into()
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_keep_their_kind_and_value() {
        let double = |value| pb::Value { kind: Some(pb::value::Kind::DoubleValue(value)) };
        let integer = |value| pb::Value { kind: Some(pb::value::Kind::IntegerValue(value)) };
        for value in [double(1.0), double(-0.1), integer(i64::MIN), integer(i64::MAX)] {
            assert_eq!(value_out(value_in(value.clone()).unwrap()), value);
        }
        assert!(value_in(double(f64::NAN)).is_err());
    }
}
