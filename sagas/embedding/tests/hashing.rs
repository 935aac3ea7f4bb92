//! The hashing provider's vectors must never change under their name, and must be near for texts that
//! share words.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use embedding::hashing::{DIMENSIONS, HashingEmbedder, vector};
use embedding::{Embedder, EmbedderConfig, open};

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The numbers that are not zero, as bits: `(dimension, bits)`.
fn golden(text: &str) -> Vec<(usize, u32)> {
    vector(text).iter().enumerate().filter(|(_, x)| **x != 0.0).map(|(n, x)| (n, x.to_bits())).collect()
}

/// One number for a whole vector: FNV-1a over its bits.
fn digest(text: &str) -> u64 {
    let bytes = vector(text).into_iter().flat_map(|x| x.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn golden_values_hold_to_the_bit() {
    assert_eq!(golden("a b"), GOLDEN_A_B);
    for (text, expected) in GOLDEN {
        assert_eq!(
            digest(text),
            expected,
            "{text:?} has another vector; a changed method needs a new model name"
        );
    }
}

#[test]
fn every_text_gives_a_finite_unit_vector() {
    for text in ["", " ", "?!", "a", "\u{0}", "東京都", "👩‍🚀", &"word ".repeat(100_000)] {
        let vector = vector(text);
        assert_eq!(vector.len(), DIMENSIONS);
        let length = dot(&vector, &vector).sqrt();
        assert!(
            (length - 1.0).abs() < 1e-5,
            "length {length} of {:?}",
            text.chars().take(9).collect::<String>()
        );
    }
    assert_ne!(vector("?!"), vector("!?"), "texts without words differ too");
}

#[test]
fn shared_words_bring_texts_together() {
    let question = vector("how do workers renew their leases");
    let near =
        dot(&question, &vector("A worker renews its lease by a heartbeat; leases of dead workers expire."));
    let far = dot(&question, &vector("Strawberries ripen in June, when the nights stay warm."));
    assert!(near > far + 0.15, "near {near}, far {far}");
    let order = dot(&vector("dog bites man"), &vector("man bites dog"));
    assert!((0.5..0.999).contains(&order), "the order of words counts a little: {order}");
    assert_eq!(vector("Straße"), vector("STRAßE"));
}

#[tokio::test]
async fn it_keeps_the_promises_of_the_trait() {
    let embedder = open(&EmbedderConfig::Hashing).unwrap();
    assert_eq!((embedder.model(), embedder.dimensions()), ("feature-hash-384", 384));
    embedder.probe().await.unwrap();
    assert!(embedder.embed(Vec::new()).await.unwrap().is_empty());
    let texts = ["one", "two", "one"].map(str::to_owned).to_vec();
    let vectors = HashingEmbedder::new().embed(texts.clone()).await.unwrap();
    assert_eq!(vectors, texts.iter().map(|text| vector(text)).collect::<Vec<_>>());
}

// Both from a second implementation, written in Python from the description in src/hashing.rs.
const GOLDEN_A_B: [(usize, u32); 5] =
    [(9, 0xbf26_1d5f), (64, 0x3e26_1d5f), (134, 0xbe26_1d5f), (279, 0x3f26_1d5f), (346, 0x3ea6_1d5f)];

const GOLDEN: [(&str, u64); 4] = [
    ("", 0x180a_e084_ab1e_5f08),
    ("The quick brown fox jumps over the lazy dog.", 0x663e_51b5_eb88_30b7),
    ("Größe, naïve façade: 42 Ærø", 0x7436_58a5_ac6d_92fc),
    ("東京都は日本の首都です。 Привет, мир!", 0x1c29_a054_7195_dc0f),
];
