//! Any OpenAI-compatible `POST /v1/embeddings`: OpenAI, Text Embeddings Inference, Ollama, vLLM.
//!
//! The request and the answer are as in OpenAI's API reference (*Create embeddings*). This provider
//! does not retry: the caller has the retry policy and the circuit breaker, and gets from here an
//! error that says which of them applies.

mod exchange;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, stream};

use crate::{EmbedError, Embedder};
use exchange::Endpoint;

/// Where the endpoint is and how to talk to it.
#[derive(Clone)]
pub struct HttpConfig {
    /// Base URL, with or without `/v1` or `/v1/embeddings` at its end.
    pub url: String,
    /// Sent as `Authorization: Bearer …`; local servers often need none.
    pub api_key: Option<String>,
    /// The model's name as the server knows it.
    pub model: String,
    /// Length of the vectors. `None`: the published number, for the models in [`known_dimensions`].
    /// A number other than the published one is asked of the server (the `dimensions` parameter,
    /// which OpenAI's `text-embedding-3` models take).
    pub dimensions: Option<usize>,
    /// Most texts in one request. The default of 32 is TEI's `--max-client-batch-size`; OpenAI takes
    /// 2,048.
    pub batch_size: usize,
    /// Most requests of one `embed` call that are under way at once.
    pub concurrency: usize,
    /// Time limit of one request, from connecting to the last byte of the answer.
    pub timeout: Duration,
    /// Time limit of connecting, and of [`probe`](Embedder::probe) as a whole.
    pub connect_timeout: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            url: "https://api.openai.com/v1".to_owned(),
            api_key: None,
            model: "text-embedding-3-small".to_owned(),
            dimensions: None,
            batch_size: 32,
            concurrency: 4,
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl fmt::Debug for HttpConfig {
    /// Everything but the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpConfig")
            .field("url", &self.url)
            .field("api_key", &self.api_key.as_ref().map(|_| "hidden"))
            .field("model", &self.model)
            .field("dimensions", &self.dimensions)
            .field("batch_size", &self.batch_size)
            .field("concurrency", &self.concurrency)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish()
    }
}

/// The length of a model's vectors as its publisher states it, or `None` for a model not in this list.
/// A path (`BAAI/bge-m3`) or a tag (`bge-m3:latest`) around the name makes no difference.
pub fn known_dimensions(model: &str) -> Option<usize> {
    let name = model.rsplit('/').next().unwrap_or(model);
    match name.split(':').next().unwrap_or(name) {
        "text-embedding-3-small" | "text-embedding-ada-002" => Some(1536),
        "text-embedding-3-large" => Some(3072),
        "all-minilm" | "all-MiniLM-L6-v2" | "bge-small-en-v1.5" | "multilingual-e5-small" => Some(384),
        "nomic-embed-text" | "nomic-embed-text-v1.5" | "bge-base-en-v1.5" | "embeddinggemma" => Some(768),
        "mxbai-embed-large" | "mxbai-embed-large-v1" | "bge-m3" | "bge-large-en-v1.5" => Some(1024),
        _ => None,
    }
}

/// The remote provider. Owns a connection pool, which closes when the last clone of it is dropped;
/// nothing runs in the background.
#[derive(Debug)]
pub struct HttpEmbedder {
    endpoint: Endpoint,
    name: String,
    batch_size: usize,
    concurrency: usize,
    connect_timeout: Duration,
}

impl HttpEmbedder {
    /// Checks the settings; contacts nothing.
    pub fn new(config: HttpConfig) -> Result<Self, EmbedError> {
        for (setting, value) in
            [("HttpConfig::batch_size", config.batch_size), ("HttpConfig::concurrency", config.concurrency)]
        {
            if value == 0 {
                return Err(EmbedError::Config {
                    setting,
                    value: "0".to_owned(),
                    allowed: "1 or more".to_owned(),
                });
            }
        }
        Ok(Self {
            name: format!("openai:{}", config.model),
            batch_size: config.batch_size,
            concurrency: config.concurrency,
            connect_timeout: config.connect_timeout,
            endpoint: Endpoint::new(&config)?,
        })
    }

    /// Embeds one request's worth of texts, the first of which is number `first` of the call.
    ///
    /// An endpoint refuses a request as a whole, without saying for which text. Halving the request
    /// finds the guilty one in about 2·log₂(n) more requests, and also gets a request through that was
    /// refused only for its size.
    async fn embed_request(&self, first: usize, texts: &[String]) -> Result<Vec<Vec<f32>>, EmbedError> {
        match self.endpoint.request(texts).await {
            Err(EmbedError::BadInput { .. }) if texts.len() > 1 => {
                let (left, right) = texts.split_at(texts.len() / 2);
                // Boxed, because an async fn that calls itself has no finite size.
                let mut vectors = Box::pin(self.embed_request(first, left)).await?;
                vectors.extend(Box::pin(self.embed_request(first + left.len(), right)).await?);
                Ok(vectors)
            }
            Err(EmbedError::BadInput { reason, .. }) => {
                Err(EmbedError::BadInput { index: Some(first), reason })
            }
            other => other,
        }
    }
}

#[async_trait]
impl Embedder for HttpEmbedder {
    fn model(&self) -> &str {
        &self.name
    }

    fn dimensions(&self) -> usize {
        self.endpoint.dimensions
    }

    /// Sends `texts` in requests of at most `batch_size`, a few at once. The first request that fails
    /// decides; the others are dropped.
    async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, EmbedError> {
        let requests: Vec<_> = texts
            .chunks(self.batch_size)
            .enumerate()
            .map(|(n, batch)| self.embed_request(n * self.batch_size, batch))
            .collect();
        let answers: Vec<Vec<Vec<f32>>> =
            stream::iter(requests).buffered(self.concurrency).try_collect().await?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// Embeds one word. Servers differ in their health pages, but each has this, and only this shows
    /// that the key and the model are accepted too.
    async fn probe(&self) -> Result<(), EmbedError> {
        let word = ["probe".to_owned()];
        match tokio::time::timeout(self.connect_timeout, self.endpoint.request(&word)).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(EmbedError::Unavailable {
                provider: self.endpoint.to_string(),
                reason: format!("no answer to a probe within {:?}", self.connect_timeout),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::known_dimensions;

    #[test]
    fn paths_and_tags_do_not_hide_a_known_model() {
        assert_eq!(known_dimensions("BAAI/bge-m3"), Some(1024));
        assert_eq!(known_dimensions("nomic-embed-text:latest"), Some(768));
        assert_eq!(known_dimensions("house-model"), None);
    }
}
