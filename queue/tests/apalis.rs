//! What apalis' users and its board expect of a backend: the roles in one call, a monitor over two workers, layers, the
//! listings, pushing by apalis' own sink, and the examples.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, Monitor, WorkerBuilder, WorkerContext},
};
use apalis_core::{
    backend::{FetchById, Filter, ListAllTasks, ListQueues, ListTasks, ListWorkers, Metrics, TaskSink},
    error::{AbortError, DeferredError, WorkerError},
    task::{
        attempt::Attempt,
        builder::TaskBuilder,
        metadata::{MetadataStore, TracingContext},
        status::Status,
        task_id::TaskId,
    },
};
use axum::{body::Body, http::Request};
use queue::ledger::{End, Grant, LedgerError, Take, Written};
use queue::{
    AckLayer, Acker, Board, Done, Envelope, Heartbeat, Job, JobId, Ledger, NoLedger, Presence, Queue,
    QueueConfig, QueueName, QueuePolicy, Roles, RolesConfig, TenantId, TraceContext, WorkerId,
};
use serde::{Deserialize, Serialize};
use support::{DEADLINE, Stage, eventually, job, jobs, name, worker};
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

#[allow(dead_code)] // its `main` reads the environment
#[path = "../examples/plain.rs"]
mod plain;

#[allow(dead_code)]
#[path = "../examples/board.rs"]
mod board;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Mail {
    to: String,
}

fn view(stage: &Stage) -> Board<Mail> {
    Board::new(stage.queue.clone(), name(), "mail", TenantId::new("acme").unwrap())
}

fn filter(status: Option<Status>, page: u32, size: u32) -> Filter {
    Filter { status, page, page_size: Some(size) }
}

fn quick(config: &mut QueueConfig) {
    config.lease = Duration::from_secs(2);
    config.safety_poll = Duration::from_millis(200);
}

#[derive(Clone, Default)]
struct Log {
    runs: Arc<Mutex<HashMap<JobId, u32>>>,
    now: Arc<Mutex<u32>>,
}

async fn handle(job: Job, log: Data<Log>) -> Result<(), BoxDynError> {
    let id = job.envelope.id;
    let run = {
        let mut runs = log.runs.lock().unwrap();
        let count = runs.entry(id).or_insert(0);
        *count += 1;
        *count
    };
    *log.now.lock().unwrap() += 1;
    match job.envelope.kind.as_str() {
        "panic" if run < 2 => panic!("a handler's bug"),
        // Longer than the timeout layer allows, the first time.
        "slow" if run < 2 => sleep(Duration::from_secs(30)).await,
        "bad" => {
            *log.now.lock().unwrap() -= 1;
            return Err(AbortError::new(std::io::Error::other("can never work")).into());
        }
        "long" => sleep(Duration::from_millis(300)).await,
        _ => {}
    }
    *log.now.lock().unwrap() -= 1;
    Ok(())
}

fn config(slots: usize, who: &str) -> RolesConfig {
    RolesConfig {
        slots,
        worker: WorkerId::new(who),
        heartbeat: queue::HeartbeatConfig { interval: Duration::from_millis(500) },
        ..RolesConfig::new(vec![name()])
    }
}

