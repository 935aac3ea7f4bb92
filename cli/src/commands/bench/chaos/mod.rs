//! `flotilla bench chaos`: a fleet of real processes under load while workers, servers and the links between them are killed,
//! paused, cut and slowed at random; then everything that was accepted must have ended as it should, once, with no half state
//! seen on the way.

mod dice;
mod fleet;
mod judge;
mod load;
mod marks;
mod plan;
mod texts;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures::future::{join_all, try_join_all};
use producer::{Client, ClientSettings};
use queue::{Queue, QueueName};
use sagas::{
    audit::{AuditSettings, Auditor},
    kinds::Stores,
    stores::cache::Entry,
};
use serde::Serialize;
use sqlx::PgPool;
use telemetry::Telemetry;
use tokio_util::sync::CancellationToken;

use self::{
    fleet::{Fleet, Servers, Start},
    judge::{History, Verdict, judge},
    load::{LANES, Lane, Log, NARROW, TENANT},
    plan::plan,
    watch::{Seeing, watch},
};
use crate::{
    commands::worker,
    context::Context,
    failure::{Ending, Outcome},
    output, signals,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long faults happen, in minutes; until all jobs have ended takes a little longer
    #[arg(long, default_value_t = 1.0, value_parser = minutes)]
    minutes: f64,
    /// The faults and the jobs follow from this number
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do things wrong on purpose in the end, to see that they are found
    #[arg(long, hide = true, value_delimiter = ',')]
    plant: Vec<Plant>,
}

/// What the checker must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Plant {
    /// An accepted job that has no end
    Lost,
    /// An effect that happened once more
    Duplicate,
    /// A published text that readers see changed
    Half,
    /// Points that are gone
    Drift,
}

/// What one of these bench workers runs: the queues of all jobs, with the saga that leaves marks.
pub async fn work(args: worker::Args, context: &Context, telemetry: &Telemetry) -> Outcome {
    worker::run_with(args, context, telemetry, |stores| {
        stores.registry().with(marks::Mark::new(&stores.postgres))
    })
    .await
}

/// How long the fleet may take to end everything once the faults are over.
const SETTLE_WITHIN: Duration = Duration::from_secs(300);
/// How long the reader looks on after that, at least, and how long until it has seen each document once more, at most.
const LOOK_ON: Duration = Duration::from_secs(2);
const LOOK_ON_WITHIN: Duration = Duration::from_secs(120);
/// Violations that are listed; all are counted.
const LISTED: usize = 100;

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    seed: u64,
    minutes: f64,
    /// `pass`, or `violations`.
    verdict: &'static str,
    results: Vec<Count>,
    /// How often each trouble came.
    faults: BTreeMap<String, u64>,
    /// The first violations.
    found: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Count {
    name: &'static str,
    value: u64,
    unit: &'static str,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let asked = signals::drain_on_signal()?;
    let report = signals::unless_asked_to_end(&asked, Box::pin(chaos(&args, context))).await?;
    context.out.data(&report, || {
        let mut table = output::table(&["RESULT", "VALUE", "UNIT"]);
        for count in &report.results {
            table.add_row([count.name.into(), output::number(count.value), count.unit.into()]);
        }
        let mut text = output::tidy(&table);
        for found in &report.found {
            text.push_str("\n- ");
            text.push_str(found);
        }
        let verdict = if report.verdict == "pass" {
            "everything accepted has ended as it should, once, and nobody saw a half state"
        } else {
            "the history is not what it should be"
        };
        format!("{text}\n\nverdict: {} (seed {}): {verdict}", report.verdict, report.seed)
    })?;
    Ok(Ending::fine_if(report.verdict == "pass"))
}

