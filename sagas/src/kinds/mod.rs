//! The sagas that Flotilla brings, one file each, and what they share: the stores and their settings.

pub mod delete;
pub mod embed;
pub mod embed_version;
pub mod ingest;
#[cfg(feature = "faults")]
pub mod probe;
mod version;

use std::{collections::HashMap, sync::Arc, time::Duration};

use embedding::Embedder;
use futures::FutureExt;
use serde_json::Value;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    chunking::Chunking,
    coalescing::{Coalescer, Limits},
    engine::{Breakers, Registry, breaker::Probe},
    error::{Dependency, StepError, StoreError},
    stores::{
        cache::Cache,
        postgres::{
            Postgres,
            publish::PublishBatch,
            stage::{AbandonBatch, StageBatch},
        },
        vectors::Vectors,
    },
};

/// Settings of the document sagas.
#[derive(Debug, Clone)]
pub struct DocumentSettings {
    /// How texts are split.
    pub chunking: Chunking,
    /// How long a replaced version stays for readers under way: longer than any read (PROTOCOL.md 10).
    pub grace: Duration,
    /// Within this time after a version's end, everything that a late writer still put into a store is removed
    /// (PROTOCOL.md 9).
    pub sweep_bound: Duration,
    /// Collection of documents that name none; `None`: `flotilla-` and the model's name.
    pub collection: Option<String>,
    /// Whether `ingest` jobs leave their embedding to workers that serve the queue `embed`. All workers of a fleet say the
    /// same; those of `embed` first.
    pub hand_embedding_over: bool,
}

impl Default for DocumentSettings {
    fn default() -> Self {
        Self {
            chunking: Chunking::default(),
            grace: Duration::from_secs(60),
            sweep_bound: Duration::from_secs(600),
            collection: None,
            hand_embedding_over: false,
        }
    }
}

/// The three stores and the embedding providers; clones share them.
#[derive(Clone)]
pub struct Stores {
    /// Ledger, log and documents.
    pub postgres: Postgres,
    /// Points.
    pub vectors: Vectors,
    /// Bodies.
    pub cache: Cache,
    /// The provider for jobs that name no model.
    pub embedder: Arc<dyn Embedder>,
    /// Providers by model name, the default one included.
    pub embedders: Arc<HashMap<String, Arc<dyn Embedder>>>,
    /// Settings.
    pub settings: Arc<DocumentSettings>,
    /// The ledger's id, once it was asked for.
    ledger: Arc<OnceCell<Uuid>>,
}

impl Stores {
    /// The stores with one provider, or several of which the first is the default.
    pub fn new(
        postgres: Postgres,
        vectors: Vectors,
        cache: Cache,
        embedder: Arc<dyn Embedder>,
        others: Vec<Arc<dyn Embedder>>,
        settings: DocumentSettings,
    ) -> Self {
        let embedders = others
            .into_iter()
            .chain([Arc::clone(&embedder)])
            .map(|e| (e.model().to_owned(), e))
            .collect::<HashMap<_, _>>();
        Self {
            postgres,
            vectors,
            cache,
            embedder,
            embedders: Arc::new(embedders),
            settings: Arc::new(settings),
            ledger: Arc::default(),
        }
    }

    /// The id of the ledger, which each point carries. Postgres is asked once.
    pub async fn ledger(&self) -> Result<Uuid, StoreError> {
        self.ledger.get_or_try_init(|| self.postgres.ledger_id()).await.copied()
    }

    /// The provider of a model, or the default one.
    pub fn embedder(&self, model: Option<&str>) -> Result<Arc<dyn Embedder>, StepError> {
        let Some(model) = model else { return Ok(Arc::clone(&self.embedder)) };
        self.embedders.get(model).cloned().ok_or_else(|| {
            let mut known: Vec<&str> = self.embedders.keys().map(String::as_str).collect();
            known.sort_unstable();
            StepError::permanent(
                "unknown_model",
                format!("model {model:?} is not served here; known: {}", known.join(", ")),
            )
        })
    }

    /// The collection for a model's vectors when the request names none. The default collection belongs to the default
    /// model alone: vectors of two models can't be compared.
    pub fn collection(&self, model: &str) -> String {
        match &self.settings.collection {
            Some(collection) if model == self.embedder.model() => collection.clone(),
            _ => format!(
                "flotilla-{}",
                model.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-', "-")
            ),
        }
    }

    /// Breakers for everything that the stores reach.
    pub fn breakers(&self, shutdown: CancellationToken) -> Breakers {
        self.breakers_with(vec![], shutdown)
    }

