#![doc = include_str!("../README.md")]

mod account;
mod cluster;
mod error;
mod launch;
mod logs;
mod ports;
mod postgres;
mod probe;
mod process;
mod proxy;
mod redis;
mod redis_process;
mod server;
mod stack;
pub mod testing;
mod vectors;

pub use crate::error::StartError;
pub use crate::postgres::{Postgres, PostgresEngine, PostgresOptions};
pub use crate::process::ProcessId;
pub use crate::proxy::{Link, Proxy};
pub use crate::redis::{Redis, RedisEngine, RedisOptions, RedisRole};
pub use crate::redis_process::RedisProcess;
pub use crate::server::{Engine, READY_WITHIN, Server};
pub use crate::stack::{Service, ServiceStatus, Stack, StackOptions, StackStatus, State};
pub use crate::vectors::{BINARY_VARIABLE, Vectors, VectorsEngine, VectorsOptions};
