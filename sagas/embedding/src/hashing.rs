//! Deterministic feature hashing: no model, no files, no network.
//!
//! For tests and orchestration benchmarks, where the vectors must be cheap and repeatable and texts
//! that share words must be near each other. It knows nothing of meaning, so it is no substitute for
//! a model and is never chosen silently.
//!
//! The method is the signed hashing trick (Weinberger, Dasgupta, Langford, Smola, Attenberg: *Feature
//! Hashing for Large Scale Multitask Learning*, ICML 2009): each feature adds its weight, with a sign
//! that a hash chooses, to one of the dimensions. Features are words, pairs of neighbouring words, and
//! the character trigrams of each word between `<` and `>` (as fastText marks word ends), so that
//! inflected and misspelt words still meet.

use async_trait::async_trait;

use crate::{EmbedError, Embedder, unit};

/// Length of the vectors: the same as all-MiniLM-L6-v2's, so that one collection layout serves both.
pub const DIMENSIONS: usize = 384;

/// Recorded with each vector. Any change to what is computed below must change this name.
pub const MODEL: &str = "feature-hash-384";

const WORD_WEIGHT: i64 = 4;
const PAIR_WEIGHT: i64 = 2;
const TRIGRAM_WEIGHT: i64 = 1;

/// After this many bytes of text the task lets others run: about a millisecond of work.
const BYTES_BETWEEN_YIELDS: usize = 32 * 1024;

/// The feature-hashing provider. Holds nothing; clones and instances are all alike.
#[derive(Debug, Clone, Copy, Default)]
pub struct HashingEmbedder;

impl HashingEmbedder {
    pub fn new() -> Self {
        Self
    }
}

#[async_trait]
impl Embedder for HashingEmbedder {
    fn model(&self) -> &str {
        MODEL
    }

    fn dimensions(&self) -> usize {
        DIMENSIONS
    }

    /// Never fails.
    async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, EmbedError> {
        let mut vectors = Vec::with_capacity(texts.len());
        let mut unyielded = 0;
        for text in &texts {
            vectors.push(vector(text));
            unyielded += text.len();
            if unyielded >= BYTES_BETWEEN_YIELDS {
                unyielded = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(vectors)
    }

    async fn probe(&self) -> Result<(), EmbedError> {
        Ok(())
    }
}

/// The vector of one text: [`DIMENSIONS`] numbers of unit length, the same on every platform.
///
/// Words are runs of alphanumeric characters in lower case, as Unicode has them; a later Unicode
/// version can change only texts with characters that were unassigned before. A text without any
/// word has a direction of its own, chosen by its bytes.
pub fn vector(text: &str) -> Vec<f32> {
    // Integers: sums do not depend on order or on the platform's floating point.
    let mut sums = [0_i64; DIMENSIONS];
    let lower = text.to_lowercase();
    let mut previous: Option<&str> = None;
    for word in lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        add(&mut sums, hash(b"w", &[word.as_bytes()]), WORD_WEIGHT);
        if let Some(previous) = previous {
            add(&mut sums, hash(b"p", &[previous.as_bytes(), word.as_bytes()]), PAIR_WEIGHT);
        }
        let mut window = ['\0', '\0', '<'];
        for c in word.chars().chain(['>']) {
            window = [window[1], window[2], c];
            if window[0] != '\0' {
                let mut bytes = [0; 12];
                let mut length = 0;
                for c in window {
                    length += c.encode_utf8(&mut bytes[length..]).len();
                }
                add(&mut sums, hash(b"t", &[&bytes[..length]]), TRIGRAM_WEIGHT);
            }
        }
        previous = Some(word);
    }

    let mut vector: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
    if !unit::normalise(&mut vector) {
        // No word, or features that cancelled out to nothing.
        vector.fill(0.0);
        let (dimension, sign) = place(hash(b"0", &[text.as_bytes()]));
        vector[dimension] = sign as f32;
    }
    vector
}

fn add(sums: &mut [i64; DIMENSIONS], hash: u64, weight: i64) {
    let (dimension, sign) = place(hash);
    sums[dimension] += sign * weight;
}

/// The dimension from the upper half of the hash (multiply and shift, so no modulo bias worth
/// mentioning), the sign from its lowest bit.
fn place(hash: u64) -> (usize, i64) {
    let dimension = ((hash >> 32) * DIMENSIONS as u64) >> 32;
    (dimension as usize, if hash & 1 == 0 { 1 } else { -1 })
}

/// 64-bit FNV-1a over the kind and the parts, each ended by 0xFF (no byte of UTF-8), then MurmurHash3's
/// finaliser, because FNV's own upper bits depend too little on the last bytes.
fn hash(kind: &[u8], parts: &[&[u8]]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = OFFSET;
    let mut eat = |bytes: &[u8]| {
        for &byte in bytes.iter().chain(&[0xFF]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(PRIME);
        }
    };
    eat(kind);
    for part in parts {
        eat(part);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}
