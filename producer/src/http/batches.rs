//! Batches: make, fill, seal, look at, cancel.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use queue::{JobId, TenantId};
use sagas::stores::postgres::{
    accept::NewJob,
    batches::{BatchFilter, BatchId, BatchView, Callback, CallbackOn, Changed, NewBatch},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    Api,
    auth::Caller,
    bodies::{BatchAnswer, BatchRequest, ItemResult, JobRequest},
    error::{ApiError, ErrorEnvelope},
    input::{Asked, Body, Named, read_error},
    jobs::{page, read},
};
use crate::client::{Durability, Receipt};

/// A batch to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewBatchRequest {
    /// A UUID of your own, so that the call may be made again; made by the server if absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    id: Option<BatchId>,
    /// For people, 1 to 256 characters.
    #[schema(example = "import of May")]
    name: String,
    /// The unfinished job whose work this is.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    parent: Option<JobId>,
    /// What to enqueue at the end.
    #[serde(default)]
    callback: Option<CallbackRequest>,
    /// The first members, at most 1,000; or all of them.
    #[serde(default)]
    #[schema(value_type = Vec<JobRequest>)]
    jobs: Vec<Value>,
    /// Take no more members. By default so if the request brings jobs.
    #[serde(default)]
    seal: Option<bool>,
}

/// The job that is enqueued once, when all members have ended.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CallbackRequest {
    /// `complete`: however they ended. `success`: only if all have succeeded.
    #[schema(value_type = String, example = "complete")]
    on: CallbackOn,
    /// The job; its payload gets a field `batch` with the batch's id, name and counts.
    job: JobRequest,
}

/// A batch that was made.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MadeBatch {
    /// The batch.
    #[schema(value_type = String)]
    id: BatchId,
    /// The id that the callback's job will have; of a batch that was there before, that of its own callback.
    #[schema(value_type = Option<String>)]
    callback_job: Option<JobId>,
    /// One result for each job that came with it, in order.
    results: Vec<ItemResult>,
}

/// Make a batch, with its first jobs or all of them.
///
/// The batch and its jobs are accepted in one transaction; a job that is refused doesn't keep the others out.
#[utoipa::path(post, path = "/v1/batches", tag = "batches", request_body = NewBatchRequest, responses(
    (status = 201, body = MadeBatch), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 404, description = "Unknown tenant, or another tenant's batch", body = ErrorEnvelope),
    (status = 413, body = ErrorEnvelope), (status = 422, body = ErrorEnvelope),
    (status = 503, description = "The ledger can't be reached; see Retry-After", body = ErrorEnvelope)))]
pub(super) async fn make(
    State(api): State<Api>,
    Caller(tenant): Caller,
    headers: HeaderMap,
    Body(request): Body<NewBatchRequest>,
) -> Result<Response, ApiError> {
    let headers = without_key(headers)?;
    let callback = match request.callback {
        None => None,
        Some(callback) => {
            Some(Callback { on: callback.on, job: read(&api, &tenant, &headers, callback.job)? })
        }
    };
    let seal = request.seal.unwrap_or(!request.jobs.is_empty());
    let (mut results, places, jobs) = read_jobs(&api, &tenant, &headers, request.jobs);
    let id = request.id.unwrap_or_else(BatchId::new);
    let batch = NewBatch { id, tenant, name: request.name, parent: request.parent, callback };
    let made = api.client.make_batch(batch, jobs, seal).await?;
    for (place, outcome) in places.into_iter().zip(made.jobs) {
        results[place] = Some(outcome.map_err(ApiError::from));
    }
    let body = MadeBatch { id: made.id, callback_job: made.callback, results: answers(results) };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// Add jobs to an open batch, in one transaction.
#[utoipa::path(post, path = "/v1/batches/{id}/jobs", tag = "batches", request_body = BatchRequest,
    params(("id" = String, Path, description = "The batch")), responses(
    (status = 207, description = "One result per job, in order; 409 `batch_sealed` where the batch takes no more", body = BatchAnswer),
    (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
    (status = 413, body = ErrorEnvelope), (status = 422, body = ErrorEnvelope), (status = 503, body = ErrorEnvelope)))]
pub(super) async fn add(
    State(api): State<Api>,
    Caller(tenant): Caller,
    headers: HeaderMap,
    Named(id): Named,
    Body(request): Body<BatchRequest>,
) -> Result<Response, ApiError> {
    let headers = without_key(headers)?;
    let id = find(&api, &tenant, &id).await?.id;
    let (mut results, places, mut jobs) = read_jobs(&api, &tenant, &headers, request.jobs);
    for job in &mut jobs {
        job.batch = Some(BatchId(id));
    }
    let outcomes = api.client.enqueue_many(jobs, Durability::Durable).await?;
    for (place, outcome) in places.into_iter().zip(outcomes) {
        results[place] = Some(outcome.map_err(ApiError::from));
    }
    Ok((StatusCode::MULTI_STATUS, Json(BatchAnswer { results: answers(results) })).into_response())
}

