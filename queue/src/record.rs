//! How a job's record is written to scripts and read from their answers.
//!
//! A record is one string: `<sequence> <priority> <since> <tenant>`, then ` <charged failures> <lost leases> <those lost alone>
//! <1 if it runs alone now>` unless all are 0, a line feed, and the body. Scripts read and write the first line (see `lua/partition.lua`); the body is ours: kind,
//! `run_at`, `enqueued_at`, traceparent and tracestate, each as `<length>:<text>` with nothing for what is absent, then the
//! fast record as JSON, if there is one.

use std::fmt::Write as _;

use serde_json::Value;

use crate::{
    envelope::{Envelope, TraceContext},
    error::QueueError,
    ids::{JobId, Priority, QueueName},
    queue::{optional, text},
};

/// How deep a `fast` record may be nested: serde_json reads no more levels than these.
pub const MAX_DEPTH: usize = 127;

/// Whether a value is nested deeper than [`MAX_DEPTH`], so that it can be written, and read by nobody. Without recursion, because
/// the depth is not known yet; writing it has recursion.
pub fn is_too_deep(value: &Value) -> bool {
    let mut work = vec![(value, 1)];
    while let Some((value, depth)) = work.pop() {
        if depth > MAX_DEPTH && (value.is_array() || value.is_object()) {
            return true;
        }
        match value {
            Value::Array(items) => work.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => work.extend(fields.values().map(|item| (item, depth + 1))),
            _ => {}
        }
    }
    false
}

/// Whether a claim can read what a push of this job would write, and it isn't larger than `most` bytes.
pub(crate) fn check(envelope: &Envelope, most: usize) -> Result<(), QueueError> {
    let Some(fast) = &envelope.fast else { return Ok(()) };
    if is_too_deep(fast) {
        return Err(QueueError::TooDeep { job: envelope.id });
    }
    let size = fast.to_string().len();
    if size > most {
        return Err(QueueError::TooLarge { job: envelope.id, size, limit: most });
    }
    Ok(())
}

/// What push sends of a job after its id: priority, tenant, `run_at` and the body.
pub(crate) fn push_record(args: &mut Vec<Vec<u8>>, envelope: &Envelope) {
    args.extend([
        text(envelope.priority),
        envelope.tenant.as_str().into(),
        optional(envelope.run_at_ms),
        body(envelope),
    ]);
}

/// What restore sends of a job after its id and token: priority, tenant, the body, and failures and losses if any. That the job
/// runs alone is forgotten: its worker lives.
pub(crate) fn restore_record(args: &mut Vec<Vec<u8>>, envelope: &Envelope) {
    args.extend([text(envelope.priority), envelope.tenant.as_str().into(), body(envelope)]);
    args.push(match (envelope.attempts, envelope.lost, envelope.lost_alone) {
        (0, 0, 0) => Vec::new(),
        (attempts, lost, alone) => text(format_args!(" {attempts} {lost} {alone} 0")),
    });
}

fn body(envelope: &Envelope) -> Vec<u8> {
    let mut body = String::with_capacity(64);
    let mut number = String::new();
    let mut field = |value: &str| {
        // Writing to a String can't fail.
        write!(body, "{}:{value}", value.len()).ok();
    };
    field(&envelope.kind);
    if let Some(at) = envelope.run_at_ms {
        write!(number, "{at}").ok();
    }
    field(&number);
    number.clear();
    write!(number, "{}", envelope.enqueued_at_ms).ok();
    field(&number);
    let trace = envelope.trace.as_ref();
    field(trace.map_or("", |trace| &trace.traceparent));
    field(trace.and_then(|trace| trace.tracestate.as_deref()).unwrap_or_default());
    if let Some(fast) = &envelope.fast {
        write!(body, "{fast}").ok();
    }
    body.into_bytes()
}

