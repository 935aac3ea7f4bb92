//! The loops that keep ledger and queue agreed: relay, reconciler, policies, lender, cron for recurring jobs, collector for
//! batches, and the gauges. Every producer and every worker runs
//! them, so that a fleet of either kind alone dispatches what the ledger holds.

use std::time::Duration;

use queue::Queue;
use sagas::stores::postgres::Postgres;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    collector::Collector,
    cron::Cron,
    error::MaintainError,
    pacing::{Growing, pause, within},
    policies::Policies,
    reconciler::Reconciler,
    relay::Relay,
    settings::MaintainSettings,
    stats::Stats,
};

/// Runs the loops until `shutdown`. Neither Postgres nor Redis has to be there at the start; an outage of either is
/// waited out.
///
/// Errors: the prefix belongs to another ledger, or the server may evict jobs or is too old. Nothing was dispatched then,
/// and the process should end.
pub async fn maintain(
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    shutdown: CancellationToken,
) -> Result<(), MaintainError> {
    let Some(ledger) = own_prefix(&postgres, &queue, &shutdown).await? else { return Ok(()) };
    let stop = shutdown.child_token();
    let _stop_at_end = stop.clone().drop_guard();
    let mut loops: JoinSet<Result<(), MaintainError>> = JoinSet::new();
    let relay = Relay::new(postgres.clone(), queue.clone(), settings.clone());
    let stats = Stats::new(postgres.clone(), queue.clone(), settings.clone());
    let policies = Policies::new(postgres.clone(), queue.clone(), &settings);
    let (for_relay, for_stats, for_policies) = (stop.clone(), stop.clone(), stop.clone());
    loops.spawn(async move {
        policies.run(for_policies).await;
        Ok(())
    });
    let (cron, for_cron) = (Cron::new(postgres.clone(), settings.cron_on_time), stop.clone());
    let (collector, for_collector) =
        (Collector::new(postgres.clone(), queue.clone(), settings.clone()), stop.clone());
    loops.spawn(async move {
        relay.run(for_relay).await;
        Ok(())
    });
    loops.spawn(async move {
        stats.run(for_stats).await;
        Ok(())
    });
    // With one partition it ends at once.
    let lending = queue::Lender::spawn(queue.clone(), settings.queues.clone(), stop.clone());
    loops.spawn(async move {
        cron.run(for_cron).await;
        Ok(())
    });
    loops.spawn(async move {
        collector.run(for_collector).await;
        Ok(())
    });
    loops.spawn(Reconciler { postgres, queue, settings, ledger }.run(stop.clone()));
    let mut outcome = Ok(());
    while let Some(ended) = loops.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                outcome = Err(error);
                stop.cancel();
            }
            Err(error) => tracing::error!(%error, "a maintenance loop ended; other processes run it, too"),
        }
    }
    if let Err(error) = lending.await {
        tracing::error!(%error, "the lender ended; other processes run one, too");
    }
    outcome
}

/// Waits until both stores answer and the prefix is seen not to be another ledger's. An unstamped prefix is left so: it
/// is either new or has lost its data, and the reconciler stamps it when nothing is missing. `None`: shut down.
async fn own_prefix(
    postgres: &Postgres,
    queue: &Queue,
    shutdown: &CancellationToken,
) -> Result<Option<Uuid>, MaintainError> {
    let mut pauses = Growing::new(Duration::from_millis(100), Duration::from_secs(2));
    while !shutdown.is_cancelled() {
        match within(postgres.call_timeout(), postgres.ledger_id()).await {
            Ok(ledger) => match queue.is_stamped_by(ledger).await {
                Ok(_) => return Ok(Some(ledger)),
                Err(error) if error.is_unavailable() => {
                    tracing::warn!(%error, "waiting for the queue's Redis");
                }
                Err(error) => return Err(error.into()),
            },
            Err(error) => tracing::warn!(%error, "waiting for the ledger"),
        }
        pause(pauses.next(), shutdown).await;
    }
    Ok(None)
}
