//! Acks on success and gives back on failure, for handlers without a ledger.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use apalis_core::{
    error::{AbortError, BoxDynError, RetryAfterError},
    task::Task,
};
use futures::future::BoxFuture;
use tower::{Layer, Service};

use crate::{
    acker::{Acker, Done},
    claimer::Job,
    lease::LeaseLost,
};

/// A tower layer for an apalis worker over [`QueueBackend`](crate::QueueBackend). `Ok` acks the job. `Err` gives it back
/// after a delay: the one in a [`RetryAfterError`], else the layer's own. [`AbortError`] acks as well: the job is not
/// tried again. A handler whose lease is lost is dropped at once. There is no limit of attempts here; that takes a ledger.
///
/// Add apalis' `catch_panic` *before* this layer, which puts it outside: a job that panics then comes back when its
/// lease has run out. Inside, it turns a panic into [`AbortError`], and the job is acked.
#[derive(Debug, Clone)]
pub struct AckLayer {
    acker: Acker,
    delay: Duration,
}

impl AckLayer {
    /// Gives failed jobs back after `delay`.
    pub fn new(acker: Acker, delay: Duration) -> Self {
        Self { acker, delay }
    }
}

impl<S> Layer<S> for AckLayer {
    type Service = AckService<S>;

    fn layer(&self, inner: S) -> AckService<S> {
        AckService { inner, layer: self.clone() }
    }
}

/// What [`AckLayer`] makes of a service.
#[derive(Debug, Clone)]
pub struct AckService<S> {
    inner: S,
    layer: AckLayer,
}

impl<S> Service<Task<Job>> for AckService<S>
where
    S: Service<Task<Job>>,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: Into<BoxDynError> + 'static,
{
    type Response = S::Response;
    type Error = BoxDynError;
    type Future = BoxFuture<'static, Result<S::Response, BoxDynError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxDynError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, task: Task<Job>) -> Self::Future {
        let lease = task.args.lease.clone();
        let AckLayer { acker, delay } = self.layer.clone();
        let run = self.inner.call(task);
        Box::pin(async move {
            let lost = lease.lost();
            let result = tokio::select! {
                // A job that ends at once needs no look at its lease.
                biased;
                result = run => result.map_err(Into::into),
                () = lost.cancelled() => return Err(LeaseLost(lease.id()).into()),
            };
            let done = match &result {
                Ok(_) => Done::Ack,
                Err(error) if error.is::<AbortError>() => {
                    tracing::error!(id = %lease.id(), %error, "the job is dropped and not tried again");
                    Done::Ack
                }
                Err(error) => Done::Release(
                    error.downcast_ref::<RetryAfterError>().map_or(delay, RetryAfterError::get_duration),
                ),
            };
            acker.done(&lease, done).await;
            result
        })
    }
}
