#![doc = include_str!("../README.md")]

pub mod ack_layer;
pub mod acker;
pub mod address;
pub mod backend;
pub mod board;
pub mod breakers;
pub mod cancels;
pub mod claimer;
pub mod config;
pub mod dial;
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
mod listing;
mod outage;
mod partition;
mod policies;
pub mod policy;
pub mod queue;
mod rates;
pub mod reaper;
mod record;
pub mod registry;
mod reply;
mod rests;
pub mod retries;
pub mod roles;
mod rounds;
pub mod scheduler;
mod scripts;
mod slots;
mod tls;
mod upkeep;
mod wakeups;

pub use ack_layer::{AckLayer, NotRun, Snooze};
pub use acker::{Acker, Done};
pub use address::Access;
pub use backend::QueueBackend;
pub use board::{Board, JsonCodec};
pub use breakers::{BreakerBoard, BreakerNews, BreakerReport};
pub use cancels::Cancels;
pub use claimer::{Claimer, ClaimerConfig, Job};
pub use config::QueueConfig;
pub use dial::Dialer;
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
pub use listing::{Listed, ListedState};
pub use policy::{Mode, PolicySet, QueuePolicy, Rate, TenantPolicy};
pub use queue::Queue;
pub use rates::{Ended, Rates};
pub use reaper::Reaper;
pub use record::{MAX_DEPTH, is_too_deep};
pub use registry::{LivingWorker, Presence};
pub use retries::Retries;
pub use roles::{Roles, RolesConfig};
pub use scheduler::Scheduler;

/// At how many tenants per priority [`PriorityStats::oldest_ms`] looks.
pub const STATS_TENANTS: usize = 64;
