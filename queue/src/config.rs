//! Settings of the queue, with the environment variable of each.

use std::time::Duration;

use crate::{
    address::{Access, Address, redacted},
    error::QueueError,
    ids::is_name,
};

/// How to reach the queue's Redis, and the limits of the queue. Every process of one deployment must use the same
/// `prefix` and `partitions`.
#[derive(Clone, PartialEq, Eq)]
pub struct QueueConfig {
    /// `REDIS_QUEUE_URL`, e.g. `redis://:password@host:6379/0` (default `redis://127.0.0.1:6379`); Sentinels, clusters
    /// and TLS have [forms of their own](crate::address). Each server must have `maxmemory-policy noeviction`.
    pub url: String,
    /// What is needed besides the URL: certificates, the Sentinels' password.
    pub access: Access,
    /// `FLOTILLA_PREFIX`: what every key starts with (default `flotilla`).
    pub prefix: String,
    /// `FLOTILLA_QUEUE_PARTITIONS`: in how many parts each queue is split (default 1). Priority, fairness and ageing
    /// hold within a partition. Change it only with an empty queue: a job is found again by its id's partition.
    pub partitions: u16,
    /// `FLOTILLA_LEASE_MS`: how long a claimed job is ours without a heartbeat (default 30 s).
    pub lease: Duration,
    /// `FLOTILLA_QUEUE_AGING_MS`: a job that has waited longer than this is reached even when higher priorities
    /// never run dry: such jobs get one of four claims (default 60 s).
    pub aging: Duration,
    /// `FLOTILLA_QUEUE_WINDOW`: how many jobs may wait in Redis per queue, and as many again may be scheduled
    /// (default 1,000,000). The rest waits in the ledger.
    pub window: u64,
    /// Bytes of JSON that an envelope's `fast` record may have (default 1 MiB, as a payload in the ledger).
    pub max_record: usize,
    /// `FLOTILLA_REDIS_CONNECT_MS`: how long opening a connection may take (default 2 s).
    pub connect_timeout: Duration,
    /// `FLOTILLA_REDIS_RESPONSE_MS`: how long an answer may take before the connection counts as dead (default 2 s).
    pub response_timeout: Duration,
    /// How often an idle worker asks although no wake-up came, and the reaper and the scheduler look (1 s).
    pub safety_poll: Duration,
}

impl std::fmt::Debug for QueueConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Taken apart, so that a new field can't be forgotten here. The URL may hold a password.
        let Self {
            url,
            access,
            prefix,
            partitions,
            lease,
            aging,
            window,
            max_record,
            connect_timeout,
            response_timeout,
            safety_poll,
        } = self;
        f.debug_struct("QueueConfig")
            .field("url", &redacted(url))
            .field("access", access)
            .field("prefix", prefix)
            .field("partitions", partitions)
            .field("lease", lease)
            .field("aging", aging)
            .field("window", window)
            .field("max_record", max_record)
            .field("connect_timeout", connect_timeout)
            .field("response_timeout", response_timeout)
            .field("safety_poll", safety_poll)
            .finish()
    }
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            access: Access::default(),
            prefix: "flotilla".to_owned(),
            partitions: 1,
            lease: Duration::from_secs(30),
            aging: Duration::from_mins(1),
            window: 1_000_000,
            max_record: 1024 * 1024,
            connect_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(2),
            safety_poll: Duration::from_secs(1),
        }
    }
}

