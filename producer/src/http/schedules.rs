//! Recurring jobs: make, list, show, replace, pause, resume, delete.

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use queue::{Priority, QueueName, TenantId};
use sagas::stores::postgres::schedules::{CatchUp, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::Caller,
    error::{ApiError, ErrorEnvelope},
    input::{Asked, Body, Named},
    jobs::{not_for_every_tenant, page},
};
use crate::schedules::{MAX_NEXT, NewSchedule, ScheduleError, coming};

/// A schedule to make, or to put in the place of one.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ScheduleRequest {
    /// 1 to 64 characters of `A-Z a-z 0-9 _ . -`. In a `PUT` the path says it.
    #[serde(default)]
    #[schema(example = "nightly-report")]
    name: Option<String>,
    /// When: five cron fields (minute hour day month weekday), six with seconds in front, or a word like `@daily`.
    #[schema(example = "30 2 * * *")]
    cron: String,
    /// Whose local time the expression speaks of: an IANA name. Default `UTC`.
    #[serde(default)]
    #[schema(example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// What becomes of ticks for which no process was there in time: `skip`, `one` (default) or `all`.
    #[serde(default)]
    catch_up: CatchUpName,
    /// Late ticks that `all` makes up for at most, the newest; 1 to 1,000. Default 100.
    #[serde(default)]
    max_catch_up: Option<i32>,
    /// Kind of its jobs.
    #[schema(example = "report")]
    kind: String,
    /// The request that each of its jobs is.
    #[schema(value_type = Object)]
    payload: Value,
    /// Where its jobs wait; the kind's own queue if absent.
    #[serde(default)]
    queue: Option<String>,
    /// 0 to 9; 9 is served first. Default 5.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 9)]
    priority: Option<i64>,
    /// Failures after which a job is a dead letter. Default 5.
    #[serde(default)]
    max_attempts: Option<i32>,
    /// Hard cap on one run. Default 300,000.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

/// What becomes of ticks for which no process was there in time.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CatchUpName {
    /// Nothing.
    Skip,
    /// One job stands for all of them.
    #[default]
    One,
    /// A job for each of them, up to `max_catch_up`.
    All,
}

impl From<CatchUpName> for CatchUp {
    fn from(name: CatchUpName) -> Self {
        match name {
            CatchUpName::Skip => Self::Skip,
            CatchUpName::One => Self::One,
            CatchUpName::All => Self::All,
        }
    }
}

impl From<ScheduleError> for ApiError {
    fn from(error: ScheduleError) -> Self {
        let text = error.to_string();
        match error {
            ScheduleError::Invalid(_) => Self::bad_request("invalid_schedule", text),
            ScheduleError::Job(error) => error.into(),
            ScheduleError::NameTaken(_) => Self::new(StatusCode::CONFLICT, "name_taken", text),
            ScheduleError::TooMany => Self::unprocessable("too_many_schedules", text),
            ScheduleError::Unknown(_) => Self::not_found("no such schedule"),
            ScheduleError::Store(error) => error.into(),
        }
    }
}

fn read(tenant: &TenantId, name: String, request: ScheduleRequest) -> Result<NewSchedule, ApiError> {
    let invalid = |message: String| ApiError::unprocessable("invalid_job", message);
    not_for_every_tenant(&request.kind, &request.payload)?;
    let mut new = NewSchedule::new(tenant.clone(), name, request.kind, request.payload, request.cron);
    if let Some(queue) = request.queue {
        new.queue = Some(QueueName::new(queue).map_err(|error| invalid(error.to_string()))?);
    }
    if let Some(priority) = request.priority {
        new.priority = Priority::try_from(priority).map_err(|error| invalid(error.to_string()))?;
    }
    new.max_attempts = request.max_attempts.unwrap_or(new.max_attempts);
    new.timeout = request.timeout_ms.map_or(new.timeout, Duration::from_millis);
    new.time_zone = request.time_zone.unwrap_or(new.time_zone);
    new.catch_up = request.catch_up.into();
    new.max_catch_up = request.max_catch_up.unwrap_or(new.max_catch_up);
    Ok(new)
}

/// Make a schedule.
#[utoipa::path(post, path = "/v1/schedules", tag = "schedules", request_body = ScheduleRequest, responses(
    (status = 201, description = "The schedule", body = Object),
    (status = 400, description = "`invalid_schedule`: the message names the field, such as `cron` or `time_zone`", body = ErrorEnvelope),
    (status = 401, body = ErrorEnvelope), (status = 404, description = "Unknown tenant", body = ErrorEnvelope),
    (status = 409, description = "The tenant has one of this name", body = ErrorEnvelope),
    (status = 413, body = ErrorEnvelope),
    (status = 422, description = "Its jobs would be refused, or the tenant has too many", body = ErrorEnvelope),
    (status = 503, body = ErrorEnvelope)))]
