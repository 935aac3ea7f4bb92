//! Reading what clients send, with errors in the API's own form.

use axum::{
    body::Bytes,
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::{Api, error::ApiError};

/// A body of JSON in UTF-8.
pub(super) struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Api> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        parse(&bytes(request, api).await?).map(Self)
    }
}

/// A body of which every part may be left out, and so all of it.
pub(super) struct BodyIfAny<T>(pub T);

impl<T: DeserializeOwned + Default> FromRequest<Api> for BodyIfAny<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        let bytes = bytes(request, api).await?;
        if bytes.is_empty() { Ok(Self(T::default())) } else { parse(&bytes).map(Self) }
    }
}

async fn bytes(request: Request, api: &Api) -> Result<Bytes, ApiError> {
    Bytes::from_request(request, api).await.map_err(|rejection: BytesRejection| {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            let limit = api.client.settings().max_payload;
            ApiError::too_large(format!(
                "the request's body is over the limit; a payload may have {limit} bytes"
            ))
        } else {
            ApiError::bad_request("unreadable_body", rejection.body_text())
        }
    })
}

/// Malformed JSON is 400; JSON that is not the request's form is 422.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ApiError::bad_request(
            "not_utf8",
            format!("the body is not UTF-8: {error}; send other bytes as base64"),
        )
    })?;
    serde_json::from_str(text).map_err(|error| read_error(&error))
}

pub(super) fn read_error(error: &serde_json::Error) -> ApiError {
    match error.classify() {
        Category::Data => ApiError::unprocessable("invalid_request", error.to_string()),
        Category::Syntax | Category::Eof | Category::Io => {
            ApiError::bad_request("malformed_json", format!("the body is not JSON: {error}"))
        }
    }
}

/// The query string.
pub(super) struct Asked<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Api> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        Query::from_request_parts(parts, api).await.map(|Query(asked)| Self(asked)).map_err(
            |rejection: QueryRejection| ApiError::bad_request("invalid_query", rejection.body_text()),
        )
    }
}

/// The one parameter of the path, decoded.
pub(super) struct Named(pub String);

impl FromRequestParts<Api> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        Path::from_request_parts(parts, api)
            .await
            .map(|Path(name)| Self(name))
            .map_err(|rejection: PathRejection| ApiError::bad_request("invalid_path", rejection.body_text()))
    }
}
