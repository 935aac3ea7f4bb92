//! Each service on its own: it answers, survives SIGKILL with what it acknowledged, hangs when paused, leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use devstack::testing::TestServices;
use devstack::{Postgres, PostgresOptions, ProcessId, Redis, RedisOptions, StartError};
use sqlx::{Connection, PgConnection};

/// How long a paused server is given to show that it doesn't answer.
const HANG: Duration = Duration::from_millis(300);
const DEADLINE: Duration = Duration::from_secs(20);

async fn redis_connection(redis: &Redis) -> redis::aio::MultiplexedConnection {
    redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap()
}

async fn config(connection: &mut redis::aio::MultiplexedConnection, name: &str) -> String {
    let answer: Vec<String> =
        redis::cmd("CONFIG").arg("GET").arg(name).query_async(connection).await.unwrap();
    answer[1].clone()
}

#[tokio::test]
async fn postgres_keeps_committed_rows_over_kill_9() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let postgres = services.postgres();
    let mut connection = PgConnection::connect(postgres.url()).await.unwrap();
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        let value: String = sqlx::query_scalar("SELECT current_setting($1)")
            .bind(setting)
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(value, "on", "{setting}");
    }
    sqlx::query("CREATE TABLE t (n int)").execute(&mut connection).await.unwrap();
    let first = ProcessId::of(postgres.pid()).unwrap();
    for n in 1..=3 {
        sqlx::query("INSERT INTO t VALUES ($1)").bind(n).execute(&mut connection).await.unwrap();
        // A backend busy with its own computation would outlive its postmaster for long.
        let url = postgres.url().to_owned();
        let busy = tokio::spawn(async move {
            let mut connection = PgConnection::connect(&url).await?;
            sqlx::query("SELECT count(*) FROM generate_series(1, 1000000000)").execute(&mut connection).await
        });
        let deadline = Instant::now() + DEADLINE;
        loop {
            let running: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series%' AND pid <> pg_backend_pid()")
                .fetch_one(&mut connection).await.unwrap();
            if running == 1 {
                break;
            }
            assert!(Instant::now() < deadline, "the busy query never ran");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let tree = ProcessId::of(postgres.pid()).unwrap().descendants();
        assert!(tree.len() > 3, "postmaster without children? {tree:?}");
        postgres.kill9().await.unwrap();
        assert!(!postgres.is_running().await);
        assert!(tree.iter().all(|one| !one.is_alive()), "children outlived kill9: {tree:?}");
        busy.await.unwrap().expect_err("the server was killed under this query");
        postgres.restart().await.unwrap();
        connection = PgConnection::connect(postgres.url()).await.unwrap();
        let rows: i64 =
            sqlx::query_scalar("SELECT count(*) FROM t").fetch_one(&mut connection).await.unwrap();
        assert_eq!(rows, i64::from(n));
    }
    assert!(!first.is_alive());
}

#[tokio::test]
async fn postgres_with_a_recycled_pid_in_its_lock_file_starts() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let postgres = services.postgres();
    postgres.kill9().await.unwrap();
    let lock = services.dir().join("postgres/data/postmaster.pid");
    let text = std::fs::read_to_string(&lock).unwrap();
    // A living process of the same account that is no postmaster: Postgres itself would refuse to start.
    let rest = text.split_once('\n').unwrap().1;
    std::fs::write(&lock, format!("{}\n{rest}", std::process::id())).unwrap();
    postgres.restart().await.unwrap();
}

#[tokio::test]
async fn a_second_postgres_on_the_same_data_is_refused() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let dir = services.dir().join("postgres");
    let error = Postgres::start(&dir, PostgresOptions::default()).await.unwrap_err();
    assert!(
        matches!(error, StartError::AlreadyRunning { pid, .. } if pid == services.postgres().pid()),
        "{error}"
    );
    PgConnection::connect(services.postgres().url()).await.expect("the first one is not harmed");
}

