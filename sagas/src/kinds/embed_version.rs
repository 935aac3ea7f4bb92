//! `embed_version`: embeds the chunks of a version that an `ingest` job has staged, for workers that serve the queue `embed`. Such
//! a job hands its embedding over to one of these when `FLOTILLA_HAND_EMBEDDING_OVER` says so, and waits for its end.
//!
//! It writes points alone: under ids of the version, insert-only, as the ingest job itself would. What is to become of
//! them its parent decides, which ends this job before it removes them.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Stores,
    version::{PointPlace, embed_chunks, hex, store_points},
};
use crate::{
    engine::{Child, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::{postgres::take::TakenJob, vectors::vectors_hash},
};

/// The job kind.
pub const KIND: &str = "embed_version";
const VERSION: i32 = 1;
/// The name of the wait for it.
pub(super) const WAIT: &str = "embedding";

/// The payload.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    version: Uuid,
}

/// What it carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Embedding {
    version: Uuid,
    /// Hex; known once the vectors are stored.
    #[serde(default)]
    vectors_hash: Option<String>,
}

/// The job that embeds this version.
pub(super) fn child(parent: &TakenJob, version: Uuid) -> Child {
    Child {
        max_attempts: parent.max_attempts,
        timeout: parent.timeout,
        ..Child::new(KIND, json!(Request { version }))
    }
}

/// What it found, from its result.
pub(super) fn hash(result: Option<&Value>) -> Option<String> {
    result?["vectors_hash"].as_str().map(str::to_owned)
}

pub(super) struct EmbedVersion(Vec<Arc<dyn Step<Embedding>>>);

impl EmbedVersion {
    pub fn new(stores: Stores) -> Self {
        Self(vec![Arc::new(StoreVectors(stores))])
    }
}

impl Saga for EmbedVersion {
    type Data = Embedding;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        VERSION
    }

    fn steps(&self) -> &[Arc<dyn Step<Embedding>>] {
        &self.0
    }

    /// None.
    fn pivot(&self) -> usize {
        1
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres, Dependency::Embedder, Dependency::Vectors]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Embedding, StepError> {
        let request: Request = super::read(&job.payload)?;
        Ok(Embedding { version: request.version, vectors_hash: None })
    }

    fn repeatable(&self) -> bool {
        true
    }

    fn result(&self, data: &Embedding) -> Value {
        json!({ "vectors_hash": data.vectors_hash })
    }
}

struct StoreVectors(Stores);

#[async_trait]
impl Step<Embedding> for StoreVectors {
    fn name(&self) -> &'static str {
        "vectors"
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(300)
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Embedding) -> Result<(), StepError> {
        let (postgres, tenant) = (&self.0.postgres, &ctx.job.tenant);
        let staged =
            ctx.call(Dependency::Postgres, |_| postgres.staged_version(tenant, data.version)).await?;
        let Some(staged) = staged else {
            // Its parent has ended, or this is nobody's.
            return Err(StepError::permanent("no_version", "there is no such staged version"));
        };
        let chunks = Arc::new(ctx.call(Dependency::Postgres, |_| postgres.chunks(data.version)).await?);
        let vectors = embed_chunks(ctx, &self.0, &staged.model, staged.dimensions, chunks).await?;
        let place = PointPlace {
            version: data.version,
            document_id: staged.document_id,
            collection: staged.collection,
            dimensions: staged.dimensions,
        };
        store_points(ctx, &self.0, &place, &vectors).await?;
        // Points of an earlier try stay as they are: what is stored counts.
        let mut points = ctx
            .call(Dependency::Vectors, |_| {
                self.0.vectors.points(&place.collection, place.version, vectors.len() as i32)
            })
            .await?;
        points.sort_by_key(|point| point.chunk);
        let stored: Vec<&[f32]> = points.iter().filter_map(|point| point.vector.as_deref()).collect();
        if stored.len() != vectors.len() {
            return Err(StepError::transient(
                "vectors_vanished",
                "points were gone right after they were stored",
            ));
        }
        data.vectors_hash = Some(hex(&vectors_hash(stored.into_iter())));
        Ok(())
    }

    async fn compensate(&self, _: &StepContext, _: &Embedding) -> Result<(), StepError> {
        // The points are the parent's to remove, once this job has ended.
        Ok(())
    }
}
