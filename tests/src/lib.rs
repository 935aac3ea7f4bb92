#![doc = include_str!("../README.md")]
// This crate only serves tests: a condition that does not hold is the test's failure, said at once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod faults;
mod fleet;
mod process;
mod reader;
mod subject;
mod texts;
mod waiting;

pub use faults::{Faults, Place, Way};
pub use fleet::{Fleet, TENANT};
pub use process::{WorkerBuilder, WorkerProcess};
pub use reader::{History, Reader, Sight};
pub use subject::{Outcome, PROBES, Subject};
pub use texts::text;
pub use waiting::{LONG, SHORT, wait_until};
