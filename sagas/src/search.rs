//! How readers read: the current version from Postgres, the body from the cache, hits from Qdrant joined with what is
//! published (PROTOCOL.md 11).

use serde::Serialize;
use uuid::Uuid;

use crate::{
    error::StepError,
    kinds::Stores,
    stores::{cache::Entry, postgres::documents::PublishedVersion},
};

/// A document as readers get it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Document {
    /// Its published version.
    #[serde(flatten)]
    pub version: PublishedVersion,
    /// The whole text.
    pub text: String,
    /// Whether the text was in the cache.
    #[serde(skip)]
    pub cached: bool,
}

/// A search hit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SearchHit {
    /// The caller's name for the document.
    pub document: String,
    /// For people.
    pub title: Option<String>,
    /// The version the hit is in.
    pub version: Uuid,
    /// The chunk's number.
    pub chunk: i32,
    /// Cosine, -1 to 1.
    pub score: f32,
    /// The chunk's text.
    pub text: String,
}

/// What to search.
#[derive(Debug, Clone)]
pub struct Query<'a> {
    /// Whose documents.
    pub tenant: &'a str,
    /// What to look for.
    pub text: &'a str,
    /// Hits wanted.
    pub k: usize,
    /// Embedding model; the default one if absent.
    pub model: Option<&'a str>,
    /// Qdrant collection; the model's own if absent.
    pub collection: Option<&'a str>,
}

/// Points asked of Qdrant at once, beyond the hits wanted: staged and retired points share the collection.
const OVER_FETCH: usize = 32;

impl Stores {
    /// The document as published now. `None`: unknown, deleted, or not ingested yet. The cache saves reading the text; when
    /// it is down, hangs or is wrong, Postgres serves.
    pub async fn document(&self, tenant: &str, document: &str) -> Result<Option<Document>, StepError> {
        // A version read just before it is replaced keeps its text for the grace period; a second look is enough.
        for _ in 0..2 {
            let Some(version) = self.postgres.current_version(tenant, document).await? else {
                return Ok(None);
            };
            let read = self.cache.get(version.version).await;
            let answers = read.is_ok();
            let cached = read.unwrap_or_else(|error| {
                tracing::debug!(%error, "reading past the cache");
                None
            });
            let right = |e: &Entry| e.content_hash == version.content_hash && e.tenant == version.tenant;
            if let Some(entry) = cached.filter(right) {
                return Ok(Some(Document { version, text: entry.body, cached: true }));
            }
            let Some(body) = self.postgres.body(version.version).await? else { continue };
            let entry =
                Entry { body, content_hash: version.content_hash.clone(), tenant: version.tenant.clone() };
            if answers && let Err(error) = self.cache.fill(version.document_id, version.version, &entry).await
            {
                tracing::debug!(%error, "the cache was not filled");
            }
            return Ok(Some(Document { version, text: entry.body, cached: false }));
        }
        Ok(None)
    }

    /// The nearest chunks of published versions, best first; fewer than `k` only when the collection has no more.
    pub async fn search(&self, query: &Query<'_>) -> Result<Vec<SearchHit>, StepError> {
        let embedder = self.embedder(query.model)?;
        let collection = query.collection.map_or_else(|| self.collection(embedder.model()), str::to_owned);
        let vector = embedder
            .embed(vec![query.text.to_owned()])
            .await
            .map_err(crate::StoreError::from)?
            .pop()
            .ok_or_else(|| StepError::transient("no_vector", "the embedding provider gave no vector"))?;
        let mut hits: Vec<(PublishedVersion, i32, f32)> = vec![];
        let (mut offset, mut page) = (0, query.k + OVER_FETCH);
        while hits.len() < query.k {
            let near = self
                .vectors
                .nearest(&collection, query.tenant, vector.clone(), page as u64, offset as u64)
                .await?;
            let versions: Vec<Uuid> = near.iter().map(|hit| hit.version).collect();
            let published = self.postgres.published_among(query.tenant, &versions).await?;
            hits.extend(
                near.iter()
                    .filter_map(|hit| Some((published.get(&hit.version)?.clone(), hit.chunk, hit.score))),
            );
            if near.len() < page {
                break;
            }
            offset += near.len();
            page *= 2;
        }
        hits.truncate(query.k);
        let wanted: Vec<(Uuid, i32)> =
            hits.iter().map(|(version, chunk, _)| (version.version, *chunk)).collect();
        let texts = self.postgres.chunk_texts(&wanted).await?;
        Ok(hits
            .into_iter()
            .filter_map(|(version, chunk, score)| {
                let text = texts.get(&(version.version, chunk))?.clone();
                Some(SearchHit {
                    document: version.document,
                    title: version.title,
                    version: version.version,
                    chunk,
                    score,
                    text,
                })
            })
            .collect())
    }
}
