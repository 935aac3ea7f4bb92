//! Tells Redis which jobs are finished or given back.

use std::{borrow::Borrow, collections::HashMap, time::Duration};

use futures::future::join_all;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    envelope::LeaseRef,
    error::QueueError,
    heartbeat::Heartbeat,
    ids::QueueName,
    lease::Lease,
    outage::Outage,
    queue::{CHUNK, Queue},
};

/// How many answers may wait for Redis; when more are outstanding, [`Acker::done`] waits.
const WAITING: usize = 16_384;
/// How often a batch is sent that Redis refuses for another reason than an outage, before it is left to the reaper.
const REFUSALS: u32 = 3;
/// A batch that is smaller than [`ENOUGH`] leaves no sooner than this after the one before, so that a busy worker sends few
/// large batches. The first one after a pause leaves at once.
const PAUSE: Duration = Duration::from_millis(1);
const ENOUGH: usize = 100;

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// It is finished; Redis forgets it. Say so only after the ledger's commit.
    Ack,
    /// It goes back to the queue after this delay; with zero to the front of its list.
    Release(Duration),
    /// As `Release`, and it is charged with a failure. Only for jobs without a ledger.
    Retry(Duration),
}

enum Message {
    Done(Lease, Done),
    Flush(oneshot::Sender<()>),
}

/// Hands finished and returned jobs to a task that sends them in batches. While Redis is unavailable the task keeps
/// them and sends them afterwards; a worker never sees an error. Clones share the task, which ends when the last clone
/// is dropped, after one last attempt.
#[derive(Clone, Debug)]
pub struct Acker {
    messages: mpsc::Sender<Message>,
    heartbeat: Heartbeat,
    queue: Queue,
}

impl Acker {
    /// Starts the task on the present runtime.
    pub fn spawn(queue: Queue, heartbeat: Heartbeat) -> Self {
        let (messages, inbox) = mpsc::channel(WAITING);
        if queue.is_cluster() {
            tokio::spawn(share_out(queue.clone(), inbox));
        } else {
            tokio::spawn(run(queue.clone(), inbox));
        }
        Self { messages, heartbeat, queue }
    }

    /// Notes in Redis that the job runs alone in its process from now on. `false`: the lease is not ours any more.
    pub(crate) async fn runs_alone(&self, lease: &Lease) -> Result<bool, QueueError> {
        let noted = self.queue.runs_alone(&[lease.lease_ref()]).await?;
        Ok(noted.first() == Some(&true))
    }

    /// Ends the lease. Returns at once unless 16,384 answers wait for Redis already. Not cancel-safe: when cancelled
    /// while waiting, the job comes back after its lease has run out.
    pub async fn done(&self, lease: impl Borrow<Lease>, done: Done) {
        let lease = lease.borrow().clone();
        // First the heartbeat: it must not find the job gone and call the lease lost.
        self.heartbeat.end(&lease);
        let id = lease.id();
        if self.messages.send(Message::Done(lease, done)).await.is_err() {
            tracing::error!(%id, "the acker's task is gone; the lease will run out");
        }
    }

    /// Returns when everything that was handed over before is known to Redis. Waits through an outage: put a deadline
    /// around it. Cancel-safe.
    pub async fn flush(&self) {
        let (flushed, wait) = oneshot::channel();
        // Both fail only when the task is gone, and then there is nothing to wait for.
        if self.messages.send(Message::Flush(flushed)).await.is_ok() && wait.await.is_err() {
            tracing::debug!("the acker ended before a flush");
        }
    }
}

/// One task for each partition, so that what waits for a node of the cluster that is away holds up no other.
async fn share_out(queue: Queue, mut inbox: mpsc::Receiver<Message>) {
    let mut places: HashMap<(QueueName, u16), mpsc::Sender<Message>> = HashMap::new();
    while let Some(message) = inbox.recv().await {
        match message {
            Message::Done(lease, done) => {
                let of = lease.lease_ref();
                let place = places.entry((of.queue, of.partition)).or_insert_with(|| {
                    let (messages, inbox) = mpsc::channel(WAITING);
                    tokio::spawn(run(queue.clone(), inbox));
                    messages
                });
                if place.send(Message::Done(lease, done)).await.is_err() {
                    tracing::error!(id = %of.id, "an acker's task is gone; the lease will run out");
                }
            }
            Message::Flush(flushed) => {
                let mut waits = Vec::new();
                for place in places.values() {
                    let (sender, wait) = oneshot::channel();
                    if place.send(Message::Flush(sender)).await.is_ok() {
                        waits.push(wait);
                    }
                }
                tokio::spawn(async move {
                    join_all(waits).await;
                    // Whoever asked may have stopped waiting.
                    flushed.send(()).ok();
                });
            }
        }
    }
}

async fn run(queue: Queue, mut inbox: mpsc::Receiver<Message>) {
    let mut outage = Outage::new("acker");
    let mut messages = Vec::new();
    let mut sent_at = Instant::now();
    while inbox.recv_many(&mut messages, CHUNK).await > 0 {
        // Jobs end in batches, too: those that are about to say so come along.
        tokio::task::yield_now().await;
        while messages.len() < ENOUGH && !messages.iter().any(|one| matches!(one, Message::Flush(_))) {
            let more = inbox.recv_many(&mut messages, CHUNK);
            if !matches!(timeout_at(sent_at + PAUSE, more).await, Ok(1..)) {
                break;
            }
        }
        sent_at = Instant::now();
        let (mut acks, mut releases, mut retries, mut flushes) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut ended: HashMap<QueueName, (u64, u64)> = HashMap::new();
        for message in messages.drain(..) {
            match message {
                Message::Done(lease, Done::Ack) => {
                    let of = lease.lease_ref();
                    let (count, dead) = match ended.get_mut(&of.queue) {
                        Some(counts) => counts,
                        None => ended.entry(of.queue.clone()).or_default(),
                    };
                    (*count, *dead) = (*count + 1, *dead + u64::from(lease.is_dead()));
                    acks.push(of);
                }
                Message::Done(lease, Done::Release(delay)) => releases.push((lease.lease_ref(), delay)),
                Message::Done(lease, Done::Retry(delay)) => retries.push((lease.lease_ref(), delay)),
                Message::Flush(flushed) => flushes.push(flushed),
            }
        }
        queue.shared.tally.add(ended);
        let mut refusals = 0;
        while let Err(error) = send(&queue, &acks, &releases, &retries).await {
            let pause = outage.wait(&error);
            refusals += u32::from(!error.is_unavailable());
            if refusals >= REFUSALS || inbox.is_closed() {
                let count = acks.len() + releases.len() + retries.len();
                tracing::error!(count, %error, "can't tell Redis what became of these jobs; their leases will run out");
                break;
            }
            sleep(pause).await;
        }
        outage.over();
        for flushed in flushes {
            // Whoever asked may have stopped waiting.
            flushed.send(()).ok();
        }
    }
}

/// Sends all kinds side by side. Repeating it is harmless: what got through before is not ours any more.
async fn send(
    queue: &Queue,
    acks: &[LeaseRef],
    releases: &[(LeaseRef, Duration)],
    retries: &[(LeaseRef, Duration)],
) -> Result<(), QueueError> {
    tokio::try_join!(queue.ack(acks), queue.release(releases), queue.retry(retries)).map(drop)
}
