//! Deliberate mistakes. A property that notices none of them would be worth nothing.

/// One mistake in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The end is written without the fence's predicate; the job's state is still looked at.
    FinishWithoutFence,
    /// The end is written whatever the row says.
    FinishWithoutAnyPredicate,
    /// A step is written without the fence's predicate.
    WriteWithoutFence,
    /// The fence is a number that Redis counts up at each claim, as the lease's token might be, and the take stores it.
    FenceFromRedis,
    /// The take looks at no state: an ended job is taken again.
    TakeOfEndedJobs,
    /// Redis is told before the ledger has committed.
    AckBeforeCommit,
    /// Ack removes the job whoever's lease it is.
    AckWithoutToken,
    /// A cancel of a running job takes it out of its list, where it may wait after a lost lease.
    ForgetOfRunningJobs,
    /// A worker registers its lease again over another's.
    RestoreOverOthers,
    /// The reaper doesn't wait for one lease after Redis lost data.
    ReapAtOnce,
    /// There is no reconciler.
    NoReconciler,
    /// There is no reaper.
    NoReaper,
}
