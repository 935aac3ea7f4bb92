//! The local provider against reference vectors, and its behaviour under many calls.
//!
//! Needs the default model's files: `make model` puts them where these tests look, and
//! FLOTILLA_MODEL_DIR names another place.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use embedding::local::{LocalConfig, LocalEmbedder, Tokens, verify};
use embedding::{EmbedError, Embedder, ErrorClass};
use serde::Deserialize;

fn model_dir() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/all-MiniLM-L6-v2");
    std::env::var_os("FLOTILLA_MODEL_DIR").filter(|dir| !dir.is_empty()).map_or_else(default, PathBuf::from)
}

fn open(threads: usize) -> LocalEmbedder {
    let config = LocalConfig { dir: model_dir(), threads, ..LocalConfig::default() };
    LocalEmbedder::open(&config).unwrap_or_else(|error| panic!("{error}"))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Texts of 1 to some 200 words, all different.
fn mixed_texts(name: &str, count: usize) -> Vec<String> {
    let words = ["queue", "lease", "saga", "vector", "pivot", "ledger", "fence", "tenant"];
    (0..count)
        .map(|n| {
            let length = 1 + (n * 37) % 200;
            let body: Vec<_> = (0..length).map(|word| words[(word * 5 + n * 3) % words.len()]).collect();
            format!("{name} {n} {}", body.join(" "))
        })
        .collect()
}

#[derive(Deserialize)]
struct Reference {
    text: String,
    tokens: usize,
    vector: Vec<f32>,
}

#[tokio::test]
async fn vectors_agree_with_the_reference_implementation() {
    let references: Vec<Reference> =
        serde_json::from_str(include_str!("fixtures/all-MiniLM-L6-v2.json")).unwrap();
    let embedder = open(2);
    assert_eq!((embedder.model(), embedder.dimensions()), ("all-MiniLM-L6-v2", 384));
    let vectors = embedder.embed(references.iter().map(|r| r.text.clone()).collect()).await.unwrap();
    assert_eq!(vectors.len(), references.len());
    for (vector, reference) in vectors.iter().zip(&references) {
        let start: String = reference.text.chars().take(20).collect();
        assert!(vector.iter().all(|x| x.is_finite()), "{start:?}");
        assert!((dot(vector, vector).sqrt() - 1.0).abs() < 1e-6, "{start:?} is not of unit length");
        let cosine = dot(vector, &reference.vector);
        assert!(cosine > 0.999_99, "{start:?} of {} tokens: cosine {cosine}", reference.tokens);
        let difference = vector.iter().zip(&reference.vector).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-5, "{start:?}: a number differs by {difference}");
    }
}

