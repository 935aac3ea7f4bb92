//! Reads what scripts return.

use redis::Value;

use crate::error::QueueError;

/// The values of an array, front to back. Every error is [`QueueError::Protocol`] and names what was expected.
pub(crate) struct Reply {
    values: std::vec::IntoIter<Value>,
}

impl Reply {
    pub(crate) fn new(value: Value) -> Result<Self, QueueError> {
        match value {
            Value::Array(values) => Ok(Self { values: values.into_iter() }),
            other => Err(unexpected("an array", &other)),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    fn next(&mut self, what: &str) -> Result<Value, QueueError> {
        self.values.next().ok_or_else(|| QueueError::Protocol(format!("expected {what}, the answer ended")))
    }

    pub(crate) fn integer(&mut self) -> Result<i64, QueueError> {
        number(&self.next("a number")?)
    }

    /// A whole number, or `None` for nil.
    pub(crate) fn optional_integer(&mut self) -> Result<Option<i64>, QueueError> {
        match self.next("a number or nil")? {
            Value::Nil => Ok(None),
            value => number(&value).map(Some),
        }
    }

    /// Text, or `None` for nil.
    pub(crate) fn optional(&mut self) -> Result<Option<String>, QueueError> {
        match self.next("text or nil")? {
            Value::Nil => Ok(None),
            value => text(value).map(Some),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<Vec<u8>, QueueError> {
        match self.next("bytes")? {
            Value::BulkString(bytes) => Ok(bytes),
            other => Err(unexpected("bytes", &other)),
        }
    }

    pub(crate) fn text(&mut self) -> Result<String, QueueError> {
        text(self.next("text")?)
    }

    /// An array within the array.
    pub(crate) fn array(&mut self) -> Result<Self, QueueError> {
        Self::new(self.next("an array")?)
    }

    /// Text that parses as `T`.
    pub(crate) fn parsed<T: std::str::FromStr>(&mut self, what: &str) -> Result<T, QueueError> {
        let text = self.text()?;
        text.parse().map_err(|_| QueueError::Protocol(format!("expected {what}, got {text:?}")))
    }
}

pub(crate) fn number(value: &Value) -> Result<i64, QueueError> {
    match value {
        Value::Int(number) => Ok(*number),
        Value::BulkString(bytes) => std::str::from_utf8(bytes)
            .ok()
            // Scores of sorted sets come back as floating point text.
            .and_then(|text| {
                text.parse::<i64>().ok().or_else(|| text.parse::<f64>().ok().map(|score| score as i64))
            })
            .ok_or_else(|| unexpected("a number", value)),
        other => Err(unexpected("a number", other)),
    }
}

pub(crate) fn text(value: Value) -> Result<String, QueueError> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes)
            .map_err(|error| QueueError::Protocol(format!("text is not UTF-8: {error}"))),
        Value::SimpleString(text) => Ok(text),
        other => Err(unexpected("text", &other)),
    }
}

fn unexpected(what: &str, got: &Value) -> QueueError {
    QueueError::Protocol(format!("expected {what}, got {got:?}"))
}
