//! A sentence encoder in this process: all-MiniLM-L6-v2, or another BERT-family model from a Hugging
//! Face folder (`config.json`, `tokenizer.json`, `model.safetensors` in f32).
//!
//! | part | file |
//! |---|---|
//! | the folder and its checksums | `files` |
//! | text to ids | `tokens` |
//! | the weights, packed | `weights` |
//! | ids to vectors, on one thread | `bert` |
//! | the queue, with batching over calls | `queue` |
//! | the threads | `engine` |

mod bert;
mod engine;
mod files;
mod queue;
mod tokens;
mod weights;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::{EmbedError, Embedder};
use engine::Shared;
use queue::Queue;
use weights::Weights;

pub use files::verify;
pub use tokens::Tokens;

/// Settings of the local provider.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// The model's folder; a relative path starts at the working folder.
    pub dir: PathBuf,
    /// The name to record with each vector. `None`: the folder's own name.
    pub name: Option<String>,
    /// Engines, each with one thread. The default is one per core that this process may use.
    pub threads: usize,
    /// Longest text in tokens, with the two that mark its ends; what is over is cut off. The default of
    /// 256 is the window that all-MiniLM-L6-v2 was published with. A model's position table limits it too.
    pub max_tokens: usize,
    /// Calls of `embed` that may be queued or under way; more wait without being queued.
    pub max_calls: usize,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("models/all-MiniLM-L6-v2"),
            name: None,
            threads: std::thread::available_parallelism().map_or(1, NonZero::get),
            max_tokens: 256,
            max_calls: 256,
        }
    }
}

/// The local provider. Owns its engines' threads: dropping it lets each finish the batch in hand
/// (some 100 ms), joins them, and frees the model.
pub struct LocalEmbedder {
    name: String,
    dimensions: usize,
    admission: Semaphore,
    shared: Shared,
    engines: Vec<JoinHandle<()>>,
}

impl LocalEmbedder {
    /// Reads the model and starts the engines. Blocks for about 0.2 s; all-MiniLM-L6-v2 then takes
    /// about 90 MB.
    ///
    /// Fails with [`EmbedError::ModelMissing`] or [`EmbedError::ModelInvalid`]. It does not compare
    /// checksums: see [`verify`].
    pub fn open(config: &LocalConfig) -> Result<Self, EmbedError> {
        for (setting, value, least) in [
            ("FLOTILLA_EMBEDDER_THREADS", config.threads, 1),
            ("LocalConfig::max_tokens", config.max_tokens, 3),
            ("LocalConfig::max_calls", config.max_calls, 1),
        ] {
            if value < least {
                let (value, allowed) = (value.to_string(), format!("{least} or more"));
                return Err(EmbedError::Config { setting, value, allowed });
            }
        }
        let dir = &config.dir;
        files::check_present(dir)?;
        let weights = Weights::open(dir)?;
        let tokens = Tokens::open(dir)?;
        // The forward pass looks ids up without a further check.
        if tokens.id_limit() > weights.vocabulary {
            let (ids, rows) = (tokens.id_limit(), weights.vocabulary);
            return Err(files::invalid(
                dir,
                format!("the tokenizer has {ids} ids, the weights only {rows} rows"),
            ));
        }
        let mut local = Self {
            name: config.name.clone().unwrap_or_else(|| folder_name(dir)),
            dimensions: weights.hidden,
            admission: Semaphore::new(config.max_calls.min(Semaphore::MAX_PERMITS)),
            shared: Shared {
                queue: Arc::new(Queue::new(config.threads)),
                max_tokens: config.max_tokens.min(weights.max_positions),
                weights: Arc::new(weights),
                tokens: Arc::new(tokens),
            },
            engines: Vec::with_capacity(config.threads),
        };
        for n in 0..config.threads {
            // On an error the drop of `local` ends the threads that did start.
            let engine = engine::start(n, local.shared.clone())
                .map_err(|error| EmbedError::Engine { reason: format!("can't start thread {n}: {error}") })?;
            local.engines.push(engine);
        }
        Ok(local)
    }

    /// How many tokens `text` has, without the two that mark its ends and without any limit.
    ///
    /// Runs on the calling thread: about 0.1 ms for a text of 128 tokens.
    pub fn count_tokens(&self, text: &str) -> Result<usize, EmbedError> {
        self.shared.tokens.count(text)
    }

    fn stopped() -> EmbedError {
        EmbedError::Engine { reason: "the engines have stopped".to_owned() }
    }
}

#[async_trait]
impl Embedder for LocalEmbedder {
    fn model(&self) -> &str {
        &self.name
    }

    fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Shares batches with other calls under way. Dropping the future takes its texts out of the queue.
    async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, EmbedError> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let _admitted = self.admission.acquire().await.map_err(|_| Self::stopped())?;
        self.shared.queue.submit(texts).await.unwrap_or_else(|_| Err(Self::stopped()))
    }

    /// The engines serve as long as their threads live.
    async fn probe(&self) -> Result<(), EmbedError> {
        if self.engines.iter().any(JoinHandle::is_finished) { Err(Self::stopped()) } else { Ok(()) }
    }
}

impl Drop for LocalEmbedder {
    fn drop(&mut self) {
        self.shared.queue.close();
        for engine in self.engines.drain(..) {
            if engine.join().is_err() {
                tracing::error!("an embedding engine's thread had panicked");
            }
        }
    }
}

fn folder_name(dir: &Path) -> String {
    // Through the file system, because "." and "models/.." have no name of their own.
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    dir.file_name().map_or_else(|| "local".to_owned(), |name| name.to_string_lossy().into_owned())
}
