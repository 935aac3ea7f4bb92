//! The loops that keep ledger and queue agreed: relay, reconciler, policies, lender, cron for recurring jobs, collector for
//! batches, and the gauges. Every producer and every worker runs
//! them, so that a fleet of either kind alone dispatches what the ledger holds.

use std::{panic::resume_unwind, time::Duration};

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
    let with = (stop.clone(), With { postgres, queue, settings, ledger, stop: stop.clone() });
    loops.spawn(lasting("policies", with.clone(), |with| async move {
        Policies::new(with.postgres, with.queue, &with.settings).run(with.stop).await;
        Ok(())
    }));
    loops.spawn(lasting("relay", with.clone(), |with| async move {
        Relay::new(with.postgres, with.queue, with.settings).run(with.stop).await;
        Ok(())
    }));
    loops.spawn(lasting("stats", with.clone(), |with| async move {
        Stats::new(with.postgres, with.queue, with.settings).run(with.stop).await;
        Ok(())
    }));
    loops.spawn(lasting("cron", with.clone(), |with| async move {
        Cron::new(with.postgres, with.settings.cron_on_time).run(with.stop).await;
        Ok(())
    }));
    loops.spawn(lasting("collector", with.clone(), |with| async move {
        Collector::new(with.postgres, with.queue, with.settings).run(with.stop).await;
        Ok(())
    }));
    loops.spawn(lasting("lender", with.clone(), |with| async move {
        // With one partition it ends at once.
        let lending = queue::Lender::spawn(with.queue, with.settings.queues, with.stop);
        lending.await.map_err(|error| resume_unwind(error.into_panic()))
    }));
    loops.spawn(lasting("reconciler", with, |With { postgres, queue, settings, ledger, stop }| {
        Reconciler { postgres, queue, settings, ledger }.run(stop)
    }));
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
    outcome
}

/// What the loops are made of.
#[derive(Clone)]
struct With {
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    ledger: Uuid,
    stop: CancellationToken,
}

/// Runs a loop to its own end, and begins it again should it panic: without a relay a lone producer would accept jobs that nobody
/// dispatches, and without a reconciler what Redis loses would stay lost.
async fn lasting<T: Clone, F: Future<Output = Result<(), MaintainError>> + Send + 'static>(
    role: &'static str,
    (stop, with): (CancellationToken, T),
    begin: fn(T) -> F,
) -> Result<(), MaintainError> {
    loop {
        match AbortOnDropHandle::new(tokio::spawn(begin(with.clone()))).await {
            Ok(ended) => return ended,
            Err(error) => tracing::error!(role, %error, "a maintenance loop panicked; it begins again"),
        }
        if !pause(Duration::from_secs(1), &stop).await {
            return Ok(());
        }
    }
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

    use queue::QueueError;

    use super::*;

    #[tokio::test]
    async fn a_loop_that_panicked_begins_again_and_its_end_is_its_own() {
        let begun = Arc::new(AtomicU32::new(0));
        let ended = lasting("any", (CancellationToken::new(), Arc::clone(&begun)), |begun| async move {
            assert!(begun.fetch_add(1, Ordering::SeqCst) == 1, "not yet");
            Err(QueueError::Unavailable("a test's".to_owned()).into())
        });
        assert!(ended.await.is_err());
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