impl QueueConfig {
    /// The defaults, with what the environment sets. Fails with [`QueueError::Config`] on a value that isn't a number.
    pub fn from_env() -> Result<Self, QueueError> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), over any source of settings.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Self, QueueError> {
        let number = |setting: &'static str, default: u64| -> Result<u64, QueueError> {
            match get(setting) {
                None => Ok(default),
                Some(value) => value.trim().parse().map_err(|_| QueueError::Config {
                    setting,
                    value,
                    allowed: "a whole number is allowed",
                }),
            }
        };
        let millis = |setting, default: Duration| {
            number(setting, default.as_millis() as u64).map(Duration::from_millis)
        };
        let base = Self::default();
        let partitions = number("FLOTILLA_QUEUE_PARTITIONS", u64::from(base.partitions))?;
        let config = Self {
            url: get("REDIS_QUEUE_URL").unwrap_or(base.url),
            access: Access::from_lookup(&get),
            prefix: get("FLOTILLA_PREFIX").unwrap_or(base.prefix),
            partitions: u16::try_from(partitions).unwrap_or(u16::MAX),
            lease: millis("FLOTILLA_LEASE_MS", base.lease)?,
            aging: millis("FLOTILLA_QUEUE_AGING_MS", base.aging)?,
            window: number("FLOTILLA_QUEUE_WINDOW", base.window)?,
            max_record: base.max_record,
            connect_timeout: millis("FLOTILLA_REDIS_CONNECT_MS", base.connect_timeout)?,
            response_timeout: millis("FLOTILLA_REDIS_RESPONSE_MS", base.response_timeout)?,
            safety_poll: base.safety_poll,
        };
        config.check()?;
        Ok(config)
    }

    /// Whether these settings can work; [`Queue::connect`](crate::Queue::connect) checks them too.
    pub fn check(&self) -> Result<(), QueueError> {
        let refuse = |setting, value: String, allowed| Err(QueueError::Config { setting, value, allowed });
        Address::parse("REDIS_QUEUE_URL", &self.url)?;
        if !is_name(&self.prefix) {
            return refuse(
                "FLOTILLA_PREFIX",
                self.prefix.clone(),
                "allowed are 1 to 64 characters of A-Z a-z 0-9 _ . -",
            );
        }
        if !(1..=1024).contains(&self.partitions) {
            return refuse("FLOTILLA_QUEUE_PARTITIONS", self.partitions.to_string(), "1 to 1024 are allowed");
        }
        if self.lease < Duration::from_millis(100) {
            return refuse(
                "FLOTILLA_LEASE_MS",
                self.lease.as_millis().to_string(),
                "at least 100 ms are needed",
            );
        }
        if self.window == 0 {
            return refuse("FLOTILLA_QUEUE_WINDOW", "0".to_owned(), "at least 1 is needed");
        }
        for (setting, limit) in [
            ("FLOTILLA_REDIS_CONNECT_MS", self.connect_timeout),
            ("FLOTILLA_REDIS_RESPONSE_MS", self.response_timeout),
        ] {
            if limit.is_zero() {
                return refuse(setting, "0".to_owned(), "at least 1 ms is needed");
            }
        }
        Ok(())
    }

    /// The window of one partition.
    pub(crate) fn partition_window(&self) -> u64 {
        self.window.div_ceil(u64::from(self.partitions))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn settings_come_from_the_environment() {
        let config = QueueConfig::from_lookup(|name| match name {
            "FLOTILLA_LEASE_MS" => Some("1500".to_owned()),
            "FLOTILLA_PREFIX" => Some("blue".to_owned()),
            _ => None,
        })
        .unwrap();
        assert_eq!((config.lease, config.prefix.as_str()), (Duration::from_millis(1500), "blue"));
        assert_eq!(config.window, 1_000_000);
    }

    #[test]
    fn a_bad_setting_is_named_with_its_value() {
        let error = QueueConfig::from_lookup(|name| (name == "FLOTILLA_LEASE_MS").then(|| "soon".to_owned()))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "FLOTILLA_LEASE_MS is \"soon\": a whole number is allowed");
        let error = QueueConfig { prefix: "a}b".to_owned(), ..QueueConfig::default() }.check().unwrap_err();
        assert!(error.to_string().contains("FLOTILLA_PREFIX is \"a}b\""), "{error}");
        let url = "redis://:hidden@a,b".to_owned();
        let config = QueueConfig { url, ..QueueConfig::default() };
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("REDIS_QUEUE_URL") && !error.contains("hidden"), "{error}");
        assert!(!format!("{config:?}").contains("hidden"), "{config:?}");
    }
}