/// Reads a record as `claim.lua` returns it.
pub(crate) fn read_record(record: &[u8], id: JobId, queue: &QueueName) -> Result<Envelope, QueueError> {
    let bad = |what: &str| QueueError::Protocol(format!("the record of job {id} has no {what}"));
    let record = std::str::from_utf8(record).map_err(|_| bad("valid UTF-8"))?;
    let (head, mut body) = record.split_once('\n').ok_or_else(|| bad("first line"))?;
    let mut head = head.split(' ').skip(1);
    let priority = head.next().and_then(|text| text.parse::<i64>().ok()).ok_or_else(|| bad("priority"))?;
    let priority = Priority::try_from(priority).map_err(|error| QueueError::Protocol(error.to_string()))?;
    let tenant = head.nth(1).and_then(|text| text.parse().ok()).ok_or_else(|| bad("tenant"))?;
    let mut count = |what: &str| match head.next() {
        None => Ok(0),
        Some(text) => text.parse().map_err(|_| bad(what)),
    };
    let (attempts, lost) = (count("number of failures")?, count("number of losses")?);
    let lost_alone = count("number of losses while alone")?;
    let mut field = |what: &str| {
        let (length, rest) = body.split_once(':').ok_or_else(|| bad(what))?;
        let length = length.parse().map_err(|_| bad(what))?;
        let (value, rest) = rest.split_at_checked(length).ok_or_else(|| bad(what))?;
        body = rest;
        Ok::<_, QueueError>((!value.is_empty()).then_some(value))
    };
    let kind = field("kind")?.unwrap_or_default().to_owned();
    let run_at_ms = match field("run_at")? {
        Some(at) => Some(at.parse().map_err(|_| bad("run_at that is a number"))?),
        None => None,
    };
    let enqueued_at_ms = field("enqueued_at")?
        .and_then(|at| at.parse().ok())
        .ok_or_else(|| bad("enqueued_at that is a number"))?;
    let traceparent = field("traceparent")?.map(str::to_owned);
    let tracestate = field("tracestate")?.map(str::to_owned);
    let fast = match body {
        "" => None,
        json => Some(serde_json::from_str(json).map_err(|error| {
            QueueError::Protocol(format!("the fast record of job {id} is no JSON: {error}"))
        })?),
    };
    Ok(Envelope {
        id,
        kind,
        queue: queue.clone(),
        priority,
        tenant,
        run_at_ms,
        enqueued_at_ms,
        trace: traceparent.map(|traceparent| TraceContext { traceparent, tracestate }),
        fast,
        attempts,
        lost,
        lost_alone,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ids::TenantId;

    fn envelope() -> Envelope {
        let tenant = TenantId::new("acme").unwrap();
        Envelope {
            priority: Priority::HIGHEST,
            ..Envelope::new("a:b\n c", QueueName::new("q").unwrap(), tenant)
        }
    }

    #[test]
    fn what_is_written_is_read_again_whatever_it_holds() {
        let plain = envelope();
        let full = Envelope {
            kind: "é 3:".to_owned(),
            run_at_ms: Some(17),
            trace: Some(TraceContext {
                traceparent: "00-a".to_owned(),
                tracestate: Some("k=v,1:2".to_owned()),
            }),
            fast: Some(serde_json::json!({ "text": "line\nline", "n": [1, 2] })),
            attempts: 2,
            lost: 3,
            lost_alone: 1,
            ..envelope()
        };
        for one in [plain, full] {
            let charged = if one.attempts > 0 { " 2 3 1 0" } else { "" };
            let record = [format!("12 9 1700000000000 acme{charged}\n").into_bytes(), body(&one)].concat();
            assert_eq!(read_record(&record, one.id, &one.queue).unwrap(), one);
        }
    }

    #[test]
    fn what_could_not_be_read_again_is_refused() {
        let nested = |levels| (1..levels).fold(serde_json::json!([1]), |inner, _| serde_json::json!([inner]));
        let with = |fast| Envelope { fast: Some(fast), ..envelope() };
        let deepest = with(nested(MAX_DEPTH));
        check(&deepest, 1000).unwrap();
        let record = [b"12 9 1700000000000 acme\n".to_vec(), body(&deepest)].concat();
        assert_eq!(read_record(&record, deepest.id, &deepest.queue).unwrap(), deepest);
        let deeper = with(nested(MAX_DEPTH + 1));
        assert_eq!(check(&deeper, 1000), Err(QueueError::TooDeep { job: deeper.id }));
        let record = [b"12 9 1700000000000 acme\n".to_vec(), body(&deeper)].concat();
        assert!(read_record(&record, deeper.id, &deeper.queue).is_err(), "it needs no limit");
        let large = with(serde_json::json!({ "a": "0123456789" }));
        check(&large, 18).unwrap();
        assert_eq!(check(&large, 17), Err(QueueError::TooLarge { job: large.id, size: 18, limit: 17 }));
    }

    #[test]
    fn a_damaged_record_is_an_error_and_never_a_panic() {
        let one = envelope();
        let whole = [b"12 9 1700000000000 acme\n".to_vec(), body(&one)].concat();
        for end in 0..whole.len() {
            assert!(read_record(&whole[..end], one.id, &one.queue).is_err(), "{end}");
        }
        for bad in ["12 many 1 acme\n1:a0:1:50:0:", "1 5 1 acme\n99999999999999999999:a", "1 5 1 acme\n1:é"]
        {
            assert!(read_record(bad.as_bytes(), one.id, &one.queue).is_err(), "{bad}");
        }
    }
}
