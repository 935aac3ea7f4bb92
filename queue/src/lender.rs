//! Lends the concurrency of a queue or a tenant to the partitions (PROTOCOL.md 21).
//!
//! A script sees one partition, so a limit over several is divided: each partition has a grant and never uses more. A
//! record in a slot of its own says what is lent. Its sum never exceeds the limit, and a partition never has more than the
//! record says, because a grant is raised in the record first and lowered in the partition first, and a partition takes
//! only newer versions. Whoever dies in between leaves the record too high, never too low; the next round mends that.
//! Grants follow demand: what one partition doesn't use goes to another that needs more, and where all is in use, one that
//! has nothing calls some back.

use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    error::QueueError,
    ids::{QueueName, TenantId},
    outage::Outage,
    partition::partition_key,
    queue::{Queue, nonce, text},
    reply::{self, Reply},
    scripts,
};

/// How often a lender looks while something needs more, and while nothing does.
const BUSY: Duration = Duration::from_millis(100);
const IDLE: Duration = Duration::from_secs(1);
/// How long the role is one process' own. Only for thrift: several lenders at once break nothing.
const ROLE: Duration = Duration::from_secs(3);
/// Tenants that one round looks at per partition, those first that nobody has looked at for longest.
const TENANTS: usize = 100;

/// The lender. Every process that keeps policies in step runs one; one at a time does the work, and with one partition none.
pub struct Lender {
    queue: Queue,
    queues: Vec<QueueName>,
    /// Marks the role as ours.
    name: Vec<u8>,
}

/// What one partition has of a limit, and what it does with it.
#[derive(Debug, Clone, Copy)]
struct Grant {
    /// The limit over all partitions; `None`: this partition lends nothing.
    limit: Option<i64>,
    /// What it may use.
    has: i64,
    version: i64,
    used: i64,
    needs: bool,
}

impl Lender {
    /// Looks until shutdown at these queues, and at those whose policies this process keeps in step.
    pub fn spawn(queue: Queue, queues: Vec<QueueName>, shutdown: CancellationToken) -> JoinHandle<()> {
        tokio::spawn(Self::new(queue, queues).run(shutdown))
    }

    fn new(queue: Queue, queues: Vec<QueueName>) -> Self {
        Self { queue, queues, name: nonce() }
    }

    async fn run(self, shutdown: CancellationToken) {
        if self.queue.config().partitions == 1 {
            return;
        }
        let mut outage = Outage::new("lender");
        loop {
            let wait = match self.round().await {
                Ok(busy) => {
                    outage.over();
                    if busy { BUSY } else { IDLE }
                }
                Err(error) => outage.wait(&error),
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(wait) => {}
            }
        }
    }

    /// Looks once at every queue. Returns whether something needs more.
    async fn round(&self) -> Result<bool, QueueError> {
        let mut busy = false;
        let mut queues = self.queue.shared.copies.queues();
        queues.extend(self.queues.iter().cloned());
        for queue in queues {
            if self.leads(&queue).await? {
                busy |= self.queue.lend(&queue).await?;
            }
        }
        Ok(busy)
    }

    async fn leads(&self, queue: &QueueName) -> Result<bool, QueueError> {
        let key = format!("{}:role", self.queue.record_key(queue));
        let args = [self.name.clone(), text(ROLE.as_millis())];
        let answer = self.queue.shared.link.script(&scripts::LEAD, &key, &args).await?;
        Ok(reply::number(&answer.value)? == 1)
    }
}

impl Queue {
    fn record_key(&self, queue: &QueueName) -> String {
        format!("{{{}:{queue}:lend}}", self.config().prefix)
    }

    fn subject_key(&self, queue: &QueueName, tenant: Option<&TenantId>) -> String {
        let subject = tenant.map_or(String::new(), |tenant| format!(":{tenant}"));
        format!("{}{subject}", self.record_key(queue))
    }

    /// Lends what a queue's and its tenants' limits allow to the partitions that need it. The [`Lender`] calls it; any
    /// number may at once. Returns whether somebody still needs more.
    pub async fn lend(&self, queue: &QueueName) -> Result<bool, QueueError> {
        let mut busy = self.lend_one(queue, None).await?;
        let mut tenants = std::collections::BTreeSet::new();
        for partition in 0..self.config().partitions {
            let mut range = redis::cmd("ZRANGE");
            range.arg(format!("{}:need", partition_key(self.config(), queue, partition)));
            range.arg(0).arg(TENANTS - 1);
            let mut reply = Reply::new(self.shared.link.command(&range).await?.value)?;
            while !reply.is_empty() {
                tenants.insert(reply.parsed::<TenantId>("a tenant")?);
            }
        }
        for tenant in &tenants {
            busy |= self.lend_one(queue, Some(tenant)).await?;
        }
        Ok(busy)
    }

