#![doc = include_str!("../README.md")]

mod account;
mod cluster;
mod error;
mod launch;
mod logs;
mod ports;
mod postgres;
mod process;
mod redis;
mod server;
pub mod testing;
mod vectors;

pub use crate::error::StartError;
pub use crate::postgres::{Postgres, PostgresEngine, PostgresOptions};
pub use crate::process::ProcessId;
pub use crate::redis::{Redis, RedisEngine, RedisOptions, RedisRole};
pub use crate::server::{Engine, READY_WITHIN, Server};
pub use crate::vectors::{BINARY_VARIABLE, Vectors, VectorsEngine, VectorsOptions};
