//! The engine over a saga as a user writes it: attempts of a kind, waits that errors ask for, jobs put off, results that are
//! too large. Deliveries are real: a queue's lease and a ledger's fence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use devstack::testing::TestServices;
use queue::{Heartbeat, HeartbeatConfig, JobId, Queue, QueueConfig, QueueName, TenantId, WorkerId};
use sagas::{
    Class, Dependency, StepError,
    coalescing::Batch,
    encryption::{Keyring, new_key},
    engine::{
        Breakers, Delivery, Ended, Engine, EngineSettings, JobRetry, Registry, RetryPolicy, Saga, Step,
        StepContext,
    },
    stores::postgres::{
        Postgres, PostgresConfig,
        accept::NewJob,
        compensation::Turn,
        ending::{GivenBack, Run, Verdict},
        inspect::{JobView, SagaFilter},
        ledger::Cancel,
        take::{Take, TakeItem, TakenJob},
    },
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const KIND: &str = "scripted";
const PANICS: &str = "a defect";
/// The data for which there is no result.
const RESULT_PANICS: &str = "a defect in the result";
/// When a job is looked at again that can't be run or read.
const UNREADABLE_FOR: Duration = Duration::from_secs(10);

/// What the steps of a test's saga do, one entry for each call of `work`, which panics at [`PANICS`]; then they succeed.
type Script = Arc<Mutex<VecDeque<Result<Value, StepError>>>>;

struct Scripted {
    steps: Vec<Arc<dyn Step<Value>>>,
    retry: JobRetry,
    pivot: usize,
    repeatable: bool,
}

impl Saga for Scripted {
    type Data = Value;
    fn kind(&self) -> &'static str {
        KIND
    }
    fn version(&self) -> i32 {
        1
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
    fn prepare(&self, job: &TakenJob) -> Result<Value, StepError> {
        if job.payload == json!("bad") {
            return Err(StepError::permanent("bad_payload", "bad"));
        }
        assert!(job.payload != PANICS, "{}", job.payload);
        Ok(json!({}))
    }
    fn repeatable(&self) -> bool {
        self.repeatable
    }
    fn attempts(&self) -> JobRetry {
        self.retry
    }
    fn result(&self, data: &Value) -> Value {
        assert!(*data != RESULT_PANICS, "{data}");
        data.clone()
    }
}

/// Takes a line of the script; counts its undoings.
struct Work {
    name: &'static str,
    script: Script,
    undone: Arc<Mutex<usize>>,
}

#[async_trait]
impl Step<Value> for Work {
    fn name(&self) -> &'static str {
        self.name
    }
    fn retry(&self) -> RetryPolicy {
        RetryPolicy { tries: 1, ..RetryPolicy::FORWARD }
    }
    async fn execute(&self, _: &StepContext, data: &mut Value) -> Result<(), StepError> {
        let line = self.script.lock().unwrap().pop_front();
        if let Some(line) = line {
            *data = line?;
        }
        assert!(*data != PANICS, "{data}");
        Ok(())
    }
    async fn compensate(&self, _: &StepContext, _: &Value) -> Result<(), StepError> {
        *self.undone.lock().unwrap() += 1;
        Ok(())
    }
}

struct Stage {
    postgres: Postgres,
    queue: Queue,
    heartbeat: Heartbeat,
    engine: Engine,
    undone: Arc<Mutex<usize>>,
    _services: TestServices,
}

fn name() -> QueueName {
    QueueName::new(KIND).unwrap()
}

impl Stage {
    /// A saga of two steps, `work` and `pivot`, of which `pivot` is the pivot.
    async fn new(lines: Vec<Result<Value, StepError>>, retry: JobRetry, settings: EngineSettings) -> Self {
        Self::of(lines, retry, settings, false, 1).await
    }

    /// The same, as a saga whose `prepare` gives the same each time.
    async fn repeatable(lines: Vec<Result<Value, StepError>>) -> Self {
        Self::of(lines, JobRetry::default(), EngineSettings::default(), true, 1).await
    }

    /// The same without a pivot: nothing is said of a run before it ends.
    async fn repeatable_without_pivot(lines: Vec<Result<Value, StepError>>) -> Self {
        Self::of(lines, JobRetry::default(), EngineSettings::default(), true, 2).await
    }

