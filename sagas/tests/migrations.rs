//! Every migration goes down and up again, and leaves the schema as it was; the audit log's partitions come and go.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use devstack::testing::TestServices;
use queue::{QueueName, TenantId, WorkerId};
use sagas::{
    coalescing::Batch,
    stores::postgres::{
        Fence, Postgres, PostgresConfig,
        accept::NewJob,
        ending::Run,
        inspect::StepView,
        take::{StepRecord, TakeBatch, TakeItem},
    },
};
use serde_json::json;

async fn database() -> (TestServices, Postgres) {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
    (services, postgres)
}

/// Every object in Flotilla's schema, as the catalogue defines it, but the migrations' own table.
async fn schema(postgres: &Postgres) -> Vec<String> {
    let objects: Vec<String> = sqlx::query_scalar(
        "SELECT line FROM (
            SELECT format('column %s.%s: %s %s default %s generated %s statistics %s', c.table_name, c.column_name,
                          format_type(a.atttypid, a.atttypmod), c.is_nullable, c.column_default, c.is_generated,
                          nullif(a.attstattarget, -1)) AS line,
                   c.table_name
            FROM information_schema.columns c
            JOIN pg_attribute a ON a.attrelid = format('%I.%I', c.table_schema, c.table_name)::regclass AND a.attname = c.column_name
            WHERE c.table_schema = 'flotilla'
            UNION ALL
            SELECT format('constraint %s.%s: %s', r.relname, k.conname, pg_get_constraintdef(k.oid)), r.relname
            FROM pg_constraint k JOIN pg_class r ON r.oid = k.conrelid WHERE r.relnamespace = 'flotilla'::regnamespace
            UNION ALL
            SELECT format('index %s: %s', indexname, indexdef), tablename FROM pg_indexes WHERE schemaname = 'flotilla'
            UNION ALL
            SELECT format('function %s', pg_get_functiondef(p.oid)), p.proname
            FROM pg_proc p WHERE p.pronamespace = 'flotilla'::regnamespace
            UNION ALL
            SELECT format('relation %s: %s %s', r.relname, r.relkind, pg_get_expr(r.relpartbound, r.oid)), r.relname
            FROM pg_class r WHERE r.relnamespace = 'flotilla'::regnamespace
            UNION ALL
            SELECT format('view %s: %s', viewname, definition), viewname FROM pg_views WHERE schemaname = 'flotilla'
            UNION ALL
            SELECT format('type %s: %s', t.typname, t.typtype), t.typname
            FROM pg_type t WHERE t.typnamespace = 'flotilla'::regnamespace
            UNION ALL
            SELECT format('constraint of type %s: %s', t.typname, pg_get_constraintdef(k.oid)), t.typname
            FROM pg_constraint k JOIN pg_type t ON t.oid = k.contypid WHERE t.typnamespace = 'flotilla'::regnamespace
            UNION ALL
            SELECT format('trigger %s: %s', t.tgname, pg_get_triggerdef(t.oid)), r.relname
            FROM pg_trigger t JOIN pg_class r ON r.oid = t.tgrelid
            WHERE r.relnamespace = 'flotilla'::regnamespace AND NOT t.tgisinternal
         ) AS objects WHERE table_name NOT LIKE '%sqlx_migrations%' ORDER BY 1",
    )
    .fetch_all(postgres.pool())
    .await
    .unwrap();
    objects
}

async fn applied(postgres: &Postgres) -> Vec<i64> {
    postgres
        .migrations()
        .await
        .unwrap()
        .into_iter()
        .filter(|(_, _, applied)| *applied)
        .map(|(v, _, _)| v)
        .collect()
}

#[tokio::test]
async fn migrations_go_up_down_to_nothing_and_up_again() {
    let (_services, postgres) = database().await;
    assert!(applied(&postgres).await.is_empty());
    postgres.migrate_up().await.unwrap();
    let all = applied(&postgres).await;
    assert!(all.len() >= 6, "{all:?}");
    let full = schema(&postgres).await;
    assert!(full.iter().any(|line| line.starts_with("function") && line.contains("enqueue")), "{full:#?}");
    // To run them again changes nothing.
    postgres.migrate_up().await.unwrap();
    assert_eq!(schema(&postgres).await, full);

    postgres.migrate_down(0).await.unwrap();
    assert_eq!(schema(&postgres).await, Vec::<String>::new(), "left after all migrations were reverted");
    assert!(applied(&postgres).await.is_empty());
    postgres.migrate_up().await.unwrap();
    assert_eq!(schema(&postgres).await, full);
    assert_eq!(applied(&postgres).await, all);
}

