//! Recurring jobs: exactly one job for each tick, whoever dies and however many loops run, and what becomes of ticks that
//! were missed. Time is moved, never waited for.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use chrono::{DateTime, Utc};
use producer::{
    CatchUp, Cron, EnqueueError, MaintainSettings, NewSchedule, Schedule, ScheduleError, Schedules,
};
use queue::{QueueName, QueuePolicy};
use sagas::stores::postgres::schedules::tick_job;
use serde_json::json;
use support::{Stage, eventually, quick, tenant};

const MINUTE: Duration = Duration::from_secs(60);

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).unwrap().with_timezone(&Utc)
}

/// The day of these tests, some time ago: so every job is due at once.
fn clock(time: &str) -> DateTime<Utc> {
    at(&format!("2026-03-10T{time}Z"))
}

fn report(name: &str, cron: &str) -> NewSchedule {
    NewSchedule::new(tenant("acme"), name, "report", json!({ "of": name }), cron)
}

struct Times {
    stage: Stage,
    schedules: Schedules,
    cron: Cron,
}

impl Times {
    async fn new() -> Self {
        let stage = Stage::new().await;
        let schedules = stage.client.schedules();
        let cron = Cron::new(stage.postgres.clone(), MINUTE);
        Self { stage, schedules, cron }
    }

    async fn make(&self, time: &str, new: &NewSchedule) -> Schedule {
        self.schedules.at(clock(time)).create(new).await.unwrap()
    }

    /// Rounds at a time until nothing is due any more.
    async fn tick(&self, time: &str) {
        while self.cron.at(clock(time)).round().await.unwrap().schedules > 0 {}
    }

    /// As [`tick`](Self::tick), until so many jobs are there: a lock that was dropped is gone a moment later.
    async fn tick_until(&self, time: &str, jobs: i64) {
        eventually(|| async {
            self.tick(time).await;
            let rows = self.stage.rows().await;
            if rows >= jobs { Ok(()) } else { Err(format!("{rows} of {jobs} jobs")) }
        })
        .await;
    }

    /// The ticks, which are the jobs' `run_at`, of all jobs.
    async fn made(&self) -> Vec<String> {
        let made: Vec<DateTime<Utc>> = sqlx::query_scalar("SELECT run_at FROM jobs ORDER BY run_at")
            .fetch_all(self.stage.postgres.pool())
            .await
            .unwrap();
        made.iter().map(|tick| tick.format("%H:%M").to_string()).collect()
    }

    async fn get(&self, name: &str) -> Schedule {
        self.schedules.get(&tenant("acme"), name).await.unwrap()
    }
}

#[tokio::test]
async fn a_tick_makes_one_job_when_it_is_due_and_not_before() {
    let times = Times::new().await;
    let schedule = times.make("08:00:00", &report("hourly", "0 * * * *")).await;
    assert_eq!(schedule.next_tick_at, Some(clock("09:00:00")));
    times.tick("08:59:59").await;
    assert_eq!(times.made().await, [""; 0]);
    times.tick("09:00:00").await;
    times.tick("09:00:01").await;
    assert_eq!(times.made().await, ["09:00"]);
    let schedule = times.get("hourly").await;
    assert_eq!(schedule.next_tick_at, Some(clock("10:00:00")));
    assert_eq!(schedule.last_tick_at, Some(clock("09:00:00")));
    let job = tick_job(schedule.id, clock("09:00:00"));
    assert_eq!(schedule.last_job, Some(job.0));
    let seen = times.stage.postgres.job(job, Some("acme")).await.unwrap().unwrap();
    assert_eq!(
        (seen.kind.as_str(), seen.queue.as_str(), seen.state.as_str()),
        ("report", "report", "waiting")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_17_many_loops_side_by_side_make_one_job_for_each_tick() {
    let times = Times::new().await;
    for number in 0..120 {
        let new = report(&format!("s{number}"), if number % 2 == 0 { "* * * * *" } else { "*/5 * * * *" });
        times.make("08:00:30", &new).await;
    }
    for minute in 1..=10 {
        let now = clock(&format!("08:{minute:02}:00"));
        let loops: Vec<_> = (0..8)
            .map(|_| {
                let cron = times.cron.at(now);
                tokio::spawn(async move { while cron.round().await.unwrap().schedules > 0 {} })
            })
            .collect();
        for one in loops {
            one.await.unwrap();
        }
    }
    // What a loop found in the hands of others was done by them.
    times.tick("08:10:00").await;
    assert_eq!(times.stage.rows().await, 60 * 10 + 60 * 2);
    let doubled: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT FROM jobs GROUP BY payload, run_at HAVING count(*) > 1) AS doubled",
    )
    .fetch_one(times.stage.postgres.pool())
    .await
    .unwrap();
    assert_eq!(doubled, 0);
}