#[tokio::test]
async fn postgres_hangs_while_paused() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let postgres = services.postgres();
    let mut open = PgConnection::connect(postgres.url()).await.unwrap();
    postgres.pause().await.unwrap();
    let on_open = tokio::time::timeout(HANG, sqlx::query("SELECT 1").execute(&mut open)).await;
    assert!(on_open.is_err(), "a backend answered while paused");
    let fresh = tokio::time::timeout(HANG, PgConnection::connect(postgres.url())).await;
    assert!(fresh.is_err(), "the postmaster answered while paused");
    postgres.resume().await.unwrap();
    PgConnection::connect(postgres.url()).await.unwrap();
    // Paused servers can be killed and stopped too.
    postgres.pause().await.unwrap();
    postgres.kill9().await.unwrap();
    assert!(matches!(postgres.pause().await, Err(StartError::NotRunning { .. })));
    postgres.restart().await.unwrap();
    postgres.pause().await.unwrap();
    postgres.stop().await.unwrap();
    assert!(!postgres.is_running().await);
}

#[tokio::test]
async fn the_queue_redis_keeps_what_reached_its_file_over_kill_9() {
    let services = TestServices::builder().redis_queue().start().await.unwrap();
    let redis = services.redis_queue();
    let mut connection = redis_connection(redis).await;
    assert_eq!(config(&mut connection, "maxmemory-policy").await, "noeviction");
    assert_eq!(config(&mut connection, "appendonly").await, "yes");
    assert_eq!(config(&mut connection, "appendfsync").await, "everysec");
    assert_eq!(config(&mut connection, "maxmemory").await, (512 * 1024 * 1024).to_string());
    for n in 1..=3 {
        redis::cmd("RPUSH").arg("list").arg(n).exec_async(&mut connection).await.unwrap();
        // With `everysec` the write may wait while an fsync is under way; what left the buffer survives SIGKILL.
        let deadline = Instant::now() + DEADLINE;
        loop {
            let info: String =
                redis::cmd("INFO").arg("persistence").query_async(&mut connection).await.unwrap();
            if info.contains("aof_buffer_length:0\r") {
                break;
            }
            assert!(Instant::now() < deadline, "the buffer was never written: {info}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        redis.kill9().await.unwrap();
        redis.restart().await.unwrap();
        connection = redis_connection(redis).await;
        let length: i64 = redis::cmd("LLEN").arg("list").query_async(&mut connection).await.unwrap();
        assert_eq!(length, n);
    }
}

#[tokio::test]
async fn the_cache_redis_evicts_and_forgets() {
    let services = TestServices::builder().redis_cache().start().await.unwrap();
    let redis = services.redis_cache();
    let mut connection = redis_connection(redis).await;
    assert_eq!(config(&mut connection, "maxmemory-policy").await, "allkeys-lru");
    assert_eq!(config(&mut connection, "appendonly").await, "no");
    assert_eq!(config(&mut connection, "save").await, "");
    redis::cmd("SET").arg("k").arg("v").exec_async(&mut connection).await.unwrap();
    redis.restart().await.unwrap();
    let mut connection = redis_connection(redis).await;
    let found: Option<String> = redis::cmd("GET").arg("k").query_async(&mut connection).await.unwrap();
    assert_eq!(found, None);
}

#[tokio::test]
async fn redis_hangs_while_paused() {
    let services = TestServices::builder().redis_queue().start().await.unwrap();
    let redis = services.redis_queue();
    let mut connection = redis_connection(redis).await;
    redis.pause().await.unwrap();
    let answer =
        tokio::time::timeout(HANG, redis::cmd("PING").query_async::<String>(&mut connection.clone())).await;
    assert!(!matches!(answer, Ok(Ok(_))), "Redis answered while paused: {answer:?}");
    redis.resume().await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    while redis::cmd("PING").exec_async(&mut connection).await.is_err() {
        assert!(Instant::now() < deadline, "Redis never answered after resume");
        connection = redis_connection(redis).await;
    }
}

#[tokio::test]
async fn a_fixed_port_is_used_and_a_taken_one_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let services = TestServices::builder().redis_cache().start().await.unwrap();
    let taken = services.redis_cache().port();
    let options = RedisOptions { port: Some(taken), ..RedisOptions::cache() };
    let error = Redis::start(dir.path(), options.clone()).await.unwrap_err();
    assert!(matches!(error, StartError::PortTaken { port, .. } if port == taken), "{error}");
    drop(services);
    let redis = Redis::start(dir.path(), options).await.unwrap();
    assert_eq!(redis.url(), format!("redis://127.0.0.1:{taken}/0"));
}

#[tokio::test]
async fn a_server_that_can_not_start_shows_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir_all(data.join("appendonlydir")).unwrap();
    std::fs::write(data.join("appendonlydir/appendonly.aof.manifest"), "not a manifest\n").unwrap();
    let error = Redis::start(dir.path(), RedisOptions::queue()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, StartError::Exited { .. }), "{text}");
    assert!(text.contains("manifest"), "the log is part of the message: {text}");
}