pub(super) async fn create(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Body(mut request): Body<ScheduleRequest>,
) -> Result<Response, ApiError> {
    let name = request.name.take().ok_or_else(|| {
        ApiError::bad_request(
            "invalid_schedule",
            "name: is missing; 1 to 64 characters of A-Z a-z 0-9 _ . - are needed",
        )
    })?;
    let made = api.client.schedules().create(&read(&tenant, name, request)?).await?;
    let location: [(HeaderName, String); 1] = [(header::LOCATION, format!("/v1/schedules/{}", made.name))];
    Ok((StatusCode::CREATED, location, Json(made)).into_response())
}

/// Which schedules to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only names after this one: the last of the page before.
    after: Option<String>,
    /// Page length, 1 to 1,000. Default 100.
    limit: Option<i64>,
}

/// A page of schedules.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ScheduleList {
    /// By name.
    #[schema(value_type = Vec<Object>)]
    schedules: Vec<Schedule>,
}

/// List schedules, by name.
#[utoipa::path(get, path = "/v1/schedules", tag = "schedules", params(ListQuery), responses(
    (status = 200, body = ScheduleList), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope)))]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<ListQuery>,
) -> Result<Json<ScheduleList>, ApiError> {
    let after = asked.after.as_deref().map(|name| (&tenant, name));
    let schedules = api.client.schedules().list(Some(&tenant), after, page(asked.limit)?).await?;
    Ok(Json(ScheduleList { schedules }))
}

/// How much to show.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ShowQuery {
    /// Coming ticks to name, 0 to 1,000. Default 5.
    next: Option<usize>,
}

/// A schedule and its coming ticks.
#[derive(Debug, Serialize)]
pub(super) struct ScheduleBody {
    #[serde(flatten)]
    schedule: Schedule,
    next_ticks: Vec<DateTime<Utc>>,
}

/// Look at a schedule and its coming ticks.
#[utoipa::path(get, path = "/v1/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The schedule"), ShowQuery), responses(
    (status = 200, description = "The schedule, with `next_ticks`", body = Object), (status = 400, body = ErrorEnvelope),
    (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub(super) async fn show(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
    Asked(asked): Asked<ShowQuery>,
) -> Result<Json<ScheduleBody>, ApiError> {
    let count = asked.next.unwrap_or(5);
    if count > MAX_NEXT {
        return Err(ApiError::bad_request(
            "invalid_query",
            format!("next is {count}: 0 to {MAX_NEXT} are allowed"),
        ));
    }
    let schedule = api.client.schedules().get(&tenant, &name).await?;
    // Of one that this release can't read nothing is known but what it says; `last_error` tells why.
    let next_ticks = coming(&schedule, count).unwrap_or_default();
    Ok(Json(ScheduleBody { schedule, next_ticks }))
}

/// Replace all that a schedule says.
///
/// A paused one stays paused. With other times than before it goes on with its first tick after now.
#[utoipa::path(put, path = "/v1/schedules/{name}", tag = "schedules", request_body = ScheduleRequest,
    params(("name" = String, Path, description = "The schedule")), responses(
    (status = 200, description = "The schedule", body = Object),
    (status = 400, description = "`invalid_schedule`: the message names the field", body = ErrorEnvelope),
    (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope),
    (status = 422, description = "Its jobs would be refused", body = ErrorEnvelope), (status = 503, body = ErrorEnvelope)))]
pub(super) async fn update(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
    Body(request): Body<ScheduleRequest>,
) -> Result<Json<Schedule>, ApiError> {
    if request.name.as_ref().is_some_and(|given| *given != name) {
        return Err(ApiError::bad_request(
            "invalid_schedule",
            "name: a schedule can't be renamed; make another and delete this one",
        ));
    }
    Ok(Json(api.client.schedules().update(&read(&tenant, name, request)?).await?))
}

/// Delete a schedule. The jobs it has made stay.
#[utoipa::path(delete, path = "/v1/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The schedule")), responses(
    (status = 204, description = "It is gone"), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub(super) async fn delete(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
) -> Result<StatusCode, ApiError> {
    api.client.schedules().delete(&tenant, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Pause or resume a schedule.
///
/// `POST /v1/schedules/{name}:pause` stops it from making jobs; `POST /v1/schedules/{name}:resume` lets it go on with its
/// first tick after now.
#[utoipa::path(post, path = "/v1/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The schedule, with `:pause` or `:resume` behind it")), responses(
    (status = 200, description = "The schedule", body = Object), (status = 401, body = ErrorEnvelope),
    (status = 404, body = ErrorEnvelope)))]
pub(super) async fn control(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
) -> Result<Json<Schedule>, ApiError> {
    let schedules = api.client.schedules();
    Ok(Json(match name.split_once(':') {
        Some((name, "pause")) => schedules.pause(&tenant, name).await?,
        Some((name, "resume")) => schedules.resume(&tenant, name).await?,
        _ => {
            return Err(ApiError::not_found(
                "say what to do: /v1/schedules/NAME:pause or /v1/schedules/NAME:resume",
            ));
        }
    }))
}
