//! The saga engine: runs definitions over a log in Postgres, forward or backward, under a fence.
//!
//! [`Saga`] and [`Step`] define what is done; [`Engine::run`] does it for one taken job; [`StepContext`] is how a step
//! reaches the outside; [`Breakers`] pause what needs a dependency that is down.

pub mod breaker;
mod context;
mod definition;
mod reporter;
mod run;
mod waits;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
pub use breaker::{Breakers, Probe};
pub use context::{CallLimits, RunToken, StepContext};
pub use definition::{AnyBranch, Branch, Commits, Group, JobRetry, Keep, RetryPolicy, Saga, Step};
use queue::{Lease, WorkerId};
use reporter::Reporter;
use tokio_util::sync::CancellationToken;
pub use waits::Child;

use crate::{
    coalescing::{Coalescer, Limits},
    error::{Class, Dependency, StepError, StoreError, storable},
    results::MAX_RESULT,
    stores::postgres::{
        Postgres,
        compensation::TurnBatch,
        ending::{CompleteBatch, Failure, FinishBatch, GivenBack, Parking, Run, Verdict},
        forward::{KeepBatch, PivotBatch},
        stage::BeginBatch,
        take::{TakeBatch, TakenJob, UNREADABLE_FOR, UNROUTABLE_AFTER, look_again_in},
    },
};

/// Limits and policies of the engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineSettings {
    /// Limits of calls.
    pub calls: CallLimits,
    /// Wait before the second attempt of a job; doubles with each, with full jitter.
    pub retry_base: Duration,
    /// Longest wait between attempts.
    pub retry_cap: Duration,
    /// Losses while alone in a process after which a job is poison (PROTOCOL.md 13).
    pub delivery_limit: i32,
    /// How long a job of an unknown kind waits for a worker that knows it (PROTOCOL.md 15).
    pub unroutable_after: Duration,
    /// Bytes of a result's JSON at most.
    pub max_result: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            calls: CallLimits { call_timeout: Duration::from_secs(5), lease_margin: Duration::from_secs(2) },
            retry_base: Duration::from_secs(1),
            retry_cap: Duration::from_secs(300),
            delivery_limit: 3,
            unroutable_after: UNROUTABLE_AFTER,
            max_result: MAX_RESULT,
        }
    }
}

/// Longest time for which an error or a step can put a job off.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(366 * 24 * 3600);

/// What is to be done with the job's entry in Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The job has ended: remove it.
    Ack,
    /// The job waits in the ledger: put it back for so long.
    Release(Duration),
    /// The job is somebody else's: leave it alone.
    Abandoned,
}

/// What a delivery brings along beside its job.
pub struct Delivery {
    /// The taken job.
    pub job: Arc<TakenJob>,
    /// Its lease.
    pub lease: Lease,
    /// A person wants the job to end.
    pub cancel: CancellationToken,
    /// This process wants to end: give the job back.
    pub stop: CancellationToken,
}

/// A definition without its data type.
#[async_trait]
pub(crate) trait AnySaga: Send + Sync {
    fn needs(&self) -> &[Dependency];
    /// Whether the take may write a run's first row.
    fn begins_with_take(&self) -> bool;
    fn points(&self) -> Vec<String>;
    async fn drive(&self, engine: &Engine, delivery: Delivery) -> Result<Ended, StoreError>;
}

/// The engine of one process; clones share everything.
#[derive(Clone)]
pub struct Engine {
    pub(crate) postgres: Postgres,
    pub(crate) settings: EngineSettings,
    pub(crate) breakers: Breakers,
    pub(crate) worker: WorkerId,
    reporter: Reporter,
    begin: Coalescer<BeginBatch>,
    keep: Coalescer<KeepBatch>,
    pivot: Coalescer<PivotBatch>,
    complete: Coalescer<CompleteBatch>,
    turn: Coalescer<TurnBatch>,
    finish: Coalescer<FinishBatch>,
    sagas: Arc<Versions>,
}

/// By kind and version.
type Versions = HashMap<&'static str, BTreeMap<i32, Arc<dyn AnySaga>>>;

/// The sagas that a worker knows, and how it asks after the stores of their own. [`Stores::registry`](crate::kinds::Stores::registry)
/// has Flotilla's sagas; a user adds their own to it, or begins with an empty one.
#[derive(Default)]
pub struct Registry {
    sagas: Versions,
    probes: Vec<(Dependency, Probe)>,
}

