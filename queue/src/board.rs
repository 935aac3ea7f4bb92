//! One queue as apalis' tools see it: `apalis-board` lists queues, tasks and workers over it, and pushes tasks.
//!
//! [`Board`] is a view and a way in. It runs nothing: workers take [`QueueBackend`](crate::QueueBackend).

use std::{
    marker::PhantomData,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use apalis_core::{
    backend::{
        Backend, BackendConfig, FetchById, Filter, ListAllTasks, ListQueues, ListTasks, ListWorkers, Metrics,
        QueueInfo, RunningWorker, StatType, Statistic, WireFormatBackend, codec::Codec, finalize::Durable,
    },
    task::{
        Task,
        builder::TaskBuilder,
        metadata::{MetadataStore, TracingContext},
        status::Status,
        task_id::TaskId,
    },
    worker::context::WorkerContext,
};
use futures::{Sink, future::BoxFuture};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tower::layer::util::Identity;
use uuid::Uuid;

use crate::{
    envelope::{Envelope, QueueStats, TraceContext},
    error::QueueError,
    ids::{JobId, Priority, QueueName, TenantId},
    listing::{Listed, ListedState},
    queue::Queue,
    rates::Rates,
    registry::LivingWorker,
};

/// Most jobs of one page.
const PAGE: usize = 500;
/// Longest text of a trace that is kept, in bytes, as in the ledger.
const MAX_TRACE: usize = 512;

/// Arguments as JSON, as they lie in an envelope's `fast` field.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsonCodec;

impl<T: Serialize + DeserializeOwned> Codec<T> for JsonCodec {
    type Error = serde_json::Error;
    type Compact = Value;

    fn encode(&self, value: &T) -> Result<Value, serde_json::Error> {
        serde_json::to_value(value)
    }

    fn decode(&self, value: &Value) -> Result<T, serde_json::Error> {
        T::deserialize(value)
    }
}

/// One queue of jobs with arguments `T`, for `apalis-board` and for pushing by apalis' [`TaskSink`]. Cheap to clone.
///
/// What it pushes has its arguments in the envelope and no row in a ledger, so push only to queues whose workers expect
/// that. A task that came with a ledger shows `null` as its arguments, or what `T` makes of it. Finished jobs leave Redis
/// at once, so the states done, failed and killed have no tasks.
///
/// [`TaskSink`]: apalis_core::backend::TaskSink
pub struct Board<T> {
    queue: Queue,
    name: QueueName,
    kind: String,
    tenant: TenantId,
    outgoing: Vec<Envelope>,
    /// Never locked: the mutex makes the board shareable, and only its owner sends.
    sending: Mutex<Option<BoxFuture<'static, Result<(), QueueError>>>>,
    args: PhantomData<fn() -> T>,
}

impl<T> Clone for Board<T> {
    fn clone(&self) -> Self {
        Self::new(self.queue.clone(), self.name.clone(), self.kind.clone(), self.tenant.clone())
    }
}

impl<T> std::fmt::Debug for Board<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("queue", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl<T> Board<T> {
    /// A view of one queue. What is pushed over it is of this kind and belongs to this tenant.
    pub fn new(queue: Queue, name: QueueName, kind: impl Into<String>, tenant: TenantId) -> Self {
        Self {
            queue,
            name,
            kind: kind.into(),
            tenant,
            outgoing: Vec::new(),
            sending: Mutex::new(None),
            args: PhantomData,
        }
    }

    fn envelope(&self, task: Task<Value>) -> Result<Envelope, QueueError> {
        let (args, ctx) = task.take();
        let refuse = |what: String, instead| Err(QueueError::Task { what, instead });
        if let Some(key) = ctx.idempotency_key() {
            let instead =
                "give it a UUID as its id, by which pushes are idempotent, or enqueue it in the ledger";
            return refuse(format!("the idempotency key {key:?}"), instead);
        }
        if let Some(most) = ctx.max_attempts() {
            let instead = "a worker's limit holds for all its jobs (AckLayer::retries); a ledger keeps one for each job";
            return refuse(format!("a limit of {most} attempts"), instead);
        }
        let given = match ctx.task_id().map(ToString::to_string) {
            None => None,
            Some(id) => match Uuid::parse_str(&id) {
                Ok(id) => Some(JobId(id)),
                Err(_) => {
                    return refuse(format!("the id {id:?}"), "a job's id is a UUID; without one it gets one");
                }
            },
        };
        let priority = ctx.priority().map(|priority| Priority::try_from(priority.min(9) as u8));
        let now = chrono::Utc::now().timestamp_millis();
        let run_at = ctx.run_at().and_then(|s| i64::try_from(s).ok()).map(|s| s.saturating_mul(1000));
        let mut envelope = Envelope::new(self.kind.clone(), self.name.clone(), self.tenant.clone());
        envelope.id = given.unwrap_or(envelope.id);
        envelope.priority = priority.and_then(Result::ok).unwrap_or(envelope.priority);
        // apalis stamps every task with the time of its push.
        envelope.run_at_ms = run_at.filter(|at| *at > now);
        envelope.trace = trace(ctx.metadata());
        envelope.fast = Some(args);
        Ok(envelope)
    }

    /// A page of the jobs of these queues, one queue after the other.
    async fn page(&self, names: &[QueueName], filter: &Filter) -> Result<Vec<Task<Value>>, QueueError> {
        let states: &[ListedState] = match filter.status {
            None => &[ListedState::Leased, ListedState::Waiting, ListedState::Scheduled],
            Some(Status::Pending) => &[ListedState::Waiting, ListedState::Scheduled],
            Some(Status::Running) => &[ListedState::Leased],
            // Whoever claims a job runs it, and what has ended has left Redis.
            Some(_) => &[],
        };
        let limit = (filter.limit() as usize).min(PAGE);
        let mut skip = u64::from(filter.page.saturating_sub(1)) * limit as u64;
        let mut tasks = Vec::new();
        for name in names {
            if tasks.len() >= limit {
                break;
            }
            let stats = self.queue.stats(name).await?;
            for state in states {
                let held = match state {
                    ListedState::Waiting => stats.depth(),
                    ListedState::Scheduled => stats.scheduled,
                    ListedState::Leased => stats.in_flight,
                };
                if skip >= held {
                    skip -= held;
                    continue;
                }
                if tasks.len() >= limit {
                    break;
                }
                let page = self.queue.list(name, *state, skip, limit - tasks.len()).await?;
                skip = 0;
                tasks.extend(page.into_iter().map(task));
            }
        }
        Ok(tasks)
    }

    async fn living(&self) -> Result<Vec<RunningWorker>, QueueError> {
        let workers = self.queue.workers().await?;
        Ok(workers
            .iter()
            .flat_map(|worker| worker.queues.iter().map(|queue| running(worker, queue)))
            .collect())
    }
}

/// The trace in a task's metadata: W3C's headers, or what apalis keeps of them.
fn trace(metadata: &MetadataStore) -> Option<TraceContext> {
    let trace = if let Some(parent) = metadata.get("traceparent") {
        TraceContext {
            traceparent: parent.to_owned(),
            tracestate: metadata.get("tracestate").map(str::to_owned),
        }
    } else {
        let context: TracingContext = metadata.extract_as().ok()?;
        let (trace, span) = (context.trace_id().as_ref()?, context.span_id().as_ref()?);
        let flags = context.trace_flags().unwrap_or_default();
        TraceContext {
            traceparent: format!("00-{trace}-{span}-{flags:02x}"),
            tracestate: context.trace_state().clone(),
        }
    };
    let fits = |text: &str| text.len() <= MAX_TRACE;
    Some(trace).filter(|trace| fits(&trace.traceparent) && trace.tracestate.as_deref().is_none_or(fits))
}

fn task(listed: Listed) -> Task<Value> {
    let Listed { envelope, state, owner, at_ms } = listed;
    let status = if state == ListedState::Leased { Status::Running } else { Status::Pending };
    let seconds = |ms: i64| u64::try_from(ms / 1000).unwrap_or_default();
    TaskBuilder::new(envelope.fast.unwrap_or_default())
        .task_id(TaskId::from_string(envelope.id.to_string()))
        .status(status)
        .priority(usize::from(envelope.priority.get()))
        .queue(envelope.queue.as_str().into())
        .run_at_timestamp(seconds(match state {
            ListedState::Scheduled => at_ms.unwrap_or(envelope.enqueued_at_ms),
            _ => envelope.run_at_ms.unwrap_or(envelope.enqueued_at_ms),
        }))
        .lock_by(owner)
        .build()
}

fn running(worker: &LivingWorker, queue: &QueueName) -> RunningWorker {
    let seconds = |ms: i64| u64::try_from(ms / 1000).unwrap_or_default();
    RunningWorker {
        id: worker.worker.to_string(),
        queue: queue.to_string(),
        backend: "flotilla".to_owned(),
        started_at: seconds(worker.started_at_ms),
        last_heartbeat: seconds(worker.last_seen_ms),
        layers: String::new(),
    }
}

fn statistics(stats: &QueueStats, rates: &Rates) -> Vec<Statistic> {
    let typed = |title: &str, stat_type, value: String, priority| Statistic {
        title: title.to_owned(),
        stat_type,
        value,
        priority: Some(priority),
    };
    let number =
        |title: &str, value: u64, priority| typed(title, StatType::Number, value.to_string(), priority);
    let decimal =
        |title: &str, value: f64, priority| typed(title, StatType::Decimal, format!("{value:.2}"), priority);
    let mut all = vec![
        number("Waiting", stats.depth(), 1),
        number("Running", stats.in_flight, 2),
        number("Scheduled", stats.scheduled, 3),
        number("Oldest waiting, ms", stats.oldest_ms().unwrap_or_default(), 4),
        decimal("Ended per second, last minute", rates.minute.per_second(), 15),
        decimal("Dead per second, last minute", rates.minute.dead_per_second(), 16),
        number("Ended in the last hour", rates.hour.ended, 17),
        number("Dead in the last hour", rates.hour.dead, 18),
    ];
    if let Some(fine) = rates.hour.fine() {
        let percent = format!("{:.2}", fine * 100.0);
        all.push(typed("Not dead in the last hour", StatType::Percentage, percent, 19));
    }
    for (priority, level) in stats.by_priority.iter().enumerate().rev().filter(|(_, level)| level.depth > 0) {
        all.push(number(&format!("Waiting with priority {priority}"), level.depth, 14 - priority as u64));
    }
    all
}

impl<T> Backend for Board<T> {
    type Task = Task<Value>;
    type Error = QueueError;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), QueueError>> {
        Poll::Ready(Ok(()))
    }

    /// A view hands out no jobs.
    fn poll_next(
        &mut self,
        _: &mut Context<'_>,
        _: &WorkerContext,
    ) -> Poll<Option<Result<Task<Value>, QueueError>>> {
        Poll::Ready(None)
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), QueueError>> {
        Poll::Ready(Ok(()))
    }
}

impl<T> BackendConfig for Board<T> {
    type Args = T;
    type Id = TaskId;
    type Kind = Durable;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Identity {
        Identity::new()
    }
}

impl<T> WireFormatBackend for Board<T> {
    type Codec = JsonCodec;
    type Compact = Value;

    fn codec(&self) -> &JsonCodec {
        &JsonCodec
    }
}

impl<T> ListQueues for Board<T> {
    async fn list_queues(&self) -> Result<Vec<QueueInfo>, QueueError> {
        let workers = self.queue.workers().await?;
        let mut infos = Vec::new();
        for name in self.queue.queues().await? {
            let serves = |worker: &&LivingWorker| worker.queues.contains(&name);
            let rates = self.queue.rates(&name).await?;
            infos.push(QueueInfo {
                stats: statistics(&self.queue.stats(&name).await?, &rates),
                workers: workers.iter().filter(serves).map(|worker| worker.worker.to_string()).collect(),
                activity: rates
                    .days
                    .iter()
                    .map(|ended| usize::try_from(*ended).unwrap_or(usize::MAX))
                    .collect(),
                name: name.to_string(),
            });
        }
        Ok(infos)
    }
}

impl<T> ListWorkers for Board<T> {
    async fn list_workers(&self) -> Result<Vec<RunningWorker>, QueueError> {
        let mut workers = self.living().await?;
        workers.retain(|worker| worker.queue == self.name.as_str());
        Ok(workers)
    }

    async fn list_all_workers(&self) -> Result<Vec<RunningWorker>, QueueError> {
        self.living().await
    }
}

impl<T> ListTasks for Board<T> {
    async fn list_tasks(&self, filter: &Filter) -> Result<Vec<Task<Value>>, QueueError> {
        self.page(std::slice::from_ref(&self.name), filter).await
    }
}

impl<T> ListAllTasks for Board<T> {
    /// The queues come by name, one after the other.
    async fn list_all_tasks(&self, filter: &Filter) -> Result<Vec<Task<Value>>, QueueError> {
        self.page(&self.queue.queues().await?, filter).await
    }
}

impl<T> Metrics for Board<T> {
    async fn global(&self) -> Result<Vec<Statistic>, QueueError> {
        let (mut sum, mut rates) = (QueueStats::default(), Rates::none());
        for name in self.queue.queues().await? {
            let stats = self.queue.stats(&name).await?;
            for (all, one) in sum.by_priority.iter_mut().zip(stats.by_priority) {
                all.depth += one.depth;
                all.oldest_ms = all.oldest_ms.max(one.oldest_ms);
            }
            sum.scheduled += stats.scheduled;
            sum.in_flight += stats.in_flight;
            rates.add(&self.queue.rates(&name).await?);
        }
        Ok(statistics(&sum, &rates))
    }

    async fn fetch_by_queue(&self) -> Result<Vec<Statistic>, QueueError> {
        Ok(statistics(&self.queue.stats(&self.name).await?, &self.queue.rates(&self.name).await?))
    }
}

impl<T> FetchById for Board<T> {
    /// Also by the id that a handler sees, which is the job's and its claim's: `<uuid>/<token>`.
    async fn fetch_by_id(&mut self, id: &TaskId) -> Result<Option<Task<Value>>, QueueError> {
        let id = id.to_string();
        let job = id.split_once('/').map_or(id.as_str(), |(job, _)| job);
        let Ok(id) = Uuid::parse_str(job) else { return Ok(None) };
        Ok(self.queue.find(&self.name, JobId(id)).await?.map(task))
    }
}

/// Tasks go in chunks of 500. After an error those that wait to be sent are forgotten, so that a caller who pushes all again
/// does not push them twice; chunks before it are stored. Who gives each task a UUID as its id may push all again.
impl<T> Sink<Task<Value>> for Board<T> {
    type Error = QueueError;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), QueueError>> {
        if self.outgoing.len() < crate::queue::CHUNK { Poll::Ready(Ok(())) } else { self.poll_flush(cx) }
    }

    fn start_send(self: Pin<&mut Self>, task: Task<Value>) -> Result<(), QueueError> {
        let this = self.get_mut();
        let envelope = this.envelope(task).inspect_err(|_| this.outgoing.clear())?;
        this.outgoing.push(envelope);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), QueueError>> {
        let this = self.get_mut();
        let under_way = this.sending.get_mut().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(sending) = under_way {
                let sent = ready!(sending.as_mut().poll(cx));
                *under_way = None;
                sent.inspect_err(|_| this.outgoing.clear())?;
            }
            if this.outgoing.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let (queue, envelopes) = (this.queue.clone(), std::mem::take(&mut this.outgoing));
            *under_way = Some(Box::pin(async move {
                let answers = queue.push(&envelopes).await?;
                let mut refusals = answers.iter().filter_map(|answer| answer.refusal());
                match refusals.next() {
                    None => Ok(()),
                    Some(why) => {
                        Err(QueueError::Refused { refused: 1 + refusals.count(), pushed: answers.len(), why })
                    }
                }
            }));
        }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), QueueError>> {
        self.poll_flush(cx)
    }
}
