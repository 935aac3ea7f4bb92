//! Reading documents and searching them.

use axum::{Json, extract::State, response::IntoResponse};
use sagas::search::{Query, SearchHit};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::Caller,
    error::{ApiError, ErrorEnvelope},
    input::{Asked, Named},
};

/// Longest search text, in characters; an embedding model reads less.
const MAX_TEXT: usize = 8192;
const MAX_HITS: usize = 100;

/// Whether the text came from the cache: `hit` or `miss`.
const X_CACHE: &str = "x-cache";

/// Read the published version of a document.
#[utoipa::path(get, path = "/v1/documents/{key}", tag = "documents",
    params(("key" = String, Path, description = "The caller's name for the document; slashes may stand as they are")),
    responses(
        (status = 200, description = "The version and its `text`", body = Object,
            headers(("X-Cache" = String, description = "`hit`: the text was in the cache; `miss`: it came from Postgres"))),
        (status = 401, body = ErrorEnvelope),
        (status = 404, description = "Unknown, deleted, or not ingested yet", body = ErrorEnvelope),
        (status = 503, body = ErrorEnvelope)))]
pub(super) async fn show(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Named(key): Named,
) -> Result<impl IntoResponse, ApiError> {
    let missing = || ApiError::not_found("no such document: it is unknown, deleted, or not ingested yet");
    // The ledger can't hold such a name, nor be asked for it.
    if key.contains('\0') {
        return Err(missing());
    }
    let document = api.stores.document(tenant.as_str(), &key).await?.ok_or_else(missing)?;
    Ok(([(X_CACHE, if document.cached { "hit" } else { "miss" })], Json(document)))
}

/// What to search.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SearchQuery {
    /// What to look for, 1 to 8,192 characters.
    q: String,
    /// Hits wanted, 1 to 100. Default 10.
    k: Option<usize>,
    /// Embedding model; the default one if absent.
    model: Option<String>,
    /// Qdrant collection; the model's own if absent.
    collection: Option<String>,
}

/// Search hits.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SearchAnswer {
    /// Best first; fewer than `k` only when there are no more.
    #[schema(value_type = Vec<Object>)]
    hits: Vec<SearchHit>,
}

/// Search published documents by meaning.
#[utoipa::path(get, path = "/v1/search", tag = "documents", params(SearchQuery), responses(
    (status = 200, body = SearchAnswer), (status = 400, body = ErrorEnvelope), (status = 401, body = ErrorEnvelope),
    (status = 422, description = "Unknown model", body = ErrorEnvelope), (status = 503, body = ErrorEnvelope)))]
pub(super) async fn search(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Asked(asked): Asked<SearchQuery>,
) -> Result<Json<SearchAnswer>, ApiError> {
    let invalid = |message: String| ApiError::bad_request("invalid_query", message);
    let length = asked.q.chars().count();
    if asked.q.trim().is_empty() || length > MAX_TEXT {
        return Err(invalid(format!("q has {length} characters: 1 to {MAX_TEXT} are allowed")));
    }
    let k = asked.k.unwrap_or(10);
    if !(1..=MAX_HITS).contains(&k) {
        return Err(invalid(format!("k is {k}: 1 to {MAX_HITS} are allowed")));
    }
    let query = Query {
        tenant: tenant.as_str(),
        text: &asked.q,
        k,
        model: asked.model.as_deref(),
        collection: asked.collection.as_deref(),
    };
    Ok(Json(SearchAnswer { hits: api.stores.search(&query).await? }))
}