#[tokio::test]
async fn a_monitor_runs_two_workers_through_panics_and_timeouts_and_stops_without_losing_a_job() {
    let stage = Stage::with(quick).await;
    let (log, shutdown) = (Log::default(), CancellationToken::new());
    let (one, first) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let (two, second) = Roles::spawn(&stage.queue, config(8, "two"), &shutdown).unwrap();
    let (first, second) = (Mutex::new(Some(first)), Mutex::new(Some(second)));
    let (acks, more_acks) = (one.acks(Duration::from_millis(50)), two.acks(Duration::from_millis(50)));
    let (data, more_data) = (log.clone(), log.clone());
    // A backend can't be made twice: workers that a monitor starts again take new roles.
    let monitor = Monitor::new()
        .register(move |_| {
            WorkerBuilder::new("one")
                .backend(first.lock().unwrap().take().expect("not started again"))
                .catch_panic()
                .layer(acks.clone())
                .timeout(Duration::from_millis(900))
                .concurrency(4)
                .data(data.clone())
                .build(handle)
        })
        .register(move |_| {
            WorkerBuilder::new("two")
                .backend(second.lock().unwrap().take().expect("not started again"))
                .catch_panic()
                .layer(more_acks.clone())
                .timeout(Duration::from_millis(900))
                .concurrency(4)
                .data(more_data.clone())
                .build(handle)
        });
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(monitor.run_with_signal(async move {
        stopped.await.ok();
        Ok(())
    }));

    let mut all = jobs(100);
    all.extend(
        ["panic", "slow", "bad", "bad"].map(|kind| Envelope { kind: kind.to_owned(), ..job("acme", 9) }),
    );
    stage.queue.push(&all).await.unwrap();
    let drained = async || {
        let stats = stage.queue.stats(&name()).await.unwrap();
        (stats.depth() + stats.scheduled + stats.in_flight == 0).then_some(())
    };
    let state = async || {
        let runs = log.runs.lock().unwrap().len();
        format!("{runs} ran; {:?}", stage.queue.stats(&name()).await)
    };
    eventually(Duration::from_secs(30), drained, state).await;
    for envelope in &all {
        let expected = if matches!(envelope.kind.as_str(), "panic" | "slow") { 2 } else { 1 };
        assert_eq!(log.runs.lock().unwrap()[&envelope.id], expected, "{}", envelope.kind);
    }

    // Stopped in the middle of long jobs.
    let long: Vec<Envelope> =
        (0..40).map(|_| Envelope { kind: "long".to_owned(), ..job("acme", 5) }).collect();
    stage.queue.push(&long).await.unwrap();
    let ran = || long.iter().filter(|job| log.runs.lock().unwrap().contains_key(&job.id)).count();
    eventually(
        Duration::from_secs(5),
        async || (ran() >= 8).then_some(()),
        async || format!("{} ran", ran()),
    )
    .await;
    stop.send(()).unwrap();
    timeout(Duration::from_secs(15), running).await.expect("the monitor doesn't stop").unwrap().unwrap();
    one.join().await;
    two.join().await;
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth() as usize, stats.in_flight), (40 - ran(), 0), "what didn't run waits again");
    assert!(stage.queue.workers().await.unwrap().is_empty(), "workers that stopped are still listed");
    let hour = stage.queue.rates(&name()).await.unwrap().hour;
    assert_eq!(
        (hour.ended, hour.dead),
        (all.len() as u64 + 40 - stats.depth(), 2),
        "who stops tells the rest"
    );
}

/// Every lease of the stage runs out, as if its workers had died.
async fn lose_all(queue: Queue) {
    queue.at(i64::MAX / 4096).reap(&name()).await.unwrap();
}

#[tokio::test]
async fn rule_13_without_a_ledger_a_job_that_never_ran_is_not_dropped_as_poison() {
    let stage = Stage::with(quick).await;
    let poison = Envelope { kind: "poison".to_owned(), ..job("acme", 9) };
    let innocents = jobs(20);
    stage.queue.push(std::slice::from_ref(&poison)).await.unwrap();
    stage.queue.push(&innocents).await.unwrap();
    for _ in 0..3 {
        assert_eq!(stage.claim(100).await.len(), 21);
        lose_all(stage.queue.clone()).await;
    }

    let (runs, shutdown) = (Log::default().runs, CancellationToken::new());
    let (roles, backend) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let (log, queue) = (runs.clone(), stage.queue.clone());
    let worker = WorkerBuilder::new("one")
        .backend(backend)
        .layer(roles.acks(Duration::from_millis(50)))
        .concurrency(4)
        .build(move |job: Job| {
            let (log, queue) = (log.clone(), queue.clone());
            async move {
                *log.lock().unwrap().entry(job.envelope.id).or_insert(0) += 1;
                if job.envelope.kind == "poison" {
                    lose_all(queue).await;
                }
                Ok::<(), BoxDynError>(())
            }
        });
    let running = tokio::spawn(worker.run());
    let drained = async || {
        let stats = stage.queue.stats(&name()).await.unwrap();
        (stats.depth() + stats.scheduled + stats.in_flight == 0).then_some(())
    };
    eventually(DEADLINE, drained, async || format!("{:?}", stage.queue.stats(&name()).await)).await;
    assert_eq!(runs.lock().unwrap()[&poison.id], 3, "as often as the limit says");
    let ran = innocents.iter().filter(|job| runs.lock().unwrap().contains_key(&job.id)).count();
    assert_eq!(ran, innocents.len(), "innocents were dropped with it");
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;
}

/// A job whose next delivery runs alone, by the name of its kind: two of its leases were lost.
async fn lost_twice(stage: &Stage) -> Envelope {
    let lone = Envelope { kind: "lone".to_owned(), ..job("acme", 5) };
    stage.queue.push(std::slice::from_ref(&lone)).await.unwrap();
    for _ in 0..2 {
        assert_eq!(stage.claim(1).await.len(), 1);
        lose_all(stage.queue.clone()).await;
    }
    lone
}