/// Seal a batch: it takes no more jobs, and completes once all have ended.
///
/// `POST /v1/batches/{id}:seal`. May be made again.
#[utoipa::path(post, path = "/v1/batches/{id}", tag = "batches",
    params(("id" = String, Path, description = "The batch, with `:seal` behind it")),
    responses((status = 200, body = Object), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub(super) async fn seal(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
) -> Result<Json<BatchView>, ApiError> {
    let Some((id, "seal")) = name.split_once(':') else {
        return Err(ApiError::not_found("say what to do: /v1/batches/ID:seal"));
    };
    let id = id.parse().map_err(|_| unknown())?;
    match api.client.seal_batch(id, Some(tenant.as_str())).await? {
        Changed::Done | Changed::Finished => {}
        Changed::Unknown => return Err(unknown()),
    }
    find(&api, &tenant, &id.to_string()).await.map(Json)
}

/// Look at a batch: its counts and its percentage.
#[utoipa::path(get, path = "/v1/batches/{id}", tag = "batches", params(("id" = String, Path, description = "The batch")),
    responses((status = 200, body = Object), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub(super) async fn show(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
) -> Result<Json<BatchView>, ApiError> {
    find(&api, &tenant, &id).await.map(Json)
}

/// Which batches.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only those that have finished, or have not.
    finished: Option<bool>,
    /// Only batches before this one: the last id of the page before.
    #[param(value_type = Option<String>)]
    before: Option<Uuid>,
    /// Page length, 1 to 1,000. Default 100.
    limit: Option<i64>,
}

/// A page of batches.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BatchList {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    batches: Vec<BatchView>,
}

/// List batches, newest first.
#[utoipa::path(get, path = "/v1/batches", tag = "batches", params(ListQuery), responses(
    (status = 200, body = BatchList), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope)))]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<ListQuery>,
) -> Result<Json<BatchList>, ApiError> {
    let filter = BatchFilter {
        tenant: Some(tenant.to_string()),
        finished: asked.finished,
        before: asked.before,
        limit: page(asked.limit)?,
    };
    Ok(Json(BatchList { batches: api.client.postgres().batches(&filter).await? }))
}

/// Cancel a batch: it takes no more jobs, and each unfinished one is cancelled as if alone.
#[utoipa::path(delete, path = "/v1/batches/{id}", tag = "batches", params(("id" = String, Path, description = "The batch")),
    responses(
    (status = 202, description = "The members end as `cancelled` once their effects are undone", body = Object),
    (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
    (status = 409, description = "`finished`: all members have ended", body = ErrorEnvelope)))]
pub(super) async fn cancel(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
) -> Result<Response, ApiError> {
    let id = id.parse().map_err(|_| unknown())?;
    match api.client.cancel_batch(id, Some(tenant.as_str())).await? {
        Changed::Done => {
            let view = find(&api, &tenant, &id.to_string()).await?;
            Ok((StatusCode::ACCEPTED, Json(view)).into_response())
        }
        Changed::Finished => {
            Err(ApiError::new(StatusCode::CONFLICT, "finished", "all members of the batch have ended"))
        }
        Changed::Unknown => Err(unknown()),
    }
}

fn unknown() -> ApiError {
    ApiError::not_found("no such batch")
}

async fn find(api: &Api, tenant: &TenantId, id: &str) -> Result<BatchView, ApiError> {
    let id = id.parse().map_err(|_| unknown())?;
    api.client.batch_state(id, Some(tenant.as_str())).await?.ok_or_else(unknown)
}

fn without_key(headers: HeaderMap) -> Result<HeaderMap, ApiError> {
    if headers.contains_key("idempotency-key") {
        return Err(ApiError::bad_request(
            "invalid_header",
            "Idempotency-Key speaks of one job: give the batch an id of your own, and each job its own idempotency_key",
        ));
    }
    Ok(headers)
}

type Results = Vec<Option<Result<Receipt, ApiError>>>;

/// Reads each job on its own: those that can't be read have their result, the others their place in it.
fn read_jobs(
    api: &Api,
    tenant: &TenantId,
    headers: &HeaderMap,
    items: Vec<Value>,
) -> (Results, Vec<usize>, Vec<NewJob>) {
    let (mut results, mut places, mut jobs) = (Vec::with_capacity(items.len()), vec![], vec![]);
    for (place, item) in items.into_iter().enumerate() {
        let job = serde_json::from_value::<JobRequest>(item).map_err(|error| read_error(&error)).and_then(
            // A member is durable, whatever it asks for.
            |request| read(api, tenant, headers, request),
        );
        match job {
            Ok(job) => {
                results.push(None);
                places.push(place);
                jobs.push(job);
            }
            Err(error) => results.push(Some(Err(error))),
        }
    }
    (results, places, jobs)
}

fn answers(results: Results) -> Vec<ItemResult> {
    results
        .into_iter()
        .map(|result| ItemResult::from(result.unwrap_or_else(|| Err(ApiError::internal()))))
        .collect()
}
