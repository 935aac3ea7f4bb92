//! One request and its answer.

use std::borrow::Cow;
use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::{Deserialize, Serialize};

use super::{HttpConfig, known_dimensions};
use crate::{EmbedError, unit};

/// Longest answer read per number: a JSON number takes up to about 25 bytes, some servers indent.
const BYTES_PER_NUMBER: usize = 64;
/// Allowed on top, for the envelope and for error pages.
const BYTES_PER_ANSWER: usize = 64 * 1024;
/// How much of a server's error text is passed on.
const REASON_CHARACTERS: usize = 300;

/// An endpoint and the client that talks to it.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    url: Url,
    model: String,
    pub(super) dimensions: usize,
    /// Ask the server for vectors of `dimensions`, because they are not the model's own.
    shorten: bool,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    input: &'a [String],
    encoding_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dimensions: Option<usize>,
}

#[derive(Deserialize)]
struct Answer {
    data: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    index: usize,
    embedding: Vec<f32>,
}

impl fmt::Display for Endpoint {
    /// Scheme, host and path: what a person needs to find the server, and no credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.url.scheme(), self.url.host_str().unwrap_or_default())?;
        if let Some(port) = self.url.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(self.url.path())
    }
}

impl Endpoint {
    pub(super) fn new(config: &HttpConfig) -> Result<Self, EmbedError> {
        let url = embeddings_url(&config.url)?;
        let known = known_dimensions(&config.model);
        let Some(dimensions) = config.dimensions.or(known).filter(|&n| n > 0) else {
            return Err(EmbedError::Config {
                setting: "FLOTILLA_OPENAI_DIMENSIONS",
                value: String::new(),
                allowed: format!(
                    "the length of the vectors of {}, which must be given for a model that is not built in",
                    config.model
                ),
            });
        };
        let client = client(config, &url)?;
        Ok(Self {
            client,
            url,
            model: config.model.clone(),
            dimensions,
            shorten: known.is_some_and(|n| n != dimensions),
        })
    }

    /// Sends `texts` as one request. `BadInput` has no index here.
    pub(super) async fn request(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let body = Request {
            model: &self.model,
            input: texts,
            encoding_format: "float",
            dimensions: self.shorten.then_some(self.dimensions),
        };
        let answer = self.client.post(self.url.clone()).json(&body).send().await;
        let answer = answer.map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        let headers = answer.headers().clone();
        let limit = texts.len() * self.dimensions * BYTES_PER_NUMBER + BYTES_PER_ANSWER;
        let bytes = self.read(answer, limit).await?;
        if status.is_success() {
            self.vectors(&bytes, texts.len())
        } else {
            Err(self.refusal(status, &headers, &bytes))
        }
    }

