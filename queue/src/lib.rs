#![doc = include_str!("../README.md")]

pub mod config;
pub mod envelope;
pub mod error;
pub mod ids;
mod link;
mod partition;
pub mod queue;
mod reply;
mod scripts;

pub use config::QueueConfig;
pub use envelope::{Beat, Claim, Envelope, Epoch, LeaseRef, PriorityStats, Pushed, QueueStats, TraceContext};
pub use error::QueueError;
pub use ids::{
    InvalidPriority, InvalidQueueName, InvalidTenant, JobId, LeaseToken, MAX_NAME, Priority, QueueName,
    TenantId, WorkerId,
};
pub use queue::Queue;

/// At how many tenants per priority [`PriorityStats::oldest_ms`] looks.
pub const STATS_TENANTS: usize = 64;