    async fn of(
        lines: Vec<Result<Value, StepError>>,
        retry: JobRetry,
        settings: EngineSettings,
        repeatable: bool,
        pivot: usize,
    ) -> Self {
        let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant("acme").await.unwrap();
        let config = QueueConfig { url: services.redis_queue().url().to_owned(), ..QueueConfig::default() };
        let queue = Queue::connect(config.clone()).await.unwrap();
        let heartbeat = Heartbeat::spawn(config, HeartbeatConfig::default()).unwrap();
        let (script, undone): (Script, _) = (Arc::new(Mutex::new(lines.into())), Arc::default());
        let step = |name| {
            Arc::new(Work { name, script: Arc::clone(&script), undone: Arc::clone(&undone) })
                as Arc<dyn Step<Value>>
        };
        let saga = Scripted { steps: vec![step("work"), step("pivot")], retry, pivot, repeatable };
        let breakers = Breakers::new([], CancellationToken::new());
        let registry = Registry::default().with(saga);
        let engine = Engine::new(postgres.clone(), breakers, WorkerId::new("w"), settings, registry);
        Self { postgres, queue, heartbeat, engine, undone, _services: services }
    }

    /// Who ends the run that a take began.
    fn run_of(taken: &TakenJob) -> Run {
        Run {
            job_id: taken.id,
            fence: taken.fence,
            saga_id: taken.saga.as_ref().map(|open| open.id),
            worker: WorkerId::new("w"),
            started_at: chrono::Utc::now(),
        }
    }