impl Registry {
    /// Adds a definition. Of one kind several versions can be there: new runs are made by the newest, and a run that was
    /// begun is continued by the version that began it. A later definition of the same kind and version replaces an
    /// earlier one.
    ///
    /// # Panics
    /// If the definition contradicts itself: two steps or branches of one name, a group as the pivot, a step that says it
    /// commits the saga's first row and is not the first, or one that ends the job and is not the last.
    #[must_use]
    pub fn with<S: Saga>(mut self, saga: S) -> Self {
        check(&saga);
        let versions = self.sagas.entry(saga.kind()).or_default();
        versions.insert(saga.version(), Arc::new(run::Registered(saga)));
        self
    }

    /// Knows nothing of this kind, as a release before it came.
    #[cfg(feature = "faults")]
    pub(crate) fn without(mut self, kind: Option<&str>) -> Self {
        self.sagas.retain(|known, _| Some(*known) != kind);
        self
    }

    /// Gives a store of the user's own a circuit breaker. `ask` tells within about a second, on a connection of its own,
    /// whether the store answers; it is asked after calls that failed as an outage does, and until the store is back.
    /// Without one, such failures are charged to the job.
    #[must_use]
    pub fn probe<F, A>(mut self, dependency: Dependency, ask: F) -> Self
    where
        F: Fn() -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), StoreError>> + Send + 'static,
    {
        self.probes.push((dependency, Arc::new(move || Box::pin(ask()))));
        self
    }

    /// The probes of the users' stores, for [`Breakers::new`].
    pub fn probes(&self) -> Vec<(Dependency, Probe)> {
        self.probes.clone()
    }
}

fn check<S: Saga>(saga: &S) {
    let (kind, steps) = (saga.kind(), saga.steps());
    let mut names = HashSet::new();
    for (i, step) in steps.iter().enumerate() {
        let own = [step.name()].into_iter().chain(step.branches().iter().map(|branch| branch.name()));
        for name in own {
            assert!(names.insert(name), "saga {kind}: two steps are called {name:?}");
        }
        let (commits, group) = (step.commits(), !step.branches().is_empty());
        assert!(
            commits != Commits::Begin || i == 0,
            "saga {kind}: {:?} commits the first row and is not first",
            step.name()
        );
        assert!(
            commits != Commits::End || i + 1 == steps.len(),
            "saga {kind}: {:?} ends the job and is not last",
            step.name()
        );
        assert!(!group || i != saga.pivot(), "saga {kind}: the group {:?} can't be the pivot", step.name());
        assert!(
            !group || matches!(commits, Commits::Nothing | Commits::Data),
            "saga {kind}: the group {:?} can't commit by itself",
            step.name()
        );
    }
}

impl Engine {
    /// An engine that runs the registered sagas. Needs a tokio runtime, on which it starts tasks that end with its last
    /// clone.
    pub fn new(
        postgres: Postgres,
        breakers: Breakers,
        worker: WorkerId,
        settings: EngineSettings,
        registry: Registry,
    ) -> Self {
        Self {
            settings,
            breakers,
            worker,
            reporter: Reporter::new(postgres.clone()),
            begin: Coalescer::spawn(BeginBatch(postgres.clone()), Limits::default()),
            keep: Coalescer::spawn(KeepBatch(postgres.clone()), Limits::default()),
            pivot: Coalescer::spawn(PivotBatch(postgres.clone()), Limits::default()),
            complete: Coalescer::spawn(CompleteBatch(postgres.clone()), Limits::default()),
            turn: Coalescer::spawn(TurnBatch(postgres.clone()), Limits::default()),
            finish: Coalescer::spawn(FinishBatch(postgres.clone()), Limits::default()),
            postgres,
            sagas: Arc::new(registry.sagas),
        }
    }

    /// The ledger.
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// Who runs the jobs.
    pub fn worker(&self) -> &WorkerId {
        &self.worker
    }

    /// The breakers, for those who pause queues.
    pub fn breakers(&self) -> &Breakers {
        &self.breakers
    }

    /// The take of this engine's worker.
    pub fn take(&self) -> TakeBatch {
        let begins = self.sagas.iter().filter_map(|(kind, versions)| {
            let (version, newest) = versions.last_key_value()?;
            newest.begins_with_take().then_some((*kind, *version))
        });
        TakeBatch::new(self.postgres.clone(), self.worker.clone())
            .beginning(begins.collect())
            .knowing(self.sagas.keys().copied().collect())
    }

    /// What must answer for jobs of this kind to be worth claiming. Jobs of unknown kinds need the ledger alone.
    pub fn needs(&self, kind: &str) -> &[Dependency] {
        self.newest(kind).map_or(&[Dependency::Postgres], |saga| saga.needs())
    }