#[tokio::test]
async fn a_text_gives_the_same_bits_in_any_batch_and_with_any_number_of_threads() {
    let texts = mixed_texts("bits", 40);
    let one = open(1);
    let together = one.embed(texts.clone()).await.unwrap();
    let mut alone = Vec::new();
    for text in &texts {
        alone.extend(one.embed(vec![text.clone()]).await.unwrap());
    }
    assert!(alone == together, "alone and together differ");
    assert!(open(3).embed(texts).await.unwrap() == together, "one thread and three differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_calls_each_get_their_own_vectors_in_order() {
    let embedder = Arc::new(open(2));
    let calls: Vec<_> = (0..24)
        .map(|n| {
            let texts = mixed_texts(&format!("call {n}"), 1 + n % 7);
            let shared = embedder.clone();
            (texts.clone(), tokio::spawn(async move { shared.embed(texts).await }))
        })
        .collect();
    for (texts, call) in calls {
        let vectors = call.await.unwrap().unwrap();
        for (text, vector) in texts.iter().zip(&vectors) {
            let alone = embedder.embed(vec![text.clone()]).await.unwrap();
            assert!(alone[0] == *vector, "{text:?}");
        }
        assert_eq!(vectors.len(), texts.len());
    }
    assert!(embedder.embed(Vec::new()).await.unwrap().is_empty());
    embedder.probe().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn the_runtimes_only_thread_stays_free_while_a_big_batch_is_embedded() {
    let embedder = open(2);
    // A busy machine may pause this process once for as long; a blocked thread is blocked each time.
    let mut seen = vec![];
    for _ in 0..3 {
        let (count, longest, took) = ticks_beside_a_big_batch(&embedder).await;
        // It would show one gap as long as the whole work.
        if count > 20 && longest < took / 4 {
            return;
        }
        seen.push(format!("{count} ticks, the longest gap {longest:?} in {took:?}"));
    }
    panic!("{seen:?}");
}

/// How often a timer of 5 ms ticks on this thread while texts are embedded, its longest gap, and the time for all.
async fn ticks_beside_a_big_batch(embedder: &LocalEmbedder) -> (u32, Duration, Duration) {
    let started = Instant::now();
    let work = embedder.embed(mixed_texts("big", 60));
    let seen = Cell::new((0_u32, Duration::ZERO));
    let ticks = async {
        let mut timer = tokio::time::interval(Duration::from_millis(5));
        let mut last = Instant::now();
        loop {
            timer.tick().await;
            let (count, longest) = seen.get();
            seen.set((count + 1, longest.max(last.elapsed())));
            last = Instant::now();
        }
    };
    tokio::select! {
        vectors = work => assert_eq!(vectors.unwrap().len(), 60),
        () = ticks => {}
    }
    let (count, longest) = seen.get();
    (count, longest, started.elapsed())
}

#[tokio::test]
async fn a_dropped_call_leaves_the_engines_free_for_others() {
    let embedder = open(1);
    let big = embedder.embed(mixed_texts("dropped", 2000));
    assert!(tokio::time::timeout(Duration::from_millis(50), big).await.is_err(), "2,000 texts in 50 ms?");
    // All 2,000 would take a minute or more on one thread.
    let small = tokio::time::timeout(Duration::from_secs(20), embedder.embed(vec!["kept".to_owned()]));
    assert_eq!(small.await.expect("the dropped call still keeps the engine busy").unwrap().len(), 1);
}

#[test]
fn tokens_are_counted_without_limit_and_without_special_ones() {
    let references: Vec<Reference> =
        serde_json::from_str(include_str!("fixtures/all-MiniLM-L6-v2.json")).unwrap();
    let tokens = Tokens::open(&model_dir()).unwrap_or_else(|error| panic!("{error}"));
    for reference in references.iter().filter(|reference| reference.tokens < 256) {
        assert_eq!(tokens.count(&reference.text).unwrap() + 2, reference.tokens, "{:?}", reference.text);
    }
    assert_eq!(tokens.count(&"lease ".repeat(1000)).unwrap(), 1000);
}

#[test]
fn the_fetched_model_is_the_published_one() {
    verify(&model_dir()).unwrap_or_else(|error| panic!("{error}"));
}

fn refused(dir: &Path) -> EmbedError {
    let config = LocalConfig { dir: dir.to_owned(), ..LocalConfig::default() };
    LocalEmbedder::open(&config).err().expect("opening must fail")
}

#[test]
fn a_missing_model_is_an_error_that_names_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let error = refused(dir.path());
    assert!(
        matches!(&error, EmbedError::ModelMissing { dir: d, command: "make model", .. } if d == dir.path())
    );
    let text = error.to_string();
    assert!(text.contains("run `make model`") && text.contains("FLOTILLA_MODEL_DIR"), "{text}");
    assert_eq!(error.class(), ErrorClass::Unavailable);
    assert!(matches!(verify(dir.path()), Err(EmbedError::ModelMissing { .. })));
}

#[test]
fn a_damaged_model_is_an_error_that_names_the_file() {
    let source = model_dir();
    let dir = tempfile::tempdir().unwrap();
    let put = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let bytes =
            std::fs::read(source.join(file)).unwrap_or_else(|error| panic!("run `make model`: {error}"));
        std::fs::write(dir.path().join(file), change(bytes)).unwrap();
    };
    let text_edit = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes()
    };
    put("tokenizer.json", &|bytes| bytes);
    put("config.json", &|bytes| bytes);
    put("model.safetensors", &|mut bytes| {
        bytes.truncate(bytes.len() / 2);
        bytes
    });
    let error = refused(dir.path());
    assert!(
        matches!(&error, EmbedError::ModelInvalid { reason, .. } if reason.contains("model.safetensors")),
        "{error}"
    );
    assert!(matches!(verify(dir.path()), Err(EmbedError::ModelInvalid { .. })));

    put("model.safetensors", &|bytes| bytes);
    put("config.json", &text_edit("\"hidden_size\": 384", "\"hidden_size\": 768"));
    let error = refused(dir.path());
    assert!(error.to_string().contains("has shape"), "{error}");
    put("config.json", &text_edit("\"bert\"", "\"mpnet\""));
    let error = refused(dir.path());
    assert!(error.to_string().contains("\"mpnet\""), "{error}");

    put("config.json", &|bytes| bytes);
    put("tokenizer.json", &|_| b"{}".to_vec());
    let error = refused(dir.path());
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}