    /// Waits until so many of this database's sessions wait for a lock.
    async fn wait_for_lock(&self, sessions: i64) {
        let begun = std::time::Instant::now();
        loop {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
            let waiting: i64 = sqlx::query_scalar(sql).fetch_one(self.postgres.pool()).await.unwrap();
            if waiting == sessions {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{waiting} sessions wait for a lock");
            tokio::task::yield_now().await;
        }
    }

    async fn enqueue(&self, change: impl FnOnce(&mut NewJob)) -> JobId {
        let mut job = NewJob::new(KIND, name(), TenantId::new("acme").unwrap(), json!({}));
        change(&mut job);
        self.postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
        job.id
    }

    /// A job with a payload that nobody here has the key of; and the ledger with the key.
    async fn enqueue_sealed(&self) -> (JobId, Postgres) {
        let keys = Keyring::parse(&format!("a:{}", new_key())).unwrap();
        let sealing = self.postgres.clone().with_cipher(keys.into());
        let secret = NewJob::new(KIND, name(), TenantId::new("acme").unwrap(), json!({ "card": 1 }));
        sealing.accept(std::slice::from_ref(&secret), true).await.unwrap();
        (secret.id, sealing)
    }

    async fn make_due(&self, id: JobId) {
        sqlx::query("UPDATE jobs SET run_at = now() WHERE id = $1 AND state = 'waiting'")
            .bind(id.0)
            .execute(self.postgres.pool())
            .await
            .unwrap();
    }

    /// One delivery, during which a person cancels the job. It is to come back at once.
    async fn deliver_cancelled(&self, id: JobId) {
        let job = self.claimed(id).await;
        assert_eq!(self.postgres.cancel(id, None).await.unwrap(), Cancel::Requested);
        assert_eq!(self.run(job).await, Ended::Release(Duration::ZERO));
    }

    /// One delivery, whenever the job would be due.
    async fn deliver(&self, id: JobId) -> Ended {
        self.make_due(id).await;
        self.deliver_when_due(id).await
    }

    async fn deliver_when_due(&self, id: JobId) -> Ended {
        let job = self.claimed(id).await;
        self.run(job).await
    }

    async fn claimed(&self, id: JobId) -> (Arc<TakenJob>, queue::Lease) {
        let envelope = self.postgres.envelope(id).await.unwrap().expect("an unfinished job");
        self.queue.forget(&[(name(), id)]).await.unwrap();
        self.queue.push(&[envelope]).await.unwrap();
        let claim = self.queue.claim(&name(), &WorkerId::new("w"), 1).await.unwrap().remove(0);
        let lease = self.heartbeat.register(&claim);
        (Arc::new(self.take(id).await), lease)
    }

    async fn run(&self, (job, lease): (Arc<TakenJob>, queue::Lease)) -> Ended {
        let (cancel, stop) = (CancellationToken::new(), CancellationToken::new());
        let ended = self.engine.run(Delivery { job, lease: lease.clone(), cancel, stop }).await;
        self.queue.ack(&[lease.lease_ref()]).await.unwrap();
        ended
    }

    async fn take(&self, id: JobId) -> TakenJob {
        match self.engine.take().flush(&[TakeItem { id, fast: None }]).await.unwrap().remove(0) {
            Take::Taken(job) => *job,
            other => panic!("not taken: {other:?}"),
        }
    }

    /// As though so many seconds had passed since a worker said first that it can't run the job, which one has.
    async fn nobody_could_run_it_for(&self, id: JobId, seconds: f64) {
        let sql = "UPDATE jobs SET unroutable_since = now() - make_interval(secs => $2)
                   WHERE id = $1 AND unroutable_since IS NOT NULL";
        let set = sqlx::query(sql).bind(id.0).bind(seconds).execute(self.postgres.pool()).await.unwrap();
        assert_eq!(set.rows_affected(), 1, "no worker has said so");
    }

    async fn cancel(&self, id: JobId) {
        sqlx::query("UPDATE jobs SET cancel_requested_at = now() WHERE id = $1")
            .bind(id.0)
            .execute(self.postgres.pool())
            .await
            .unwrap();
    }

    async fn job(&self, id: JobId) -> JobView {
        self.postgres.job(id, None).await.unwrap().unwrap()
    }

    /// Each run of a job that the log has a row of.
    async fn logged(&self, id: JobId) -> Vec<(Uuid, String)> {
        sqlx::query_as("SELECT id, state FROM sagas WHERE job_id = $1 ORDER BY created_at")
            .bind(id.0)
            .fetch_all(self.postgres.pool())
            .await
            .unwrap()
    }
}

/// A worker that knows no kind.
fn stranger(postgres: Postgres, settings: EngineSettings) -> Engine {
    let breakers = Breakers::new([], CancellationToken::new());
    Engine::new(postgres, breakers, WorkerId::new("w"), settings, Registry::default())
}

/// JSON that can be written, and that nobody can read.
fn too_deep() -> Value {
    (0..200).fold(json!(1), |inner, _| json!([inner]))
}

fn fails() -> Result<Value, StepError> {
    Err(StepError::transient("busy", "busy"))
}

#[tokio::test]
async fn a_kind_has_attempts_and_waits_of_its_own() {
    let retry = JobRetry {
        max_attempts: Some(3),
        base: Some(Duration::from_secs(100)),
        cap: Some(Duration::from_secs(150)),
    };
    let stage = Stage::new((0..9).map(|_| fails()).collect(), retry, EngineSettings::default()).await;
    let mut longest = Duration::ZERO;
    for _ in 0..2 {
        let id = stage.enqueue(|job| job.max_attempts = 10).await;
        for attempt in 1..=2 {
            match stage.deliver(id).await {
                Ended::Release(wait) => {
                    let most = if attempt == 1 { 100 } else { 150 };
                    assert!(wait <= Duration::from_secs(most), "attempt {attempt}: {wait:?}");
                    longest = longest.max(wait);
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(stage.job(id).await.attempts, attempt);
        }
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        assert_eq!(stage.job(id).await.state, "dead");
    }
    // The engine's own base is a second: four random waits of up to 150 s are not all below that.
    assert!(longest > Duration::from_secs(1), "{longest:?}");
    // A job that allows fewer has fewer.
    let id = stage.enqueue(|job| job.max_attempts = 1).await;
    stage.deliver(id).await;
    assert_eq!(stage.job(id).await.state, "dead");
}

#[tokio::test]
async fn a_step_that_panics_has_failed_and_is_charged_as_any_other() {
    let script = vec![Ok(json!(PANICS)), Ok(json!(PANICS))];
    let stage = Stage::new(script, JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|job| job.max_attempts = 2).await;
    assert!(matches!(stage.deliver(id).await, Ended::Release(_)));
    assert_eq!((stage.job(id).await.attempts, *stage.undone.lock().unwrap()), (1, 1));
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    assert_eq!(job.state, "dead");
    let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
    assert!(letter.class == "panicked" && letter.reason.contains("a defect"), "{letter:?}");
}

#[tokio::test]
async fn a_panic_before_the_first_step_or_about_the_result_is_a_failure_too() {
    let no_result = || vec![Ok(json!(RESULT_PANICS))];
    for stage in [
        Stage::new(no_result(), JobRetry::default(), EngineSettings::default()).await,
        Stage::repeatable(no_result()).await,
    ] {
        let id = stage.enqueue(|job| job.max_attempts = 1).await;
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        assert_eq!((stage.job(id).await.state.as_str(), *stage.undone.lock().unwrap()), ("dead", 1));
        // At the first delivery, and at one that follows a worker's death.
        for lost in [false, true] {
            let id = stage.enqueue(|job| job.payload = json!(PANICS)).await;
            if lost {
                stage.take(id).await;
            }
            assert_eq!(stage.deliver(id).await, Ended::Ack);
            let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
            assert!(letter.class == "panicked" && letter.reason.contains("a defect"), "{letter:?}");
        }
    }
}

#[tokio::test]
async fn a_run_whose_preparation_kills_its_workers_is_parked() {
    let stage = Stage::repeatable(vec![]).await;
    let id = stage.enqueue(|_| ()).await;
    stage.take(id).await;
    // As often again as makes it poison.
    sqlx::query("UPDATE jobs SET lost_alone = $2 WHERE id = $1")
        .bind(id.0)
        .bind(EngineSettings::default().delivery_limit * 2)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "parked");
}

#[tokio::test]
async fn the_wait_that_an_error_asks_for_is_kept() {
    let wish = Duration::from_secs(1234);
    let lines = vec![Err(StepError::rate_limited("quota", "come back later", wish))];
    let retry = JobRetry { cap: Some(Duration::from_secs(1)), ..JobRetry::default() };
    let stage = Stage::new(lines, retry, EngineSettings::default()).await;
    let id = stage.enqueue(|_| ()).await;
    assert_eq!(stage.deliver(id).await, Ended::Release(wish));
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 1));
    let attempts = stage.postgres.attempts(id).await.unwrap();
    assert_eq!(attempts[0].class, Class::RateLimited.name());
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "succeeded");
}

