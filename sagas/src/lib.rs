#![doc = include_str!("../README.md")]

pub mod audit;
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
pub mod stores;

pub use error::{Class, Dependency, StepError, StoreError};