#[tokio::test]
async fn rule_13_what_waits_for_a_job_that_runs_alone_is_finished_when_the_worker_stops() {
    let stage = Stage::with(quick).await;
    let lone = lost_twice(&stage).await;
    let (first, last) = (job("acme", 9), job("acme", 1));
    stage.queue.push(&[first.clone(), last.clone()]).await.unwrap();
    let (runs, go, shutdown) = (Log::default().runs, Arc::new(Semaphore::new(0)), CancellationToken::new());
    let (roles, backend) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let (log, wait) = (runs.clone(), go.clone());
    let apalis = WorkerBuilder::new("one")
        .backend(backend)
        .layer(roles.acks(Duration::from_millis(50)))
        .concurrency(4)
        .build(move |job: Job, worker: WorkerContext| {
            let (log, wait) = (log.clone(), wait.clone());
            async move {
                *log.lock().unwrap().entry(job.envelope.id).or_insert(0) += 1;
                if job.envelope.id == first.id {
                    wait.acquire().await?.forget();
                    worker.stop()?;
                }
                Ok::<(), BoxDynError>(())
            }
        });
    let running = tokio::spawn(apalis.run());
    let all_wait = async || (stage.queue.stats(&name()).await.unwrap().in_flight == 3).then_some(());
    eventually(DEADLINE, all_wait, async || format!("{:?}", stage.queue.stats(&name()).await)).await;
    go.add_permits(1);
    timeout(DEADLINE, running).await.expect("the worker doesn't stop").unwrap().unwrap();
    let expected = HashMap::from([(first.id, 1), (lone.id, 1), (last.id, 1)]);
    assert_eq!(*runs.lock().unwrap(), expected);
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth() + stats.scheduled, stats.in_flight), (0, 0));
    roles.join().await;
}

/// What ran, each with the failures that its envelope knew of.
type Runs = Arc<Mutex<Vec<(JobId, u32)>>>;

/// A worker of four jobs at a time, of which `first` waits until it may go on.
fn held_up_by(
    first: JobId,
    backend: queue::QueueBackend,
    acks: queue::AckLayer,
) -> (JoinHandle<Result<(), WorkerError>>, Runs, Arc<Semaphore>) {
    let (runs, go) = (Runs::default(), Arc::new(Semaphore::new(0)));
    let (log, wait) = (runs.clone(), go.clone());
    let apalis =
        WorkerBuilder::new("one").backend(backend).layer(acks).concurrency(4).build(move |job: Job| {
            let (log, wait) = (log.clone(), wait.clone());
            async move {
                log.lock().unwrap().push((job.envelope.id, job.envelope.attempts));
                if job.envelope.id == first {
                    wait.acquire().await?.forget();
                }
                Ok::<(), BoxDynError>(())
            }
        });
    (tokio::spawn(apalis.run()), runs, go)
}

#[tokio::test]
async fn a_job_that_has_to_run_alone_is_put_off_when_another_does_not_end() {
    let stage = Stage::with(quick).await;
    let lone = lost_twice(&stage).await;
    let (first, innocents) = (job("acme", 9), jobs(10));
    stage.queue.push(std::slice::from_ref(&first)).await.unwrap();
    stage.queue.push(&innocents).await.unwrap();
    let shutdown = CancellationToken::new();
    let (roles, backend) = Roles::spawn(&stage.queue, config(16, "one"), &shutdown).unwrap();
    let (running, runs, go) = held_up_by(first.id, backend, roles.acks(Duration::from_millis(50)));
    let ran = |id: JobId| runs.lock().unwrap().iter().filter(|(run, _)| *run == id).count();
    let others = async || innocents.iter().all(|job| ran(job.id) == 1).then_some(());
    eventually(DEADLINE, others, async || format!("{} ran", runs.lock().unwrap().len())).await;
    assert_eq!(ran(lone.id), 0, "it ran beside another");
    go.add_permits(1);
    let alone = async || (ran(lone.id) == 1).then_some(());
    eventually(DEADLINE, alone, async || format!("{:?}", stage.queue.stats(&name()).await)).await;
    assert!(runs.lock().unwrap().contains(&(lone.id, 0)), "it was charged");
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;
}

#[tokio::test]
async fn a_job_that_waits_to_run_alone_lets_the_others_in_when_its_lease_is_lost() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(120)).await;
    let lone = lost_twice(&stage).await;
    let (first, innocents) = (job("acme", 9), jobs(10));
    stage.queue.push(std::slice::from_ref(&first)).await.unwrap();
    stage.queue.push(&innocents).await.unwrap();
    let shutdown = CancellationToken::new();
    let (roles, backend) = Roles::spawn(&stage.queue, config(16, "one"), &shutdown).unwrap();
    let (running, runs, go) = held_up_by(first.id, backend, roles.acks(Duration::from_millis(50)));
    let claimed = async || (stage.queue.stats(&name()).await.unwrap().in_flight == 12).then_some(());
    eventually(DEADLINE, claimed, async || format!("{:?}", stage.queue.stats(&name()).await)).await;
    // Somebody else ended it.
    let (mut raw, key) = (stage.raw().await, format!("{{{}:ingest:0}}", stage.config.prefix));
    for (command, part) in [("HDEL", "j"), ("HDEL", "x"), ("ZREM", "l")] {
        let mut gone = redis::cmd(command);
        gone.arg(format!("{key}:{part}")).arg(lone.id.to_string()).exec_async(&mut raw).await.unwrap();
    }
    let others = async || (runs.lock().unwrap().len() == 11).then_some(());
    eventually(DEADLINE, others, async || format!("{} ran", runs.lock().unwrap().len())).await;
    assert!(!runs.lock().unwrap().contains(&(lone.id, 0)), "it ran without a lease");
    go.add_permits(1);
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;
}

