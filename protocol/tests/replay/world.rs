//! The real queue and ledger behind the model's actions.

use std::{sync::Arc, time::Duration};

use devstack::testing::TestServices;
use protocol::{Action, Entry, JOBS, Outcome, RowState, State, WORKERS};
use queue::{
    Beat, Envelope, Epoch, JobId, LeaseRef, Place, Pushed, Queue, QueueConfig, QueueName, TenantId, WorkerId,
};
use sagas::{
    coalescing::Batch,
    kinds,
    stores::postgres::{
        Postgres, PostgresConfig,
        accept::{Accepted, NewJob},
        ending::{GivenBack, Run, Verdict},
        ledger::Cancel,
        publish::{Condition, Publish, PublishBatch, Published},
        stage::{NewSaga, NewVersion, Stage, StageBatch},
        take::{Take, TakeBatch, TakeItem, TakenJob},
    },
};
use serde_json::json;
use uuid::Uuid;

const TENANT: &str = "acme";
const HOUR: Duration = Duration::from_secs(3600);
const HOUR_MS: i64 = 3_600_000;

/// A migrated ledger with the tests' tenant.
pub async fn ledger(services: &TestServices) -> Postgres {
    let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
    postgres.migrate_up().await.unwrap();
    postgres.create_tenant(TENANT).await.unwrap();
    postgres
}

/// What a worker has in its memory of one claimed job.
struct Held {
    lease: LeaseRef,
    job: Option<TakenJob>,
    later: bool,
}

/// One trace's part of the stores: a prefix and two jobs of its own.
pub struct World {
    postgres: Postgres,
    queue: Queue,
    redis: redis::aio::MultiplexedConnection,
    /// Redis' clock.
    now_ms: i64,
    jobs: Vec<NewJob>,
    /// The stage that began each job's saga; its data would be in the saga's log.
    stages: [Option<Arc<Stage>>; JOBS],
    /// What the reconciler has read.
    read: [Option<Envelope>; JOBS],
    /// What the last cancel answered.
    cancelled: [Option<Cancel>; JOBS],
    workers: [[Option<Held>; JOBS]; WORKERS],
}

impl World {
    pub async fn new(services: &TestServices, postgres: Postgres, seed: u64) -> Self {
        let url = services.redis_queue().url().to_owned();
        let redis =
            redis::Client::open(url.as_str()).unwrap().get_multiplexed_async_connection().await.unwrap();
        let config = QueueConfig { url, prefix: format!("trace{seed}"), ..QueueConfig::default() };
        let jobs = (0..JOBS)
            .map(|job| {
                let payload = json!({ "document": format!("{seed}-{job}"), "text": "some text" });
                let document = kinds::document_of("ingest", &payload);
                // A queue of its own: the model's claims choose a job.
                let queue = QueueName::new(format!("q{job}")).unwrap();
                NewJob { document, ..NewJob::new("ingest", queue, TenantId::new(TENANT).unwrap(), payload) }
            })
            .collect();
        Self {
            postgres,
            queue: Queue::connect(config).await.unwrap(),
            redis,
            now_ms: chrono::Utc::now().timestamp_millis(),
            jobs,
            stages: Default::default(),
            read: Default::default(),
            cancelled: Default::default(),
            workers: Default::default(),
        }
    }

    /// Leaves nothing to the relays of later traces.
    pub async fn tidy(&self) {
        sqlx::query("UPDATE jobs SET dispatched_at = now() WHERE dispatched_at IS NULL")
            .execute(self.postgres.pool())
            .await
            .unwrap();
    }

    fn queue(&self) -> Queue {
        self.queue.at(self.now_ms)
    }

    fn id(&self, job: usize) -> JobId {
        self.jobs[job].id
    }

    fn name(&self, job: usize) -> QueueName {
        self.jobs[job].queue.clone()
    }

