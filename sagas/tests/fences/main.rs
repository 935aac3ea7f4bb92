//! The rules of `PROTOCOL.md` that the ledger keeps, each tested on the statements that keep it, over a real Postgres.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod batches;
mod classes;
mod control;
mod document_order;
mod encryption;
mod ending;
#[cfg(feature = "faults")]
#[path = "../itself/mod.rs"]
mod itself;
mod keys;
mod ledger;
mod letters;
mod lock_order;
mod lookups;
mod outbox;
mod parked;
mod progress;
mod retention;
mod runs;
mod stale_writes;
mod steps;
mod sweeps;
mod taking;
mod transitions;
#[cfg(feature = "faults")]
mod unfenced;
mod zombies;
