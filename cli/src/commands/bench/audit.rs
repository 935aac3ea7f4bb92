//! An audit of many points: how fast, and in how much memory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ::sagas::{
    audit::{AuditSettings, Auditor},
    coalescing::Batch as _,
    kinds::Stores,
    stores::{
        cache::Entry,
        postgres::{
            accept::NewJob,
            publish::{Condition, Publish, PublishBatch, Published},
            stage::{NewSaga, NewVersion, Stage, StageBatch},
            take::{Take, TakeBatch, TakeItem, TakenJob},
        },
        vectors::{Point, vectors_hash},
    },
};
use anyhow::{Context as _, anyhow, bail};
use devstack::Service;
use queue::{QueueName, TenantId, WorkerId};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{Figure, Report, sandbox::Sandbox, texts::text};
use crate::{context::Context, output};

/// Chunks of one document.
const CHUNKS: u32 = 100;
/// Documents that are made together.
const TOGETHER: usize = 20;
/// Points of one page of the plain scroll that the audit is compared with, as the audit's own.
const PAGE: u32 = 500;
const COLLECTION: &str = "flotilla-bench";
const TENANT: &str = "bench";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Points to be compared, in documents of 100
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(100..=10_000_000))]
    points: u32,
    /// Numbers of each vector
    #[arg(long, default_value_t = 384, value_parser = clap::value_parser!(u16).range(2..=4096))]
    dimensions: u16,
}

pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let settings = [
        ("FLOTILLA_EMBEDDER", "hash".to_owned()),
        // The server indexes while it is read.
        ("FLOTILLA_CALL_TIMEOUT_MS", "60000".to_owned()),
    ];
    let services = [Service::Postgres, Service::RedisQueue, Service::RedisCache, Service::Vectors];
    let results = Sandbox::with(&services, &settings, context, |context| async move {
        let postgres = context.postgres().await?;
        postgres.create_tenant(TENANT).await?;
        let stores = context.stores(postgres)?;
        let documents = args.points.div_ceil(CHUNKS);
        output::say(format!("publishing {documents} documents of {CHUNKS} chunks"));
        for first in (0..documents).step_by(TOGETHER) {
            let numbers = first..documents.min(first + TOGETHER as u32);
            publish(&stores, numbers, args.dimensions.into()).await?;
        }

        output::say("auditing");
        let before = forget_peak()?;
        let begun = Instant::now();
        let auditor = Auditor::new(stores.clone(), Some(context.queue().await?));
        let report = Box::pin(auditor.run(&AuditSettings::default())).await?;
        let took = begun.elapsed();
        let peak = status("VmHWM:")?;
        if !report.is_clean() || report.counts.points != u64::from(documents * CHUNKS) {
            bail!("the audit is wrong: {} points, {:?}", report.counts.points, report.findings);
        }
        let points = report.counts.points as f64;
        let plain = scroll(&stores).await?;
        let name = format!("a scroll of the same points by {PAGE}, nothing compared");
        let rate = points / took.as_secs_f64();
        let mib = |kib: u64| kib as f64 / 1024.0;
        Ok(vec![
            Figure::new("audit.rate", "points/s", rate, vec![], (name, points / plain.as_secs_f64())),
            Figure::new(
                "audit.seconds",
                "s",
                took.as_secs_f64(),
                vec![],
                ("that scroll".to_owned(), plain.as_secs_f64()),
            ),
            Figure::new(
                "audit.peak_memory",
                "MiB",
                mib(peak),
                vec![],
                ("this process before the audit".to_owned(), mib(before)),
            ),
        ])
    })
    .await?;
    Ok(Report { bench: "audit".into(), results })
}