    /// One limit.
    async fn lend_one(&self, queue: &QueueName, tenant: Option<&TenantId>) -> Result<bool, QueueError> {
        let mut grants = Vec::new();
        for partition in 0..self.config().partitions {
            grants.push(self.grant(queue, partition, tenant, &["look"]).await?);
        }
        // A partition that doesn't know of the limit yet, or any more, gets nothing.
        let Some(limit) = grants.iter().filter_map(|grant| grant.limit).min() else {
            let mut forget = redis::cmd("DEL");
            forget.arg(self.subject_key(queue, tenant));
            self.shared.link.command(&forget).await?;
            return self.settle(queue, tenant).await;
        };
        let record = self.record(queue, tenant, &mut grants).await?;
        let (mut spare, mut over) = (limit, 0);
        for (partition, (grant, &(lent, _))) in (0..).zip(grants.iter_mut().zip(&record)) {
            let has = if grant.limit.is_some() { grant.has } else { 0 };
            if has < lent {
                // A raise that never arrived, or a lowering that the record never heard of. Nothing that is still on its
                // way counts after the fence, so the record may say what the partition has.
                *grant = self.grant(queue, partition, tenant, &["fence"]).await?;
                self.lower(queue, tenant, partition, grant).await?;
            } else if has > lent {
                // An old copy of the partition came back.
                let seen = grant.version;
                self.raise(queue, tenant, limit, (partition, 0, seen), grant).await?;
            }
            spare -= has.max(lent);
            // Leases of before the limit, or before it was lent anew, may be more than the grant.
            let used = if grant.limit.is_some() { grant.used } else { 0 };
            over += (used - has.max(lent)).max(0);
        }
        // The record knows only of grants, and another lender may be raising them.
        let limit = limit - over;
        spare -= over;
        let mut needy: Vec<u16> =
            (0..).zip(&grants).filter(|(_, grant)| grant.needs).map(|(p, _)| p).collect();
        needy.shuffle(&mut rand::rng());
        // First those that have nothing: what others give back was called back for them.
        needy.sort_by_key(|partition| grants[usize::from(*partition)].has != 0);
        // What nobody uses comes back when somebody needs it, or when the limit has become lower.
        if spare < 0 || spare < needy.len() as i64 && !needy.is_empty() {
            for (partition, grant) in (0..).zip(grants.iter_mut()) {
                let surplus = grant.has - grant.used;
                if grant.limit.is_some() && surplus > 0 {
                    spare += self.collect(queue, tenant, partition, surplus, grant).await?;
                }
            }
        }
        if needy.is_empty() && spare >= grants.len() as i64 {
            // Nobody waits, so everybody gets the same in advance.
            let part = spare / grants.len() as i64;
            for (partition, grant) in (0..).zip(grants.iter_mut()).filter(|(_, grant)| grant.limit.is_some())
            {
                let seen = grant.version;
                self.raise(queue, tenant, limit, (partition, part, seen), grant).await?;
            }
            spare %= grants.len() as i64;
        }
        let mut hungry = needy.len() as i64;
        for &partition in &needy {
            let part = if spare > 0 { (spare + hungry - 1) / hungry } else { 0 };
            hungry -= 1;
            if part == 0 {
                continue;
            }
            let grant = &mut grants[usize::from(partition)];
            let before = grant.has;
            let seen = grant.version;
            self.raise(queue, tenant, limit, (partition, part, seen), grant).await?;
            spare -= grant.has - before;
        }
        self.call_back(queue, tenant, limit, spare, &grants).await?;
        let needs = !needy.is_empty() || spare < 0;
        if needs { Ok(true) } else { self.settle(queue, tenant).await }
    }

    /// What the record says. One that is missing is made from what the partitions have, after which no grant of the
    /// record before it can arrive any more.
    async fn record(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        grants: &mut [Grant],
    ) -> Result<Vec<(i64, i64)>, QueueError> {
        let partitions = text(grants.len());
        loop {
            let mut reply = self.lending(queue, tenant, vec![text("show"), partitions.clone()]).await?;
            if !reply.is_empty() {
                return (0..grants.len()).map(|_| Ok((reply.integer()?, reply.integer()?))).collect();
            }
            let mut args = vec![text("adopt")];
            for (partition, grant) in (0..).zip(grants.iter_mut()) {
                *grant = self.grant(queue, partition, tenant, &["fence"]).await?;
                let lent = if grant.limit.is_some() { grant.has } else { 0 };
                args.extend([text(lent), text(grant.version)]);
            }
            self.lending(queue, tenant, args).await?;
        }
    }

