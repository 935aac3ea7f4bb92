//! Settings, with the environment variable of each.

use std::{net::SocketAddr, time::Duration};

use queue::QueueName;

use crate::error::ServeError;

/// Limits of what a client accepts, and how long it tries.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// `FLOTILLA_MAX_PAYLOAD`: bytes of a payload's JSON (default 1 MiB).
    pub max_payload: usize,
    /// `FLOTILLA_MAX_WAITING`: jobs of one tenant that wait or are scheduled in one queue (default 100,000). A tenant's
    /// own limit in the ledger comes first. Looked up at most every 0.1 s, so several producers may pass it by what they
    /// accept in that time.
    pub max_waiting_per_tenant: u64,
    /// Jobs in one batch (1,000).
    pub max_batch: usize,
    /// Bytes of all payloads of a batch (16 MiB).
    pub max_batch_bytes: usize,
    /// Bytes of a payload that may go through Redis with [`Durability::Fast`](crate::Durability::Fast) (4 KiB,
    /// PROTOCOL.md 25). A larger one is accepted in the ledger, which promises more.
    pub max_fast_payload: usize,
    /// How long a connection to the ledger may take to get, before the ledger counts as unreachable (2 s).
    pub connect_within: Duration,
    /// How long one acceptance may take (10 s).
    pub accept_within: Duration,
    /// How long a lost ledger is asked what became of an acceptance (10 s).
    pub settle_within: Duration,
    /// What a caller is told when the ledger is away (2 s).
    pub retry_after: Duration,
    /// What a caller is told when the queue is full (5 s).
    pub full_retry_after: Duration,
    /// How long an idempotency key is remembered unless the job says otherwise (24 h).
    pub idempotency_ttl: Duration,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            max_payload: 1024 * 1024,
            max_waiting_per_tenant: 100_000,
            max_batch: 1000,
            max_batch_bytes: 16 * 1024 * 1024,
            max_fast_payload: 4096,
            connect_within: Duration::from_secs(2),
            accept_within: Duration::from_secs(10),
            settle_within: Duration::from_secs(10),
            retry_after: Duration::from_secs(2),
            full_retry_after: Duration::from_secs(5),
            idempotency_ttl: Duration::from_secs(24 * 3600),
        }
    }
}

impl ClientSettings {
    /// The defaults, with what `get` (usually the environment) sets.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Self, ServeError> {
        let base = Self::default();
        Ok(Self {
            max_payload: number(&get, "FLOTILLA_MAX_PAYLOAD", base.max_payload as u64)? as usize,
            max_waiting_per_tenant: number(&get, "FLOTILLA_MAX_WAITING", base.max_waiting_per_tenant)?,
            ..base
        })
    }
}

/// Whose request it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// `Authorization: Bearer KEY`; the key names the tenant.
    ApiKeys,
    /// Anybody may name any tenant in `X-Flotilla-Tenant`; without it the tenant is `default`. For development.
    Open,
}

/// Settings of the HTTP API.
#[derive(Debug, Clone)]
pub struct ProducerSettings {
    /// `FLOTILLA_PRODUCER_ADDR` (default 127.0.0.1:8080).
    pub addr: SocketAddr,
    /// `FLOTILLA_AUTH`: `keys` (default) or `open`.
    pub auth: Auth,
    /// How long one request may take (20 s).
    pub request_within: Duration,
    /// `FLOTILLA_DRAIN_GRACE_MS`: how long requests under way may go on after a request to stop (default 25 s).
    pub drain_grace: Duration,
}

impl Default for ProducerSettings {
    fn default() -> Self {
        Self {
            addr: SocketAddr::from(([127, 0, 0, 1], 8080)),
            auth: Auth::ApiKeys,
            request_within: Duration::from_secs(20),
            drain_grace: Duration::from_secs(25),
        }
    }
}

impl ProducerSettings {
    /// The defaults, with what `get` (usually the environment) sets.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Self, ServeError> {
        let base = Self::default();
        let addr = match get("FLOTILLA_PRODUCER_ADDR") {
            None => base.addr,
            Some(value) => value.parse().map_err(|_| ServeError::Setting {
                setting: "FLOTILLA_PRODUCER_ADDR",
                value,
                allowed: "an IP address and a port are needed, like 127.0.0.1:8080",
            })?,
        };
        let auth = match get("FLOTILLA_AUTH").as_deref() {
            None | Some("keys") => Auth::ApiKeys,
            Some("open") => Auth::Open,
            Some(other) => {
                return Err(ServeError::Setting {
                    setting: "FLOTILLA_AUTH",
                    value: other.to_owned(),
                    allowed: "allowed are keys and open",
                });
            }
        };
        Ok(Self {
            addr,
            auth,
            drain_grace: millis(&get, "FLOTILLA_DRAIN_GRACE_MS", base.drain_grace)?,
            ..base
        })
    }
}

