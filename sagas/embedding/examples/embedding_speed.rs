//! Opens the embedder that the environment names and measures it:
//!
//! ```text
//! cargo run --release -p embedding --example embedding_speed [DOCUMENTS] [WORDS] [CALLS]
//! ```
//!
//! DOCUMENTS texts (default 512) of WORDS words each (default 100, about as many tokens), in CALLS
//! concurrent calls of equal size (default 8). Data goes to stdout.

use std::time::Instant;

use embedding::{EmbedError, EmbedderConfig, open};
use futures::future::try_join_all;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1).map(|n| n.parse::<usize>());
    let mut next = |default| numbers.next().unwrap_or(Ok(default));
    let (documents, words, calls) = (next(512)?, next(100)?, next(8)?.max(1));

    let started = Instant::now();
    let embedder = open(&EmbedderConfig::from_env()?)?;
    println!("model       {} ({} dimensions)", embedder.model(), embedder.dimensions());
    println!("opened in   {:.3} s", started.elapsed().as_secs_f64());

    let vocabulary =
        ["harbour", "queue", "lease", "river", "vector", "pivot", "ledger", "storm", "tenant", "archive"];
    let texts: Vec<String> = (0..documents)
        .map(|n| (0..words).map(|w| vocabulary[(n * 7 + w * w) % 10]).collect::<Vec<_>>().join(" "))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        embedder.probe().await?;
        let started = Instant::now();
        let parts = texts.chunks(documents.div_ceil(calls).max(1)).map(|part| embedder.embed(part.to_vec()));
        let vectors = try_join_all(parts).await?;
        let took = started.elapsed().as_secs_f64();
        let count: usize = vectors.iter().map(Vec::len).sum();
        println!(
            "embedded    {count} documents of {words} words in {took:.3} s: {:.0} documents/s",
            count as f64 / took
        );
        Ok::<_, EmbedError>(())
    })?;
    Ok(())
}
