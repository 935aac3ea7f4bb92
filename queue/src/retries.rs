//! When a failed job is tried again.

use std::time::Duration;

/// How often, and after which waits, failed jobs are tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Charged failures after which a job is dead, where the job itself sets no limit (default 5).
    pub max_attempts: u32,
    /// The range of the first wait; it doubles with each failure (default 1 s).
    pub base: Duration,
    /// The longest range (default 5 min).
    pub cap: Duration,
    /// Leases lost while the job ran alone in its process after which it counts as poison (default 3).
    pub delivery_limit: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self { max_attempts: 5, base: Duration::from_secs(1), cap: Duration::from_mins(5), delivery_limit: 3 }
    }
}

impl Retries {
    /// The wait after `failures` charged failures (1 is the first): exponential back-off with full jitter, that is any
    /// time between zero and the range, so that jobs which failed together don't come back together. `random` is in 0..1.
    pub fn wait(&self, failures: u32, random: f64) -> Duration {
        back_off(self.base, self.cap, failures.saturating_sub(1), random)
    }
}

/// Exponential back-off with full jitter: any time between zero and `base` doubled so often, at most `cap`. `random` is in
/// 0..1.
pub fn back_off(base: Duration, cap: Duration, doublings: u32, random: f64) -> Duration {
    base.saturating_mul(2_u32.saturating_pow(doublings)).min(cap).mul_f64(random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_spread_over_the_whole_range() {
        let retries = Retries::default();
        let longest = [1, 2, 3, 9, 10, 60].map(|failures| retries.wait(failures, 1.0).as_secs());
        assert_eq!(longest, [1, 2, 4, 256, 300, 300]);
        assert_eq!(retries.wait(3, 0.0), Duration::ZERO);
        assert_eq!(retries.wait(3, 0.25), Duration::from_secs(1));
    }
}
