//! What can go wrong when text is turned into vectors, and whether trying again helps.

use std::path::PathBuf;
use std::time::Duration;

/// An embedding that did not happen. Match on the variant, or on [`EmbedError::class`] to decide
/// whether to try again.
///
/// Cloneable, so that one failed batch can answer every caller whose texts were in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EmbedError {
    /// The provider could not be reached or did not serve: connection refused or reset, no answer in
    /// time, HTTP 5xx.
    #[error("the embedding provider {provider} is unavailable: {reason}")]
    Unavailable { provider: String, reason: String },

    /// The provider asks for fewer requests (HTTP 429).
    #[error("the embedding provider {provider} limits the rate of requests{}: {reason}", wait(*retry_after))]
    RateLimited {
        provider: String,
        /// How long the provider asks to wait, where it says so.
        retry_after: Option<Duration>,
        reason: String,
    },

    /// The provider refuses a text for what it is (too long, empty, not encodable).
    #[error("the embedding provider refuses {}: {reason}", which(*index))]
    BadInput {
        /// Position in the texts of the call; `None` when the provider refuses the call as a whole.
        index: Option<usize>,
        reason: String,
    },

    /// The provider answered with something that is not a list of usable vectors.
    #[error("the embedding provider {provider} gave an unusable answer: {reason}")]
    InvalidResponse { provider: String, reason: String },

    /// The vectors do not have the length that the vector collection was made for.
    #[error(
        "the embedding provider {provider} gave vectors of {got} dimensions where {expected} are configured; \
         set FLOTILLA_OPENAI_DIMENSIONS and the vector collection to the model's own number"
    )]
    WrongDimension { provider: String, expected: usize, got: usize },

    /// The model's files are not on this machine.
    #[error(
        "no embedding model in {} ({file} is absent): run `{command}`, or set FLOTILLA_MODEL_DIR to a folder \
         that holds one",
        dir.display()
    )]
    ModelMissing {
        dir: PathBuf,
        file: String,
        /// The command that fetches the default model.
        command: &'static str,
    },

    /// The model's files are damaged or of a kind that is not supported, or the server does not know
    /// the model's name.
    #[error("the embedding model {model} can't be used: {reason}")]
    ModelInvalid { model: String, reason: String },

    /// The provider refuses the API key (HTTP 401 or 403).
    #[error("the embedding provider {provider} refuses the API key; check FLOTILLA_OPENAI_API_KEY: {reason}")]
    Auth { provider: String, reason: String },

    /// A setting that can't be used.
    #[error("{setting} is {value:?}; allowed: {allowed}")]
    Config { setting: &'static str, value: String, allowed: String },

    /// A defect in the local engine; the engine itself goes on with other texts.
    #[error("the local embedding engine failed on a batch: {reason}")]
    Engine { reason: String },
}

/// Whether, and how, it is worth trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// May pass by itself, or may be the fault of these texts: retry, and count the attempt.
    Transient,
    /// No text would be embedded now, whatever it says: pause behind a circuit breaker and retry
    /// after [`Embedder::probe`](crate::Embedder::probe) succeeds; count no attempt.
    Unavailable,
    /// As `Unavailable`, with a pause that the provider chose where it is known.
    RateLimited { retry_after: Option<Duration> },
    /// The same texts will be refused again: do not retry.
    Permanent,
}

impl EmbedError {
    /// Sorts an error by what the caller should do.
    ///
    /// | class | errors |
    /// |---|---|
    /// | `Transient` | `InvalidResponse`, `Engine` |
    /// | `Unavailable` | `Unavailable`; also `Auth`, `WrongDimension`, `ModelMissing`, `ModelInvalid` |
    /// | `RateLimited` | `RateLimited` |
    /// | `Permanent` | `BadInput`, `Config` |
    ///
    /// A refused key or a changed model stops every job alike and is no fault of any of them. They
    /// wait for a person, as in an outage, instead of all becoming dead letters.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::InvalidResponse { .. } | Self::Engine { .. } => ErrorClass::Transient,
            Self::Unavailable { .. }
            | Self::Auth { .. }
            | Self::WrongDimension { .. }
            | Self::ModelMissing { .. }
            | Self::ModelInvalid { .. } => ErrorClass::Unavailable,
            Self::RateLimited { retry_after, .. } => ErrorClass::RateLimited { retry_after: *retry_after },
            Self::BadInput { .. } | Self::Config { .. } => ErrorClass::Permanent,
        }
    }
}

fn wait(retry_after: Option<Duration>) -> String {
    retry_after.map(|after| format!(" (retry after {} s)", after.as_secs_f64())).unwrap_or_default()
}

fn which(index: Option<usize>) -> String {
    index.map_or_else(|| "the texts".to_owned(), |index| format!("text {index} (counted from 0)"))
}
