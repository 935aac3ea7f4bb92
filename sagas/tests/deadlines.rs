//! A run's end reaches into the call that its step is waiting for: the lease, the job's time, a cancel, a stop.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use devstack::testing::TestServices;
use queue::{Heartbeat, HeartbeatConfig, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    Dependency, StepError,
    coalescing::Batch,
    engine::{
        Breakers, CallLimits, Delivery, Ended, Engine, EngineSettings, Registry, RunToken, Saga, Step,
        StepContext,
    },
    stores::postgres::{
        Postgres, PostgresConfig,
        accept::NewJob,
        inspect::JobView,
        take::{Take, TakeBatch, TakeItem, TakenJob},
    },
};
use serde_json::{Value, json};
use tokio::{sync::Notify, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

const KIND: &str = "hanging";
const LEASE: Duration = Duration::from_secs(8);
const MARGIN: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

/// What the step's call, which never answers, was given and what became of it.
#[derive(Default)]
struct Seen {
    entered: Notify,
    deadline: Mutex<Option<Duration>>,
    dropped: AtomicBool,
    token: Mutex<Option<RunToken>>,
}

struct Hanging {
    name: &'static str,
    seen: Arc<Seen>,
}

struct Dropped(Arc<Seen>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.dropped.store(true, Ordering::SeqCst);
    }
}

#[async_trait]
impl Step<Value> for Hanging {
    fn name(&self) -> &'static str {
        self.name
    }
    async fn execute(&self, ctx: &StepContext, _: &mut Value) -> Result<(), StepError> {
        *self.seen.token.lock().unwrap() = Some(ctx.token());
        ctx.call(Dependency::Postgres, |deadline| {
            let seen = Arc::clone(&self.seen);
            async move {
                let _dropped = Dropped(Arc::clone(&seen));
                *seen.deadline.lock().unwrap() = Some(deadline - Instant::now());
                seen.entered.notify_one();
                std::future::pending().await
            }
        })
        .await
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
}

struct Hangs(Vec<Arc<dyn Step<Value>>>);

impl Saga for Hangs {
    type Data = Value;
    fn kind(&self) -> &'static str {
        KIND
    }
    fn version(&self) -> i32 {
        1
    }
    fn steps(&self) -> &[Arc<dyn Step<Value>>] {
        &self.0
    }
    fn pivot(&self) -> usize {
        1
    }
    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }
    fn prepare(&self, _: &TakenJob) -> Result<Value, StepError> {
        Ok(json!({}))
    }
}

struct Stage {
    postgres: Postgres,
    queue: Queue,
    heartbeat: Heartbeat,
    engine: Engine,
    seen: Arc<Seen>,
    _services: TestServices,
}

/// A delivery under way, in the middle of its call.
struct Running {
    ended: JoinHandle<Ended>,
    cancel: CancellationToken,
    stop: CancellationToken,
    job: Arc<TakenJob>,
}

fn name() -> QueueName {
    QueueName::new(KIND).unwrap()
}

impl Stage {
    async fn new(call_timeout: Duration) -> Self {
        let step = |name, seen: &Arc<Seen>| {
            Arc::new(Hanging { name, seen: Arc::clone(seen) }) as Arc<dyn Step<Value>>
        };
        Self::with(call_timeout, |seen| vec![step("hang", seen), step("hang again", seen)]).await
    }

