//! Events for other services, by cursor.

use axum::{Json, extract::State, http::StatusCode};
use sagas::stores::postgres::events::{Event, Events, FIRST};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::Caller,
    error::{ApiError, ErrorEnvelope},
    input::Asked,
    jobs::page,
};

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// A cursor: `next` of the last answer. `now`: nothing yet, only the cursor. Default: the oldest event that is kept.
    after: Option<String>,
    /// Page length, 1 to 1,000. Default 100.
    limit: Option<i64>,
}

/// A page of events.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventPage {
    /// The oldest first; those of one document in the order in which readers saw the changes.
    #[schema(value_type = Vec<Object>)]
    events: Vec<Event>,
    /// What to ask with next, also when there were none.
    next: String,
}

/// Hear of published and deleted documents.
#[utoipa::path(get, path = "/v1/events", tag = "documents", params(EventQuery), responses(
    (status = 200, body = EventPage), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 410, description = "Events after the cursor were removed by retention", body = ErrorEnvelope),
    (status = 503, body = ErrorEnvelope)))]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<EventQuery>,
) -> Result<Json<EventPage>, ApiError> {
    let postgres = api.client.postgres();
    let limit = i32::try_from(page(asked.limit)?).unwrap_or(i32::MAX);
    let after = asked.after.unwrap_or_else(|| FIRST.to_owned());
    if after == "now" {
        return Ok(Json(EventPage { events: vec![], next: postgres.events_now().await? }));
    }
    let (events, next) = postgres.events_page(&after, Some(tenant.as_str()), limit).await?;
    match events {
        Events::Page(events) => Ok(Json(EventPage { events, next })),
        Events::Expired => Err(ApiError::new(
            StatusCode::GONE,
            "cursor_expired",
            "events after this cursor were removed: take the cursor of now (after=now), read what you keep again, then go on",
        )),
        Events::NoCursor => Err(ApiError::bad_request(
            "invalid_query",
            format!("after is {after:?}: `now` or a cursor (`next` of an answer) is allowed"),
        )),
    }
}
