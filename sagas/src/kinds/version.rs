//! The steps by which a new version of a document comes into being; ingest and embed share them.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Stores, embed_version, ingest};
use crate::{
    coalescing::Coalescer,
    engine::{Commits, Step, StepContext},
    error::{Dependency, StepError},
    stores::{
        announcer::Announcement,
        cache::Entry,
        postgres::{
            publish::{Condition, Publish, PublishBatch, Published},
            stage::{AbandonBatch, Abandoned, NewSaga, NewVersion, Stage, StageBatch},
            take::StepRecord,
        },
        vectors::{Point, Withdrawals, vectors_hash},
    },
};

/// The index of `publish` among the steps.
pub(super) const PIVOT: usize = 3;

/// What the steps carry. The text itself is not kept in the log: after the stage it stands in its own tables.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Draft {
    /// Fresh for this run.
    pub version: Uuid,
    pub document_id: Uuid,
    pub doc_order: i64,
    /// The version that is copied, for a re-embedding.
    pub source: Option<Uuid>,
    pub title: Option<String>,
    pub metadata: Value,
    /// SHA-256 of the body, hex.
    pub content_hash: String,
    pub model: String,
    pub dimensions: usize,
    pub collection: String,
    pub chunk_count: usize,
    /// Hex; known once the vectors are stored.
    pub vectors_hash: Option<String>,
    #[serde(skip)]
    pub body: Option<Arc<str>>,
    #[serde(skip)]
    pub chunks: Option<Arc<Vec<String>>>,
    /// The caller's own vectors, one for each chunk.
    #[serde(skip)]
    pub given: Option<Arc<Vec<Vec<f32>>>>,
    /// Whether this delivery has tried to store vectors before.
    #[serde(skip)]
    pub tried: bool,
}

impl Draft {
    fn place(&self) -> PointPlace {
        PointPlace {
            version: self.version,
            document_id: self.document_id,
            collection: self.collection.clone(),
            dimensions: self.dimensions,
        }
    }

    fn condition(&self) -> Condition {
        self.source.map_or(Condition::Order(self.doc_order), Condition::Replaces)
    }
}

/// What the steps work on.
#[derive(Clone)]
pub(super) struct Steps {
    pub stores: Stores,
    pub stage: Coalescer<StageBatch>,
    pub unstage: Coalescer<AbandonBatch>,
    pub withdrawals: Withdrawals,
    pub publish: Coalescer<PublishBatch>,
}

impl Steps {
    /// The steps after the stage, in order: vectors, cache, publish.
    pub fn after_stage(&self) -> [Arc<dyn Step<Draft>>; 3] {
        [
            Arc::new(StoreVectors(self.stores.clone(), self.withdrawals.clone())),
            Arc::new(WriteCache(self.stores.clone())),
            Arc::new(PublishVersion(self.clone())),
        ]
    }

    /// Commits the saga's row, the staged version and its chunks.
    pub async fn stage(
        &self,
        ctx: &StepContext,
        draft: &Draft,
        kind: &str,
        version: i32,
    ) -> Result<(), StepError> {
        let (Some(body), Some(chunks)) = (&draft.body, &draft.chunks) else {
            return Err(StepError::permanent("no_content", "the draft has no text to stage"));
        };
        let stage = Arc::new(Stage {
            saga: NewSaga {
                id: ctx.saga_id,
                job_id: ctx.job.id,
                fence: ctx.fence(),
                kind: kind.to_owned(),
                definition_version: version,
                tenant: ctx.job.tenant.clone(),
                next_step: 1,
                data: crate::engine::encode(draft)?,
            },
            version: NewVersion {
                id: draft.version,
                document_id: draft.document_id,
                doc_order: draft.doc_order,
                title: draft.title.clone(),
                body: body.to_string(),
                metadata: draft.metadata.clone(),
                content_hash: hex_bytes(&draft.content_hash),
                model: draft.model.clone(),
                dimensions: i32::try_from(draft.dimensions).unwrap_or(i32::MAX),
                collection: draft.collection.clone(),
                chunks: chunks.to_vec(),
            },
        });
        let staged =
            ctx.call(Dependency::Postgres, |deadline| self.stage.call(Arc::clone(&stage), deadline)).await?;
        if staged { Ok(()) } else { Err(StepError::LeaseLost) }
    }

    /// Withdraws the staged version.
    pub async fn unstage(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        let abandoned = Abandoned {
            job: ctx.job.id,
            fence: ctx.fence(),
            version: draft.version,
            sweep_after: self.stores.settings.sweep_bound,
        };
        let done = ctx.call(Dependency::Postgres, |deadline| self.unstage.call(abandoned, deadline)).await?;
        if done { Ok(()) } else { Err(StepError::LeaseLost) }
    }
}

/// Embeds the chunks and stores a point for each, insert-only.
struct StoreVectors(Stores, Withdrawals);

