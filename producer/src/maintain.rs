//! The loops that keep ledger and queue agreed: relay, reconciler, policies, lender, cron for recurring jobs, collector for
//! batches, and the gauges. Every producer and every worker runs
//! them, so that a fleet of either kind alone dispatches what the ledger holds.

use std::time::Duration;

use queue::Queue;
use sagas::stores::postgres::Postgres;
use tokio::task::JoinSet;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
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
    let with = With {
        postgres: postgres.clone(),
        queue: queue.clone(),
        settings: settings.clone(),
        stop: stop.clone(),
    };
    loops.spawn(lasting("policies", (stop.clone(), with.clone()), |with| {
        Policies::new(with.postgres, with.queue, &with.settings).run(with.stop)
    }));
    loops.spawn(lasting("relay", (stop.clone(), with.clone()), |with| {
        Relay::new(with.postgres, with.queue, with.settings).run(with.stop)
    }));
    loops.spawn(lasting("stats", (stop.clone(), with.clone()), |with| {
        Stats::new(with.postgres, with.queue, with.settings).run(with.stop)
    }));
    loops.spawn(lasting("cron", (stop.clone(), with.clone()), |with| {
        Cron::new(with.postgres, with.settings.cron_on_time).run(with.stop)
    }));
    loops.spawn(lasting("collector", (stop.clone(), with.clone()), |with| {
        Collector::new(with.postgres, with.queue, with.settings).run(with.stop)
    }));
    // With one partition it ends at once.
    let lending = queue::Lender::spawn(queue.clone(), settings.queues.clone(), stop.clone());
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

/// What the loops are made of.
#[derive(Clone)]
struct With {
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    stop: CancellationToken,
}

/// Runs a loop until `stop`, and begins it again should it panic: without a relay a lone producer would accept jobs that nobody
/// dispatches.
async fn lasting<T: Clone, F: Future<Output = ()> + Send + 'static>(
    role: &'static str,
    (stop, with): (CancellationToken, T),
    begin: fn(T) -> F,
) -> Result<(), MaintainError> {
    while let Err(error) = AbortOnDropHandle::new(tokio::spawn(begin(with.clone()))).await {
        tracing::error!(role, %error, "a maintenance loop panicked; it begins again");
        if !pause(Duration::from_secs(1), &stop).await {
            break;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[tokio::test]
    async fn a_loop_that_panicked_begins_again() {
        let begun = Arc::new(AtomicU32::new(0));
        let ended = lasting("any", (CancellationToken::new(), Arc::clone(&begun)), |begun| async move {
            assert!(begun.fetch_add(1, Ordering::SeqCst) == 1, "not yet");
        });
        assert!(ended.await.is_ok());
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
