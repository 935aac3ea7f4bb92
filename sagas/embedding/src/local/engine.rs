//! One engine: one operating-system thread that takes work from the queue until it is closed.
//!
//! Engines do not help each other with a batch. Splitting every multiplication over the cores costs
//! about 40 % of the throughput to synchronisation; whole batches side by side cost nothing.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::bert::Forward;
use super::queue::{Item, Queue, Work};
use super::tokens::Tokens;
use super::weights::Weights;
use crate::EmbedError;

/// What every engine reads.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) queue: Arc<Queue>,
    pub(super) weights: Arc<Weights>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) max_tokens: usize,
}

/// Starts engine number `n`. Its thread ends when the queue is closed.
///
/// The multiplication spreads over whatever rayon pool it is called in. So the engine's thread is made
/// the only member of a pool of its own: it is the pool that runs the engine, as a task that lasts.
pub(super) fn start(n: usize, shared: Shared) -> io::Result<JoinHandle<()>> {
    let mut thread = None;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .spawn_handler(|member| {
            let named = std::thread::Builder::new().name(format!("embed-{n}"));
            thread = Some(named.spawn(|| member.run())?);
            Ok(())
        })
        .build()
        .map_err(io::Error::other)?;
    pool.spawn(move || run(&shared));
    // Dropped here, the pool's thread goes on until its task has ended.
    drop(pool);
    thread.ok_or_else(|| io::Error::other("the thread pool started no thread"))
}

fn run(shared: &Shared) {
    let mut forward = Forward::new();
    while let Some(work) = shared.queue.next() {
        match work {
            Work::Tokenise { round, texts } => {
                let encoded = texts.into_iter().filter_map(|item| encode(shared, item)).collect();
                shared.queue.ready(round, encoded);
            }
            Work::Embed(batch) => embed(shared, &mut forward, batch),
        }
    }
}

fn encode(shared: &Shared, item: Item<String>) -> Option<Item<Vec<u32>>> {
    let encoded = catch_unwind(AssertUnwindSafe(|| shared.tokens.encode(&item.content, shared.max_tokens)));
    match encoded.unwrap_or_else(|panic| Err(defect(&*panic))) {
        Ok(ids) => Some(item.with(ids)),
        Err(error) => {
            item.fail(error);
            None
        }
    }
}

fn embed(shared: &Shared, forward: &mut Forward, batch: Vec<Item<Vec<u32>>>) {
    let sequences: Vec<&[u32]> = batch.iter().map(|item| item.content.as_slice()).collect();
    // A defect in here must cost these calls, not the engine and with it the process.
    let vectors = catch_unwind(AssertUnwindSafe(|| forward.embed(&shared.weights, &sequences)));
    match vectors.unwrap_or_else(|panic| Err(defect(&*panic))) {
        Ok(vectors) => batch.into_iter().zip(vectors).for_each(|(item, vector)| item.finish(vector)),
        Err(error) => {
            *forward = Forward::new();
            for item in batch {
                item.fail(error.clone());
            }
        }
    }
}

fn defect(panic: &(dyn Any + Send)) -> EmbedError {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    tracing::error!(panic = said, "the embedding engine panicked and goes on");
    EmbedError::Engine { reason: format!("panic: {said}") }
}