#[tokio::test]
async fn a_step_that_puts_its_job_off_is_not_charged_and_goes_on_where_it_was() {
    let lines = vec![
        Ok(json!({ "seen": 1 })),
        Err(StepError::Snooze(Duration::from_secs(600))),
        Err(StepError::Snooze(Duration::MAX)),
    ];
    let stage = Stage::new(lines, JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|job| job.max_attempts = 1).await;
    assert_eq!(stage.deliver(id).await, Ended::Release(Duration::from_secs(600)));
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 0));
    assert!(job.run_at > chrono::Utc::now() + Duration::from_secs(500), "{}", job.run_at);
    assert!(
        matches!(stage.deliver(id).await, Ended::Release(wait) if wait > Duration::from_secs(300 * 24 * 3600))
    );
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    // The first step ran once: its data were kept.
    assert_eq!((job.state.as_str(), job.attempts, job.result), ("succeeded", 0, Some(json!({ "seen": 1 }))));
    assert_eq!(*stage.undone.lock().unwrap(), 0);
    assert_eq!(stage.postgres.sagas_of(id).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_result_up_to_the_limit_is_kept_and_a_larger_one_is_an_error_for_good_that_names_it() {
    let settings = EngineSettings::default();
    assert_eq!(settings.max_result, 65_536);
    // A JSON string: two quotes and the text.
    let text = |bytes: usize| Value::String("x".repeat(bytes - 2));
    let lines = vec![Ok(text(65_536)), Ok(text(65_536)), Ok(text(65_537))];
    let stage = Stage::new(lines, JobRetry::default(), settings).await;
    let fits = stage.enqueue(|_| ()).await;
    stage.deliver(fits).await;
    assert_eq!(stage.job(fits).await.result, Some(text(65_536)));
    // Seen before the pivot: undone, and dead at once.
    let large = stage.enqueue(|_| ()).await;
    assert_eq!(stage.deliver(large).await, Ended::Ack);
    let job = stage.job(large).await;
    assert_eq!((job.state.as_str(), job.attempts, job.result), ("dead", 1, None));
    let letter = stage.postgres.dead_letter(large.0).await.unwrap().unwrap();
    assert_eq!(letter.class, "result_too_large");
    assert!(letter.reason.contains("65537 bytes") && letter.reason.contains("65536"), "{}", letter.reason);
    assert_eq!(*stage.undone.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_result_that_grows_too_large_after_the_pivot_parks_the_job_because_its_effects_stand() {
    let lines = vec![Ok(json!(1)), Ok(Value::String("x".repeat(70_000)))];
    let stage = Stage::new(lines, JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|_| ()).await;
    stage.deliver(id).await;
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.result), ("parked", None));
    let error = job.last_error.unwrap();
    assert!(error.contains("70002 bytes") && error.contains("65536"), "{error}");
    assert_eq!(*stage.undone.lock().unwrap(), 0);
}

#[tokio::test]
async fn an_error_with_a_nul_ends_its_attempt_like_any_other() {
    // Postgres takes no NUL, neither in a text nor in JSON.
    let lines =
        vec![Err(StepError::transient("odd", "a\0b")), Err(StepError::permanent("odd", "c\0d: e\0f"))];
    let stage = Stage::new(lines, JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|_| ()).await;
    assert!(matches!(stage.deliver(id).await, Ended::Release(_)));
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("waiting", 1));
    assert_eq!(job.last_error.as_deref(), Some("a\u{fffd}b"));
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "dead");
    let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
    assert_eq!((letter.class.as_str(), letter.reason.as_str()), ("odd", "c\u{fffd}d: e\u{fffd}f"));
    assert_eq!(*stage.undone.lock().unwrap(), 2);
}

#[tokio::test]
async fn a_run_whose_data_the_log_refuses_is_undone_and_dead() {
    for (data, class) in [(json!({ "name": "a\0b" }), "refused_data"), (too_deep(), "result_too_deep")] {
        let stage = Stage::new(vec![Ok(data)], JobRetry::default(), EngineSettings::default()).await;
        let id = stage.enqueue(|_| ()).await;
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        let job = stage.job(id).await;
        assert_eq!((job.state.as_str(), job.attempts), ("dead", 1));
        let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
        assert_eq!(letter.class, class, "{}", letter.reason);
        assert_eq!(*stage.undone.lock().unwrap(), 1);
        assert_eq!(stage.postgres.sagas_of(id).await.unwrap()[0].state, "compensated");
    }
}

