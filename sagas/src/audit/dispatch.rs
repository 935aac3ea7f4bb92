//! The ledger against the queue's Redis: who runs, who waits, who has a lease.

use std::{collections::HashMap, time::Duration};

use queue::{JobId, Place, Queue, QueueName};
use uuid::Uuid;

use super::{AuditError, Finding, FindingKind as Kind, Run, Suspect, confirmed, keys, repair::Mend};
use crate::stores::postgres::audit::OpenJob;

impl Run<'_> {
    pub(super) async fn dispatch(&mut self) -> Result<(), AuditError> {
        let Some(queue) = self.queue else { return Ok(()) };
        // Beside another ledger's jobs all of ours are missing, and all of its jobs unknown.
        queue.is_stamped_by(self.stores.postgres.ledger_id().await?).await?;
        self.open_jobs(queue).await?;
        self.leases(queue).await
    }

    fn grace(&self, queue: &Queue) -> Duration {
        self.settings.dispatch_grace.unwrap_or(queue.config().lease)
    }

    async fn open_jobs(&mut self, queue: &Queue) -> Result<(), AuditError> {
        let mut after = Uuid::nil();
        loop {
            let jobs = self.stores.postgres.audit_open_jobs(after, self.page(), None).await?;
            let Some(last) = jobs.last() else { return Ok(()) };
            after = last.id;
            self.paced(jobs.len()).await;
            let first = self.check_open_jobs(queue, &jobs).await?;
            if first.is_empty() {
                continue;
            }
            self.pause().await;
            let fences: HashMap<Uuid, (i64, String)> =
                jobs.into_iter().map(|job| (job.id, (job.fence, job.state))).collect();
            let mut again =
                self.stores.postgres.audit_open_jobs(Uuid::nil(), self.page(), Some(&keys(&first))).await?;
            // A job that was taken, or put back, in between is on its way.
            again.retain(|job| {
                fences.get(&job.id).is_some_and(|(fence, state)| (*fence, state) == (job.fence, &job.state))
            });
            let second = self.check_open_jobs(queue, &again).await?;
            self.settle(confirmed(&first, second)).await?;
        }
    }

    async fn check_open_jobs(&self, queue: &Queue, jobs: &[OpenJob]) -> Result<Vec<Suspect>, AuditError> {
        let grace = self.grace(queue);
        let old: Vec<(&OpenJob, QueueName)> = jobs
            .iter()
            .filter(|job| job.dispatched && job.age_s >= grace.as_secs_f64())
            // The column's check allows no other names.
            .filter_map(|job| Some((job, QueueName::new(job.queue.clone()).ok()?)))
            .collect();
        let wanted: Vec<(QueueName, JobId)> =
            old.iter().map(|(job, name)| (name.clone(), JobId(job.id))).collect();
        let places = queue.places(&wanted).await?;
        Ok(old
            .iter()
            .zip(places)
            .filter_map(|((job, name), place)| {
                let (kind, detail, mend) = what_is_wrong(job, name, place, queue.config().lease)?;
                let finding = Finding {
                    tenant: Some(job.tenant.clone()),
                    document: job.document.clone(),
                    job: Some(job.id),
                    ..Finding::new(kind, job.id, detail)
                };
                Some(Suspect::new(job.id, finding, mend))
            })
            .collect())
    }

    async fn leases(&mut self, queue: &Queue) -> Result<(), AuditError> {
        for name in self.stores.postgres.audit_queues().await? {
            let Ok(name) = QueueName::new(name) else { continue };
            let leases = queue.leases(&name).await?;
            for page in leases.chunks(self.settings.page as usize) {
                let page: Vec<Uuid> = page.iter().map(|(job, _)| job.0).collect();
                let first = self.check_leases(queue, &name, &page).await?;
                if first.is_empty() {
                    continue;
                }
                self.pause().await;
                let second = self.check_leases(queue, &name, &keys(&first)).await?;
                self.settle(confirmed(&first, second)).await?;
            }
        }
        Ok(())
    }

    async fn check_leases(
        &self,
        queue: &Queue,
        name: &QueueName,
        jobs: &[Uuid],
    ) -> Result<Vec<Suspect>, AuditError> {
        let grace = self.grace(queue).as_secs_f64();
        let wanted: Vec<(QueueName, JobId)> = jobs.iter().map(|job| (name.clone(), JobId(*job))).collect();
        let places = queue.places(&wanted).await?;
        let ends = self.stores.postgres.audit_job_ends(jobs).await?;
        let mut suspects = vec![];
        for (job, place) in jobs.iter().zip(places) {
            let Some(Place::Leased { left_ms: Some(left) }) = place else { continue };
            let (tenant, detail) = match ends.get(job) {
                None if fast_or_gone(queue, name, *job).await? => continue,
                None => (None, format!("queue {name} has a lease of a job that the ledger doesn't know")),
                Some(end) => match end.ended_s {
                    Some(ended) if ended >= grace => {
                        let detail = format!(
                            "queue {name} has a lease of a job that is {} for {ended:.0} s",
                            end.state
                        );
                        (Some(end.tenant.clone()), detail)
                    }
                    _ => continue,
                },
            };
            let finding =
                Finding { tenant, job: Some(*job), ..Finding::new(Kind::LeaseWithoutJob, job, detail) };
            // While its worker beats, the lease stays; the lease of nobody ends, and the take then drops the job.
            let mend = if left < 0 { Mend::Drop(name.clone(), JobId(*job)) } else { Mend::None };
            suspects.push(Suspect::new(*job, finding, mend));
        }
        Ok(suspects)
    }
}

/// Whether the queue alone has the job, which it was given with `durability=fast`, until its worker tells the ledger of it. It
/// has left the queue if it has ended meanwhile.
async fn fast_or_gone(queue: &Queue, name: &QueueName, job: Uuid) -> Result<bool, AuditError> {
    Ok(queue.find(name, JobId(job)).await?.is_none_or(|listed| listed.envelope.fast.is_some()))
}

fn what_is_wrong(
    job: &OpenJob,
    name: &QueueName,
    place: Option<Place>,
    lease: Duration,
) -> Option<(Kind, String, Mend)> {
    let push = || Mend::Push(JobId(job.id));
    let who = job.worker.as_deref().unwrap_or("nobody");
    match (job.state.as_str(), place) {
        ("running", None) => {
            let detail =
                format!("worker {who} took it {:.0} s ago and queue {name} doesn't know it", job.age_s);
            Some((Kind::RunningWithoutLease, detail, push()))
        }
        ("running", Some(Place::Leased { left_ms: None })) => {
            let detail = format!(
                "worker {who} took it {:.0} s ago; queue {name} says leased and has no lease",
                job.age_s
            );
            Some((Kind::RunningWithoutLease, detail, Mend::None))
        }
        // The reaper takes at most a second, and waits for one lease after an outage.
        ("running", Some(Place::Leased { left_ms: Some(left) })) if left < -(lease.as_millis() as i64) => {
            let detail = format!(
                "the lease of worker {who} in queue {name} ended {} s ago and no reaper has noticed: is a worker running?",
                -left / 1000
            );
            Some((Kind::RunningWithoutLease, detail, Mend::Reap(name.clone())))
        }
        // One that runs and waits in Redis was reaped and comes again.
        ("waiting", None) => {
            let detail = format!("it was dispatched and queue {name} doesn't know it");
            Some((Kind::MissingInQueue, detail, push()))
        }
        _ => None,
    }
}