#[tokio::test]
async fn each_migration_alone_is_undone_by_its_own_down_script() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    let mut seen = vec![schema(&postgres).await];
    let all = applied(&postgres).await;
    for target in all.iter().rev().skip(1).copied().chain([0]) {
        postgres.migrate_down(target).await.unwrap();
        let smaller = schema(&postgres).await;
        let larger = seen.last().unwrap();
        // What a migration only loosened is as long as before.
        assert_ne!(smaller, *larger, "reverting to {target} changed nothing");
        assert!(smaller.len() <= larger.len(), "reverting to {target} added something");
        seen.push(smaller);
        postgres.migrate_up().await.unwrap();
        assert_eq!(schema(&postgres).await, seen[0], "up again from {target}");
        postgres.migrate_down(target).await.unwrap();
        assert_eq!(schema(&postgres).await, *seen.last().unwrap(), "down again to {target}");
    }
}

#[tokio::test]
async fn a_database_of_a_newer_release_is_left_as_it_is_unless_it_lacks_something() {
    const NEWER: i64 = 9999;
    let (_services, postgres) = database().await;
    assert_eq!(postgres.migrate_up().await.unwrap(), None);
    let all = schema(&postgres).await;
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES ($1, 'of a newer release', true, '', 0)",
    )
    .bind(NEWER)
    .execute(postgres.pool())
    .await
    .unwrap();
    assert_eq!(postgres.migrate_up().await.unwrap(), Some(NEWER));
    assert_eq!(schema(&postgres).await, all);
    // What another has that lacks one of ours is no newer release's.
    let ours = applied(&postgres).await;
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version = $1")
        .bind(ours.last())
        .execute(postgres.pool())
        .await
        .unwrap();
    let error = postgres.migrate_up().await.unwrap_err();
    assert!(error.message.contains("9999"), "{error}");
}

