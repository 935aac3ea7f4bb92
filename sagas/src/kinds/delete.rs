//! `delete`: a document leaves all three stores. It begins with its pivot: from the tombstone on readers get 404, and the saga
//! only goes forward (PROTOCOL.md 9).

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Stores;
use crate::{
    engine::{Commits, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::{
        announcer::Announcement,
        postgres::{deletion::Doomed, publish::Published, stage::NewSaga, take::TakenJob},
    },
};

/// The job kind.
pub const KIND: &str = "delete";
const VERSION: i32 = 1;

/// The payload of a `delete` job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The caller's name for the document.
    pub document: String,
}

impl Request {
    /// Reads a payload.
    pub fn read(payload: &Value) -> Result<Self, StepError> {
        let request: Self = super::read(payload)?;
        super::check_document(&request.document)?;
        Ok(request)
    }
}

/// What a deletion carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Deletion {
    document: Uuid,
    /// The versions that readers could see; known from the tombstone on.
    #[serde(default)]
    doomed: Vec<Doomed>,
}

impl Deletion {
    fn versions(&self) -> Vec<Uuid> {
        self.doomed.iter().map(|doomed| doomed.version).collect()
    }
}

pub(super) struct Delete(Vec<Arc<dyn Step<Deletion>>>);

impl Delete {
    pub fn new(stores: Stores) -> Self {
        Self(vec![
            Arc::new(Tombstone(stores.clone())),
            Arc::new(PurgeCache(stores.clone())),
            Arc::new(PurgeVectors(stores.clone())),
            Arc::new(PurgeText(stores)),
        ])
    }
}

impl Saga for Delete {
    type Data = Deletion;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        VERSION
    }

    fn steps(&self) -> &[Arc<dyn Step<Deletion>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        0
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres, Dependency::Vectors, Dependency::Cache]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Deletion, StepError> {
        Request::read(&job.payload)?;
        let document = job
            .document_id
            .ok_or_else(|| StepError::permanent("no_document", "the job was accepted without a document"))?;
        Ok(Deletion { document, doomed: vec![] })
    }

    fn result(&self, data: &Deletion) -> Value {
        json!({ "document_id": data.document, "versions_erased": data.doomed.len() })
    }
}

struct Tombstone(Stores);

#[async_trait]
impl Step<Deletion> for Tombstone {
    fn name(&self) -> &'static str {
        "tombstone"
    }

    fn commits(&self) -> Commits {
        Commits::Begin
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Deletion) -> Result<(), StepError> {
        let order = ctx.job.doc_order.unwrap_or_default();
        let saga = NewSaga {
            id: ctx.saga_id,
            job_id: ctx.job.id,
            fence: ctx.fence(),
            kind: KIND.to_owned(),
            definition_version: VERSION,
            tenant: ctx.job.tenant.clone(),
            next_step: 1,
            data: Value::Null,
        };
        let (postgres, bound) = (&self.0.postgres, self.0.settings.sweep_bound);
        let (published, doomed) =
            ctx.call(Dependency::Postgres, |_| postgres.bury(&saga, data.document, order, bound)).await?;
        match published {
            Published::Yes => {
                data.doomed = doomed;
                self.0.cache.announce(Announcement {
                    event: "document.deleted",
                    tenant: ctx.job.tenant.clone(),
                    document: super::document_of(KIND, &ctx.job.payload).unwrap_or_default(),
                    document_id: data.document,
                    version: None,
                    order,
                });
                Ok(())
            }
            Published::Superseded => Err(StepError::Superseded),
            Published::Cancelled => Err(StepError::Cancelled),
            Published::LeaseLost => Err(StepError::LeaseLost),
        }
    }

    async fn compensate(&self, _: &StepContext, _: &Deletion) -> Result<(), StepError> {
        // The engine never undoes a pivot.
        Ok(())
    }
}

struct PurgeCache(Stores);

#[async_trait]
impl Step<Deletion> for PurgeCache {
    fn name(&self) -> &'static str {
        "purge_cache"
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Deletion) -> Result<(), StepError> {
        let versions = data.versions();
        ctx.call(Dependency::Cache, |_| self.0.cache.remove_document(data.document, &versions)).await
    }

    async fn compensate(&self, _: &StepContext, _: &Deletion) -> Result<(), StepError> {
        Ok(())
    }
}

struct PurgeVectors(Stores);

#[async_trait]
impl Step<Deletion> for PurgeVectors {
    fn name(&self) -> &'static str {
        "purge_vectors"
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Deletion) -> Result<(), StepError> {
        for doomed in &data.doomed {
            let versions = [(doomed.version, doomed.chunk_count)];
            ctx.call(Dependency::Vectors, |_| self.0.vectors.remove(&doomed.collection, &versions)).await?;
        }
        Ok(())
    }

    async fn compensate(&self, _: &StepContext, _: &Deletion) -> Result<(), StepError> {
        Ok(())
    }
}

struct PurgeText(Stores);

#[async_trait]
impl Step<Deletion> for PurgeText {
    fn name(&self) -> &'static str {
        "purge_text"
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Deletion) -> Result<(), StepError> {
        let versions = data.versions();
        let postgres = &self.0.postgres;
        let done = ctx
            .call(Dependency::Postgres, |_| postgres.erase_text(ctx.job.id, ctx.fence(), &versions))
            .await?;
        if done { Ok(()) } else { Err(StepError::LeaseLost) }
    }

    async fn compensate(&self, _: &StepContext, _: &Deletion) -> Result<(), StepError> {
        Ok(())
    }
}