async fn chaos(args: &Args, context: &Context) -> anyhow::Result<Report> {
    let lasts = Duration::from_secs_f64(args.minutes * 60.0);
    let faults = plan(args.seed, lasts);
    output::say(format!("seed {}: {} faults in {:.1} minutes", args.seed, faults.len(), args.minutes));
    for fault in &faults {
        output::say(fault.to_string());
    }
    let servers = Servers::start().await.context("the servers can't be started")?;
    let (mut direct, proxied) = (settings(context, servers.direct()), settings(context, servers.proxied()));
    // Whoever checks has patience with a busy machine.
    direct.settings = direct.settings.with([("FLOTILLA_CALL_TIMEOUT_MS", "30000".to_owned())]);
    let stores = prepare(&direct).await?;
    let pool = stores.postgres.pool().clone();
    let own_queue = direct.queue().await?;
    // Faults and load go through the proxies, readers and checkers past them.
    let start = Start { env: worker_settings(servers.proxied()), dir: servers.dir().to_owned() };
    let fleet = Fleet::start(servers, start)?;
    let client =
        Client::new(proxied.postgres().await?, Some(proxied.lazy_queue()?), ClientSettings::default());

    let (log, seeing) = (Arc::<Log>::default(), Arc::<Seeing>::default());
    let (stop_load, stop_watch) = (CancellationToken::new(), CancellationToken::new());
    let _guards = (stop_load.clone().drop_guard(), stop_watch.clone().drop_guard());
    let watching =
        tokio::spawn(watch(stores.clone(), Arc::clone(&log), Arc::clone(&seeing), stop_watch.clone()));
    let lanes: Vec<_> = (0..LANES)
        .map(|no| {
            tokio::spawn(Lane::new(no, args.seed, client.clone(), Arc::clone(&log)).run(stop_load.clone()))
        })
        .collect();

    let begun = Instant::now();
    let end = begun + lasts;
    let quarrel = async {
        try_join_all(faults.iter().map(|fault| fleet.strike(*fault, begun, end))).await?;
        tokio::time::sleep_until(end.into()).await;
        stop_load.cancel();
        output::say("the faults are over; waiting for the fleet to end everything");
        for lane in join_all(lanes).await {
            lane.context("the load failed")??;
        }
        settle(&stores, &own_queue).await
    };
    let mut other = tokio::select! {
        done = quarrel => done?,
        gone = fleet.supervise() => return Err(gone.err().unwrap_or_else(|| anyhow::anyhow!("the supervisor ended"))),
        () = count(&stores, &log) => bail!("the count ended"),
    };
    for plant in &args.plant {
        spoil(*plant, &stores, &pool).await?;
    }
    look_on(&seeing).await?;
    stop_watch.cancel();
    watching.await.context("the reader failed")?;
    other.extend(fleet.odd());
    other.extend(audit(&stores, &direct.queue().await?).await?);
    let looks = seeing.looks.load(Ordering::Relaxed);
    if looks == 0 {
        bail!("the reader saw nothing");
    }
    let history = History {
        accepted: log.accepted(),
        jobs: sqlx::query_as(JOBS).fetch_all(&pool).await?,
        marks: sqlx::query_as("SELECT job, step, fence, change FROM public.marks ORDER BY seq")
            .fetch_all(&pool)
            .await?,
        shown: sqlx::query_as(
            "SELECT document_id, version, doc_order, deleted_order FROM public.shown ORDER BY seq",
        )
        .fetch_all(&pool)
        .await?,
        half_visible: seeing.complaints(),
        other,
    };
    let verdict = judge(&history);
    if verdict.violations().next().is_some() {
        output::say(format!(
            "what stands is in {}; it stays if {} is set",
            fleet.servers.dir().display(),
            devstack::testing::KEEP_VARIABLE
        ));
    }
    Ok(report(args, &fleet, &history, &verdict, looks, seeing.failed.load(Ordering::Relaxed)))
}

fn report(
    args: &Args,
    fleet: &Fleet,
    history: &History,
    verdict: &Verdict,
    looks: u64,
    failed: u64,
) -> Report {
    let count = |name, value: usize, unit| Count { name, value: value as u64, unit };
    let ended = |state: &str| history.jobs.iter().filter(|job| job.state == state).count();
    let violations = verdict.violations().count();
    let faults = fleet.done();
    let results = vec![
        count("accepted", verdict.accepted, "jobs"),
        count("ended", verdict.ended, "jobs"),
        count("lost", verdict.lost.len(), "jobs"),
        count("duplicate_effects", verdict.duplicate_effects.len(), "effects"),
        count("half_visible", verdict.half_visible.len(), "half states"),
        count("violations", violations, "violations"),
        count("succeeded", ended("succeeded"), "jobs"),
        count("cancelled", ended("cancelled"), "jobs"),
        count("dead", ended("dead"), "jobs"),
        count("poison", history.jobs.iter().filter(|job| judge::is_poison(job)).count(), "jobs"),
        count("redelivered", history.jobs.iter().filter(|job| job.lost_deliveries > 0).count(), "jobs"),
        count("published", history.shown.iter().filter(|row| row.version.is_some()).count(), "versions"),
        Count { name: "looks", value: looks, unit: "looks" },
        Count { name: "looks_failed", value: failed, unit: "looks" },
        Count { name: "faults", value: faults.values().sum(), unit: "faults" },
    ];
    Report {
        bench: "chaos",
        seed: args.seed,
        minutes: args.minutes,
        verdict: if violations == 0 { "pass" } else { "violations" },
        results,
        faults,
        found: verdict.violations().take(LISTED).map(|(list, found)| format!("{list}: {found}")).collect(),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if (0.1..=1440.0).contains(&minutes) => Ok(minutes),
        _ => Err("from 0.1 to 1440".to_owned()),
    }
}

