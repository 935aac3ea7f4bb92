//! Dead letters: list, replay, discard; one or together.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use queue::TenantId;
use sagas::{
    redaction::is_redacted,
    stores::postgres::dead_letters::{Cursor, DeadLetter, DeadLetterFilter, Replay, Resolved},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    Api,
    auth::Caller,
    error::{ApiError, ErrorEnvelope},
    input::{Asked, Body, BodyIfAny, Named},
    jobs::{for_operators, page},
};

/// Which dead letters.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LetterQuery {
    /// Only of this kind.
    kind: Option<String>,
    /// Only with this reason word.
    class: Option<String>,
    /// `open`, `replayed`, `discarded` or `all`. Default `open`.
    state: Option<String>,
    /// Only written then or later, as RFC 3339.
    #[param(value_type = Option<String>)]
    since: Option<DateTime<Utc>>,
    /// Only written before, as RFC 3339.
    #[param(value_type = Option<String>)]
    until: Option<DateTime<Utc>>,
    /// Only with this text in the reason or the chain of errors, in any case.
    text: Option<String>,
    /// Only letters before this one: the last id of the page before.
    #[param(value_type = Option<String>)]
    before: Option<Uuid>,
    /// Page length, 1 to 1,000. Default 100.
    limit: Option<i64>,
}

/// Dead letters.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LetterList {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    dead_letters: Vec<DeadLetter>,
}

/// List dead letters, newest first.
#[utoipa::path(get, path = "/v1/dead-letters", tag = "dead letters", params(LetterQuery), responses(
    (status = 200, body = LetterList), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 404, description = "No such letter as `before`", body = ErrorEnvelope)))]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<LetterQuery>,
) -> Result<Json<LetterList>, ApiError> {
    let state = asked.state.unwrap_or_else(|| "open".to_owned());
    let from = place(&api, &tenant, asked.before).await?;
    let filter = DeadLetterFilter {
        tenant: Some(tenant.to_string()),
        kind: asked.kind,
        class: asked.class,
        state: (state != "all").then_some(state),
        since: asked.since,
        until: asked.until,
        text: asked.text,
        from,
        limit: page(asked.limit)?,
    };
    Ok(Json(LetterList { dead_letters: api.client.postgres().dead_letters(&filter).await? }))
}

/// Look at a dead letter.
#[utoipa::path(get, path = "/v1/dead-letters/{id}", tag = "dead letters",
    params(("id" = String, Path, description = "The letter, or its job")),
    responses((status = 200, body = Object), (status = 401, body = ErrorEnvelope), (status = 404, body = ErrorEnvelope)))]
pub(super) async fn show(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(id): Named,
) -> Result<Json<DeadLetter>, ApiError> {
    let mut letter = find(&api, &tenant, &id).await?;
    if letter.payload_key_id.is_some() {
        // Without the key it is shown without its payload.
        match api.client.postgres().letter_payload(&letter).await {
            Ok(payload) => letter.payload = payload,
            Err(error) => tracing::info!(%error, "a dead letter is shown without its payload"),
        }
    }
    Ok(Json(letter))
}

async fn find(api: &Api, tenant: &TenantId, id: &str) -> Result<DeadLetter, ApiError> {
    let unknown = || ApiError::not_found("no such dead letter");
    let id: Uuid = id.parse().map_err(|_| unknown())?;
    let letter = api.client.postgres().dead_letter(id).await?;
    letter.filter(|letter| letter.tenant == tenant.as_str()).ok_or_else(unknown)
}

/// Where a page begins: behind this letter.
async fn place(api: &Api, tenant: &TenantId, last: Option<Uuid>) -> Result<Option<Cursor>, ApiError> {
    let Some(id) = last else { return Ok(None) };
    let letter = find(api, tenant, &id.to_string()).await?;
    Ok(Some((letter.created_at, letter.id)))
}

/// How to replay or discard.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Resolution {
    /// For a replay: a mended payload.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    payload: Option<Value>,
    /// For a replay: take a new place at the end of the document's order.
    #[serde(default)]
    as_latest: bool,
    /// For a discard: why.
    #[serde(default)]
    reason: Option<String>,
}

