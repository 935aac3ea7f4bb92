#![doc = include_str!("../README.md")]

mod acceptance;
mod admission;
mod checks;
pub mod client;
mod dispatch;
pub mod error;
pub mod http;
pub mod maintain;
mod pacing;
mod policies;
mod reconciler;
mod relay;
pub mod settings;
mod stats;

pub use client::{Client, Durability, Receipt, new_job};
pub use error::{EnqueueError, MaintainError, ServeError, WaitError};
pub use http::{router, serve};
pub use maintain::maintain;
pub use sagas::stores::postgres::{
    accept::{Idempotency, NewJob},
    inspect::JobView,
    ledger::Cancel,
};
pub use settings::{Auth, ClientSettings, MaintainSettings, ProducerSettings};
