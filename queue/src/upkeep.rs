//! What keeps a queue in order while jobs run: heartbeats, expired leases, due jobs, cancelled and moved jobs.

use std::{
    collections::{HashMap, hash_map::Entry},
    time::Duration,
};

use redis::Value;

use crate::{
    envelope::{Beat, Epoch, LeaseRef},
    error::QueueError,
    ids::{JobId, Priority, QueueName},
    partition::partition_key,
    queue::{CHUNK, Queue, lease_place, nonce, optional, text},
    record::restore_record,
    reply::{self, Reply},
    scripts,
};

/// Most script calls that one `reap` or `promote` makes per partition; the next round goes on.
const ROUNDS: usize = 200;

/// When a reaper may reap; all times are Redis' own, in ms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReapGuard {
    /// When this reaper last reached Redis; 0 if never.
    pub last: i64,
    /// A longer silence than this was an outage.
    pub outage: i64,
    /// Not before this time.
    pub not_before: i64,
    /// When this reaper last looked at the partition; 0 if never.
    pub seen: i64,
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
    /// Until the next lease expires, in ms; negative: it has. `None`: none is held.
    pub next_ms: Option<i64>,
    /// The jobs that wait again.
    pub jobs: Vec<JobId>,
}

impl Queue {
    /// Extends leases by the full lease time. Leases that vanished with Redis' data are registered again with the
    /// token that the caller holds.
    pub async fn heartbeat(&self, leases: &[LeaseRef]) -> Result<Vec<Beat>, QueueError> {
        let mut run_ids = HashMap::new();
        for lease in leases {
            if let Entry::Vacant(entry) = run_ids.entry(lease_place(lease)) {
                let key = partition_key(self.config(), &lease.queue, lease.partition);
                entry.insert(self.shared.link.run_id(&key).await?);
            }
        }
        let lease_ms = self.config().lease.as_millis();
        let answers = self
            .each(
                &scripts::HEARTBEAT,
                leases,
                lease_place,
                || vec![self.now(), text(lease_ms)],
                |args, lease| {
                    let restarted = u8::from(run_ids.get(&lease_place(lease)) != Some(&lease.epoch.run));
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
                        restore_record(args, &lease.envelope);
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
                optional(guard.map(|guard| guard.seen)),
            ];
            let answer = self.script(&scripts::REAP, queue, partition, &args).await?;
            let mut reply = Reply::new(answer.value)?;
            reaped.now_ms = reply.integer()?;
            reaped.epoch = reply.optional()?.map(|data| Epoch { data: data.into(), run: answer.run_id });
            reaped.outage |= reply.integer()? == 1;
            let more = reply.integer()? == 1;
            reaped.next_ms = reply.optional_integer()?;
            // After an outage the further calls reap nothing, either.
            if !reaped.outage {
                last = last.map(|_| reaped.now_ms);
            }
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
}