#[tokio::test]
async fn rule_17_a_tick_that_was_not_committed_is_made_by_the_next_loop() {
    let times = Times::new().await;
    times.make("08:00:00", &report("hourly", "0 * * * *")).await;
    // As a loop that dies when it has planned, and before it commits.
    let due = times.stage.postgres.due_schedules(Some(clock("09:00:00")), 10, &[]).await.unwrap();
    assert_eq!(due.schedules.len(), 1);
    drop(due);
    times.tick_until("09:00:02", 1).await;
    assert_eq!(times.made().await, ["09:00"]);
}

#[tokio::test]
async fn rule_17_a_tick_that_comes_again_makes_no_second_job() {
    let times = Times::new().await;
    times.make("08:00:00", &report("hourly", "0 * * * *")).await;
    times.tick("09:00:00").await;
    // As after an old backup of this one row, or a hand in the table.
    sqlx::query("UPDATE schedules SET next_tick_at = $1")
        .bind(clock("09:00:00"))
        .execute(times.stage.postgres.pool())
        .await
        .unwrap();
    times.tick("09:00:30").await;
    assert_eq!(times.made().await, ["09:00"]);
    assert_eq!(times.get("hourly").await.next_tick_at, Some(clock("10:00:00")));
}

#[tokio::test]
async fn rule_17_a_loop_that_hangs_holds_up_none_but_the_schedules_in_its_hand() {
    let times = Times::new().await;
    times.make("08:00:00", &report("first", "0 * * * *")).await;
    let held = times.stage.postgres.due_schedules(Some(clock("09:00:00")), 1, &[]).await.unwrap();
    assert_eq!(held.schedules[0].name, "first");
    times.make("08:00:00", &report("second", "1 9 * * *")).await;
    // Waiting for the row would end with the statement's time-out.
    let round = times.cron.at(clock("09:01:00")).round().await.unwrap();
    assert_eq!((round.schedules, round.enqueued), (1, 1));
    assert_eq!(times.made().await, ["09:01"]);
    drop(held);
    times.tick_until("09:01:00", 2).await;
    assert_eq!(times.made().await, ["09:00", "09:01"]);
}

#[tokio::test]
async fn ten_missed_ticks_are_skipped_stood_for_by_one_or_made_up_for_as_the_policy_says() {
    let times = Times::new().await;
    for (name, catch_up, bound) in [
        ("skip", CatchUp::Skip, 100),
        ("one", CatchUp::One, 100),
        ("all", CatchUp::All, 100),
        ("some", CatchUp::All, 3),
    ] {
        let new = NewSchedule { catch_up, max_catch_up: bound, ..report(name, "0 * * * *") };
        times.make("00:30:00", &new).await;
    }
    // Down from 01:00 to 10:00: ten ticks, the last of them half an hour ago.
    times.tick("10:30:00").await;
    let of = |name: &'static str| {
        let pool = times.stage.postgres.pool().clone();
        async move {
            let ticks: Vec<DateTime<Utc>> =
                sqlx::query_scalar("SELECT run_at FROM jobs WHERE payload ->> 'of' = $1 ORDER BY run_at")
                    .bind(name)
                    .fetch_all(&pool)
                    .await
                    .unwrap();
            ticks.iter().map(|tick| tick.format("%H").to_string()).collect::<Vec<_>>()
        }
    };
    assert_eq!(of("skip").await, [""; 0]);
    assert_eq!(of("one").await, ["10"]);
    assert_eq!(of("all").await, ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10"]);
    assert_eq!(of("some").await, ["08", "09", "10"]);
    for name in ["skip", "one", "all", "some"] {
        assert_eq!(times.get(name).await.next_tick_at, Some(clock("11:00:00")), "{name}");
    }
    // A tick that is on time has its job whatever the policy.
    times.tick("11:00:20").await;
    for name in ["skip", "one", "all", "some"] {
        assert_eq!(of(name).await.last().map(String::as_str), Some("11"), "{name}");
    }
    assert_eq!(times.stage.rows().await, 1 + 2 + 11 + 4);
}