/// A ledger that remembers how long a take may last, and knows of three failures of each job.
#[derive(Debug, Clone, Default)]
struct Timed(Arc<Mutex<Vec<Duration>>>);

impl Ledger for Timed {
    const COUNTS: bool = false;

    async fn take(&self, envelope: &Envelope, within: Duration) -> Result<Take, LedgerError> {
        self.0.lock().unwrap().push(within);
        let taken = NoLedger.take(envelope, within).await?;
        let Take::Granted(grant) = taken else { return Ok(taken) };
        Ok(Take::Granted(Grant { attempts: 3, ..grant }))
    }

    async fn alone(&self, job: JobId, grant: &Grant) -> Result<bool, LedgerError> {
        NoLedger.alone(job, grant).await
    }

    async fn wanted_to_end(&self, jobs: &[JobId]) -> Result<Vec<JobId>, LedgerError> {
        NoLedger.wanted_to_end(jobs).await
    }

    async fn end(&self, job: JobId, grant: &Grant, end: &End) -> Result<Written, LedgerError> {
        NoLedger.end(job, grant, end).await
    }
}

#[tokio::test]
async fn a_short_lease_leaves_time_for_the_ledger_which_says_how_often_a_job_failed() {
    let stage = Stage::with(quick).await;
    stage.queue.push(&jobs(5)).await.unwrap();
    let (ledger, shutdown) = (Timed::default(), CancellationToken::new());
    let (roles, backend) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let apalis = WorkerBuilder::new("one")
        .backend(backend)
        .layer(AckLayer::over(ledger.clone(), roles.acker.clone()))
        .build(async |_: Job, attempt: Attempt| {
            assert_eq!(attempt.current(), 4);
            Ok::<(), BoxDynError>(())
        });
    let running = tokio::spawn(apalis.run());
    let taken = async || (ledger.0.lock().unwrap().len() == 5).then_some(());
    eventually(DEADLINE, taken, async || format!("{ledger:?}")).await;
    let least = *ledger.0.lock().unwrap().iter().min().unwrap();
    assert!(least >= stage.config.lease / 5, "{ledger:?}");
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;
}

/// A ledger that falls silent at the first end of a job, and at the first word that one runs alone.
#[derive(Debug, Clone, Default)]
struct Silent {
    ends: Arc<AtomicU32>,
    alone: Arc<AtomicU32>,
}

/// The first call never returns.
async fn silent_at_first(calls: &AtomicU32) {
    if calls.fetch_add(1, Ordering::SeqCst) == 0 {
        std::future::pending::<()>().await;
    }
}

impl Ledger for Silent {
    async fn take(&self, envelope: &Envelope, within: Duration) -> Result<Take, LedgerError> {
        NoLedger.take(envelope, within).await
    }

    async fn alone(&self, job: JobId, grant: &Grant) -> Result<bool, LedgerError> {
        silent_at_first(&self.alone).await;
        NoLedger.alone(job, grant).await
    }

    async fn wanted_to_end(&self, jobs: &[JobId]) -> Result<Vec<JobId>, LedgerError> {
        NoLedger.wanted_to_end(jobs).await
    }

    async fn end(&self, job: JobId, grant: &Grant, end: &End) -> Result<Written, LedgerError> {
        silent_at_first(&self.ends).await;
        NoLedger.end(job, grant, end).await
    }
}

#[tokio::test]
async fn protocol_16_a_ledger_that_falls_silent_is_asked_again() {
    let stage = Stage::with(quick).await;
    lost_twice(&stage).await;
    let (ledger, shutdown) = (Silent::default(), CancellationToken::new());
    let (roles, backend) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let apalis = WorkerBuilder::new("one")
        .backend(backend)
        .layer(AckLayer::over(ledger.clone(), roles.acker.clone()))
        .build(async |_: Job| Ok::<(), BoxDynError>(()));
    let running = tokio::spawn(apalis.run());
    let gone = async || (stage.queue.stats(&name()).await.unwrap().in_flight == 0).then_some(());
    let ended = async || (ledger.ends.load(Ordering::SeqCst) == 2).then_some(());
    eventually(DEADLINE, ended, async || format!("{ledger:?}")).await;
    eventually(DEADLINE, gone, async || format!("{:?}", stage.queue.stats(&name()).await)).await;
    assert_eq!(ledger.alone.load(Ordering::SeqCst), 2);
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 0);
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;
}