#[tokio::test]
async fn many_that_migrate_a_fresh_database_at_once_all_succeed() {
    const MANY: i64 = 8;
    let (_services, postgres) = database().await;
    // Nobody gets beyond the schema before all are there.
    let mut first = postgres.begin().await.unwrap();
    sqlx::query("CREATE SCHEMA flotilla").execute(&mut *first).await.unwrap();
    let all = futures::future::join_all((0..MANY).map(|_| postgres.migrate_up()));
    let go = async {
        let begun = Instant::now();
        loop {
            let wait: i64 =
                sqlx::query_scalar("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                    .fetch_one(postgres.pool())
                    .await
                    .unwrap();
            if wait == MANY {
                return first.rollback().await.unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{wait} wait");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    for done in futures::future::join(all, go).await.0 {
        done.unwrap();
    }
}

#[tokio::test]
async fn migrations_keep_the_rows_of_a_database_in_use() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    postgres.create_tenant("acme").await.unwrap();
    let ledger = postgres.ledger_id().await.unwrap();
    // The last migration holds no rows: a roll-back of a deploy keeps everything.
    let all = applied(&postgres).await;
    postgres.migrate_down(all[all.len() - 2]).await.unwrap();
    postgres.migrate_up().await.unwrap();
    assert_eq!(postgres.ledger_id().await.unwrap(), ledger);
    assert!(postgres.tenant("acme").await.unwrap().is_some());
}

#[tokio::test]
async fn a_way_back_writes_the_rows_of_runs_that_have_none_yet() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    postgres.create_tenant("acme").await.unwrap();
    let jobs = [1, 2].map(|n| {
        NewJob::new("kind", QueueName::new("q").unwrap(), TenantId::new("acme").unwrap(), json!({ "n": n }))
    });
    postgres.accept(&jobs, true).await.unwrap();
    let take = TakeBatch::new(postgres.clone(), WorkerId::new("w")).beginning(vec![("kind", 7)]);
    take.flush(&[TakeItem { id: jobs[0].id, fast: None }]).await.unwrap();
    postgres.migrate_down(19).await.unwrap();
    let runs: Vec<(uuid::Uuid, String, i32)> =
        sqlx::query_as("SELECT id, state, definition_version FROM sagas")
            .fetch_all(postgres.pool())
            .await
            .unwrap();
    assert_eq!(runs, [(jobs[0].id.0, "running".to_owned(), 7)]);
}

#[tokio::test]
async fn steps_of_a_completed_run_are_read_from_its_row_and_a_way_back_gives_them_their_own() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    postgres.create_tenant("acme").await.unwrap();
    let (queue, tenant) = (QueueName::new("q").unwrap(), TenantId::new("acme").unwrap());
    let job = NewJob::new("kind", queue, tenant, json!({}));
    postgres.accept(std::slice::from_ref(&job), true).await.unwrap();
    let worker = WorkerId::new("w");
    let take = TakeBatch::new(postgres.clone(), worker.clone()).beginning(vec![("kind", 1)]);
    take.flush(&[TakeItem { id: job.id, fast: None }]).await.unwrap();

    let began = chrono::DateTime::from_timestamp_micros(1_795_440_000_123_456).unwrap();
    let step = |name: &'static str, took_us, error: Option<&str>| StepRecord {
        step: name.into(),
        compensation: false,
        attempts: 2,
        started_at: began,
        ended_at: began + chrono::TimeDelta::microseconds(took_us),
        error: error.map(str::to_owned),
    };
    let steps = [step("first", 0, None), step("second", 7_654_321, Some("it \"broke\""))];
    // What an earlier delivery has logged has rows.
    sqlx::query(
        "INSERT INTO saga_steps (saga_id, fence, seq, step_name, direction, state, attempts, started_at, ended_at)
         VALUES ($1, 0, 0, 'earlier', 'execute', 'succeeded', 1, now(), now())",
    )
    .bind(job.id.0)
    .execute(postgres.pool())
    .await
    .unwrap();
    let earlier = postgres.steps(job.id.0).await.unwrap();
    let run = Run { job_id: job.id, fence: Fence(1), saga_id: Some(job.id.0), worker, started_at: began };
    assert!(postgres.complete(&run, &json!(null), &steps).await.unwrap());

    let last = steps.iter().zip(0..).map(|(step, seq)| StepView {
        fence: 1,
        seq,
        step_name: step.step.to_string(),
        direction: "execute".to_owned(),
        state: if step.error.is_some() { "failed" } else { "succeeded" }.to_owned(),
        attempts: 2,
        started_at: step.started_at,
        ended_at: step.ended_at,
        error: step.error.clone(),
    });
    let told: Vec<_> = earlier.into_iter().chain(last).collect();
    let rows = async || -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM saga_steps").fetch_one(postgres.pool()).await.unwrap()
    };
    assert_eq!((postgres.steps(job.id.0).await.unwrap(), rows().await), (told.clone(), 1));
    postgres.migrate_down(25).await.unwrap();
    assert_eq!(rows().await, 3);
    postgres.migrate_up().await.unwrap();
    assert_eq!(postgres.steps(job.id.0).await.unwrap(), told);
}

async fn partitions(postgres: &Postgres) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'audit_log'::regclass ORDER BY 1",
    )
    .fetch_all(postgres.pool())
    .await
    .unwrap()
}

/// The names of the partitions of months relative to this one.
async fn months(postgres: &Postgres, months: std::ops::RangeInclusive<i32>) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT 'audit_log_' || to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => m), 'YYYYMM')
         FROM generate_series($1, $2) AS m ORDER BY 1",
    )
    .bind(months.start())
    .bind(months.end())
    .fetch_all(postgres.pool())
    .await
    .unwrap()
}