#[tokio::test]
async fn one_job_stands_for_what_was_missed_also_when_it_is_the_tick_that_is_on_time() {
    let times = Times::new().await;
    times.make("08:30:00", &report("hourly", "0 * * * *")).await;
    times.tick("11:00:05").await;
    assert_eq!(times.made().await, ["11:00"]);
}

#[tokio::test]
async fn a_paused_schedule_makes_nothing_and_makes_up_for_nothing_when_it_goes_on() {
    let times = Times::new().await;
    let acme = tenant("acme");
    times.make("08:30:00", &NewSchedule { catch_up: CatchUp::All, ..report("hourly", "0 * * * *") }).await;
    assert!(times.schedules.pause(&acme, "hourly").await.unwrap().paused_at.is_some());
    times.tick("10:30:00").await;
    assert_eq!(times.made().await, [""; 0]);
    let resumed = times.schedules.at(clock("10:30:00")).resume(&acme, "hourly").await.unwrap();
    assert_eq!((resumed.paused_at, resumed.next_tick_at), (None, Some(clock("11:00:00"))));
    times.tick("11:00:00").await;
    assert_eq!(times.made().await, ["11:00"]);
    // To resume what is not paused takes no tick away.
    let resumed = times.schedules.at(clock("12:00:01")).resume(&acme, "hourly").await.unwrap();
    assert_eq!(resumed.next_tick_at, Some(clock("12:00:00")));
}

#[tokio::test]
async fn a_schedule_that_gets_other_times_while_it_is_resumed_goes_on_with_those() {
    let times = Times::new().await;
    let acme = tenant("acme");
    times.make("08:30:00", &report("hourly", "0 * * * *")).await;
    times.schedules.pause(&acme, "hourly").await.unwrap();
    // An update that has not committed yet.
    let mut update = times.stage.postgres.begin().await.unwrap();
    sqlx::query("UPDATE schedules SET cron = '20 * * * *', next_tick_at = $1")
        .bind(clock("10:20:00"))
        .execute(&mut *update)
        .await
        .unwrap();
    let schedules = times.schedules.at(clock("10:00:01"));
    let resumed = tokio::spawn(async move { schedules.resume(&tenant("acme"), "hourly").await });
    eventually(|| async {
        let waiting: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
        )
        .fetch_one(times.stage.postgres.pool())
        .await
        .unwrap();
        if waiting > 0 { Ok(()) } else { Err("it does not wait for the update".to_owned()) }
    })
    .await;
    update.commit().await.unwrap();
    let resumed = resumed.await.unwrap().unwrap();
    assert_eq!((resumed.cron.as_str(), resumed.paused_at), ("20 * * * *", None));
    assert_eq!(resumed.next_tick_at, Some(clock("10:20:00")));
}

#[tokio::test]
async fn an_update_changes_what_is_made_and_loses_no_tick_that_is_due() {
    let times = Times::new().await;
    let mut new = report("hourly", "0 * * * *");
    times.make("08:30:00", &new).await;
    new.payload = json!({ "of": "better" });
    let changed = times.schedules.at(clock("09:00:00.2")).update(&new).await.unwrap();
    assert_eq!(changed.next_tick_at, Some(clock("09:00:00")));
    times.tick("09:00:01").await;
    assert_eq!(times.made().await, ["09:00"]);
    let payload: serde_json::Value =
        sqlx::query_scalar("SELECT payload FROM jobs").fetch_one(times.stage.postgres.pool()).await.unwrap();
    assert_eq!(payload, json!({ "of": "better" }));
    new.cron = "30 9 * * *".to_owned();
    let changed = times.schedules.at(clock("09:00:02")).update(&new).await.unwrap();
    assert_eq!(changed.next_tick_at, Some(clock("09:30:00")));
}

