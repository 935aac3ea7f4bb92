//! `embed`: chosen documents get new vectors. The job itself only enqueues one `embed_document` job for each document; that
//! one copies the current version's content into a new version with vectors of the wanted model, by the steps of ingest.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use queue::{Priority, QueueName, TenantId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Stores,
    version::{Draft, PIVOT, Steps, hex},
};
use crate::{
    engine::{Commits, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::postgres::{
        accept::{Accepted, Idempotency, NewJob, Until},
        take::TakenJob,
    },
};

/// The kind that selects documents.
pub const KIND: &str = "embed";
/// The kind that re-embeds one document.
pub const DOCUMENT_KIND: &str = "embed_document";
const VERSION: i32 = 1;
/// Documents enqueued in one transaction.
const PAGE: i64 = 500;

/// The payload of an `embed` job: exactly one of `documents`, `all` and `every_tenant`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// These documents, by the caller's names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Vec<String>>,
    /// All documents of the job's tenant.
    #[serde(default)]
    pub all: bool,
    /// All documents of all tenants; for operators, the HTTP API refuses it.
    #[serde(default)]
    pub every_tenant: bool,
    /// Embedding model; the workers' default one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Qdrant collection; the model's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
}

impl Request {
    /// Reads a payload and checks what needs no work.
    pub fn read(payload: &Value) -> Result<Self, StepError> {
        let request: Self = super::read(payload)?;
        let given = [request.documents.is_some(), request.all, request.every_tenant];
        if given.iter().filter(|given| **given).count() != 1 {
            return Err(StepError::permanent(
                "bad_payload",
                "payload: give exactly one of documents (a list), all (true) and every_tenant (true)",
            ));
        }
        for document in request.documents.iter().flatten() {
            super::check_document(document)?;
        }
        super::check_collection(request.collection.as_deref())?;
        Ok(request)
    }
}

/// Whether a job's payload asks for the documents of all tenants, which is for operators; or may be read so.
pub fn is_for_every_tenant(kind: &str, payload: &Value) -> bool {
    kind == KIND && payload.get("every_tenant").is_some_and(|value| *value != Value::Bool(false))
}

/// The payload of an `embed_document` job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct DocumentRequest {
    document: String,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    collection: Option<String>,
}

/// What an `embed` job has done so far.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Selection {
    request: Request,
    enqueued: u64,
    /// The last document that has its job, of those that are listed: a further delivery goes on behind it.
    #[serde(default)]
    after: Uuid,
}

pub(super) struct Embed(Vec<Arc<dyn Step<Selection>>>);

impl Embed {
    pub fn new(stores: Stores) -> Self {
        Self(vec![Arc::new(FanOut(stores))])
    }
}

impl Saga for Embed {
    type Data = Selection;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        VERSION
    }

    fn steps(&self) -> &[Arc<dyn Step<Selection>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        0
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Selection, StepError> {
        Ok(Selection { request: Request::read(&job.payload)?, enqueued: 0, after: Uuid::nil() })
    }

    fn repeatable(&self) -> bool {
        true
    }

    fn result(&self, data: &Selection) -> Value {
        json!({ "enqueued": data.enqueued })
    }
}

/// Enqueues a job for each chosen document. Each has an idempotency key made of this job and the document, so that a second
/// delivery enqueues none twice; nothing has to be undone.
struct FanOut(Stores);

#[async_trait]
impl Step<Selection> for FanOut {
    fn name(&self) -> &'static str {
        "fan_out"
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(3600)
    }

    async fn execute(&self, ctx: &StepContext, data: &mut Selection) -> Result<(), StepError> {
        if let Some(documents) = &data.request.documents {
            data.enqueued = 0;
            for page in documents.chunks(PAGE as usize) {
                let page: Vec<_> = page.iter().map(|key| (ctx.job.tenant.clone(), key.clone())).collect();
                data.enqueued += self.enqueue(ctx, &data.request, &page).await?;
            }
            return Ok(());
        }
        let tenant = (!data.request.every_tenant).then_some(ctx.job.tenant.as_str());
        loop {
            let page = ctx
                .call(Dependency::Postgres, |_| self.0.postgres.published_documents(tenant, data.after, PAGE))
                .await?;
            let Some((last, ..)) = page.last() else { return Ok(()) };
            let last = *last;
            let page: Vec<_> = page.into_iter().map(|(_, tenant, key)| (tenant, key)).collect();
            data.enqueued += self.enqueue(ctx, &data.request, &page).await?;
            data.after = last;
        }
    }

    async fn compensate(&self, _: &StepContext, _: &Selection) -> Result<(), StepError> {
        Ok(())
    }
}

