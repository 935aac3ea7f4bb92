//! Signals: what a saga's step waits for.

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use queue::JobId;
use sagas::stores::postgres::waits::{MAX_SIGNALS, Signalled};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Api,
    auth::Caller,
    error::{ApiError, ErrorEnvelope},
    input::read_error,
    jobs::{job_id, unknown},
};

/// The answer to a signal.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SignalAnswer {
    /// The job.
    #[schema(value_type = String)]
    id: JobId,
    /// The signal.
    signal: String,
    /// The same one was sent before.
    duplicate: bool,
}

/// Send a job a signal. It is kept until a step waits for it, and wakes a job that does. The same one is sent once.
#[utoipa::path(post, path = "/v1/jobs/{id}/signals/{name}", tag = "jobs",
    request_body(content = Option<Object>, description = "The payload, any JSON; none is null"),
    params(("id" = String, Path, description = "The job"), ("name" = String, Path, description = "1 to 128 characters")),
    responses(
        (status = 202, description = "Kept for the job", body = SignalAnswer),
        (status = 200, description = "The same signal was sent before", body = SignalAnswer),
        (status = 400, description = "Malformed JSON, or not UTF-8", body = ErrorEnvelope),
        (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
        (status = 409, description = "`ended`: the job has ended. `conflict`: it was sent before with another payload", body = ErrorEnvelope),
        (status = 413, description = "The payload is over its limit", body = ErrorEnvelope),
        (status = 422, description = "The name or the payload can't be kept", body = ErrorEnvelope),
        (status = 429, description = "The job has as many signals as it may have", body = ErrorEnvelope),
        (status = 503, body = ErrorEnvelope)))]
pub(super) async fn send(
    State(api): State<Api>,
    Caller(tenant): Caller,
    path: Result<Path<(String, String)>, PathRejection>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let Path((id, signal)) =
        path.map_err(|rejection| ApiError::bad_request("invalid_path", rejection.body_text()))?;
    let id = job_id(&id)?;
    let payload: Value = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&body).map_err(|error| read_error(&error))?
    };
    let conflict = |code, message| ApiError::new(StatusCode::CONFLICT, code, message).job(id);
    let duplicate = match api.client.signal(id, Some(tenant.as_str()), &signal, &payload).await? {
        Signalled::Sent => false,
        Signalled::Duplicate => true,
        Signalled::Conflict => {
            return Err(conflict("conflict", "this signal was sent before with another payload"));
        }
        Signalled::Ended => return Err(conflict("ended", "the job has ended")),
        Signalled::TooMany => {
            let message = format!("a job has at most {MAX_SIGNALS} signals");
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_signals", message).job(id));
        }
        Signalled::Unknown => return Err(unknown()),
    };
    let status = if duplicate { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(SignalAnswer { id, signal, duplicate })).into_response())
}