#[async_trait]
impl Step<Draft> for StoreVectors {
    fn name(&self) -> &'static str {
        "vectors"
    }

    fn timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(300)
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        let given = given(ctx, draft)?;
        if given.is_none() && self.0.settings.hand_embedding_over && ctx.job.kind == ingest::KIND {
            draft.vectors_hash = Some(self.hand_over(ctx, draft).await?);
            return Ok(());
        }
        // Points of an earlier try stay as they are, and a provider need not give the same vectors twice: then what is
        // stored counts, not what was computed.
        let earlier = ctx.resumed || std::mem::replace(&mut draft.tried, true);
        if earlier && let Some(hash) = self.stored_hash(ctx, draft).await? {
            draft.vectors_hash = Some(hash);
            return Ok(());
        }
        let vectors = match given {
            Some(given) => given,
            None => Arc::new(self.embed(ctx, draft).await?),
        };
        store_points(ctx, &self.0, &draft.place(), &vectors).await?;
        draft.vectors_hash = if earlier {
            self.stored_hash(ctx, draft).await?
        } else {
            Some(hex(&vectors_hash(vectors.iter().map(Vec::as_slice))))
        };
        if draft.vectors_hash.is_none() {
            return Err(StepError::transient(
                "vectors_vanished",
                "points were gone right after they were stored",
            ));
        }
        Ok(())
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        if ctx.job.kind == ingest::KIND {
            // Whatever the setting says here: another worker may have handed it over.
            ctx.cancel_children(embed_version::WAIT).await?;
        }
        let chunks = draft.chunk_count as i32;
        ctx.call(Dependency::Vectors, |deadline| {
            self.1.remove(&draft.collection, draft.version, chunks, deadline)
        })
        .await
    }
}

impl StoreVectors {
    /// The hash of the stored vectors if all are there.
    async fn stored_hash(&self, ctx: &StepContext, draft: &Draft) -> Result<Option<String>, StepError> {
        let count = draft.chunk_count as i32;
        let mut points = ctx
            .call(Dependency::Vectors, |_| self.0.vectors.points(&draft.collection, draft.version, count))
            .await?;
        points.sort_by_key(|point| point.chunk);
        let vectors: Vec<&[f32]> = points.iter().filter_map(|point| point.vector.as_deref()).collect();
        Ok((vectors.len() == draft.chunk_count).then(|| hex(&vectors_hash(vectors.into_iter()))))
    }

    async fn embed(&self, ctx: &StepContext, draft: &Draft) -> Result<Vec<Vec<f32>>, StepError> {
        let chunks = match &draft.chunks {
            Some(chunks) => Arc::clone(chunks),
            None => {
                Arc::new(ctx.call(Dependency::Postgres, |_| self.0.postgres.chunks(draft.version)).await?)
            }
        };
        embed_chunks(ctx, &self.0, &draft.model, draft.dimensions, chunks).await
    }

    /// Leaves it to a worker that serves the queue `embed`, and waits for that without holding a slot.
    async fn hand_over(&self, ctx: &StepContext, draft: &Draft) -> Result<String, StepError> {
        let child = embed_version::child(&ctx.job, draft.version);
        let ends = ctx.children(embed_version::WAIT, &[child]).await?;
        let end = ends.first();
        if let Some(hash) = end.and_then(|end| embed_version::hash(end.result.as_ref())) {
            return Ok(hash);
        }
        let (state, why) =
            end.map_or(("gone", ""), |end| (&end.state, end.error.as_deref().unwrap_or_default()));
        match state {
            // It has used up attempts of its own.
            "dead" | "parked" => {
                Err(StepError::permanent("embedding_failed", format!("the embedding is {state}: {why}")))
            }
            _ => Err(StepError::transient("embedding_ended", format!("the embedding was {state}"))),
        }
    }
}

/// The caller's own vectors. A later delivery reads them from the request again.
fn given(ctx: &StepContext, draft: &Draft) -> Result<Option<Arc<Vec<Vec<f32>>>>, StepError> {
    if draft.given.is_some() || !ctx.resumed || ctx.job.kind != ingest::KIND {
        return Ok(draft.given.clone());
    }
    let given = ingest::vectors_in(&ctx.job.payload)?;
    if let Some(vectors) = &given {
        check_dimensions(vectors, draft.dimensions)?;
    }
    Ok(given.map(Arc::new))
}

/// Where a version's points belong.
#[derive(Debug, Clone)]
pub(super) struct PointPlace {
    pub version: Uuid,
    pub document_id: Uuid,
    pub collection: String,
    pub dimensions: usize,
}

/// A vector of the model for each chunk.
pub(super) async fn embed_chunks(
    ctx: &StepContext,
    stores: &Stores,
    model: &str,
    dimensions: usize,
    chunks: Arc<Vec<String>>,
) -> Result<Vec<Vec<f32>>, StepError> {
    let embedder = stores.embedder(Some(model))?;
    let vectors = ctx
        .call(Dependency::Embedder, |_| {
            let (embedder, chunks) = (Arc::clone(&embedder), chunks.to_vec());
            async move { embedder.embed(chunks).await.map_err(Into::into) }
        })
        .await?;
    check_dimensions(&vectors, dimensions)?;
    Ok(vectors)
}

