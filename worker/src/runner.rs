//! From a claimed job to an answer for Redis: take, run, ack.

use std::{sync::Arc, time::Duration};

use queue::{Acker, Cancels, Done, Job, Lease};
use sagas::{
    Dependency, StepError,
    coalescing::{Coalescer, Limits},
    engine::{CallLimits, Delivery, Ended, Engine, breaker::State},
    stores::postgres::{
        ending::{GivenBack, Run},
        take::{Take, TakeBatch, TakeItem, TakenJob, refused_for},
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
                Err(error) => {
                    if let Some(wait) = refused_for(&error) {
                        tracing::error!(%error, ?wait, "the ledger refuses the job; it is put off");
                        return Some(Take::NotYet(wait));
                    }
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
        let breakers = self.engine.breakers();
        let ready = self.engine.needs(&taken.kind).iter().all(|need| breakers.state(*need) == State::Closed);
        // In an idle process it has nobody to wait for, whatever else is away.
        let idle = if ready && !self.stop.is_cancelled() { self.company.try_write().ok() } else { None };
        let alone = if let Some(alone) = idle {
            Ok(alone)
        } else {
            tokio::select! {
                biased;
                () = lease.lost().cancelled_owned() => return None,
                () = self.stop.cancelled() => Err(Duration::ZERO),
                () = breakers.any_open() => Err(ALONE_LATER),
                alone = self.company.write() => Ok(alone),
            }
        };
        let _alone = match alone {
            Ok(alone) => alone,
            Err(wait) => return self.put_off(&taken, lease, wait).await,
        };
        let (id, fence, postgres) = (taken.id, taken.fence, self.engine.postgres());
        match postgres.in_time(postgres.mark_alone(id, fence)).await {
            Ok(true) => self.run(taken, lease).await,
            Ok(false) => None,
            Err(error) => {
                tracing::warn!(error = %StepError::from(error), "left to the next delivery");
                None
            }
        }
    }

    /// Gives back a job whose turn alone doesn't come, once the ledger can be told: a lease that runs out is a delivery that was lost.
    async fn put_off(&self, taken: &TakenJob, lease: &Lease, wait: Duration) -> Option<Done> {
        tokio::select! {
            biased;
            () = lease.lost().cancelled_owned() => return None,
            () = self.stop.cancelled() => {}
            () = self.engine.breakers().closed(Dependency::Postgres) => {}
        }
        let run = Run {
            job_id: taken.id,
            fence: taken.fence,
            saga_id: taken.saga.as_ref().map(|open| open.id),
            worker: self.engine.worker().clone(),
            started_at: chrono::Utc::now(),
        };
        let postgres = self.engine.postgres();
        match postgres.in_time(postgres.release(&run, wait, GivenBack::Later)).await {
            Ok(kept) => kept.map(Done::Release),
            Err(error) => {
                tracing::warn!(%error, "left to the next delivery");
                None
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::future::pending;

    use devstack::testing::TestServices;
    use queue::{Gates, Heartbeat, HeartbeatConfig, Queue, QueueConfig, QueueName, TenantId, WorkerId};
    use sagas::{
        Class, StoreError,
        coalescing::Batch,
        engine::{Breakers, EngineSettings, Probe, Registry},
        stores::postgres::{Postgres, PostgresConfig, accept::NewJob},
    };

    use super::*;

    const KIND: &str = "unknown";

    /// A runner that knows no kind, and gives up at once what it does not know.
    struct Stage {
        runner: Runner,
        postgres: Postgres,
        queue: Queue,
        heartbeat: Heartbeat,
        services: TestServices,
    }

    impl Stage {
        async fn new() -> Self {
            let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
            let config = PostgresConfig {
                call_timeout: Duration::from_secs(1),
                ..PostgresConfig::new(services.postgres().url())
            };
            let postgres = Postgres::connect(&config).await.unwrap();
            postgres.migrate_up().await.unwrap();
            postgres.create_tenant("acme").await.unwrap();
            let config =
                QueueConfig { url: services.redis_queue().url().to_owned(), ..QueueConfig::default() };
            let queue = Queue::connect(config.clone()).await.unwrap();
            let heartbeat = Heartbeat::spawn(config, HeartbeatConfig::default()).unwrap();
            let asked = postgres.clone();
            let ledger: Probe = Arc::new(move || {
                let asked = asked.clone();
                Box::pin(async move { asked.probe().await })
            });
            let cache: Probe = Arc::new(|| Box::pin(pending()));
            let stop = CancellationToken::new();
            let probes = [(Dependency::Postgres, ledger), (Dependency::Cache, cache)];
            let breakers = Breakers::new(probes, stop.clone());
            let settings = EngineSettings { unroutable_after: Duration::ZERO, ..EngineSettings::default() };
            let engine =
                Engine::new(postgres.clone(), breakers, WorkerId::new("w"), settings, Registry::default());
            let gatekeeper = Gatekeeper::spawn(&engine, &[], &Gates::new(), &stop);
            let acker = Acker::spawn(queue.clone(), heartbeat.clone());
            let runner = Runner::new(engine, acker, gatekeeper, settings.calls, stop);
            Self { runner, postgres, queue, heartbeat, services }
        }

        async fn open_breaker(&self, of: Dependency) {
            let error = StoreError::new(of, Class::Unavailable, "a test's");
            assert!(self.runner.engine.breakers().confirm_outage(of, &error).await);
        }

        /// A job that was taken, with its lease.
        async fn taken(&self) -> (TakenJob, Lease) {
            let name = QueueName::new(KIND).unwrap();
            let job = NewJob::new(KIND, name.clone(), TenantId::new("acme").unwrap(), serde_json::json!({}));
            self.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
            let envelope = self.postgres.envelope(job.id).await.unwrap().unwrap();
            self.queue.push(&[envelope]).await.unwrap();
            let claim = self.queue.claim(&name, &WorkerId::new("w"), 1).await.unwrap().remove(0);
            let item = TakeItem { id: job.id, fast: None };
            match self.runner.engine.take().flush(&[item]).await.unwrap().remove(0) {
                Take::Taken(taken) => (*taken, self.heartbeat.register(&claim)),
                other => panic!("not taken: {other:?}"),
            }
        }

        async fn state(&self, job: &TakenJob) -> String {
            self.postgres.job(job.id, None).await.unwrap().unwrap().state.to_string()
        }
    }

    #[tokio::test]
    async fn protocol_13_an_idle_process_runs_a_lone_job_whatever_else_is_away() {
        let stage = Stage::new().await;
        stage.open_breaker(Dependency::Cache).await;
        let (job, lease) = stage.taken().await;
        // In company it waits for its turn, and not through an outage.
        let company = stage.runner.company.read().await;
        assert_eq!(stage.runner.run_alone(job.clone(), &lease).await, Some(Done::Release(ALONE_LATER)));
        assert_eq!(stage.state(&job).await, "waiting");
        drop(company);
        let (job, lease) = stage.taken().await;
        assert_eq!(stage.runner.run_alone(job.clone(), &lease).await, Some(Done::Ack));
        assert_eq!(stage.state(&job).await, "dead");
    }

    #[tokio::test]
    async fn protocol_13_a_lone_job_is_given_back_once_the_ledger_is_there_again() {
        let stage = Stage::new().await;
        let (job, lease) = stage.taken().await;
        stage.services.postgres().pause().await.unwrap();
        stage.open_breaker(Dependency::Postgres).await;
        let mut alone = Box::pin(stage.runner.run_alone(job.clone(), &lease));
        let longer_than_a_call = stage.postgres.call_timeout() * 3;
        let early = tokio::time::timeout(longer_than_a_call, &mut alone).await;
        assert!(early.is_err(), "{early:?}");
        stage.services.postgres().resume().await.unwrap();
        assert_eq!(alone.await, Some(Done::Release(ALONE_LATER)));
        assert_eq!(stage.state(&job).await, "waiting");
    }
}
