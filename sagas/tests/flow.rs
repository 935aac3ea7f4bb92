//! What a saga of a user's own can do beyond one step after another: keep what it learns, do things at once, wait without a
//! slot for a time, a signal or child jobs, and go on with the definition that began it. Deliveries are real: a queue's lease and a
//! ledger's fence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use devstack::testing::TestServices;
use futures::{FutureExt, future::BoxFuture};
use queue::{Heartbeat, HeartbeatConfig, JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    Branch, Child, Commits, Dependency, Group, Registry, RetryPolicy, Saga, Step, StepContext, StepError,
    TakenJob,
    coalescing::Batch,
    encryption::{Keyring, new_key},
    engine::{Breakers, Delivery, Ended, Engine, EngineSettings},
    stores::postgres::{
        Postgres, PostgresConfig,
        accept::NewJob,
        batches::{BatchId, Callback, CallbackOn, Changed, NewBatch},
        dead_letters::{Replay, Resolved},
        ending::Run,
        inspect::JobView,
        ledger::Cancel,
        parked::Handled,
        take::{Take, TakeBatch, TakeItem},
        waits::Signalled,
    },
};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

#[cfg(feature = "faults")]
mod itself;

const KIND: &str = "flow";

/// What happened, in order.
type Log = Arc<Mutex<Vec<String>>>;
type Act =
    Arc<dyn for<'a> Fn(&'a StepContext, &'a mut Value) -> BoxFuture<'a, Result<(), StepError>> + Send + Sync>;

struct Flow {
    version: i32,
    steps: Vec<Arc<dyn Step<Value>>>,
    pivot: usize,
}

impl Saga for Flow {
    type Data = Value;
    fn kind(&self) -> &'static str {
        KIND
    }
    fn version(&self) -> i32 {
        self.version
    }
    fn steps(&self) -> &[Arc<dyn Step<Value>>] {
        &self.steps
    }
    fn pivot(&self) -> usize {
        self.pivot
    }
    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }
    fn prepare(&self, _: &TakenJob) -> Result<Value, StepError> {
        Ok(json!({}))
    }
    fn result(&self, data: &Value) -> Value {
        data.clone()
    }
}

struct Do {
    name: &'static str,
    commits: Commits,
    log: Log,
    act: Act,
    undo: Act,
}

fn nothing() -> Act {
    Arc::new(|_, _| async { Ok(()) }.boxed())
}

impl Do {
    fn new<F>(log: &Log, name: &'static str, act: F) -> Self
    where
        F: for<'a> Fn(&'a StepContext, &'a mut Value) -> BoxFuture<'a, Result<(), StepError>>
            + Send
            + Sync
            + 'static,
    {
        Self { name, commits: Commits::Nothing, log: Arc::clone(log), act: Arc::new(act), undo: nothing() }
    }

    fn fine(log: &Log, name: &'static str) -> Self {
        Self { act: nothing(), ..Self::new(log, name, |_, _| async { Ok(()) }.boxed()) }
    }

    fn boxed(self) -> Arc<dyn Step<Value>> {
        Arc::new(self)
    }
}

#[async_trait]
impl Step<Value> for Do {
    fn name(&self) -> &'static str {
        self.name
    }
    fn retry(&self) -> RetryPolicy {
        RetryPolicy { tries: 1, ..RetryPolicy::FORWARD }
    }
    fn commits(&self) -> Commits {
        self.commits
    }
    async fn execute(&self, ctx: &StepContext, data: &mut Value) -> Result<(), StepError> {
        self.log.lock().unwrap().push(self.name.to_owned());
        (self.act)(ctx, data).await
    }
    async fn compensate(&self, ctx: &StepContext, data: &Value) -> Result<(), StepError> {
        self.log.lock().unwrap().push(format!("undo {} {data}", self.name));
        (self.undo)(ctx, &mut data.clone()).await
    }
}

/// A branch whose output is its name.
struct Arm {
    name: &'static str,
    tries: usize,
    log: Log,
    act: Act,
}

#[async_trait]
impl Branch<Value> for Arm {
    type Output = String;
    fn name(&self) -> &'static str {
        self.name
    }
    fn retry(&self) -> RetryPolicy {
        RetryPolicy { tries: self.tries, ..RetryPolicy::FORWARD }
    }
    async fn execute(&self, ctx: &StepContext, data: &Value) -> Result<String, StepError> {
        self.log.lock().unwrap().push(self.name.to_owned());
        (self.act)(ctx, &mut data.clone()).await?;
        self.log.lock().unwrap().push(format!("{} done", self.name));
        Ok(self.name.to_owned())
    }
    fn keep(&self, output: String, data: &mut Value) {
        assert_ne!(self.name, "defect");
        data[self.name] = json!(output);
    }
    async fn compensate(&self, _: &StepContext, data: &Value) -> Result<(), StepError> {
        self.log.lock().unwrap().push(format!("undo {} {data}", self.name));
        Ok(())
    }
}

/// A branch whose compensation a store asks to come later, always.
struct Late {
    name: &'static str,
    wait: Duration,
}

#[async_trait]
impl Branch<Value> for Late {
    type Output = ();
    fn name(&self) -> &'static str {
        self.name
    }
    async fn execute(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Ok(())
    }
    fn keep(&self, (): (), _: &mut Value) {}
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        Err(StepError::rate_limited("busy", "not now", self.wait))
    }
}

struct Stage {
    postgres: Postgres,
    queue: Queue,
    heartbeat: Heartbeat,
    services: TestServices,
}

fn queue_name() -> QueueName {
    QueueName::new(KIND).unwrap()
}

/// One delivery under way.
struct UnderWay {
    ended: tokio::task::JoinHandle<Ended>,
    lease: queue::Lease,
    cancel: CancellationToken,
    stop: CancellationToken,
}