    /// Breakers for everything that the stores reach, and for a user's own stores ([`Registry::probes`]).
    pub fn breakers_with(&self, others: Vec<(Dependency, Probe)>, shutdown: CancellationToken) -> Breakers {
        let (postgres, vectors, cache, embedder) =
            (self.postgres.clone(), self.vectors.clone(), self.cache.clone(), Arc::clone(&self.embedder));
        let probes: [(Dependency, Probe); 4] = [
            (
                Dependency::Postgres,
                Arc::new(move || {
                    let postgres = postgres.clone();
                    async move { postgres.probe().await }.boxed()
                }),
            ),
            (
                Dependency::Vectors,
                Arc::new(move || {
                    let vectors = vectors.clone();
                    async move { vectors.probe().await }.boxed()
                }),
            ),
            (
                Dependency::Cache,
                Arc::new(move || {
                    let cache = cache.clone();
                    async move { cache.probe().await }.boxed()
                }),
            ),
            (
                Dependency::Embedder,
                Arc::new(move || {
                    let embedder = Arc::clone(&embedder);
                    async move { embedder.probe().await.map_err(StoreError::from) }.boxed()
                }),
            ),
        ];
        Breakers::new(probes.into_iter().chain(others), shutdown)
    }

    /// The sagas over these stores.
    pub fn registry(&self) -> Registry {
        let stage = Coalescer::spawn(StageBatch(self.postgres.clone()), Limits::default());
        let publish = Coalescer::spawn(PublishBatch(self.postgres.clone()), Limits::default());
        let unstage = Coalescer::spawn(AbandonBatch(self.postgres.clone()), Limits::default());
        let withdrawals = self.vectors.withdrawals();
        let steps = version::Steps { stores: self.clone(), stage, unstage, withdrawals, publish };
        let registry = Registry::default()
            .with(ingest::Ingest::new(steps.clone()))
            .with(embed::EmbedDocument::new(steps))
            .with(embed::Embed::new(self.clone()))
            .with(delete::Delete::new(self.clone()));
        let registry = if self.settings.hand_embedding_over {
            registry.with(embed_version::EmbedVersion::new(self.clone()))
        } else {
            registry
        };
        #[cfg(feature = "faults")]
        let registry = registry
            .with(probe::Probe::new(&self.postgres))
            .with(probe::Probe::napping(&self.postgres))
            .with(probe::Probe::revocable(&self.postgres))
            .with(probe::Probe::gathering(&self.postgres))
            .without(crate::fault::unknown_kind());
        registry
    }
}

/// The document that a job of this kind is about, from its payload.
pub fn document_of(kind: &str, payload: &Value) -> Option<String> {
    matches!(kind, ingest::KIND | delete::KIND | embed::DOCUMENT_KIND)
        .then(|| payload.get("document")?.as_str().map(str::to_owned))
        .flatten()
}

/// The queue that a kind waits in unless the request names another.
pub fn default_queue(kind: &str) -> &str {
    if matches!(kind, embed::DOCUMENT_KIND | embed_version::KIND) { embed::KIND } else { kind }
}

/// What can be seen of a request before it is accepted; the rest is seen when the job runs.
pub fn check_payload(kind: &str, payload: &Value) -> Result<(), String> {
    if !payload.is_object() {
        return Err("payload: must be a JSON object".to_owned());
    }
    match kind {
        ingest::KIND => ingest::Request::read(payload).map(drop),
        delete::KIND => delete::Request::read(payload).map(drop),
        embed::KIND => embed::Request::read(payload).map(drop),
        _ => Ok(()),
    }
    .map_err(|e| e.to_string())
}

/// Reads a request and says what is wrong with it.
fn read<T: serde::de::DeserializeOwned>(payload: &Value) -> Result<T, StepError> {
    T::deserialize(payload).map_err(|e| StepError::permanent("bad_payload", format!("payload: {e}")))
}

/// Qdrant refuses other names, and so does this crate wherever one comes in.
fn check_collection(name: Option<&str>) -> Result<(), StepError> {
    if name.is_none_or(is_collection) {
        return Ok(());
    }
    let text = "payload.collection: 1 to 255 characters without < > : \" / \\ | ? * and control characters are allowed";
    Err(StepError::permanent("bad_payload", text))
}

/// Whether a collection may have this name.
pub(crate) fn is_collection(name: &str) -> bool {
    let bad = |c: char| c.is_control() || r#"<>:"/\|?*"#.contains(c);
    (1..=255).contains(&name.chars().count()) && !name.contains(bad) && name != "." && name != ".."
}

fn check_document(key: &str) -> Result<(), StepError> {
    if key.is_empty() || key.chars().count() > 512 {
        return Err(StepError::permanent("bad_payload", "payload.document: must have 1 to 512 characters"));
    }
    Ok(())
}