/// Publishes documents by the calls that a worker's ingest makes.
async fn publish(stores: &Stores, numbers: std::ops::Range<u32>, dimensions: usize) -> anyhow::Result<()> {
    let postgres = &stores.postgres;
    let queue = QueueName::new("bench").map_err(|e| anyhow!("{e}"))?;
    let tenant = TenantId::new(TENANT).map_err(|e| anyhow!("{e}"))?;
    let jobs: Vec<NewJob> = numbers
        .map(|number| {
            let key = format!("doc-{number}");
            let payload = json!({ "document": key });
            NewJob { document: Some(key), ..NewJob::new("ingest", queue.clone(), tenant.clone(), payload) }
        })
        .collect();
    postgres.accept(&jobs, true).await?;
    let take = TakeBatch::new(postgres.clone(), WorkerId::new("bench"));
    let items: Vec<TakeItem> = jobs.iter().map(|job| TakeItem { id: job.id, fast: None }).collect();
    let mut made = vec![];
    for taken in take.flush(&items).await? {
        let Take::Taken(job) = taken else { bail!("a job was not taken: {taken:?}") };
        made.push(Made::new(*job, dimensions)?);
    }
    let stages: Vec<Arc<Stage>> = made.iter().map(|made| Arc::clone(&made.stage)).collect();
    if StageBatch(postgres.clone()).flush(&stages).await?.contains(&false) {
        bail!("a version was not staged");
    }
    let ledger = stores.ledger().await?;
    let points: Vec<Point> = made.iter().flat_map(|made| made.points(ledger)).collect();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    stores.vectors.insert(COLLECTION, dimensions, points, deadline).await?;
    for one in &made {
        stores.cache.put(one.stage.version.id, &one.entry()).await?;
    }
    let publishes: Vec<Arc<Publish>> = made.iter().map(|made| Arc::new(made.publish())).collect();
    let published = PublishBatch(postgres.clone()).flush(&publishes).await?;
    if published.iter().any(|one| *one != Published::Yes) {
        bail!("a version was not published: {published:?}");
    }
    Ok(())
}

/// A version on its way.
struct Made {
    job: TakenJob,
    stage: Arc<Stage>,
    vectors: Vec<Vec<f32>>,
}

impl Made {
    fn new(job: TakenJob, dimensions: usize) -> anyhow::Result<Self> {
        let (document_id, doc_order) =
            job.document_id.zip(job.doc_order).context("the job has no document")?;
        let first = document_id.as_u128() as u64;
        let chunks: Vec<String> = (0..u64::from(CHUNKS)).map(|no| text(first.wrapping_add(no), 12)).collect();
        let vectors = (0..u64::from(CHUNKS)).map(|no| vector(first.wrapping_add(no), dimensions)).collect();
        let body = chunks.join(" ");
        let saga = Uuid::now_v7();
        let stage = Stage {
            saga: NewSaga {
                id: saga,
                job_id: job.id,
                fence: job.fence,
                kind: job.kind.clone(),
                definition_version: 1,
                tenant: job.tenant.clone(),
                next_step: 1,
                data: json!({}),
            },
            version: NewVersion {
                id: Uuid::now_v7(),
                document_id,
                doc_order,
                title: None,
                content_hash: Sha256::digest(body.as_bytes()).to_vec(),
                body,
                metadata: json!({}),
                model: "bench".to_owned(),
                dimensions: i32::try_from(dimensions)?,
                collection: COLLECTION.to_owned(),
                chunks,
            },
        };
        Ok(Self { job, stage: Arc::new(stage), vectors })
    }

    fn points(&self, ledger: Uuid) -> impl Iterator<Item = Point> {
        let version = &self.stage.version;
        self.vectors.iter().enumerate().map(move |(no, vector)| Point {
            version: version.id,
            chunk: no as i32,
            document_id: version.document_id,
            tenant: self.job.tenant.clone(),
            ledger,
            vector: vector.clone(),
        })
    }

    fn entry(&self) -> Entry {
        let body = self.stage.version.body.clone();
        let content_hash = format!("{:x}", Sha256::digest(body.as_bytes()));
        Entry { body, content_hash, tenant: self.job.tenant.clone() }
    }

    fn publish(&self) -> Publish {
        let version = &self.stage.version;
        Publish {
            job_id: self.job.id,
            fence: self.job.fence,
            saga_id: self.stage.saga.id,
            version: version.id,
            document_id: version.document_id,
            condition: Condition::Order(version.doc_order),
            vectors_hash: vectors_hash(self.vectors.iter().map(Vec::as_slice)),
            result: json!({ "version": version.id }),
            steps: vec![],
            next_step: 4,
            grace: Duration::from_secs(60),
        }
    }
}

/// A unit vector, the same for the same number.
fn vector(number: u64, dimensions: usize) -> Vec<f32> {
    let mut state = number | 1;
    let raw: Vec<f32> = (0..dimensions)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect();
    let length = raw.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    raw.into_iter().map(|value| value / length).collect()
}

/// Reads every point with nothing else done.
async fn scroll(stores: &Stores) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut offset = None;
    loop {
        let page = stores.vectors.scroll(COLLECTION, offset, PAGE).await?;
        offset = page.next;
        if offset.is_none() {
            return Ok(begun.elapsed());
        }
    }
}

/// Makes the kernel measure this process's peak from now on; returns what it uses now, in KiB.
fn forget_peak() -> anyhow::Result<u64> {
    // proc(5): 5 resets the peak resident set size.
    std::fs::write("/proc/self/clear_refs", "5").context("the peak memory can't be measured here")?;
    status("VmRSS:")
}

/// A line of /proc/self/status, in KiB.
fn status(name: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