/// Replay or discard a dead letter.
///
/// `POST /v1/dead-letters/{id}:replay` enqueues the dead job again as a new job; `POST /v1/dead-letters/{id}:discard`
/// closes the letter without. The body may be left out.
#[utoipa::path(post, path = "/v1/dead-letters/{id}", tag = "dead letters", request_body = Resolution,
    params(("id" = String, Path, description = "The letter, or its job, with `:replay` or `:discard` behind it")),
    responses(
        (status = 202, description = "Replayed as the job `replay_job`", body = Object),
        (status = 200, description = "Discarded", body = Object),
        (status = 404, body = ErrorEnvelope),
        (status = 409, description = "Somebody has dealt with it before", body = ErrorEnvelope),
        (status = 422, description = "The mended payload is not allowed", body = ErrorEnvelope)))]
pub(super) async fn resolve(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(name): Named,
    BodyIfAny(how): BodyIfAny<Resolution>,
) -> Result<Response, ApiError> {
    let no_verb =
        || ApiError::not_found("say what to do: /v1/dead-letters/ID:replay or /v1/dead-letters/ID:discard");
    let (id, verb) = name.split_once(':').ok_or_else(no_verb)?;
    let letter = find(&api, &tenant, id).await?;
    let (actor, postgres) = (format!("api:{tenant}"), api.client.postgres());
    let resolved = match verb {
        "replay" => {
            if let Some(payload) = &how.payload {
                if is_redacted(payload) {
                    return Err(ApiError::unprocessable(
                        "invalid_job",
                        "payload: \"[redacted]\" stands where the command line hid a value: send the real one",
                    ));
                }
                api.client.check_payload(&letter.kind, payload)?;
            }
            let (payload, as_latest) = (how.payload, how.as_latest);
            let replay = Replay { actor, payload, kind: None, as_latest, within_tenant: true };
            postgres.replay(letter.id, &replay).await?
        }
        "discard" => postgres.discard(letter.id, &actor, how.reason.as_deref().unwrap_or_default()).await?,
        _ => return Err(no_verb()),
    };
    match resolved {
        Resolved::Done(Some(job)) => {
            Ok((StatusCode::ACCEPTED, Json(json!({ "id": letter.id, "replay_job": job }))).into_response())
        }
        Resolved::Done(None) => Ok(Json(json!({ "id": letter.id, "state": "discarded" })).into_response()),
        Resolved::OtherDocument(_) => Err(ApiError::unprocessable(
            "invalid_job",
            "payload.document: a replay is about the dead job's document",
        )),
        Resolved::ForEveryTenant => Err(for_operators()),
        Resolved::Already(state) => Err(ApiError::new(
            StatusCode::CONFLICT,
            "already_resolved",
            format!("the dead letter is {state} already"),
        )),
        Resolved::Unknown => Err(ApiError::not_found("no such dead letter")),
    }
}

/// Which open dead letters to replay or discard together.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Selection {
    /// Only of this kind.
    #[serde(default)]
    kind: Option<String>,
    /// Only with this reason word.
    #[serde(default)]
    class: Option<String>,
    /// Only written then or later, as RFC 3339.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    since: Option<DateTime<Utc>>,
    /// Only written before, as RFC 3339.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    until: Option<DateTime<Utc>>,
    /// Only with this text in the reason or the chain of errors, in any case.
    #[serde(default)]
    text: Option<String>,
    /// Only letters after this one: the `next` of the answer before. The oldest come first.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    after: Option<Uuid>,
    /// Letters at most, 1 to 1,000. Default 100.
    #[serde(default)]
    limit: Option<i64>,
    /// Only say how many there are.
    #[serde(default)]
    dry_run: bool,
    /// For a replay: take new places at the end of the documents' order.
    #[serde(default)]
    as_latest: bool,
    /// For a discard: why. Required there.
    #[serde(default)]
    reason: Option<String>,
}

impl Selection {
    async fn filter(&self, api: &Api, tenant: &TenantId) -> Result<DeadLetterFilter, ApiError> {
        Ok(DeadLetterFilter {
            tenant: Some(tenant.to_string()),
            kind: self.kind.clone(),
            class: self.class.clone(),
            state: Some("open".to_owned()),
            since: self.since,
            until: self.until,
            text: self.text.clone(),
            from: place(api, tenant, self.after).await?,
            limit: page(self.limit)?,
        })
    }