#[tokio::test]
async fn protocol_12_a_run_that_puts_itself_off_with_data_that_the_log_refuses_does_again_what_it_does_not_know()
 {
    // Postgres refuses the one, nobody could read the other.
    for odd in [json!("a\0b"), too_deep()] {
        let wait = Duration::from_secs(600);
        let lines = vec![Ok(odd), Err(StepError::Snooze(wait)), Ok(json!("c")), Ok(json!("d"))];
        let stage = Stage::repeatable_without_pivot(lines).await;
        let id = stage.enqueue(|_| ()).await;
        assert_eq!(stage.deliver(id).await, Ended::Release(wait));
        let job = stage.job(id).await;
        assert_eq!((job.state.as_str(), job.attempts), ("waiting", 0));
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        let job = stage.job(id).await;
        assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(json!("d"))));
    }
}

#[tokio::test]
async fn protocol_12_a_run_whose_log_has_data_too_deep_to_be_read_back_is_parked() {
    let later = Err(StepError::Snooze(Duration::from_secs(60)));
    let stage = Stage::new(vec![Ok(json!(1)), later], JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|_| ()).await;
    assert!(matches!(stage.deliver(id).await, Ended::Release(_)));
    // As a release kept them that did not look.
    let changed = sqlx::query("UPDATE sagas SET data = $2 WHERE job_id = $1").bind(id.0).bind(too_deep());
    assert_eq!(changed.execute(stage.postgres.pool()).await.unwrap().rows_affected(), 1);
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    let error = job.last_error.unwrap_or_default();
    assert_eq!(job.state, "parked", "{error}");
    assert!(error.contains("data can't be read") && error.contains("recursion limit"), "{error}");
}

#[tokio::test]
async fn past_the_pivot_neither_an_error_with_a_nul_nor_data_with_one_keep_a_run_from_being_parked() {
    for (data, error) in [("b", "c\0d"), ("b\0", "cd")] {
        let lines = vec![Ok(json!(data)), Err(StepError::permanent("odd", error))];
        // The first step is the pivot.
        let stage = Stage::of(lines, JobRetry::default(), EngineSettings::default(), false, 0).await;
        let id = stage.enqueue(|_| ()).await;
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        let job = stage.job(id).await;
        assert_eq!((job.state.as_str(), job.last_error), ("parked", Some(error.replace('\0', "\u{fffd}"))));
        // It goes on, and not back, where the log has it.
        let saga = stage.postgres.sagas_of(id).await.unwrap().remove(0);
        stage.postgres.retry_parked(saga.id, "someone").await.unwrap();
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        let job = stage.job(id).await;
        let result = if error == "cd" { json!({}) } else { json!(data) };
        assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(result)));
        assert_eq!(*stage.undone.lock().unwrap(), 0);
    }
}

#[tokio::test]
async fn protocol_15_a_begun_run_whose_kind_nobody_knows_any_more_is_parked_with_its_effects() {
    let later = Err(StepError::Snooze(Duration::from_secs(60)));
    let stage =
        Stage::new(vec![Ok(json!({ "did": 1 })), later], JobRetry::default(), EngineSettings::default())
            .await;
    let id = stage.enqueue(|_| ()).await;
    assert!(matches!(stage.deliver(id).await, Ended::Release(_)));
    let settings = EngineSettings { unroutable_after: Duration::ZERO, ..EngineSettings::default() };
    let stranger = stranger(stage.postgres.clone(), settings);
    let mut stage = stage;
    let engine = std::mem::replace(&mut stage.engine, stranger);
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    let error = job.last_error.unwrap_or_default();
    assert_eq!(job.state, "parked", "{error}");
    assert!(error.contains("scripted") && error.contains("begun by v1"), "{error}");
    let saga = stage.postgres.sagas_of(id).await.unwrap().remove(0);
    assert_eq!(saga.state, "parked");
    // It goes on where it was, where its kind is known.
    stage.postgres.retry_parked(saga.id, "someone").await.unwrap();
    stage.engine = engine;
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(json!({ "did": 1 }))));
    assert_eq!(*stage.undone.lock().unwrap(), 0);
}

