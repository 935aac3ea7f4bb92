//! Which queues there are and which workers live, for people, and for those who look for a job without knowing its queue. No job's
//! way depends on it: it is lost with Redis' data and comes back within a minute.

use std::time::{Duration, Instant};

use redis::Value;
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::QueueError,
    ids::{QueueName, WorkerId},
    outage::Outage,
    queue::{Queue, text},
    reply::Reply,
    scripts,
};

/// How often a worker says that it lives, and a producer which queues it pushes to.
const EVERY: Duration = Duration::from_secs(10);
/// A worker of which nothing was heard for so long is forgotten.
const WORKER_SILENCE: Duration = Duration::from_secs(60);
/// A queue to which nothing was pushed, and which no worker served, for so long is forgotten.
const QUEUE_SILENCE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most workers, and most queues, that the registry keeps.
const KEEP: usize = 1000;

/// A worker as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LivingWorker {
    /// Who it is.
    pub worker: WorkerId,
    /// What it serves.
    pub queues: Vec<QueueName>,
    /// When it started, in unix ms of its own clock. For people only.
    pub started_at_ms: i64,
    /// When it was last heard of, in unix ms of Redis' clock.
    #[serde(default)]
    pub last_seen_ms: i64,
}

/// Queues that a handle told of, and when.
#[derive(Debug, Default)]
pub(crate) struct Told(std::sync::Mutex<std::collections::HashMap<QueueName, Instant>>);

impl Told {
    /// Of these queues those that were not told of lately; they count as told now.
    fn due<'a>(&self, names: impl Iterator<Item = &'a QueueName>) -> Vec<QueueName> {
        let mut told = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut due: Vec<QueueName> = Vec::new();
        let mut last = None;
        for name in names {
            // A batch is nearly always of one queue.
            if last.replace(name) == Some(name) {
                continue;
            }
            if told.get(name).is_none_or(|at| at.elapsed() >= EVERY) {
                told.insert(name.clone(), Instant::now());
                due.push(name.clone());
            }
        }
        due
    }
}

impl Queue {
    pub(crate) fn registry_key(&self) -> String {
        format!("{{{}:registry}}", self.config().prefix)
    }

    /// Says that a worker lives, and which queues there are.
    pub async fn register(
        &self,
        worker: Option<&LivingWorker>,
        queues: &[QueueName],
    ) -> Result<(), QueueError> {
        let mut args = vec![
            self.now(),
            text(WORKER_SILENCE.as_millis()),
            text(QUEUE_SILENCE.as_millis()),
            text(KEEP),
            match worker {
                Some(worker) => serde_json::to_vec(worker)
                    .map_err(|error| QueueError::Protocol(format!("a worker's record: {error}")))?,
                None => Vec::new(),
            },
            worker.map(|worker| text(&worker.worker)).unwrap_or_default(),
        ];
        args.extend(queues.iter().map(text));
        self.shared.link.script(&scripts::REGISTER, &self.registry_key(), &args).await.map(drop)
    }

    /// Notes queues that this handle pushes to, each once in ten seconds. Never fails a push.
    pub(crate) async fn note<'a>(&self, names: impl Iterator<Item = &'a QueueName>) {
        let due = self.shared.told.due(names);
        if !due.is_empty()
            && let Err(error) = self.register(None, &due).await
        {
            tracing::debug!(%error, "the registry of queues was not told");
        }
    }

    /// The queues of this prefix that somebody pushed to or served within the last week, by name; at most 1,000.
    pub async fn queues(&self) -> Result<Vec<QueueName>, QueueError> {
        let mut range = redis::cmd("ZRANGE");
        range.arg(format!("{}:q", self.registry_key())).arg(0).arg(KEEP - 1);
        let mut reply = Reply::new(self.shared.link.command(&range).await?.value)?;
        let mut names = Vec::with_capacity(reply.len());
        while !reply.is_empty() {
            names.push(reply.parsed("a queue's name")?);
        }
        names.sort();
        Ok(names)
    }

    /// The workers that were heard of within the last minute, the latest first; at most 1,000.
    pub async fn workers(&self) -> Result<Vec<LivingWorker>, QueueError> {
        let key = self.registry_key();
        let mut range = redis::cmd("ZRANGE");
        range.arg(format!("{key}:w")).arg(0).arg(KEEP - 1).arg("REV").arg("WITHSCORES");
        let mut reply = Reply::new(self.shared.link.command(&range).await?.value)?;
        let mut seen = Vec::with_capacity(reply.len() / 2);
        while !reply.is_empty() {
            seen.push((reply.text()?, reply.integer()?));
        }
        if seen.is_empty() {
            return Ok(Vec::new());
        }
        let mut get = redis::cmd("HMGET");
        get.arg(format!("{key}:i"));
        for (worker, _) in &seen {
            get.arg(worker);
        }
        let mut records = Reply::new(self.shared.link.command(&get).await?.value)?;
        let silent_since = self.redis_now().await? - WORKER_SILENCE.as_millis() as i64;
        let mut workers = Vec::with_capacity(seen.len());
        for (_, last_seen_ms) in seen {
            if let Some(record) = records.optional()?
                && last_seen_ms > silent_since
            {
                let worker: LivingWorker = serde_json::from_str(&record)
                    .map_err(|error| QueueError::Protocol(format!("a worker's record: {error}")))?;
                workers.push(LivingWorker { last_seen_ms, ..worker });
            }
        }
        Ok(workers)
    }

    /// Takes a worker out of the registry, because it stops.
    pub async fn unregister(&self, worker: &WorkerId) -> Result<(), QueueError> {
        let key = self.registry_key();
        let mut pipeline = redis::pipe();
        pipeline.cmd("ZREM").arg(format!("{key}:w")).arg(worker.as_str());
        pipeline.cmd("HDEL").arg(format!("{key}:i")).arg(worker.as_str());
        self.shared.link.pipeline(&pipeline).await.map(drop)
    }

    pub(crate) async fn redis_now(&self) -> Result<i64, QueueError> {
        if let Some(now) = self.now_ms {
            return Ok(now);
        }
        let value: Value = self.shared.link.command(&redis::cmd("TIME")).await?.value;
        let mut time = Reply::new(value)?;
        Ok(time.integer()? * 1000 + time.integer()? / 1000)
    }
}

/// Tells the registry that a worker lives, and how many jobs have ended in this process.
#[derive(Debug)]
pub struct Presence;

impl Presence {
    /// Says so at once and then every ten seconds until shutdown, and takes the worker out of the registry then.
    pub fn spawn(
        queue: Queue,
        worker: WorkerId,
        queues: Vec<QueueName>,
        shutdown: CancellationToken,
    ) -> JoinHandle<()> {
        let started_at_ms = chrono::Utc::now().timestamp_millis();
        let living = LivingWorker { worker, queues, started_at_ms, last_seen_ms: 0 };
        tokio::spawn(async move {
            let mut outage = Outage::new("presence");
            let mut ticks = interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    _ = ticks.tick() => {}
                }
                let told = async {
                    queue.register(Some(&living), &living.queues).await?;
                    queue.tell_ended().await
                };
                match told.await {
                    Ok(()) => outage.over(),
                    // The next tick is pause enough.
                    Err(error) => drop(outage.wait(&error)),
                }
            }
            if let Err(error) = queue.tell_ended().await {
                tracing::debug!(%error, "the last jobs that ended here are missing in the rates");
            }
            if let Err(error) = queue.unregister(&living.worker).await {
                tracing::debug!(%error, "the registry still has this worker for a minute");
            }
        })
    }
}
