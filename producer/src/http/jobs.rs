//! Enqueue, look at and cancel jobs.

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use queue::{JobId, Priority, QueueName, TenantId};
use sagas::{
    JobState,
    kinds::embed,
    stores::postgres::{
        accept::{Idempotency, NewJob, Until},
        control::{Change, Changed},
        inspect::{JobFilter, JobView},
        ledger::Cancel,
    },
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::Caller,
    bodies::{
        Accepted, BatchAnswer, BatchRequest, CancelAnswer, ChangeRequest, ItemResult, JobBody, JobRequest,
        SagaBody, UntilName,
    },
    error::{ApiError, ErrorEnvelope},
    input::{Asked, Body, Named, read_error},
    observe::trace_headers,
};
use crate::client::{Durability, Receipt, new_job};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Keys of this API never meet those of `flotilla.enqueue` in SQL.
const SCOPE: &str = "api";

/// Enqueue a job.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 256 characters"),
           ("traceparent" = Option<String>, Header, description = "W3C trace context; the job's spans belong to that trace")),
    responses(
        (status = 202, description = "Accepted", body = Accepted),
        (status = 200, description = "The same request was accepted before", body = Accepted),
        (status = 400, description = "Malformed JSON, or not UTF-8", body = ErrorEnvelope),
        (status = 401, description = "No valid API key", body = ErrorEnvelope),
        (status = 404, description = "Unknown tenant", body = ErrorEnvelope),
        (status = 409, description = "The idempotency key was used with another request", body = ErrorEnvelope),
        (status = 413, description = "The payload is over its limit", body = ErrorEnvelope),
        (status = 422, description = "A field is unknown, missing or out of range", body = ErrorEnvelope),
        (status = 429, description = "Too many jobs wait; see Retry-After", body = ErrorEnvelope),
        (status = 503, description = "The ledger can't be reached; see Retry-After", body = ErrorEnvelope)))]
pub(super) async fn enqueue(
    State(api): State<Api>,
    Caller(tenant): Caller,
    headers: HeaderMap,
    Body(request): Body<JobRequest>,
) -> Result<Response, ApiError> {
    let durability = request.durability.into();
    let job = read(&api, &tenant, &headers, request)?;
    let accepted = Accepted::from(api.client.enqueue(job, durability).await?);
    let mut response = (accepted.status(), Json(&accepted)).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/jobs/{}", accepted.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// Enqueue several jobs in one transaction.
///
/// Each job gets its own result; one that is refused doesn't keep the others out.
#[utoipa::path(post, path = "/v1/jobs:batch", tag = "jobs", request_body = BatchRequest, responses(
    (status = 207, description = "One result per job, in order", body = BatchAnswer),
    (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope), (status = 413, body = ErrorEnvelope),
    (status = 422, body = ErrorEnvelope),
    (status = 503, description = "The ledger can't be reached; see Retry-After", body = ErrorEnvelope)))]
pub(super) async fn enqueue_many(
    State(api): State<Api>,
    Caller(tenant): Caller,
    headers: HeaderMap,
    Body(request): Body<BatchRequest>,
) -> Result<Response, ApiError> {
    if headers.contains_key(IDEMPOTENCY_KEY) {
        return Err(ApiError::bad_request(
            "invalid_header",
            "Idempotency-Key speaks of one job: give each job of a batch its own idempotency_key",
        ));
    }
    let mut results: Vec<Option<Result<Receipt, ApiError>>> = Vec::with_capacity(request.jobs.len());
    let (mut durable, mut fast) = (vec![], vec![]);
    for (place, item) in request.jobs.into_iter().enumerate() {
        let job = serde_json::from_value::<JobRequest>(item).map_err(|error| read_error(&error)).and_then(
            |request| {
                let durability = Durability::from(request.durability);
                Ok((read(&api, &tenant, &headers, request)?, durability))
            },
        );
        results.push(match job {
            Ok((job, Durability::Durable)) => {
                durable.push((place, job));
                None
            }
            Ok((job, Durability::Fast)) => {
                fast.push((place, job));
                None
            }
            Err(error) => Some(Err(error)),
        });
    }
    for (jobs, durability) in [(durable, Durability::Durable), (fast, Durability::Fast)] {
        let (places, jobs): (Vec<usize>, Vec<NewJob>) = jobs.into_iter().unzip();
        if jobs.is_empty() {
            continue;
        }
        let all = api.client.enqueue_many(jobs, durability).await;
        // Without any success the whole batch has one answer, with its Retry-After.
        let outcomes = match all {
            Ok(outcomes) => outcomes,
            Err(error) if results.iter().any(|result| matches!(result, Some(Ok(_)))) => {
                places.iter().map(|_| Err(error.clone())).collect()
            }
            Err(error) => return Err(error.into()),
        };
        for (place, outcome) in places.into_iter().zip(outcomes) {
            results[place] = Some(outcome.map_err(ApiError::from));
        }
    }
    let results = results
        .into_iter()
        .map(|result| ItemResult::from(result.unwrap_or_else(|| Err(ApiError::internal()))))
        .collect();
    Ok((StatusCode::MULTI_STATUS, Json(BatchAnswer { results })).into_response())
}

