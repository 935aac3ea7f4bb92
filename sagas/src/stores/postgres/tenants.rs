//! Tenants and their API keys.

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// A tenant's settings.
#[derive(Debug, Clone, serde::Serialize, sqlx::FromRow)]
pub struct Tenant {
    /// Its name.
    pub id: String,
    /// Waiting jobs at which enqueue answers 429; `None`: the producer's default.
    pub max_waiting: Option<i64>,
    /// The label under which its jobs are counted.
    pub class: String,
}

/// What is known of an API key; the key itself is not.
#[derive(Debug, Clone, serde::Serialize, sqlx::FromRow)]
pub struct ApiKey {
    /// What `revoke` takes.
    pub id: Uuid,
    /// Whom it speaks for.
    pub tenant: String,
    /// What it is for, for people.
    pub name: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Since when it is useless.
    pub revoked_at: Option<DateTime<Utc>>,
}

fn digest(key: &str) -> Vec<u8> {
    Sha256::digest(key.as_bytes()).to_vec()
}

impl Postgres {
    /// Makes a tenant; nothing happens if it is there. `true`: it is new.
    pub async fn create_tenant(&self, id: &str) -> Result<bool, StoreError> {
        let done = sqlx::query("INSERT INTO tenants (id) VALUES ($1) ON CONFLICT DO NOTHING")
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// The tenant, if it exists.
    pub async fn tenant(&self, id: &str) -> Result<Option<Tenant>, StoreError> {
        Ok(sqlx::query_as("SELECT id, max_waiting, class FROM tenants WHERE id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// Stores an API key's hash; the key itself is the caller's to show once.
    pub async fn create_api_key(&self, tenant: &str, name: &str, key: &str) -> Result<Uuid, StoreError> {
        let id = Uuid::now_v7();
        sqlx::query("INSERT INTO api_keys (id, tenant, name, key_hash) VALUES ($1, $2, $3, $4)")
            .bind(id)
            .bind(tenant)
            .bind(name)
            .bind(digest(key))
            .execute(&self.pool)
            .await?;
        Ok(id)
    }

    /// The API keys, of `tenant` if given, newest first; without those revoked unless asked for.
    pub async fn api_keys(
        &self,
        tenant: Option<&str>,
        revoked: bool,
        limit: i64,
    ) -> Result<Vec<ApiKey>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT id, tenant, name, created_at, revoked_at FROM api_keys
             WHERE ($1::text IS NULL OR tenant = $1) AND (revoked_at IS NULL OR $2) ORDER BY id DESC LIMIT $3",
        )
        .bind(tenant)
        .bind(revoked)
        .bind(limit)
        .fetch_all(&self.pool)
        .await?)
    }

    /// Revokes an API key. `false`: there is no such key, or it was revoked before.
    pub async fn revoke_api_key(&self, id: Uuid) -> Result<bool, StoreError> {
        let done = sqlx::query("UPDATE api_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL")
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// The tenant that an API key speaks for.
    pub async fn tenant_of_key(&self, key: &str) -> Result<Option<Tenant>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT t.id, t.max_waiting, t.class FROM api_keys k JOIN tenants t ON t.id = k.tenant
             WHERE k.key_hash = $1 AND k.revoked_at IS NULL",
        )
        .bind(digest(key))
        .fetch_optional(&self.pool)
        .await?)
    }
}
