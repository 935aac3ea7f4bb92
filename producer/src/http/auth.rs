//! Whose request it is. Nothing crosses tenants: every handler that reads or writes a tenant's things takes [`Caller`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::FromRequestParts,
    http::{header, request::Parts},
};
use queue::TenantId;
use sagas::stores::postgres::Postgres;
use sha2::{Digest, Sha256};

use super::{Api, DEFAULT_TENANT, error::ApiError};
use crate::{pacing::within, settings::Auth};

/// How long a key that was seen in the ledger is believed: at most so long a revoked key goes on working.
const BELIEVED: Duration = Duration::from_secs(5);
const REMEMBERED: usize = 10_000;
const TENANT_HEADER: &str = "x-flotilla-tenant";

/// The tenant of a request.
pub(super) struct Caller(pub TenantId);

/// The tenant of each key, by the key's SHA-256, and when the ledger said so.
type Seen = HashMap<[u8; 32], (TenantId, Instant)>;

/// Keys seen lately, by their SHA-256; the keys themselves are not kept.
#[derive(Clone)]
pub(super) struct Keys {
    postgres: Postgres,
    seen: Arc<Mutex<Seen>>,
}

impl Keys {
    pub fn new(postgres: Postgres) -> Self {
        Self { postgres, seen: Arc::default() }
    }

    async fn tenant(&self, key: &str) -> Result<TenantId, ApiError> {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let known = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        if let Some((tenant, at)) = known
            && at.elapsed() < BELIEVED
        {
            return Ok(tenant);
        }
        let found = within(self.postgres.call_timeout() / 2, self.postgres.tenant_of_key(key)).await?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.remove(&digest);
        let tenant = found.ok_or_else(|| ApiError::unauthorized("the API key is unknown or revoked"))?;
        let tenant = TenantId::new(tenant.id).map_err(|error| {
            tracing::error!(%error, "the ledger has a tenant whose name is not allowed");
            ApiError::internal()
        })?;
        if seen.len() >= REMEMBERED {
            seen.clear();
        }
        seen.insert(digest, (tenant.clone(), Instant::now()));
        Ok(tenant)
    }
}

impl FromRequestParts<Api> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        match api.auth {
            Auth::ApiKeys => {
                let missing = || ApiError::unauthorized("send an API key: Authorization: Bearer KEY");
                let value = parts.headers.get(header::AUTHORIZATION).ok_or_else(missing)?;
                let (scheme, key) =
                    value.to_str().ok().and_then(|value| value.split_once(' ')).ok_or_else(missing)?;
                if !scheme.eq_ignore_ascii_case("bearer") || key.trim().is_empty() {
                    return Err(missing());
                }
                api.keys.tenant(key.trim()).await.map(Self)
            }
            Auth::Open => {
                let name =
                    parts.headers.get(TENANT_HEADER).map_or(Ok(DEFAULT_TENANT), |value| value.to_str());
                name.ok().and_then(|name| TenantId::new(name).ok()).map(Self).ok_or_else(|| {
                    ApiError::bad_request(
                        "invalid_tenant",
                        "X-Flotilla-Tenant: 1 to 64 characters of A-Z a-z 0-9 _ . - are allowed",
                    )
                })
            }
        }
    }
}
