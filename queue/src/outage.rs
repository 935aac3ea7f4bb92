//! How a background loop goes through an outage: it waits longer and longer, and says so once.

use std::time::{Duration, Instant};

use crate::error::QueueError;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(1);

/// The outage that one loop sees, if there is one.
pub(crate) struct Outage {
    role: &'static str,
    since: Option<Instant>,
    pause: Duration,
}

impl Outage {
    pub(crate) fn new(role: &'static str) -> Self {
        Self { role, since: None, pause: FIRST }
    }

    /// Notes a failed call and returns how long to wait before the next: 100 ms to 1 s.
    pub(crate) fn wait(&mut self, error: &QueueError) -> Duration {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            // An error that is no outage won't go away by itself, but giving up would stop the whole worker.
            if error.is_unavailable() {
                tracing::warn!(role = self.role, %error, "waiting for the queue's Redis");
            } else {
                tracing::error!(role = self.role, %error, "can't work with the queue's Redis; trying again");
            }
        }
        let pause = self.pause;
        self.pause = (self.pause * 2).min(LONGEST);
        pause
    }

    #[cfg(test)]
    pub(crate) fn lasts(&self) -> bool {
        self.since.is_some()
    }

    /// Notes a call that got through.
    pub(crate) fn over(&mut self) {
        if let Some(since) = self.since.take() {
            tracing::info!(role = self.role, after = ?since.elapsed(), "the queue's Redis answers again");
        }
        self.pause = FIRST;
    }
}
