//! What readers see: published versions only.

use std::{collections::HashMap, time::Duration};

use serde_json::Value;
use sqlx::Row;
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// The published version of a document.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PublishedVersion {
    /// The version.
    pub version: Uuid,
    /// Its document.
    pub document_id: Uuid,
    /// The caller's name for the document.
    pub document: String,
    /// Owner.
    pub tenant: String,
    /// For people.
    pub title: Option<String>,
    /// The caller's JSON object.
    pub metadata: Value,
    /// SHA-256 of the body, hex.
    pub content_hash: String,
    /// Embedding model.
    pub model: String,
    /// Qdrant collection.
    pub collection: String,
    /// Number of chunks.
    pub chunk_count: i32,
    /// The job's order number.
    pub doc_order: i64,
}

/// The content of a version that is about to be copied.
#[derive(Debug, Clone)]
pub struct Content {
    /// What readers see of it.
    pub version: PublishedVersion,
    /// The whole text.
    pub body: String,
    /// SHA-256 of the body.
    pub content_hash: Vec<u8>,
}

const PUBLISHED: &str =
    "SELECT v.id, v.document_id, d.key, v.tenant, v.title, v.metadata, encode(v.content_hash, 'hex') AS hash,
       v.model, v.collection, v.chunk_count, v.doc_order, v.body, v.content_hash
  FROM documents d JOIN document_versions v ON v.id = d.current_version";

fn published(row: &sqlx::postgres::PgRow) -> Result<PublishedVersion, sqlx::Error> {
    Ok(PublishedVersion {
        version: row.try_get("id")?,
        document_id: row.try_get("document_id")?,
        document: row.try_get("key")?,
        tenant: row.try_get("tenant")?,
        title: row.try_get("title")?,
        metadata: row.try_get("metadata")?,
        content_hash: row.try_get("hash")?,
        model: row.try_get("model")?,
        collection: row.try_get("collection")?,
        chunk_count: row.try_get("chunk_count")?,
        doc_order: row.try_get("doc_order")?,
    })
}

impl Postgres {
    /// The version of a document that readers see now, without its text. `None`: unknown, deleted, or not ingested yet.
    pub async fn current_version(
        &self,
        tenant: &str,
        document: &str,
    ) -> Result<Option<PublishedVersion>, StoreError> {
        let sql = format!(
            "{} WHERE d.tenant = $1 AND d.key = $2",
            PUBLISHED.replace(", v.body, v.content_hash", "")
        );
        let row = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(tenant)
            .bind(document)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.as_ref().map(published).transpose()?)
    }

    /// The whole text of a version that is still published.
    pub async fn body(&self, version: Uuid) -> Result<Option<String>, StoreError> {
        Ok(sqlx::query_scalar("SELECT body FROM document_versions WHERE id = $1 AND body IS NOT NULL")
            .bind(version)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// The current content of a document, to be copied by a re-embedding.
    pub async fn content(&self, document: Uuid) -> Result<Option<Content>, StoreError> {
        let row = sqlx::query(sqlx::AssertSqlSafe(format!("{PUBLISHED} WHERE d.id = $1")))
            .bind(document)
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Content {
            version: published(&row)?,
            body: row.try_get("body")?,
            content_hash: row.try_get("content_hash")?,
        }))
    }

    /// Which of these versions are published for `tenant`, with what a search result shows of them.
    pub async fn published_among(
        &self,
        tenant: &str,
        versions: &[Uuid],
    ) -> Result<HashMap<Uuid, PublishedVersion>, StoreError> {
        let sql = format!(
            "{} WHERE d.current_version = ANY($1) AND d.tenant = $2",
            PUBLISHED.replace(", v.body, v.content_hash", "")
        );
        let rows =
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(versions).bind(tenant).fetch_all(&self.pool).await?;
        rows.iter().map(|row| published(row).map(|v| (v.version, v)).map_err(Into::into)).collect()
    }

    /// Of the documents of `tenant` that these versions, which readers don't see any more, belong to, those whose current version
    /// was published within this time: document and version.
    pub async fn replaced_among(
        &self,
        tenant: &str,
        versions: &[Uuid],
        within: Duration,
    ) -> Result<Vec<(Uuid, Uuid)>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT DISTINCT d.id, c.id
             FROM document_versions v
             JOIN documents d ON d.id = v.document_id
             JOIN document_versions c ON c.id = d.current_version
             WHERE v.id = ANY($1) AND v.state IN ('retired', 'erased') AND d.tenant = $2
               AND c.published_at > now() - make_interval(secs => $3)",
        )
        .bind(versions)
        .bind(tenant)
        .bind(within.as_secs_f64())
        .fetch_all(&self.pool)
        .await?)
    }

    /// The texts of these chunks.
    pub async fn chunk_texts(
        &self,
        chunks: &[(Uuid, i32)],
    ) -> Result<HashMap<(Uuid, i32), String>, StoreError> {
        let rows = sqlx::query(
            "SELECT c.version_id, c.no, c.body FROM chunks c
             JOIN unnest($1::uuid[], $2::integer[]) AS w (version, no) ON c.version_id = w.version AND c.no = w.no",
        )
        .bind(chunks.iter().map(|c| c.0).collect::<Vec<_>>())
        .bind(chunks.iter().map(|c| c.1).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| Ok(((row.try_get("version_id")?, row.try_get("no")?), row.try_get("body")?)))
            .collect()
    }

    /// A page of documents with a published version after `after`, for selecting what to re-embed: `(id, tenant, key)`.
    pub async fn published_documents(
        &self,
        tenant: Option<&str>,
        after: Uuid,
        limit: i64,
    ) -> Result<Vec<(Uuid, String, String)>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT id, tenant, key FROM documents
             WHERE id > $1 AND ($2::text IS NULL OR tenant = $2) AND current_version IS NOT NULL ORDER BY id LIMIT $3",
        )
        .bind(after)
        .bind(tenant)
        .bind(limit)
        .fetch_all(&self.pool)
        .await?)
    }
}