/// Fails once, defers itself once, and succeeds. Logs the attempts that apalis counts and those that the envelope does.
async fn defer(job: Job, attempt: Attempt, id: TaskId, log: Data<Attempts>) -> Result<(), BoxDynError> {
    let run = {
        let mut log = log.0.0.lock().unwrap();
        log.push((attempt.current(), job.envelope.attempts, id.to_string()));
        log.len()
    };
    match run {
        1 => Err("not yet".into()),
        2 => Err(DeferredError::new("at once").into()),
        _ => Ok(()),
    }
}

#[derive(Clone, Default)]
struct Attempts(Arc<Mutex<Vec<(usize, u32, String)>>>);

#[tokio::test]
async fn apalis_attempts_count_failures_and_a_deferred_job_is_not_charged() {
    let stage = Stage::with(quick).await;
    let one = job("acme", 5);
    stage.queue.push(std::slice::from_ref(&one)).await.unwrap();
    let (log, shutdown) = (Attempts::default(), CancellationToken::new());
    let (roles, backend) = Roles::spawn(&stage.queue, config(8, "one"), &shutdown).unwrap();
    let apalis = WorkerBuilder::new("one")
        .backend(backend)
        .layer(roles.acks(Duration::from_millis(50)))
        .data(log.clone())
        .build(defer);
    let running = tokio::spawn(apalis.run());
    let thrice = async || (log.0.lock().unwrap().len() == 3).then_some(());
    eventually(DEADLINE, thrice, async || format!("{:?}", log.0.lock().unwrap())).await;
    let runs = log.0.lock().unwrap().clone();
    let counted: Vec<_> = runs.iter().map(|(attempt, charged, _)| (*attempt, *charged)).collect();
    assert_eq!(counted, [(1, 0), (2, 1), (2, 1)]);
    shutdown.cancel();
    running.await.unwrap().unwrap();
    roles.join().await;

    // The board knows the job by the id that its handler saw.
    stage.queue.push(std::slice::from_ref(&one)).await.unwrap();
    let seen = TaskId::from_string(runs[0].2.clone());
    assert_ne!(runs[0].2, one.id.to_string());
    let found = view(&stage).fetch_by_id(&seen).await.unwrap().expect("the board doesn't know it");
    assert_eq!(found.ctx().task_id().unwrap().to_string(), one.id.to_string());
}

#[tokio::test]
async fn the_board_lists_queues_tasks_and_workers() {
    let stage = Stage::new().await;
    let (now, mut board) = (chrono::Utc::now().timestamp_millis(), view(&stage));
    let mut all: Vec<Envelope> = (0..30)
        .map(|number| Envelope {
            fast: Some(serde_json::json!({ "to": format!("user{number}") })),
            ..job(if number % 2 == 0 { "even" } else { "odd" }, number % 10)
        })
        .collect();
    all.push(Envelope { run_at_ms: Some(now + 3_600_000), ..all[0].clone() });
    all[30].id = JobId::new();
    stage.queue.push(&all).await.unwrap();
    let other = QueueName::new("other").unwrap();
    stage.queue.push(&[Envelope { queue: other.clone(), ..job("acme", 1) }]).await.unwrap();
    let leased = stage.claim(5).await;

    // Pages cover every job once, the highest priority first.
    let mut seen = Vec::new();
    for page in 1..=4 {
        seen.extend(board.list_tasks(&filter(Some(Status::Pending), page, 7)).await.unwrap());
    }
    let priorities: Vec<_> = seen[..25].iter().map(|task| task.ctx().priority().unwrap()).collect();
    assert!(priorities.is_sorted_by(|a, b| a >= b), "{priorities:?}");
    let mut ids: Vec<String> = seen.iter().map(|task| task.ctx().task_id().unwrap().to_string()).collect();
    ids.sort();
    let held: Vec<JobId> = support::ids(&leased);
    let mut expected: Vec<String> =
        all.iter().map(|job| job.id).filter(|id| !held.contains(id)).map(|id| id.to_string()).collect();
    expected.sort();
    assert_eq!(ids, expected);
    let running = board.list_tasks(&filter(Some(Status::Running), 1, 50)).await.unwrap();
    assert_eq!(running.len(), 5);
    assert_eq!(running[0].ctx().lock_by(), Some(worker().as_str()));
    assert!(board.list_tasks(&filter(Some(Status::Done), 1, 50)).await.unwrap().is_empty());
    assert_eq!(board.list_tasks(&filter(None, 1, 100)).await.unwrap().len(), 31);
    assert_eq!(board.list_all_tasks(&filter(None, 1, 100)).await.unwrap().len(), 32);
    let mut seen = Vec::new();
    for page in 1..=5 {
        let tasks = board.list_all_tasks(&filter(None, page, 10)).await.unwrap();
        assert!(tasks.len() == 10 || page >= 4, "page {page} has {}", tasks.len());
        seen.extend(tasks.iter().map(|task| task.ctx().task_id().unwrap().to_string()));
    }
    let distinct: HashSet<&String> = seen.iter().collect();
    assert_eq!((seen.len(), distinct.len()), (32, 32), "the pages of all queues have every job once");

    let found = board.fetch_by_id(&TaskId::from_string(all[3].id.to_string())).await.unwrap().unwrap();
    assert_eq!(found.args, serde_json::json!({ "to": "user3" }));
    assert!(board.fetch_by_id(&TaskId::from_string("unknown")).await.unwrap().is_none());

    let queues = board.list_queues().await.unwrap();
    assert_eq!(queues.iter().map(|queue| queue.name.as_str()).collect::<Vec<_>>(), ["ingest", "other"]);
    let value = |stats: &[apalis_core::backend::Statistic], title: &str| {
        stats.iter().find(|stat| stat.title == title).map(|stat| stat.value.clone())
    };
    let stats = board.fetch_by_queue().await.unwrap();
    assert_eq!(value(&stats, "Waiting").as_deref(), Some("25"));
    assert_eq!(value(&stats, "Running").as_deref(), Some("5"));
    assert_eq!(value(&stats, "Scheduled").as_deref(), Some("1"));
    assert_eq!(value(&board.global().await.unwrap(), "Waiting").as_deref(), Some("26"));
}