    /// Does an action; what it was answered, in the model's words.
    pub async fn act(&mut self, action: Action) -> Outcome {
        match action {
            Action::Accept { job, dispatched } => {
                let answer = self.postgres.accept(&self.jobs[job..=job], dispatched).await.unwrap();
                assert_eq!(answer, [Accepted::New(self.id(job))]);
                Outcome::Done
            }
            Action::Push { job } => {
                let new = &self.jobs[job];
                let envelope = Envelope {
                    id: new.id,
                    ..Envelope::new(new.kind.clone(), new.queue.clone(), new.tenant.clone())
                };
                self.push(envelope).await
            }
            Action::Relay { job } => {
                let id = self.id(job);
                let batch = self.postgres.undispatched(10, &[], &[]).await.unwrap();
                let envelope =
                    batch.envelopes.iter().find(|envelope| envelope.id == id).expect("to be relayed");
                let outcome = self.push(envelope.clone()).await;
                if matches!(self.place(job).await, Some(Place::Scheduled)) {
                    self.queue().forget(&[(self.name(job), id)]).await.unwrap();
                    self.push(envelope.clone()).await;
                }
                batch.done(&[id]).await.unwrap();
                outcome
            }
            Action::Read { job } => {
                let id = self.id(job);
                let after = Uuid::from_u128(id.0.as_u128() - 1);
                let page = self.postgres.unfinished(after, 1, Duration::ZERO).await.unwrap();
                self.read[job] = page.settled.into_iter().find(|envelope| envelope.id == id);
                assert!(self.read[job].is_some(), "the reconciler doesn't see the job");
                Outcome::Done
            }
            Action::Reconcile { job } => {
                let envelope = self.read[job].take().unwrap();
                let there = (envelope.queue.clone(), envelope.id);
                if self.queue().missing(&[there]).await.unwrap().is_empty() {
                    return Outcome::Present;
                }
                self.push(envelope).await
            }
            Action::Reap { job } => {
                assert_eq!(self.queue().reap(&self.name(job)).await.unwrap(), [self.id(job)]);
                Outcome::Done
            }
            Action::Promote { job } => {
                assert_eq!(self.queue().promote(&self.name(job)).await.unwrap(), 1);
                Outcome::Done
            }
            Action::Cancel { job } => {
                let answer = self.postgres.cancel(self.id(job), None).await.unwrap();
                self.cancelled[job] = Some(answer);
                match answer {
                    Cancel::Cancelled => Outcome::Ended,
                    Cancel::Requested => Outcome::Requested,
                    Cancel::PastPivot | Cancel::Ended | Cancel::Unknown => Outcome::TooLate,
                }
            }
            Action::Forget { job } => {
                self.tell_queue(job).await;
                Outcome::Done
            }
            Action::FlushAll => {
                redis::cmd("FLUSHALL").exec_async(&mut self.redis).await.unwrap();
                Outcome::Done
            }
            Action::Crash { worker } => {
                self.workers[worker] = Default::default();
                Outcome::Done
            }
            Action::TickRedis => {
                self.now_ms += 2 * HOUR_MS;
                Outcome::Done
            }
            Action::TickPostgres => {
                sqlx::query("UPDATE jobs SET run_at = now() WHERE id = ANY($1) AND run_at > now()")
                    .bind(self.jobs.iter().map(|job| job.id.0).collect::<Vec<_>>())
                    .execute(self.postgres.pool())
                    .await
                    .unwrap();
                Outcome::Done
            }
            Action::Claim { worker, job } => {
                let claims = self.queue().claim(&self.name(job), &worker_id(worker), 1).await.unwrap();
                assert_eq!(claims.len(), 1, "nothing to claim");
                assert_eq!(claims[0].envelope.id, self.id(job));
                self.workers[worker][job] =
                    Some(Held { lease: claims[0].lease_ref(), job: None, later: false });
                Outcome::Done
            }
            Action::Pause { .. } | Action::Resume { .. } | Action::LosePush { .. } => Outcome::Done,
            Action::Save | Action::Restart | Action::Restore { .. } => unreachable!("not in these traces"),
            Action::Take { worker, job }
            | Action::Write { worker, job }
            | Action::Finish { worker, job }
            | Action::Return { worker, job, .. }
            | Action::Release { worker, job }
            | Action::Ack { worker, job }
            | Action::Heartbeat { worker, job } => {
                let mut held = self.workers[worker][job].take().expect("a held job");
                let (outcome, keep) = self.work(worker, job, &mut held, action).await;
                self.workers[worker][job] = keep.then_some(held);
                outcome
            }
        }
    }