#[tokio::test]
async fn partitions_of_the_audit_log_are_made_ahead_and_dropped_by_retention() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    assert_eq!(partitions(&postgres).await, months(&postgres, 0..=3).await);
    postgres.record_action("somebody", "job.cancel", "a job", &json!({})).await.unwrap();

    // As if the janitor had slept for two months: what is missing is made, and no more.
    let due = months(&postgres, 2..=3).await;
    for name in &due {
        sqlx::query(sqlx::AssertSqlSafe(format!("DROP TABLE {name}")))
            .execute(postgres.pool())
            .await
            .unwrap();
    }
    let day = Duration::from_secs(24 * 3600);
    postgres.expire_audit_log(400 * day).await.unwrap();
    assert_eq!(partitions(&postgres).await, months(&postgres, 0..=3).await);

    // Partitions of the past year, each with a line.
    sqlx::query(
        "DO $$ DECLARE m date; BEGIN
            FOR i IN 1..12 LOOP
                m := (date_trunc('month', now() AT TIME ZONE 'UTC') - make_interval(months => i))::date;
                EXECUTE format('CREATE TABLE %I PARTITION OF audit_log FOR VALUES FROM (%L) TO (%L)',
                    'audit_log_' || to_char(m, 'YYYYMM'), m::text || ' 00:00:00+00',
                    ((m + interval '1 month')::date)::text || ' 00:00:00+00');
                INSERT INTO audit_log (id, at, actor, action, subject)
                VALUES (uuid7(), m + interval '1 day', 'somebody', 'job.cancel', 'a job');
            END LOOP;
         END $$",
    )
    .execute(postgres.pool())
    .await
    .unwrap();
    assert_eq!(partitions(&postgres).await.len(), 16);
    // 100 days reach into the fourth month back at most, and into the third at least.
    postgres.expire_audit_log(100 * day).await.unwrap();
    let left = partitions(&postgres).await;
    let (three, four) = (months(&postgres, -3..=3).await, months(&postgres, -4..=3).await);
    assert!(left == three || left == four, "{left:?}");
    let lost: i64 =
        sqlx::query_scalar("SELECT count(*) FROM audit_log WHERE at < now() - interval '5 months'")
            .fetch_one(postgres.pool())
            .await
            .unwrap();
    assert_eq!(lost, 0);
    let kept: i64 =
        sqlx::query_scalar("SELECT count(*) FROM audit_log").fetch_one(postgres.pool()).await.unwrap();
    assert_eq!(kept, i64::try_from(left.len()).unwrap() - 3);
}

const JOB: &str = "INSERT INTO jobs (id, kind, queue, priority, tenant, payload, timeout_ms) VALUES ($1, 'k', 'q', 5, $2, '{}', 1000)";

async fn one_job_with_a_run(postgres: &Postgres) -> uuid::Uuid {
    postgres.migrate_up().await.unwrap();
    postgres.create_tenant("acme").await.unwrap();
    let job = uuid::Uuid::now_v7();
    sqlx::query(JOB).bind(job).bind("acme").execute(postgres.pool()).await.unwrap();
    sqlx::query("INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, data, fence) VALUES ($1, $1, 'k', 1, 'acme', 'running', '{}', 1)")
        .bind(job)
        .execute(postgres.pool())
        .await
        .unwrap();
    sqlx::query(
        "INSERT INTO saga_steps (saga_id, seq, step_name, direction, state, attempts, fence, started_at, ended_at)
         VALUES ($1, 0, 's', 'execute', 'succeeded', 1, 1, now(), now())",
    )
    .bind(job)
    .execute(postgres.pool())
    .await
    .unwrap();
    job
}

#[tokio::test]
async fn runs_and_their_steps_go_away_with_their_jobs() {
    let (_services, postgres) = database().await;
    let (gone, kept) = (one_job_with_a_run(&postgres).await, uuid::Uuid::now_v7());
    sqlx::query(JOB).bind(kept).bind("acme").execute(postgres.pool()).await.unwrap();
    sqlx::query("UPDATE sagas SET job_id = $1").bind(kept).execute(postgres.pool()).await.unwrap();
    let left = "SELECT (SELECT count(*) FROM sagas), (SELECT count(*) FROM saga_steps)";
    sqlx::query("DELETE FROM jobs WHERE id = $1").bind(gone).execute(postgres.pool()).await.unwrap();
    let counts: (i64, i64) = sqlx::query_as(left).fetch_one(postgres.pool()).await.unwrap();
    assert_eq!(counts, (1, 1), "another job's run was deleted");
    sqlx::query("DELETE FROM jobs").execute(postgres.pool()).await.unwrap();
    let counts: (i64, i64) = sqlx::query_as(left).fetch_one(postgres.pool()).await.unwrap();
    assert_eq!(counts, (0, 0));
}

