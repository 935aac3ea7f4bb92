#![doc = include_str!("../README.md")]

mod acceptance;
mod admission;
pub mod batch;
mod checks;
pub mod client;
mod collector;
mod dispatch;
pub mod error;
pub mod http;
pub mod maintain;
mod pacing;
mod reconciler;
mod relay;
pub mod settings;
mod stats;

pub use batch::{BatchBuilder, BatchReceipt, OpenBatch};
pub use client::{Client, Durability, Receipt, new_job};
pub use error::{EnqueueError, MaintainError, ServeError, WaitError};
pub use http::{router, serve};
pub use maintain::maintain;
pub use sagas::stores::postgres::{
    accept::{Idempotency, NewJob},
    batches::{BatchId, BatchView, CallbackOn, Changed},
    inspect::JobView,
    ledger::Cancel,
};
pub use settings::{Auth, ClientSettings, MaintainSettings, ProducerSettings};
