#![doc = include_str!("../README.md")]

pub mod audit;
pub mod batch_size;
pub mod chunking;
pub mod coalescing;
pub mod encryption;
pub mod engine;
pub mod error;
pub mod fault;
pub mod janitor;
pub mod kinds;
pub mod redaction;
pub mod results;
pub mod search;
pub mod standing;
pub mod state;
pub mod stores;

pub use async_trait::async_trait;
pub use engine::{Branch, Child, Commits, Group, JobRetry, Registry, RetryPolicy, Saga, Step, StepContext};
pub use error::{Class, Dependency, StepError, StoreError};
pub use state::{JobState, RunState};
pub use stores::postgres::{Fence, take::TakenJob, waits::ChildEnd};
