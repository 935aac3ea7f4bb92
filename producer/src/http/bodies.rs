//! The forms of requests and answers about jobs.

use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use queue::JobId;
use sagas::stores::postgres::inspect::{AttemptView, JobView, SagaView, StepView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use crate::client::{Durability, Receipt};

/// A job to enqueue.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JobRequest {
    /// `ingest`, `embed`, `delete`, or a kind of your own.
    #[schema(example = "ingest")]
    pub kind: String,
    /// What to do; its form depends on the kind.
    #[schema(value_type = Object, example = json!({"document": "notes/today.txt", "text": "It rains."}))]
    pub payload: Value,
    /// Where it waits; the kind's own queue if absent.
    #[serde(default)]
    pub queue: Option<String>,
    /// 0 to 9; 9 is served first. Default 5.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 9)]
    pub priority: Option<i64>,
    /// Not before this time (RFC 3339).
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "2030-01-01T08:00:00Z")]
    pub run_at: Option<DateTime<Utc>>,
    /// Failures after which the job is a dead letter. Default 5.
    #[serde(default)]
    pub max_attempts: Option<i32>,
    /// Hard cap on one run. Default 300,000.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// The same key with the same request is accepted once; with another request it is refused with 409. Remembered for a
    /// day. The header `Idempotency-Key` says the same.
    #[serde(default)]
    pub idempotency_key: Option<String>,
    /// What the key's time is counted from. `accepted` (default): acceptance. `finished`: the job's end; until then the
    /// key is held, however long that takes.
    #[serde(default)]
    pub idempotency_until: Option<UntilName>,
    /// How long the key is remembered. Default a day; 0 with `finished` frees it as soon as the job has ended.
    #[serde(default)]
    pub idempotency_ttl_ms: Option<u64>,
    /// `durable` (default): accepted means committed. `fast`: accepted means that Redis has it.
    #[serde(default)]
    pub durability: DurabilityName,
}

/// What an idempotency key's time is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum UntilName {
    /// Acceptance.
    Accepted,
    /// The job's end.
    Finished,
}

/// What an accepted job has survived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum DurabilityName {
    /// A commit in the ledger.
    #[default]
    Durable,
    /// Nothing: it is in Redis alone. Uniqueness is best effort. A job on a document, a batch's member and a large payload are
    /// durable all the same.
    Fast,
}

impl From<DurabilityName> for Durability {
    fn from(name: DurabilityName) -> Self {
        match name {
            DurabilityName::Durable => Self::Durable,
            DurabilityName::Fast => Self::Fast,
        }
    }
}

/// Several jobs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchRequest {
    /// The jobs; their order is the order of jobs on one document.
    #[schema(value_type = Vec<JobRequest>)]
    pub jobs: Vec<Value>,
}

/// An accepted job.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Accepted {
    /// The job; of a duplicate, the job that was accepted before.
    #[schema(value_type = String)]
    pub id: JobId,
    /// The same request was accepted before.
    pub duplicate: bool,
    /// Of a duplicate, the job that was accepted before: its `state` and, if it has ended, its `result` and `outcome`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub job: Option<Box<JobView>>,
}

impl From<Receipt> for Accepted {
    fn from(receipt: Receipt) -> Self {
        Self { id: receipt.id, duplicate: receipt.duplicate, job: receipt.job }
    }
}

impl Accepted {
    /// 202 for a new job, 200 for one that was there.
    pub fn status(&self) -> StatusCode {
        if self.duplicate { StatusCode::OK } else { StatusCode::ACCEPTED }
    }
}

/// What became of one job of a batch: either `id` and `duplicate`, or `error`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ItemResult {
    /// The HTTP status that this job alone would have had.
    pub status: u16,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub accepted: Option<Accepted>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

impl From<Result<Receipt, ApiError>> for ItemResult {
    fn from(result: Result<Receipt, ApiError>) -> Self {
        match result {
            Ok(receipt) => {
                let accepted = Accepted::from(receipt);
                Self { status: accepted.status().as_u16(), accepted: Some(accepted), error: None }
            }
            Err(error) => Self { status: error.status.as_u16(), accepted: None, error: Some(error.body) },
        }
    }
}

/// What became of the jobs of a batch, in its order.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BatchAnswer {
    pub results: Vec<ItemResult>,
}

/// A saga run with its steps.
#[derive(Debug, Serialize)]
pub(super) struct SagaBody {
    #[serde(flatten)]
    pub saga: SagaView,
    pub steps: Vec<StepView>,
}

/// A job with its history.
#[derive(Debug, Serialize)]
pub(super) struct JobBody {
    #[serde(flatten)]
    pub job: JobView,
    pub attempts_made: Vec<AttemptView>,
    pub sagas: Vec<SagaBody>,
}

/// What to change about a job that waits.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeRequest {
    /// 0 to 9; 9 is served first.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 9)]
    pub priority: Option<i64>,
    /// Not before this time (RFC 3339).
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "2030-01-01T08:00:00Z")]
    pub run_at: Option<DateTime<Utc>>,
}

/// The answer to a cancel.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CancelAnswer {
    /// The job.
    #[schema(value_type = String)]
    pub id: JobId,
    /// `cancelled`: it is. `requested`: it will be, once its effects are undone.
    pub state: &'static str,
}
