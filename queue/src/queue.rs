//! The queue itself: every operation, as one script call per partition and chunk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, stream};
use redis::Value;
use uuid::Uuid;

use crate::{
    STATS_TENANTS,
    config::QueueConfig,
    envelope::{
        Beat, Claim, Envelope, Epoch, LeaseRef, Place, PriorityStats, Pushed, QueueStats, TraceContext,
    },
    error::QueueError,
    ids::{JobId, LeaseToken, Priority, QueueName, TenantId, WorkerId},
    link::{Answer, Link},
    partition::{partition_key, partition_of},
    reply::{self, Reply},
    scripts::{self, Script},
};

/// Most jobs in one script call; a longer list is sent as several calls. Keeps one call under about 5 ms.
pub const CHUNK: usize = 500;
/// Most jobs that one claim leases in one partition.
pub const MAX_CLAIM: usize = 256;
/// Values per job in the answer of `claim.lua`.
const CLAIM_FIELDS: usize = 10;
/// Most stale list entries that one claim drops.
const MAX_STALE: usize = 1000;
/// Script calls of one operation that are under way together.
const CALLS_AT_ONCE: usize = 8;
/// Most script calls that one `reap` or `promote` makes per partition; the next round goes on.
const ROUNDS: usize = 200;
/// Most leases that [`Queue::leases`] returns per partition.
const MAX_LEASES: usize = 100_000;
/// The probe's deadline: shorter than any answer's, so that an outage is told from one slow call.
const PROBE_DEADLINE: Duration = Duration::from_millis(500);

/// A handle to the queues of one Redis and prefix. Cheap to clone; all clones share one connection, which opens when
/// needed and comes back by itself after an outage. Every call ends within the response timeout, plus the connect
/// timeout if it has to connect. Calls are cancel-safe in that nothing breaks, but a call that was abandoned or ended
/// with [`QueueError::Unavailable`] may still have run; all of them can be repeated.
#[derive(Clone)]
pub struct Queue {
    shared: Arc<Shared>,
    /// Stands for Redis' clock; only tests set it.
    now_ms: Option<i64>,
}

struct Shared {
    config: QueueConfig,
    link: Link,
    probe: Link,
    rotation: AtomicUsize,
}

/// What one claim in one partition brought.
pub(crate) struct Claimed {
    pub claims: Vec<Claim>,
    /// A further claim would find something.
    pub more: bool,
}

/// When a reaper may reap; all times are Redis' own, in ms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReapGuard {
    /// When this reaper last reached Redis; 0 if never.
    pub last: i64,
    /// A longer silence than this was an outage.
    pub outage: i64,
    /// Not before this time.
    pub not_before: i64,
}

/// What one look for expired leases in one partition brought.
#[derive(Debug, Default)]
pub(crate) struct Reaped {
    /// Redis' time.
    pub now_ms: i64,
    /// The partition's present life.
    pub epoch: Option<Epoch>,
    /// Nothing was reaped because Redis, or the reaper, was away.
    pub outage: bool,
    /// The jobs that wait again.
    pub jobs: Vec<JobId>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("prefix", &self.shared.config.prefix).finish_non_exhaustive()
    }
}

impl Queue {
    /// Connects, and refuses a server that may evict jobs or is older than Redis 7.
    pub async fn connect(config: QueueConfig) -> Result<Self, QueueError> {
        let queue = Self::lazy(config)?;
        queue.run_id().await?;
        Ok(queue)
    }