/// Stores a point for each vector, insert-only.
pub(super) async fn store_points(
    ctx: &StepContext,
    stores: &Stores,
    place: &PointPlace,
    vectors: &[Vec<f32>],
) -> Result<(), StepError> {
    let ledger = stores.ledger().await?;
    let points: Vec<Point> = vectors
        .iter()
        .enumerate()
        .map(|(no, vector)| Point {
            version: place.version,
            chunk: no as i32,
            document_id: place.document_id,
            tenant: ctx.job.tenant.clone(),
            ledger,
            vector: vector.clone(),
        })
        .collect();
    ctx.call(Dependency::Vectors, |deadline| {
        stores.vectors.insert(&place.collection, place.dimensions, points.clone(), deadline)
    })
    .await
}

/// Every vector must have the collection's length.
pub(super) fn check_dimensions(vectors: &[Vec<f32>], dimensions: usize) -> Result<(), StepError> {
    match vectors.iter().enumerate().find(|(_, v)| v.len() != dimensions) {
        Some((no, vector)) => Err(StepError::permanent(
            "wrong_dimension",
            format!(
                "the vector of chunk {no} has {} dimensions; the collection has {dimensions}",
                vector.len()
            ),
        )),
        None => Ok(()),
    }
}

/// Writes the body through to the cache.
struct WriteCache(Stores);

#[async_trait]
impl Step<Draft> for WriteCache {
    fn name(&self) -> &'static str {
        "cache"
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        let body = match &draft.body {
            Some(body) => body.to_string(),
            None => ctx
                .call(Dependency::Postgres, |_| self.0.postgres.body(draft.version))
                .await?
                .ok_or_else(|| StepError::transient("body_missing", "the staged text is not there"))?,
        };
        let entry = Entry { body, content_hash: draft.content_hash.clone(), tenant: ctx.job.tenant.clone() };
        ctx.call(Dependency::Cache, |_| self.0.cache.put_tagged(draft.document_id, draft.version, &entry))
            .await
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        ctx.call(Dependency::Cache, |_| {
            self.0.cache.remove(std::slice::from_ref(&draft.version), "compensated")
        })
        .await
    }
}

/// The pivot: readers see the new version, and the job has succeeded. The version it replaces is retired by the janitor
/// after the grace period.
struct PublishVersion(Steps);

#[async_trait]
impl Step<Draft> for PublishVersion {
    fn name(&self) -> &'static str {
        "publish"
    }

    fn commits(&self) -> Commits {
        Commits::End
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        let hash = draft.vectors_hash.as_deref().unwrap_or_default();
        let stores = &self.0.stores;
        // The pivot's own record is committed with it.
        let mut steps = ctx.steps_so_far();
        let started_at = chrono::Utc::now();
        steps.push(StepRecord {
            step: self.name().into(),
            compensation: false,
            attempts: 1,
            started_at,
            ended_at: started_at,
            error: None,
        });
        let publish = Arc::new(Publish {
            job_id: ctx.job.id,
            fence: ctx.fence(),
            saga_id: ctx.saga_id,
            version: draft.version,
            document_id: draft.document_id,
            condition: draft.condition(),
            vectors_hash: hex_bytes(hash),
            result: json!({ "document_id": draft.document_id, "version": draft.version, "chunks": draft.chunk_count }),
            steps,
            next_step: PIVOT as i16 + 1,
            grace: stores.settings.grace,
        });
        match ctx
            .call(Dependency::Postgres, |deadline| self.0.publish.call(Arc::clone(&publish), deadline))
            .await?
        {
            Published::Yes => {
                stores.cache.announce(Announcement {
                    event: "document.published",
                    tenant: ctx.job.tenant.clone(),
                    document: super::document_of(&ctx.job.kind, &ctx.job.payload).unwrap_or_default(),
                    document_id: draft.document_id,
                    version: Some(draft.version),
                    order: draft.doc_order,
                });
                Ok(())
            }
            Published::Cancelled => Err(StepError::Cancelled),
            Published::LeaseLost => Err(StepError::LeaseLost),
            Published::Superseded if draft.source.is_none() => Err(StepError::Superseded),
            // The content changed under a re-embedding: copy the new content in another run, unless it is gone.
            Published::Superseded => {
                let content =
                    ctx.call(Dependency::Postgres, |_| stores.postgres.content(draft.document_id)).await?;
                Err(match content {
                    Some(_) => {
                        StepError::transient("content_changed", "the document got new content meanwhile")
                    }
                    None => StepError::Superseded,
                })
            }
        }
    }

    async fn compensate(&self, _: &StepContext, _: &Draft) -> Result<(), StepError> {
        // The engine never undoes a pivot.
        Ok(())
    }
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string can't fail.
        if write!(text, "{byte:02x}").is_err() {
            text.clear();
        }
        text
    })
}

fn hex_bytes(text: &str) -> Vec<u8> {
    (0..text.len() / 2).filter_map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()).collect()
}
