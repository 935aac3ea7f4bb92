//! The gRPC services: `qdrant.Qdrant`, `qdrant.Collections` and `qdrant.Points`.

mod collections;
mod health;
mod points;
mod queries;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Status;

use crate::status::{Answer, invalid};
use crate::store::Store;

/// Serves all three; cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    store: Arc<Store>,
}

impl Service {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Runs engine work, which blocks, off the async threads. `timeout` is the request's own, in seconds. When it
    /// passes, or the client goes away, the work goes on to its end: a write that got DEADLINE_EXCEEDED may or may
    /// not take effect. Returns the answer and the seconds it took.
    async fn run<T: Send + 'static>(
        &self,
        timeout: Option<u64>,
        work: impl FnOnce(&Store) -> Answer<T> + Send + 'static,
    ) -> Answer<(T, f64)> {
        let started = Instant::now();
        if timeout == Some(0) {
            return Err(invalid("`timeout` is 0; it must be at least 1 second"));
        }
        let store = Arc::clone(&self.store);
        let task = tokio::task::spawn_blocking(move || work(&store));
        let joined = match timeout {
            None => task.await,
            Some(seconds) => {
                tokio::time::timeout(Duration::from_secs(seconds), task).await.map_err(|_| {
                    Status::deadline_exceeded(format!(
                        "the operation took longer than its timeout of {seconds} s"
                    ))
                })?
            }
        };
        let answer = joined.map_err(|error| Status::internal(format!("the engine failed: {error}")))??;
        Ok((answer, started.elapsed().as_secs_f64()))
    }
}
