//! The job of the benchmark: it does nothing, but says when it was sent.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What every side stores, decodes and hands to the same handler.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Payload {
    pub number: u64,
    /// Unix time in µs just before the enqueue was sent. Producer and workers share a machine and so a clock.
    pub sent_us: u64,
}

impl Payload {
    pub fn now(number: u64) -> Self {
        Self { number, sent_us: now_us() }
    }

    /// How long ago it was sent.
    pub fn age(self) -> Duration {
        Duration::from_micros(now_us().saturating_sub(self.sent_us))
    }

    /// Its size as it is stored, in bytes.
    pub fn size(self) -> usize {
        serde_json::to_string(&self).map_or(0, |json| json.len())
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
