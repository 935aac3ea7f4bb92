//! The subcommands, one file each.

pub mod audit;
pub mod batches;
pub mod bench;
pub mod breakers;
pub mod dev;
pub mod dlq;
pub mod documents;
pub mod encryption;
pub mod enqueue;
pub mod events;
pub mod import;
pub mod jobs;
pub mod keys;
pub mod migrate;
pub mod producer;
pub mod queues;
pub mod sagas;
pub mod schedules;
pub mod search;
pub mod stats;
pub mod tenants;
pub mod worker;
