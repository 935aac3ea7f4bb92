//! Jobs that are no sagas, under apalis, over the ledger: retries, results, dead letters, the fence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use apalis::{
    layers::WorkerBuilderExt,
    prelude::{AbortError, BoxDynError, Data, RetryAfterError, WorkerBuilder},
};
use devstack::testing::TestServices;
use queue::{
    AckLayer, Acker, Claimer, ClaimerConfig, Gates, Heartbeat, HeartbeatConfig, Job, JobId, Ledger, Presence,
    Queue, QueueBackend, QueueConfig, QueueName, Reaper, Retries, Scheduler, Snooze, TenantId, WorkerId,
    ledger::{End, Grant, LedgerError, Take, Written},
};
use sagas::{
    encryption::{Keyring, new_key},
    stores::postgres::{
        Postgres, PostgresConfig, accept::NewJob, inspect::JobView, ledger::Cancel, plain::PlainLedger,
    },
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);

struct Stage {
    postgres: Postgres,
    queue: Queue,
    services: TestServices,
}

impl Stage {
    async fn new() -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let config = PostgresConfig {
            call_timeout: Duration::from_secs(2),
            ..PostgresConfig::new(services.postgres().url())
        };
        let postgres = Postgres::connect(&config).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        let config = QueueConfig {
            url: services.redis_queue().url().to_owned(),
            lease: Duration::from_secs(6),
            ..QueueConfig::default()
        };
        let queue = Queue::connect(config).await.unwrap();
        Self { postgres, queue, services }
    }

    async fn accept(&self, kind: &str, change: impl FnOnce(&mut NewJob)) -> NewJob {
        let name = QueueName::new("reports").unwrap();
        let mut job = NewJob::new(kind, name, TenantId::new("acme").unwrap(), json!({ "n": 20 }));
        change(&mut job);
        self.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        job
    }

    async fn enqueue(&self, kind: &str, change: impl FnOnce(&mut NewJob)) -> JobId {
        let id = self.accept(kind, change).await.id;
        let envelope = self.postgres.envelope(id).await.unwrap().unwrap();
        self.queue.push(&[envelope]).await.unwrap();
        id
    }

    async fn job(&self, id: JobId) -> JobView {
        self.postgres.job(id, None).await.unwrap().unwrap()
    }

    async fn ended(&self, id: JobId) -> JobView {
        let begun = Instant::now();
        loop {
            let job = self.job(id).await;
            if job.finished_at.is_some() {
                return job;
            }
            assert!(begun.elapsed() < DEADLINE, "not ended in time: {job:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until Redis has no job any more.
    async fn drained(&self) {
        let begun = Instant::now();
        let name = QueueName::new("reports").unwrap();
        loop {
            let stats = self.queue.stats(&name).await.unwrap();
            if stats.depth() + stats.scheduled + stats.in_flight == 0 {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "{stats:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Takes a job as `worker` does, without Redis.
    async fn take(&self, job: &NewJob, worker: &str) -> (PlainLedger, Grant) {
        let ledger = PlainLedger::new(self.postgres.clone(), WorkerId::new(worker));
        let envelope = self.postgres.envelope(job.id).await.unwrap().unwrap();
        match ledger.take(&envelope, Duration::from_secs(5)).await.unwrap() {
            Take::Granted(grant) => (ledger, grant),
            other => panic!("not granted: {other:?}"),
        }
    }
}

/// How often each job ran, and the gate of those that wait for the test.
#[derive(Clone)]
struct Runs(Arc<Mutex<HashMap<JobId, u32>>>, Arc<Semaphore>);

async fn handle(job: Job, runs: Data<Runs>) -> Result<Value, BoxDynError> {
    let run = {
        let mut runs = runs.0.0.lock().unwrap();
        let run = runs.entry(job.envelope.id).or_insert(0);
        *run += 1;
        *run
    };
    match job.envelope.kind.as_str() {
        "flaky" if run < 3 => Err("not yet".into()),
        "busy" if run < 2 => Err(RetryAfterError::new("come back", Duration::from_millis(50)).into()),
        "patient" if run < 3 => Err(Snooze(Duration::from_millis(50)).into()),
        "large" => Ok(json!("x".repeat(65_535))),
        "hopeless" => Err(AbortError::new("no such report").into()),
        "slow" => std::future::pending().await,
        "stops" => {
            job.cancelled().await;
            assert!(job.is_cancelled());
            Err("stopped".into())
        }
        // They don't hear of the cancel, which comes while they run.
        "dozes" | "stumbles" if run == 1 => {
            runs.1.acquire().await?.forget();
            match job.envelope.kind.as_str() {
                "dozes" => Err(Snooze(Duration::from_hours(720)).into()),
                _ => Err(RetryAfterError::new("come back", Duration::from_hours(720)).into()),
            }
        }
        "goes on" => {
            job.cancelled().await;
            Ok(json!("to its end"))
        }
        "puts off" => {
            job.cancelled().await;
            Err(Snooze(Duration::from_hours(1)).into())
        }
        _ => Ok(json!({ "doubled": job.payload::<Value>()?["n"].as_i64().unwrap() * 2 })),
    }
}

/// Runs an apalis worker over the stage's queue until the guard is dropped.
fn worker(stage: &Stage) -> (Runs, tokio_util::sync::DropGuard) {
    worker_of(stage, |ledger| ledger)
}

fn worker_of(
    stage: &Stage,
    with: impl FnOnce(PlainLedger) -> PlainLedger,
) -> (Runs, tokio_util::sync::DropGuard) {
    let (runs, shutdown) = (Runs(Arc::default(), Arc::new(Semaphore::new(0))), CancellationToken::new());
    let id = WorkerId::for_this_process();
    let heartbeat =
        Heartbeat::spawn(stage.queue.config().clone(), HeartbeatConfig { interval: Duration::from_secs(1) })
            .unwrap();
    let acker = Acker::spawn(stage.queue.clone(), heartbeat.clone());
    let queues = vec![QueueName::new("reports").unwrap()];
    Scheduler::spawn(stage.queue.clone(), queues.clone(), shutdown.clone());
    Reaper::spawn(stage.queue.clone(), queues.clone(), shutdown.clone());
    let config = ClaimerConfig { queues, worker: id.clone(), batch: 16, slots: 16 };
    let (claimer, jobs) =
        Claimer::spawn(stage.queue.clone(), heartbeat, config, Gates::new(), shutdown.clone());
    let retries = Retries { base: Duration::from_millis(20), ..Retries::default() };
    let ledger = with(PlainLedger::new(stage.postgres.clone(), id));
    let worker = WorkerBuilder::new("reports")
        .backend(QueueBackend::new(claimer, jobs, acker.clone()))
        .layer(AckLayer::over(ledger, acker).retries(retries))
        .concurrency(8)
        .data(runs.clone())
        .build(handle);
    tokio::spawn(worker.run());
    (runs, shutdown.drop_guard())
}

#[tokio::test]
async fn plain_jobs_end_in_the_ledger_as_their_handlers_say() {
    let stage = Stage::new().await;
    let cancelled = stage.enqueue("cancelled", |_| ()).await;
    assert_eq!(stage.postgres.cancel(cancelled, None).await.unwrap(), Cancel::Cancelled);
    let fine = stage.enqueue("fine", |_| ()).await;
    let flaky = stage.enqueue("flaky", |_| ()).await;
    let busy = stage.enqueue("busy", |_| ()).await;
    let hopeless = stage.enqueue("hopeless", |_| ()).await;
    let patient = stage.enqueue("patient", |job| job.max_attempts = 1).await;
    let large = stage.enqueue("large", |_| ()).await;
    let slow = stage
        .enqueue("slow", |job| {
            job.timeout = Duration::from_millis(100);
            job.max_attempts = 2;
        })
        .await;
    let (runs, _worker) = worker(&stage);

    let job = stage.ended(fine).await;
    assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(json!({ "doubled": 40 }))));
    let job = stage.ended(flaky).await;
    assert_eq!((job.state.as_str(), job.attempts, job.last_error), ("succeeded", 2, None));
    let job = stage.ended(busy).await;
    assert_eq!((job.state.as_str(), job.attempts), ("succeeded", 1));
    let job = stage.ended(patient).await;
    assert_eq!((job.state.as_str(), job.attempts, job.deliveries), ("succeeded", 0, 3));
    for (id, attempts, reason) in [
        (hopeless, 1, "no such report"),
        (slow, 2, "no end within the job's timeout of 100ms"),
        (large, 1, "the result has 65537 bytes: at most 65536 are allowed (FLOTILLA_MAX_RESULT)"),
    ] {
        let job = stage.ended(id).await;
        assert_eq!((job.state.as_str(), job.attempts), ("dead", attempts));
        assert!(job.last_error.as_ref().unwrap().contains(reason), "{job:?}");
    }
    let letters: i64 = sqlx::query_scalar("SELECT count(*) FROM dead_letters WHERE state = 'open'")
        .fetch_one(stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(letters, 3);
    assert_eq!(stage.job(cancelled).await.state, "cancelled");
    assert!(!runs.0.lock().unwrap().contains_key(&cancelled), "a cancelled job ran");
    // Nothing of them stays in Redis.
    stage.drained().await;
}

#[tokio::test]
async fn a_handler_hears_of_a_cancel_and_decides_what_comes_of_it() {
    let stage = Stage::new().await;
    let mut ids = vec![];
    for kind in ["stops", "goes on", "puts off"] {
        ids.push(stage.enqueue(kind, |_| ()).await);
    }
    let (runs, _worker) = worker(&stage);
    let begun = Instant::now();
    while runs.0.lock().unwrap().len() < ids.len() {
        assert!(begun.elapsed() < DEADLINE, "they don't run");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for id in &ids {
        assert_eq!(stage.postgres.cancel(*id, None).await.unwrap(), Cancel::Requested);
    }
    for (id, state) in ids.into_iter().zip(["cancelled", "succeeded", "cancelled"]) {
        let job = stage.ended(id).await;
        assert_eq!((job.state.as_str(), job.attempts, job.deliveries), (state, 0, 1));
    }
}

#[tokio::test]
async fn protocol_14_a_cancel_that_meets_a_plain_job_which_is_put_off_is_not_slept_through() {
    let stage = Stage::new().await;
    let ids = [stage.enqueue("dozes", |_| ()).await, stage.enqueue("stumbles", |_| ()).await];
    let (runs, _worker) = worker(&stage);
    let begun = Instant::now();
    while runs.0.lock().unwrap().len() < ids.len() {
        assert!(begun.elapsed() < DEADLINE, "they don't run");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for id in ids {
        assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    }
    runs.1.add_permits(ids.len());
    for id in ids {
        assert_eq!(stage.ended(id).await.state, "cancelled");
        assert_eq!(runs.0.lock().unwrap()[&id], 1, "it ran again");
    }
}

#[tokio::test]
async fn an_outage_of_the_ledger_charges_no_plain_job() {
    let stage = Stage::new().await;
    let (_, _worker) = worker(&stage);
    stage.ended(stage.enqueue("fine", |_| ()).await).await;
    let mut jobs = Vec::new();
    for _ in 0..20 {
        jobs.push(stage.accept("fine", |_| ()).await.id);
    }
    let mut envelopes = Vec::new();
    for id in &jobs {
        envelopes.push(stage.postgres.envelope(*id).await.unwrap().unwrap());
    }
    stage.services.postgres().pause().await.unwrap();
    stage.queue.push(&envelopes).await.unwrap();
    // Longer than a call may take: every take has failed once by then.
    tokio::time::sleep(Duration::from_secs(8)).await;
    stage.services.postgres().resume().await.unwrap();
    for id in jobs {
        let job = stage.ended(id).await;
        assert_eq!((job.state.as_str(), job.attempts), ("succeeded", 0), "{job:?}");
    }
}

#[tokio::test]
async fn protocol_02_the_end_of_a_plain_job_is_refused_to_an_old_fence() {
    let stage = Stage::new().await;
    let job = stage.accept("fine", |_| ()).await;
    let (zombie, old) = stage.take(&job, "zombie:1").await;
    let (successor, new) = stage.take(&job, "successor:1").await;
    assert!(new.fence > old.fence);
    for end in [End::Succeeded(json!("zombie")), End::Cancelled, End::Released(Duration::ZERO)] {
        assert_eq!(zombie.end(job.id, &old, &end).await.unwrap(), Written::Refused, "{end:?}");
        assert_eq!(stage.job(job.id).await.state, "running");
    }
    let end = End::Succeeded(json!("successor"));
    assert_eq!(successor.end(job.id, &new, &end).await.unwrap(), Written::Kept);
    let late = zombie.end(job.id, &old, &End::Succeeded(json!("zombie"))).await.unwrap();
    assert_eq!(late, Written::Refused);
    assert_eq!(stage.job(job.id).await.result, Some(json!("successor")));
    // The answer was lost, so the call is made again: it says what stands.
    assert_ne!(successor.end(job.id, &new, &end).await.unwrap(), Written::Refused);
}

#[tokio::test]
async fn a_plain_job_without_a_result_has_none() {
    let stage = Stage::new().await;
    let job = stage.accept("fine", |_| ()).await;
    let (ledger, grant) = stage.take(&job, "worker:1").await;
    assert_eq!(grant.payload, json!({ "n": 20 }));
    assert_eq!(ledger.end(job.id, &grant, &End::Succeeded(Value::Null)).await.unwrap(), Written::Kept);
    assert_eq!(stage.job(job.id).await.result, None);
    let envelope = stage.postgres.envelope(job.id).await.unwrap();
    assert!(envelope.is_none(), "an ended job is not dispatched again");
    let gone = queue::Envelope::new("fine", job.queue.clone(), job.tenant.clone());
    let answer: Result<Take, LedgerError> = ledger.take(&gone, Duration::from_secs(5)).await;
    assert_eq!(answer, Ok(Take::Gone));
}

#[tokio::test]
async fn protocol_15_a_plain_job_that_nobody_can_read_waits_for_a_key_and_dies_in_time() {
    let stage = Stage::new().await;
    let keys = Keyring::parse(&format!("a:{}", new_key())).unwrap();
    let sealing = Stage { postgres: stage.postgres.clone().with_cipher(keys.into()), ..stage };
    let job = sealing.accept("fine", |_| ()).await;
    let envelope = sealing.postgres.envelope(job.id).await.unwrap().unwrap();
    let ledger = PlainLedger::new(stage.postgres.clone(), WorkerId::new("keyless:1"));
    for (seconds, taken) in [
        (0, Take::NotYet(Duration::from_secs(10))),
        (1800, Take::NotYet(Duration::from_secs(10))),
        (3600, Take::Dead),
    ] {
        let sql = "UPDATE jobs SET run_at = now(), unroutable_since = unroutable_since - make_interval(secs => $2) WHERE id = $1";
        let aged = sqlx::query(sql).bind(job.id.0).bind(f64::from(seconds));
        aged.execute(sealing.postgres.pool()).await.unwrap();
        assert_eq!(ledger.take(&envelope, Duration::from_secs(5)).await.unwrap(), taken, "{seconds} s");
    }
    assert_eq!(sealing.job(job.id).await.state, "dead");
    let letter = sealing.postgres.dead_letter(job.id.0).await.unwrap().unwrap();
    assert_eq!(letter.class, "unreadable_payload");
}

#[tokio::test]
async fn a_plain_job_that_dies_unread_counts_as_dead() {
    let stage = Stage::new().await;
    let keys = Keyring::parse(&format!("a:{}", new_key())).unwrap();
    let sealing = Stage { postgres: stage.postgres.clone().with_cipher(keys.into()), ..stage };
    let id = sealing.enqueue("fine", |_| ()).await;
    let keyless = Stage { postgres: stage.postgres, ..sealing };
    let (_, _worker) = worker_of(&keyless, |ledger| ledger.with_unroutable_after(Duration::ZERO));
    keyless.drained().await;
    assert_eq!(keyless.job(id).await.state, "dead");
    let (begun, name) = (Instant::now(), QueueName::new("reports").unwrap());
    Presence::spawn(keyless.queue.clone(), WorkerId::new("w"), vec![name.clone()], CancellationToken::new());
    loop {
        let hour = keyless.queue.rates(&name).await.unwrap().hour;
        if hour.ended > 0 {
            assert_eq!((hour.ended, hour.dead), (1, 1));
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "nothing was counted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_fast_job_that_a_newer_release_wrote_is_put_off_and_not_dropped() {
    let stage = Stage::new().await;
    let ledger = PlainLedger::new(stage.postgres.clone(), WorkerId::new("older:1"));
    let (queue, tenant) = (QueueName::new("reports").unwrap(), TenantId::new("acme").unwrap());
    let envelope = queue::Envelope {
        fast: Some(json!("of a newer release")),
        ..queue::Envelope::new("fine", queue, tenant)
    };
    let answer = ledger.take(&envelope, Duration::from_secs(5)).await;
    assert_eq!(answer, Ok(Take::NotYet(Duration::from_secs(60))));
}

#[tokio::test]
async fn a_job_whose_row_the_server_cannot_read_is_put_off_and_holds_up_no_other() {
    let stage = Stage::new().await;
    let (damaged, sound) = (stage.enqueue("fine", |_| ()).await, stage.enqueue("fine", |_| ()).await);
    for sql in [
        "CREATE FUNCTION damaged() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN RAISE EXCEPTION 'invalid page' USING ERRCODE = 'XX001'; END $$"
            .to_owned(),
        format!(
            "CREATE TRIGGER damaged BEFORE UPDATE ON jobs FOR EACH ROW WHEN (new.id = '{damaged}') EXECUTE FUNCTION damaged()"
        ),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(stage.postgres.pool()).await.unwrap();
    }
    let ledger = PlainLedger::new(stage.postgres.clone(), WorkerId::new("w:1"));
    let take = async |job| {
        let envelope = stage.postgres.envelope(job).await.unwrap().unwrap();
        ledger.take(&envelope, Duration::from_secs(5)).await.unwrap()
    };
    let (of_damaged, of_sound) = tokio::join!(take(damaged), take(sound));
    assert_eq!(of_damaged, Take::NotYet(Duration::from_secs(10)));
    assert!(matches!(of_sound, Take::Granted(_)), "{of_sound:?}");
}
