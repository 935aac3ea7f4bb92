//! What a user's step can say and hear while it runs: progress out, and the request to end in.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use queue::{
    Claim, Envelope, Epoch, Heartbeat, HeartbeatConfig, LeaseToken, QueueConfig, QueueName, TenantId,
    WorkerId,
};
use sagas::{
    Dependency, StepError,
    encryption::Keyring,
    engine::{
        Breakers, Delivery, Ended, Engine, EngineSettings, Registry, RunToken, Saga, Step, StepContext,
    },
    stores::postgres::take::TakenJob,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::ledger::{Ledger, TENANT, job};

/// A saga of one step, which is the test's own function.
struct Own(Vec<Arc<dyn Step<()>>>);

struct Run<F>(F);

#[async_trait]
impl<F> Step<()> for Run<F>
where
    F: for<'a> Fn(&'a StepContext) -> futures::future::BoxFuture<'a, Result<(), StepError>> + Send + Sync,
{
    fn name(&self) -> &'static str {
        "run"
    }

    async fn execute(&self, ctx: &StepContext, (): &mut ()) -> Result<(), StepError> {
        (self.0)(ctx).await
    }

    async fn compensate(&self, _: &StepContext, (): &()) -> Result<(), StepError> {
        Ok(())
    }
}

impl Saga for Own {
    type Data = ();

    fn kind(&self) -> &'static str {
        "own"
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<()>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        1
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, _: &TakenJob) -> Result<(), StepError> {
        Ok(())
    }
}

/// An engine that knows `own`, and a delivery of a job of that kind whose lease nobody takes away.
fn engine(
    ledger: &Ledger,
    step: impl for<'a> Fn(&'a StepContext) -> futures::future::BoxFuture<'a, Result<(), StepError>>
    + Send
    + Sync
    + 'static,
) -> Engine {
    let own = Own(vec![Arc::new(Run(step))]);
    let breakers = Breakers::new([], CancellationToken::new());
    let settings = EngineSettings::default();
    Engine::new(
        ledger.postgres.clone(),
        breakers,
        WorkerId::new("w"),
        settings,
        Registry::default().with(own),
    )
}

fn delivery(taken: TakenJob) -> Delivery {
    let config = QueueConfig {
        url: "redis://127.0.0.1:1".to_owned(),
        lease: Duration::from_secs(600),
        ..QueueConfig::default()
    };
    let heartbeat = Heartbeat::spawn(config, HeartbeatConfig { interval: Duration::from_secs(300) }).unwrap();
    let queue = QueueName::new("own").unwrap();
    let envelope = Envelope::new("own", queue.clone(), TenantId::new(TENANT).unwrap());
    let lease = heartbeat.register(&Claim {
        envelope: Arc::new(envelope),
        token: LeaseToken::from("a"),
        partition: 0,
        queue,
        epoch: Epoch { data: "a".into(), run: "b".into() },
        sent_at: Instant::now(),
    });
    Delivery { job: Arc::new(taken), lease, cancel: CancellationToken::new(), stop: CancellationToken::new() }
}

