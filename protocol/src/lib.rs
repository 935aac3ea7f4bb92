#![doc = include_str!("../README.md")]

pub mod bugs;
mod check;
pub mod reach;
pub mod saga;
pub mod state;
pub mod step;

pub use bugs::Bug;
pub use state::{Entry, Hold, Job, Phase, Row, RowState, State, Worker};
pub use step::{Action, Outcome};

/// Jobs in the model. The second can be left out by [`Bounds::jobs`].
pub const JOBS: usize = 2;
/// Workers in the model.
pub const WORKERS: usize = 2;

/// How often each thing that costs may happen. Everything else may happen at any time, so what the model leaves out
/// (grace periods, poll intervals) is covered by every possible timing.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Jobs that are accepted, 1 or 2.
    pub jobs: u8,
    /// Processes of workers that die.
    pub crashes: u8,
    /// Workers that stop and go on later, as zombies.
    pub pauses: u8,
    /// Leases that run out although their worker lives and isn't paused.
    pub delays: u8,
    /// Times that Redis loses everything.
    pub flushes: u8,
    /// Times that Redis starts again from an older copy of its data.
    pub restarts: u8,
    /// Times that a worker gives a job back.
    pub releases: u8,
    /// Cancels.
    pub cancels: u8,
    /// Producers that die between acceptance and push.
    pub lost_pushes: u8,
    /// Whether the reconciler may push a row long after it read it. Otherwise it reads and pushes at once, and only what
    /// Redis doesn't know.
    pub slow_reconciler: bool,
}

impl Bounds {
    /// Nothing goes wrong.
    pub const CALM: Self = Self {
        jobs: 2,
        crashes: 0,
        pauses: 0,
        delays: 0,
        flushes: 0,
        restarts: 0,
        releases: 0,
        cancels: 0,
        lost_pushes: 0,
        slow_reconciler: true,
    };
}

/// The lease-and-fence protocol (PROTOCOL.md 1, 2, 12, 14, 16, 18) as a state machine.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    /// How much may go wrong.
    pub bounds: Bounds,
    /// A deliberate mistake, to see that the properties would notice it.
    pub bug: Option<Bug>,
    /// Heartbeat and restore happen together, as one call of `Queue::heartbeat` does when nobody comes between.
    /// For traces that are replayed against the real queue.
    pub joint_heartbeat: bool,
}

impl Protocol {
    /// The protocol as it is.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, bug: None, joint_heartbeat: false }
    }

    /// The protocol with a mistake in it.
    pub fn with_bug(bounds: Bounds, bug: Bug) -> Self {
        Self { bug: Some(bug), ..Self::new(bounds) }
    }

    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }
}