/// Short leases, time-outs and grace periods, so that a short run has many of each.
const SETTINGS: [(&str, &str); 14] = [
    ("FLOTILLA_PREFIX", "chaos"),
    ("FLOTILLA_EMBEDDER", "hash"),
    ("FLOTILLA_QUEUES", "ingest,embed,delete,mark"),
    ("FLOTILLA_CONCURRENCY", "8"),
    ("FLOTILLA_LEASE_MS", "2000"),
    ("FLOTILLA_HEARTBEAT_MS", "500"),
    ("FLOTILLA_DRAIN_GRACE_MS", "3000"),
    ("FLOTILLA_GRACE_MS", "1000"),
    // Later than a worker can write that is paused at its upsert and then meets a link that hangs: twice `plan::LONGEST`.
    ("FLOTILLA_SWEEP_BOUND_MS", "16000"),
    ("FLOTILLA_RETRY_BASE_MS", "100"),
    ("FLOTILLA_RETRY_CAP_MS", "2000"),
    ("FLOTILLA_RECONCILE_MS", "500"),
    ("FLOTILLA_CALL_TIMEOUT_MS", "1000"),
    ("FLOTILLA_LOG", "info"),
];

fn settings(context: &Context, stores: Vec<(&'static str, String)>) -> Context {
    let own = SETTINGS.map(|(name, value)| (name, value.to_owned()));
    Context { settings: context.settings.with(stores.into_iter().chain(own)), ..context.clone() }
}

fn worker_settings(stores: Vec<(&'static str, String)>) -> Vec<(&'static str, String)> {
    SETTINGS.map(|(name, value)| (name, value.to_owned())).into_iter().chain(stores).collect()
}

/// Each change of what readers see of a document leaves a row in a table that is only ever added to, whoever makes it.
const SHOWN: [&str; 3] = [
    "CREATE TABLE public.shown (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, document_id uuid NOT NULL, version uuid,
        doc_order bigint NOT NULL, deleted_order bigint)",
    "CREATE FUNCTION public.record_shown() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.shown (document_id, version, doc_order, deleted_order)
        VALUES (NEW.id, NEW.current_version, NEW.current_order, NEW.deleted_order);
        RETURN NULL;
     END $$",
    "CREATE TRIGGER record_shown AFTER UPDATE ON flotilla.documents FOR EACH ROW
     WHEN ((OLD.current_version, OLD.current_order, OLD.deleted_order)
           IS DISTINCT FROM (NEW.current_version, NEW.current_order, NEW.deleted_order))
     EXECUTE FUNCTION public.record_shown()",
];

const JOBS: &str = "SELECT j.id, j.kind, j.state, j.outcome, (j.result ->> 'version')::uuid AS version, j.document_id, j.doc_order,
       j.parent, l.class, j.lost_deliveries, j.last_error
  FROM flotilla.jobs j LEFT JOIN flotilla.dead_letters l ON l.job_id = j.id ORDER BY j.id";

/// Schema, tenant, side tables and collections.
async fn prepare(context: &Context) -> anyhow::Result<Stores> {
    let postgres = context.postgres().await?;
    postgres.migrate_up().await?;
    postgres.create_tenant(TENANT).await?;
    for sql in SHOWN.into_iter().chain([marks::TABLE]) {
        sqlx::query(sql).execute(postgres.pool()).await?;
    }
    let stores = context.stores(postgres)?;
    stores.vectors.ensure(NARROW, 8).await?;
    stores.vectors.ensure(&stores.collection(stores.embedder.model()), stores.embedder.dimensions()).await?;
    Ok(stores)
}

/// Keeps the number of unfinished jobs, which holds the load back.
async fn count(stores: &Stores, log: &Log) {
    loop {
        match stores.postgres.job_counts(None).await {
            Ok(counts) => log.unfinished.store(counts.waiting + counts.running, Ordering::Relaxed),
            Err(error) => tracing::debug!(%error, "not counted"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Waits until nothing is under way. What is then still under way is said, and is a violation.
async fn settle(stores: &Stores, queue: &Queue) -> anyhow::Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        // A connection that a fault has cut is noticed by the next call only, which fails.
        let left = match under_way(stores, queue).await {
            Ok(None) => {
                output::say(format!("everything has ended after {:.1} s", begun.elapsed().as_secs_f64()));
                return Ok(vec![]);
            }
            Ok(Some(left)) => left,
            Err(error) => format!("{error:#}"),
        };
        if begun.elapsed() > SETTLE_WITHIN {
            return Ok(vec![format!("not settled within {SETTLE_WITHIN:?}: {left}")]);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until the reader has seen every document as it is now: the round that it is in, and a whole one. No look may fail any
/// more.
async fn look_on(seeing: &Seeing) -> anyhow::Result<()> {
    seeing.calm.store(true, Ordering::Relaxed);
    let (begun, last) = (Instant::now(), seeing.rounds.load(Ordering::Relaxed) + 2);
    while begun.elapsed() < LOOK_ON || seeing.rounds.load(Ordering::Relaxed) < last {
        if begun.elapsed() > LOOK_ON_WITHIN {
            bail!("the reader did not get round within {LOOK_ON_WITHIN:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// What is still to be done, in ledger, stores and queue.
async fn under_way(stores: &Stores, queue: &Queue) -> anyhow::Result<Option<String>> {
    let pending = stores.postgres.audit_pending().await?;
    let mut leases = 0;
    for name in ["ingest", "embed", "delete", marks::KIND] {
        leases += queue.stats(&QueueName::new(name)?).await?.in_flight;
    }
    let done = pending.unfinished == 0 && pending.sweeps == 0 && pending.finishing == 0 && leases == 0;
    Ok((!done).then(|| {
        format!(
            "{} unfinished jobs, {} sweeps, {} finishing sagas, {leases} leases",
            pending.unfinished, pending.sweeps, pending.finishing
        )
    }))
}

/// What the auditor finds; it mends nothing.
async fn audit(stores: &Stores, queue: &Queue) -> anyhow::Result<Vec<String>> {
    let settings = AuditSettings {
        wait_for_janitor: Duration::from_secs(30),
        collections: vec![NARROW.to_owned()],
        ..AuditSettings::default()
    };
    let report = Auditor::new(stores.clone(), Some(queue.clone())).run(&settings).await?;
    let mut found: Vec<String> = report
        .findings
        .iter()
        .map(|finding| format!("auditor: {} {}: {}", finding.kind.name(), finding.subject, finding.detail))
        .collect();
    let unseen = report.pending.unseen_points + report.pending.unseen_cache_entries;
    if unseen > 0 {
        found.push(format!("auditor: {unseen} points and cache entries that nobody sees were left behind"));
    }
    Ok(found)
}

/// Does the wrong thing.
async fn spoil(plant: Plant, stores: &Stores, pool: &PgPool) -> anyhow::Result<()> {
    let shown: sqlx::types::Uuid = sqlx::query_scalar(
        "SELECT current_version FROM flotilla.documents WHERE current_version IS NOT NULL LIMIT 1",
    )
    .fetch_one(pool)
    .await?;
    let sql = match plant {
        Plant::Lost => {
            "UPDATE flotilla.jobs SET state = 'waiting', finished_at = NULL, run_at = now() + interval '1 day' WHERE id =
             (SELECT id FROM flotilla.jobs WHERE kind = 'mark' AND state = 'succeeded' LIMIT 1)"
        }
        Plant::Duplicate => {
            "INSERT INTO public.marks (job, step, key, fence, change)
             SELECT m.job, m.step, m.key, m.fence, 1 FROM public.marks m JOIN flotilla.jobs j ON j.id = m.job
             WHERE j.state = 'succeeded' ORDER BY m.seq DESC LIMIT 1"
        }
        Plant::Half => {
            let document = stores.postgres.published_among(TENANT, &[shown]).await?;
            let version = document.get(&shown).context("no published version to spoil")?;
            let entry = Entry {
                body: "something else".to_owned(),
                content_hash: version.content_hash.clone(),
                tenant: TENANT.to_owned(),
            };
            return Ok(stores.cache.put(shown, &entry).await?);
        }
        Plant::Drift => {
            let collection = stores.collection(stores.embedder.model());
            return Ok(stores.vectors.remove(&collection, &[(shown, 1)]).await?);
        }
    };
    // The database itself would refuse what is planted.
    let mut tx = pool.begin().await?;
    sqlx::query("ALTER TABLE flotilla.jobs DISABLE TRIGGER jobs_transitions").execute(&mut *tx).await?;
    let done = sqlx::query(sql).execute(&mut *tx).await?;
    sqlx::query("ALTER TABLE flotilla.jobs ENABLE TRIGGER jobs_transitions").execute(&mut *tx).await?;
    tx.commit().await?;
    if done.rows_affected() != 1 {
        bail!("{plant:?} was not planted: the run was too short for it");
    }
    Ok(())
}
