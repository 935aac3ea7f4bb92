#![doc = include_str!("../README.md")]

mod acceptance;
mod admission;
pub mod batch;
mod checks;
pub mod client;
mod collector;
pub mod cron;
mod dispatch;
pub mod error;
mod fast;
pub mod http;
pub mod maintain;
mod pacing;
mod policies;
mod reconciler;
mod refusals;
mod relay;
pub mod schedules;
pub mod settings;
mod stats;
pub mod timetable;

pub use batch::{BatchBuilder, BatchReceipt, OpenBatch};
pub use client::{Client, Durability, Receipt, new_job};
pub use cron::Cron;
pub use error::{EnqueueError, MaintainError, ServeError, WaitError};
pub use http::{router, serve};
pub use maintain::maintain;
pub use sagas::stores::postgres::{
    accept::{Idempotency, NewJob, Until},
    batches::{BatchId, BatchView, CallbackOn, Changed as BatchChanged},
    control::{Change, Changed, Selection},
    inspect::JobView,
    ledger::Cancel,
    schedules::{CatchUp, Schedule},
};
pub use schedules::{NewSchedule, ScheduleError, Schedules};
pub use settings::{Auth, ClientSettings, MaintainSettings, ProducerSettings};
