//! What can be seen of a job before it is accepted. Whatever Postgres would refuse is refused here, with a reason.

use std::{io, time::Duration};

use chrono::{DateTime, Datelike, Utc};
use sagas::{kinds, results::MAX_RESULT, stores::postgres::accept::NewJob};
use serde_json::Value;

use crate::{error::EnqueueError, settings::ClientSettings};

/// How deep a payload may be nested: the record of a fast job is one level more. SQL's `enqueue` has the same, 126.
const MAX_DEPTH: usize = queue::MAX_DEPTH - 1;
/// Longest hard cap on one run.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);
const MAX_ATTEMPTS: i32 = 1000;
/// Longest time that an idempotency key is remembered; it goes with its job's record anyway.
const MAX_TTL: Duration = Duration::from_secs(366 * 24 * 3600);
/// Years in which a job may be due; Postgres and Rust have different ends of time.
const YEARS: std::ops::RangeInclusive<i32> = 1970..=9999;

/// Checks a job and names its document. Returns the bytes of the payload's JSON.
pub(crate) fn check(job: &mut NewJob, settings: &ClientSettings) -> Result<usize, EnqueueError> {
    check_word("kind", &job.kind, 64)?;
    if !(1..=MAX_ATTEMPTS).contains(&job.max_attempts) {
        return bad(format!("max_attempts is {}: 1 to {MAX_ATTEMPTS} are allowed", job.max_attempts));
    }
    if job.timeout < Duration::from_millis(1) || job.timeout > MAX_TIMEOUT {
        return bad(format!(
            "timeout_ms is {}: 1 to {} are allowed",
            job.timeout.as_millis(),
            MAX_TIMEOUT.as_millis()
        ));
    }
    job.run_at.as_ref().map_or(Ok(()), check_run_at)?;
    if let Some(idempotency) = &job.idempotency {
        check_word("idempotency_key", &idempotency.key, 256)?;
        check_word("idempotency scope", &idempotency.scope, 64)?;
        if idempotency.ttl > MAX_TTL {
            return bad(format!(
                "idempotency_ttl_ms is {}: at most {} are allowed",
                idempotency.ttl.as_millis(),
                MAX_TTL.as_millis()
            ));
        }
    }
    let size = check_payload(&job.kind, &job.payload, settings)?;
    if job.document.is_none() {
        job.document = kinds::document_of(&job.kind, &job.payload);
    }
    if let Some(document) = &job.document {
        check_word("document", document, 512)?;
    }
    job.trace = job.trace.take().filter(|trace| {
        let plain = |text: &str| text.len() <= 512 && !text.contains('\0');
        plain(&trace.traceparent) && trace.tracestate.as_deref().is_none_or(plain)
    });
    Ok(size)
}

/// Checks a payload; returns the bytes of its JSON.
pub(crate) fn check_payload(
    kind: &str,
    payload: &Value,
    settings: &ClientSettings,
) -> Result<usize, EnqueueError> {
    // Walked before it is written or read, neither of which likes endless depth.
    check_values(payload)?;
    let size = json_size(payload);
    if size > settings.max_payload {
        return Err(EnqueueError::TooLarge { size, limit: settings.max_payload });
    }
    kinds::check_payload(kind, payload).or_else(bad)?;
    Ok(size)
}

/// Checks a signal's payload.
pub(crate) fn check_signal(payload: &Value) -> Result<(), EnqueueError> {
    check_values(payload)?;
    let size = json_size(payload);
    if size > MAX_RESULT {
        return Err(EnqueueError::TooLarge { size, limit: MAX_RESULT });
    }
    Ok(())
}

fn bad<T>(message: String) -> Result<T, EnqueueError> {
    Err(EnqueueError::BadRequest { message })
}

pub(crate) fn check_word(name: &str, word: &str, longest: usize) -> Result<(), EnqueueError> {
    let length = word.chars().count();
    if !(1..=longest).contains(&length) {
        return bad(format!("{name} has {length} characters: 1 to {longest} are allowed"));
    }
    if word.contains('\0') {
        return bad(format!("{name} has a NUL character (\\u0000), which the ledger can't store"));
    }
    Ok(())
}

pub(crate) fn check_run_at(at: &DateTime<Utc>) -> Result<(), EnqueueError> {
    if YEARS.contains(&at.year()) {
        return Ok(());
    }
    bad(format!("run_at is {at}: years {} to {} are allowed", YEARS.start(), YEARS.end()))
}