#[tokio::test]
async fn a_repeatable_run_begins_with_its_take_and_is_the_same_run_after_a_crash() {
    let stage = Stage::repeatable(vec![Err(StepError::LeaseLost), Ok(json!({ "seen": 2 }))]).await;
    let id = stage.enqueue(|_| ()).await;
    // Its worker loses it in the first step, of which the log knows nothing.
    assert_eq!(stage.deliver(id).await, Ended::Abandoned);
    let begun = stage.postgres.sagas_of(id).await.unwrap().remove(0);
    assert_eq!((begun.state.as_str(), begun.definition_version, begun.next_step), ("running", 1, 0));
    assert_eq!(stage.logged(id).await, [], "the job says all that there is to say of it");
    assert_eq!(
        stage.postgres.sagas(&SagaFilter { limit: 5, ..SagaFilter::default() }).await.unwrap().len(),
        1
    );
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.result), ("succeeded", Some(json!({ "seen": 2 }))));
    let runs = stage.postgres.sagas_of(id).await.unwrap();
    assert_eq!(runs.len(), 1, "{runs:?}");
    assert_eq!((runs[0].id, runs[0].state.as_str()), (begun.id, "completed"));
}

#[tokio::test]
async fn a_run_that_succeeds_at_once_gets_its_only_row_with_its_end() {
    let stage = Stage::repeatable_without_pivot(vec![Ok(json!({ "seen": 1 }))]).await;
    let id = stage.enqueue(|_| ()).await;
    let taken = stage.take(id).await;
    assert_eq!(taken.saga.unwrap().id, id.0);
    assert_eq!(stage.logged(id).await, []);
    // As if this take's answer had been lost: the next one finds the run.
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let straight = stage.enqueue(|_| ()).await;
    assert_eq!(stage.deliver(straight).await, Ended::Ack);
    for id in [id, straight] {
        assert_eq!(stage.logged(id).await, [(id.0, "completed".to_owned())]);
        let steps = stage.postgres.steps(id.0).await.unwrap();
        assert_eq!(steps.iter().map(|step| step.step_name.as_str()).collect::<Vec<_>>(), ["work", "pivot"]);
        let run = stage.postgres.sagas_of(id).await.unwrap().remove(0);
        assert_eq!((run.definition_version, run.kind.as_str(), run.tenant.as_str()), (1, KIND, "acme"));
        assert!(run.created_at <= steps[0].started_at && run.finished_at.unwrap() >= run.created_at);
    }
}

#[tokio::test]
async fn a_run_gets_its_row_with_whatever_is_first_said_of_it() {
    let lines = vec![Err(StepError::Snooze(Duration::from_secs(60))), fails()];
    let stage = Stage::repeatable_without_pivot(lines).await;
    let (put_off, failed) = (stage.enqueue(|_| ()).await, stage.enqueue(|job| job.max_attempts = 1).await);
    assert!(matches!(stage.deliver(put_off).await, Ended::Release(_)));
    assert_eq!(stage.logged(put_off).await, [(put_off.0, "running".to_owned())]);
    // Cancelled now, its steps are undone before it ends: a run without a row would have had nothing to undo.
    assert_eq!(stage.postgres.cancel(put_off, None).await.unwrap(), Cancel::Requested);
    assert_eq!(stage.deliver(put_off).await, Ended::Ack);
    assert_eq!(std::mem::take(&mut *stage.undone.lock().unwrap()), 2);
    assert_eq!(stage.logged(put_off).await, [(put_off.0, "compensated".to_owned())]);

    assert_eq!(stage.deliver(failed).await, Ended::Ack);
    assert_eq!(*stage.undone.lock().unwrap(), 2);
    assert_eq!(stage.logged(failed).await, [(failed.0, "compensated".to_owned())]);
    let letter = stage.postgres.dead_letter(failed.0).await.unwrap().unwrap();
    assert_eq!(letter.saga_id, Some(failed.0));
    // A job that was given back before it ran has nothing to undo.
    let idle = stage.enqueue(|_| ()).await;
    let taken = stage.take(idle).await;
    let run = Run { saga_id: None, ..Stage::run_of(&taken) };
    assert!(stage.postgres.release(&run, Duration::ZERO, GivenBack::Asked).await.unwrap().is_some());
    assert_eq!(stage.postgres.cancel(idle, None).await.unwrap(), Cancel::Cancelled);
    assert_eq!(stage.logged(idle).await, []);
}