pub(super) fn read(
    api: &Api,
    tenant: &TenantId,
    headers: &HeaderMap,
    request: JobRequest,
) -> Result<NewJob, ApiError> {
    let invalid = |message: String| ApiError::unprocessable("invalid_job", message);
    not_for_every_tenant(&request.kind, &request.payload)?;
    let mut job = match request.queue {
        None => new_job(&request.kind, tenant.clone(), request.payload)?,
        Some(queue) => {
            let queue = QueueName::new(queue).map_err(|error| invalid(error.to_string()))?;
            NewJob::new(request.kind, queue, tenant.clone(), request.payload)
        }
    };
    if let Some(priority) = request.priority {
        job.priority = Priority::try_from(priority).map_err(|error| invalid(error.to_string()))?;
    }
    job.run_at = request.run_at;
    job.max_attempts = request.max_attempts.unwrap_or(job.max_attempts);
    job.timeout = request.timeout_ms.map_or(job.timeout, Duration::from_millis);
    let (until, ttl) = (request.idempotency_until, request.idempotency_ttl_ms);
    let key = idempotency_key(headers, request.idempotency_key)?;
    if key.is_none() && (until.is_some() || ttl.is_some()) {
        return Err(invalid(
            "idempotency_until, idempotency_ttl_ms: speak of a key, and there is none".into(),
        ));
    }
    job.idempotency = key.map(|key| Idempotency {
        key,
        scope: SCOPE.to_owned(),
        ttl: ttl.map_or(api.client.settings().idempotency_ttl, Duration::from_millis),
        until: match until {
            Some(UntilName::Finished) => Until::Finished,
            Some(UntilName::Accepted) | None => Until::Accepted,
        },
    });
    let (parent, state) = trace_headers(headers);
    job.trace = telemetry::current_trace().or_else(|| telemetry::trace_context(parent, state));
    Ok(job)
}

/// A tenant's request speaks of that tenant's documents.
pub(super) fn not_for_every_tenant(kind: &str, payload: &serde_json::Value) -> Result<(), ApiError> {
    if embed::is_for_every_tenant(kind, payload) { Err(for_operators()) } else { Ok(()) }
}

pub(super) fn for_operators() -> ApiError {
    ApiError::unprocessable(
        "invalid_job",
        "payload.every_tenant: is for operators, who use the command line; give all or documents",
    )
}

fn idempotency_key(headers: &HeaderMap, field: Option<String>) -> Result<Option<String>, ApiError> {
    let Some(header) = headers.get(IDEMPOTENCY_KEY) else { return Ok(field) };
    let header = std::str::from_utf8(header.as_bytes())
        .map_err(|_| ApiError::bad_request("invalid_header", "Idempotency-Key: must be UTF-8"))?;
    match field {
        Some(field) if field != header => Err(ApiError::bad_request(
            "invalid_header",
            "the header Idempotency-Key and the field idempotency_key differ: send one of them",
        )),
        _ => Ok(Some(header.to_owned())),
    }
}

pub(super) fn job_id(text: &str) -> Result<JobId, ApiError> {
    text.parse().map_err(|_| unknown())
}

pub(super) fn unknown() -> ApiError {
    ApiError::not_found("no such job")
}

/// Look at a job: its state, failures, saga runs and their steps.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path, description = "The job")), responses(
    (status = 200, description = "The job, with `attempts_made` and `sagas`, each of which has `steps`", body = Object),
    (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope), (status = 503, body = ErrorEnvelope)))]
pub(super) async fn show(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
) -> Result<Json<JobBody>, ApiError> {
    let (id, postgres) = (job_id(&id)?, api.client.postgres());
    let job = api.client.job(id, Some(tenant.as_str())).await?.ok_or_else(unknown)?;
    let attempts_made = postgres.attempts(id).await?;
    let mut sagas = vec![];
    for saga in postgres.sagas_of(id).await? {
        let steps = postgres.steps(saga.id).await?;
        sagas.push(SagaBody { saga, steps });
    }
    Ok(Json(JobBody { job, attempts_made, sagas }))
}

