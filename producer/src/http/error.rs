//! Errors as clients see them: `{ "error": { "code", "message", "job"? } }`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use queue::JobId;
use sagas::{Class, StepError, StoreError};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::EnqueueError;

/// An answer that is no success.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub status: StatusCode,
    pub body: ErrorBody,
    pub retry_after: Option<Duration>,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// A word for programs.
    #[schema(example = "idempotency_conflict")]
    pub code: &'static str,
    /// A sentence for people.
    pub message: String,
    /// The job that the error is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub job: Option<JobId>,
}

/// The body of every answer that is no success.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorEnvelope {
    /// What went wrong.
    pub error: ErrorBody,
}

/// What a client is told when a store is away.
const AWAY: Duration = Duration::from_secs(2);

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, body: ErrorBody { code, message: message.into(), job: None }, retry_after: None }
    }

    pub fn job(mut self, job: JobId) -> Self {
        self.body.job = Some(job);
        self
    }

    fn again(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub fn unprocessable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, message)
    }

    pub fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "this route has no such method: see /openapi.json",
        )
    }

    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    pub fn away(what: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", format!("{what} can't be reached now"))
            .again(AWAY)
    }

    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "this request failed for a reason that the log says",
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(ErrorEnvelope { error: self.body })).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<EnqueueError> for ApiError {
    fn from(error: EnqueueError) -> Self {
        let text = error.to_string();
        match error {
            EnqueueError::BadRequest { .. } => Self::unprocessable("invalid_job", text),
            EnqueueError::TooLarge { .. } => Self::too_large(text),
            EnqueueError::UnknownTenant => Self::new(StatusCode::NOT_FOUND, "unknown_tenant", text),
            EnqueueError::Conflict { job } => {
                Self::new(StatusCode::CONFLICT, "idempotency_conflict", text).job(job)
            }
            EnqueueError::QueueFull { retry_after } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", text).again(retry_after)
            }
            EnqueueError::TenantFull { retry_after } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "tenant_full", text).again(retry_after)
            }
            EnqueueError::Draining { .. } => Self::new(StatusCode::CONFLICT, "queue_draining", text),
            EnqueueError::Unavailable { retry_after } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", text).again(retry_after)
            }
            EnqueueError::OutcomeUnknown { job, retry_after } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "outcome_unknown", text)
                    .job(job)
                    .again(retry_after)
            }
            EnqueueError::Ledger { message } => {
                tracing::error!(message, "the ledger refused a job");
                Self::internal()
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error.class {
            Class::Unavailable | Class::Timeout | Class::Transient | Class::RateLimited => {
                tracing::warn!(%error, "a request found a store away");
                let after = error.retry_after.unwrap_or(AWAY);
                Self::away(error.dependency.name()).again(after)
            }
            Class::Data => Self::unprocessable("invalid_request", "a store refused a value of this request"),
            Class::Permanent => {
                tracing::error!(%error, "a request failed");
                Self::internal()
            }
        }
    }
}

impl From<StepError> for ApiError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Store(error) => error.into(),
            StepError::Failed { class: Class::Data | Class::Permanent, code, message } => {
                Self::unprocessable(code, message)
            }
            other => {
                tracing::error!(error = %other, "a read failed");
                Self::internal()
            }
        }
    }
}