#[tokio::test]
async fn rule_08_the_jobs_of_a_document_schedule_get_their_place_in_the_documents_order() {
    let times = Times::new().await;
    let payload = json!({ "document": "news", "text": "none" });
    let new = NewSchedule::new(tenant("acme"), "news", "ingest", payload, "0 * * * *");
    times.make("08:30:00", &new).await;
    times.stage.client.enqueue(support::ingest("news", "x"), producer::Durability::Durable).await.unwrap();
    times.tick("09:00:00").await;
    times.tick("10:00:00").await;
    let orders: Vec<i64> = sqlx::query_scalar(
        "SELECT doc_order FROM jobs WHERE document_id IS NOT NULL ORDER BY created_at, doc_order",
    )
    .fetch_all(times.stage.postgres.pool())
    .await
    .unwrap();
    assert_eq!(orders, [1, 2, 3]);
}

#[tokio::test]
async fn what_a_tick_could_not_enqueue_is_refused_when_the_schedule_is_made() {
    let times = Times::new().await;
    let refused = |change: fn(&mut NewSchedule)| {
        let mut new = report("x", "0 * * * *");
        change(&mut new);
        let schedules = times.schedules.clone();
        async move { schedules.create(&new).await.unwrap_err() }
    };
    for (change, names) in [
        ((|new| new.cron = "0 25 * * *".into()) as fn(&mut NewSchedule), "cron is "),
        (|new| new.time_zone = "Berlin".into(), "time_zone is \"Berlin\""),
        (|new| new.name = "a b".into(), "name is "),
        (|new| new.max_catch_up = 0, "max_catch_up is 0"),
        (|new| new.kind = "a b".into(), "kind is "),
    ] {
        let error = refused(change).await;
        assert!(matches!(&error, ScheduleError::Invalid(text) if text.starts_with(names)), "{error:?}");
    }
    let error = refused(|new| new.payload = json!([])).await;
    assert!(matches!(error, ScheduleError::Job(EnqueueError::BadRequest { .. })), "{error:?}");
    let error = refused(|new| new.kind = "ingest".into()).await;
    assert!(error.to_string().contains("document"), "{error}");
    let error = refused(|new| new.tenant = tenant("nobody")).await;
    assert!(matches!(error, ScheduleError::Job(EnqueueError::UnknownTenant)), "{error:?}");
    times.make("08:00:00", &report("x", "0 * * * *")).await;
    assert!(matches!(refused(|_| ()).await, ScheduleError::NameTaken(_)));
}

#[tokio::test]
async fn a_tick_makes_no_job_for_a_queue_that_drains_or_is_full_and_says_why() {
    let times = Times::new().await;
    times.make("10:00:30", &report("hourly", "0 * * * *")).await;
    times
        .make(
            "10:00:30",
            &NewSchedule {
                queue: Some(QueueName::new("elsewhere").unwrap()),
                ..report("other", "0 * * * *")
            },
        )
        .await;
    let pool = times.stage.postgres.pool();
    let queue = QueueName::new("report").unwrap();
    let drain = async |draining| {
        let edit = |policy: &mut QueuePolicy| policy.draining = draining;
        times.stage.postgres.edit_queue_policy(&queue, "tester", "queues.test", edit).await.unwrap();
    };
    drain(true).await;
    times.tick("11:00:00").await;
    let drained = times.get("hourly").await;
    assert!(drained.last_error.unwrap().contains("queue report takes no new jobs: it is drained"));
    assert_eq!(drained.next_tick_at, Some(clock("12:00:00")));
    assert_eq!((times.made().await, times.get("other").await.last_error), (vec!["11:00".to_owned()], None));

    // As the relay says that as many jobs wait as may.
    drain(false).await;
    sqlx::query(
        "INSERT INTO refusals (queue, tenant, until) VALUES ('report', 'acme', now() + interval '1 h')",
    )
    .execute(pool)
    .await
    .unwrap();
    times.tick("12:00:00").await;
    assert!(
        times.get("hourly").await.last_error.unwrap().contains("as many jobs wait as may of tenant acme")
    );
    sqlx::query("DELETE FROM refusals").execute(pool).await.unwrap();
    times.tick("13:00:00").await;
    assert_eq!(times.get("hourly").await.last_error, None);
    assert_eq!(times.made().await, ["11:00", "12:00", "13:00", "13:00"]);
}