    fn newest(&self, kind: &str) -> Option<&Arc<dyn AnySaga>> {
        self.sagas.get(kind)?.values().next_back()
    }

    /// What must answer for a queue's jobs to be worth claiming: all that the kinds need which wait there by default.
    pub fn queue_needs(&self, queue: &str) -> Vec<Dependency> {
        let mut needs: Vec<Dependency> = self
            .sagas
            .iter()
            .filter(|(kind, _)| crate::kinds::default_queue(kind) == queue)
            .flat_map(|(_, versions)| versions.values())
            .flat_map(|saga| saga.needs().iter().copied())
            .chain([Dependency::Postgres])
            .collect();
        needs.sort_unstable();
        needs.dedup();
        needs
    }

    /// The names of all fault points at the steps of all registered sagas, for the crash matrix.
    pub fn fault_points(&self) -> Vec<String> {
        let sagas = self.sagas.values().flat_map(BTreeMap::values);
        let mut points: Vec<String> = sagas.flat_map(|saga| saga.points()).collect();
        points.sort();
        points.dedup();
        points
    }

    /// Runs one taken job to whatever end this delivery can bring it. Never fails: what can't be settled now is left to
    /// the next delivery, as after a crash.
    pub async fn run(&self, delivery: Delivery) -> Ended {
        let job = Arc::clone(&delivery.job);
        let begun = job.saga.as_ref().map(|open| open.definition_version);
        let saga = match begun {
            Some(version) => self.sagas.get(job.kind.as_str()).and_then(|versions| versions.get(&version)),
            None => self.newest(&job.kind),
        };
        let done = match (saga, begun) {
            // Boxed: statements are large futures, and these are not of every run.
            _ if job.unreadable.is_some() => Box::pin(self.unreadable(delivery)).await,
            (Some(saga), _) => saga.drive(self, delivery).await,
            (None, Some(version)) if self.sagas.contains_key(job.kind.as_str()) => {
                Box::pin(self.other_version(delivery, version)).await
            }
            (None, _) => Box::pin(self.unroutable(delivery)).await,
        };
        match done {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(job = %job.id, %error, "left to the next delivery");
                Ended::Abandoned
            }
        }
    }

    /// A payload that this worker has no key for goes back like an unknown kind: another worker may have it, or this one
    /// after a restart with the right keys.
    async fn unreadable(&self, delivery: Delivery) -> Result<Ended, StoreError> {
        let job = &delivery.job;
        let why = format!("payload: {}", job.unreadable.as_deref().unwrap_or_default());
        tracing::warn!(job = %job.id, why, "a payload can't be read here");
        self.postgres.in_time(self.postgres.note_error(job.id, job.fence, &why)).await?;
        self.unroutable(delivery).await
    }

    /// A run begun by other steps than those known here is left to a worker that has them.
    async fn other_version(&self, delivery: Delivery, version: i32) -> Result<Ended, StoreError> {
        let job = &delivery.job;
        let known: Vec<String> = self
            .sagas
            .get(job.kind.as_str())
            .map(|versions| versions.keys().map(|version| format!("v{version}")).collect())
            .unwrap_or_default();
        let why = format!(
            "the run was begun by v{version} of {:?}, and the worker that had it last knows {}: it waits for a worker that knows v{version}",
            job.kind,
            known.join(", ")
        );
        tracing::error!(job = %job.id, why, "released uncharged");
        self.postgres.in_time(self.postgres.note_error(job.id, job.fence, &why)).await?;
        let run = Run {
            job_id: job.id,
            fence: job.fence,
            saga_id: job.saga.as_ref().map(|open| open.id),
            worker: self.worker.clone(),
            started_at: chrono::Utc::now(),
        };
        let release = self.postgres.release(&run, UNREADABLE_FOR, GivenBack::Later);
        let kept = self.postgres.in_time(release).await?;
        Ok(kept.map_or(Ended::Abandoned, Ended::Release))
    }

    /// A kind that this worker does not know goes back uncharged, for a newer worker; it is dead only when none has
    /// come for long (PROTOCOL.md 15). If a run had begun, its effects may stand: then it is parked.
    async fn unroutable(&self, delivery: Delivery) -> Result<Ended, StoreError> {
        let job = &delivery.job;
        // What this take began has done nothing.
        let begun = job.saga.as_ref().filter(|open| !open.fresh);
        let run = Run {
            job_id: job.id,
            fence: job.fence,
            saga_id: begun.map(|open| open.id),
            worker: self.worker.clone(),
            started_at: chrono::Utc::now(),
        };
        if job.cancel_requested && begun.is_none() {
            let kept = self.postgres.in_time(self.postgres.finish(&run, &Verdict::Cancelled, &[])).await?;
            return Ok(if kept { Ended::Ack } else { Ended::Abandoned });
        }
        // A run that has begun is never left half done: it waits for its key.
        let may_die = job.unreadable.is_none() || begun.is_none();
        if may_die
            && (job.unroutable_for.is_some_and(|time| time >= self.settings.unroutable_after)
                || self.settings.unroutable_after.is_zero())
        {
            let error = match &job.unreadable {
                Some(why) => StepError::permanent(
                    "unreadable_payload",
                    format!(
                        "no worker could read the payload for {:?}: {why}",
                        self.settings.unroutable_after
                    ),
                ),
                None => StepError::permanent(
                    "unknown_kind",
                    format!(
                        "no worker has known the kind {:?} for {:?}; known here: {}",
                        job.kind,
                        self.settings.unroutable_after,
                        {
                            let mut known: Vec<_> = self.sagas.keys().copied().collect();
                            known.sort_unstable();
                            known.join(", ")
                        }
                    ),
                ),
            };
            let kept = if let Some(open) = begun {
                let error = format!("{error}; its run was begun by v{}", open.definition_version);
                tracing::error!(saga = %open.id, job = %job.id, error, "saga parked: it needs a person");
                let past_pivot = open.pivot_begun;
                let parking = Parking { verdict: None, error: &error, past_pivot, progress: None };
                self.postgres.in_time(self.postgres.park(&run, &parking, &[])).await?
            } else {
                let verdict = Verdict::Dead { failure: failure(&error) };
                self.postgres.in_time(self.postgres.finish(&run, &verdict, &[])).await?
            };
            delivery.lease.note_dead();
            return Ok(if kept { Ended::Ack } else { Ended::Abandoned });
        }
        let waited = job.unroutable_for.unwrap_or_default();
        let (delay, given_back) = if may_die {
            (look_again_in(self.settings.unroutable_after, waited), GivenBack::Unroutable(waited))
        } else {
            (UNREADABLE_FOR, GivenBack::Later)
        };
        let why = job.unreadable.as_deref().unwrap_or("unknown kind");
        tracing::info!(job = %job.id, kind = job.kind, ?delay, why, "released uncharged");
        let kept = self.postgres.in_time(self.postgres.release(&run, delay, given_back)).await?;
        Ok(kept.map_or(Ended::Abandoned, Ended::Release))
    }

    /// The wait before a job's next attempt: exponential with full jitter, or what the error asks for.
    pub(crate) fn retry_in(&self, policy: JobRetry, attempts: i32, error: &StepError) -> Duration {
        let exponent = u32::try_from(attempts).unwrap_or(0).min(20);
        let (base, cap) =
            (policy.base.unwrap_or(self.settings.retry_base), policy.cap.unwrap_or(self.settings.retry_cap));
        let jittered = queue::retries::back_off(base, cap, exponent, rand::random());
        jittered.max(error.retry_after().unwrap_or_default().min(LONGEST_WAIT))
    }
}

