#![doc = include_str!("../README.md")]

pub mod config;
pub mod envelope;
pub mod error;
pub mod ids;

pub use config::QueueConfig;
pub use envelope::{Beat, Claim, Envelope, Epoch, LeaseRef, PriorityStats, Pushed, QueueStats, TraceContext};
pub use error::QueueError;
pub use ids::{
    InvalidPriority, InvalidQueueName, InvalidTenant, JobId, LeaseToken, MAX_NAME, Priority, QueueName,
    TenantId, WorkerId,
};

/// At how many tenants per priority [`PriorityStats::oldest_ms`] looks.
pub const STATS_TENANTS: usize = 64;
