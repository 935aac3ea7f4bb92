//! Wires a worker process together, runs it, and drains it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use apalis::prelude::*;
use queue::{
    Acker, Claimer, ClaimerConfig, Gates, Heartbeat, HeartbeatConfig, Presence, Queue, QueueBackend,
    QueueError, QueueName, Reaper, Scheduler, WorkerId,
};
use sagas::{
    StoreError,
    engine::{Engine, EngineSettings, Registry},
    janitor::{self, JanitorSettings},
    kinds::Stores,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    auditor::{self, AuditorSettings},
    gatekeeper::Gatekeeper,
    health::{self, MetricsRender},
    runner::Runner,
};

/// Settings of a worker process.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// Which queues to serve, in turn.
    pub queues: Vec<QueueName>,
    /// Jobs that run at once.
    pub concurrency: usize,
    /// Who we are; new for every process.
    pub id: WorkerId,
    /// How often leases are extended.
    pub heartbeat: Duration,
    /// How long running jobs may go on after a request to stop.
    pub drain_grace: Duration,
    /// Where `/healthz`, `/readyz` and `/metrics` are served; port 0 takes a free one. `None`: [`USUAL_ADDR`], or a free port
    /// there if another worker on this machine has it.
    pub addr: Option<SocketAddr>,
    /// The engine's limits and policies.
    pub engine: EngineSettings,
    /// The janitor's.
    pub janitor: JanitorSettings,
    /// The auditor's.
    pub auditor: AuditorSettings,
}

impl WorkerSettings {
    /// The defaults of `flotilla worker` for a queue with this lease ([`queue::QueueConfig::lease`]): 16 jobs at once,
    /// heartbeats every 10 s or three to a lease, 25 s to drain, port 9090 of loopback.
    pub fn new(queues: Vec<QueueName>, lease: Duration) -> Self {
        let mut engine = EngineSettings::default();
        engine.calls.lease_margin = engine.calls.lease_margin.min(lease / 5);
        Self {
            queues,
            concurrency: 16,
            id: WorkerId::for_this_process(),
            heartbeat: HeartbeatConfig::default().interval.min(lease / 3),
            drain_grace: Duration::from_secs(25),
            addr: None,
            engine,
            janitor: JanitorSettings::default(),
            auditor: AuditorSettings::default(),
        }
    }
}

/// Why a worker can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The queue's Redis refuses us, or can't be reached at start.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The ledger can't be reached at start.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The health address can't be served.
    #[error("FLOTILLA_WORKER_ADDR {addr}: {error}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// apalis ended by itself.
    #[error("the worker ended: {0}")]
    Ended(String),
}

/// Where a worker is asked for its health, unless told otherwise.
pub const USUAL_ADDR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

