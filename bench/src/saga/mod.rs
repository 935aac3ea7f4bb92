//! `flotilla bench saga`, workload `three-step`: sagas per second with everything on, beside the same writes without any of it.

mod references;
mod three_step;
pub mod worker;

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use devstack::testing::TestServices;
use futures::{StreamExt, TryStreamExt, stream};
use queue::{Envelope, Queue, QueueConfig, QueueName, TenantId};
use sagas::stores::postgres::{Postgres, PostgresConfig, accept::NewJob};
use serde_json::json;
use sqlx::{PgPool, Row};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use self::three_step::{FAILS_EACH, KIND, Sinks, TABLES};
use crate::{
    report::{Figure, median, percentile, percentiles},
    server::{MachineTime, postgres_cpu},
    sides::connect,
};

const TENANT: &str = "bench";
/// Jobs accepted and pushed with one call.
const BATCH: usize = 500;
/// How often the ledger is asked how far the fleet is, and how long a run may take.
const ASK_EVERY: Duration = Duration::from_millis(50);
const ENDED_WITHIN: Duration = Duration::from_secs(600);
/// Files of the log that are made before a run, more than it fills.
const WAL_SEGMENTS: usize = 30;
/// How often jobs are fed at a rate.
const TICK: Duration = Duration::from_millis(10);
/// For so long they are fed before any counts.
const WARM_UP: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON (there is no other form; `flotilla bench saga` makes a table of it)
    #[arg(long)]
    json: bool,
    /// Tiny sizes: shows that everything works, measures nothing
    #[arg(long)]
    quick: bool,
    /// Only the latencies, at so many sagas a second instead of half of what a drain reaches
    #[arg(long)]
    rate: Option<f64>,
    /// Rounds, of which a figure is the median
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Sagas of one run
    #[arg(long, default_value_t = 20_000)]
    jobs: u64,
    /// Worker processes
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Sagas under way at once in each
    #[arg(long, default_value_t = 1024)]
    concurrency: usize,
    /// Share of the steps' calls that fail in the run with errors
    #[arg(long, default_value_t = 0.1)]
    errors: f64,
}

/// How one drain went.
struct Drained {
    /// Sagas per second from the first claim to the last end.
    rate: f64,
    /// CPU time of a saga in the workers and in Postgres, µs.
    worker_us: f64,
    postgres_us: f64,
    /// Bytes of WAL of a saga.
    wal: f64,
    rss_mb: f64,
}

/// Runs the workload. Sides take turns in every round.
pub async fn measure(args: &Args) -> anyhow::Result<Vec<Figure>> {
    let (rounds, jobs) = if args.quick { (1, 400) } else { (args.rounds.max(1), args.jobs) };
    if let Some(rate) = args.rate {
        return Bench::start().await?.paced(args, rate, jobs).await;
    }
    let (mut drained, mut stores, mut loops) = (vec![], vec![], vec![]);
    for round in 1..=rounds {
        say(format!("round {round}: three-step"));
        stores.push(Bench::start().await?.store(jobs).await?);
        loops.push(Bench::start().await?.plain_loop(jobs).await?);
        drained.push(Bench::start().await?.drain(args, jobs, 0.0).await?);
    }
    let of = |what: fn(&Drained) -> f64| median(drained.iter().map(what));
    let (rate, store, plain) = (of(|one| one.rate), median(stores), median(loops));
    let mut figures = vec![
        Figure::new(
            "three-step",
            "sagas/s",
            rate,
            "loop: the same writes, 32 in flight, nothing durable",
            plain,
        ),
        Figure::new("three-step.store", "sagas/s", rate, "store: the same rows and keys in batches", store),
        Figure::new("three-step.worker-cpu", "µs/saga", of(|one| one.worker_us), "no bar", 0.0),
        Figure::new("three-step.postgres-cpu", "µs/saga", of(|one| one.postgres_us), "no bar", 0.0),
        Figure::new("three-step.wal", "bytes/saga", of(|one| one.wal), "no bar", 0.0),
        Figure::new("three-step.worker-rss", "MB", of(|one| one.rss_mb), "no bar", 0.0),
    ];
    say("three-step at half the rate");
    figures.extend(Bench::start().await?.paced(args, rate / 2.0, jobs).await?);
    say("three-step with errors");
    let errors = Bench::start().await?.drain(args, jobs.div_ceil(10), args.errors).await?;
    figures.push(Figure::new("three-step.errors", "sagas/s", errors.rate, "without errors", rate));
    Ok(figures)
}