    async fn work(&mut self, worker: usize, job: usize, held: &mut Held, action: Action) -> (Outcome, bool) {
        let lease = held.lease.clone();
        match action {
            Action::Take { .. } => {
                let batch = TakeBatch::new(self.postgres.clone(), worker_id(worker));
                let item = TakeItem { id: self.id(job), fast: None };
                match batch.flush(&[item]).await.unwrap().remove(0) {
                    Take::Taken(taken) => {
                        held.job = Some(*taken);
                        (Outcome::Granted, true)
                    }
                    Take::Gone => (Outcome::Gone, true),
                    Take::NotYet(_) => {
                        held.later = true;
                        (Outcome::NotYet, true)
                    }
                }
            }
            Action::Write { .. } => {
                let stage = Arc::new(stage_of(held.job.as_ref().unwrap()));
                let batch = StageBatch(self.postgres.clone());
                let written = batch.flush(&[Arc::clone(&stage)]).await.unwrap() == [true];
                if written {
                    self.stages[job] = Some(stage);
                }
                (if written { Outcome::Written } else { Outcome::Refused }, written)
            }
            Action::Finish { .. } => {
                let taken = held.job.as_ref().unwrap();
                let stage = self.stages[job].as_ref().unwrap();
                let publish = Arc::new(publish_of(taken, stage));
                match PublishBatch(self.postgres.clone()).flush(&[publish]).await.unwrap().remove(0) {
                    Published::Yes => (Outcome::Succeeded, true),
                    Published::LeaseLost => (Outcome::Refused, false),
                    Published::Superseded => panic!("superseded by nothing"),
                    Published::Cancelled => {
                        let run = run_of(taken, Some(stage.saga.id), worker);
                        let ended = self.postgres.finish(&run, &Verdict::Cancelled, &[]).await.unwrap();
                        assert!(ended, "the fence refused a cancel that it had let pass");
                        (Outcome::Cancelled, true)
                    }
                }
            }
            Action::Return { later, .. } => {
                let taken = held.job.as_ref().unwrap();
                let run = run_of(taken, self.stages[job].as_ref().map(|stage| stage.saga.id), worker);
                let delay = if later { HOUR } else { Duration::ZERO };
                // A run that has begun isn't ended by whoever takes it next.
                let why = if run.saga_id.is_some() { GivenBack::Later } else { GivenBack::Asked };
                let written = self.postgres.release(&run, delay, why).await.unwrap();
                held.later = written.is_some_and(|wait| !wait.is_zero());
                (if written.is_some() { Outcome::Written } else { Outcome::Refused }, written.is_some())
            }
            Action::Release { .. } => {
                let delay = if held.later { HOUR } else { Duration::ZERO };
                let ours = self.queue().release(&[(lease, delay)]).await.unwrap() == [true];
                (if ours { Outcome::Ours } else { Outcome::NotOurs }, false)
            }
            Action::Ack { .. } => {
                let ours = self.queue().ack(&[lease]).await.unwrap() == [true];
                (if ours { Outcome::Ours } else { Outcome::NotOurs }, false)
            }
            Action::Heartbeat { .. } => {
                let waited = self.place(job).await.is_some();
                match self.queue().heartbeat(&[lease]).await.unwrap()[0] {
                    Beat::Extended => (Outcome::Extended, true),
                    Beat::Lost => (Outcome::Lost, false),
                    Beat::Reregistered => {
                        // As the heartbeat's thread does: the lease belongs to this life of the data now.
                        let key = format!("{{{}:{}:0}}", self.queue.config().prefix, self.name(job));
                        let data: String = redis::cmd("HGET")
                            .arg(key)
                            .arg("epoch")
                            .query_async(&mut self.redis)
                            .await
                            .unwrap();
                        held.lease.epoch =
                            Epoch { data: data.into(), run: Arc::clone(&held.lease.epoch.run) };
                        (if waited { Outcome::TakenOver } else { Outcome::Restored }, true)
                    }
                }
            }
            _ => unreachable!("not a worker's action"),
        }
    }

    /// As `Client::tell_queue` of the producer does after a cancel.
    async fn tell_queue(&mut self, job: usize) {
        let (id, name) = (self.id(job), self.name(job));
        let answer = self.cancelled[job].take().unwrap();
        let waits = self.postgres.job(id, None).await.unwrap().unwrap().state == "waiting";
        if answer == Cancel::Requested && !waits {
            return;
        }
        self.queue().forget(&[(name, id)]).await.unwrap();
        if answer == Cancel::Requested
            && let Some(envelope) = self.postgres.envelope(id).await.unwrap()
        {
            self.push(envelope).await;
        }
    }

