#![doc = include_str!("../README.md")]

mod auditor;
mod gatekeeper;
mod health;
mod process;
mod runner;

pub use auditor::AuditorSettings;
pub use health::MetricsRender;
pub use process::{USUAL_ADDR, WorkerError, WorkerSettings, run};