    async fn with(
        call_timeout: Duration,
        steps: impl FnOnce(&Arc<Seen>) -> Vec<Arc<dyn Step<Value>>>,
    ) -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        let url = services.redis_queue().url().to_owned();
        let config = QueueConfig { url, lease: LEASE, ..QueueConfig::default() };
        let queue = Queue::connect(config.clone()).await.unwrap();
        let interval = Duration::from_millis(200);
        let heartbeat = Heartbeat::spawn(config, HeartbeatConfig { interval }).unwrap();
        let seen = Arc::new(Seen::default());
        let settings = EngineSettings {
            calls: CallLimits { call_timeout, lease_margin: MARGIN },
            ..EngineSettings::default()
        };
        let engine = Engine::new(
            postgres.clone(),
            Breakers::new([], CancellationToken::new()),
            WorkerId::new("w"),
            settings,
            Registry::default().with(Hangs(steps(&seen))),
        );
        Self { postgres, queue, heartbeat, engine, seen, _services: services }
    }

    async fn start(&self, timeout: Duration) -> Running {
        let mut new = NewJob::new(KIND, name(), TenantId::new("acme").unwrap(), json!({}));
        new.timeout = timeout;
        self.postgres.accept(std::slice::from_ref(&new), true).await.unwrap();
        let envelope = self.postgres.envelope(new.id).await.unwrap().expect("an unfinished job");
        self.queue.push(&[envelope]).await.unwrap();
        let claim = self.queue.claim(&name(), &WorkerId::new("w"), 1).await.unwrap().remove(0);
        let lease = self.heartbeat.register(&claim);
        let batch = TakeBatch::new(self.postgres.clone(), WorkerId::new("w"));
        let job = match batch.flush(&[TakeItem { id: new.id, fast: None }]).await.unwrap().remove(0) {
            Take::Taken(job) => Arc::new(*job),
            other => panic!("not taken: {other:?}"),
        };
        let (cancel, stop) = (CancellationToken::new(), CancellationToken::new());
        let delivery = Delivery { job: Arc::clone(&job), lease, cancel: cancel.clone(), stop: stop.clone() };
        let engine = self.engine.clone();
        let ended = tokio::spawn(async move { engine.run(delivery).await });
        tokio::time::timeout(PATIENCE, self.seen.entered.notified()).await.expect("the step begins its call");
        Running { ended, cancel, stop, job }
    }

    /// The time that the call was given.
    fn given(&self) -> Duration {
        self.seen.deadline.lock().unwrap().expect("a call")
    }

    /// Waits for the delivery's end; by then nothing of the step goes on, and what it started elsewhere knows.
    async fn ended(&self, running: Running) -> (Ended, JobView) {
        let ended = tokio::time::timeout(PATIENCE, running.ended).await.expect("the run ends").unwrap();
        assert!(self.seen.dropped.load(Ordering::SeqCst), "the call goes on after its run");
        (ended, self.postgres.job(running.job.id, None).await.unwrap().unwrap())
    }

    fn told(&self) -> bool {
        self.seen.token.lock().unwrap().as_ref().is_some_and(RunToken::is_cancelled)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_6_no_call_outlasts_the_lease_the_job_or_the_limit_of_calls() {
    let stage = Stage::new(Duration::from_secs(600)).await;
    let running = stage.start(Duration::from_secs(600)).await;
    assert!(stage.given() + MARGIN <= LEASE, "past the lease's end: {:?}", stage.given());
    running.stop.cancel();
    stage.ended(running).await;

    let running = stage.start(Duration::from_millis(700)).await;
    assert!(stage.given() <= Duration::from_millis(700), "past the job's time: {:?}", stage.given());
    let (ended, job) = stage.ended(running).await;
    assert!(matches!(ended, Ended::Release(_)) && job.last_error.is_some(), "{ended:?} {job:?}");
    assert_eq!(job.attempts, 1, "a job that used up its time is charged");

    let stage = Stage::new(Duration::from_millis(300)).await;
    let running = stage.start(Duration::from_secs(600)).await;
    assert!(stage.given() <= Duration::from_millis(300), "past the limit of calls: {:?}", stage.given());
    running.stop.cancel();
    stage.ended(running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_14_a_cancel_and_a_stop_end_a_call_that_hangs() {
    let stage = Stage::new(Duration::from_secs(600)).await;
    let running = stage.start(Duration::from_secs(600)).await;
    assert!(!stage.told());
    stage.postgres.cancel(running.job.id, None).await.unwrap();
    running.cancel.cancel();
    assert!(stage.told(), "work beside the step is not told of a cancel");
    let (ended, job) = stage.ended(running).await;
    assert_eq!((ended, job.state.as_str(), job.attempts), (Ended::Ack, "cancelled", 0));

    let running = stage.start(Duration::from_secs(600)).await;
    running.stop.cancel();
    assert!(stage.told(), "work beside the step is not told of a stop");
    let (ended, job) = stage.ended(running).await;
    assert_eq!((ended, job.state.as_str(), job.attempts), (Ended::Release(Duration::ZERO), "waiting", 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_5_a_lost_lease_ends_a_call_that_hangs() {
    let stage = Stage::new(Duration::from_secs(600)).await;
    let running = stage.start(Duration::from_secs(600)).await;
    // As after a pause longer than the lease: the reaper gives the job to somebody else.
    let now = chrono::Utc::now().timestamp_millis();
    let later = stage.queue.at(now + 2 * LEASE.as_millis() as i64);
    assert_eq!(later.reap(&name()).await.unwrap().len(), 1);
    let (ended, job) = stage.ended(running).await;
    assert!(stage.told(), "work beside the step is not told of a lost lease");
    assert_eq!((ended, job.state.as_str()), (Ended::Abandoned, "running"));
}

/// Its first try one way hangs without a call; the other way and later it is done at once.
struct Slow {
    back: bool,
    seen: Arc<Seen>,
}

impl Slow {
    async fn hangs_once(&self) {
        if self.seen.dropped.load(Ordering::SeqCst) {
            return;
        }
        let _dropped = Dropped(Arc::clone(&self.seen));
        self.seen.entered.notify_one();
        std::future::pending::<()>().await;
    }
}

#[async_trait]
impl Step<Value> for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }
    fn timeout(&self) -> Duration {
        Duration::from_millis(200)
    }
    async fn execute(&self, _: &StepContext, _: &mut Value) -> Result<(), StepError> {
        if !self.back {
            self.hangs_once().await;
        }
        Ok(())
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        if self.back {
            self.hangs_once().await;
        }
        Ok(())
    }
}

struct Fails;

#[async_trait]
impl Step<Value> for Fails {
    fn name(&self) -> &'static str {
        "fails"
    }
    async fn execute(&self, _: &StepContext, _: &mut Value) -> Result<(), StepError> {
        Err(StepError::permanent("refused", "as it should"))
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_try_of_a_step_and_of_its_compensation_ends_with_the_steps_own_time() {
    for back in [false, true] {
        let steps = |seen: &Arc<Seen>| {
            vec![Arc::new(Slow { back, seen: Arc::clone(seen) }) as _, Arc::new(Fails) as _]
        };
        let stage = Stage::with(Duration::from_secs(600), steps).await;
        let running = stage.start(Duration::from_secs(600)).await;
        let (ended, job) = stage.ended(running).await;
        assert_eq!((ended, job.state.as_str()), (Ended::Ack, "dead"), "back: {back}");
        let tries: Vec<(String, i32)> = sqlx::query_as(
            "SELECT direction, attempts FROM saga_timeline WHERE step_name = 'slow' ORDER BY fence, seq",
        )
        .fetch_all(stage.postgres.pool())
        .await
        .unwrap();
        let (there, again) = if back { (1, 2) } else { (2, 1) };
        let expected = [("execute".to_owned(), there), ("compensate".to_owned(), again)];
        assert_eq!(tries, expected, "back: {back}");
    }
}