/// Ends so many jobs at a time, the first `dead` of them badly, and lets the worker's presence tell it.
async fn end(stage: &Stage, at_ms: i64, count: usize, dead: usize) {
    let queue = stage.queue.at(at_ms);
    let heartbeat = Heartbeat::spawn(stage.config.clone(), queue::HeartbeatConfig::default()).unwrap();
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    queue.push(&jobs(count)).await.unwrap();
    let claims = queue.claim(&name(), &worker(), count).await.unwrap();
    assert_eq!(claims.len(), count);
    for (number, claim) in claims.iter().enumerate() {
        let lease = heartbeat.register(claim);
        if number < dead {
            lease.note_dead();
        }
        acker.done(&lease, Done::Ack).await;
    }
    acker.flush().await;
    let shutdown = CancellationToken::new();
    let presence = Presence::spawn(queue, worker(), vec![name()], shutdown.clone());
    shutdown.cancel();
    presence.await.unwrap();
}

#[tokio::test]
async fn the_board_says_how_fast_a_queue_is_worked_off() {
    let stage = Stage::new().await;
    let board = view(&stage);
    // Noon, so that no day ends meanwhile.
    let noon = 20_000 * 86_400_000 + 43_200_000;
    let rates = async |later_s: i64| {
        let rates = stage.queue.at(noon + later_s * 1000).rates(&name()).await.unwrap();
        ((rates.minute.ended, rates.minute.dead), (rates.hour.ended, rates.hour.dead), rates.days)
    };
    assert_eq!(rates(0).await, ((0, 0), (0, 0), [0; 7]));
    end(&stage, noon, 10, 1).await;
    end(&stage, noon + 3000, 5, 0).await;
    end(&stage, noon + 30_000, 20, 2).await;
    assert_eq!(rates(31).await, ((35, 3), (35, 3), [0, 0, 0, 0, 0, 0, 35]));
    let minute = stage.queue.at(noon + 35_000).rates(&name()).await.unwrap().minute;
    assert!((minute.per_second() - 35.0 / 55.0).abs() < 1e-9, "{minute:?}");
    assert!(minute.fine().is_some_and(|fine| (fine - 32.0 / 35.0).abs() < 1e-9));
    assert_eq!(
        rates(75).await,
        ((20, 2), (35, 3), [0, 0, 0, 0, 0, 0, 35]),
        "the first are older than a minute"
    );
    assert_eq!(rates(3610).await.1, (20, 2), "and older than an hour");
    // The ring has come round: the same slots, at another time.
    end(&stage, noon + 3610 * 1000, 4, 0).await;
    assert_eq!(rates(3615).await, ((4, 0), (24, 2), [0, 0, 0, 0, 0, 0, 39]));
    end(&stage, noon + 6 * 86_400_000, 7, 7).await;
    assert_eq!(rates(6 * 86_400).await, ((7, 7), (7, 7), [39, 0, 0, 0, 0, 0, 7]));
    end(&stage, noon + 7 * 86_400_000, 1, 0).await;
    assert_eq!(rates(7 * 86_400).await.2, [0, 0, 0, 0, 0, 7, 1], "a week ago is over");

    let now = chrono::Utc::now().timestamp_millis();
    end(&stage, now, 50, 25).await;
    let value = |stats: &[apalis_core::backend::Statistic], title: &str| {
        stats.iter().find(|stat| stat.title == title).map(|stat| stat.value.clone())
    };
    for stats in [board.fetch_by_queue().await.unwrap(), board.global().await.unwrap()] {
        assert_eq!(value(&stats, "Ended in the last hour").as_deref(), Some("50"));
        assert_eq!(value(&stats, "Dead in the last hour").as_deref(), Some("25"));
        assert_eq!(value(&stats, "Not dead in the last hour").as_deref(), Some("50.00"));
        let rate: f64 = value(&stats, "Ended per second, last minute").unwrap().parse().unwrap();
        assert!((0.8..=1.0).contains(&rate), "{rate}");
    }
    assert_eq!(board.list_queues().await.unwrap()[0].activity.iter().sum::<usize>(), 50);

    // A queue of which nothing is heard for long is forgotten with its counts.
    let late = stage.queue.at(now + 8 * 86_400_000);
    late.register(None, &[QueueName::new("other").unwrap()]).await.unwrap();
    assert_eq!(late.rates(&name()).await.unwrap().days, [0; 7]);
    let keys: u64 = redis::cmd("EXISTS")
        .arg(format!("{{{}:registry}}:n:ingest", stage.config.prefix))
        .query_async(&mut stage.raw().await)
        .await
        .unwrap();
    assert_eq!(keys, 0);
}

