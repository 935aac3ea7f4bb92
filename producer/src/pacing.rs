//! Waiting that a shutdown ends, and calls that a hung server can't hold for ever.

use std::time::Duration;

use sagas::{Class, Dependency, StoreError};
use tokio_util::sync::CancellationToken;

/// Waits; `false` if `shutdown` came first.
pub(crate) async fn pause(time: Duration, shutdown: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(time) => true,
        () = shutdown.cancelled() => false,
    }
}

/// A call to the ledger that ends in time: the server's own statement time-out doesn't help when the server hangs.
pub(crate) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
        Err(StoreError::new(Dependency::Postgres, Class::Unavailable, format!("no answer within {limit:?}")))
    })
}

/// Pauses that grow from `first` to `longest` while something keeps failing.
#[derive(Debug)]
pub(crate) struct Growing {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Growing {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    pub fn reset(&mut self) {
        self.next = self.first;
    }

    pub fn next(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.longest);
        now
    }
}
