//! The jobs: what is enqueued follows from the seed; when, from how fast the fleet is.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use chrono::Utc;
use producer::{Client, Durability, EnqueueError, NewJob};
use queue::{JobId, QueueName, TenantId};
use sagas::{
    kinds,
    stores::postgres::accept::{Idempotency, Until},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    dice::Dice,
    judge::{Accepted, Fate},
    marks,
    texts::{DOOMED, text},
};

/// The owner of all jobs.
pub const TENANT: &str = "chaos";
/// Documents that the jobs are about.
pub const DOCUMENTS: u64 = 40;
/// A collection whose vectors have another length than the model's: whatever is ingested into it fails for good, after its
/// text was staged.
pub const NARROW: &str = "narrow";
/// Each lane has documents of its own, and enqueues one job after the other, so that later revisions have higher order numbers.
pub const LANES: u64 = 4;
/// Unfinished jobs at which the lanes wait.
const BACKLOG: i64 = 300;
/// Jobs that each lane enqueues, however slow the machine is: a short run, too, has some of each sort.
const AT_LEAST: u64 = 15;
/// What a lane may have to wait, once the faults are over, for its last job to be accepted.
const PATIENCE: Duration = Duration::from_secs(120);
const AGAIN: Duration = Duration::from_millis(200);

/// What the load has done, for the reader and the checker.
#[derive(Debug, Default)]
pub struct Log {
    accepted: Mutex<HashMap<JobId, Accepted>>,
    /// The highest revision of each document that was sent, accepted or not.
    revisions: Mutex<HashMap<String, u64>>,
    /// Jobs that are under way, as the ledger last said.
    pub unfinished: AtomicI64,
}

impl Log {
    /// All jobs that were accepted.
    pub fn accepted(&self) -> Vec<Accepted> {
        lock(&self.accepted).values().cloned().collect()
    }

    /// Whether a reader may see this revision.
    pub fn was_sent(&self, document: &str, revision: u64) -> bool {
        revision > 0 && lock(&self.revisions).get(document).is_some_and(|highest| revision <= *highest)
    }

    fn next_revision(&self, document: &str) -> u64 {
        let mut revisions = lock(&self.revisions);
        let revision = revisions.entry(document.to_owned()).or_default();
        *revision += 1;
        *revision
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A document's name.
pub fn document(no: u64) -> String {
    format!("doc-{no:02}")
}

/// One stream of jobs.
pub struct Lane {
    no: u64,
    seed: u64,
    dice: Dice,
    client: Client,
    log: Arc<Log>,
    count: u64,
    /// The newest jobs, of which some are cancelled.
    recent: Vec<JobId>,
}

impl Lane {
    pub fn new(no: u64, seed: u64, client: Client, log: Arc<Log>) -> Self {
        Self { no, seed, dice: Dice::new(seed, 100 + no), client, log, count: 0, recent: vec![] }
    }

    /// Enqueues until stopped, and at least [`AT_LEAST`] jobs; every job that was sent is accepted when it returns.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        while !stop.is_cancelled() || self.count < AT_LEAST {
            if self.log.unfinished.load(Ordering::Relaxed) > BACKLOG {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            if self.dice.below(100) < 6 {
                self.cancel().await;
            } else {
                let (job, fate) = self.draw()?;
                self.enqueue(job, fate, &stop).await?;
            }
            tokio::time::sleep(Duration::from_millis(self.dice.between(20, 120))).await;
        }
        Ok(())
    }

    fn draw(&mut self) -> anyhow::Result<(NewJob, Fate)> {
        self.count += 1;
        let name = document(self.dice.below(DOCUMENTS / LANES) * LANES + self.no);
        let other = document(self.dice.below(DOCUMENTS));
        let (kind, payload, fate) = match self.dice.below(100) {
            0..50 => {
                let revision = self.log.next_revision(&name);
                ("ingest", json!({ "document": name, "text": text(&name, revision) }), Fate::Succeeds)
            }
            50..56 => {
                let revision = DOOMED + self.count;
                let doomed = json!({ "document": name, "text": text(&name, revision), "collection": NARROW });
                ("ingest", doomed, Fate::Dies)
            }
            56..66 => ("delete", json!({ "document": name }), Fate::Succeeds),
            66..76 => ("embed", json!({ "documents": [name, other] }), Fate::Succeeds),
            76..82 => {
                let request = marks::Request { fail: true, takes_ms: self.dice.below(200) };
                (marks::KIND, json!(request), Fate::Dies)
            }
            _ => {
                let request = marks::Request { fail: false, takes_ms: self.dice.below(300) };
                (marks::KIND, json!(request), Fate::Succeeds)
            }
        };
        let tenant = TenantId::new(TENANT).map_err(|error| anyhow!("{error}"))?;
        let queue = QueueName::new(kinds::default_queue(kind)).map_err(|error| anyhow!("{error}"))?;
        let mut job = NewJob::new(kind, queue, tenant, payload);
        job.document = kinds::document_of(kind, &job.payload);
        job.idempotency = Some(Idempotency {
            key: format!("chaos-{}-{}-{}", self.seed, self.no, self.count),
            scope: "chaos".to_owned(),
            ttl: Duration::from_secs(24 * 3600),
            until: Until::default(),
        });
        if self.dice.below(100) < 10 {
            let wait = i64::try_from(self.dice.between(300, 6000))?;
            job.run_at = Some(Utc::now() + chrono::Duration::milliseconds(wait));
        }
        Ok((job, fate))
    }

    /// Sends the same request until it is accepted: an answer that is lost must not make two jobs of it.
    async fn enqueue(&mut self, job: NewJob, fate: Fate, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut over: Option<Instant> = None;
        loop {
            match self.client.enqueue(job.clone(), Durability::Durable).await {
                Ok(receipt) => {
                    let accepted = Accepted { id: receipt.id.0, fate, cancelled: false };
                    lock(&self.log.accepted).insert(receipt.id, accepted);
                    self.recent.push(receipt.id);
                    if self.recent.len() > 20 {
                        self.recent.remove(0);
                    }
                    return Ok(());
                }
                Err(
                    error @ (EnqueueError::BadRequest { .. }
                    | EnqueueError::TooLarge { .. }
                    | EnqueueError::UnknownTenant
                    | EnqueueError::Conflict { .. }),
                ) => return Err(error).context("a job of the load was refused"),
                Err(error) => {
                    if stop.is_cancelled() && over.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                        bail!("not accepted within {PATIENCE:?} after the faults were over: {error}");
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Asks once; whether it came through shows in how the job ends.
    async fn cancel(&mut self) {
        if self.recent.is_empty() {
            return;
        }
        let id = self.dice.one(&self.recent);
        if let Some(job) = lock(&self.log.accepted).get_mut(&id) {
            job.cancelled = true;
        }
        if let Err(error) = self.client.cancel(id, Some(TENANT)).await {
            tracing::debug!(%error, "a cancel was not answered");
        }
    }
}
