//! Looks at what a queue holds, for metrics, the reconciler and audits. Changes nothing.

use redis::Value;

use crate::{
    STATS_TENANTS,
    envelope::{Place, PriorityStats, QueueStats},
    error::QueueError,
    ids::{JobId, Priority, QueueName, TenantId},
    partition::partition_key,
    queue::{CHUNK, Queue, text},
    reply::{self, Reply},
    scripts,
};

/// Most leases that [`Queue::leases`] returns per partition.
const MAX_LEASES: usize = 100_000;

impl Queue {
    /// Which of these jobs Redis doesn't know: neither waiting, scheduled nor leased.
    pub async fn missing(&self, jobs: &[(QueueName, JobId)]) -> Result<Vec<JobId>, QueueError> {
        Ok(self.missing_and_scheduled(jobs).await?.0)
    }

    /// Which of these jobs Redis doesn't know, and which may be scheduled there: a lease that was registered again after Redis
    /// lost its data looks the same, and [`places`](Self::places) tells them apart. One look at a hash for each.
    pub async fn missing_and_scheduled(
        &self,
        jobs: &[(QueueName, JobId)],
    ) -> Result<(Vec<JobId>, Vec<JobId>), QueueError> {
        let (mut missing, mut scheduled) = (Vec::new(), Vec::new());
        for chunk in jobs.chunks(CHUNK) {
            let mut pipeline = redis::pipe();
            for job in chunk {
                let (queue, partition) = self.job_place(job);
                let key = format!("{}:j", partition_key(self.config(), queue, partition));
                pipeline.cmd("HGET").arg(key).arg(job.1.to_string());
            }
            let answers = self.shared.link.pipeline(&pipeline).await?;
            for ((_, id), answer) in chunk.iter().zip(answers) {
                match answer {
                    Value::Nil => missing.push(*id),
                    record => {
                        // The sequence of a scheduled job is 0 (partition.lua), and of a lease after restore.lua.
                        if reply::text(record)?.starts_with("0 ") {
                            scheduled.push(*id);
                        }
                    }
                }
            }
        }
        Ok((missing, scheduled))
    }

    /// Where each of these jobs is in Redis, in order; `None`: Redis doesn't know it. Four looks
    /// for each.
    pub async fn places(&self, jobs: &[(QueueName, JobId)]) -> Result<Vec<Option<Place>>, QueueError> {
        let mut places = Vec::with_capacity(jobs.len());
        for chunk in jobs.chunks(CHUNK) {
            let mut pipeline = redis::pipe();
            pipeline.cmd("TIME");
            for job in chunk {
                let (queue, partition) = self.job_place(job);
                let key = partition_key(self.config(), queue, partition);
                let id = job.1.to_string();
                pipeline.cmd("HEXISTS").arg(format!("{key}:j")).arg(&id);
                pipeline.cmd("HEXISTS").arg(format!("{key}:x")).arg(&id);
                pipeline.cmd("ZSCORE").arg(format!("{key}:s")).arg(&id);
                pipeline.cmd("ZSCORE").arg(format!("{key}:l")).arg(&id);
            }
            let mut answers = self.shared.link.pipeline(&pipeline).await?.into_iter();
            let mut time = Reply::new(answers.next().unwrap_or(Value::Nil))?;
            let now = self.now_ms.unwrap_or(time.integer()? * 1000 + time.integer()? / 1000);
            while let (Some(known), Some(held), Some(due), Some(lease)) =
                (answers.next(), answers.next(), answers.next(), answers.next())
            {
                let left_ms = match &lease {
                    Value::Nil => None,
                    end => Some(reply::number(end)? - now),
                };
                places.push(if reply::number(&known)? == 0 {
                    None
                } else if reply::number(&held)? == 1 {
                    Some(Place::Leased { left_ms })
                } else if due == Value::Nil {
                    Some(Place::Waiting)
                } else {
                    Some(Place::Scheduled)
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
            stats.paused |= reply.integer()? == 1;
            stats.blocked_tenants += reply.integer()?.unsigned_abs();
        }
        Ok(stats)
    }

    /// How many jobs wait or are scheduled in a queue. Cheaper than [`stats`](Self::stats).
    pub async fn depth(&self, queue: &QueueName) -> Result<u64, QueueError> {
        let mut pipeline = redis::pipe();
        for partition in 0..self.config().partitions {
            let key = partition_key(self.config(), queue, partition);
            let levels: [String; Priority::LEVELS] = std::array::from_fn(|level| format!("w{level}"));
            pipeline.cmd("HMGET").arg(&key).arg(&levels);
            pipeline.cmd("ZCARD").arg(format!("{key}:s"));
        }
        let mut sum = 0;
        for value in self.shared.link.pipeline(&pipeline).await? {
            let values = if let Value::Array(levels) = value { levels } else { vec![value] };
            for value in values.iter().filter(|value| **value != Value::Nil) {
                sum += reply::number(value)?.unsigned_abs();
            }
        }
        Ok(sum)
    }

    /// How many jobs of a tenant wait or are scheduled in a queue.
    pub async fn tenant_depth(&self, queue: &QueueName, tenant: &TenantId) -> Result<u64, QueueError> {
        let mut pipeline = redis::pipe();
        for partition in 0..self.config().partitions {
            let key = partition_key(self.config(), queue, partition);
            pipeline.cmd("HGET").arg(format!("{key}:t")).arg(tenant.as_str());
            for level in 0..Priority::LEVELS {
                pipeline.cmd("LLEN").arg(format!("{key}:w:{level}:{tenant}"));
            }
        }
        let sum =
            self.shared.link.pipeline(&pipeline).await?.iter().try_fold(0, |sum, value| match value {
                Value::Nil => Ok::<_, QueueError>(sum),
                value => Ok(sum + reply::number(value)?),
            })?;
        // The lengths are not of one moment.
        Ok(u64::try_from(sum).unwrap_or_default())
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
}
