//! `flotilla worker`: runs jobs until it is told to stop.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ::worker::{AuditorSettings, MetricsRender, WorkerSettings};
use anyhow::{Context as _, bail};
use producer::MaintainSettings;
use queue::{HeartbeatConfig, QueueName, WorkerId};
use sagas::{
    engine::{CallLimits, EngineSettings, Registry},
    janitor::JanitorSettings,
    kinds::Stores,
};
use telemetry::Telemetry;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    context::Context,
    failure::{Ending, Outcome},
    signals,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Queues to serve, in turn
    #[arg(long, env = "FLOTILLA_QUEUES", value_delimiter = ',', default_value = "ingest,embed,delete")]
    queues: Vec<QueueName>,
    /// Jobs that run at once
    #[arg(long, env = "FLOTILLA_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    concurrency: u16,
    /// Where /healthz, /readyz and /metrics are served [default: 127.0.0.1:9090, or a free port if that is taken]
    #[arg(long, env = "FLOTILLA_WORKER_ADDR")]
    addr: Option<SocketAddr>,
    /// How long running jobs may go on after SIGTERM or SIGINT, in milliseconds; then they are given back
    #[arg(long, env = "FLOTILLA_DRAIN_GRACE_MS", value_name = "MS", default_value_t = 25_000)]
    drain_grace: u64,
}

const HOUR: Duration = Duration::from_secs(3600);
/// A lease's end minus this is the last moment of an external call: 2 s, or a fifth of a lease shorter than 10 s.
const LEASE_MARGIN: Duration = Duration::from_secs(2);

pub async fn run(args: Args, context: &Context, telemetry: &Telemetry) -> Outcome {
    run_with(args, context, telemetry, Stores::registry).await
}

/// A worker that knows the sagas which `registry` makes over its stores.
pub async fn run_with(
    args: Args,
    context: &Context,
    telemetry: &Telemetry,
    registry: impl FnOnce(&Stores) -> Registry,
) -> Outcome {
    let postgres = context.migrated_postgres().await?;
    let queue = context.queue().await?;
    // The maintenance loops store the policies; until they have, this worker claims nothing.
    queue.require_policies();
    let stores = context.stores(postgres.clone())?;
    let settings = worker_settings(&args, context, queue.config().lease)?;
    let maintain = MaintainSettings {
        queues: args.queues.clone(),
        ..MaintainSettings::from_lookup(|name| context.settings.get(name))?
    };
    let metrics: MetricsRender = Arc::new(telemetry.renderer());
    let shutdown = signals::drain_on_signal()?;

    // Relay and reconciler go on while jobs drain, and end with them.
    let upkeep = CancellationToken::new();
    let maintaining = tokio::spawn({
        let (queue, upkeep, shutdown) = (queue.clone(), upkeep.clone(), shutdown.clone());
        async move {
            let ended = producer::maintain(postgres, queue, maintain, upkeep).await;
            // It ends early only when this Redis must not be used: then no job may be run from it either.
            if ended.is_err() {
                shutdown.cancel();
            }
            ended
        }
    });
    let registry = registry(&stores);
    let worked = ::worker::run(settings, stores, registry, queue, metrics, shutdown).await;
    upkeep.cancel();
    let maintained = maintaining.await.context("the maintenance loops ended")?;
    worked?;
    maintained?;
    tracing::info!("drained");
    Ok(Ending::Fine)
}

fn auditor_settings(settings: &Settings) -> anyhow::Result<AuditorSettings> {
    const REPAIR: &str = "FLOTILLA_AUDIT_REPAIR";
    let defaults = AuditorSettings::default();
    Ok(AuditorSettings {
        every: settings.millis("FLOTILLA_AUDIT_EVERY_MS", defaults.every)?,
        rate: u32::try_from(settings.number("FLOTILLA_AUDIT_RATE", defaults.rate.into())?)
            .unwrap_or(u32::MAX)
            .max(1),
        repair: match settings.get(REPAIR).as_deref().map(str::trim) {
            None => defaults.repair,
            Some("true") => true,
            Some("false") => false,
            Some(other) => bail!("{REPAIR} is {other:?}: true and false are allowed"),
        },
    })
}

fn worker_settings(args: &Args, context: &Context, lease: Duration) -> anyhow::Result<WorkerSettings> {
    let settings = &context.settings;
    let engine = EngineSettings::default();
    let day = Duration::from_secs(24 * 3600);
    let janitor = JanitorSettings::default();
    let days = |name, default: Duration| {
        settings
            .number(name, default.as_secs() / day.as_secs())
            .map(|days| day * u32::try_from(days).unwrap_or(u32::MAX))
    };
    Ok(WorkerSettings {
        queues: args.queues.clone(),
        concurrency: args.concurrency.into(),
        id: WorkerId::for_this_process(),
        heartbeat: settings.millis("FLOTILLA_HEARTBEAT_MS", HeartbeatConfig::default().interval)?,
        drain_grace: Duration::from_millis(args.drain_grace),
        addr: args.addr,
        engine: EngineSettings {
            calls: CallLimits {
                call_timeout: context.call_timeout()?,
                lease_margin: LEASE_MARGIN.min(lease / 5),
            },
            retry_base: settings.millis("FLOTILLA_RETRY_BASE_MS", engine.retry_base)?,
            retry_cap: settings.millis("FLOTILLA_RETRY_CAP_MS", engine.retry_cap)?,
            delivery_limit: i32::try_from(
                settings.number("FLOTILLA_DELIVERY_LIMIT", engine.delivery_limit.unsigned_abs().into())?,
            )
            .unwrap_or(i32::MAX)
            .max(1),
            unroutable_after: settings.millis("FLOTILLA_UNROUTABLE_AFTER_MS", engine.unroutable_after)?,
            max_result: usize::try_from(settings.number("FLOTILLA_MAX_RESULT", engine.max_result as u64)?)
                .unwrap_or(usize::MAX),
        },
        janitor: JanitorSettings {
            keep_jobs: days("FLOTILLA_KEEP_JOBS_DAYS", janitor.keep_jobs)?,
            keep_results: HOUR
                * u32::try_from(
                    settings.number("FLOTILLA_KEEP_RESULTS_HOURS", janitor.keep_results.as_secs() / 3600)?,
                )
                .unwrap_or(u32::MAX),
            // 0: for ever.
            keep_letters: Some(days("FLOTILLA_KEEP_DEAD_LETTERS_DAYS", Duration::ZERO)?)
                .filter(|keep| !keep.is_zero()),
            keep_audit_log: days("FLOTILLA_KEEP_AUDIT_LOG_DAYS", janitor.keep_audit_log)?,
            keep_events: days("FLOTILLA_KEEP_EVENTS_DAYS", janitor.keep_events)?,
            ..janitor
        },
        auditor: auditor_settings(settings)?,
    })
}