#[tokio::test]
async fn a_schedule_that_a_process_can_not_read_says_so_and_is_left_to_those_that_can() {
    let times = Times::new().await;
    times.make("08:30:00", &report("odd", "0 * * * *")).await;
    times.make("08:30:00", &report("sound", "0 * * * *")).await;
    // As one that a newer release has made.
    let rewrite = async |cron: &str| {
        sqlx::query("UPDATE schedules SET cron = $1 WHERE name = 'odd'")
            .bind(cron)
            .execute(times.stage.postgres.pool())
            .await
            .unwrap();
    };
    rewrite("whenever").await;
    let round = times.cron.at(clock("09:00:00")).round().await.unwrap();
    assert_eq!((round.enqueued, round.refused), (1, 1));
    let odd = times.get("odd").await;
    assert!(odd.last_error.unwrap().contains("cron is \"whenever\""));
    assert_eq!(odd.next_tick_at, Some(clock("09:00:00")), "the tick is lost for those that can read it");
    // It takes no place in the rounds of that process any more.
    assert_eq!(times.cron.at(clock("09:00:01")).round().await.unwrap().schedules, 0);
    // The newer release reads what this one does not.
    rewrite("0 * * * *").await;
    assert_eq!(times.cron.at(clock("09:00:02")).round().await.unwrap().schedules, 0);
    let newer = Cron::new(times.stage.postgres.clone(), MINUTE);
    assert_eq!(newer.at(clock("09:00:03")).round().await.unwrap().enqueued, 1);
    assert_eq!(times.made().await, ["09:00", "09:00"]);
    let odd = times.get("odd").await;
    assert_eq!((odd.next_tick_at, odd.last_error), (Some(clock("10:00:00")), None));
    // Once its owner has changed it, it is looked at again by all.
    times.schedules.at(clock("09:30:00")).update(&report("odd", "0 * * * *")).await.unwrap();
    assert_eq!(times.cron.at(clock("10:00:00")).round().await.unwrap().enqueued, 2);
}

#[tokio::test]
async fn a_schedule_that_the_ledger_fails_on_keeps_no_other_from_its_tick() {
    let times = Times::new().await;
    let pool = times.stage.postgres.pool();
    let odd = NewSchedule::new(tenant("acme"), "odd", "odd", json!({}), "0 * * * *");
    times.make("08:30:00", &odd).await;
    times.make("08:30:00", &report("sound", "0 * * * *")).await;
    for sql in [
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a test''s'; END $$",
        "CREATE TRIGGER refuse BEFORE INSERT ON jobs FOR EACH ROW WHEN (NEW.kind = 'odd') EXECUTE FUNCTION refuse()",
    ] {
        sqlx::query(sql).execute(pool).await.unwrap();
    }
    let round = times.cron.at(clock("09:00:00")).round().await.unwrap();
    assert_eq!((round.enqueued, round.refused), (1, 1));
    let odd = times.get("odd").await;
    assert!(odd.last_error.unwrap().contains("a test's"));
    assert_eq!(odd.next_tick_at, Some(clock("10:00:00")));
    // With nothing to compare it with it may be the ledger itself: the tick is kept.
    times.schedules.pause(&tenant("acme"), "sound").await.unwrap();
    times.cron.at(clock("10:00:00")).round().await.unwrap_err();
    assert_eq!(times.get("odd").await.next_tick_at, Some(clock("10:00:00")));
    sqlx::query("DROP TRIGGER refuse ON jobs").execute(pool).await.unwrap();
    times.tick_until("10:00:01", 2).await;
    assert_eq!(times.made().await, ["09:00", "10:00"]);
    assert_eq!(times.get("odd").await.last_error, None);
}