#[tokio::test]
async fn protocol_14_a_cancel_sees_the_run_that_was_logged_while_it_waited_for_the_job() {
    let stage = Stage::repeatable_without_pivot(vec![]).await;
    let id = stage.enqueue(|_| ()).await;
    let run = Stage::run_of(&stage.take(id).await);
    // The run is put off, which writes its first row; the cancel is asked for before that is committed.
    let mut holder = stage.postgres.begin().await.unwrap();
    sqlx::query("SELECT FROM jobs WHERE id = $1 FOR NO KEY UPDATE")
        .bind(id.0)
        .execute(&mut *holder)
        .await
        .unwrap();
    let postgres = stage.postgres.clone();
    let putting_off =
        tokio::spawn(async move { postgres.suspend(&run, Duration::from_secs(60), None, &[]).await });
    stage.wait_for_lock(1).await;
    let postgres = stage.postgres.clone();
    let cancelling = tokio::spawn(async move { postgres.cancel(id, None).await });
    stage.wait_for_lock(2).await;
    holder.commit().await.unwrap();
    assert!(putting_off.await.unwrap().unwrap().is_some());
    assert_eq!(cancelling.await.unwrap().unwrap(), Cancel::Requested);
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "cancelled");
    assert_eq!(*stage.undone.lock().unwrap(), 2, "its steps may have run");
    assert_eq!(stage.logged(id).await, [(id.0, "compensated".to_owned())]);
}

#[tokio::test]
async fn protocol_06_a_success_that_comes_after_the_run_has_turned_back_is_refused() {
    let stage = Stage::repeatable_without_pivot(vec![]).await;
    let id = stage.enqueue(|_| ()).await;
    let run = Stage::run_of(&stage.take(id).await);
    let verdict = Verdict::Cancelled;
    let turned =
        stage.postgres.begin_compensation(&run, &verdict, "no answer in time", None, 2, 1).await.unwrap();
    assert_eq!(turned, Turn::Back);
    assert!(!stage.postgres.complete(&run, &json!(1), &[]).await.unwrap());
    assert_eq!(stage.job(id).await.state, "running");
    assert_eq!(stage.logged(id).await, [(id.0, "compensating".to_owned())]);
    assert!(stage.postgres.finish(&run, &verdict, &[]).await.unwrap());
    assert_eq!(stage.job(id).await.state, "cancelled");
}

#[tokio::test]
async fn protocol_15_a_repeatable_job_that_nobody_can_read_is_no_run_and_dies_in_time() {
    let settings = EngineSettings { unroutable_after: Duration::ZERO, ..EngineSettings::default() };
    let patient = Stage::repeatable(vec![]).await;
    let hasty = Stage::of(vec![], JobRetry::default(), settings, true, 1).await;
    for stage in [&patient, &hasty] {
        let (secret, _) = stage.enqueue_sealed().await;
        let ended = stage.deliver(secret).await;
        if std::ptr::eq(stage, &raw const hasty) {
            assert_eq!(ended, Ended::Ack);
            let letter = stage.postgres.dead_letter(secret.0).await.unwrap().unwrap();
            assert_eq!(letter.class, "unreadable_payload");
        } else {
            assert!(matches!(ended, Ended::Release(_)), "{ended:?}");
            // It waits for whoever has the key, as a job that nobody has begun: of any version, and without effects.
            assert_eq!(stage.postgres.cancel(secret, None).await.unwrap(), Cancel::Cancelled);
        }
        assert_eq!(stage.logged(secret).await, []);
    }
}

#[tokio::test]
async fn protocol_15_the_clock_of_a_job_that_nobody_can_read_runs_on_until_it_is_dead() {
    let stage = Stage::repeatable(vec![]).await;
    let (secret, _) = stage.enqueue_sealed().await;
    for _ in 0..2 {
        assert_eq!(stage.deliver(secret).await, Ended::Release(UNREADABLE_FOR));
    }
    stage.nobody_could_run_it_for(secret, 1800.0).await;
    assert_eq!(stage.deliver(secret).await, Ended::Release(UNREADABLE_FOR));
    stage.make_due(secret).await;
    let waited = stage.take(secret).await.unroutable_for.expect("the clock was stopped");
    assert!(waited >= Duration::from_secs(1799) && waited < Duration::from_secs(1900), "{waited:?}");
    // That one ended with its worker. A take where the kind is known ends the wait, unless the worker says that it can't read it.
    assert_eq!(stage.take(secret).await.unroutable_for, None);
    assert_eq!(stage.deliver(secret).await, Ended::Release(UNREADABLE_FOR));
    stage.nobody_could_run_it_for(secret, 3595.0).await;
    assert!(matches!(stage.deliver(secret).await, Ended::Release(wait) if wait <= Duration::from_secs(5)));
    stage.nobody_could_run_it_for(secret, 3600.0).await;
    assert_eq!(stage.deliver(secret).await, Ended::Ack);
    let letter = stage.postgres.dead_letter(secret.0).await.unwrap().unwrap();
    assert_eq!(letter.class, "unreadable_payload");
}