/// Settings of the loops that keep ledger and queue agreed.
#[derive(Debug, Clone)]
pub struct MaintainSettings {
    /// `FLOTILLA_QUEUES`: the queues whose depth is reported even if nobody has pushed to them or served them within a week
    /// (default ingest, embed, delete). Relay and reconciler serve every queue of the ledger.
    pub queues: Vec<QueueName>,
    /// How often an idle relay looks into the outbox (100 ms).
    pub relay_every: Duration,
    /// Jobs that the relay takes at once (500).
    pub relay_batch: usize,
    /// `FLOTILLA_RECONCILE_MS`: how often the whole ledger is compared with the queue (default 30 s).
    pub reconcile_every: Duration,
    /// Jobs dispatched or taken within this time are left alone by a regular pass: they may be on their way (30 s).
    pub grace: Duration,
    /// `FLOTILLA_HEARTBEAT_MS`: how long workers need to register their leases again after Redis lost its data
    /// (default 10 s).
    pub heartbeat: Duration,
    /// Jobs that the reconciler dispatches again per second (20,000).
    pub redispatch_per_second: u32,
    /// `FLOTILLA_MAX_WAITING`: as [`ClientSettings::max_waiting_per_tenant`], for jobs that come by SQL (default 100,000).
    pub max_waiting_per_tenant: u64,
    /// How often an idle collector looks for members that have ended (200 ms).
    pub collect_every: Duration,
    /// How often the gauges are set (5 s).
    pub stats_every: Duration,
    /// `FLOTILLA_CRON_ON_TIME_MS`: a schedule's tick that is later than this was missed, and its catch-up policy says what
    /// becomes of it (default 60 s).
    pub cron_on_time: Duration,
}

impl Default for MaintainSettings {
    fn default() -> Self {
        Self {
            queues: ["ingest", "embed", "delete"]
                .into_iter()
                .filter_map(|name| QueueName::new(name).ok())
                .collect(),
            relay_every: Duration::from_millis(100),
            relay_batch: 500,
            reconcile_every: Duration::from_secs(30),
            grace: Duration::from_secs(30),
            heartbeat: Duration::from_secs(10),
            redispatch_per_second: 20_000,
            max_waiting_per_tenant: 100_000,
            collect_every: Duration::from_millis(200),
            stats_every: Duration::from_secs(5),
            cron_on_time: Duration::from_secs(60),
        }
    }
}

impl MaintainSettings {
    /// The defaults, with what `get` (usually the environment) sets.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Self, ServeError> {
        let base = Self::default();
        let queues = match get("FLOTILLA_QUEUES") {
            None => base.queues,
            Some(value) => value
                .split(',')
                .map(|name| QueueName::new(name.trim()))
                .collect::<Result<_, _>>()
                .map_err(|_| ServeError::Setting {
                    setting: "FLOTILLA_QUEUES",
                    value,
                    allowed: "names of 1 to 64 characters of A-Z a-z 0-9 _ . - with commas between them are needed",
                })?,
        };
        Ok(Self {
            queues,
            reconcile_every: millis(&get, "FLOTILLA_RECONCILE_MS", base.reconcile_every)?,
            heartbeat: millis(&get, "FLOTILLA_HEARTBEAT_MS", base.heartbeat)?,
            max_waiting_per_tenant: number(&get, "FLOTILLA_MAX_WAITING", base.max_waiting_per_tenant)?,
            cron_on_time: millis(&get, "FLOTILLA_CRON_ON_TIME_MS", base.cron_on_time)?,
            ..base
        })
    }
}

fn number(
    get: &impl Fn(&str) -> Option<String>,
    setting: &'static str,
    default: u64,
) -> Result<u64, ServeError> {
    let Some(value) = get(setting) else { return Ok(default) };
    match value.trim().parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(ServeError::Setting { setting, value, allowed: "a whole number above 0 is needed" }),
    }
}

fn millis(
    get: &impl Fn(&str) -> Option<String>,
    setting: &'static str,
    default: Duration,
) -> Result<Duration, ServeError> {
    number(get, setting, default.as_millis() as u64).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn only(name: &'static str, value: &'static str) -> impl Fn(&str) -> Option<String> {
        move |asked| (asked == name).then(|| value.to_owned())
    }

    #[test]
    fn a_bad_setting_is_named_with_its_value_and_what_is_allowed() {
        let said = |error: ServeError| error.to_string();
        assert_eq!(
            said(ProducerSettings::from_lookup(only("FLOTILLA_AUTH", "none")).unwrap_err()),
            "FLOTILLA_AUTH is \"none\": allowed are keys and open"
        );
        assert_eq!(
            said(ClientSettings::from_lookup(only("FLOTILLA_MAX_PAYLOAD", "1 MB")).unwrap_err()),
            "FLOTILLA_MAX_PAYLOAD is \"1 MB\": a whole number above 0 is needed"
        );
        let error = said(MaintainSettings::from_lookup(only("FLOTILLA_QUEUES", "a,,b")).unwrap_err());
        assert!(error.starts_with("FLOTILLA_QUEUES is \"a,,b\""), "{error}");
    }

    #[test]
    fn settings_come_from_the_environment_and_keys_are_the_default() {
        assert_eq!(ProducerSettings::from_lookup(|_| None).unwrap().auth, Auth::ApiKeys);
        assert_eq!(ProducerSettings::from_lookup(only("FLOTILLA_AUTH", "open")).unwrap().auth, Auth::Open);
        let settings = MaintainSettings::from_lookup(only("FLOTILLA_QUEUES", "ingest, slow")).unwrap();
        assert_eq!(settings.queues.iter().map(QueueName::as_str).collect::<Vec<_>>(), ["ingest", "slow"]);
        assert_eq!(settings.reconcile_every, Duration::from_secs(30));
    }
}
