//! How readers read: the current version from Postgres, the body from the cache, hits from Qdrant joined with what is
//! published (PROTOCOL.md 11).

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use serde::Serialize;
use uuid::Uuid;

use crate::{
    error::StepError,
    kinds::Stores,
    stores::{cache::Entry, postgres::documents::PublishedVersion, vectors::Hit},
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
/// Looks at the collection in one search at most; a second one is needed only where a document was replaced during the first.
const LOOKS: u32 = 3;
/// Longest time from a publish's beginning, which is the time it is known by, to its commit.
const PUBLISH_TAKES: Duration = Duration::from_secs(10);

/// What one look at a collection has found.
#[derive(Default)]
struct Look {
    hits: Vec<(PublishedVersion, i32, f32)>,
    /// By document, the version that it is shown by.
    shown: HashMap<Uuid, Uuid>,
    points: HashSet<(Uuid, i32)>,
    /// Versions that had points near, and are not what readers see.
    others: HashSet<Uuid>,
}

impl Look {
    /// Takes a page of points in, and which of their versions are published now.
    fn take(&mut self, near: &[Hit], published: &HashMap<Uuid, PublishedVersion>) {
        for hit in near {
            let Some(version) = published.get(&hit.version) else {
                self.others.insert(hit.version);
                continue;
            };
            // Published anew between two pages, a document stays as the first of them has shown it.
            let shown = *self.shown.entry(version.document_id).or_insert(version.version);
            // Points that come between two pages move others from one to the next.
            if shown == version.version && self.points.insert((hit.version, hit.chunk)) {
                self.hits.push((version.clone(), hit.chunk, hit.score));
            }
        }
    }
}

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
        let (mut looks, mut known) = (0, HashMap::new());
        let mut hits = loop {
            looks += 1;
            let began = Instant::now();
            let look = self.look(&collection, query, &vector).await?;
            if looks == LOOKS || !self.has_missed(query.tenant, &look, began, &mut known).await? {
                break look.hits;
            }
        };
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

    async fn look(&self, collection: &str, query: &Query<'_>, vector: &[f32]) -> Result<Look, StepError> {
        let mut look = Look::default();
        let (mut offset, mut page) = (0, query.k + OVER_FETCH);
        while look.hits.len() < query.k {
            let near = self
                .vectors
                .nearest(collection, query.tenant, vector.to_vec(), page as u64, offset as u64)
                .await?;
            let versions: Vec<Uuid> = near.iter().map(|hit| hit.version).collect();
            let published = self.postgres.published_among(query.tenant, &versions).await?;
            look.take(&near, &published);
            if near.len() < page {
                break;
            }
            offset += near.len();
            page *= 2;
        }
        Ok(look)
    }

    /// Whether a look has missed a document that was there all the time: only its old version's points were in the collection,
    /// and when Postgres was asked readers saw the new one already. The next look finds that one's points, as they were there
    /// before it was published. An old version is never shown in its place: another reader may have seen the new one.
    ///
    /// `known`: versions that had been published before this look, so that it has missed nothing of them.
    async fn has_missed(
        &self,
        tenant: &str,
        look: &Look,
        began: Instant,
        known: &mut HashMap<Uuid, Uuid>,
    ) -> Result<bool, StepError> {
        if look.others.is_empty() {
            return Ok(false);
        }
        let others: Vec<Uuid> = look.others.iter().copied().collect();
        let since = began.elapsed() + PUBLISH_TAKES;
        let mut missed = false;
        for (document, version) in self.postgres.replaced_among(tenant, &others, since).await? {
            if !look.shown.contains_key(&document) && known.insert(document, version) != Some(version) {
                missed = true;
            }
        }
        Ok(missed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(document: u128, version: u128) -> PublishedVersion {
        PublishedVersion {
            version: Uuid::from_u128(version),
            document_id: Uuid::from_u128(document),
            document: document.to_string(),
            tenant: "acme".to_owned(),
            title: None,
            metadata: serde_json::Value::Null,
            content_hash: String::new(),
            model: "m".to_owned(),
            collection: "c".to_owned(),
            chunk_count: 2,
            doc_order: 1,
        }
    }

    #[test]
    fn a_document_that_is_replaced_between_two_pages_is_shown_by_one_version_and_each_point_once() {
        let near = |points: &[(u128, i32)]| -> Vec<Hit> {
            let hit = |(version, chunk): &(u128, i32)| Hit {
                version: Uuid::from_u128(*version),
                chunk: *chunk,
                score: 0.5,
            };
            points.iter().map(hit).collect()
        };
        let published = |versions: [PublishedVersion; 2]| -> HashMap<Uuid, PublishedVersion> {
            versions.into_iter().map(|version| (version.version, version)).collect()
        };
        let mut look = Look::default();
        look.take(&near(&[(11, 0), (12, 0), (21, 0)]), &published([version(1, 11), version(2, 21)]));
        look.take(&near(&[(21, 0), (11, 1), (12, 1), (21, 1)]), &published([version(1, 12), version(2, 21)]));
        let seen: Vec<(u128, i32)> =
            look.hits.iter().map(|(version, chunk, _)| (version.version.as_u128(), *chunk)).collect();
        assert_eq!(seen, [(11, 0), (21, 0), (21, 1)]);
        assert!(look.shown.contains_key(&Uuid::from_u128(1)));
    }
}
