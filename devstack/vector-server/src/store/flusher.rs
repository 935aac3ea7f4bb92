//! Writes every changed collection out once per period, and lets the engine drop the log entries that this makes
//! obsolete. Acknowledged writes are in the log before that, so the period bounds how long a restart replays and
//! what a power cut may cost, not what a killed process may cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{BackgroundLoop, Store};

/// Starts the loop. A failed flush is logged and tried again in the next round.
pub fn spawn(store: Arc<Store>, period: Duration) -> std::io::Result<BackgroundLoop> {
    BackgroundLoop::spawn("flusher", period, move || {
        for collection in store.collections() {
            let started = Instant::now();
            match collection.flush() {
                Ok(false) => {}
                Ok(true) => {
                    tracing::debug!(collection = collection.name(), took = ?started.elapsed(), "flushed");
                }
                Err(error) => tracing::error!(collection = collection.name(), %error, "flush failed"),
            }
        }
    })
}