/// Which jobs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// `waiting`, `running`, `succeeded`, `cancelled`, `dead` or `parked`.
    #[param(value_type = Option<String>)]
    state: Option<JobState>,
    /// Only of this queue.
    queue: Option<String>,
    /// Only of this kind.
    kind: Option<String>,
    /// Only jobs before this one: the last id of the page before.
    #[param(value_type = Option<String>)]
    before: Option<JobId>,
    /// Page length, 1 to 1,000. Default 100.
    limit: Option<i64>,
}

/// A page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobList {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    jobs: Vec<JobView>,
}

/// List jobs, newest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(ListQuery), responses(
    (status = 200, body = JobList), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope)))]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<ListQuery>,
) -> Result<Json<JobList>, ApiError> {
    let filter = JobFilter {
        tenant: Some(tenant.to_string()),
        state: asked.state,
        queue: asked.queue,
        kind: asked.kind,
        before: asked.before.map(|id| id.0),
        limit: page(asked.limit)?,
    };
    Ok(Json(JobList { jobs: api.client.postgres().jobs(&filter).await? }))
}

/// A page's length.
pub(super) fn page(limit: Option<i64>) -> Result<i64, ApiError> {
    match limit.unwrap_or(100) {
        limit @ 1..=1000 => Ok(limit),
        other => {
            Err(ApiError::bad_request("invalid_query", format!("limit is {other}: 1 to 1000 are allowed")))
        }
    }
}

/// Change a job that waits: its priority, or when it runs.
#[utoipa::path(patch, path = "/v1/jobs/{id}", tag = "jobs", request_body = ChangeRequest,
    params(("id" = String, Path, description = "The job")), responses(
    (status = 200, description = "The job as it is now", body = Object),
    (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
    (status = 409, description = "`running`: it is left as it is. `ended`: it has ended", body = ErrorEnvelope),
    (status = 422, description = "A field is unknown or out of range", body = ErrorEnvelope),
    (status = 503, body = ErrorEnvelope)))]
pub(super) async fn change(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
    Body(request): Body<ChangeRequest>,
) -> Result<Json<JobView>, ApiError> {
    let id = job_id(&id)?;
    let invalid = |message: String| ApiError::unprocessable("invalid_job", message);
    if request.priority.is_none() && request.run_at.is_none() {
        return Err(invalid("nothing to change: give priority, run_at or both".into()));
    }
    let priority = request.priority.map(Priority::try_from).transpose();
    let change =
        Change { priority: priority.map_err(|error| invalid(error.to_string()))?, run_at: request.run_at };
    let conflict = |code, message| ApiError::new(StatusCode::CONFLICT, code, message).job(id);
    let changed = api.client.change(&[id], Some(tenant.as_str()), change).await?;
    match changed.first() {
        Some(Changed::Done) => {
            let job = api.client.postgres().job(id, Some(tenant.as_str())).await?;
            Ok(Json(job.ok_or_else(unknown)?))
        }
        Some(Changed::Running) => Err(conflict("running", "the job runs, and was left as it is")),
        Some(Changed::Ended) => Err(conflict("ended", "the job has ended")),
        Some(Changed::Unknown) | None => Err(unknown()),
    }
}

/// Cancel a job.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path, description = "The job")), responses(
    (status = 200, description = "The job waited and is cancelled", body = CancelAnswer),
    (status = 202, description = "The job will be cancelled once its effects are undone", body = CancelAnswer),
    (status = 404, body = ErrorEnvelope),
    (status = 409, description = "`past_pivot`: its effects are seen by readers. `ended`: it has ended otherwise", body = ErrorEnvelope),
    (status = 503, body = ErrorEnvelope)))]
pub(super) async fn cancel(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let conflict = |code, message| ApiError::new(StatusCode::CONFLICT, code, message).job(id);
    let (status, state) = match api.client.cancel(id, Some(tenant.as_str())).await? {
        Cancel::Cancelled => (StatusCode::OK, "cancelled"),
        Cancel::Requested => (StatusCode::ACCEPTED, "requested"),
        Cancel::PastPivot => {
            return Err(conflict("past_pivot", "the job's effects are seen by readers already"));
        }
        Cancel::Ended => return Err(conflict("ended", "the job has ended")),
        Cancel::Unknown => return Err(unknown()),
    };
    Ok((status, Json(CancelAnswer { id, state })).into_response())
}
