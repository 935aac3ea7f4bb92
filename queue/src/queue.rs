//! The queue itself: every operation, as one script call per partition and chunk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use redis::Value;
use uuid::Uuid;

use crate::{
    config::QueueConfig,
    envelope::{Claim, Envelope, Epoch, LeaseRef, Pushed},
    error::QueueError,
    ids::{JobId, LeaseToken, Priority, QueueName, WorkerId},
    link::{Answer, Link},
    partition::{partition_key, partition_of},
    policies::Copies,
    policy::wait_of,
    rates::Tally,
    record::{self, push_record, read_record},
    registry::Told,
    reply::{self, Reply},
    scripts::{self, Script},
};

/// Most jobs in one script call; a longer list is sent as several calls. Keeps one call under about 5 ms.
pub const CHUNK: usize = 500;
/// Most jobs that one claim leases in one partition.
pub const MAX_CLAIM: usize = 256;
/// Values per job in the answer of `claim.lua`.
const CLAIM_FIELDS: usize = 2;
/// Most stale list entries that one claim drops.
const MAX_STALE: usize = 1000;
/// What push answers for a job that the window has no room for.
const FULL: i64 = 2;
/// Script calls of one operation that are under way together.
const CALLS_AT_ONCE: usize = 8;
/// When a claim that found no policies is tried again.
const POLICIES_WAIT: Duration = Duration::from_millis(200);
/// The probe's deadline: shorter than any answer's, so that an outage is told from one slow call.
const PROBE_DEADLINE: Duration = Duration::from_millis(500);

/// A handle to the queues of one Redis and prefix. Cheap to clone; all clones share one connection, which opens when
/// needed and comes back by itself after an outage. Every call ends within the response timeout, plus the connect
/// timeout if it has to connect. Calls are cancel-safe in that nothing breaks, but a call that was abandoned or ended
/// with [`QueueError::Unavailable`] may still have run; all of them can be repeated.
#[derive(Clone)]
pub struct Queue {
    pub(crate) shared: Arc<Shared>,
    /// Stands for Redis' clock; only tests set it.
    pub(crate) now_ms: Option<i64>,
}

pub(crate) struct Shared {
    config: QueueConfig,
    pub(crate) link: Link,
    probe: Link,
    rotation: AtomicUsize,
    pub(crate) copies: Copies,
    pub(crate) told: Told,
    pub(crate) tally: Tally,
}

/// What one claim in one partition brought.
pub(crate) struct Claimed {
    pub claims: Vec<Claim>,
    /// A further claim would find something.
    pub more: bool,
    /// A limit lets the next claim find something after this time.
    pub wait: Option<Duration>,
}

impl Claimed {
    fn nothing(more: bool) -> Self {
        Self { claims: Vec::new(), more, wait: None }
    }