    /// Raises a grant by `by` in the record and then in the partition.
    async fn raise(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        limit: i64,
        (partition, by, seen): (u16, i64, i64),
        grant: &mut Grant,
    ) -> Result<(), QueueError> {
        let args = vec![text("raise"), text(limit), text(partition), text(by), text(seen)];
        let mut reply = self.lending(queue, tenant, args).await?;
        if reply.is_empty() {
            // The record vanished just now; the next round makes another.
            return Ok(());
        }
        let (lent, version) = (reply.integer()?.to_string(), reply.integer()?.to_string());
        *grant = self.grant(queue, partition, tenant, &["set", &lent, &version]).await?;
        Ok(())
    }

    /// Takes back what a partition doesn't use, in the partition first. Returns how much.
    async fn collect(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        partition: u16,
        by: i64,
        grant: &mut Grant,
    ) -> Result<i64, QueueError> {
        let before = *grant;
        let (by, version) = (by.to_string(), before.version.to_string());
        *grant = self.grant(queue, partition, tenant, &["give", &by, &version]).await?;
        if grant.version != before.version + 1 {
            // Somebody else was there meanwhile.
            return Ok(0);
        }
        let taken = self.lower(queue, tenant, partition, grant).await?;
        Ok(if taken { before.has - grant.has } else { 0 })
    }

    /// Tells the record what a partition has given back. Returns whether it took that over.
    async fn lower(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        partition: u16,
        grant: &Grant,
    ) -> Result<bool, QueueError> {
        let has = if grant.limit.is_some() { grant.has } else { 0 };
        let args = vec![text("lower"), text(partition), text(has), text(grant.version)];
        let mut reply = self.lending(queue, tenant, args).await?;
        Ok(!reply.is_empty() && reply.integer()? == 1)
    }

    /// Where nothing is spare: partitions that have none, or a limit that became lower, call back from those that have
    /// most. What comes back as leases end is lent anew in a later round.
    async fn call_back(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        limit: i64,
        spare: i64,
        grants: &[Grant],
    ) -> Result<(), QueueError> {
        let poor = grants.iter().filter(|grant| grant.needs && grant.has == 0).count() as i64;
        let mut wanted = if spare < 0 { -spare } else { (poor - spare).max(0) };
        // What was lent just now and is not used yet is not called back: somebody may be on the way to use it.
        let mut rich: Vec<(u16, Grant)> =
            (0..).zip(grants.iter().copied()).filter(|(_, grant)| grant.used >= grant.has).collect();
        rich.sort_by_key(|(_, grant)| std::cmp::Reverse(grant.has));
        let fair = (limit / grants.len() as i64).max(0);
        for (partition, grant) in rich {
            // With a limit below the number of partitions the grants go round.
            let most = if spare < 0 { grant.has } else { (grant.has - fair).max(i64::from(fair == 0)) };
            let by = wanted.min(most).min(grant.has);
            if by > 0 {
                let target = (grant.has - by).to_string();
                self.grant(queue, partition, tenant, &["back", &target]).await?;
                wanted -= by;
            }
        }
        Ok(())
    }

    /// Takes a tenant off the lines of those that need more. Returns whether it needs more after all: a claim may have
    /// parked it since the look.
    async fn settle(&self, queue: &QueueName, tenant: Option<&TenantId>) -> Result<bool, QueueError> {
        let mut needs = false;
        if tenant.is_some() {
            for partition in 0..self.config().partitions {
                let grant = self.grant(queue, partition, tenant, &["done"]).await?;
                needs |= grant.limit.is_some() && grant.needs;
            }
        }
        Ok(needs)
    }

    async fn grant(
        &self,
        queue: &QueueName,
        partition: u16,
        tenant: Option<&TenantId>,
        words: &[&str],
    ) -> Result<Grant, QueueError> {
        let mut args = vec![tenant.map(text).unwrap_or_default()];
        args.extend(words.iter().map(text));
        let mut reply = Reply::new(self.script(&scripts::GRANT, queue, partition, &args).await?.value)?;
        let limit = reply.integer()?;
        Ok(Grant {
            limit: (limit >= 0).then_some(limit),
            has: reply.integer()?,
            version: reply.integer()?,
            used: reply.integer()?,
            needs: reply.integer()? == 1,
        })
    }