    /// How many letters a call without `dry_run` would find.
    async fn preview(&self, api: &Api, filter: &DeadLetterFilter) -> Result<Response, ApiError> {
        let (totals, _) = api.client.postgres().letter_totals(filter).await?;
        let letters: i64 = totals.iter().map(|(_, _, count)| count).sum();
        let by: Vec<Value> = totals
            .into_iter()
            .map(|(kind, class, count)| json!({ "kind": kind, "class": class, "letters": count }))
            .collect();
        Ok(Json(json!({ "dry_run": true, "letters": letters, "by_kind_and_class": by })).into_response())
    }
}

/// Replay open dead letters together, each as if alone.
///
/// One that somebody else deals with meanwhile is left to them; one that can't be replayed keeps none of the others waiting.
/// There may be more while `next` is not null: ask again with it as `after`.
#[utoipa::path(post, path = "/v1/dead-letters:replay", tag = "dead letters", request_body = Selection, responses(
    (status = 202, description = "Each letter with the job that replays it, those that could not be replayed with the reason, and `next`", body = Object),
    (status = 200, description = "A dry run: how many there are", body = Object),
    (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 404, description = "No such letter as `after`", body = ErrorEnvelope)))]
pub(super) async fn replay_many(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Body(selection): Body<Selection>,
) -> Result<Response, ApiError> {
    let filter = selection.filter(&api, &tenant).await?;
    if selection.dry_run {
        return selection.preview(&api, &filter).await;
    }
    let postgres = api.client.postgres();
    let how = Replay {
        actor: format!("api:{tenant}"),
        as_latest: selection.as_latest,
        within_tenant: true,
        ..Replay::default()
    };
    let (mut replayed, mut failed) = (vec![], vec![]);
    let letters = postgres.letter_places(&filter).await?;
    let mut is_last = letters.len() < filter.limit as usize;
    let mut last = selection.after;
    for (_, id) in letters {
        match postgres.replay(id, &how).await {
            Ok(Resolved::Done(Some(job))) => replayed.push(json!({ "id": id, "replay_job": job })),
            Ok(Resolved::ForEveryTenant) => {
                failed.push(json!({ "id": id, "reason": "it is an operator's, for every tenant" }));
            }
            Ok(_) => {}
            Err(error) if error.class.is_retryable() && replayed.is_empty() => return Err(error.into()),
            Err(error) => {
                tracing::warn!(letter = %id, %error, "a dead letter was not replayed");
                let reason =
                    if error.class.is_retryable() { "a store is away" } else { "it can't be replayed" };
                failed.push(json!({ "id": id, "reason": reason }));
                if error.class.is_retryable() {
                    is_last = false;
                    break;
                }
            }
        }
        last = Some(id);
    }
    let next = last.filter(|_| !is_last);
    let done = json!({ "replayed": replayed, "failed": failed, "next": next });
    Ok((StatusCode::ACCEPTED, Json(done)).into_response())
}

/// Close open dead letters together, without a replay.
#[utoipa::path(post, path = "/v1/dead-letters:discard", tag = "dead letters", request_body = Selection, responses(
    (status = 200, description = "How many were closed; or, of a dry run, how many there are", body = Object),
    (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 404, description = "No such letter as `after`", body = ErrorEnvelope)))]
pub(super) async fn discard_many(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Body(selection): Body<Selection>,
) -> Result<Response, ApiError> {
    let filter = selection.filter(&api, &tenant).await?;
    if selection.dry_run {
        return selection.preview(&api, &filter).await;
    }
    let reason = selection.reason.as_deref().map(str::trim).filter(|reason| !reason.is_empty());
    let Some(reason) = reason else {
        return Err(ApiError::bad_request(
            "invalid_query",
            "reason: say why, for whoever reads the audit log",
        ));
    };
    let postgres = api.client.postgres();
    let discarded = postgres.discard_page(&filter, &format!("api:{tenant}"), reason).await?;
    Ok(Json(json!({ "discarded": discarded })).into_response())
}