#[tokio::test]
async fn dropping_ends_processes_and_removes_the_directory() {
    let services = TestServices::builder().postgres().redis_queue().redis_cache().start().await.unwrap();
    let names: Vec<_> = services.env().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["DATABASE_URL", "REDIS_QUEUE_URL", "REDIS_CACHE_URL"]);
    let dir = services.dir().to_owned();
    let mut processes = Vec::new();
    for pid in [services.postgres().pid(), services.redis_queue().pid(), services.redis_cache().pid()] {
        let id = ProcessId::of(pid).unwrap();
        processes.extend(id.descendants());
        processes.push(id);
    }
    let segments = || std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let lock = std::fs::read_to_string(dir.join("postgres/data/postmaster.pid")).unwrap();
    let segment = lock.lines().nth(6).unwrap().split_whitespace().nth(1).unwrap().to_owned();
    let has_segment = || segments().lines().any(|line| line.split_whitespace().nth(1) == Some(&segment));
    assert!(has_segment());
    services.postgres().kill9().await.unwrap();
    assert!(has_segment(), "SIGKILL leaves it behind");
    drop(services);
    assert!(!has_segment(), "dropping frees it");
    assert!(!dir.exists());
    assert!(processes.iter().all(|one| !one.is_alive()), "{processes:?}");
}

/// Helper process of the next test, not a test by itself: starts services, says which, and waits to be killed.
#[tokio::test]
async fn child_that_is_killed() {
    let Ok(out) = std::env::var("DEVSTACK_TEST_CHILD") else { return };
    let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
    let text = format!(
        "{} {} {}",
        services.postgres().pid(),
        services.redis_queue().pid(),
        services.dir().display()
    );
    std::fs::write(format!("{out}.part"), text).unwrap();
    std::fs::rename(format!("{out}.part"), &out).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn nothing_is_left_when_the_test_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("started");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_is_killed", "--nocapture"])
        .env("DEVSTACK_TEST_CHILD", &out)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_mins(1);
    while !out.exists() {
        assert!(Instant::now() < deadline, "the child never started its services");
        assert!(child.try_wait().unwrap().is_none(), "the child ended early");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let text = std::fs::read_to_string(&out).unwrap();
    let words: Vec<_> = text.split(' ').collect();
    let mut processes: Vec<_> =
        words[..2].iter().map(|pid| ProcessId::of(pid.parse().unwrap()).unwrap()).collect();
    processes.extend(processes[0].descendants());
    assert!(processes.len() > 4, "{processes:?}");
    let left = std::path::Path::new(words[2]);
    assert!(left.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + DEADLINE;
    while processes.iter().any(ProcessId::is_alive) {
        assert!(Instant::now() < deadline, "still alive: {processes:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Its directory goes away with the next test that starts services, here or beside us: that one may still be at it.
    drop(TestServices::builder().start().await.unwrap());
    let deadline = Instant::now() + DEADLINE;
    while left.exists() {
        assert!(Instant::now() < deadline, "{} is left", left.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
