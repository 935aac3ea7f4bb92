//! From a claimed job to an answer for Redis: take, run, ack.

use std::{sync::Arc, time::Duration};

use queue::{Acker, Cancels, Done, Job, Lease};
use sagas::{
    Dependency, StepError,
    coalescing::{Coalescer, Limits},
    engine::{CallLimits, Delivery, Ended, Engine},
    stores::postgres::{
        ending::{GivenBack, Run},
        take::{Take, TakeBatch, TakeItem, TakenJob},
    },
};
use tokio::{sync::RwLock, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::gatekeeper::Gatekeeper;

/// After so many deliveries that ended in a lost lease a job runs alone in its process (PROTOCOL.md 13).
const ALONE_AFTER: i32 = 2;
/// How long a job waits that has to run alone, while others wait out an outage.
const ALONE_LATER: Duration = Duration::from_secs(10);
/// How long a job waits that the ledger refuses to hand out.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// Runs claimed jobs. One for each process.
pub(crate) struct Runner {
    engine: Engine,
    take: Coalescer<TakeBatch>,
    acker: Acker,
    gatekeeper: Arc<Gatekeeper>,
    limits: CallLimits,
    /// Set when running jobs have to go back.
    stop: CancellationToken,
    /// Held shared by every job, and exclusively by one that may kill the process.
    company: RwLock<()>,
    /// The pivot looks for a request to cancel itself; this only saves work.
    cancels: Cancels,
}

impl Runner {
    pub fn new(
        engine: Engine,
        acker: Acker,
        gatekeeper: Arc<Gatekeeper>,
        limits: CallLimits,
        stop: CancellationToken,
    ) -> Self {
        let take = Coalescer::spawn(engine.take(), Limits::default());
        let postgres = engine.postgres().clone();
        let cancels = Cancels::new(move |jobs| {
            let postgres = postgres.clone();
            async move { postgres.in_time(postgres.cancel_requests(&jobs)).await }
        });
        Self { engine, take, acker, gatekeeper, limits, stop, company: RwLock::new(()), cancels }
    }

    /// Brings one claimed job to the end that this delivery can give it. Its slot is free when this returns.
    pub async fn process(self: Arc<Self>, job: Job) {
        let envelope = Arc::clone(&job.envelope);
        self.gatekeeper.saw(&envelope.queue, &envelope.kind);
        let span = tracing::info_span!("job", id = %envelope.id, kind = envelope.kind, queue = %envelope.queue, tenant = %envelope.tenant);
        let trace = envelope.trace.as_ref();
        telemetry::set_parent(
            &span,
            trace.map(|t| t.traceparent.as_str()),
            trace.and_then(|t| t.tracestate.as_deref()),
        );
        telemetry::record_queue_wait(trace, envelope.run_at_ms.unwrap_or(envelope.enqueued_at_ms));
        let lease = job.lease.clone();
        let done = async {
            let company = self.company.read().await;
            let taken = match self.take(&job).instrument(tracing::info_span!("claim")).await {
                Some(Take::Taken(taken)) => taken,
                Some(Take::Gone) => return Some(Done::Ack),
                Some(Take::NotYet(wait)) => return Some(Done::Release(wait)),
                None => return None,
            };
            if taken.lost_deliveries < ALONE_AFTER {
                return self.run(*taken, &lease).await;
            }
            drop(company);
            // Rare, and as large as all else here: not part of every job's memory.
            Box::pin(self.run_alone(*taken, &lease)).await
        }
        .instrument(span)
        .await;
        if let Some(done) = done {
            self.acker.done(&lease, done).await;
        }
    }

    /// Takes the job, waiting out an outage of the ledger. `None`: the lease is lost.
    async fn take(&self, job: &Job) -> Option<Take> {
        let item = match TakeItem::of(&job.envelope) {
            Ok(item) => item,
            Err(wait) => return Some(Take::NotYet(wait)),
        };
        loop {
            let ready = async {
                self.engine.breakers().closed(Dependency::Postgres).await;
                job.lease.valid(self.limits.lease_margin * 2).await
            };
            tokio::select! {
                () = self.stop.cancelled() => return Some(Take::NotYet(Duration::ZERO)),
                ready = ready => ready.ok()?,
            }
            let within =
                self.limits.call_timeout.min(job.lease.remaining().saturating_sub(self.limits.lease_margin));
            match self.take.call(item.clone(), Instant::now() + within).await {
                Ok(take) => return Some(take),
                // It alone: a batch is split until the guilty one is found. Tried again here it would
                // hold its slot, its lease and the company for nothing.
                Err(error) if !error.class.is_retryable() => {
                    tracing::error!(%error, wait = ?REFUSED_FOR, "the ledger refuses the job; it is put off");
                    return Some(Take::NotYet(REFUSED_FOR));
                }
                Err(error) => {
                    if !self.engine.breakers().confirm_outage(Dependency::Postgres, &error).await {
                        tracing::warn!(%error, "the take failed; trying again");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        }
    }

    async fn run(&self, taken: TakenJob, lease: &Lease) -> Option<Done> {
        let watched = self.cancels.watch(taken.id, taken.fence.0);
        let delivery = Delivery {
            job: Arc::new(taken),
            lease: lease.clone(),
            cancel: watched.token.clone(),
            stop: self.stop.clone(),
        };
        match self.engine.run(delivery).await {
            Ended::Ack => Some(Done::Ack),
            Ended::Release(wait) => Some(Done::Release(wait)),
            Ended::Abandoned => None,
        }
    }

    /// Waits until nothing else runs in this process, then runs the job, so that only its own doing is counted. Not through an
    /// outage: whoever waits that out keeps its company, and nobody else would come in for as long.
    async fn run_alone(&self, taken: TakenJob, lease: &Lease) -> Option<Done> {
        tracing::info!(lost = taken.lost_deliveries, "this job's workers were lost before: it runs alone");
        let alone = tokio::select! {
            biased;
            () = lease.lost().cancelled_owned() => return None,
            () = self.stop.cancelled() => Err(Duration::ZERO),
            () = self.engine.breakers().any_open() => Err(ALONE_LATER),
            alone = self.company.write() => Ok(alone),
        };
        let (id, fence, postgres) = (taken.id, taken.fence, self.engine.postgres());
        let _alone = match alone {
            Ok(alone) => alone,
            Err(wait) => {
                let run = Run {
                    job_id: id,
                    fence,
                    saga_id: taken.saga.as_ref().map(|open| open.id),
                    worker: self.engine.worker().clone(),
                    started_at: chrono::Utc::now(),
                };
                return match postgres.in_time(postgres.release(&run, wait, GivenBack::Later)).await {
                    Ok(Some(wait)) => Some(Done::Release(wait)),
                    _ => None,
                };
            }
        };
        match postgres.in_time(postgres.mark_alone(id, fence)).await {
            Ok(true) => self.run(taken, lease).await,
            Ok(false) => None,
            Err(error) => {
                tracing::warn!(error = %StepError::from(error), "left to the next delivery");
                None
            }
        }
    }
}
