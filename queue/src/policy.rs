//! The rules that people set for queues and tenants: pause, mode, weights, limits. The scripts keep them; see
//! `docs/guides/queues-and-limits.md`.
//!
//! A policy is stored in every partition of its queue, with a revision: an older revision never overwrites a newer one,
//! so that any number of processes may store the same policies in any order. With a ledger the truth is in Postgres, and
//! what Redis holds is a copy (PROTOCOL.md 17). Without one, [`Queue::set_policy`](crate::Queue::set_policy) is all there is.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    error::QueueError,
    ids::{Priority, QueueName, TenantId},
};

/// In which order the priorities of a queue are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The highest first; a job that has waited longer than `aging` gets one of four claims.
    #[default]
    Strict,
    /// Each priority that has waiting jobs gets its share: weights from 1 to 100, index 0 is priority 0.
    Weighted([u8; Priority::LEVELS]),
}

/// A token bucket: so many jobs a second, and so many at once after a quiet time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Jobs per second, above 0; one a minute is 1/60.
    pub per_second: f64,
    /// Jobs that may start at once after a quiet time, at least 1.
    pub burst: u32,
}

impl Rate {
    /// So many a second, and at once what one second allows (at least 1).
    pub fn per_second(per_second: f64) -> Self {
        Self { per_second, burst: per_second.ceil().clamp(1.0, f64::from(u32::MAX)) as u32 }
    }

    /// One partition's part.
    fn part(self, partitions: u16) -> Self {
        Self {
            per_second: self.per_second / f64::from(partitions),
            burst: (self.burst / u32::from(partitions)).max(1),
        }
    }
}

/// What holds for a queue as a whole. The default holds nothing back.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct QueuePolicy {
    /// Nothing is claimed; jobs that run go on, and new ones are accepted.
    pub paused: bool,
    /// New jobs are refused; claims go on until nothing is left.
    pub draining: bool,
    /// How priorities share the workers.
    pub mode: Mode,
    /// Jobs that are leased at one time over the whole fleet, at least 1.
    pub max_concurrency: Option<u32>,
    /// Jobs claimed per second.
    pub rate: Option<Rate>,
    /// Jobs that wait or are scheduled; more are refused.
    pub max_depth: Option<u64>,
}

/// What holds for one tenant within one queue. The default holds nothing back.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TenantPolicy {
    /// None of the tenant's jobs is claimed.
    pub paused: bool,
    /// How many jobs the tenant gets in its turn, 1 to 100.
    pub weight: u8,
    /// Jobs of the tenant that are leased at one time, at least 1.
    pub max_concurrency: Option<u32>,
    /// Jobs of the tenant claimed per second.
    pub rate: Option<Rate>,
    /// Jobs of the tenant that wait or are scheduled; more are refused.
    pub max_depth: Option<u64>,
}

impl Default for TenantPolicy {
    fn default() -> Self {
        Self { paused: false, weight: 1, max_concurrency: None, rate: None, max_depth: None }
    }
}

/// All policies of one queue, for [`Queue::sync_policies`](crate::Queue::sync_policies).
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySet {
    /// The queue they are for.
    pub queue: QueueName,
    /// The queue's own policy and its revision.
    pub policy: (QueuePolicy, i64),
    /// Tenants with a policy in this queue, each with its revision.
    pub tenants: Vec<(TenantId, TenantPolicy, i64)>,
}

fn refuse(setting: &'static str, value: impl ToString, allowed: &'static str) -> Result<(), QueueError> {
    Err(QueueError::Config { setting, value: value.to_string(), allowed })
}

fn check_limits(concurrency: Option<u32>, rate: Option<Rate>, depth: Option<u64>) -> Result<(), QueueError> {
    if concurrency == Some(0) {
        return refuse("max_concurrency", 0, "at least 1 is needed; pause to stop everything");
    }
    if depth == Some(0) {
        return refuse("max_depth", 0, "at least 1 is needed; drain to refuse everything");
    }
    if let Some(Rate { per_second, burst }) = rate {
        if !(per_second.is_finite() && per_second > 0.0) {
            return refuse("rate", per_second, "a number above 0 is needed; pause to stop everything");
        }
        if burst == 0 {
            return refuse("burst", 0, "at least 1 is needed");
        }
    }
    Ok(())
}