    async fn lending(
        &self,
        queue: &QueueName,
        tenant: Option<&TenantId>,
        args: Vec<Vec<u8>>,
    ) -> Result<Reply, QueueError> {
        let key = self.subject_key(queue, tenant);
        Reply::new(self.shared.link.script(&scripts::LEND, &key, &args).await?.value)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use devstack::{RedisOptions, testing::TestServices};

    use super::*;
    use crate::{Envelope, QueueConfig, QueuePolicy, TenantPolicy, WorkerId};

    async fn queue() -> (TestServices, Queue, QueueName) {
        let services = TestServices::builder().redis_queue_with(RedisOptions::queue()).start().await.unwrap();
        let url = services.redis_queue().url().to_owned();
        let queue =
            Queue::connect(QueueConfig { url, partitions: 2, ..QueueConfig::default() }).await.unwrap();
        let name = QueueName::new("ingest").unwrap();
        let policy = QueuePolicy { max_concurrency: Some(8), ..QueuePolicy::default() };
        queue.set_policy(&name, &policy, 1).await.unwrap();
        (services, queue, name)
    }

    #[tokio::test]
    async fn rule_21_a_partition_takes_only_a_newer_grant_and_none_of_before_a_fence() {
        let (_services, queue, name) = queue().await;
        let tell = async |words: &[&str]| queue.grant(&name, 0, None, words).await.unwrap();
        assert_eq!(tell(&["set", "5", "7"]).await.has, 5);
        assert_eq!(tell(&["set", "8", "6"]).await.has, 5, "an older one");
        assert_eq!(tell(&["set", "8", "7"]).await.has, 5, "another of the same version");
        let fenced = tell(&["fence"]).await;
        assert_eq!(tell(&["set", "8", "8"]).await.has, 5, "one that was on its way");
        let newer = (fenced.version + 1).to_string();
        assert_eq!(tell(&["set", "8", &newer]).await.has, 8);
    }

    #[tokio::test]
    async fn rule_21_a_partition_gives_back_only_what_it_does_not_use() {
        let (_services, queue, name) = queue().await;
        let tell = async |words: &[&str]| queue.grant(&name, 0, None, words).await.unwrap();
        tell(&["set", "5", "1"]).await;
        let tenant = TenantId::new("acme").unwrap();
        let jobs: Vec<_> = (0..40).map(|_| Envelope::new("x", name.clone(), tenant.clone())).collect();
        queue.push(&jobs).await.unwrap();
        let claims = queue.claim_partition(&name, 0, &WorkerId::new("test:1"), 4).await.unwrap().claims;
        assert_eq!(claims.len(), 4);
        let left = tell(&["give", "3", "1"]).await;
        assert_eq!((left.has, left.version, left.used), (4, 2, 4));
        assert_eq!(tell(&["give", "3", "1"]).await.version, 2, "its version is another now");
    }

    #[tokio::test]
    async fn rule_21_a_tenant_that_is_parked_after_the_look_stays_in_the_line() {
        let (services, queue, name) = queue().await;
        queue.set_policy(&name, &QueuePolicy::default(), 2).await.unwrap();
        let tenant = TenantId::new("acme").unwrap();
        let policy = TenantPolicy { max_concurrency: Some(1), ..TenantPolicy::default() };
        queue.set_tenant_policy(&name, &tenant, &policy, 1).await.unwrap();
        let jobs: Vec<_> = (0..40).map(|_| Envelope::new("x", name.clone(), tenant.clone())).collect();
        queue.push(&jobs).await.unwrap();
        let client = redis::Client::open(services.redis_queue().url()).unwrap();
        let mut raw = client.get_multiplexed_async_connection().await.unwrap();
        let mut line = async |partition: u16| -> Vec<String> {
            let key = format!("{}:need", partition_key(queue.config(), &name, partition));
            redis::cmd("ZRANGE").arg(key).arg(0).arg(-1).query_async(&mut raw).await.unwrap()
        };
        // The look saw nobody parked; the claim came before the end of the round.
        let claims = queue.claim_partition(&name, 1, &WorkerId::new("test:1"), 4).await.unwrap().claims;
        assert!(claims.is_empty());
        assert!(queue.settle(&name, Some(&tenant)).await.unwrap(), "it needs more");
        assert!(line(0).await.is_empty());
        assert_eq!(line(1).await, ["acme"]);
    }
}
