#![doc = include_str!("../README.md")]

mod canceller;
mod gatekeeper;
mod health;
mod process;
mod runner;

pub use health::MetricsRender;
pub use process::{WorkerError, WorkerSettings, run, run_with};
