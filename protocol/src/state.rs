//! What the model knows: the ledger, Redis, the workers, and a few facts that only the properties look at.

use crate::{JOBS, WORKERS};

/// A job's state in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum RowState {
    /// Not accepted yet.
    #[default]
    Absent,
    /// Accepted, or given back.
    Waiting,
    /// Taken.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended by a person.
    Cancelled,
}

impl RowState {
    /// Whether the job is accepted and has not ended.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Waiting | Self::Running)
    }

    /// Whether the job has ended.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Cancelled)
    }
}

/// A row of the table `jobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, as in the real row and its history"
)]
pub struct Row {
    /// Its state.
    pub state: RowState,
    /// Granted with each take.
    pub fence: u8,
    /// Whether `run_at` has passed by Postgres' clock.
    pub due: bool,
    /// Whether `dispatched_at` is set.
    pub dispatched: bool,
    /// Whether `cancel_requested_at` is set.
    pub cancel: bool,
    /// Whether an unfinished saga has effects.
    pub saga: bool,
}

/// What Redis knows of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// In its list.
    Waiting,
    /// In the schedule.
    Scheduled {
        /// Whether its time has come by Redis' clock.
        due: bool,
    },
    /// With a worker.
    Leased {
        /// Of the claim. Only equality counts, so the smallest number is taken that nobody remembers.
        token: u8,
        /// Whether the lease has run out by Redis' clock.
        expired: bool,
    },
}

/// What the producer still has to do for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Producer {
    /// Nothing.
    #[default]
    Idle,
    /// Push a job that it accepted as dispatched.
    Push,
    /// It died before the push, and nobody has pushed the job since.
    Died,
}

/// What `cancel` answered, until the queue is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cancelled {
    /// The job has ended.
    Ended,
    /// Its run ends it.
    Requested,
}

/// One job, everywhere. Each has a queue of its own, so that claims choose freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, as in the real row and its history"
)]
pub struct Job {
    /// The ledger's row.
    pub row: Row,
    /// Redis' entry.
    pub entry: Option<Entry>,
    /// Whether this life of Redis' data has a name in this queue (`epoch` of the partition).
    pub named: bool,
    /// What the producer has to do.
    pub producer: Producer,
    /// A row that the reconciler or relay has read and not yet pushed; whether it was for later.
    pub read: Option<bool>,
    /// The queue is still to be told of a cancel.
    pub telling: Option<Cancelled>,
    /// The fence that Redis would count, for [`Bug::FenceFromRedis`](crate::Bug::FenceFromRedis).
    pub redis_fence: u8,
    /// Fact: how many takes were granted. Equals the fence unless there is a bug.
    pub takes: u8,
    /// Fact: `takes` when the end was committed first.
    pub ended_at: Option<u8>,
    /// Fact: an end was committed again.
    pub ended_twice: bool,
    /// Fact: a write of a run that is not the newest had an effect.
    pub stale_effect: bool,
    /// Fact: a lease was given to somebody although it had not run out.
    pub stolen: bool,
}

/// How far a worker has come with a claimed job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Leased, not taken.
    Claimed,
    /// Taken; nothing written yet.
    Taken,
    /// The first step is committed.
    Staged,
    /// Redis is to forget the job.
    Ended,
    /// The job is to go back to the queue.
    Returned {
        /// At a later time.
        later: bool,
    },
    /// Told Redis first: [`Bug::AckBeforeCommit`](crate::Bug::AckBeforeCommit).
    Acked,
}

/// A worker's knowledge of one claimed job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hold {
    /// Of the claim.
    pub token: u8,
    /// The life of the data in which the lease was last confirmed.
    pub life: u8,
    /// The run of the server in which it was.
    pub run: u8,
    /// Granted by the take; 0 before.
    pub fence: u8,
    /// Fact: the number of the take.
    pub take: u8,
    /// The fence that the claim brought, for [`Bug::FenceFromRedis`](crate::Bug::FenceFromRedis).
    pub redis_fence: u8,
    /// How far it is.
    pub phase: Phase,
    /// A heartbeat was told that the lease is gone with its data; `restore` follows.
    pub gone: bool,
}

/// A worker process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Worker {
    /// Stopped; it will go on and not know.
    pub paused: bool,
    /// What it holds, by job.
    pub holds: [Option<Hold>; JOBS],
}

/// What was used up of the [`Bounds`](crate::Bounds).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[allow(missing_docs)] // as in `Bounds`
pub struct Used {
    pub crashes: u8,
    pub pauses: u8,
    pub delays: u8,
    pub flushes: u8,
    pub restarts: u8,
    pub releases: u8,
    pub cancels: u8,
    pub lost_pushes: u8,
}

/// An older copy of Redis' data on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Saved {
    /// The life of the data that was saved.
    pub life: u8,
    /// Entry and whether the life was named, by job.
    pub jobs: [(Option<Entry>, bool); JOBS],
}

/// Everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct State {
    /// The jobs, in the ledger and in Redis.
    pub jobs: [Job; JOBS],
    /// The workers.
    pub workers: [Worker; WORKERS],
    /// Which life of the data Redis is in; each loss begins another.
    pub life: u8,
    /// Which run of the server it is.
    pub run: u8,
    /// Reapers wait for one lease, because Redis lost data.
    pub quiet: bool,
    /// What is on Redis' disk.
    pub saved: Option<Saved>,
    /// How much has gone wrong so far.
    pub used: Used,
}

impl State {
    /// The least of the states that differ from this one only in the numbers of jobs and workers.
    pub fn representative(&self) -> Self {
        let mut jobs = *self;
        jobs.jobs.reverse();
        for worker in &mut jobs.workers {
            worker.holds.reverse();
        }
        if let Some(saved) = &mut jobs.saved {
            saved.jobs.reverse();
        }
        let mut least = (*self).min(jobs);
        for mut both in [*self, jobs] {
            both.workers.reverse();
            least = least.min(both);
        }
        least
    }

    /// The smallest token that nobody remembers for a job.
    pub(crate) fn fresh_token(&self, job: usize) -> u8 {
        let leased = |entry: Option<Entry>| match entry {
            Some(Entry::Leased { token, .. }) => Some(token),
            _ => None,
        };
        (0..=u8::MAX)
            .find(|token| {
                leased(self.jobs[job].entry) != Some(*token)
                    && self.saved.and_then(|saved| leased(saved.jobs[job].0)) != Some(*token)
                    && self
                        .workers
                        .iter()
                        .all(|worker| worker.holds[job].is_none_or(|hold| hold.token != *token))
            })
            .unwrap_or(u8::MAX)
    }

    /// Everything has come to its end: each job ended, Redis holds none of them, nobody works on one.
    pub fn is_settled(&self, jobs: u8) -> bool {
        self.workers.iter().all(|worker| worker.holds.iter().all(Option::is_none))
            && self.jobs[..usize::from(jobs)]
                .iter()
                .all(|job| job.row.state.has_ended() && job.entry.is_none())
    }
}