    /// The policies are on their way.
    fn without_policies() -> Self {
        Self { wait: Some(POLICIES_WAIT), ..Self::nothing(false) }
    }
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
        queue.shared.link.check().await?;
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
            shared: Arc::new(Shared {
                config,
                link,
                probe,
                rotation: AtomicUsize::new(0),
                copies: Copies::default(),
                told: Told::default(),
                tally: Tally::default(),
            }),
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
        let mut set = redis::cmd("SET");
        set.arg(self.stamp_key()).arg(ledger.to_string()).arg("NX").arg("GET");
        let found = self.shared.link.command(&set).await?.value;
        self.is_stamp_of(ledger, found).map(|_| ())
    }

    /// Whether the prefix has this ledger's stamp; writes nothing. `false`: it is new, or Redis lost its data.
    /// [`QueueError::OtherLedger`] if another ledger owns it.
    pub async fn is_stamped_by(&self, ledger: Uuid) -> Result<bool, QueueError> {
        let mut get = redis::cmd("GET");
        get.arg(self.stamp_key());
        let found = self.shared.link.command(&get).await?.value;
        self.is_stamp_of(ledger, found)
    }

    fn is_stamp_of(&self, ours: Uuid, found: Value) -> Result<bool, QueueError> {
        if found == Value::Nil {
            return Ok(false);
        }
        let found = reply::text(found)?;
        if found == ours.to_string() {
            return Ok(true);
        }
        Err(QueueError::OtherLedger { prefix: self.config().prefix.clone(), found, ours })
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
    /// [`QueueError::Full`] when Redis' memory is full and nothing was stored; if a part was, the rest is told so job by job, as
    /// it is of the window and of the policies' depths. [`QueueError::TooDeep`] and [`QueueError::TooLarge`] for a `fast` record
    /// that no claim could read, or that is larger than [`QueueConfig::max_record`]: then nothing was stored.
    pub async fn push(&self, envelopes: &[Envelope]) -> Result<Vec<Pushed>, QueueError> {
        self.push_under(envelopes, true).await
    }

    /// As [`push`](Self::push) for jobs that a ledger has accepted: they are neither too many nor too late, whatever the
    /// policies say now. Only the window holds.
    pub async fn push_accepted(&self, envelopes: &[Envelope]) -> Result<Vec<Pushed>, QueueError> {
        self.push_under(envelopes, false).await
    }

    async fn push_under(&self, envelopes: &[Envelope], policies: bool) -> Result<Vec<Pushed>, QueueError> {
        let most = self.config().max_record;
        envelopes.iter().try_for_each(|envelope| record::check(envelope, most))?;
        let window = self.config().partition_window();
        let answers = self
            .each_or(
                Some(FULL),
                &scripts::PUSH,
                envelopes,
                |envelope| (&envelope.queue, self.partition_of(envelope.id)),
                || vec![self.now(), text(window), nonce(), text(u8::from(policies))],
                |args, envelope| {
                    args.push(text(envelope.id));
                    push_record(args, envelope);
                },
            )
            .await?;
        self.note(envelopes.iter().map(|envelope| &envelope.queue)).await;
        answers
            .into_iter()
            .map(|answer| match answer {
                0 => Ok(Pushed::Present),
                1 => Ok(Pushed::Queued),
                FULL => Ok(Pushed::Full),
                3 => Ok(Pushed::QueueFull),
                4 => Ok(Pushed::TenantFull),
                5 => Ok(Pushed::Draining),
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
        let (mut claims, mut problem) = (Vec::new(), None);
        for step in 0..usize::from(partitions) {
            let partition = (start.wrapping_add(step) % usize::from(partitions)) as u16;
            match self.claim_partition(queue, partition, worker, max - claims.len()).await {
                Ok(found) => claims.extend(found.claims),
                // Of a cluster's nodes one may be away while the others serve.
                Err(error) if self.is_cluster() => problem = Some(error),
                // What was claimed already must not be forgotten.
                Err(error) if claims.is_empty() => return Err(error),
                Err(_) => break,
            }
            if claims.len() >= max {
                break;
            }
        }
        match problem {
            Some(error) if claims.is_empty() => Err(error),
            _ => Ok(claims),
        }
    }

    pub(crate) async fn claim_partition(
        &self,
        queue: &QueueName,
        partition: u16,
        worker: &WorkerId,
        max: usize,
    ) -> Result<Claimed, QueueError> {
        if max == 0 {
            return Ok(Claimed::nothing(true));
        }
        let mut required = None;
        if self.shared.copies.required() {
            let run = self.server_run_id(queue, partition).await?;
            if !self.shared.copies.has(queue, partition, &run) {
                self.shared.copies.want(queue);
                return Ok(Claimed::without_policies());
            }
            required = Some(run);
        }
        let config = self.config();
        let nonce = nonce();
        let token = LeaseToken(String::from_utf8_lossy(&nonce).into());
        let args = [
            self.now(),
            text(max.min(MAX_CLAIM)),
            text(config.lease.as_millis()),
            text(config.aging.as_millis()),
            text(MAX_STALE),
            nonce,
            text(worker),
            text(u8::from(required.is_some())),
        ];
        let sent_at = Instant::now();
        let answer = self.script(&scripts::CLAIM, queue, partition, &args).await?;
        let mut reply = Reply::new(answer.value)?;
        let epoch = Epoch { data: reply.text()?.into(), run: answer.run_id };
        let found = reply.integer()?;
        let (more, wait) = (found == 1, wait_of(reply.integer()?));
        if found == 2 {
            self.shared.copies.want(queue);
            return Ok(Claimed::without_policies());
        }
        let mut claims = Vec::with_capacity(reply.len() / CLAIM_FIELDS);
        while !reply.is_empty() {
            let id: JobId = reply.parsed("a job id")?;
            let record = reply.bytes()?;
            match read_record(&record, id, queue) {
                Ok(envelope) => claims.push(Claim {
                    envelope: Arc::new(envelope),
                    token: token.clone(),
                    partition,
                    queue: queue.clone(),
                    epoch: epoch.clone(),
                    sent_at,
                }),
                Err(error) => {
                    // Left alone it would come back for ever. The ledger, if it has the job, sends a sound copy.
                    tracing::error!(%id, %queue, %error, "dropping a job whose record in Redis can't be read");
                    metrics::counter!("queue_jobs_dropped_total", "reason" => "unreadable").increment(1);
                    let args = [text(id), text(token.as_str())];
                    // If it can't be dropped now, its lease runs out; the sound claims beside it are not to wait for theirs.
                    if let Err(error) = self.script(&scripts::ACK, queue, partition, &args).await {
                        tracing::warn!(%id, %queue, %error, "it could not be dropped");
                    }
                }
            }
        }
        if required.is_some_and(|run| run != epoch.run) {
            // The server restarted, or another took over, between the look at the copies and the claim.
            self.shared.copies.want(queue);
            let back: Vec<_> = claims.iter().map(|claim| (claim.lease_ref(), Duration::ZERO)).collect();
            self.release(&back).await?;
            return Ok(Claimed::without_policies());
        }
        metrics::histogram!("queue_claim_seconds").record(sent_at.elapsed().as_secs_f64());
        let mut by_priority = [0; Priority::LEVELS];
        for claim in &claims {
            by_priority[usize::from(claim.envelope.priority.get())] += 1;
        }
        for (priority, count) in by_priority.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            let labels = [("queue", queue.to_string()), ("priority", priority.to_string())];
            metrics::counter!("queue_jobs_claimed_total", &labels).increment(count);
        }
        Ok(Claimed { claims, more, wait })
    }

    /// Removes finished jobs. One answer per lease: `false` if it is not ours any more (nothing was changed).
    pub async fn ack(&self, leases: &[LeaseRef]) -> Result<Vec<bool>, QueueError> {
        let answers = self
            .each(&scripts::ACK, leases, lease_place, Vec::new, |args, lease| {
                args.extend([text(lease.id), text(lease.token.as_str())]);
            })
            .await?;
        let answers: Vec<bool> = answers.into_iter().map(|answer| answer == 1).collect();
        let mut acked: Vec<(&QueueName, u64)> = Vec::new();
        for (lease, _) in leases.iter().zip(&answers).filter(|(_, acked)| **acked) {
            match acked.iter_mut().find(|(queue, _)| *queue == &lease.queue) {
                Some((_, count)) => *count += 1,
                None => acked.push((&lease.queue, 1)),
            }
        }
        for (queue, count) in acked {
            metrics::counter!("queue_jobs_acked_total", "queue" => queue.to_string()).increment(count);
        }
        Ok(answers)
    }

    /// Gives jobs back: to the front of their lists when the delay is zero, else to the schedule (whole ms). One
    /// answer per lease: `false` if it is not ours any more (nothing was changed).
    pub async fn release(&self, leases: &[(LeaseRef, Duration)]) -> Result<Vec<bool>, QueueError> {
        self.give_back(leases, false).await
    }

    /// As [`release`](Self::release), and charges each job with a failure ([`Envelope::attempts`]): for jobs without a
    /// ledger.
    pub async fn retry(&self, leases: &[(LeaseRef, Duration)]) -> Result<Vec<bool>, QueueError> {
        self.give_back(leases, true).await
    }

    /// Notes that each job runs alone in its process from now on, so that losing this lease counts towards its delivery limit
    /// ([`Envelope::lost_alone`], PROTOCOL.md 13): for jobs without a ledger. One answer per lease: `false` if it is not ours
    /// any more.
    pub async fn runs_alone(&self, leases: &[LeaseRef]) -> Result<Vec<bool>, QueueError> {
        let answers = self
            .each(&scripts::ALONE, leases, lease_place, Vec::new, |args, lease| {
                args.extend([text(lease.id), text(lease.token.as_str())]);
            })
            .await?;
        Ok(answers.into_iter().map(|answer| answer == 1).collect())
    }

    async fn give_back(
        &self,
        leases: &[(LeaseRef, Duration)],
        charged: bool,
    ) -> Result<Vec<bool>, QueueError> {
        let answers = self
            .each(
                &scripts::RELEASE,
                leases,
                |(lease, _)| lease_place(lease),
                || vec![self.now(), text(u8::from(charged))],
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

    /// Whether Redis answers, on a connection of its own and within half a second.
    pub async fn ping(&self) -> Result<(), QueueError> {
        self.shared.probe.command(&redis::cmd("PING")).await.map(drop)
    }

    /// The `run_id` of the server that the present connection leads to (in a cluster: of the one that holds the stamp);
    /// a new one means that the server restarted. Costs no round trip while the connection stands: a restart always
    /// ends it.
    pub async fn run_id(&self) -> Result<String, QueueError> {
        Ok(self.shared.link.run_id(&self.stamp_key()).await?.as_ref().to_owned())
    }

    /// A connection of its own for wake-ups.
    pub(crate) async fn subscribe(&self) -> Result<redis::aio::PubSub, QueueError> {
        self.shared.link.subscribe().await
    }

    /// Whether the partitions are spread over the nodes of a cluster.
    pub(crate) fn is_cluster(&self) -> bool {
        self.shared.link.is_cluster()
    }

    /// A name for the server that holds a partition; the same for all unless they are spread over a cluster.
    pub(crate) async fn server(&self, queue: &QueueName, partition: u16) -> Result<Arc<str>, QueueError> {
        self.shared.link.server(&partition_key(self.config(), queue, partition)).await
    }

    pub(crate) async fn server_run_id(
        &self,
        queue: &QueueName,
        partition: u16,
    ) -> Result<Arc<str>, QueueError> {
        self.shared.link.run_id(&partition_key(self.config(), queue, partition)).await
    }

    pub(crate) fn partition_of(&self, id: JobId) -> u16 {
        partition_of(id, self.config().partitions)
    }

    pub(crate) fn job_place<'a>(&self, (queue, id): &'a (QueueName, JobId)) -> (&'a QueueName, u16) {
        (queue, self.partition_of(*id))
    }

    pub(crate) fn now(&self) -> Vec<u8> {
        self.now_ms.map(text).unwrap_or_default()
    }

    pub(crate) async fn script(
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
    pub(crate) async fn each<'a, T>(
        &self,
        script: &'static Script,
        items: &'a [T],
        place: impl Fn(&'a T) -> (&'a QueueName, u16),
        head: impl Fn() -> Vec<Vec<u8>>,
        write: impl Fn(&mut Vec<Vec<u8>>, &'a T),
    ) -> Result<Vec<i64>, QueueError> {
        self.each_or(None, script, items, place, head, write).await
    }

    /// As [`each`](Self::each). Where only some of the calls found Redis full, the items of those have `when_full`, if given, as
    /// their answers.
    async fn each_or<'a, T>(
        &self,
        when_full: Option<i64>,
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
        let (mut answers, mut problem) = (vec![0; items.len()], None);
        let (mut all_full, mut some_full) = (true, false);
        let mut results = stream::iter(calls).buffered(CALLS_AT_ONCE);
        while let Some((indices, result)) = results.next().await {
            match (result, when_full) {
                (Ok(mut reply), _) => {
                    all_full = false;
                    for index in indices {
                        answers[index] = reply.integer()?;
                    }
                }
                (Err(QueueError::Full), Some(answer)) => {
                    some_full = true;
                    for index in indices {
                        answers[index] = answer;
                    }
                }
                // The calls to a cluster's other nodes still count, now or when the caller repeats the whole.
                (Err(error), _) if self.is_cluster() => problem = problem.or(Some(error)),
                (Err(error), _) => return Err(error),
            }
        }
        if some_full && all_full {
            problem = problem.or(Some(QueueError::Full));
        }
        problem.map_or(Ok(answers), Err)
    }
}

/// One script call of [`Queue::each`]: the items' indices and their answers.
async fn numbers(
    shared: Arc<Shared>,
    script: &'static Script,
    key: String,
    args: Vec<Vec<u8>>,
    indices: Vec<usize>,
) -> (Vec<usize>, Result<Reply, QueueError>) {
    let answer = shared.link.script(script, &key, &args).await;
    (indices, answer.and_then(|answer| Reply::new(answer.value)))
}

pub(crate) fn lease_place(lease: &LeaseRef) -> (&QueueName, u16) {
    (&lease.queue, lease.partition)
}

pub(crate) fn text(value: impl std::fmt::Display) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// Random text that nobody else has.
pub(crate) fn nonce() -> Vec<u8> {
    text(format_args!("{:032x}", rand::random::<u128>()))
}

pub(crate) fn optional(value: Option<impl std::fmt::Display>) -> Vec<u8> {
    value.map(text).unwrap_or_default()
}