    async fn push(&self, mut envelope: Envelope) -> Outcome {
        // The ledger's *later* is Redis' *later*; their clocks have nothing to do with each other here.
        envelope.run_at_ms = envelope.run_at_ms.map(|_| self.now_ms + HOUR_MS);
        match self.queue().push(&[envelope]).await.unwrap()[0] {
            Pushed::Queued => Outcome::Queued,
            Pushed::Present => Outcome::Present,
            refused @ (Pushed::Full | Pushed::QueueFull | Pushed::TenantFull | Pushed::Draining) => {
                panic!("{refused:?}")
            }
        }
    }

    async fn place(&self, job: usize) -> Option<Place> {
        self.queue().places(&[(self.name(job), self.id(job))]).await.unwrap()[0]
    }

    /// Where model and reality disagree.
    pub async fn differences(&self, state: &State) -> Vec<String> {
        let mut differences = Vec::new();
        for (index, model) in state.jobs.iter().enumerate() {
            let place = self.place(index).await;
            let agree = match (model.entry, place) {
                (None, None)
                | (Some(Entry::Waiting), Some(Place::Waiting))
                | (Some(Entry::Scheduled { .. }), Some(Place::Scheduled)) => true,
                (Some(Entry::Leased { expired, .. }), Some(Place::Leased { left_ms: Some(left) })) => {
                    expired == (left <= 0)
                }
                _ => false,
            };
            if !agree {
                differences.push(format!(
                    "job {index}: the model's Redis has {:?}, the real one {place:?}",
                    model.entry
                ));
            }
            let row = self.row(index).await;
            let expected = match model.row.state {
                RowState::Absent => None,
                state => Some((
                    match state {
                        RowState::Waiting => "waiting",
                        RowState::Running => "running",
                        RowState::Succeeded => "succeeded",
                        _ => "cancelled",
                    }
                    .to_owned(),
                    i64::from(model.row.fence),
                    state != RowState::Waiting || model.row.due,
                    model.row.dispatched,
                    model.row.cancel,
                    model.row.saga,
                )),
            };
            if row != expected {
                differences.push(format!(
                    "job {index} (state, fence, due, dispatched, cancel, saga): the model's row is {expected:?}, the real one {row:?}"
                ));
            }
        }
        differences
    }

    async fn row(&self, job: usize) -> Option<(String, i64, bool, bool, bool, bool)> {
        sqlx::query_as(
            "SELECT state, fence, state <> 'waiting' OR run_at <= now(), dispatched_at IS NOT NULL,
                    cancel_requested_at IS NOT NULL,
                    EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id AND s.state IN ('running', 'compensating'))
             FROM jobs j WHERE id = $1",
        )
        .bind(self.id(job).0)
        .fetch_optional(self.postgres.pool())
        .await
        .unwrap()
    }
}

fn worker_id(worker: usize) -> WorkerId {
    WorkerId::new(format!("w{worker}"))
}

fn run_of(job: &TakenJob, saga_id: Option<Uuid>, worker: usize) -> Run {
    Run {
        job_id: job.id,
        fence: job.fence,
        saga_id,
        worker: worker_id(worker),
        started_at: chrono::Utc::now(),
    }
}

fn stage_of(job: &TakenJob) -> Stage {
    Stage {
        saga: NewSaga {
            id: Uuid::now_v7(),
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
            document_id: job.document_id.unwrap(),
            doc_order: job.doc_order.unwrap(),
            title: None,
            body: "some text".to_owned(),
            metadata: json!({}),
            content_hash: vec![1; 32],
            model: "hash".to_owned(),
            dimensions: 3,
            collection: "c".to_owned(),
            chunks: vec!["some text".to_owned()],
        },
    }
}

fn publish_of(job: &TakenJob, stage: &Stage) -> Publish {
    Publish {
        job_id: job.id,
        fence: job.fence,
        saga_id: stage.saga.id,
        version: stage.version.id,
        document_id: stage.version.document_id,
        condition: Condition::Order(stage.version.doc_order),
        vectors_hash: vec![2; 32],
        result: json!({}),
        steps: vec![],
        next_step: 4,
        grace: HOUR,
    }
}
