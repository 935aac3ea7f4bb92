//! `/healthz`: the process lives. `/readyz`: it can work. `/metrics`: Prometheus text.

use std::sync::Arc;

use axum::{Router, http::StatusCode, routing::get};
use queue::Queue;
use sagas::{
    Dependency,
    engine::{Breakers, breaker::State},
};
use tokio_util::sync::CancellationToken;

/// Renders the process's metrics as Prometheus text.
pub type MetricsRender = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves until `stop`; not ready from `draining` on.
pub(crate) async fn serve(
    listener: tokio::net::TcpListener,
    breakers: Breakers,
    queue: Queue,
    metrics: MetricsRender,
    draining: CancellationToken,
    stop: CancellationToken,
) {
    let ready = move || {
        let (breakers, queue, draining) = (breakers.clone(), queue.clone(), draining.clone());
        async move {
            if draining.is_cancelled() {
                return (StatusCode::SERVICE_UNAVAILABLE, "draining".to_owned());
            }
            let mut down: Vec<&str> = breakers
                .dependencies()
                .into_iter()
                .filter(|dependency| breakers.state(*dependency) != State::Closed)
                .map(Dependency::name)
                .collect();
            if queue.ping().await.is_err() {
                down.push("the queue's Redis");
            }
            if down.is_empty() {
                (StatusCode::OK, "ready".to_owned())
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}", down.join(", ")))
            }
        }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(move || async move { metrics() }));
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::error!(%error, "the health server ended");
    }
}