#[tokio::test]
async fn protocol_15_a_begun_run_that_nobody_can_read_waits_for_its_key_and_no_clock_runs() {
    let mut stage = Stage::repeatable(vec![]).await;
    let (id, with_key) = stage.enqueue_sealed().await;
    // Of two deliveries the first may have run a step.
    stage.take(id).await;
    assert_eq!(stage.deliver(id).await, Ended::Release(UNREADABLE_FOR));
    sqlx::query("UPDATE jobs SET unroutable_since = unroutable_since - interval '2 h' WHERE id = $1")
        .bind(id.0)
        .execute(stage.postgres.pool())
        .await
        .unwrap();
    // One that has the key, and doesn't know the kind, is the first to say that.
    stage.engine = stranger(with_key, EngineSettings::default());
    assert_eq!(stage.deliver(id).await, Ended::Release(UNREADABLE_FOR));
    assert_eq!(stage.job(id).await.state, "waiting");
    stage.nobody_could_run_it_for(id, 3600.0).await;
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.job(id).await.state, "parked");
}

#[tokio::test]
async fn protocol_14_a_cancel_that_meets_a_delivery_which_ends_in_a_wait_is_not_slept_through() {
    let hour = Duration::from_secs(3600);
    let later = || Err(StepError::rate_limited("quota", "come back later", hour));
    let stage = Stage::new(vec![later(), later()], JobRetry::default(), EngineSettings::default()).await;
    let id = stage.enqueue(|_| ()).await;
    stage.deliver_cancelled(id).await;
    assert_eq!(stage.deliver_when_due(id).await, Ended::Ack);
    let job = stage.job(id).await;
    assert_eq!((job.state.as_str(), job.attempts), ("cancelled", 1));
    // One that nobody here can read has no run: it is given back, and whoever takes it next ends it.
    let (secret, _) = stage.enqueue_sealed().await;
    stage.deliver_cancelled(secret).await;
    assert_eq!(stage.deliver_when_due(secret).await, Ended::Ack);
    assert_eq!(stage.job(secret).await.state, "cancelled");
}

#[tokio::test]
async fn a_take_finds_the_run_that_a_worker_of_an_older_release_began() {
    let stage = Stage::repeatable(vec![]).await;
    let id = stage.enqueue(|_| ()).await;
    stage.take(id).await;
    // It knows nothing of runs without a row.
    let theirs = Uuid::now_v7();
    sqlx::query(
        "INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence) SELECT $2, id, kind, 1, tenant, 'running', 2
         FROM jobs WHERE id = $1",
    )
    .bind(id.0)
    .bind(theirs)
    .execute(stage.postgres.pool())
    .await
    .unwrap();
    assert_eq!(stage.take(id).await.saga.unwrap().id, theirs);
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    assert_eq!(stage.logged(id).await, [(theirs, "completed".to_owned())]);
}

#[tokio::test]
async fn a_repeatable_run_that_no_delivery_logged_is_undone_when_a_step_may_have_run_and_only_then() {
    let stage = Stage::repeatable(vec![Err(StepError::LeaseLost)]).await;
    let (begun, fresh) = (stage.enqueue(|_| ()).await, stage.enqueue(|_| ()).await);
    assert_eq!(stage.deliver(begun).await, Ended::Abandoned);
    for (id, undone) in [(begun, 1), (fresh, 0)] {
        stage.cancel(id).await;
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        assert_eq!(stage.job(id).await.state, "cancelled");
        assert_eq!(std::mem::take(&mut *stage.undone.lock().unwrap()), undone);
        let runs = stage.postgres.sagas_of(id).await.unwrap();
        assert_eq!(runs.iter().map(|run| run.state.as_str()).collect::<Vec<_>>(), ["compensated"]);
    }
}

#[tokio::test]
async fn a_repeatable_run_whose_job_can_not_be_read_ends_dead_with_its_run() {
    let stage = Stage::repeatable(vec![]).await;
    // At the first delivery, and at one that follows a worker's death.
    for lost in [false, true] {
        let id = stage.enqueue(|job| job.payload = json!("bad")).await;
        if lost {
            stage.take(id).await;
        }
        assert_eq!(stage.deliver(id).await, Ended::Ack);
        let letter = stage.postgres.dead_letter(id.0).await.unwrap().unwrap();
        let run = stage.postgres.sagas_of(id).await.unwrap().remove(0);
        assert_eq!((letter.class.as_str(), letter.saga_id), ("bad_payload", Some(run.id)));
        assert_eq!((run.state.as_str(), stage.job(id).await.state.as_str()), ("compensated", "dead"));
    }
}

#[tokio::test]
async fn a_repeatable_job_gets_a_new_run_for_each_attempt() {
    let stage = Stage::repeatable(vec![fails()]).await;
    let id = stage.enqueue(|_| ()).await;
    assert!(matches!(stage.deliver(id).await, Ended::Release(_)));
    assert_eq!(stage.deliver(id).await, Ended::Ack);
    let mut states: Vec<_> =
        stage.postgres.sagas_of(id).await.unwrap().into_iter().map(|run| run.state).collect();
    states.sort();
    assert_eq!(states, ["completed", "compensated"]);
}
