//! A batch of 5,000 jobs over a fleet whose workers, each of which is a relay and a collector, too, are killed at random.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use e2e::{Fleet, LONG, TENANT, wait_until};
use producer::{CallbackOn, NewJob};
use queue::TenantId;
use serde_json::{Value, json};

const MEMBERS: usize = 5000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_17_5000_members_over_workers_killed_at_random_count_exactly_and_call_back_once() {
    let fleet = Fleet::start().await;
    // The table in which the steps of `probe` leave their effects.
    sqlx::query(
        "CREATE TABLE effects (
            seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job uuid NOT NULL, step text NOT NULL, key text NOT NULL,
            fence bigint NOT NULL, change integer NOT NULL)",
    )
    .execute(fleet.postgres.pool())
    .await
    .unwrap();
    sqlx::query("CREATE INDEX effects_key ON effects (key)").execute(fleet.postgres.pool()).await.unwrap();
    // The kills in the middle of a fold are sure; those by the test hit whatever is under way.
    let builder = |fleet: &Fleet| {
        fleet.worker().concurrency(16).queues(&["probe"]).faults("collector.fold.inside=kill*2")
    };
    let mut workers: Vec<_> = (0..3).map(|_| builder(&fleet).start()).collect();
    let members: Vec<NewJob> = (0..MEMBERS).map(|no| fleet.job("probe", json!({ "no": no }))).collect();
    let callback = fleet.job("probe", json!({ "mark": "callback" }));
    let client = fleet.client();
    let made = client
        .batch(TenantId::new(TENANT).unwrap(), "five thousand")
        .add(members)
        .callback(CallbackOn::Complete, callback)
        .seal()
        .await
        .unwrap();
    assert_eq!(made.jobs.iter().filter(|job| job.is_ok()).count(), MEMBERS);
    let mut kills = 0;
    for done in [500, 1500, 2500, 3500, 4500] {
        wait_until(&format!("{done} members have ended"), LONG, async || {
            // Those that a fault point killed come back, as under any supervisor.
            for worker in &mut workers {
                if !worker.alive() {
                    *worker = builder(&fleet).start();
                }
            }
            let view = client.batch_state(made.id, None).await.unwrap().unwrap();
            if view.succeeded >= done { Ok(()) } else { Err(format!("{view:?}")) }
        })
        .await;
        workers[kills % 3].kill9().await;
        workers[kills % 3] = builder(&fleet).start();
        kills += 1;
    }
    let callback = made.callback.unwrap();
    wait_until("the callback has succeeded", LONG, async || {
        for worker in &mut workers {
            if !worker.alive() {
                *worker = builder(&fleet).start();
            }
        }
        match fleet.postgres.job(callback, None).await.map_err(|e| e.to_string())? {
            Some(job) if job.state == "succeeded" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(fleet.fired("collector.fold.inside") >= 1, "no collector died in a fold");
    let view = client.batch_state(made.id, None).await.unwrap().unwrap();
    // The ledger's own rows are the measure: a member that a starved machine let die is a failure, and counted as one.
    let real: (i64, i64, i64, i64) = sqlx::query_as(
        "SELECT count(*), count(*) FILTER (WHERE state = 'succeeded'), count(*) FILTER (WHERE state IN ('dead', 'parked')),
                count(*) FILTER (WHERE state = 'cancelled') FROM jobs WHERE batch_id = $1",
    )
    .bind(made.id.0)
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    assert_eq!((view.total, view.succeeded, view.failed, view.cancelled), real);
    assert_eq!((real.0, real.1 + real.2), (MEMBERS as i64, MEMBERS as i64));
    assert_eq!((view.state.as_str(), view.callback_job), ("finished", Some(callback.0)));
    let calls: Vec<Value> = sqlx::query_scalar("SELECT payload FROM jobs WHERE payload ? 'mark'")
        .fetch_all(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(calls.len(), 1, "{calls:?}");
    assert_eq!(calls[0]["batch"]["succeeded"], json!(real.1));
    // The three steps of each that succeeded have counted once, and the callback's.
    let effects: (i64, i64) = sqlx::query_as(
        "SELECT sum(net)::bigint, max(net)::bigint FROM (
             SELECT sum(e.change) AS net FROM effects e JOIN jobs j ON j.id = e.job AND j.state = 'succeeded'
             GROUP BY e.job, e.step) once",
    )
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    assert_eq!(effects, (3 * (real.1 + 1), 1));
    let redelivered = fleet.postgres.job_counts(None).await.unwrap().redelivered;
    println!("{kills} workers killed from outside, {redelivered} members delivered again");
    for worker in workers {
        assert!(tokio::time::timeout(Duration::from_secs(60), worker.terminate()).await.is_ok());
    }
    fleet.end();
}
