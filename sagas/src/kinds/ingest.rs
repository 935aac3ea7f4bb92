//! `ingest`: a text becomes the document's new version in all three stores.
//!
//! stage (Postgres) → vectors (embed, Qdrant) → cache (Redis) → publish (Postgres, the pivot) → retire (the janitor).

use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    Stores,
    version::{Draft, PIVOT, Steps, check_dimensions, hex},
};
use crate::{
    chunking,
    engine::{Commits, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::postgres::take::TakenJob,
};

/// The job kind.
pub const KIND: &str = "ingest";
const VERSION: i32 = 1;

/// The payload of an `ingest` job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The caller's name for the document, 1 to 512 characters, unique within the tenant.
    pub document: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The text. Exactly one of `text`, `text_base64` and `chunks` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The text's bytes, for sources whose encoding is not known to be UTF-8; they must be UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_base64: Option<String>,
    /// The caller's own chunks; the document's text is them, joined by blank lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Vec<GivenChunk>>,
    /// A JSON object that is returned with the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Map<String, Value>>,
    /// Embedding model; the workers' default one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Qdrant collection; the model's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<String>,
}

/// A chunk that the caller made, with its vector if the caller embedded it too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivenChunk {
    /// The chunk's text.
    pub text: String,
    /// Its vector, of the collection's length; normalised when stored. All chunks have one or none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector: Option<Vec<f32>>,
}

impl Request {
    /// Reads a payload and checks what needs no work.
    pub fn read(payload: &Value) -> Result<Self, StepError> {
        let request: Self = super::read(payload)?;
        super::check_document(&request.document)?;
        super::check_collection(request.collection.as_deref())?;
        let given = [request.text.is_some(), request.text_base64.is_some(), request.chunks.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            return Err(StepError::permanent(
                "bad_payload",
                "payload: give exactly one of text, text_base64 and chunks",
            ));
        }
        if request.text.as_deref() == Some("") || request.chunks.as_ref().is_some_and(Vec::is_empty) {
            return Err(StepError::permanent("empty_document", "payload: the document has no text"));
        }
        Ok(request)
    }
}

pub(super) struct Ingest {
    stores: Stores,
    steps: Vec<Arc<dyn Step<Draft>>>,
}

impl Ingest {
    pub fn new(steps: Steps) -> Self {
        let stores = steps.stores.clone();
        let [vectors, cache, publish] = steps.after_stage();
        Self { stores, steps: vec![Arc::new(StageText(steps)), vectors, cache, publish] }
    }
}

impl Saga for Ingest {
    type Data = Draft;

    fn kind(&self) -> &'static str {
        KIND
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
        let request = Request::read(&job.payload)?;
        let (Some(document_id), Some(doc_order)) = (job.document_id, job.doc_order) else {
            return Err(StepError::permanent("no_document", "the job was accepted without a document"));
        };
        let embedder = self.stores.embedder(request.model.as_deref())?;
        let (body, chunks, given) = content(&request, &self.stores)?;
        if let Some(vectors) = &given {
            check_dimensions(vectors, embedder.dimensions())?;
        }
        Ok(Draft {
            version: Uuid::now_v7(),
            document_id,
            doc_order,
            source: None,
            title: request.title,
            metadata: Value::Object(request.metadata.unwrap_or_default()),
            content_hash: hex(&Sha256::digest(body.as_bytes())),
            model: embedder.model().to_owned(),
            dimensions: embedder.dimensions(),
            collection: request.collection.unwrap_or_else(|| self.stores.collection(embedder.model())),
            chunk_count: chunks.len(),
            vectors_hash: None,
            body: Some(body.into()),
            chunks: Some(Arc::new(chunks)),
            given: given.map(Arc::new),
            tried: false,
        })
    }
}

type Content = (String, Vec<String>, Option<Vec<Vec<f32>>>);

/// The document's text, its chunks, and the caller's vectors.
fn content(request: &Request, stores: &Stores) -> Result<Content, StepError> {
    let limits = stores.settings.chunking;
    let (body, chunks, vectors) = if let Some(given) = &request.chunks {
        let texts: Vec<String> = given.iter().map(|chunk| chunk.text.clone()).collect();
        if let Some(no) = texts.iter().position(|text| text.trim().is_empty()) {
            return Err(StepError::permanent("empty_document", format!("chunk {no} has no text")));
        }
        (texts.join("\n\n"), texts, given_vectors(given)?)
    } else {
        let body = match (&request.text, &request.text_base64) {
            (Some(text), _) => text.clone(),
            (None, encoded) => decode(encoded.as_deref().unwrap_or_default())?,
        };
        let chunks = chunking::split(&body, limits);
        (body, chunks, None)
    };
    if chunks.is_empty() {
        return Err(StepError::permanent(
            "empty_document",
            "the document has no text: nothing but white space",
        ));
    }
    if chunks.len() > limits.max_chunks {
        return Err(StepError::permanent(
            "too_many_chunks",
            format!(
                "the document has {} chunks; at most {} are allowed: split it",
                chunks.len(),
                limits.max_chunks
            ),
        ));
    }
    if body.contains('\0') {
        return Err(StepError::permanent(
            "nul_character",
            "the text holds a NUL character, which Postgres can't store",
        ));
    }
    Ok((body, chunks, vectors))
}

fn decode(encoded: &str) -> Result<String, StepError> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(encoded)
        .map_err(|e| StepError::permanent("bad_payload", format!("payload.text_base64: {e}")))?;
    String::from_utf8(bytes)
        .map_err(|e| StepError::permanent("not_utf8", format!("the text is not UTF-8: {}", e.utf8_error())))
}

/// The vectors that a request brings along.
pub(super) fn vectors_in(payload: &Value) -> Result<Option<Vec<Vec<f32>>>, StepError> {
    Request::read(payload)?.chunks.as_deref().map_or(Ok(None), given_vectors)
}

fn given_vectors(given: &[GivenChunk]) -> Result<Option<Vec<Vec<f32>>>, StepError> {
    let vectors: Vec<Vec<f32>> = given.iter().filter_map(|chunk| chunk.vector.clone()).collect();
    if vectors.is_empty() {
        return Ok(None);
    }
    if vectors.len() != given.len() {
        return Err(StepError::permanent("bad_payload", "payload.chunks: give all chunks a vector, or none"));
    }
    vectors
        .into_iter()
        .enumerate()
        .map(|(no, vector)| {
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            if !norm.is_finite() || norm == 0.0 {
                return Err(StepError::permanent(
                    "bad_vector",
                    format!("the vector of chunk {no} must be finite and not all zeros"),
                ));
            }
            Ok(vector.into_iter().map(|x| x / norm).collect())
        })
        .collect::<Result<_, _>>()
        .map(Some)
}

struct StageText(Steps);

#[async_trait]
impl Step<Draft> for StageText {
    fn name(&self) -> &'static str {
        "stage"
    }

    fn commits(&self) -> Commits {
        Commits::Begin
    }

    async fn execute(&self, ctx: &StepContext, draft: &mut Draft) -> Result<(), StepError> {
        self.0.stage(ctx, draft, KIND, VERSION).await
    }

    async fn compensate(&self, ctx: &StepContext, draft: &Draft) -> Result<(), StepError> {
        self.0.unstage(ctx, draft).await
    }
}