/// The durable form of an error.
pub(crate) fn failure(error: &StepError) -> Failure {
    let class = error.class().unwrap_or(Class::Permanent);
    let code = match error {
        // A store's refusal of this job's own data is named for that, not for the store.
        StepError::Store(e) if e.class == Class::Data => "refused_data".to_owned(),
        StepError::Store(e) => format!("{}_{}", e.dependency.name(), e.class.name()),
        other => other.code().to_owned(),
    };
    let text = storable(error.to_string());
    let chain: Vec<String> = text.split(": ").map(str::to_owned).collect();
    Failure { class, code, error: text, chain }
}

/// The step's state as it is kept when a job goes back mid-run.
pub(crate) fn encode<D: serde::Serialize>(data: &D) -> Result<serde_json::Value, StoreError> {
    let refused = |why: String| StoreError::new(Dependency::Postgres, Class::Permanent, why);
    let encoded = run::unless_it_panics(|| serde_json::to_value(data))
        .map_err(|panic| refused(panic.to_string()))?
        .map_err(|error| refused(error.to_string()))?;
    // The log would keep it, and no delivery could read it again.
    if queue::is_too_deep(&encoded) {
        let why = format!("the run's data are nested deeper than {} levels", queue::MAX_DEPTH);
        return Err(refused(why));
    }
    Ok(encoded)
}