impl Stage {
    async fn new() -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        // No heartbeat tells a worker that it lost its lease: what is refused is refused by Postgres.
        let config = QueueConfig {
            url: services.redis_queue().url().to_owned(),
            lease: Duration::from_secs(3600),
            ..QueueConfig::default()
        };
        let queue = Queue::connect(config.clone()).await.unwrap();
        let heartbeat =
            Heartbeat::spawn(config, HeartbeatConfig { interval: Duration::from_secs(1000) }).unwrap();
        Self { postgres, queue, heartbeat, services }
    }

    fn engine(&self, sagas: impl IntoIterator<Item = Flow>) -> Engine {
        let registry = sagas.into_iter().fold(Registry::default(), Registry::with);
        let breakers = Breakers::new([], CancellationToken::new());
        Engine::new(self.postgres.clone(), breakers, WorkerId::new("w"), EngineSettings::default(), registry)
    }

    fn saga(&self, steps: Vec<Arc<dyn Step<Value>>>) -> Engine {
        let pivot = steps.len();
        self.engine([Flow { version: 1, steps, pivot }])
    }

    async fn enqueue(&self) -> JobId {
        let job = NewJob::new(KIND, queue_name(), TenantId::new("acme").unwrap(), json!({}));
        self.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        job.id
    }

    /// Takes a job that is due, as a worker of this name, and begins to run it.
    async fn begin(&self, engine: &Engine, id: JobId, worker: &str) -> UnderWay {
        let envelope = self.postgres.envelope(id).await.unwrap().expect("an unfinished job");
        let worker = WorkerId::new(worker);
        self.queue.forget(&[(queue_name(), id)]).await.unwrap();
        self.queue.push(&[queue::Envelope { run_at_ms: None, ..envelope }]).await.unwrap();
        let claim = self.queue.claim(&queue_name(), &worker, 1).await.unwrap().remove(0);
        let lease = self.heartbeat.register(&claim);
        let batch = TakeBatch::new(self.postgres.clone(), worker);
        let job = match batch.flush(&[TakeItem { id, fast: None }]).await.unwrap().remove(0) {
            Take::Taken(job) => Arc::new(*job),
            other => panic!("not taken: {other:?}"),
        };
        let (cancel, stop) = (CancellationToken::new(), CancellationToken::new());
        let delivery = Delivery { job, lease: lease.clone(), cancel: cancel.clone(), stop: stop.clone() };
        let engine = engine.clone();
        UnderWay { ended: tokio::spawn(async move { engine.run(delivery).await }), lease, cancel, stop }
    }

    /// One whole delivery of a job that is due.
    async fn deliver(&self, engine: &Engine, id: JobId) -> Ended {
        let UnderWay { ended, lease, .. } = self.begin(engine, id, "w").await;
        let ended = ended.await.unwrap();
        self.queue.ack(&[lease.lease_ref()]).await.unwrap();
        ended
    }

    /// A delivery whose worker dies once `at` is told.
    async fn crash(&self, engine: &Engine, id: JobId, at: &Notify) {
        let UnderWay { ended, lease, .. } = self.begin(engine, id, "victim").await;
        at.notified().await;
        ended.abort();
        assert!(ended.await.unwrap_err().is_cancelled());
        self.reap(&lease).await;
    }

    /// Frees the job in Redis, as the reaper does with leases that have run out.
    async fn reap(&self, lease: &queue::Lease) {
        self.queue.ack(&[lease.lease_ref()]).await.unwrap();
    }

    async fn job(&self, id: JobId) -> JobView {
        self.postgres.job(id, None).await.unwrap().unwrap()
    }

    /// Milliseconds until the ledger lets the job be taken, and whether the relay is to tell Redis.
    async fn due(&self, id: JobId) -> (i64, bool) {
        sqlx::query_as(
            "SELECT (extract(epoch FROM run_at - now()) * 1000)::bigint, dispatched_at IS NULL FROM jobs WHERE id = $1",
        )
        .bind(id.0)
        .fetch_one(self.postgres.pool())
        .await
        .unwrap()
    }

    async fn wait_until_due(&self, id: JobId) {
        let begun = Instant::now();
        while self.due(id).await.0 > 0 {
            assert!(begun.elapsed() < Duration::from_secs(30), "not due in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn steps(&self, id: JobId) -> Vec<(String, String, String)> {
        let mut steps = vec![];
        for saga in self.postgres.sagas_of(id).await.unwrap() {
            for step in self.postgres.steps(saga.id).await.unwrap() {
                steps.push((step.step_name, step.direction, step.state));
            }
        }
        steps
    }

    /// Ends a child as its worker would.
    async fn end_child(&self, id: JobId, state: &str, result: Option<Value>) {
        sqlx::query("UPDATE jobs SET state = 'running', worker = 'w' WHERE id = $1 AND state = 'waiting'")
            .bind(id.0)
            .execute(self.postgres.pool())
            .await
            .unwrap();
        let changed = sqlx::query(
            "UPDATE jobs SET state = $2, finished_at = now(), result = $3, last_error = CASE WHEN $2 = 'dead' THEN 'no way' END
             WHERE id = $1 AND state IN ('waiting', 'running')",
        )
        .bind(id.0)
        .bind(state)
        .bind(result)
        .execute(self.postgres.pool())
        .await
        .unwrap();
        assert_eq!(changed.rows_affected(), 1);
    }

    /// Replays a child that has died, as a person does with its letter.
    async fn replay(&self, dead: JobId) -> JobId {
        sqlx::query(
            "INSERT INTO dead_letters (id, job_id, tenant, kind, queue, class, reason, payload)
             SELECT uuid7(), id, tenant, kind, queue, 'no_way', 'no way', payload FROM jobs WHERE id = $1",
        )
        .bind(dead.0)
        .execute(self.postgres.pool())
        .await
        .unwrap();
        match self.postgres.replay(dead.0, &Replay::default()).await.unwrap() {
            Resolved::Done(Some(replay)) => replay,
            other => panic!("not replayed: {other:?}"),
        }
    }

    async fn collect(&self) {
        loop {
            let batches = self.postgres.batches_to_fold(100, &[]).await.unwrap();
            if batches.is_empty() {
                return;
            }
            for batch in batches {
                self.postgres.fold_batch(batch).await.unwrap();
            }
        }
    }

    /// Deliveries of this worker put the job off, uncharged, each for a while, and leave it due.
    async fn is_put_off(&self, engine: &Engine, id: JobId, why: &str) {
        for _ in 0..2 {
            assert_eq!(self.deliver(engine, id).await, Ended::Release(Duration::from_secs(10)));
            let job = self.job(id).await;
            assert_eq!((job.state.as_str(), job.attempts), ("waiting", 0));
            assert!(job.last_error.as_ref().is_some_and(|error| error.contains(why)), "{job:?}");
            assert!(self.due(id).await.0 > 5000);
            assert_eq!(self.postgres.sagas_of(id).await.unwrap()[0].state, "running");
            sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
                .bind(id.0)
                .execute(self.postgres.pool())
                .await
                .unwrap();
        }
    }

    async fn children_of(&self, id: JobId) -> Vec<JobId> {
        let ids: Vec<uuid::Uuid> = sqlx::query_scalar("SELECT id FROM jobs WHERE parent = $1 ORDER BY id")
            .bind(id.0)
            .fetch_all(self.postgres.pool())
            .await
            .unwrap();
        ids.into_iter().map(JobId).collect()
    }
}

fn take(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.lock().unwrap())
}

fn never() -> BoxFuture<'static, Result<(), StepError>> {
    std::future::pending().boxed()
}

#[tokio::test]
async fn what_a_step_learnt_is_there_after_a_crash_for_later_steps_and_for_its_compensation() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    let learn = Do {
        commits: Commits::Data,
        ..Do::new(&log, "learn", |_, data| {
            data["number"] = json!(42);
            async { Ok(()) }.boxed()
        })
    };
    let hang = Do::new(&log, "hang", move |_, _| {
        reached.notify_one();
        never()
    });
    let engine = stage.saga(vec![learn.boxed(), hang.boxed()]);
    let id = stage.enqueue().await;
    stage.crash(&engine, id, &at).await;
    assert_eq!(take(&log), ["learn", "hang"]);
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), [r#"undo hang {"number":42}"#, r#"undo learn {"number":42}"#]);
    assert_eq!(stage.job(id).await.state, "cancelled");

    // And it is not executed again.
    let id = stage.enqueue().await;
    stage.crash(&engine, id, &at).await;
    stage.crash(&engine, id, &at).await;
    assert_eq!(take(&log), ["learn", "hang", "hang"]);
}