/// A server that has run for a while writes its log into files that it has written before. A fresh one makes each file, 16 MB of
/// zeros, in the middle of somebody's commit.
async fn make_wal_segments(pool: &PgPool) -> anyhow::Result<()> {
    sqlx::raw_sql("ALTER SYSTEM SET min_wal_size = '512MB'").execute(pool).await?;
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(pool).await?;
    for _ in 0..WAL_SEGMENTS {
        sqlx::raw_sql("SELECT pg_logical_emit_message(false, 'bench', 'one more'); SELECT pg_switch_wal()")
            .execute(pool)
            .await?;
    }
    sqlx::raw_sql("CHECKPOINT").execute(pool).await?;
    Ok(())
}

fn say(what: impl std::fmt::Display) {
    eprintln!("{what}");
}

/// Private services, and what a producer needs. Fresh for each run, so that none works on the rows of those before it.
struct Bench {
    services: TestServices,
    postgres: Postgres,
    queue: Queue,
    name: QueueName,
    tenant: TenantId,
}

impl Bench {
    async fn start() -> anyhow::Result<Self> {
        let services = TestServices::builder().postgres().redis_queue().redis_cache().start().await?;
        let config = PostgresConfig::new(services.postgres().url());
        let postgres = Postgres::connect(&config).await.map_err(|error| anyhow!("{error}"))?;
        postgres.migrate_up().await?;
        postgres.create_tenant(TENANT).await?;
        sqlx::raw_sql(TABLES).execute(postgres.pool()).await?;
        make_wal_segments(postgres.pool()).await?;
        let config = QueueConfig { url: services.redis_queue().url().to_owned(), ..QueueConfig::default() };
        let queue = Queue::connect(config).await?;
        Ok(Self { services, postgres, queue, name: QueueName::new(KIND)?, tenant: TenantId::new(TENANT)? })
    }

    fn pool(&self) -> &PgPool {
        self.postgres.pool()
    }

    async fn sinks(&self) -> anyhow::Result<Sinks> {
        let postgres = PgPool::connect(self.services.postgres().url()).await?;
        Ok(Sinks { postgres, redis: connect(self.services.redis_cache().url()).await? })
    }

    async fn store(self, jobs: u64) -> anyhow::Result<f64> {
        let rate = references::store(&self.sinks().await?, jobs).await?;
        say(format!("store: {rate:.0}/s"));
        Ok(rate)
    }

    async fn plain_loop(self, jobs: u64) -> anyhow::Result<f64> {
        let rate = references::plain_loop(&self.sinks().await?, jobs.div_ceil(4)).await?;
        say(format!("loop: {rate:.0}/s"));
        Ok(rate)
    }

    /// Accepts jobs in one commit and pushes them.
    async fn enqueue(&self, numbers: std::ops::Range<u64>) -> anyhow::Result<()> {
        let jobs: Vec<NewJob> = numbers
            .map(|number| {
                NewJob::new(KIND, self.name.clone(), self.tenant.clone(), json!({ "number": number }))
            })
            .collect();
        self.postgres.accept(&jobs, true).await?;
        let envelopes: Vec<Envelope> = jobs
            .iter()
            .map(|job| Envelope { id: job.id, ..Envelope::new(KIND, self.name.clone(), self.tenant.clone()) })
            .collect();
        self.queue.push(&envelopes).await?;
        Ok(())
    }

