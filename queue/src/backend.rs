//! The queue as an apalis backend.
//!
//! Implements [`Backend`] itself rather than apalis' `Persistence`: there, in 1.0.0, one failed heartbeat or ack leaves
//! the worker in a final dead state. Here heartbeat, ack and claim are tasks of their own that outlive outages, and the
//! backend only hands over what was claimed. It has no error.

use std::{
    convert::Infallible,
    task::{Context, Poll, ready},
    time::Duration,
};

use apalis_core::{
    backend::{Backend, BackendConfig, finalize::Ephemeral},
    task::{Task, builder::TaskBuilder, task_id::TaskId},
    worker::context::WorkerContext,
};
use futures::future::BoxFuture;
use tokio::time::timeout;
use tower::layer::util::Identity;

use crate::{
    acker::Acker,
    claimer::{Claimer, Job},
    hand_over::Jobs,
};

/// How long closing waits for Redis to hear of the last jobs. After that their leases run out.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// Yields claimed jobs to an apalis worker. Owns the claimer. While the worker pauses, nothing is claimed, and jobs that have not
/// started go back to their queues within a safety poll (1 s). So they do when it stops; when what runs has ended, the claimer is
/// stopped and the acker is flushed.
pub struct QueueBackend {
    jobs: Jobs,
    claimer: Option<Claimer>,
    acker: Acker,
    closing: Option<BoxFuture<'static, ()>>,
}

impl std::fmt::Debug for QueueBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueBackend").field("claimer", &self.claimer).finish_non_exhaustive()
    }
}

impl QueueBackend {
    /// Takes what [`Claimer::spawn`] returned.
    pub fn new(claimer: Claimer, jobs: Jobs, acker: Acker) -> Self {
        Self { jobs, claimer: Some(claimer), acker, closing: None }
    }

    fn close(&mut self) -> BoxFuture<'static, ()> {
        let claimer = self.claimer.take();
        if let Some(claimer) = &claimer {
            claimer.stop();
        }
        self.jobs.close();
        let acker = self.acker.clone();
        Box::pin(async move {
            let ending = async {
                if let Some(claimer) = claimer {
                    claimer.join().await;
                }
                acker.flush().await;
            };
            if timeout(CLOSE_WITHIN, ending).await.is_err() {
                tracing::warn!(within = ?CLOSE_WITHIN, "Redis didn't hear of the last jobs in time; their leases will run out");
            }
        })
    }
}

impl Backend for QueueBackend {
    type Task = Task<Job>;
    type Error = Infallible;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        worker: &WorkerContext,
    ) -> Poll<Option<Result<Task<Job>, Infallible>>> {
        if let Some(job) = ready!(self.jobs.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(into_task(job))));
        }
        // The claimer ended, so a shutdown is under way. apalis waits for a stop before it ends.
        if let Err(error) = worker.stop() {
            tracing::debug!(%error, "the worker was stopping already");
        }
        Poll::Ready(None)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Infallible>> {
        if self.closing.is_none() {
            self.closing = Some(self.close());
        }
        if let Some(closing) = &mut self.closing {
            ready!(closing.as_mut().poll(cx));
        }
        // A future that has ended must not be polled again; one that does nothing may.
        self.closing = Some(Box::pin(async {}));
        Poll::Ready(Ok(()))
    }
}

impl BackendConfig for QueueBackend {
    type Args = Job;
    type Id = TaskId;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, worker: &mut WorkerContext) -> Identity {
        self.jobs.follow(worker);
        Identity::new()
    }
}

fn into_task(job: Job) -> Task<Job> {
    // One job may be here twice, when it was lost and claimed again while its first run has not ended yet; apalis
    // panics on equal ids. Two claims of a job differ in their token.
    let lease = job.lease.lease_ref();
    let id = TaskId::from_string(format!("{}/{}", lease.id, lease.token.as_str()));
    let priority = usize::from(job.envelope.priority.get());
    let queue = job.envelope.queue.as_str().into();
    // Where a ledger counts, the acks say how often it failed.
    let failures = job.envelope.attempts as usize;
    TaskBuilder::new(job).task_id(id).attempt(failures).priority(priority).queue(queue).build()
}