impl QueuePolicy {
    /// Whether the policy can hold.
    pub fn check(&self) -> Result<(), QueueError> {
        if let Mode::Weighted(weights) = self.mode
            && let Some(weight) = weights.iter().find(|weight| !(1..=100).contains(*weight))
        {
            return refuse("weights", weight, "1 to 100 are allowed for each priority");
        }
        check_limits(self.max_concurrency, self.rate, self.max_depth)
    }

    /// As `policy.lua` takes it, for one of `partitions`: paused, draining, weights, concurrency, rate, burst, depth.
    pub(crate) fn write(&self, args: &mut Vec<Vec<u8>>, partitions: u16) {
        let weights = match self.mode {
            Mode::Strict => String::new(),
            Mode::Weighted(weights) => weights.map(|weight| weight.to_string()).join(","),
        };
        args.extend([flag(self.paused), flag(self.draining), weights.into_bytes()]);
        write_limits(args, self.max_concurrency, self.rate, self.max_depth, partitions);
    }
}

impl TenantPolicy {
    /// Whether the policy can hold.
    pub fn check(&self) -> Result<(), QueueError> {
        if !(1..=100).contains(&self.weight) {
            return refuse("weight", self.weight, "1 to 100 are allowed");
        }
        check_limits(self.max_concurrency, self.rate, self.max_depth)
    }

    /// As `policy.lua` takes it: paused, weight or '' for 1, concurrency, rate, burst, depth.
    pub(crate) fn write(&self, args: &mut Vec<Vec<u8>>, partitions: u16) {
        args.push(flag(self.paused));
        args.push(if self.weight == 1 { Vec::new() } else { self.weight.to_string().into_bytes() });
        write_limits(args, self.max_concurrency, self.rate, self.max_depth, partitions);
    }
}

fn flag(set: bool) -> Vec<u8> {
    if set { b"1".to_vec() } else { Vec::new() }
}

/// With one partition its limit is the whole limit. With more, concurrency is lent (`lend`) by the lender; rate and
/// depth are divided.
fn write_limits(
    args: &mut Vec<Vec<u8>>,
    concurrency: Option<u32>,
    rate: Option<Rate>,
    depth: Option<u64>,
    partitions: u16,
) {
    let rate = rate.map(|rate| rate.part(partitions));
    let texts = [
        concurrency.map(|limit| if partitions == 1 { limit.to_string() } else { format!("lend {limit}") }),
        rate.map(|rate| rate.per_second.to_string()),
        rate.map(|rate| rate.burst.to_string()),
        depth.map(|depth| depth.div_ceil(u64::from(partitions)).to_string()),
    ];
    args.extend(texts.map(|text| text.unwrap_or_default().into_bytes()));
}

/// When a limit lets a claim go on, as `claim.lua` answers it; 0 ms: it doesn't know.
pub(crate) fn wait_of(ms: i64) -> Option<Duration> {
    u64::try_from(ms).ok().filter(|ms| *ms > 0).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_that_can_not_hold_are_refused_with_what_is_allowed() {
        let said = |policy: QueuePolicy| policy.check().map_err(|error| error.to_string());
        assert_eq!(said(QueuePolicy::default()), Ok(()));
        assert_eq!(
            said(QueuePolicy { max_concurrency: Some(0), ..QueuePolicy::default() }),
            Err("max_concurrency is \"0\": at least 1 is needed; pause to stop everything".to_owned())
        );
        let rate = Some(Rate { per_second: f64::NAN, burst: 1 });
        assert!(said(QueuePolicy { rate, ..QueuePolicy::default() }).is_err());
        assert!(
            said(QueuePolicy {
                mode: Mode::Weighted([1, 1, 1, 0, 1, 1, 1, 1, 1, 1]),
                ..QueuePolicy::default()
            })
            .is_err()
        );
        assert!(TenantPolicy { weight: 0, ..TenantPolicy::default() }.check().is_err());
        assert!(TenantPolicy { max_depth: Some(0), ..TenantPolicy::default() }.check().is_err());
    }

    #[test]
    fn a_partition_gets_its_part_of_a_limit_and_never_nothing() {
        let rate = Rate { per_second: 10.0, burst: 3 }.part(4);
        assert!((rate.per_second - 2.5).abs() < 1e-9 && rate.burst == 1, "{rate:?}");
        assert_eq!(Rate::per_second(0.5).burst, 1);
        let mut args = Vec::new();
        write_limits(&mut args, Some(8), None, Some(10), 4);
        assert_eq!(args, [b"lend 8".to_vec(), vec![], vec![], b"3".to_vec()]);
    }
}