    /// Drains jobs that wait in ledger and queue.
    async fn drain(self, args: &Args, jobs: u64, errors: f64) -> anyhow::Result<Drained> {
        let this = &self;
        stream::iter((0..jobs).step_by(BATCH))
            .map(|first| this.enqueue(first..(first + BATCH as u64).min(jobs)))
            .buffer_unordered(4)
            .try_collect::<()>()
            .await?;
        for tidy in ["VACUUM ANALYZE", "CHECKPOINT"] {
            sqlx::raw_sql(tidy).execute(self.pool()).await?;
        }
        let (wal, cpu) = (self.wal().await?, postgres_cpu(self.pool()).await?);
        let workers = self.workers(args, errors)?;
        self.ended(jobs).await?;
        let (wal, cpu) = (self.wal().await? - wal, postgres_cpu(self.pool()).await? - cpu);
        let used = stop(workers).await?;
        self.check(jobs).await?;
        let seconds: f64 = sqlx::query_scalar(
            "SELECT extract(epoch FROM max(finished_at) - min(taken_at))::float8 FROM flotilla.jobs",
        )
        .fetch_one(self.pool())
        .await?;
        let count = jobs as f64;
        let drained = Drained {
            rate: count / seconds,
            worker_us: used.iter().map(|one| one.0).sum::<f64>() / count,
            postgres_us: cpu * 1e6 / count,
            wal: wal / count,
            rss_mb: used.iter().map(|one| one.1).fold(0.0, f64::max),
        };
        say(format!(
            "three-step, {}% errors: {:.0}/s; CPU of a saga: workers {:.0} µs, Postgres {:.0} µs; WAL {:.0} bytes; {:.0} MB",
            errors * 100.0,
            drained.rate,
            drained.worker_us,
            drained.postgres_us,
            drained.wal,
            drained.rss_mb
        ));
        Ok(drained)
    }

    /// Feeds jobs at a rate, and tells how long each took from its enqueue to its end, and each compensation from the
    /// failure to its end. Those of the first seconds count in nothing: they find cold pools, and tables that have yet to grow.
    async fn paced(self, args: &Args, rate: f64, jobs: u64) -> anyhow::Result<Vec<Figure>> {
        let workers = self.workers(args, 0.0)?;
        let warm = ((rate * WARM_UP.as_secs_f64()) as u64).min(jobs);
        self.feed(0..warm, rate).await?;
        let since: String = sqlx::query_scalar("SELECT now()::text").fetch_one(self.pool()).await?;
        let (jobs, begin) = (warm + jobs, MachineTime::now());
        self.feed(warm..jobs, rate).await?;
        self.ended(jobs).await?;
        let stolen = begin.stolen_until(MachineTime::now());
        stop(workers).await?;
        self.check_rows(jobs).await?;
        let times = self
            .times(
                "SELECT extract(epoch FROM finished_at - created_at)::float8 FROM flotilla.jobs
                 WHERE state = 'succeeded' AND created_at >= $1::timestamptz",
                &since,
            )
            .await?;
        let mut undone = self
            .times(
                "SELECT extract(epoch FROM s.finished_at - p.ended_at)::float8
                 FROM flotilla.sagas s JOIN flotilla.saga_steps p ON p.saga_id = s.id AND p.state = 'failed'
                 WHERE s.state = 'compensated' AND s.created_at >= $1::timestamptz",
                &since,
            )
            .await?;
        undone.sort_unstable();
        let (p50, p99) = percentiles(times.clone());
        let (undone50, undone90) = (percentile(&undone, 0.5), percentile(&undone, 0.9));
        say(format!(
            "at {rate:.0}/s: p50 {p50} ms, p99 {p99} ms; compensation p50 {undone50} ms, p90 {undone90} ms; \
             {stolen:.1}% of the machine's time went to others"
        ));
        Ok(vec![
            Figure::new("three-step.latency.p99", "ms", p99, "the bar", 50.0).times(times),
            Figure::new("three-step.latency.stolen", "% of the CPU", stolen, "no bar", 0.0),
            Figure::new("three-step.compensation.p50", "ms", undone50, "no bar", 0.0),
            Figure::new("three-step.compensation.p90", "ms", undone90, "the bar", 1000.0).times(undone),
        ])
    }

