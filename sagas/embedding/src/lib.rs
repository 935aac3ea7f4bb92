//! Text in, unit-length vectors out.
//!
//! [`Embedder`] is the seam; [`open`] makes one from an [`EmbedderConfig`]. Three providers stand
//! behind it, one module each:
//!
//! - [`local`]: a BERT-family sentence encoder in this process (all-MiniLM-L6-v2 by default);
//! - [`http`]: any OpenAI-compatible `/v1/embeddings` endpoint;
//! - [`hashing`]: deterministic feature hashing, for tests and orchestration benchmarks.
//!
//! Nothing falls back from one provider to another: vectors of different models can't be compared,
//! so a provider that can't be used is an error.

mod config;
mod error;
pub mod hashing;
pub mod http;
pub mod local;
mod unit;

use std::sync::Arc;

use async_trait::async_trait;

pub use config::EmbedderConfig;
pub use error::{EmbedError, ErrorClass};

/// Turns texts into vectors that can be compared by their dot product.
///
/// Every implementation keeps these promises:
///
/// - one vector per text, in the order of the texts; no texts give no vectors;
/// - each vector has [`dimensions`](Self::dimensions) finite numbers and length 1 (L2);
/// - `embed` is cancel-safe: dropping its future leaves nothing behind but, at most, the cost of
///   work already begun;
/// - `embed` never occupies a thread of the async runtime for long.
#[async_trait]
pub trait Embedder: Send + Sync {
    /// The name to record with every vector; vectors of different names must not be compared.
    /// For example `all-MiniLM-L6-v2`, `feature-hash-384`, `openai:text-embedding-3-small`.
    fn model(&self) -> &str;

    /// The length of every vector.
    fn dimensions(&self) -> usize;

    /// Embeds `texts`, all or none. Texts longer than the model's window are cut by the local
    /// provider and may be refused by a remote one.
    async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, EmbedError>;

    /// Finds out whether the provider would serve now, in at most a few seconds. This is what a
    /// circuit breaker asks before it lets jobs through again.
    async fn probe(&self) -> Result<(), EmbedError>;
}

/// Opens the provider that `config` names, and no other.
///
/// Blocks the calling thread while the local provider reads its model (about 0.2 s, 91 MB); call it
/// at start-up. A missing model is [`EmbedError::ModelMissing`], whose text names the command that
/// fetches it. A remote provider is not contacted: an outage there must not keep a worker from
/// starting.
pub fn open(config: &EmbedderConfig) -> Result<Arc<dyn Embedder>, EmbedError> {
    let embedder: Arc<dyn Embedder> = match config {
        EmbedderConfig::Local(local) => Arc::new(local::LocalEmbedder::open(local)?),
        EmbedderConfig::Hashing => Arc::new(hashing::HashingEmbedder::new()),
        EmbedderConfig::Http(http) => Arc::new(http::HttpEmbedder::new(http.clone())?),
    };
    tracing::info!(model = embedder.model(), dimensions = embedder.dimensions(), "embedder opened");
    Ok(embedder)
}
