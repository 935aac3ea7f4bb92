//! Texts per second of an embedding provider.

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};

use super::{Figure, Provider, Report, texts::text};
use crate::context::Context;

/// Texts in one call, as a worker's batches are about.
const BATCH: usize = 32;
/// Calls under way at once.
const IN_FLIGHT: usize = 4;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Texts to embed
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    texts: u32,
    /// Words of a text; 150 are about 200 tokens
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u16).range(1..=1000))]
    words: u16,
    /// Provider; may be given twice
    #[arg(long, value_enum, default_values = ["hash", "local"])]
    embedder: Vec<Provider>,
}

pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let words = usize::from(args.words);
    let all: Vec<String> = (0..u64::from(args.texts)).map(|number| text(number, words)).collect();
    let mut results = vec![];
    for provider in &args.embedder {
        let embedder = provider.open(context)?;
        embedder.embed(vec![text(0, words)]).await?;

        let begun = Instant::now();
        let times: Vec<Duration> = stream::iter(all.chunks(BATCH).map(<[String]>::to_vec))
            .map(|batch| async {
                let begun = Instant::now();
                embedder.embed(batch).await.map(|_| begun.elapsed())
            })
            .buffer_unordered(IN_FLIGHT)
            .try_collect()
            .await?;
        let batched = all.len() as f64 / begun.elapsed().as_secs_f64();

        // The one-by-one figure needs fewer texts to be as certain.
        let few = &all[..all.len().min(64)];
        let begun = Instant::now();
        for one in few {
            embedder.embed(vec![one.clone()]).await?;
        }
        let single = few.len() as f64 / begun.elapsed().as_secs_f64();
        let reference = ("the same provider, one text a call, one call at a time".to_owned(), single);
        results.push(Figure::new(format!("embed.{}", provider.name()), "texts/s", batched, times, reference));
    }
    Ok(Report { bench: "embed".into(), results })
}
