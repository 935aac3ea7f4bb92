//! What of a payload is shown to people who look after jobs and not after their contents.

use std::collections::BTreeSet;

use serde_json::Value;

/// Names of fields whose values are not shown, at any depth, in any case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redaction(BTreeSet<String>);

/// What stands in place of a value.
pub const REDACTED: &str = "[redacted]";

impl Default for Redaction {
    /// The names under which secrets usually travel.
    fn default() -> Self {
        Self::parse(
            "password,passwd,secret,client_secret,token,access_token,refresh_token,api_key,apikey,authorization",
        )
    }
}

impl Redaction {
    /// Reads names with commas between them. None: everything is shown.
    pub fn parse(names: &str) -> Self {
        Self(names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_lowercase).collect())
    }

    /// Puts [`REDACTED`] in place of the values of these fields.
    pub fn apply(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if self.0.contains(&name.to_lowercase()) {
                        *value = Value::String(REDACTED.to_owned());
                    } else {
                        self.apply(value);
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.apply(value)),
            _ => {}
        }
    }
}

/// Whether [`REDACTED`] stands in place of a field's value: this payload was copied from where it was shown.
pub fn is_redacted(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().any(|value| value == REDACTED || is_redacted(value)),
        Value::Array(values) => values.iter().any(is_redacted),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn named_fields_are_hidden_at_any_depth_and_others_stay() {
        let mut payload = json!({
            "document": "a", "Password": "x", "metadata": { "deep": [{ "token": { "a": 1 } }, { "tokens": 3 }] }
        });
        assert!(!is_redacted(&payload));
        Redaction::default().apply(&mut payload);
        assert!(is_redacted(&payload) && is_redacted(&payload["metadata"]));
        assert!(!is_redacted(&json!({ "text": format!("{REDACTED} in a text") })));
        assert_eq!(
            payload,
            json!({
                "document": "a", "Password": REDACTED,
                "metadata": { "deep": [{ "token": REDACTED }, { "tokens": 3 }] }
            })
        );
        let mut text = json!({ "text": "x", "password": "y" });
        Redaction::parse(" Text ,").apply(&mut text);
        assert_eq!(text, json!({ "text": REDACTED, "password": "y" }));
    }
}
