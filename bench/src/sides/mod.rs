//! The sides that are compared. Each stores the same payloads and runs the same handler in the same apalis worker.

pub mod floor;
pub mod ledger;
pub mod ours;
pub mod peer;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use redis::aio::MultiplexedConnection;

use crate::payload::Payload;

/// Jobs of one script call, for every side.
pub const BATCH: usize = 100;
/// Jobs under way at once in one worker's apalis, for every side.
pub const CONCURRENCY: usize = 100;

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Side {
    /// This queue, without a ledger: leases, heartbeats, priorities and fairness on
    Ours,
    /// The same over the ledger in Postgres
    Ledger,
    /// apalis-redis, tuned: no leases, no events
    Peer,
    /// Two minimal scripts behind the same apalis worker
    Floor,
    /// The same two scripts without apalis
    FloorPlain,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Ledger => "ledger",
            Self::Peer => "peer",
            Self::Floor => "floor",
            Self::FloorPlain => "floor-plain",
        }
    }
}

/// How the jobs differ from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    /// Jobs belong to so many tenants in turn.
    pub tenants: u64,
    /// And have so many priorities.
    pub priorities: u8,
}

impl Spread {
    /// One tenant, the default priority.
    pub const NONE: Self = Self { tenants: 1, priorities: 1 };
}

/// Stores jobs.
pub enum Producer {
    Ours(ours::Producer),
    Peer(Box<peer::Producer>),
    Floor(floor::Producer),
}

impl Producer {
    pub async fn open(side: Side, url: &str, spread: Spread) -> anyhow::Result<Self> {
        Ok(match side {
            // What the ledger's producer does in Redis; it has one of its own.
            Side::Ours | Side::Ledger => Self::Ours(ours::Producer::open(url, spread).await?),
            Side::Peer => Self::Peer(Box::new(peer::Producer::open(url).await?)),
            Side::Floor | Side::FloorPlain => Self::Floor(floor::Producer::open(url).await?),
        })
    }

    /// One call.
    pub async fn push(&self, payloads: Vec<Payload>) -> anyhow::Result<()> {
        match self {
            Self::Ours(side) => side.push(&payloads).await,
            Self::Peer(side) => side.push(payloads).await,
            Self::Floor(side) => side.push(&payloads).await,
        }
    }

    /// Makes everything that was pushed ready for workers; only the peer needs it.
    pub async fn settle(&self) -> anyhow::Result<()> {
        match self {
            Self::Peer(side) => side.promote().await,
            Self::Ours(_) | Self::Floor(_) => Ok(()),
        }
    }

    /// Jobs that wait or are with a worker.
    pub async fn left(&self) -> anyhow::Result<u64> {
        match self {
            Self::Ours(side) => side.left().await,
            Self::Peer(side) => side.left().await,
            Self::Floor(side) => side.left().await,
        }
    }
}

/// What handlers count.
#[derive(Debug, Clone, Default)]
pub struct Counter {
    handled: Arc<AtomicU64>,
    /// Print how long each job took from its enqueue to its handler.
    tell: bool,
}

impl Counter {
    pub fn new(tell: bool) -> Self {
        Self { handled: Arc::default(), tell }
    }

    /// The whole work of a job.
    pub fn handle(&self, payload: Payload) {
        if self.tell {
            println!("picked {} {}", payload.number, payload.age().as_micros());
        }
        self.handled.fetch_add(1, Ordering::Relaxed);
    }

    pub fn handled(&self) -> u64 {
        self.handled.load(Ordering::Relaxed)
    }
}

/// A connection that waits as long as it takes.
pub async fn connect(url: &str) -> anyhow::Result<MultiplexedConnection> {
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
    Ok(redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await?)
}
