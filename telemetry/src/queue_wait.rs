//! The time between a job's acceptance and its claim, as a span of the job's trace.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::{
    global,
    trace::{Span as _, SpanKind, Tracer},
};
use queue::TraceContext;

use crate::propagation::remote;

/// Records that a job waited from `since_ms` (unix milliseconds, the producer's clock) until now. The worker's clock may
/// differ; a wait that would end before it began is not recorded. Nothing happens when spans are not exported.
pub fn record_queue_wait(trace: Option<&TraceContext>, since_ms: i64) {
    let Some(parent) = trace.and_then(|t| remote(Some(&t.traceparent), t.tracestate.as_deref())) else {
        return;
    };
    let Ok(since_ms) = u64::try_from(since_ms) else { return };
    let since = UNIX_EPOCH + Duration::from_millis(since_ms);
    if since > SystemTime::now() {
        return;
    }
    let tracer = global::tracer("flotilla");
    tracer
        .span_builder("queue wait")
        .with_kind(SpanKind::Consumer)
        .with_start_time(since)
        .start_with_context(&tracer, &parent)
        .end();
}
