#![doc = include_str!("../README.md")]

pub mod ack_layer;
pub mod acker;
pub mod backend;
pub mod claimer;
pub mod config;
pub mod envelope;
pub mod error;
pub mod gates;
pub mod hand_over;
pub mod heartbeat;
pub mod ids;
mod inspect;
pub mod lease;
pub mod ledger;
pub mod lender;
mod link;
mod outage;
mod partition;
mod policies;
pub mod policy;
pub mod queue;
pub mod reaper;
mod record;
mod reply;
pub mod retries;
pub mod scheduler;
mod scripts;
mod upkeep;
mod wakeups;

pub use ack_layer::{AckLayer, NotRun};
pub use acker::{Acker, Done};
pub use backend::QueueBackend;
pub use claimer::{Claimer, ClaimerConfig, Job};
pub use config::QueueConfig;
pub use envelope::{
    Beat, Claim, Envelope, Epoch, LeaseRef, Place, PriorityStats, Pushed, QueueStats, TraceContext,
};
pub use error::QueueError;
pub use gates::Gates;
pub use hand_over::Jobs;
pub use heartbeat::{Heartbeat, HeartbeatConfig};
pub use ids::{
    InvalidPriority, InvalidQueueName, InvalidTenant, JobId, LeaseToken, MAX_NAME, Priority, QueueName,
    TenantId, WorkerId,
};
pub use lease::{Lease, LeaseLost};
pub use ledger::{Ledger, NoLedger};
pub use lender::Lender;
pub use policy::{Mode, PolicySet, QueuePolicy, Rate, TenantPolicy};
pub use queue::Queue;
pub use reaper::Reaper;
pub use retries::Retries;
pub use scheduler::Scheduler;

/// At how many tenants per priority [`PriorityStats::oldest_ms`] looks.
pub const STATS_TENANTS: usize = 64;