#[tokio::test]
async fn a_compensation_that_is_delivered_again_has_the_data_that_the_first_one_had() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    let learn = Do::new(&log, "learn", |_, data| {
        data["number"] = json!(42);
        async { Ok(()) }.boxed()
    });
    let undo: Act = Arc::new(move |ctx, _| {
        if ctx.job.deliveries > 1 {
            return async { Ok(()) }.boxed();
        }
        reached.notify_one();
        never()
    });
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![Do { undo, ..learn }.boxed(), fails.boxed()]);
    let id = stage.enqueue().await;
    stage.crash(&engine, id, &at).await;
    let undone = r#"undo learn {"number":42}"#;
    assert_eq!(take(&log), ["learn", "fails", r#"undo fails {"number":42}"#, undone]);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), [r#"undo fails {"number":42}"#, undone]);
    assert_eq!(stage.job(id).await.state, "dead");
}

#[tokio::test]
async fn protocol_06_the_log_has_the_decision_to_compensate_before_the_first_step_is_undone() {
    let (stage, log) = (Stage::new().await, Log::default());
    let (pool, said) = (stage.postgres.pool().clone(), Arc::clone(&log));
    let undo: Act = Arc::new(move |ctx, _| {
        let (pool, said, job) = (pool.clone(), Arc::clone(&said), ctx.job.id.0);
        async move {
            let state: String = sqlx::query_scalar("SELECT state FROM sagas WHERE job_id = $1")
                .bind(job)
                .fetch_one(&pool)
                .await
                .unwrap();
            said.lock().unwrap().push(state);
            Ok(())
        }
        .boxed()
    });
    let first = Do { undo: Arc::clone(&undo), ..Do::fine(&log, "first") };
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![first.boxed(), Do { undo, ..fails }.boxed()]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    let undone = ["undo fails {}", "compensating", "undo first {}", "compensating"];
    assert_eq!(take(&log), [&["first", "fails"], &undone[..]].concat());
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn compensating_without_the_log_fails_its_named_tests() {
    for test in [
        "protocol_06_the_log_has_the_decision_to_compensate_before_the_first_step_is_undone",
        "a_compensation_that_is_delivered_again_has_the_data_that_the_first_one_had",
    ] {
        itself::misses(test, "engine.turn").await;
    }
}

#[tokio::test]
async fn branches_run_at_once_and_bring_their_outputs() {
    let (stage, log) = (Stage::new().await, Log::default());
    // Each waits for the other: one after the other would never end.
    let both = Arc::new(tokio::sync::Barrier::new(2));
    let arm = |name| {
        let both = Arc::clone(&both);
        let act: Act = Arc::new(move |_, _| {
            let both = Arc::clone(&both);
            async move {
                both.wait().await;
                Ok(())
            }
            .boxed()
        });
        Arm { name, tries: 1, log: Arc::clone(&log), act }
    };
    let group = Arc::new(Group::new("both").with(arm("left")).with(arm("right")));
    let engine = stage.saga(vec![group, Do::fine(&log, "after").boxed()]);
    assert!(engine.fault_points().contains(&"flow.left.compensate.before".to_owned()));
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "left": "left", "right": "right" })));
    let names: Vec<_> = stage.steps(id).await.into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names[..2].contains(&"left".to_owned()) && names[2] == "after", "{names:?}");
}

#[tokio::test]
async fn when_a_branch_fails_the_others_end_their_try_and_all_are_undone() {
    let (stage, log, slow) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let arm = |name, tries, act: Act| Arm { name, tries, log: Arc::clone(&log), act };
    let fails: Act = Arc::new(|_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    // Under way when the other fails: its try is not cut off.
    let (let_go, seen) = (Arc::clone(&slow), Arc::clone(&log));
    let slowly: Act = Arc::new(move |ctx, _| {
        let (let_go, seen) = (Arc::clone(&let_go), Arc::clone(&seen));
        async move {
            ctx.cancelled().await;
            seen.lock().unwrap().push("told".to_owned());
            let_go.notified().await;
            Ok(())
        }
        .boxed()
    });
    // Between two tries when the other fails: it begins no further one.
    let busy: Act = Arc::new(|_, _| async { Err(StepError::transient("busy", "busy")) }.boxed());
    let group = Group::new("three")
        .with(arm("slow", 1, slowly))
        .with(arm("busy", 1000, busy))
        .with(arm("fails", 1, fails));
    let engine = stage.saga(vec![Do::fine(&log, "before").boxed(), Arc::new(group)]);
    let id = stage.enqueue().await;
    let run = stage.begin(&engine, id, "w").await;
    let begun = Instant::now();
    while !log.lock().unwrap().contains(&"told".to_owned()) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{log:?}");
        tokio::task::yield_now().await;
    }
    assert!(!log.lock().unwrap().iter().any(|line| line.starts_with("undo")), "undone before all had ended");
    slow.notify_one();
    assert_eq!(run.ended.await.unwrap(), Ended::Ack);
    let lines = take(&log);
    let undone: Vec<_> = lines.iter().filter(|line| line.starts_with("undo")).map(String::as_str).collect();
    // What the slow one brought is known to its compensation.
    let data = r#"{"slow":"slow"}"#;
    let expected = ["slow", "busy", "fails", "before"].map(|name| format!("undo {name} {data}"));
    assert_eq!(undone, expected, "{lines:?}");
    assert!(lines.contains(&"slow done".to_owned()));
    assert_eq!(lines.iter().filter(|line| *line == "busy").count(), 1, "{lines:?}");
    let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
    assert_eq!(letter.class, "no", "the branch that failed first is the reason: {letter:?}");
    let steps = stage.steps(id).await;
    assert_eq!(steps.iter().filter(|(_, direction, _)| direction == "compensate").count(), 4, "{steps:?}");
}

#[tokio::test]
async fn a_group_that_is_put_off_or_crashes_goes_on_with_the_branches_that_are_not_done() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    let quick = Arm { name: "quick", tries: 1, log: Arc::clone(&log), act: nothing() };
    let waits: Act = Arc::new(move |ctx, _| {
        let reached = Arc::clone(&reached);
        async move {
            if ctx.signal::<Value>("crash", Duration::from_secs(600)).await?.is_some() {
                reached.notify_one();
                return std::future::pending().await;
            }
            Ok(())
        }
        .boxed()
    });
    let waits = Arm { name: "waits", tries: 1, log: Arc::clone(&log), act: waits };
    let engine = stage.saga(vec![Arc::new(Group::new("two").with(quick).with(waits))]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let mut lines = take(&log);
    lines.sort_unstable();
    assert_eq!(lines, ["quick", "quick done", "waits"]);
    let timeline = stage.steps(id).await;
    assert_eq!(timeline.len(), 1, "what the delivery did is in the log though it was put off: {timeline:?}");
    assert_eq!(stage.postgres.signal(id, None, "crash", &json!(1)).await.unwrap(), Signalled::Sent);
    stage.crash(&engine, id, &at).await;
    assert_eq!(take(&log), ["waits"], "the branch that is done is not done again");
    // Its output is still there.
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), [r#"undo quick {"quick":"quick"}"#, r#"undo waits {"quick":"quick"}"#]);
}

#[tokio::test]
async fn a_timer_is_due_once_and_no_redelivery_prolongs_it() {
    let (stage, log) = (Stage::new().await, Log::default());
    let nap = Do::new(&log, "nap", |ctx, _| ctx.sleep("nap", Duration::from_millis(1500)).boxed());
    let engine = stage.saga(vec![nap.boxed(), Do::fine(&log, "after").boxed()]);
    let (id, begun) = (stage.enqueue().await, Instant::now());
    let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
    assert!(wait > Duration::from_secs(1) && wait <= Duration::from_millis(1501), "{wait:?}");
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 0));
    // Delivered again too early, several times, and by a worker that dies: the time stays what it was.
    for _ in 0..3 {
        sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
            .bind(id.0)
            .execute(stage.postgres.pool())
            .await
            .unwrap();
        let Ended::Release(left) = stage.deliver(&engine, id).await else { panic!("not put off") };
        assert!(
            left < wait && left + begun.elapsed() < wait + Duration::from_secs(1),
            "{left:?} of {wait:?}"
        );
    }
    stage.wait_until_due(id).await;
    assert!(begun.elapsed() >= Duration::from_millis(1490), "{:?}", begun.elapsed());
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), ["nap", "nap", "nap", "nap", "nap", "after"]);
    let saga = stage.postgres.sagas_of(id).await.unwrap().remove(0);
    let waits = stage.postgres.waits(saga.id).await.unwrap();
    assert_eq!((waits.len(), waits[0].outcome.as_deref()), (1, Some("due")));
    let steps = stage.steps(id).await;
    assert_eq!(steps.len(), 2, "a wait is no failed step: {steps:?}");
}