#[tokio::test]
async fn values_out_of_range_are_refused_before_and_since_their_types_check_them() {
    let (_services, postgres) = database().await;
    one_job_with_a_run(&postgres).await;
    for version in [19, 18] {
        postgres.migrate_down(version).await.unwrap();
        for sql in [
            "UPDATE jobs SET kind = ''",
            "UPDATE jobs SET kind = repeat('k', 65)",
            "UPDATE jobs SET queue = 'a b'",
            "UPDATE jobs SET priority = 10",
            "UPDATE jobs SET max_attempts = 0",
            "UPDATE jobs SET timeout_ms = 0",
            "UPDATE sagas SET next_step = -1",
            "UPDATE saga_steps SET seq = -1",
            "UPDATE saga_steps SET direction = 'sideways'",
            "UPDATE saga_steps SET state = 'started'",
            "UPDATE saga_steps SET attempts = 0",
        ] {
            let error = sqlx::query(sql).execute(postgres.pool()).await.expect_err(sql);
            let code = error.as_database_error().and_then(|e| e.code().map(std::borrow::Cow::into_owned));
            assert_eq!(code.as_deref(), Some("23514"), "{version}: {sql}: {error}");
        }
        let kept = "UPDATE jobs SET kind = repeat('k', 64), queue = 'A_b-c.1', priority = 9, max_attempts = 1, timeout_ms = 1";
        sqlx::query(kept).execute(postgres.pool()).await.unwrap();
    }
}

#[tokio::test]
async fn a_job_has_a_tenant_who_stays() {
    let (_services, postgres) = database().await;
    one_job_with_a_run(&postgres).await;
    let refused = [
        sqlx::query(JOB).bind(uuid::Uuid::now_v7()).bind("nobody").execute(postgres.pool()).await,
        sqlx::query("SELECT enqueue('embed', '{}', 'nobody')").execute(postgres.pool()).await,
        sqlx::query("DELETE FROM tenants").execute(postgres.pool()).await,
        sqlx::query("UPDATE tenants SET id = 'other'").execute(postgres.pool()).await,
    ];
    for refusal in refused {
        let error = refusal.unwrap_err();
        let code = error.as_database_error().and_then(|e| e.code().map(std::borrow::Cow::into_owned));
        assert_eq!(code.as_deref(), Some("23503"), "{error}");
    }
    sqlx::query("DELETE FROM jobs").execute(postgres.pool()).await.unwrap();
    sqlx::query("UPDATE tenants SET id = 'other'").execute(postgres.pool()).await.unwrap();
    assert!(postgres.tenant("other").await.unwrap().is_some());
    sqlx::query("DELETE FROM tenants").execute(postgres.pool()).await.unwrap();
    assert!(postgres.tenant("other").await.unwrap().is_none());
}

#[tokio::test]
async fn statistics_are_made_of_few_rows_and_none_of_payloads() {
    let (_services, postgres) = database().await;
    postgres.migrate_up().await.unwrap();
    // The largest target decides how many rows are read: one column that is forgotten undoes it for its table.
    let forgotten: Vec<String> = sqlx::query_scalar(
        "SELECT format('%s.%s', r.relname, a.attname) FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid
         WHERE r.relnamespace = 'flotilla'::regnamespace AND r.relname NOT LIKE '%sqlx_migrations%' AND NOT r.relispartition
           AND a.attnum > 0 AND NOT a.attisdropped
           AND (r.relkind = 'r' AND a.attstattarget IS DISTINCT FROM
                   CASE WHEN a.atttypid IN ('jsonb'::regtype, 'bytea'::regtype) THEN 0 ELSE 10 END
                -- An index over an expression has statistics of its own.
                OR r.relkind = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = r.oid AND i.indexprs IS NOT NULL))",
    )
    .fetch_all(postgres.pool())
    .await
    .unwrap();
    assert_eq!(forgotten, Vec::<String>::new(), "SET STATISTICS is missing");
}