    /// Checks the settings only; the server is checked whenever a connection opens. For producers, which must start
    /// while Redis is down.
    pub fn lazy(config: QueueConfig) -> Result<Self, QueueError> {
        config.check()?;
        let link = Link::new(&config)?;
        let connect = config.connect_timeout.min(PROBE_DEADLINE);
        let probe = Link::with_deadlines(&config, connect, config.response_timeout.min(PROBE_DEADLINE))?;
        Ok(Self {
            shared: Arc::new(Shared { config, link, probe, rotation: AtomicUsize::new(0) }),
            now_ms: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &QueueConfig {
        &self.shared.config
    }

    /// The same queue at another time. Tests move schedules and leases with it instead of waiting.
    #[doc(hidden)]
    pub fn at(&self, now_ms: i64) -> Self {
        Self { shared: Arc::clone(&self.shared), now_ms: Some(now_ms) }
    }

    /// Writes the ledger's id under the prefix, or checks it. [`QueueError::OtherLedger`] if another ledger owns it.
    pub async fn stamp(&self, ledger: Uuid) -> Result<(), QueueError> {
        let ours = ledger.to_string();
        let mut set = redis::cmd("SET");
        set.arg(self.stamp_key()).arg(&ours).arg("NX").arg("GET");
        match self.shared.link.command(&set).await?.value {
            Value::Nil => Ok(()),
            value => {
                let found = reply::text(value)?;
                if found == ours {
                    Ok(())
                } else {
                    Err(QueueError::OtherLedger { prefix: self.config().prefix.clone(), found, ours: ledger })
                }
            }
        }
    }

    /// Whether the prefix is stamped. `false` after a successful [`stamp`](Self::stamp) means that Redis lost its
    /// data: reconcile with the ledger, then stamp again.
    pub async fn stamped(&self) -> Result<bool, QueueError> {
        let mut exists = redis::cmd("EXISTS");
        exists.arg(self.stamp_key());
        Ok(reply::number(&self.shared.link.command(&exists).await?.value)? > 0)
    }

    fn stamp_key(&self) -> String {
        format!("{{{}:ledger}}", self.config().prefix)
    }

    /// Stores jobs that are not known yet; one answer per envelope, in order. Idempotent by job id: one that is
    /// waiting, scheduled or leased is left as it is. Up to [`CHUNK`] jobs of a partition go in one round trip.
    /// [`QueueError::Full`] when Redis' memory is full; the window is answered per job.
    pub async fn push(&self, envelopes: &[Envelope]) -> Result<Vec<Pushed>, QueueError> {
        let window = self.config().partition_window();
        let answers = self
            .each(
                &scripts::PUSH,
                envelopes,
                |envelope| (&envelope.queue, self.partition_of(envelope.id)),
                || vec![self.now(), text(window), nonce()],
                |args, envelope| {
                    args.push(text(envelope.id));
                    push_record(args, envelope);
                },
            )
            .await?;
        answers
            .into_iter()
            .map(|answer| match answer {
                0 => Ok(Pushed::Present),
                1 => Ok(Pushed::Queued),
                2 => Ok(Pushed::Full),
                other => Err(QueueError::Protocol(format!("push answered {other}"))),
            })
            .collect()
    }

    /// Leases up to `max` waiting jobs, starting with another partition each time. Empty when none waits. If the
    /// answer is lost ([`QueueError::Unavailable`]), the jobs that the claim may have leased come back by the reaper.
    pub async fn claim(
        &self,
        queue: &QueueName,
        worker: &WorkerId,
        max: usize,
    ) -> Result<Vec<Claim>, QueueError> {
        let partitions = self.config().partitions;
        let start = self.shared.rotation.fetch_add(1, Ordering::Relaxed);
        let mut claims = Vec::new();
        for step in 0..usize::from(partitions) {
            let partition = (start.wrapping_add(step) % usize::from(partitions)) as u16;
            match self.claim_partition(queue, partition, worker, max - claims.len()).await {
                Ok(found) => claims.extend(found.claims),
                // What was claimed already must not be forgotten.
                Err(error) if claims.is_empty() => return Err(error),
                Err(_) => break,
            }
            if claims.len() >= max {
                break;
            }
        }
        Ok(claims)
    }

    pub(crate) async fn claim_partition(
        &self,
        queue: &QueueName,
        partition: u16,
        worker: &WorkerId,
        max: usize,
    ) -> Result<Claimed, QueueError> {
        if max == 0 {
            return Ok(Claimed { claims: Vec::new(), more: true });
        }
        let config = self.config();
        let args = [
            self.now(),
            text(max.min(MAX_CLAIM)),
            text(config.lease.as_millis()),
            text(config.aging.as_millis()),
            text(MAX_STALE),
            nonce(),
            text(worker),
        ];
        let sent_at = Instant::now();
        let answer = self.script(&scripts::CLAIM, queue, partition, &args).await?;
        let mut reply = Reply::new(answer.value)?;
        let epoch = Epoch { data: reply.text()?.into(), run: answer.run_id };
        let more = reply.integer()? == 1;
        let mut claims = Vec::with_capacity(reply.len() / CLAIM_FIELDS);
        while !reply.is_empty() {
            let mut record = reply.take(CLAIM_FIELDS)?;
            let id: JobId = record.parsed("a job id")?;
            let token = LeaseToken(record.text()?.into());
            match read_record(&mut record, id, queue) {
                Ok(envelope) => claims.push(Claim {
                    envelope: Arc::new(envelope),
                    token,
                    partition,
                    queue: queue.clone(),
                    epoch: epoch.clone(),
                    sent_at,
                }),
                Err(error) => {
                    // Left alone it would come back for ever. The ledger, if it has the job, sends a sound copy.
                    tracing::error!(%id, %queue, %error, "dropping a job whose record in Redis can't be read");
                    let args = [text(id), text(token.as_str())];
                    self.script(&scripts::ACK, queue, partition, &args).await?;
                }
            }
        }
        metrics::histogram!("queue_claim_seconds").record(sent_at.elapsed().as_secs_f64());
        if !claims.is_empty() {
            metrics::counter!("queue_jobs_claimed_total", "queue" => queue.to_string())
                .increment(claims.len() as u64);
        }
        Ok(Claimed { claims, more })
    }

    /// Removes finished jobs. One answer per lease: `false` if it is not ours any more (nothing was changed).
    pub async fn ack(&self, leases: &[LeaseRef]) -> Result<Vec<bool>, QueueError> {
        let answers = self
            .each(&scripts::ACK, leases, lease_place, Vec::new, |args, lease| {
                args.extend([text(lease.id), text(lease.token.as_str())]);
            })
            .await?;
        for (lease, answer) in leases.iter().zip(&answers) {
            if *answer == 1 {
                metrics::counter!("queue_jobs_acked_total", "queue" => lease.queue.to_string()).increment(1);
            }
        }
        Ok(answers.into_iter().map(|answer| answer == 1).collect())
    }

    /// Gives jobs back: to the front of their lists when the delay is zero, else to the schedule (whole ms). One
    /// answer per lease: `false` if it is not ours any more (nothing was changed).
    pub async fn release(&self, leases: &[(LeaseRef, Duration)]) -> Result<Vec<bool>, QueueError> {
        let answers = self
            .each(
                &scripts::RELEASE,
                leases,
                |(lease, _)| lease_place(lease),
                || vec![self.now()],
                |args, (lease, delay)| {
                    args.extend([
                        text(lease.id),
                        text(lease.token.as_str()),
                        text(delay.as_micros().div_ceil(1000)),
                    ]);
                },
            )
            .await?;
        Ok(answers.into_iter().map(|answer| answer == 1).collect())
    }

    /// Extends leases by the full lease time. Leases that vanished with Redis' data are registered again with the
    /// token that the caller holds.
    pub async fn heartbeat(&self, leases: &[LeaseRef]) -> Result<Vec<Beat>, QueueError> {
        let run_id = self.shared.link.run_id().await?;
        let lease_ms = self.config().lease.as_millis();
        let answers = self
            .each(
                &scripts::HEARTBEAT,
                leases,
                lease_place,
                || vec![self.now(), text(lease_ms)],
                |args, lease| {
                    let restarted = u8::from(lease.epoch.run != run_id);
                    args.extend([
                        text(lease.id),
                        text(lease.token.as_str()),
                        text(&lease.epoch.data),
                        text(restarted),
                    ]);
                },
            )
            .await?;
        let gone: Vec<&LeaseRef> =
            leases.iter().zip(&answers).filter(|(_, answer)| **answer == 2).map(|(lease, _)| lease).collect();
        let mut restored = Vec::new();
        if !gone.is_empty() {
            restored = self
                .each(
                    &scripts::RESTORE,
                    &gone,
                    |lease| lease_place(lease),
                    || vec![self.now(), text(lease_ms), nonce()],
                    |args, lease| {
                        args.extend([text(lease.id), text(lease.token.as_str())]);
                        push_record(args, &lease.envelope);
                    },
                )
                .await?;
        }
        let mut restored = restored.into_iter();
        Ok(answers
            .into_iter()
            .map(|answer| match answer {
                1 => Beat::Extended,
                2 if restored.next() == Some(2) => Beat::Reregistered,
                _ => Beat::Lost,
            })
            .collect())
    }

    /// Puts jobs with expired leases back to the front of their lists, over all partitions. Bounded per call. Doesn't
    /// ask whether Redis was away meanwhile; the [`Reaper`](crate::Reaper) does.
    pub async fn reap(&self, queue: &QueueName) -> Result<Vec<JobId>, QueueError> {
        let mut reaped = Vec::new();
        for partition in 0..self.config().partitions {
            reaped.extend(self.reap_partition(queue, partition, None).await?.jobs);
        }
        Ok(reaped)
    }

    pub(crate) async fn reap_partition(
        &self,
        queue: &QueueName,
        partition: u16,
        guard: Option<ReapGuard>,
    ) -> Result<Reaped, QueueError> {
        let mut reaped = Reaped::default();
        let mut last = guard.map(|guard| guard.last);
        for _ in 0..ROUNDS {
            let args = [
                self.now(),
                text(CHUNK),
                optional(last),
                optional(guard.map(|guard| guard.outage)),
                optional(guard.map(|guard| guard.not_before)),
            ];
            let answer = self.script(&scripts::REAP, queue, partition, &args).await?;
            let mut reply = Reply::new(answer.value)?;
            reaped.now_ms = reply.integer()?;
            reaped.epoch = reply.optional()?.map(|data| Epoch { data: data.into(), run: answer.run_id });
            reaped.outage = reply.integer()? == 1;
            let more = reply.integer()? == 1;
            last = last.map(|_| reaped.now_ms);
            while !reply.is_empty() {
                reaped.jobs.push(reply.parsed("a job id")?);
            }
            if !more {
                break;
            }
        }
        if !reaped.jobs.is_empty() {
            metrics::counter!("queue_leases_reaped_total", "queue" => queue.to_string())
                .increment(reaped.jobs.len() as u64);
        }
        Ok(reaped)
    }

    /// Which life of its data a partition is in; `None` if it has none (nothing was written since it was lost).
    pub(crate) async fn epoch(&self, queue: &QueueName, partition: u16) -> Result<Option<Epoch>, QueueError> {
        let mut get = redis::cmd("HGET");
        get.arg(partition_key(self.config(), queue, partition)).arg("epoch");
        let answer = self.shared.link.command(&get).await?;
        match answer.value {
            Value::Nil => Ok(None),
            value => Ok(Some(Epoch { data: reply::text(value)?.into(), run: answer.run_id })),
        }
    }

    /// Moves jobs whose time has come to their lists, over all partitions. Returns how many. Bounded per call.
    pub async fn promote(&self, queue: &QueueName) -> Result<u64, QueueError> {
        let mut promoted = 0;
        for partition in 0..self.config().partitions {
            promoted += self.promote_partition(queue, partition).await?.0;
        }
        Ok(promoted)
    }

    /// As [`promote`](Self::promote) for one partition; also how long until the next job there is due.
    pub(crate) async fn promote_partition(
        &self,
        queue: &QueueName,
        partition: u16,
    ) -> Result<(u64, Option<Duration>), QueueError> {
        let (mut promoted, mut next) = (0, None);
        for _ in 0..ROUNDS {
            let answer = self.script(&scripts::PROMOTE, queue, partition, &[self.now(), text(CHUNK)]).await?;
            let mut reply = Reply::new(answer.value)?;
            let moved = reply.integer()?.unsigned_abs();
            next = u64::try_from(reply.integer()?).ok().map(Duration::from_millis);
            promoted += moved;
            if (moved as usize) < CHUNK {
                break;
            }
        }
        Ok((promoted, next))
    }

    /// Drops waiting and scheduled jobs (cancel). Leased and unknown jobs are left alone.
    pub async fn forget(&self, jobs: &[(QueueName, JobId)]) -> Result<(), QueueError> {
        self.each(
            &scripts::FORGET,
            jobs,
            |job| self.job_place(job),
            Vec::new,
            |args, (_, id)| args.push(text(id)),
        )
        .await
        .map(drop)
    }

    /// Gives jobs another priority; a waiting one goes to the end of its tenant's list there. Unknown jobs are left.
    pub async fn reprioritise(&self, jobs: &[(QueueName, JobId, Priority)]) -> Result<(), QueueError> {
        self.each(
            &scripts::REPRIORITISE,
            jobs,
            |(queue, id, _)| (queue, self.partition_of(*id)),
            Vec::new,
            |args, (_, id, priority)| args.extend([text(id), text(priority)]),
        )
        .await
        .map(drop)
    }

    /// Which of these jobs Redis doesn't know: neither waiting, scheduled nor leased.
    pub async fn missing(&self, jobs: &[(QueueName, JobId)]) -> Result<Vec<JobId>, QueueError> {
        let mut missing = Vec::new();
        for chunk in jobs.chunks(CHUNK) {
            let mut pipeline = redis::pipe();
            for job in chunk {
                let (queue, partition) = self.job_place(job);
                pipeline.cmd("EXISTS").arg(format!(
                    "{}:j:{}",
                    partition_key(self.config(), queue, partition),
                    job.1
                ));
            }
            let answers = self.shared.link.pipeline(&pipeline).await?;
            for ((_, id), answer) in chunk.iter().zip(&answers) {
                if reply::number(answer)? == 0 {
                    missing.push(*id);
                }
            }
        }
        Ok(missing)
    }

    /// Where each of these jobs is in Redis, in order; `None`: Redis doesn't know it. For audits.
    pub async fn places(&self, jobs: &[(QueueName, JobId)]) -> Result<Vec<Option<Place>>, QueueError> {
        let mut places = Vec::with_capacity(jobs.len());
        for chunk in jobs.chunks(CHUNK) {
            let mut pipeline = redis::pipe();
            pipeline.cmd("TIME");
            for job in chunk {
                let (queue, partition) = self.job_place(job);
                let key = partition_key(self.config(), queue, partition);
                pipeline.cmd("HGET").arg(format!("{key}:j:{}", job.1)).arg("s");
                pipeline.cmd("ZSCORE").arg(format!("{key}:l")).arg(job.1.to_string());
            }
            let mut answers = self.shared.link.pipeline(&pipeline).await?.into_iter();
            let mut time = Reply::new(answers.next().unwrap_or(Value::Nil))?;
            let now = self.now_ms.unwrap_or(time.integer()? * 1000 + time.integer()? / 1000);
            while let (Some(state), Some(lease)) = (answers.next(), answers.next()) {
                let left_ms = match &lease {
                    Value::Nil => None,
                    end => Some(reply::number(end)? - now),
                };
                places.push(match state {
                    Value::Nil => None,
                    state => Some(match reply::text(state)?.as_str() {
                        "w" => Place::Waiting,
                        "s" => Place::Scheduled,
                        "l" => Place::Leased { left_ms },
                        other => return Err(QueueError::Protocol(format!("a job's state is {other:?}"))),
                    }),
                });
            }
        }
        Ok(places)
    }

    /// Depth, age, scheduled and leased jobs, summed over all partitions (the age is the highest).
    pub async fn stats(&self, queue: &QueueName) -> Result<QueueStats, QueueError> {
        let mut stats = QueueStats::default();
        for partition in 0..self.config().partitions {
            let args = [self.now(), text(STATS_TENANTS)];
            let mut reply = Reply::new(self.script(&scripts::STATS, queue, partition, &args).await?.value)?;
            for level in &mut stats.by_priority {
                level.depth += reply.integer()?.unsigned_abs();
            }
            for PriorityStats { oldest_ms, .. } in &mut stats.by_priority {
                *oldest_ms = (*oldest_ms).max(u64::try_from(reply.integer()?).ok());
            }
            stats.scheduled += reply.integer()?.unsigned_abs();
            stats.in_flight += reply.integer()?.unsigned_abs();
        }
        Ok(stats)
    }

    /// How many jobs of a tenant wait or are scheduled in a queue.
    pub async fn tenant_depth(&self, queue: &QueueName, tenant: &TenantId) -> Result<u64, QueueError> {
        let mut pipeline = redis::pipe();
        for partition in 0..self.config().partitions {
            let key = format!("{}:t", partition_key(self.config(), queue, partition));
            pipeline.cmd("HGET").arg(key).arg(tenant.as_str());
        }
        self.shared.link.pipeline(&pipeline).await?.iter().try_fold(0, |sum, value| match value {
            Value::Nil => Ok(sum),
            value => Ok(sum + reply::number(value)?.unsigned_abs()),
        })
    }

    /// Leased jobs with the end of their lease in unix ms of Redis' clock, soonest first per partition; at most
    /// 100,000 per partition. For audits.
    pub async fn leases(&self, queue: &QueueName) -> Result<Vec<(JobId, i64)>, QueueError> {
        let mut leases = Vec::new();
        for partition in 0..self.config().partitions {
            let key = format!("{}:l", partition_key(self.config(), queue, partition));
            for page in 0..MAX_LEASES / CHUNK {
                let mut range = redis::cmd("ZRANGE");
                range.arg(&key).arg(page * CHUNK).arg((page + 1) * CHUNK - 1).arg("WITHSCORES");
                let mut reply = Reply::new(self.shared.link.command(&range).await?.value)?;
                let found = reply.len() / 2;
                while !reply.is_empty() {
                    leases.push((reply.parsed("a job id")?, reply.integer()?));
                }
                if found < CHUNK {
                    break;
                }
            }
        }
        Ok(leases)
    }

    /// Whether Redis answers, on a connection of its own and within half a second.
    pub async fn ping(&self) -> Result<(), QueueError> {
        self.shared.probe.command(&redis::cmd("PING")).await.map(drop)
    }

    /// The `run_id` of the server that the present connection leads to; a new one means that the server restarted.
    /// Costs no round trip while the connection stands: a restart always ends it.
    pub async fn run_id(&self) -> Result<String, QueueError> {
        Ok(self.shared.link.run_id().await?.as_ref().to_owned())
    }

    pub(crate) fn partition_of(&self, id: JobId) -> u16 {
        partition_of(id, self.config().partitions)
    }

    fn job_place<'a>(&self, (queue, id): &'a (QueueName, JobId)) -> (&'a QueueName, u16) {
        (queue, self.partition_of(*id))
    }

    fn now(&self) -> Vec<u8> {
        self.now_ms.map(text).unwrap_or_default()
    }

    async fn script(
        &self,
        script: &Script,
        queue: &QueueName,
        partition: u16,
        args: &[Vec<u8>],
    ) -> Result<Answer, QueueError> {
        let key = partition_key(self.config(), queue, partition);
        self.shared.link.script(script, &key, args).await
    }

    /// Runs a script that answers one number per item: groups the items by partition, sends chunks side by side, and
    /// returns the answers in the items' order.
    async fn each<'a, T>(
        &self,
        script: &'static Script,
        items: &'a [T],
        place: impl Fn(&'a T) -> (&'a QueueName, u16),
        head: impl Fn() -> Vec<Vec<u8>>,
        write: impl Fn(&mut Vec<Vec<u8>>, &'a T),
    ) -> Result<Vec<i64>, QueueError> {
        let mut places: Vec<((&QueueName, u16), usize)> =
            items.iter().enumerate().map(|(index, item)| (place(item), index)).collect();
        places.sort_by(|a, b| a.0.cmp(&b.0)); // stable: items of one partition keep their order
        let mut calls = Vec::new();
        for group in places.chunk_by(|a, b| a.0 == b.0) {
            for chunk in group.chunks(CHUNK) {
                let ((queue, partition), _) = chunk[0];
                let indices: Vec<usize> = chunk.iter().map(|(_, index)| *index).collect();
                let mut args = head();
                for index in &indices {
                    write(&mut args, &items[*index]);
                }
                let key = partition_key(self.config(), queue, partition);
                calls.push(numbers(Arc::clone(&self.shared), script, key, args, indices));
            }
        }
        let mut answers = vec![0; items.len()];
        let mut results = stream::iter(calls).buffered(CALLS_AT_ONCE);
        while let Some((indices, mut reply)) = results.try_next().await? {
            for index in indices {
                answers[index] = reply.integer()?;
            }
        }
        Ok(answers)
    }
}

/// One script call of [`Queue::each`]: the items' indices and their answers.
async fn numbers(
    shared: Arc<Shared>,
    script: &'static Script,
    key: String,
    args: Vec<Vec<u8>>,
    indices: Vec<usize>,
) -> Result<(Vec<usize>, Reply), QueueError> {
    let answer = shared.link.script(script, &key, &args).await?;
    Ok((indices, Reply::new(answer.value)?))
}

fn lease_place(lease: &LeaseRef) -> (&QueueName, u16) {
    (&lease.queue, lease.partition)
}

fn text(value: impl std::fmt::Display) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// Random text that nobody else has.
fn nonce() -> Vec<u8> {
    text(format_args!("{:032x}", rand::random::<u128>()))
}

fn optional(value: Option<impl std::fmt::Display>) -> Vec<u8> {
    value.map(text).unwrap_or_default()
}

/// The fields that push and restore share: kind, priority, tenant, `run_at`, `enqueued_at`, trace, fast record.
fn push_record(args: &mut Vec<Vec<u8>>, envelope: &Envelope) {
    let trace = envelope.trace.as_ref();
    args.extend([
        text(&envelope.kind),
        text(envelope.priority),
        text(&envelope.tenant),
        optional(envelope.run_at_ms),
        text(envelope.enqueued_at_ms),
        optional(trace.map(|trace| &trace.traceparent)),
        optional(trace.and_then(|trace| trace.tracestate.as_ref())),
        optional(envelope.fast.as_ref()),
    ]);
}

/// Reads the fields in the order that `claim.lua` returns them.
fn read_record(reply: &mut Reply, id: JobId, queue: &QueueName) -> Result<Envelope, QueueError> {
    let kind = reply.text()?;
    let priority = reply.parsed::<i64>("a priority")?;
    let priority = Priority::try_from(priority).map_err(|error| QueueError::Protocol(error.to_string()))?;
    let tenant = reply.parsed("a tenant")?;
    let run_at_ms = match reply.optional()? {
        None => None,
        Some(at) => Some(at.parse().map_err(|_| QueueError::Protocol(format!("run_at is {at:?}")))?),
    };
    let enqueued_at_ms = reply.parsed("a time")?;
    let traceparent = reply.optional()?;
    let tracestate = reply.optional()?;
    let fast =
        match reply.optional()? {
            None => None,
            Some(json) => Some(serde_json::from_str(&json).map_err(|error| {
                QueueError::Protocol(format!("the record of job {id} is no JSON: {error}"))
            })?),
        };
    Ok(Envelope {
        id,
        kind,
        queue: queue.clone(),
        priority,
        tenant,
        run_at_ms,
        enqueued_at_ms,
        trace: traceparent.map(|traceparent| TraceContext { traceparent, tracestate }),
        fast,
    })
}