/// No NUL characters, which Postgres' jsonb refuses, and no nesting beyond [`MAX_DEPTH`]. Without recursion, because the
/// depth is not known yet.
fn check_values(payload: &Value) -> Result<(), EnqueueError> {
    let mut work = vec![(payload, 1)];
    while let Some((value, depth)) = work.pop() {
        if depth > MAX_DEPTH {
            return bad(format!("payload: nested deeper than {MAX_DEPTH} levels"));
        }
        match value {
            Value::String(text) if text.contains('\0') => return nul(),
            Value::Array(items) => work.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => {
                if fields.keys().any(|name| name.contains('\0')) {
                    return nul();
                }
                work.extend(fields.values().map(|item| (item, depth + 1)));
            }
            _ => {}
        }
    }
    Ok(())
}

fn nul<T>() -> Result<T, EnqueueError> {
    bad("payload: has a NUL character (\\u0000), which the ledger can't store; send binary data as base64"
        .to_owned())
}

/// Bytes of a value's JSON, without making it.
pub(crate) fn json_size(value: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    match serde_json::to_writer(&mut count, value) {
        Ok(()) => count.0,
        // A JSON value always has a text; if not, it is surely no payload.
        Err(_) => usize::MAX,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use queue::{QueueName, TenantId};
    use serde_json::json;

    use super::*;

    fn job(payload: Value) -> NewJob {
        NewJob::new("report", QueueName::new("report").unwrap(), TenantId::new("acme").unwrap(), payload)
    }

    fn refusal(job: &mut NewJob) -> String {
        check(job, &ClientSettings::default()).unwrap_err().to_string()
    }

    #[test]
    fn a_nul_anywhere_is_refused_because_jsonb_refuses_it() {
        for payload in [json!({"a": "x\0"}), json!({"a\0": 1}), json!({"a": [{"b": ["\0"]}]})] {
            assert!(refusal(&mut job(payload.clone())).contains("NUL"), "{payload}");
        }
        let mut with_key = job(json!({}));
        with_key.idempotency = Some(crate::Idempotency {
            key: "a\0".into(),
            scope: "api".into(),
            ttl: Duration::from_secs(1),
            until: crate::Until::Accepted,
        });
        assert!(refusal(&mut with_key).contains("NUL"));
    }

    #[test]
    fn nesting_that_no_reader_would_follow_is_refused() {
        let nested = |levels| {
            let mut payload = json!({});
            for _ in 1..levels {
                payload = json!({ "in": payload });
            }
            payload
        };
        check(&mut job(nested(MAX_DEPTH)), &ClientSettings::default()).unwrap();
        assert_eq!(refusal(&mut job(nested(MAX_DEPTH + 1))), "payload: nested deeper than 126 levels");
    }

    #[test]
    fn the_payload_limit_counts_bytes_of_json() {
        let settings = ClientSettings { max_payload: 20, ..ClientSettings::default() };
        assert_eq!(check(&mut job(json!({"a": "éé"})), &settings).unwrap(), 12);
        let error = check(&mut job(json!({"a": "0123456789abc"})), &settings).unwrap_err();
        assert!(matches!(error, EnqueueError::TooLarge { size: 21, limit: 20 }), "{error:?}");
    }

    #[test]
    fn numbers_and_times_out_of_range_are_refused_with_what_is_allowed() {
        let mut wrong = job(json!({}));
        wrong.max_attempts = 0;
        assert_eq!(refusal(&mut wrong), "max_attempts is 0: 1 to 1000 are allowed");
        let mut wrong = job(json!({}));
        wrong.timeout = Duration::ZERO;
        assert_eq!(refusal(&mut wrong), "timeout_ms is 0: 1 to 604800000 are allowed");
        let mut wrong = job(json!({}));
        wrong.run_at = Some(DateTime::<Utc>::MIN_UTC);
        assert!(refusal(&mut wrong).contains("years 1970 to 9999 are allowed"));
        let mut wrong = job(json!([]));
        assert_eq!(refusal(&mut wrong), "payload: must be a JSON object");
    }

    #[test]
    fn the_document_of_a_kind_is_found_in_its_payload() {
        let mut ingest = job(json!({"document": "a/b", "text": "x"}));
        ingest.kind = "ingest".into();
        check(&mut ingest, &ClientSettings::default()).unwrap();
        assert_eq!(ingest.document.as_deref(), Some("a/b"));
    }
}
