//! W3C trace context in and out of spans: how one trace goes from a producer's request through a job into a worker.

use std::collections::HashMap;

use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use queue::TraceContext;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The two headers of W3C trace context.
struct Headers<'a> {
    traceparent: Option<&'a str>,
    tracestate: Option<&'a str>,
}

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.traceparent,
            "tracestate" => self.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// The trace context of the current span, to be stored in a job. `None` when spans are not exported; a producer then
/// passes on what the caller sent, see [`trace_context`].
pub fn current_trace() -> Option<TraceContext> {
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut headers);
    let traceparent = headers.remove("traceparent")?;
    Some(TraceContext {
        traceparent,
        tracestate: headers.remove("tracestate").filter(|state| !state.is_empty()),
    })
}

/// Makes `span` a child of the remote span that `traceparent` names, so that both are of one trace. Call it before the
/// span is entered. Nothing happens for an absent or malformed header, or when spans are not exported.
pub fn set_parent(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let Some(context) = remote(traceparent, tracestate) else { return };
    if let Err(error) = span.set_parent(context) {
        // Also said of spans that no exporter sees, which is the usual case without an endpoint.
        tracing::trace!(%error, "a span has no remote parent");
    }
}

/// What a caller's headers say, if they are well-formed W3C trace context; for storing it in a job.
pub fn trace_context(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<TraceContext> {
    remote(traceparent, tracestate)?;
    Some(TraceContext {
        traceparent: traceparent?.trim().to_owned(),
        tracestate: tracestate.map(str::to_owned).filter(|state| !state.is_empty()),
    })
}

pub(crate) fn remote(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Context> {
    let traceparent = traceparent?.trim();
    if !has_the_right_shape(traceparent) {
        return None;
    }
    let headers = Headers { traceparent: Some(traceparent), tracestate };
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    context.span().span_context().is_valid().then_some(context)
}

/// `version-traceid-parentid-flags` with 2, 32, 16 and 2 characters; later versions may append more. The library's
/// parser pads shorter ids with zeros, which would join traces that have nothing to do with each other.
fn has_the_right_shape(traceparent: &str) -> bool {
    let lengths: Vec<usize> = traceparent.split('-').map(str::len).collect();
    lengths.get(..4) == Some(&[2, 32, 16, 2]) && (lengths.len() == 4 || !traceparent.starts_with("00"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_job_goes_on_with_the_trace_of_its_request() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let carried = tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let request = tracing::info_span!("request");
            set_parent(&request, Some(PARENT), Some("vendor=1"));
            let carried = request.in_scope(|| current_trace().unwrap());
            let job = tracing::info_span!("job");
            set_parent(&job, Some(&carried.traceparent), carried.tracestate.as_deref());
            job.in_scope(|| tracing::info_span!("step").in_scope(|| {}));
            carried
        });
        assert_eq!(&carried.traceparent[..36], &PARENT[..36], "the trace id is the caller's");
        assert_ne!(carried.traceparent, PARENT, "the span id is the request's own");
        assert_eq!(carried.tracestate.as_deref(), Some("vendor=1"));
        provider.force_flush().unwrap();
        let spans = exporter.get_finished_spans().unwrap();
        let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
        let (request, job, step) = (named("request"), named("job"), named("step"));
        assert_eq!(request.parent_span_id.to_string(), "00f067aa0ba902b7");
        assert_eq!(job.parent_span_id, request.span_context.span_id());
        assert_eq!(step.parent_span_id, job.span_context.span_id());
        for span in [request, job, step] {
            assert_eq!(span.span_context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        }
    }

    #[test]
    fn without_an_exporter_there_is_no_trace_and_no_failure() {
        let span = tracing::info_span!("request");
        set_parent(&span, Some(PARENT), None);
        assert_eq!(span.in_scope(current_trace), None);
    }

    #[test]
    fn only_well_formed_headers_are_passed_on() {
        assert_eq!(trace_context(Some(PARENT), None).unwrap().traceparent, PARENT);
        for bad in ["", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "ff-x", "00-4bf9-00f0-01"]
        {
            assert_eq!(trace_context(Some(bad), None), None, "{bad:?}");
        }
        assert_eq!(trace_context(None, Some("vendor=1")), None);
    }
}