#[tokio::test]
async fn progress_is_written_seldom_and_the_last_word_stands() {
    let ledger = Ledger::start().await;
    let id = ledger.accept(&[job("own", json!({}))]).await[0];
    let engine = engine(&ledger, |ctx| {
        Box::pin(async move {
            for word in 0..300_u32 {
                ctx.progress(u8::try_from(word / 3).unwrap(), format!("word {word}"));
                ctx.pause(Duration::from_millis(4)).await?;
            }
            ctx.progress(100, "last");
            // The job goes on while the last word is on its way.
            ctx.pause(Duration::from_millis(1500)).await
        })
    });
    let taken = ledger.take("w", id).await;
    let begun = Instant::now();
    let running = tokio::spawn(async move { engine.run(delivery(taken)).await });
    let mut seen = BTreeSet::new();
    while !running.is_finished() {
        let view = ledger.postgres.job(id, None).await.unwrap().unwrap();
        seen.extend(view.progress_message);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(running.await.unwrap(), Ended::Ack);
    let most = begun.elapsed().as_millis() / 500 + 2;
    assert!((2..=most).contains(&(seen.len() as u128)), "{} writes, at most {most}: {seen:?}", seen.len());
    let view = ledger.postgres.job(id, None).await.unwrap().unwrap();
    assert_eq!((view.progress, view.progress_message.as_deref()), (Some(100), Some("last")));
}

#[tokio::test]
async fn work_beside_a_step_hears_that_its_run_has_to_end() {
    let ledger = Ledger::start().await;
    let heard: Arc<Mutex<Option<RunToken>>> = Arc::default();
    let given = Arc::clone(&heard);
    let engine = engine(&ledger, move |ctx| {
        let (token, given) = (ctx.token(), Arc::clone(&given));
        Box::pin(async move {
            assert!(!ctx.is_cancelled());
            *given.lock().unwrap() = Some(token.clone());
            // A thread can't be dropped: it has to ask.
            let worked = tokio::task::spawn_blocking(move || {
                let mut rounds = 0_u64;
                while !token.is_cancelled() {
                    std::thread::yield_now();
                    rounds += 1;
                }
                rounds
            });
            assert!(worked.await.unwrap() > 0);
            ctx.cancelled().await;
            ctx.pause(Duration::from_secs(60)).await
        })
    });
    let id = ledger.accept(&[job("own", json!({}))]).await[0];
    let it = delivery(ledger.take("w", id).await);
    let cancel = it.cancel.clone();
    let running = tokio::spawn(async move { engine.run(it).await });
    while heard.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    ledger.postgres.cancel(id, None).await.unwrap();
    // What a worker does when it sees the request.
    cancel.cancel();
    let ended =
        tokio::time::timeout(Duration::from_secs(30), running).await.expect("the thread heard").unwrap();
    assert_eq!(ended, Ended::Ack);
    assert_eq!(ledger.state(id).await.0, "cancelled");
    assert!(heard.lock().unwrap().as_ref().unwrap().is_cancelled());
}

#[tokio::test]
async fn a_job_with_an_unknown_key_goes_back_uncharged_and_says_why() {
    let ledger = Ledger::start().await;
    let key = sagas::encryption::new_key();
    let sealing = ledger.postgres.clone().with_cipher(Keyring::parse(&format!("a:{key}")).unwrap().into());
    let secret = job("own", json!({ "card": 1 }));
    sealing.accept(std::slice::from_ref(&secret), true).await.unwrap();
    let engine = engine(&ledger, |_| Box::pin(async { panic!("no step runs without its payload") }));
    let ended = engine.run(delivery(ledger.take("w", secret.id).await)).await;
    assert!(matches!(ended, Ended::Release(wait) if wait >= Duration::from_secs(1)), "{ended:?}");
    let view = ledger.postgres.job(secret.id, None).await.unwrap().unwrap();
    assert_eq!((view.state.as_str(), view.attempts), ("waiting", 0));
    assert!(view.last_error.unwrap().contains("FLOTILLA_ENCRYPTION_KEYS"));
}

#[tokio::test]
async fn protocol_02_a_zombie_says_nothing_about_a_job_that_another_runs() {
    let ledger = Ledger::start().await;
    let key = sagas::encryption::new_key();
    let sealing = ledger.postgres.clone().with_cipher(Keyring::parse(&format!("a:{key}")).unwrap().into());
    let secret = job("own", json!({ "card": 1 }));
    sealing.accept(std::slice::from_ref(&secret), true).await.unwrap();
    let engine = engine(&ledger, |_| Box::pin(async { panic!("no step runs without its payload") }));
    let late = delivery(ledger.take("w", secret.id).await);
    ledger.take("another", secret.id).await;
    assert_eq!(engine.run(late).await, Ended::Abandoned);
    assert_eq!(ledger.postgres.job(secret.id, None).await.unwrap().unwrap().last_error, None);
}