/// How long the last acks may take once all jobs have ended.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);
/// How long the registry may take to hear that the worker ends; nothing depends on it.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// Runs a worker of the registry's sagas until `shutdown`, then drains it: claims no more, lets running jobs end within the
/// grace period, gives the others back uncharged. Errors only at start. `stores.registry()` has Flotilla's own sagas.
pub async fn run(
    settings: WorkerSettings,
    stores: Stores,
    registry: Registry,
    queue: Queue,
    metrics: MetricsRender,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    // Refuses another ledger's prefix. A missing stamp means that Redis lost its data, which the reconciler must see: it
    // dispatches again and stamps afterwards.
    queue.is_stamped_by(stores.ledger().await?).await?;
    let heartbeat =
        Heartbeat::spawn(queue.config().clone(), HeartbeatConfig { interval: settings.heartbeat })?;
    let (listener, addr) = listen(settings.addr, USUAL_ADDR).await?;

    // Background loops outlive the drain: leases must be kept and breakers probed until the last job has ended.
    let background = CancellationToken::new();
    let _stop_background = background.clone().drop_guard();
    let breakers =
        stores.breakers_with(registry.probes(), background.clone()).share(queue.clone(), settings.id.clone());
    let engine = Engine::new(
        stores.postgres.clone(),
        breakers.clone(),
        settings.id.clone(),
        settings.engine,
        registry,
    );
    let gates = Gates::new();
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let gatekeeper = Gatekeeper::spawn(&engine, &settings.queues, &gates, &background);
    Reaper::spawn(queue.clone(), settings.queues.clone(), background.clone());
    Scheduler::spawn(queue.clone(), settings.queues.clone(), background.clone());
    let presence =
        Presence::spawn(queue.clone(), settings.id.clone(), settings.queues.clone(), background.clone());
    tokio::spawn(janitor::run(stores.clone(), settings.janitor, background.clone()));
    // Of a worker that drains, another goes on with the audit.
    tokio::spawn(auditor::run(
        stores.clone(),
        queue.clone(),
        settings.auditor,
        settings.id.clone(),
        shutdown.child_token(),
    ));

    let stop_jobs = CancellationToken::new();
    let runner =
        Arc::new(Runner::new(engine, acker.clone(), gatekeeper, settings.engine.calls, stop_jobs.clone()));
    tokio::spawn(health::serve(
        listener,
        breakers,
        queue.clone(),
        metrics,
        shutdown.clone(),
        background.clone(),
    ));

    let (claimer, jobs) = Claimer::spawn(
        queue.clone(),
        heartbeat,
        ClaimerConfig {
            queues: settings.queues.clone(),
            worker: settings.id.clone(),
            batch: settings.concurrency.min(64),
            slots: settings.concurrency,
        },
        gates,
        shutdown.child_token(),
    );
    let grace = settings.drain_grace;
    tokio::spawn({
        let (shutdown, background) = (shutdown.clone(), background.clone());
        async move {
            shutdown.cancelled().await;
            tracing::info!(?grace, "draining: no more jobs are claimed");
            tokio::select! {
                () = tokio::time::sleep(grace) => {
                    tracing::warn!("the grace period is over: giving running jobs back");
                    stop_jobs.cancel();
                }
                () = background.cancelled() => {}
            }
        }
    });
    tracing::info!(worker = %settings.id, queues = ?settings.queues.iter().map(ToString::to_string).collect::<Vec<_>>(),
        concurrency = settings.concurrency, %addr, "worker ready");
    let worker = WorkerBuilder::new(settings.id.to_string())
        .backend(QueueBackend::new(claimer, jobs, acker.clone()))
        .data(runner)
        .concurrency(settings.concurrency)
        .build(handle);
    let stopped = shutdown.clone();
    // In a task: whoever calls this may do so on a thread beside the runtime's, which each job would have to wake.
    let ended = AbortOnDropHandle::new(tokio::spawn(worker.run_until(async move {
        stopped.cancelled().await;
        Ok::<(), io::Error>(())
    })))
    .await;
    if tokio::time::timeout(FLUSH_WITHIN, acker.flush()).await.is_err() {
        tracing::warn!("Redis didn't hear of the last jobs in time; the take will drop them");
    }
    background.cancel();
    if tokio::time::timeout(LEAVE_WITHIN, presence).await.is_err() {
        tracing::debug!("the registry of workers knows this one for a minute more");
    }
    match ended {
        Err(panic) => Err(WorkerError::Ended(panic.to_string())),
        Ok(Err(error)) if !shutdown.is_cancelled() => Err(WorkerError::Ended(error.to_string())),
        Ok(_) => Ok(()),
    }
}

/// apalis polls all handlers in one task; a task for each job spreads them over the runtime's threads, and a panic outside of a
/// step, which is the engine's own, ends that task alone: its lease runs out and the job is delivered again.
async fn handle(job: queue::Job, runner: Data<Arc<Runner>>) -> Result<(), BoxDynError> {
    let runner = Arc::clone(&runner);
    tokio::spawn(async move { runner.process(job).await }).await?;
    Ok(())
}

/// Without an address it is the usual one, or a free port beside it: a further worker on the machine needs no setting. An address that
/// was asked for is kept to, because somebody looks there.
async fn listen(
    addr: Option<SocketAddr>,
    usual: SocketAddr,
) -> Result<(TcpListener, SocketAddr), WorkerError> {
    let wanted = addr.unwrap_or(usual);
    let refused = |error| WorkerError::Listen { addr: wanted, error };
    let listener = match TcpListener::bind(wanted).await {
        Err(error) if addr.is_none() && error.kind() == io::ErrorKind::AddrInUse => {
            TcpListener::bind((usual.ip(), 0)).await
        }
        bound => bound,
    }
    .map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    Ok((listener, bound))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_further_worker_on_a_machine_takes_a_free_port_unless_it_was_given_one() {
        let (_first, taken) = listen(Some(SocketAddr::from(([127, 0, 0, 1], 0))), USUAL_ADDR).await.unwrap();
        let (_, second) = listen(None, taken).await.unwrap();
        assert_eq!(second.ip(), taken.ip());
        assert_ne!(second.port(), taken.port());
        let error = listen(Some(taken), USUAL_ADDR).await.unwrap_err();
        assert!(matches!(error, WorkerError::Listen { addr, .. } if addr == taken), "{error}");
    }
}