impl FanOut {
    async fn enqueue(
        &self,
        ctx: &StepContext,
        request: &Request,
        documents: &[(String, String)],
    ) -> Result<u64, StepError> {
        let odd = |e: &dyn std::fmt::Display| StepError::permanent("bad_job", e.to_string());
        let queue = QueueName::new(ctx.job.queue.clone()).map_err(|e| odd(&e))?;
        let mut jobs = Vec::with_capacity(documents.len());
        for (tenant, key) in documents {
            let payload = json!(DocumentRequest {
                document: key.clone(),
                model: request.model.clone(),
                collection: request.collection.clone(),
            });
            let tenant = TenantId::new(tenant.clone()).map_err(|e| odd(&e))?;
            jobs.push(NewJob {
                priority: Priority::try_from(i64::from(ctx.job.priority)).map_err(|e| odd(&e))?,
                document: Some(key.clone()),
                parent: Some(ctx.job.id),
                max_attempts: ctx.job.max_attempts,
                idempotency: Some(Idempotency {
                    // A key of at most 256 characters, whatever the document is called.
                    key: format!("{}/{}", ctx.job.id, Uuid::new_v5(&Uuid::NAMESPACE_OID, key.as_bytes())),
                    scope: KIND.to_owned(),
                    ttl: Duration::from_secs(7 * 24 * 3600),
                    until: Until::Accepted,
                }),
                ..NewJob::new(DOCUMENT_KIND, queue.clone(), tenant, payload)
            });
        }
        let accepted = ctx.call(Dependency::Postgres, |_| self.0.postgres.accept(&jobs, false)).await?;
        Ok(accepted.iter().filter(|a| matches!(a, Accepted::New(_) | Accepted::Duplicate(_))).count() as u64)
    }
}

pub(super) struct EmbedDocument {
    stores: Stores,
    steps: Vec<Arc<dyn Step<Draft>>>,
}

impl EmbedDocument {
    pub fn new(steps: Steps) -> Self {
        let stores = steps.stores.clone();
        let [vectors, cache, publish] = steps.after_stage();
        Self { stores, steps: vec![Arc::new(StageCopy(steps)), vectors, cache, publish] }
    }
}

impl Saga for EmbedDocument {
    type Data = Draft;

    fn kind(&self) -> &'static str {
        DOCUMENT_KIND
    }

    fn version(&self) -> i32 {
        VERSION
    }

    fn steps(&self) -> &[Arc<dyn Step<Draft>>] {
        &self.steps
    }

    fn pivot(&self) -> usize {
        PIVOT
    }

    fn needs(&self) -> &[Dependency] {
        &Dependency::ALL
    }

    fn prepare(&self, job: &TakenJob) -> Result<Draft, StepError> {
        let request: DocumentRequest = super::read(&job.payload)?;
        let (Some(document_id), Some(_)) = (job.document_id, job.doc_order) else {
            return Err(StepError::permanent("no_document", "the job was accepted without a document"));
        };
        let embedder = self.stores.embedder(request.model.as_deref())?;
        // The content is not known before the stage reads it.
        Ok(Draft {
            version: Uuid::now_v7(),
            document_id,
            doc_order: 0,
            source: None,
            title: None,
            metadata: json!({}),
            content_hash: String::new(),
            model: embedder.model().to_owned(),
            dimensions: embedder.dimensions(),
            collection: request.collection.unwrap_or_else(|| self.stores.collection(embedder.model())),
            chunk_count: 0,
            vectors_hash: None,
            body: None,
            chunks: None,
            given: None,
            tried: false,
        })
    }
}

/// Copies the content that readers see now. The copy keeps that version's order number and is only published in its place.
struct StageCopy(Steps);

#[async_trait]
impl Step<Draft> for StageCopy {
    fn name(&self) -> &'static str {
        "stage"
    }

    fn commits(&self) -> Commits {
        Commits::Begin
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        let postgres = &self.0.stores.postgres;
        let Some(content) = ctx.call(Dependency::Postgres, |_| postgres.content(draft.document_id)).await?
        else {
            return Err(StepError::Superseded);
        };
        let chunks = ctx.call(Dependency::Postgres, |_| postgres.chunks(content.version.version)).await?;
        if chunks.is_empty() {
            return Err(StepError::transient(
                "content_changed",
                "the version was replaced while it was read",
            ));
        }
        draft.source = Some(content.version.version);
        draft.doc_order = content.version.doc_order;
        draft.title = content.version.title;
        draft.metadata = content.version.metadata;
        draft.content_hash = hex(&content.content_hash);
        draft.chunk_count = chunks.len();
        draft.body = Some(content.body.into());
        draft.chunks = Some(Arc::new(chunks));
        self.0.stage(ctx, draft, DOCUMENT_KIND, VERSION).await
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        self.0.unstage(ctx, draft).await
    }
}