    /// Enqueues jobs as they fall due at the rate.
    async fn feed(&self, numbers: std::ops::Range<u64>, rate: f64) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut ticks = tokio::time::interval(TICK);
        let mut fed = numbers.start;
        while fed < numbers.end {
            ticks.tick().await;
            let due = (numbers.start + (begun.elapsed().as_secs_f64() * rate) as u64).min(numbers.end);
            if due > fed {
                self.enqueue(fed..due).await?;
                fed = due;
            }
        }
        Ok(())
    }

    async fn times(&self, sql: &'static str, since: &str) -> anyhow::Result<Vec<Duration>> {
        let seconds: Vec<f64> = sqlx::query_scalar(sql).bind(since).fetch_all(self.pool()).await?;
        Ok(seconds.into_iter().map(|time| Duration::from_secs_f64(time.max(0.0))).collect())
    }

    fn workers(&self, args: &Args, errors: f64) -> anyhow::Result<Vec<Child>> {
        let threads = std::thread::available_parallelism()?.get().div_ceil(args.workers.max(1));
        (0..args.workers.max(1))
            .map(|_| {
                Command::new(std::env::current_exe()?)
                    .args(["saga-work", "--database", self.services.postgres().url()])
                    .args(["--redis", self.services.redis_queue().url()])
                    .args(["--cache", self.services.redis_cache().url()])
                    .args(["--concurrency", &args.concurrency.to_string()])
                    .args(["--threads", &threads.to_string(), "--errors", &errors.to_string()])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .kill_on_drop(true)
                    .spawn()
                    .context("a worker can't be started")
            })
            .collect()
    }

    /// Waits until every job has ended. Counting them all would cost more than the work of a small round, so that is done once.
    async fn ended(&self, jobs: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        let open = "SELECT EXISTS (SELECT FROM flotilla.jobs WHERE state IN ('waiting', 'running'))";
        while sqlx::query_scalar::<_, bool>(open).fetch_one(self.pool()).await? {
            ensure!(begun.elapsed() < ENDED_WITHIN, "not done within {ENDED_WITHIN:?}");
            tokio::time::sleep(ASK_EVERY).await;
        }
        let counts = self.postgres.job_counts(None).await?;
        ensure!((counts.succeeded + counts.dead) as u64 == jobs, "of {jobs} jobs {counts:?} have ended");
        Ok(())
    }

    /// What must be true at the end, whatever failed on the way.
    async fn check(&self, jobs: u64) -> anyhow::Result<()> {
        let fails = jobs / FAILS_EACH;
        let counts = self.postgres.job_counts(None).await?;
        if (counts.succeeded as u64, counts.dead as u64) != (jobs - fails, fails) {
            bail!("of {jobs} jobs {fails} had to fail: {counts:?}");
        }
        self.check_rows(jobs).await
    }

    async fn check_rows(&self, jobs: u64) -> anyhow::Result<()> {
        let stand = (jobs - jobs / FAILS_EACH) as i64;
        let row = sqlx::query(
            "SELECT (SELECT count(*) FROM shop.rows) AS rows, (SELECT count(DISTINCT body -> 'number') FROM shop.rows) AS numbers,
                    (SELECT count(*) FROM shop.vectors JOIN shop.rows USING (id)) AS vectors,
                    (SELECT count(*) FROM shop.vectors) AS all_vectors",
        )
        .fetch_one(self.pool())
        .await?;
        for column in ["rows", "numbers", "vectors", "all_vectors"] {
            let count: i64 = row.try_get(column)?;
            ensure!(count == stand, "{column}: {count} instead of {stand}");
        }
        let mut redis = connect(self.services.redis_cache().url()).await?;
        let keys: Vec<u64> = (0..jobs).collect();
        let mut there = 0;
        for page in keys.chunks(BATCH) {
            let mut exists = redis::cmd("EXISTS");
            for number in page {
                exists.arg(three_step::key(*number).0);
            }
            there += exists.query_async::<i64>(&mut redis).await?;
        }
        ensure!(there == stand, "keys: {there} instead of {stand}");
        Ok(())
    }

    /// How far the log of Postgres is, in bytes.
    async fn wal(&self) -> anyhow::Result<f64> {
        let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::float8";
        Ok(sqlx::query_scalar(sql).fetch_one(self.pool()).await?)
    }
}

/// Ends workers; what each used: CPU in µs, peak memory in MB.
async fn stop(workers: Vec<Child>) -> anyhow::Result<Vec<(f64, f64)>> {
    let mut used = vec![];
    for mut worker in workers {
        drop(worker.stdin.take());
        let stdout = worker.stdout.take().context("no stdout")?;
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) = lines.next_line().await? {
            let mut parts = line.split(' ').skip(1);
            let mut number = || {
                parts
                    .next()
                    .and_then(|part| part.parse::<f64>().ok())
                    .with_context(|| format!("a worker said {line:?}"))
            };
            used.push((number()?, number()? / 1024.0));
        }
        let status = worker.wait().await?;
        ensure!(status.success(), "a worker ended with {status}");
    }
    Ok(used)
}
