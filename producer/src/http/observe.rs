//! What every request goes through: a span in the caller's trace, metrics, and an end in time.

use std::time::Instant;

use axum::{
    extract::{MatchedPath, Request, State},
    http::HeaderMap,
    middleware::Next,
    response::{IntoResponse, Response},
};
use metrics::{counter, histogram};
use tracing::Instrument;

use super::{Api, error::ApiError};

pub(super) async fn observe(State(api): State<Api>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    // The route, not the path: labels must not be endless.
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", method = %request.method(), route);
    let (parent, state) = trace_headers(request.headers());
    telemetry::set_parent(&span, parent, state);
    let response = tokio::time::timeout(api.request_within, next.run(request).instrument(span))
        .await
        .unwrap_or_else(|_| ApiError::away("a store that this request needs").into_response());
    histogram!("http_request_duration_seconds", "route" => route.clone())
        .record(started.elapsed().as_secs_f64());
    counter!("http_requests_total", "route" => route, "status" => response.status().as_u16().to_string())
        .increment(1);
    response
}

/// `traceparent` and `tracestate`.
pub(super) fn trace_headers(headers: &HeaderMap) -> (Option<&str>, Option<&str>) {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    (text("traceparent"), text("tracestate"))
}