#[tokio::test]
async fn what_another_branch_still_does_prolongs_no_timer() {
    let (stage, log) = (Stage::new().await, Log::default());
    let sleeps: Act = Arc::new(|ctx, _| ctx.sleep("nap", Duration::from_secs(600)).boxed());
    let sleeps = Arm { name: "sleeps", tries: 1, log: Arc::clone(&log), act: sleeps };
    let pool = stage.postgres.pool().clone();
    // As though it had taken five minutes since the other fell asleep.
    let works: Act = Arc::new(move |_, _| {
        let pool = pool.clone();
        async move {
            let sql = "UPDATE saga_waits SET due_at = due_at - interval '5 minutes'";
            while sqlx::query(sql).execute(&pool).await.unwrap().rows_affected() == 0 {
                tokio::task::yield_now().await;
            }
            Ok(())
        }
        .boxed()
    });
    let works = Arm { name: "works", tries: 1, log: Arc::clone(&log), act: works };
    let engine = stage.saga(vec![Arc::new(Group::new("two").with(sleeps).with(works))]);
    let id = stage.enqueue().await;
    let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
    assert!(wait <= Duration::from_secs(300) && wait > Duration::from_secs(200), "{wait:?}");
}

fn asks(log: &Log, within: Duration) -> Arc<dyn Step<Value>> {
    Do::new(log, "ask", move |ctx, data| {
        async move {
            let answer = ctx.signal::<Value>("approve", within).await?;
            data["answer"] = answer.unwrap_or(json!("nobody"));
            Ok(())
        }
        .boxed()
    })
    .boxed()
}

#[tokio::test]
async fn a_signal_wakes_the_job_that_waits_for_it_and_is_kept_for_one_that_does_not_yet() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![asks(&log, Duration::from_secs(600))]);
    let id = stage.enqueue().await;
    assert!(
        matches!(stage.deliver(&engine, id).await, Ended::Release(wait) if wait > Duration::from_secs(500))
    );
    assert!(stage.due(id).await.0 > 500_000);
    let (postgres, yes) = (&stage.postgres, json!({ "by": "ann" }));
    assert_eq!(postgres.signal(id, Some("other"), "approve", &yes).await.unwrap(), Signalled::Unknown);
    // A signal that nobody waits for wakes nobody.
    assert_eq!(postgres.signal(id, Some("acme"), "refuse", &yes).await.unwrap(), Signalled::Sent);
    assert!(stage.due(id).await.0 > 500_000);
    assert_eq!(postgres.signal(id, Some("acme"), "approve", &yes).await.unwrap(), Signalled::Sent);
    let (left, undispatched) = stage.due(id).await;
    assert!(left <= 0 && undispatched, "the relay is not told: {left} ms, {undispatched}");
    // Twice is once.
    assert_eq!(postgres.signal(id, None, "approve", &yes).await.unwrap(), Signalled::Duplicate);
    assert_eq!(postgres.signal(id, None, "approve", &json!(0)).await.unwrap(), Signalled::Conflict);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "answer": { "by": "ann" } })));
    assert_eq!(postgres.signal(id, None, "late", &yes).await.unwrap(), Signalled::Ended);

    let id = stage.enqueue().await;
    assert_eq!(postgres.signal(id, None, "approve", &yes).await.unwrap(), Signalled::Sent);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "answer": { "by": "ann" } })));
}

#[tokio::test]
async fn a_signal_that_comes_while_the_job_falls_asleep_is_not_slept_through() {
    let (stage, log) = (Stage::new().await, Log::default());
    let postgres = stage.postgres.clone();
    let ask = Do::new(&log, "ask", move |ctx, data| {
        let postgres = postgres.clone();
        async move {
            let answer = ctx.signal::<Value>("approve", Duration::from_secs(600)).await;
            if answer.is_err() {
                // Between the look and the sleep.
                postgres.signal(ctx.job.id, None, "approve", &json!("now")).await?;
            }
            data["answer"] = json!(answer?);
            Ok(())
        }
        .boxed()
    });
    let engine = stage.saga(vec![ask.boxed()]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::ZERO));
    assert!(stage.due(id).await.0 <= 0);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "answer": "now" })));
}

#[tokio::test]
async fn a_wait_for_a_signal_that_was_given_up_stays_given_up() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    let hang = Do::new(&log, "hang", move |ctx, _| {
        reached.notify_one();
        if ctx.job.deliveries < 3 { never() } else { async { Ok(()) }.boxed() }
    });
    let engine = stage.saga(vec![asks(&log, Duration::from_millis(200)), hang.boxed()]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    stage.wait_until_due(id).await;
    stage.crash(&engine, id, &at).await;
    // The step is executed again, and now the signal is there.
    assert_eq!(stage.postgres.signal(id, None, "approve", &json!("late")).await.unwrap(), Signalled::Sent);
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "answer": "nobody" })));
    let saga = stage.postgres.sagas_of(id).await.unwrap().remove(0);
    assert_eq!(stage.postgres.waits(saga.id).await.unwrap()[0].outcome.as_deref(), Some("timed_out"));
}

#[tokio::test]
async fn what_is_waited_for_no_more_wakes_nobody() {
    let (stage, log) = (Stage::new().await, Log::default());
    let nap: Act = Arc::new(|ctx, _| ctx.sleep("cool off", Duration::from_secs(600)).boxed());
    let ask = Do::new(&log, "ask", |ctx, _| {
        async move { ctx.signal::<Value>("approve", Duration::from_secs(600)).await.map(drop) }.boxed()
    });
    let engine = stage.saga(vec![Do { undo: nap, ..ask }.boxed()]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    // The run turns back, and its compensation sleeps: nobody waits for the signal any longer, whenever it comes.
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    assert_eq!(stage.postgres.signal(id, None, "approve", &json!(1)).await.unwrap(), Signalled::Sent);
    let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
    assert!(wait > Duration::from_secs(500), "delivered again and again: {wait:?}");
    assert!(stage.due(id).await.0 > 500_000);
}

#[tokio::test]
async fn protocol_14_a_cancel_that_comes_before_the_run_falls_asleep_is_not_slept_through() {
    let (stage, log) = (Stage::new().await, Log::default());
    let postgres = stage.postgres.clone();
    // Asked for before the worker can have heard of it, and right before each way to fall asleep.
    for way in ["timer", "signal", "children"] {
        let asked = postgres.clone();
        let falls_asleep = Do::new(&log, "falls asleep", move |ctx, _| {
            let asked = asked.clone();
            async move {
                assert_eq!(asked.cancel(ctx.job.id, None).await.unwrap(), Cancel::Requested);
                let long = Duration::from_secs(600);
                match way {
                    "timer" => ctx.sleep("long", long).await,
                    "signal" => ctx.signal::<Value>("never", long).await.map(drop),
                    _ => ctx.children("all", &[Child::new("child", json!({}))]).await.map(drop),
                }
            }
            .boxed()
        });
        let engine = stage.saga(vec![Do::fine(&log, "first").boxed(), falls_asleep.boxed()]);
        let id = stage.enqueue().await;
        assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::ZERO), "{way}");
        assert_eq!(stage.deliver(&engine, id).await, Ended::Ack, "{way}");
        assert_eq!(stage.job(id).await.state, "cancelled", "{way}");
        let undone = ["first", "falls asleep", "undo falls asleep {}", "undo first {}"];
        assert_eq!(take(&log), undone, "{way}");
    }
}