/// Sixteen of its jobs fit into what one transaction enqueues.
fn large(name: &str, cron: &str) -> NewSchedule {
    NewSchedule { payload: json!({ "text": "x".repeat(1_000_000) }), ..report(name, cron) }
}

#[tokio::test]
async fn what_is_made_up_for_at_once_is_bounded_in_bytes_for_a_schedule_and_for_a_round() {
    let times = Times::new().await;
    for name in ["a", "b"] {
        let new = NewSchedule { catch_up: CatchUp::All, max_catch_up: 1000, ..large(name, "* * * * *") };
        times.make("08:00:30", &new).await;
    }
    let cron = times.cron.at(clock("18:00:30"));
    // The newest late ticks of one; then those of the other; then the tick on time of both.
    for (schedules, enqueued, caught_up, skipped) in
        [(1, 0, 16, 1), (1, 0, 16, 1), (2, 2, 0, 0), (0, 0, 0, 0)]
    {
        let round = cron.round().await.unwrap();
        assert_eq!(
            (round.schedules, round.enqueued, round.caught_up, round.skipped),
            (schedules, enqueued, caught_up, skipped)
        );
    }
    let made = times.made().await;
    assert_eq!((made.len(), made[0].as_str(), made[33].as_str()), (34, "17:44", "18:00"));
    for name in ["a", "b"] {
        assert_eq!(times.get(name).await.next_tick_at, Some(clock("18:01:00")), "{name}");
    }
}

#[tokio::test]
async fn what_is_made_up_for_at_once_is_bounded_in_jobs_for_a_round() {
    let times = Times::new().await;
    for name in ["a", "b", "c"] {
        let new = NewSchedule { catch_up: CatchUp::All, max_catch_up: 900, ..report(name, "* * * * *") };
        times.make("00:00:30", &new).await;
    }
    // The late ticks, and the one on time.
    let cron = times.cron.at(clock("18:00:30"));
    for (schedules, caught_up) in [(2, 1800), (1, 900), (0, 0)] {
        let round = cron.round().await.unwrap();
        assert_eq!((round.schedules, round.enqueued, round.caught_up), (schedules, schedules, caught_up));
    }
}

#[tokio::test]
async fn ticks_on_time_that_do_not_fit_into_one_round_come_with_the_next() {
    let times = Times::new().await;
    times.make("08:00:20", &large("each", "* * * * * *")).await;
    let cron = times.cron.at(clock("08:01:00"));
    for enqueued in [16, 16, 8, 0] {
        let round = cron.round().await.unwrap();
        assert_eq!((round.enqueued, round.caught_up, round.skipped), (enqueued, 0, 0));
    }
    assert_eq!(times.stage.rows().await, 40);
    assert_eq!(times.get("each").await.next_tick_at, Some(clock("08:01:01")));
}

#[tokio::test]
async fn an_update_brings_a_schedule_without_a_next_tick_back() {
    let times = Times::new().await;
    let new = report("hourly", "0 * * * *");
    times.make("08:30:00", &new).await;
    // As an older release left it that could not read it.
    sqlx::query("UPDATE schedules SET next_tick_at = NULL")
        .execute(times.stage.postgres.pool())
        .await
        .unwrap();
    let changed = times.schedules.at(clock("09:10:00")).update(&new).await.unwrap();
    assert_eq!(changed.next_tick_at, Some(clock("10:00:00")));
}

#[tokio::test]
async fn the_loop_of_every_producer_makes_the_jobs_and_the_relay_dispatches_them() {
    let times = Times::new().await;
    times.schedules.create(&report("always", "* * * * * *")).await.unwrap();
    let one = times.stage.maintain(quick());
    let two = times.stage.maintain(MaintainSettings { cron_on_time: MINUTE, ..quick() });
    eventually(|| async {
        let depth = times.stage.depth("report").await;
        if depth >= 3 { Ok(()) } else { Err(format!("{depth} jobs")) }
    })
    .await;
    one.stop().await;
    two.stop().await;
    let (jobs, ticks): (i64, i64) = sqlx::query_as("SELECT count(*), count(DISTINCT run_at) FROM jobs")
        .fetch_one(times.stage.postgres.pool())
        .await
        .unwrap();
    assert_eq!(jobs, ticks);
}
