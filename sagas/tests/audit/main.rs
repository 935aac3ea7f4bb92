//! The auditor against real services: every kind of drift is planted and must be named, alone; what can be mended must be
//! clean after a repair. And readers, over the same documents.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod auditor;
mod dispatch;
mod fleet;
mod log;
mod points;
mod readers;
mod rows;
mod stage;