#[tokio::test]
async fn workers_are_listed_while_they_are_heard_of() {
    let stage = Stage::new().await;
    let (board, shutdown) = (view(&stage), CancellationToken::new());
    let (roles, _backend) = Roles::spawn(
        &stage.queue,
        RolesConfig { heartbeat: queue::HeartbeatConfig::default(), ..config(1, "here") },
        &shutdown,
    )
    .unwrap();
    let listed = eventually(
        Duration::from_secs(5),
        async || Some(board.list_workers().await.unwrap()).filter(|workers| !workers.is_empty()),
        async || "no worker is listed".to_owned(),
    )
    .await;
    assert_eq!((listed[0].id.as_str(), listed[0].queue.as_str()), ("here", "ingest"));
    assert_eq!(board.list_queues().await.unwrap()[0].workers, ["here"]);
    assert_eq!(board.list_all_workers().await.unwrap().len(), 1);
    // Silence, seen from a later time.
    let later = stage.queue.at(chrono::Utc::now().timestamp_millis() + 61_000);
    assert!(later.workers().await.unwrap().is_empty());
    later.register(None, &[name()]).await.unwrap();
    assert!(stage.queue.workers().await.unwrap().is_empty(), "who is silent is forgotten");
    roles.join().await;
}

#[tokio::test]
async fn the_registry_stays_small() {
    let stage = Stage::new().await;
    let start = chrono::Utc::now().timestamp_millis();
    for number in 0..1100_i64 {
        let living = queue::LivingWorker {
            worker: WorkerId::new(format!("w{number}")),
            queues: vec![name()],
            started_at_ms: start,
            last_seen_ms: 0,
        };
        stage.queue.at(start + number % 7).register(Some(&living), &[name()]).await.unwrap();
    }
    let mut raw = stage.raw().await;
    for (command, key) in [("ZCARD", "w"), ("HLEN", "i")] {
        let count: u64 = redis::cmd(command)
            .arg(format!("{{{}:registry}}:{key}", stage.config.prefix))
            .query_async(&mut raw)
            .await
            .unwrap();
        assert_eq!(count, 1000, "{key}");
    }
}

#[tokio::test]
async fn apalis_own_sink_pushes_jobs() {
    let stage = Stage::new().await;
    let mut board = view(&stage);
    board.push(Mail { to: "one".to_owned() }).await.unwrap();
    board.push_bulk((0..1200).map(|n| Mail { to: n.to_string() }).collect()).await.unwrap();
    let id = JobId::new();
    let task = TaskBuilder::new(Mail { to: "urgent".to_owned() })
        .task_id(TaskId::from_string(id.to_string()))
        .priority(9)
        .build();
    board.push_task(task).await.unwrap();
    let later = TaskBuilder::new(Mail { to: "later".to_owned() }).run_in_hours(1).build();
    board.push_task(later).await.unwrap();
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth(), stats.scheduled), (1202, 1));
    let first = &stage.claim(1).await[0].envelope;
    assert_eq!((first.id, first.kind.as_str()), (id, "mail"));
    assert_eq!(first.fast, Some(serde_json::json!({ "to": "urgent" })));
}

