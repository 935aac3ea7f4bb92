//! The HTTP API.

mod auth;
mod batches;
mod bodies;
mod dead_letters;
mod documents;
mod error;
mod health;
mod input;
mod jobs;
mod observe;
mod openapi;
mod schedules;
mod signals;

use std::{any::Any, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use sagas::kinds::Stores;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    client::Client,
    error::ServeError,
    pacing::pause,
    settings::{Auth, ProducerSettings},
};
use auth::Keys;
use error::ApiError;

/// Renders the process' metrics as Prometheus text.
type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// The tenant of requests that name none, with [`Auth::Open`].
const DEFAULT_TENANT: &str = "default";
/// JSON may write a character as up to six (`\u00e9`), and a request has more than its payload.
const BODY_PER_PAYLOAD: usize = 2;
const BODY_BESIDES: usize = 64 * 1024;

#[derive(Clone)]
struct Api {
    client: Client,
    stores: Stores,
    queue: Option<queue::Queue>,
    auth: Auth,
    keys: Keys,
    request_within: Duration,
    render: Render,
    stopping: CancellationToken,
}

/// The API as a router, for serving it in another way than [`serve`] does. `stopping` makes `/readyz` say no.
pub fn router(
    settings: &ProducerSettings,
    client: Client,
    stores: Stores,
    metrics_render: impl Fn() -> String + Send + Sync + 'static,
    stopping: CancellationToken,
) -> Router {
    let limits = client.settings();
    let one = limits.max_payload.saturating_mul(BODY_PER_PAYLOAD).saturating_add(BODY_BESIDES);
    let many = limits.max_batch_bytes.saturating_mul(BODY_PER_PAYLOAD).saturating_add(BODY_BESIDES);
    let api = Api {
        keys: Keys::new(client.postgres().clone()),
        queue: client.queue().cloned(),
        client,
        stores,
        auth: settings.auth,
        request_within: settings.request_within,
        render: Arc::new(metrics_render),
        stopping,
    };
    Router::new()
        .route("/v1/jobs", post(jobs::enqueue).get(jobs::list))
        .route("/v1/jobs:batch", post(jobs::enqueue_many).layer(DefaultBodyLimit::max(many)))
        .route("/v1/jobs/{id}", get(jobs::show).patch(jobs::change).delete(jobs::cancel))
        .route("/v1/jobs/{id}/signals/{name}", post(signals::send))
        .route("/v1/schedules", post(schedules::create).get(schedules::list))
        .route(
            "/v1/schedules/{name}",
            get(schedules::show).put(schedules::update).delete(schedules::delete).post(schedules::control),
        )
        .route("/v1/batches", post(batches::make).layer(DefaultBodyLimit::max(many)).get(batches::list))
        .route("/v1/batches/{id}", get(batches::show).post(batches::seal).delete(batches::cancel))
        .route("/v1/batches/{id}/jobs", post(batches::add).layer(DefaultBodyLimit::max(many)))
        .route("/v1/search", get(documents::search))
        .route("/v1/documents/{*key}", get(documents::show))
        .route("/v1/dead-letters", get(dead_letters::list))
        .route("/v1/dead-letters/{id}", get(dead_letters::show).post(dead_letters::resolve))
        .route("/openapi.json", get(openapi::document))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(|| async { ApiError::not_found("no such route: see /openapi.json") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(one))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(api.clone(), observe::observe))
        .with_state(api)
}

/// Serves the API until `shutdown`; requests under way then have `drain_grace` to end. Fails if the address can't be used.
pub async fn serve(
    settings: ProducerSettings,
    client: Client,
    stores: Stores,
    metrics_render: impl Fn() -> String + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let addr = settings.addr;
    let listen = |error| ServeError::Listen { addr, error };
    let listener = tokio::net::TcpListener::bind(addr).await.map_err(listen)?;
    tracing::info!(addr = %listener.local_addr().map_err(listen)?, auth = ?settings.auth, "producer ready");
    let default_tenant = (settings.auth == Auth::Open)
        .then(|| tokio::spawn(make_default_tenant(client.clone(), shutdown.clone())));
    let router = router(&settings, client, stores, metrics_render, shutdown.clone());
    let serving = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(settings.drain_grace).await;
    };
    let result = tokio::select! {
        result = serving.into_future() => result.map_err(listen),
        () = drained => {
            tracing::warn!(grace = ?settings.drain_grace, "requests were cut off: FLOTILLA_DRAIN_GRACE_MS is over");
            Ok(())
        }
    };
    if let Some(task) = default_tenant {
        task.abort();
    }
    result
}

/// Nobody creates tenants in development; the one that requests fall back to should be there.
async fn make_default_tenant(client: Client, shutdown: CancellationToken) {
    while let Err(error) = client.postgres().create_tenant(DEFAULT_TENANT).await {
        tracing::debug!(%error, "tenant {DEFAULT_TENANT} is not made yet");
        if !pause(Duration::from_secs(1), &shutdown).await {
            return;
        }
    }
}

/// What went wrong stays in the log.
fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(message, "a request panicked");
    ApiError::internal().into_response()
}