#[tokio::test]
async fn protocol_17_the_relay_tells_redis_of_a_cancel_that_ends_a_sleep() {
    let (stage, log) = (Stage::new().await, Log::default());
    let sleeps = Do::new(&log, "sleeps", |ctx, _| ctx.sleep("long", Duration::from_secs(600)).boxed());
    let engine = stage.saga(vec![sleeps.boxed()]);
    let id = stage.enqueue().await;
    assert!(
        matches!(stage.deliver(&engine, id).await, Ended::Release(wait) if wait > Duration::from_secs(500))
    );
    let (due_in, to_relay) = stage.due(id).await;
    assert!(due_in > 500_000 && !to_relay);
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    let (due_in, to_relay) = stage.due(id).await;
    assert!(due_in <= 0 && to_relay, "due in {due_in} ms");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "cancelled");
}

#[tokio::test]
async fn protocol_14_a_run_that_can_still_be_undone_does_not_succeed_once_a_person_wants_its_end() {
    let (stage, log) = (Stage::new().await, Log::default());
    let postgres = stage.postgres.clone();
    let last = Do::new(&log, "last", move |ctx, _| {
        let postgres = postgres.clone();
        async move {
            assert_eq!(postgres.cancel(ctx.job.id, None).await.unwrap(), Cancel::Requested);
            Ok(())
        }
        .boxed()
    });
    let engine = stage.saga(vec![Do::fine(&log, "first").boxed(), last.boxed()]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "cancelled");
    assert_eq!(take(&log), ["first", "last", "undo last {}", "undo first {}"]);
}

#[tokio::test]
async fn a_compensation_is_tried_again_when_a_store_asked_for_it() {
    let (stage, log) = (Stage::new().await, Log::default());
    let refusals = Arc::new(Mutex::new(vec![Duration::from_millis(300), Duration::from_secs(600)]));
    let asks = |wait| StepError::rate_limited("busy", "not now", wait);
    let undo: Act = Arc::new(move |_, _| {
        let wait = refusals.lock().unwrap().pop();
        async move { wait.map_or(Ok(()), |wait| Err(asks(wait))) }.boxed()
    });
    let first = Do { undo, ..Do::fine(&log, "first") };
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![first.boxed(), fails.boxed()]);
    let id = stage.enqueue().await;
    // Ten minutes: without its slot.
    let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
    assert_eq!(wait, Duration::from_secs(600));
    sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    // A moment: with it.
    let begun = Instant::now();
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(stage.job(id).await.state, "dead");
    let undone = take(&log).iter().filter(|line| line.starts_with("undo first")).count();
    assert_eq!(undone, 3);
}

#[tokio::test]
async fn a_compensation_that_is_always_asked_to_come_later_is_parked_in_the_end() {
    let (stage, log) = (Stage::new().await, Log::default());
    let undo: Act = Arc::new(|_, _| {
        async { Err(StepError::rate_limited("busy", "not now", Duration::from_secs(600))) }.boxed()
    });
    let first = Do { undo, ..Do::fine(&log, "first") };
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![first.boxed(), fails.boxed()]);
    let id = stage.enqueue().await;
    for _ in 1..RetryPolicy::PATIENT.tries {
        assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::from_secs(600)));
        sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
            .bind(id.0)
            .execute(stage.postgres.pool())
            .await
            .unwrap();
    }
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "parked");
    let failed = stage.steps(id).await.into_iter().filter(|(name, way, state)| {
        (name.as_str(), way.as_str(), state.as_str()) == ("first", "compensate", "failed")
    });
    assert_eq!(failed.count(), RetryPolicy::PATIENT.tries, "each is in the log");
    // Its end can be taken back, so it may still be told something.
    assert_eq!(stage.postgres.signal(id, None, "approve", &json!(1)).await.unwrap(), Signalled::Sent);
    // A person has it go on: it may be put off as often as before.
    let saga = stage.postgres.sagas_of(id).await.unwrap()[0].id;
    let retried = stage.postgres.retry_parked(saga, "tester").await.unwrap();
    assert!(matches!(retried, Handled::Done(..)), "{retried:?}");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::from_secs(600)));
}

#[tokio::test]
async fn a_compensation_that_is_cut_short_by_its_workers_end_has_not_failed() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    let undo: Act = Arc::new(move |_, _| {
        reached.notify_one();
        never()
    });
    let first = Do { undo, ..Do::fine(&log, "first") };
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![first.boxed(), fails.boxed()]);
    let id = stage.enqueue().await;
    let UnderWay { ended, stop, .. } = stage.begin(&engine, id, "w").await;
    at.notified().await;
    stop.cancel();
    assert_eq!(ended.await.unwrap(), Ended::Release(Duration::ZERO));
    let steps = stage.steps(id).await;
    assert!(
        steps.iter().all(|(name, way, _)| (name.as_str(), way.as_str()) != ("first", "compensate")),
        "{steps:?}"
    );
}

#[tokio::test]
async fn a_group_whose_compensations_are_put_off_comes_back_for_the_first_of_them() {
    let (stage, log) = (Stage::new().await, Log::default());
    let group = Group::new("two")
        .with(Late { name: "hour", wait: Duration::from_secs(3600) })
        .with(Late { name: "minutes", wait: Duration::from_secs(600) });
    let fails = Do::new(&log, "fails", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let engine = stage.saga(vec![Arc::new(group), fails.boxed()]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::from_secs(600)));
}

#[tokio::test]
async fn a_panic_where_a_branchs_output_is_kept_is_a_failure_too() {
    let (stage, log) = (Stage::new().await, Log::default());
    let arm = |name| Arm { name, tries: 1, log: Arc::clone(&log), act: nothing() };
    let engine = stage.saga(vec![Arc::new(Group::new("two").with(arm("defect")).with(arm("fine")))]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 1));
    let mut undone = take(&log).split_off(4);
    undone.sort_unstable();
    assert_eq!(undone, [r#"undo defect {"fine":"fine"}"#, r#"undo fine {"fine":"fine"}"#]);
}

#[tokio::test]
async fn a_signal_is_sealed_like_a_payload() {
    let stage = Stage::new().await;
    let keys = Keyring::parse(&format!("k1:{}", new_key())).unwrap();
    let sealing = stage.postgres.clone().with_cipher(keys.into());
    let id = stage.enqueue().await;
    let secret = json!({ "iban": "DE02" });
    assert_eq!(sealing.signal(id, None, "approve", &secret).await.unwrap(), Signalled::Sent);
    let stored: Value =
        sqlx::query_scalar("SELECT payload FROM job_signals").fetch_one(stage.postgres.pool()).await.unwrap();
    assert!(!stored.to_string().contains("DE02"), "{stored}");
    assert_eq!(sealing.signal(id, None, "approve", &secret).await.unwrap(), Signalled::Duplicate);
}

#[tokio::test]
async fn what_a_run_waited_for_and_a_worker_has_no_key_for_waits_for_one_that_has() {
    let (mut stage, log) = (Stage::new().await, Log::default());
    let steps = || vec![asks(&log, Duration::from_secs(600)), parent(&log)];
    let keyless = stage.saga(steps());
    let keys = Keyring::parse(&format!("k1:{}", new_key())).unwrap();
    stage.postgres = stage.postgres.clone().with_cipher(keys.into());
    let keyed = stage.saga(steps());
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&keyless, id).await, Ended::Release(_)));
    assert_eq!(stage.postgres.signal(id, None, "approve", &json!("yes")).await.unwrap(), Signalled::Sent);
    stage.is_put_off(&keyless, id, "the signal \"approve\"").await;
    // With the key it goes on, to where it waits for its children.
    assert!(matches!(stage.deliver(&keyed, id).await, Ended::Release(_)));
    for child in stage.children_of(id).await {
        let batch = TakeBatch::new(stage.postgres.clone(), WorkerId::new("w"));
        let taken = match batch.flush(&[TakeItem { id: child, fast: None }]).await.unwrap().remove(0) {
            Take::Taken(taken) => taken,
            other => panic!("not taken: {other:?}"),
        };
        let run = Run {
            job_id: child,
            fence: taken.fence,
            saga_id: None,
            worker: WorkerId::new("w"),
            started_at: chrono::Utc::now(),
        };
        assert!(stage.postgres.complete(&run, &json!("done"), &[]).await.unwrap());
    }
    stage.collect().await;
    stage.is_put_off(&keyless, id, "the result of child").await;
    assert_eq!(stage.deliver(&keyed, id).await, Ended::Ack);
    let result = stage.job(id).await.result.unwrap();
    assert_eq!((&result["answer"], &result["results"]), (&json!("yes"), &json!(["done", "done", "done"])));
}