#[tokio::test]
async fn apalis_own_sink_keeps_a_tasks_trace_and_refuses_what_it_cannot_keep() {
    let stage = Stage::new().await;
    let mut board = view(&stage);
    let mail = || TaskBuilder::new(Mail { to: "one".to_owned() });
    for (task, words) in [
        (mail().idempotency_key("k1"), "idempotency key \"k1\": give it a UUID as its id"),
        (mail().max_attempts(3), "limit of 3 attempts: a worker's limit holds"),
        (mail().task_id(TaskId::from_string("seven")), "id \"seven\": a job's id is a UUID"),
    ] {
        let error = board.push_task(task.build()).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 0);

    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let apalis = TracingContext::new().with_trace_id(trace).with_span_id(span).with_trace_flags(1);
    board.push_task(mail().metadata(&apalis.with_trace_state("a=b")).build()).await.unwrap();
    let mut headers = MetadataStore::new();
    headers.insert("traceparent", format!("00-{trace}-{span}-01")).unwrap();
    headers.insert("tracestate", "a=b").unwrap();
    board.push_task(mail().with_metadata(headers).build()).await.unwrap();
    board.push_task(mail().build()).await.unwrap();
    let claims = stage.claim(3).await;
    let traces: Vec<_> = claims.iter().map(|claim| claim.envelope.trace.clone()).collect();
    let kept =
        TraceContext { traceparent: format!("00-{trace}-{span}-01"), tracestate: Some("a=b".to_owned()) };
    assert_eq!(traces, [Some(kept.clone()), Some(kept), None]);
}

#[tokio::test]
async fn apalis_own_sink_forgets_the_tasks_of_a_push_that_failed() {
    let stage = Stage::new().await;
    let mut board = view(&stage);
    let mail = || TaskBuilder::new(Mail { to: "one".to_owned() });
    let tasks = [mail().build(), mail().idempotency_key("k1").build()];
    board.push_all(futures::stream::iter(tasks)).await.unwrap_err();
    board.push_all(futures::stream::iter([mail().build()])).await.unwrap();
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 1);
}

#[tokio::test]
async fn apalis_own_sink_says_when_jobs_were_not_stored() {
    let stage = Stage::new().await;
    let mut board = view(&stage);
    let mail = |n: i32| Mail { to: n.to_string() };
    let policy = QueuePolicy { max_depth: Some(2), ..QueuePolicy::default() };
    stage.queue.set_policy(&name(), &policy, 1).await.unwrap();
    let error = board.push_bulk((0..5).map(mail).collect()).await.unwrap_err();
    assert!(error.to_string().contains("3 of 5 jobs were not stored"), "{error}");
    stage
        .queue
        .set_policy(&name(), &QueuePolicy { draining: true, ..QueuePolicy::default() }, 2)
        .await
        .unwrap();
    let error = board.push(mail(6)).await.unwrap_err();
    assert!(error.to_string().contains("it is drained"), "{error}");
    stage.queue.set_policy(&name(), &QueuePolicy::default(), 3).await.unwrap();
    board.push(mail(7)).await.unwrap();
    assert_eq!(stage.queue.stats(&name()).await.unwrap().depth(), 3);
}

#[tokio::test]
async fn the_board_speaks_apalis_http_interface() {
    let stage = Stage::new().await;
    let routes = board::routes(stage.queue.clone()).unwrap();
    let ask = async |request: Request<Body>| -> serde_json::Value {
        let path = request.uri().clone();
        let answer = routes.clone().oneshot(request).await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    };
    let get =
        async |path: &str| ask(Request::get(format!("/api/v1{path}")).body(Body::empty()).unwrap()).await;
    let task = Request::put("/api/v1/queues/mails/tasks")
        .header("x-task-priority", "7")
        .header("content-type", "application/json")
        .body(Body::from(r#"{ "to": "board" }"#))
        .unwrap();
    ask(task).await;
    let tasks = get("/queues/mails/tasks?status=Pending").await;
    assert_eq!(tasks[0]["args"], serde_json::json!({ "to": "board" }), "{tasks}");
    let id = tasks[0]["ctx"]["task_id"].as_str().unwrap_or_else(|| panic!("{tasks}"));
    assert_eq!(get(&format!("/queues/mails/tasks/{id}")).await["args"]["to"], "board");
    assert_eq!(get("/queues").await[0]["name"], "mails");
    assert_eq!(get("/queues/mails/stats").await[0]["value"], "1");
    assert_eq!(get("/overview").await[0]["value"], "1");
    assert_eq!(get("/workers").await, serde_json::json!([]));
    assert_eq!(get("/queues/mails/workers").await, serde_json::json!([]));
    assert_eq!(get("/tasks").await.as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn the_plain_example_works() {
    let stage = Stage::new().await;
    timeout(Duration::from_secs(30), plain::run(stage.config.clone()))
        .await
        .expect("it doesn't end")
        .unwrap();
    let stats = stage.queue.stats(&QueueName::new("mails").unwrap()).await.unwrap();
    assert_eq!((stats.depth(), stats.in_flight), (0, 0));
}