    async fn read(&self, mut answer: Response, limit: usize) -> Result<Vec<u8>, EmbedError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|error| self.unreachable(&error))? {
            if bytes.len() + chunk.len() > limit {
                return Err(self.unusable(format!("the answer is longer than {limit} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Checks and orders an answer of status 200.
    fn vectors(&self, bytes: &[u8], count: usize) -> Result<Vec<Vec<f32>>, EmbedError> {
        let answer: Answer = serde_json::from_slice(bytes)
            .map_err(|error| self.unusable(format!("not the expected JSON: {error}")))?;
        let mut vectors = vec![Vec::new(); count];
        let received = answer.data.len();
        for item in answer.data {
            if item.embedding.len() != self.dimensions {
                return Err(EmbedError::WrongDimension {
                    provider: self.to_string(),
                    expected: self.dimensions,
                    got: item.embedding.len(),
                });
            }
            let Some(place) = vectors.get_mut(item.index).filter(|place| place.is_empty()) else {
                return Err(self.unusable(format!(
                    "index {} among {count} texts is out of range or repeated",
                    item.index
                )));
            };
            *place = item.embedding;
            if !unit::normalise(place) {
                return Err(self.unusable(format!("vector {} is zero or not finite", item.index)));
            }
        }
        if received != count {
            return Err(self.unusable(format!("{received} vectors for {count} texts")));
        }
        Ok(vectors)
    }

    /// What an answer of another status means.
    fn refusal(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> EmbedError {
        let said = Said::parse(body);
        let reason = format!("HTTP {status}: {}", said.text);
        let provider = self.to_string();
        if said.code.as_deref() == Some("model_not_found") {
            return EmbedError::ModelInvalid { model: self.model.clone(), reason };
        }
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => EmbedError::Auth { provider, reason },
            // No such path, or no such model: OpenAI, Ollama and vLLM answer 404 for both.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::GONE => {
                EmbedError::ModelInvalid {
                    model: self.model.clone(),
                    reason: format!("{reason} (from {provider})"),
                }
            }
            StatusCode::TOO_MANY_REQUESTS => {
                EmbedError::RateLimited { provider, retry_after: retry_after(headers), reason }
            }
            // TEI answers 424 when the inference itself failed; the other two mean "ask again".
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::FAILED_DEPENDENCY => {
                EmbedError::Unavailable { provider, reason }
            }
            status if status.is_client_error() => EmbedError::BadInput { index: None, reason },
            status if status.is_server_error() => EmbedError::Unavailable { provider, reason },
            _ => self.unusable(reason),
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> EmbedError {
        // reqwest's own text repeats the URL; the cause is at the end of the chain.
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let what = if error.is_timeout() {
            "no answer in time"
        } else if error.is_connect() {
            "can't connect"
        } else {
            "the connection broke"
        };
        EmbedError::Unavailable { provider: self.to_string(), reason: format!("{what}: {cause}") }
    }

    fn unusable(&self, reason: String) -> EmbedError {
        EmbedError::InvalidResponse { provider: self.to_string(), reason }
    }
}

/// What an error answer says: `{"error": {"message", "code"}}` (OpenAI, vLLM), `{"error": "…"}`
/// (TEI, Ollama), or any other text.
struct Said {
    text: String,
    code: Option<String>,
}

impl Said {
    fn parse(body: &[u8]) -> Self {
        let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let error = json.as_ref().and_then(|json| json.get("error")).or(json.as_ref());
        let field = |name| error.and_then(|error| error.get(name)).and_then(|value| value.as_str());
        let text = field("message").or(error.and_then(|error| error.as_str()));
        let text = text.map_or_else(|| String::from_utf8_lossy(body), Cow::from);
        let text = if text.trim().is_empty() { "no explanation" } else { text.trim() };
        Self { text: text.chars().take(REASON_CHARACTERS).collect(), code: field("code").map(str::to_owned) }
    }
}

/// `Retry-After` in seconds. The header's other form, a date, is not used: the clocks of two machines
/// are never compared.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Accepts `…`, `…/v1` and `…/v1/embeddings`.
fn embeddings_url(text: &str) -> Result<Url, EmbedError> {
    let wrong = |why: &str| EmbedError::Config {
        setting: "FLOTILLA_OPENAI_URL",
        // No user:password@ of a URL may reach a log.
        value: text.rsplit('@').next().unwrap_or(text).to_owned(),
        allowed: format!("an http or https URL such as http://127.0.0.1:8080/v1 ({why})"),
    };
    let mut url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong("the scheme or the host is missing"));
    }
    let path = url.path().trim_end_matches('/');
    let path = match path {
        _ if path.ends_with("/embeddings") => path.to_owned(),
        _ if path.ends_with("/v1") => format!("{path}/embeddings"),
        _ => format!("{path}/v1/embeddings"),
    };
    url.set_path(&path);
    Ok(url)
}

fn client(config: &HttpConfig, url: &Url) -> Result<Client, EmbedError> {
    let mut headers = HeaderMap::new();
    if let Some(key) = &config.api_key {
        let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| EmbedError::Config {
            setting: "FLOTILLA_OPENAI_API_KEY",
            value: "hidden".to_owned(),
            allowed: "visible ASCII characters".to_owned(),
        })?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    // reqwest is built without a cryptography provider of its own. One that the process has chosen is
    // kept; where there is none, ring's becomes the process' default.
    if rustls::crypto::CryptoProvider::get_default().is_none()
        && rustls::crypto::ring::default_provider().install_default().is_err()
    {
        tracing::debug!("another thread installed the TLS provider first");
    }
    let mut builder = Client::builder()
        .default_headers(headers)
        .timeout(config.timeout)
        .connect_timeout(config.connect_timeout)
        // A redirected POST would lose its body, and could carry the texts elsewhere.
        .redirect(redirect::Policy::none());
    if url.scheme() == "http" {
        // No certificate is ever looked at, so none need be installed on this machine.
        builder = builder.tls_certs_only([]);
    }
    builder.build().map_err(|error| {
        let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        EmbedError::Config {
            setting: "FLOTILLA_OPENAI_URL",
            value: url.host_str().unwrap_or_default().to_owned(),
            allowed: format!("an endpoint for which TLS can be set up on this machine ({cause})"),
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{Said, embeddings_url};

    #[test]
    fn every_usual_form_of_the_base_url_leads_to_the_endpoint() {
        for text in
            ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/embeddings"]
        {
            assert_eq!(embeddings_url(text).unwrap().as_str(), "http://h:1/v1/embeddings", "{text}");
        }
        assert_eq!(embeddings_url("https://h/proxy").unwrap().as_str(), "https://h/proxy/v1/embeddings");
        for text in ["", "localhost:8080", "ftp://h/", "redis://user:secret@h"] {
            let error = embeddings_url(text).unwrap_err().to_string();
            assert!(error.starts_with("FLOTILLA_OPENAI_URL is"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_servers_words_are_found_in_each_dialect() {
        let openai = br#"{"error": {"message": "too long", "type": "t", "code": "context_length"}}"#;
        assert_eq!(Said::parse(openai).text, "too long");
        assert_eq!(Said::parse(openai).code.as_deref(), Some("context_length"));
        assert_eq!(Said::parse(br#"{"error": "no model", "error_type": "x"}"#).text, "no model");
        assert_eq!(Said::parse(b"<html>bad gateway</html>").text, "<html>bad gateway</html>");
        assert_eq!(Said::parse(b" ").text, "no explanation");
    }
}