fn parent(log: &Log) -> Arc<dyn Step<Value>> {
    let step = Do::new(log, "spread", |ctx, data| {
        async move {
            let children: Vec<Child> = (0..3).map(|n| Child::new("part", json!({ "n": n }))).collect();
            let ends = ctx.children("parts", &children).await?;
            data["states"] = json!(ends.iter().map(|end| &end.state).collect::<Vec<_>>());
            data["results"] = json!(ends.iter().map(|end| &end.result).collect::<Vec<_>>());
            data["errors"] = json!(ends.iter().map(|end| &end.error).collect::<Vec<_>>());
            Ok(())
        }
        .boxed()
    });
    Do { undo: Arc::new(|ctx, _| ctx.cancel_children("parts").boxed()), ..step }.boxed()
}

#[tokio::test]
async fn children_are_enqueued_once_and_wake_their_parent_when_the_last_has_ended() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![parent(&log)]);
    let id = stage.enqueue().await;
    // However often the step is executed.
    for _ in 0..3 {
        assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
        assert_eq!(stage.children_of(id).await.len(), 3);
        sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
            .bind(id.0)
            .execute(stage.postgres.pool())
            .await
            .unwrap();
    }
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let children = stage.children_of(id).await;
    let payloads: Vec<Value> =
        sqlx::query_scalar("SELECT payload FROM jobs WHERE parent = $1 AND queue = 'part' ORDER BY id")
            .bind(id.0)
            .fetch_all(stage.postgres.pool())
            .await
            .unwrap();
    assert_eq!(payloads, [json!({ "n": 0 }), json!({ "n": 1 }), json!({ "n": 2 })]);
    stage.end_child(children[2], "succeeded", Some(json!("two"))).await;
    stage.end_child(children[0], "dead", None).await;
    stage.collect().await;
    assert!(stage.due(id).await.0 > 3_600_000, "woken before the last had ended");
    stage.end_child(children[1], "succeeded", None).await;
    stage.collect().await;
    let (left, undispatched) = stage.due(id).await;
    assert!(left <= 0 && undispatched, "{left} ms, {undispatched}");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    let result = stage.job(id).await.result.unwrap();
    assert_eq!(result["states"], json!(["dead", "succeeded", "succeeded"]));
    assert_eq!(result["results"], json!([null, null, "two"]));
    assert_eq!(result["errors"], json!(["no way", null, null]));
}

#[tokio::test]
async fn children_that_end_while_the_parent_falls_asleep_are_not_slept_through() {
    let (stage, log) = (Stage::new().await, Log::default());
    let (postgres, pool) = (stage.postgres.clone(), stage.postgres.pool().clone());
    let spread = Do::new(&log, "spread", move |ctx, _| {
        let (postgres, pool) = (postgres.clone(), pool.clone());
        async move {
            let ends = ctx.children("parts", &[Child::new("part", json!({}))]).await;
            if ends.is_err() {
                for sql in [
                    "UPDATE jobs SET state = 'running', worker = 'w' WHERE parent = $1",
                    "UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE parent = $1",
                ] {
                    sqlx::query(sql).bind(ctx.job.id.0).execute(&pool).await.unwrap();
                }
                for batch in postgres.batches_to_fold(10, &[]).await? {
                    postgres.fold_batch(batch).await?;
                }
            }
            ends.map(drop)
        }
        .boxed()
    });
    let engine = stage.saga(vec![spread.boxed()]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Release(Duration::ZERO));
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
}

#[tokio::test]
async fn a_parent_that_turns_back_ends_its_children_first() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![parent(&log)]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let children = stage.children_of(id).await;
    stage.end_child(children[0], "succeeded", None).await;
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)), "its children have not ended");
    for batch in stage.postgres.batches_to_cancel(BatchId(uuid::Uuid::nil()), 10).await.unwrap() {
        stage.postgres.cancel_members(batch, uuid::Uuid::nil(), 100).await.unwrap();
    }
    stage.collect().await;
    assert!(stage.due(id).await.0 <= 0, "not woken by their end");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "cancelled");
    let mut states = HashMap::new();
    for child in children {
        *states.entry(stage.job(child).await.state).or_insert(0) += 1;
    }
    assert_eq!(states, HashMap::from([(sagas::JobState::Succeeded, 1), (sagas::JobState::Cancelled, 2)]));
}

#[tokio::test]
async fn a_replay_of_a_dead_child_is_waited_for_and_takes_its_place() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![parent(&log)]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let children = stage.children_of(id).await;
    stage.end_child(children[0], "succeeded", Some(json!("zero"))).await;
    stage.end_child(children[1], "dead", None).await;
    stage.end_child(children[2], "succeeded", Some(json!("two"))).await;
    // The batch has finished when it is replayed, and once more when the replay has died, too.
    let mut dead = children[1];
    for (state, result) in [("dead", None), ("succeeded", Some(json!("one")))] {
        stage.collect().await;
        assert!(stage.due(id).await.0 <= 0, "not woken");
        dead = stage.replay(dead).await;
        let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
        assert!(wait > Duration::from_secs(500), "delivered again and again: {wait:?}");
        stage.collect().await;
        assert!(stage.due(id).await.0 > 3_600_000, "woken before the replay had ended");
        stage.end_child(dead, state, result).await;
    }
    stage.collect().await;
    let (left, undispatched) = stage.due(id).await;
    assert!(left <= 0 && undispatched, "{left} ms, {undispatched}");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    let result = stage.job(id).await.result.unwrap();
    assert_eq!(result["states"], json!(["succeeded", "succeeded", "succeeded"]));
    assert_eq!(result["results"], json!(["zero", "one", "two"]));
    assert_eq!(result["errors"], json!([null, null, null]));
}

#[tokio::test]
async fn a_step_that_had_its_childrens_ends_waits_again_while_one_of_them_is_replayed() {
    let (stage, log) = (Stage::new().await, Log::default());
    let spread = Do::new(&log, "spread", |ctx, data| {
        async move {
            let ends = ctx.children("parts", &[Child::new("part", json!({}))]).await?;
            ctx.signal::<Value>("go on", Duration::from_secs(600)).await?;
            data["states"] = json!(ends.iter().map(|end| &end.state).collect::<Vec<_>>());
            Ok(())
        }
        .boxed()
    });
    let engine = stage.saga(vec![spread.boxed()]);
    let id = stage.enqueue().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let child = stage.children_of(id).await[0];
    stage.end_child(child, "dead", None).await;
    stage.collect().await;
    // It has the children's ends, and waits for the signal.
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    let replay = stage.replay(child).await;
    assert_eq!(stage.postgres.signal(id, None, "go on", &json!(1)).await.unwrap(), Signalled::Sent);
    assert!(
        matches!(stage.deliver(&engine, id).await, Ended::Release(wait) if wait > Duration::from_secs(3600))
    );
    stage.end_child(replay, "succeeded", None).await;
    stage.collect().await;
    let (left, undispatched) = stage.due(id).await;
    assert!(left <= 0 && undispatched, "slept through: {left} ms, {undispatched}");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.result, Some(json!({ "states": ["succeeded"] })));
}

