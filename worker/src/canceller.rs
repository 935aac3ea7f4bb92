//! Hands requests to cancel to the jobs that run here. The pivot checks for itself; this only saves work.

use std::{sync::Arc, time::Duration};

use sagas::stores::postgres::Postgres;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::runner::Runner;

const EVERY: Duration = Duration::from_secs(1);

/// Runs until `shutdown`.
pub(crate) async fn run(runner: Arc<Runner>, postgres: Postgres, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let running: Vec<Uuid> = runner.running().keys().map(|id| id.0).collect();
        if running.is_empty() {
            continue;
        }
        match postgres.cancel_requests(&running).await {
            Ok(cancelled) => {
                let running = runner.running();
                for token in cancelled.iter().filter_map(|id| running.get(id)) {
                    token.cancel();
                }
            }
            Err(error) => tracing::debug!(%error, "can't look for requests to cancel"),
        }
    }
}
