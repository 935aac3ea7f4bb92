//! How an envelope is written to scripts and read from their answers.

use crate::{
    envelope::{Envelope, TraceContext},
    error::QueueError,
    ids::{JobId, Priority, QueueName},
    queue::{optional, text},
    reply::Reply,
};

/// The fields that push and restore share: kind, priority, tenant, `run_at`, `enqueued_at`, trace, fast record.
pub(crate) fn push_record(args: &mut Vec<Vec<u8>>, envelope: &Envelope) {
    let trace = envelope.trace.as_ref();
    args.extend([
        text(&envelope.kind),
        text(envelope.priority),
        text(&envelope.tenant),
        optional(envelope.run_at_ms),
        text(envelope.enqueued_at_ms),
        optional(trace.map(|trace| &trace.traceparent)),
        optional(trace.and_then(|trace| trace.tracestate.as_ref())),
        optional(envelope.fast.as_ref()),
    ]);
}

/// Reads the fields in the order that `claim.lua` returns them.
pub(crate) fn read_record(reply: &mut Reply, id: JobId, queue: &QueueName) -> Result<Envelope, QueueError> {
    let kind = reply.text()?;
    let priority = reply.parsed::<i64>("a priority")?;
    let priority = Priority::try_from(priority).map_err(|error| QueueError::Protocol(error.to_string()))?;
    let tenant = reply.parsed("a tenant")?;
    let run_at_ms = match reply.optional()? {
        None => None,
        Some(at) => Some(at.parse().map_err(|_| QueueError::Protocol(format!("run_at is {at:?}")))?),
    };
    let enqueued_at_ms = reply.parsed("a time")?;
    let traceparent = reply.optional()?;
    let tracestate = reply.optional()?;
    let fast =
        match reply.optional()? {
            None => None,
            Some(json) => Some(serde_json::from_str(&json).map_err(|error| {
                QueueError::Protocol(format!("the record of job {id} is no JSON: {error}"))
            })?),
        };
    let (attempts, lost) = (count(reply, "charged failures")?, count(reply, "lost leases")?);
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
    })
}

/// A number that is absent at 0.
fn count(reply: &mut Reply, what: &str) -> Result<u32, QueueError> {
    match reply.optional()? {
        None => Ok(0),
        Some(text) => text.parse().map_err(|_| QueueError::Protocol(format!("{what} is {text:?}"))),
    }
}