#[tokio::test]
async fn a_parent_that_turns_back_ends_a_child_that_is_replayed_too() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![parent(&log)]);
    for running in [false, true] {
        let id = stage.enqueue().await;
        assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
        let children = stage.children_of(id).await;
        for (child, state) in children.iter().zip(["dead", "succeeded", "succeeded"]) {
            stage.end_child(*child, state, None).await;
        }
        stage.collect().await;
        let replay = stage.replay(children[0]).await;
        if running {
            sqlx::query("UPDATE jobs SET state = 'running', worker = 'w' WHERE id = $1")
                .bind(replay.0)
                .execute(stage.postgres.pool())
                .await
                .unwrap();
        }
        assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
        if running {
            let Ended::Release(wait) = stage.deliver(&engine, id).await else { panic!("not put off") };
            assert!(wait > Duration::from_secs(500), "delivered again and again: {wait:?}");
            let asked: bool =
                sqlx::query_scalar("SELECT cancel_requested_at IS NOT NULL FROM jobs WHERE id = $1")
                    .bind(replay.0)
                    .fetch_one(stage.postgres.pool())
                    .await
                    .unwrap();
            assert!(asked, "the replay runs on");
            stage.end_child(replay, "cancelled", None).await;
            stage.collect().await;
            assert!(stage.due(id).await.0 <= 0, "not woken by its end");
        }
        assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
        for job in [id, replay] {
            assert_eq!(stage.job(job).await.state, "cancelled", "running: {running}");
        }
    }
}

#[tokio::test]
async fn the_children_of_a_batchs_member_count_by_their_parents_end_and_are_cancelled_by_it() {
    let (stage, log) = (Stage::new().await, Log::default());
    let engine = stage.saga(vec![parent(&log)]);
    let tenant = TenantId::new("acme").unwrap();
    let begun = async || {
        let member = NewJob::new(KIND, queue_name(), tenant.clone(), json!({}));
        let after = NewJob::new("after", QueueName::new("after").unwrap(), tenant.clone(), json!({}));
        let batch = NewBatch {
            id: BatchId::new(),
            tenant: tenant.clone(),
            name: "outer".to_owned(),
            parent: None,
            callback: Some(Callback { on: CallbackOn::Success, job: after }),
        };
        stage.postgres.create_batch(&batch, std::slice::from_ref(&member), true, true).await.unwrap();
        assert!(matches!(stage.deliver(&engine, member.id).await, Ended::Release(_)));
        (batch.id, member.id, stage.children_of(member.id).await)
    };
    let view = async |id| stage.postgres.batch(id, None).await.unwrap().unwrap();

    // The parent says what a dead child means.
    let (outer, id, children) = begun().await;
    stage.end_child(children[0], "dead", None).await;
    for child in &children[1..] {
        stage.end_child(*child, "succeeded", None).await;
    }
    stage.collect().await;
    assert_eq!(view(outer).await.finished_at, None, "the parent has not ended");
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    stage.collect().await;
    let seen = view(outer).await;
    assert_eq!((seen.total, seen.succeeded, seen.failed), (1, 1, 0));
    assert!(seen.called_at.is_some());

    let (outer, id, children) = begun().await;
    let cancel = async || {
        for batch in stage.postgres.batches_to_cancel(BatchId(uuid::Uuid::nil()), 10).await.unwrap() {
            stage.postgres.cancel_members(batch, uuid::Uuid::nil(), 100).await.unwrap();
        }
    };
    assert_eq!(stage.postgres.cancel_batch(outer, None).await.unwrap(), Changed::Done);
    cancel().await;
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)), "its children have not ended");
    cancel().await;
    stage.collect().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    stage.collect().await;
    for job in children.into_iter().chain([id]) {
        assert_eq!(stage.job(job).await.state, "cancelled");
    }
    let seen = view(outer).await;
    assert_eq!((seen.total, seen.cancelled, seen.finished_at.is_some()), (1, 1, true));
}

#[tokio::test]
async fn a_batchs_cancel_leaves_a_member_past_its_pivot_alone() {
    let (stage, log) = (Stage::new().await, Log::default());
    let later = StepError::rate_limited("busy", "not now", Duration::from_secs(3600));
    let pays = Do::new(&log, "pays", move |_, _| {
        let later = later.clone();
        async move { Err(later) }.boxed()
    });
    let engine = stage.engine([Flow { version: 1, steps: vec![pays.boxed()], pivot: 0 }]);
    let tenant = TenantId::new("acme").unwrap();
    let member = NewJob::new(KIND, queue_name(), tenant.clone(), json!({}));
    let batch =
        NewBatch { id: BatchId::new(), tenant, name: "payments".to_owned(), parent: None, callback: None };
    stage.postgres.create_batch(&batch, std::slice::from_ref(&member), true, true).await.unwrap();
    assert!(matches!(stage.deliver(&engine, member.id).await, Ended::Release(_)));
    assert_eq!(stage.postgres.cancel(member.id, None).await.unwrap(), Cancel::PastPivot);
    assert_eq!(stage.postgres.cancel_batch(batch.id, None).await.unwrap(), Changed::Done);
    stage.postgres.cancel_members(batch.id, uuid::Uuid::nil(), 100).await.unwrap();
    assert_eq!(stage.job(member.id).await.cancel_requested_at, None);
    assert!(stage.due(member.id).await.0 > 3_000_000, "not when the provider asked for it");
}

#[tokio::test]
async fn protocol_02_a_zombie_neither_waits_nor_enqueues_children_nor_keeps_data() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    // The first delivery stops in `tell`, and goes on when its successor has the job.
    let (reached, go_on) = (Arc::clone(&at), Arc::new(Notify::new()));
    let resume = Arc::clone(&go_on);
    let heard: Log = Log::default();
    let answers = Arc::clone(&heard);
    let tell = Do::new(&log, "tell", move |ctx, _| {
        if ctx.worker != WorkerId::new("w") || ctx.job.deliveries > 1 {
            return async { Ok(()) }.boxed();
        }
        let (reached, resume, answers) = (Arc::clone(&reached), Arc::clone(&resume), Arc::clone(&answers));
        let run = ctx.run();
        let (id, saga) = (ctx.job.id, ctx.saga_id);
        async move {
            reached.notify_one();
            resume.notified().await;
            let lost = [
                ctx.sleep("t", Duration::ZERO).await.unwrap_err().to_string(),
                ctx.signal::<Value>("s", Duration::ZERO).await.unwrap_err().to_string(),
                ctx.children("c", &[Child::new("part", json!({}))]).await.unwrap_err().to_string(),
                ctx.cancel_children("c").await.unwrap_err().to_string(),
            ];
            let mut lines = answers.lock().unwrap();
            lines.extend(lost);
            lines.push(format!("{id} {saga} {}", run.fence.0));
            Ok(())
        }
        .boxed()
    });
    let tell = Do { commits: Commits::Data, ..tell };
    let engine = stage.saga(vec![tell.boxed(), asks(&log, Duration::from_secs(600))]);
    let id = stage.enqueue().await;
    let zombie = stage.begin(&engine, id, "w").await;
    at.notified().await;
    stage.reap(&zombie.lease).await;
    let successor = stage.begin(&engine, id, "successor").await;
    assert!(matches!(successor.ended.await.unwrap(), Ended::Release(_)));
    stage.reap(&successor.lease).await;
    let data: Value =
        sqlx::query_scalar("SELECT data FROM sagas").fetch_one(stage.postgres.pool()).await.unwrap();
    go_on.notify_one();
    assert_eq!(zombie.ended.await.unwrap(), Ended::Abandoned);
    drop(zombie.cancel);
    let lines = take(&heard);
    assert_eq!(lines.len(), 5);
    assert!(lines[..4].iter().all(|line| line.contains("lease was lost")), "{lines:?}");
    let waits: Vec<String> =
        sqlx::query_scalar("SELECT kind FROM saga_waits").fetch_all(stage.postgres.pool()).await.unwrap();
    assert_eq!(waits, ["signal"], "only the successor's");
    assert!(stage.children_of(id).await.is_empty());
    // `keep`, `begin_pivot` and `suspend` refuse it, too.
    let saga = stage.postgres.sagas_of(id).await.unwrap().remove(0);
    let run = sagas::stores::postgres::ending::Run {
        job_id: id,
        fence: sagas::Fence(1),
        saga_id: Some(saga.id),
        worker: WorkerId::new("w"),
        started_at: chrono::Utc::now(),
    };
    let other = json!("the zombie's");
    // Its job runs again, under a higher fence.
    sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    let third = stage.begin(&engine, id, "third").await;
    assert!(!stage.postgres.keep(&run, 7, &other).await.unwrap());
    assert_eq!(stage.postgres.begin_pivot(&run, 7, &other).await.unwrap(), None);
    let none: &[String] = &[];
    assert_eq!(
        stage.postgres.suspend(&run, Duration::ZERO, Some((7, &other, none)), &[]).await.unwrap(),
        None
    );
    assert!(matches!(third.ended.await.unwrap(), Ended::Release(_)));
    let (now, next): (Value, i16) =
        sqlx::query_as("SELECT data, next_step FROM sagas").fetch_one(stage.postgres.pool()).await.unwrap();
    assert_eq!((now, next), (data, 1));
    drop(stage.services);
}

