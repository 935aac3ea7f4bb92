//! Builds HNSW graphs, merges segments and clears away deleted points after writes. The engine does this only when
//! told to, and blocks the thread that tells it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{BackgroundLoop, Store};

/// How soon after a write the optimiser looks at the collection.
const PERIOD: Duration = Duration::from_millis(500);

/// Starts the loop. A failed optimisation is logged and tried again after the next write; readers are unaffected.
pub fn spawn(store: Arc<Store>) -> std::io::Result<BackgroundLoop> {
    BackgroundLoop::spawn("optimiser", PERIOD, move || {
        for collection in store.collections() {
            let started = Instant::now();
            match collection.optimise() {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(collection = collection.name(), took = ?started.elapsed(), "optimised");
                }
                Err(error) => tracing::error!(collection = collection.name(), %error, "optimisation failed"),
            }
        }
    })
}
