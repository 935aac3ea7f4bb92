//! Whether this process can accept jobs, and its metrics.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::Api;

/// What a producer sees of the stores.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Readiness {
    /// Whether jobs are accepted.
    ready: bool,
    /// `up` or `down`; needed.
    postgres: &'static str,
    /// `up`, `down` or `none`. Not needed: accepted jobs wait in the ledger.
    queue: &'static str,
}

/// Whether jobs are accepted now.
#[utoipa::path(get, path = "/readyz", tag = "process", responses(
    (status = 200, body = Readiness), (status = 503, description = "The ledger is down, or this process is stopping", body = Readiness)))]
pub(super) async fn ready(State(api): State<Api>) -> impl IntoResponse {
    let queue = async {
        match &api.queue {
            None => "none",
            Some(queue) if queue.ping().await.is_ok() => "up",
            Some(_) => "down",
        }
    };
    let (postgres, queue) = tokio::join!(api.client.postgres().probe(), queue);
    let ready = postgres.is_ok() && !api.stopping.is_cancelled();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Readiness { ready, postgres: if postgres.is_ok() { "up" } else { "down" }, queue }))
}

pub(super) async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], (api.render)())
}