#[tokio::test]
async fn a_run_whose_pivot_may_have_taken_effect_only_goes_forward() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let reached = Arc::clone(&at);
    // The first worker dies right after the effect; then the store has a bad moment; then it works.
    let pivot = Do::new(&log, "pivot", move |ctx, _| match ctx.job.deliveries {
        1 => {
            reached.notify_one();
            never()
        }
        2 => async { Err(StepError::transient("busy", "busy")) }.boxed(),
        _ => async { Ok(()) }.boxed(),
    });
    let steps = vec![Do::fine(&log, "first").boxed(), pivot.boxed()];
    let engine = stage.engine([Flow { version: 1, steps, pivot: 1 }]);
    let id = stage.enqueue().await;
    stage.crash(&engine, id, &at).await;
    assert_eq!(stage.postgres.cancel(id, None).await.unwrap(), Cancel::PastPivot);
    // As if it had been asked for just before the pivot began.
    sqlx::query("UPDATE jobs SET cancel_requested_at = now() WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    assert!(matches!(stage.deliver(&engine, id).await, Ended::Release(_)));
    stage.wait_until_due(id).await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("succeeded", 0));
    assert_eq!(take(&log), ["first", "pivot", "pivot", "pivot"]);
}

#[tokio::test]
async fn a_pivot_does_not_begin_when_a_person_wants_the_end_and_one_that_refuses_is_undone() {
    let (stage, log) = (Stage::new().await, Log::default());
    let refuses = Do::new(&log, "pivot", |_, _| async { Err(StepError::permanent("no", "no")) }.boxed());
    let pool = stage.postgres.pool().clone();
    // Asked for while the step before runs, and this worker has not heard of it.
    let first = Do::new(&log, "first", move |ctx, _| {
        let (pool, id) = (pool.clone(), ctx.job.id.0);
        async move {
            sqlx::query("UPDATE jobs SET cancel_requested_at = now() WHERE id = $1 AND max_attempts = 1")
                .bind(id)
                .execute(&pool)
                .await
                .unwrap();
            Ok(())
        }
        .boxed()
    });
    let engine = stage.engine([Flow { version: 1, steps: vec![first.boxed(), refuses.boxed()], pivot: 1 }]);
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), ["first", "pivot", "undo first {}"]);
    assert_eq!(stage.job(id).await.state, "dead");

    let id = stage.enqueue().await;
    sqlx::query("UPDATE jobs SET max_attempts = 1 WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(stage.deliver(&engine, id).await, Ended::Ack);
    assert_eq!(take(&log), ["first", "undo first {}"]);
    assert_eq!(stage.job(id).await.state, "cancelled");
}

#[tokio::test]
async fn a_run_is_continued_by_the_definition_that_began_it_or_waits_for_it() {
    let (stage, log, at) = (Stage::new().await, Log::default(), Arc::new(Notify::new()));
    let old = |hang: bool| {
        let reached = Arc::clone(&at);
        let last = Do::new(&log, "last", move |_, _| {
            if hang {
                reached.notify_one();
                return never();
            }
            async { Ok(()) }.boxed()
        });
        let first = Do { commits: Commits::Data, ..Do::fine(&log, "first") };
        Flow { version: 1, steps: vec![first.boxed(), last.boxed()], pivot: 2 }
    };
    let new = || Flow {
        version: 2,
        steps: ["first", "inserted", "last"].map(|name| Do::fine(&log, name).boxed()).into(),
        pivot: 3,
    };
    let id = stage.enqueue().await;
    stage.crash(&stage.engine([old(true)]), id, &at).await;
    assert_eq!(take(&log), ["first", "last"]);

    // A worker that has the new definition alone puts it back, and says why.
    let Ended::Release(wait) = stage.deliver(&stage.engine([new()]), id).await else {
        panic!("not put back")
    };
    assert_eq!(wait, Duration::from_secs(10));
    assert_eq!(take(&log), <[String; 0]>::default());
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 0));
    let why = job.last_error.unwrap();
    assert!(why.contains("begun by v1") && why.contains("knows v2"), "{why}");

    // One that has both finishes it by the old one, and begins others by the new one.
    sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    let both = stage.engine([new(), old(false)]);
    assert_eq!(stage.deliver(&both, id).await, Ended::Ack);
    assert_eq!(take(&log), ["last"]);
    assert_eq!(stage.job(id).await.state, "succeeded");
    let id = stage.enqueue().await;
    assert_eq!(stage.deliver(&both, id).await, Ended::Ack);
    assert_eq!(take(&log), ["first", "inserted", "last"]);
    assert_eq!(stage.postgres.sagas_of(id).await.unwrap()[0].definition_version, 2);
}

#[test]
fn a_definition_that_contradicts_itself_is_refused_at_the_start() {
    let log = Log::default();
    let refused = |steps: Vec<Arc<dyn Step<Value>>>, pivot| {
        let saga = std::panic::AssertUnwindSafe(Flow { version: 1, steps, pivot });
        let refused = std::panic::catch_unwind(move || {
            let saga = saga;
            drop(Registry::default().with(saga.0));
        });
        *refused.unwrap_err().downcast::<String>().unwrap()
    };
    let fine = |name| Do::fine(&log, name).boxed();
    let commits = |name, commits| Do { commits, ..Do::fine(&log, name) }.boxed();
    let arm = |name| Arm { name, tries: 1, log: Arc::clone(&log), act: nothing() };
    assert!(refused(vec![fine("a"), fine("a")], 1).contains("two steps are called \"a\""));
    let group = || Arc::new(Group::new("g").with(arm("a"))) as Arc<dyn Step<Value>>;
    assert!(refused(vec![fine("a"), group()], 2).contains("two steps are called \"a\""));
    assert!(refused(vec![fine("b"), group()], 1).contains("can't be the pivot"));
    assert!(refused(vec![fine("a"), commits("b", Commits::Begin)], 1).contains("is not first"));
    assert!(refused(vec![commits("a", Commits::End), fine("b")], 1).contains("is not last"));
}
