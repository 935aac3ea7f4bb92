//! The stack of `flotilla dev`: it survives the command, loses nothing acknowledged, and never touches strangers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use devstack::{ProcessId, Service, Stack, StackOptions, StackStatus, State};
use qdrant_client::Qdrant;
use qdrant_client::qdrant::{
    CountPointsBuilder, CreateCollectionBuilder, Distance, PointStruct, UpsertPointsBuilder,
    VectorParamsBuilder,
};
use sqlx::{Connection, PgConnection};

const DEADLINE: Duration = Duration::from_mins(1);

/// Stops the stack when the test ends, in whatever way.
struct Down(tempfile::TempDir);

impl Down {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        let dir = self.path().to_owned();
        // A thread of its own, because a runtime can't be started inside another.
        let down = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(Stack::down(&dir))
        });
        down.join().unwrap().unwrap();
    }
}

fn stores() -> StackOptions {
    StackOptions {
        services: vec![Service::Postgres, Service::RedisQueue, Service::RedisCache],
        external: BTreeMap::new(),
    }
}

fn url(status: &StackStatus, service: Service) -> &str {
    status.services.iter().find(|one| one.service == service).unwrap().url.as_deref().unwrap()
}

fn pid(status: &StackStatus, service: Service) -> u32 {
    match status.services.iter().find(|one| one.service == service).unwrap().state {
        State::Running { pid } => pid,
        other => panic!("{service} is {other:?}"),
    }
}

fn states(status: &StackStatus) -> Vec<State> {
    status.services.iter().map(|one| one.state).collect()
}

async fn redis(url: &str) -> redis::aio::MultiplexedConnection {
    redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap()
}

/// Writes one more row and one more list entry; returns when both would survive SIGKILL.
async fn write(status: &StackStatus) {
    let mut postgres = PgConnection::connect(url(status, Service::Postgres)).await.unwrap();
    sqlx::query("CREATE TABLE IF NOT EXISTS t (n int)").execute(&mut postgres).await.unwrap();
    sqlx::query("INSERT INTO t VALUES (1)").execute(&mut postgres).await.unwrap();
    let mut redis = redis(url(status, Service::RedisQueue)).await;
    redis::cmd("RPUSH").arg("list").arg("x").exec_async(&mut redis).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let info: String = redis::cmd("INFO").arg("persistence").query_async(&mut redis).await.unwrap();
        if info.contains("aof_buffer_length:0\r") {
            return;
        }
        assert!(Instant::now() < deadline, "the buffer was never written: {info}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn assert_written(status: &StackStatus, times: i64) {
    let mut postgres = PgConnection::connect(url(status, Service::Postgres)).await.unwrap();
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM t").fetch_one(&mut postgres).await.unwrap();
    assert_eq!(rows, times, "rows in Postgres");
    let mut redis = redis(url(status, Service::RedisQueue)).await;
    let length: i64 = redis::cmd("LLEN").arg("list").query_async(&mut redis).await.unwrap();
    assert_eq!(length, times, "entries in Redis");
}

async fn sigkill(pid: u32) {
    let process = ProcessId::of(pid).unwrap();
    process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + DEADLINE;
    while process.is_alive() {
        assert!(Instant::now() < deadline, "{process:?} survived SIGKILL");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn data_and_addresses_survive_down_and_up() {
    let dir = Down::new();
    assert_eq!(states(&Stack::status_with(dir.path(), &stores()).await.unwrap()), [State::Absent; 3]);
    let first = Stack::up_with(dir.path(), &stores()).await.unwrap();
    write(&first).await;

    let again = Stack::up_with(dir.path(), &stores()).await.unwrap();
    assert_eq!(states(&again), states(&first), "running servers are kept");

    let stopped = Stack::down(dir.path()).await.unwrap();
    assert_eq!(stopped, [Service::Postgres, Service::RedisQueue, Service::RedisCache]);
    assert_eq!(states(&Stack::status_with(dir.path(), &stores()).await.unwrap()), [State::Stopped; 3]);
    assert_eq!(Stack::down(dir.path()).await.unwrap(), [], "nothing is left to stop");

    let second = Stack::up_with(dir.path(), &stores()).await.unwrap();
    assert_eq!(second.env(), first.env());
    assert_written(&second, 1).await;
}

#[tokio::test]
async fn killed_servers_come_back_with_everything_acknowledged() {
    let dir = Down::new();
    let mut status = Stack::up_with(dir.path(), &stores()).await.unwrap();
    let before = status.env();
    for round in 1..=3 {
        write(&status).await;
        for service in [Service::Postgres, Service::RedisQueue] {
            // Of Postgres only the postmaster: its backends have to be seen to by `up`.
            sigkill(pid(&status, service)).await;
        }
        let seen = Stack::status_with(dir.path(), &stores()).await.unwrap();
        assert!(matches!(seen.services[0].state, State::Crashed { .. }), "{seen:?}");
        assert!(seen.services[0].problem.is_some());
        status = Stack::up_with(dir.path(), &stores()).await.unwrap();
        assert!(status.services[0].note.as_deref().unwrap().contains("unexpectedly"), "{status:?}");
        assert_eq!(status.services[2].note, None, "the cache was kept");
        assert_eq!(status.env(), before, "same ports");
        assert_written(&status, round).await;
    }
}

/// The first run builds the vector server, which takes minutes.
#[tokio::test]
async fn points_survive_down_up_and_kill_9() {
    let dir = Down::new();
    let options = StackOptions { services: vec![Service::Vectors], external: BTreeMap::new() };
    let first = Stack::up_with(dir.path(), &options).await.unwrap();
    let client = Qdrant::from_url(url(&first, Service::Vectors)).skip_compatibility_check().build().unwrap();
    let vectors = VectorParamsBuilder::new(4, Distance::Cosine);
    client.create_collection(CreateCollectionBuilder::new("c").vectors_config(vectors)).await.unwrap();
    for id in 1..=3 {
        let point = PointStruct::new(id, vec![1.0, 0.5, 0.25, 0.125], qdrant_client::Payload::new());
        client.upsert_points(UpsertPointsBuilder::new("c", vec![point]).wait(true)).await.unwrap();
        if id == 1 {
            assert_eq!(Stack::down(dir.path()).await.unwrap(), [Service::Vectors]);
        } else {
            let status = Stack::status_with(dir.path(), &options).await.unwrap();
            sigkill(pid(&status, Service::Vectors)).await;
        }
        let status = Stack::up_with(dir.path(), &options).await.unwrap();
        assert_eq!(status.env(), first.env());
        let client =
            Qdrant::from_url(url(&status, Service::Vectors)).skip_compatibility_check().build().unwrap();
        let counted = client.count(CountPointsBuilder::new("c").exact(true)).await.unwrap();
        assert_eq!(counted.result.unwrap().count, id);
    }
    // Here and not only in `Drop`, which blocks this thread: the server waits for its clients to say goodbye, and ours
    // lives on this thread.
    Stack::down(dir.path()).await.unwrap();
}

#[tokio::test]
async fn a_directory_that_postgres_can_not_enter_is_replaced_and_told() {
    if !nix::unistd::geteuid().is_root() {
        // Anybody else runs Postgres as themselves, and can enter their own directories.
        return;
    }
    let closed = Down::new();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(closed.path(), mode).unwrap();
    let options = StackOptions { services: vec![Service::Postgres], external: BTreeMap::new() };
    let status = Stack::up_with(closed.path(), &options).await.unwrap();
    let marker = closed.path().join("postgres/elsewhere");
    let elsewhere = std::path::PathBuf::from(std::fs::read_to_string(&marker).unwrap().trim_end());
    let note = status.services[0].note.clone().unwrap();
    assert!(note.contains(elsewhere.to_str().unwrap()), "{note}");
    let mut postgres = PgConnection::connect(url(&status, Service::Postgres)).await.unwrap();
    sqlx::query("CREATE TABLE t (n int)").execute(&mut postgres).await.unwrap();
    Stack::down(closed.path()).await.unwrap();
    let status = Stack::up_with(closed.path(), &options).await.unwrap();
    let mut postgres = PgConnection::connect(url(&status, Service::Postgres)).await.unwrap();
    sqlx::query("SELECT n FROM t").execute(&mut postgres).await.expect("the same data is found again");
    Stack::down(closed.path()).await.unwrap();
    assert!(elsewhere.starts_with("/var/tmp"), "{elsewhere:?}");
    std::fs::remove_dir_all(&elsewhere).unwrap();
}

#[tokio::test]
async fn two_stacks_side_by_side_do_not_collide() {
    let (one, two) = (Down::new(), Down::new());
    let options = stores();
    let (first, second) =
        tokio::join!(Stack::up_with(one.path(), &options), Stack::up_with(two.path(), &options));
    let (first, second) = (first.unwrap(), second.unwrap());
    write(&first).await;
    write(&first).await;
    write(&second).await;
    assert_written(&first, 2).await;
    assert_written(&second, 1).await;
    Stack::down(two.path()).await.unwrap();
    assert_written(&first, 2).await;
}

#[tokio::test]
async fn two_ups_at_once_start_one_server() {
    let dir = Down::new();
    let options = stores();
    let (one, two) = tokio::join!(Stack::up_with(dir.path(), &options), Stack::up_with(dir.path(), &options));
    assert_eq!(states(&one.unwrap()), states(&two.unwrap()));
}

#[tokio::test]
async fn a_recycled_pid_is_neither_taken_for_the_server_nor_killed() {
    let dir = Down::new();
    let options = StackOptions { services: vec![Service::RedisCache], external: BTreeMap::new() };
    Stack::up_with(dir.path(), &options).await.unwrap();
    Stack::down(dir.path()).await.unwrap();
    let mut stranger = std::process::Command::new("sleep").arg("300").spawn().unwrap();
    let path = dir.path().join("redis-cache/service.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let planted = format!("\"process\": {{\"pid\": {}, \"started\": \"earlier\"}}", stranger.id());
    std::fs::write(&path, text.replace("\"process\": null", &planted)).unwrap();

    let seen = Stack::status_with(dir.path(), &options).await.unwrap();
    assert_eq!(states(&seen), [State::Crashed { pid: stranger.id() }]);
    assert_eq!(Stack::down(dir.path()).await.unwrap(), []);
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn a_taken_port_is_left_alone_and_told() {
    let dir = Down::new();
    let options = StackOptions { services: vec![Service::RedisCache], external: BTreeMap::new() };
    let first = Stack::up_with(dir.path(), &options).await.unwrap();
    Stack::down(dir.path()).await.unwrap();
    let address = url(&first, Service::RedisCache).replace("redis://", "").replace("/0", "");
    let _taken = std::net::TcpListener::bind(address).unwrap();
    let second = Stack::up_with(dir.path(), &options).await.unwrap();
    assert_ne!(second.env(), first.env());
    assert!(second.services[0].note.as_deref().unwrap().contains("taken"), "{second:?}");
    // A shell that has read the old env file must not make the old address an external server.
    let external = BTreeMap::from([(Service::RedisCache, url(&first, Service::RedisCache).to_owned())]);
    let third = Stack::up_with(dir.path(), &StackOptions { external, ..options }).await.unwrap();
    assert_eq!(states(&third), states(&second));
}

#[tokio::test]
async fn an_external_server_is_used_and_nothing_is_started_for_it() {
    let (theirs, ours) = (Down::new(), Down::new());
    let options = StackOptions { services: vec![Service::RedisCache], external: BTreeMap::new() };
    let running = Stack::up_with(theirs.path(), &options).await.unwrap();
    let external = url(&running, Service::RedisCache).to_owned();
    let unreachable = "redis://127.0.0.1:1/0".to_owned();
    let options = StackOptions {
        services: vec![Service::RedisQueue, Service::RedisCache],
        external: BTreeMap::from([
            (Service::RedisCache, external.clone()),
            (Service::RedisQueue, unreachable.clone()),
        ]),
    };
    let status = Stack::up_with(ours.path(), &options).await.unwrap();
    assert_eq!(states(&status), [State::External; 2]);
    assert_eq!(status.env(), [("REDIS_QUEUE_URL", unreachable), ("REDIS_CACHE_URL", external.clone())]);
    assert!(status.services[0].problem.as_deref().unwrap().contains("REDIS_QUEUE_URL is set"), "{status:?}");
    assert_eq!(status.services[1].problem, None);
    assert!(!ours.path().join("redis-cache").exists());
    assert_eq!(Stack::down(ours.path()).await.unwrap(), []);
    redis(&external).await;
}

/// Helper process of the next test: what `flotilla dev up` does.
#[tokio::test]
async fn child_that_runs_up() {
    let Ok(dir) = std::env::var("DEVSTACK_TEST_DIR") else { return };
    let options = StackOptions { services: stores().services, ..StackOptions::default() };
    Stack::up_with(Path::new(&dir), &options).await.unwrap();
}

#[tokio::test]
async fn servers_outlive_the_command_and_a_shell_can_read_their_addresses() {
    let dir = Down::new();
    let up = |shell: &str| {
        let status = std::process::Command::new("sh")
            .args(["-c", &format!("{shell} exec \"$0\" --exact child_that_runs_up")])
            .arg(std::env::current_exe().unwrap())
            .env("DEVSTACK_TEST_DIR", dir.path())
            .envs(Service::ALL.map(|service| (service.variable(), "")))
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    };
    up("");
    let first = Stack::status_with(dir.path(), &stores()).await.unwrap();
    assert!(first.services.iter().all(|one| one.problem.is_none()), "{first:?}");
    let group =
        |pid| nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid as i32))).unwrap().as_raw() as u32;
    for service in stores().services {
        assert_eq!(group(pid(&first, service)), pid(&first, service), "{service} has no session of its own");
    }
    write(&first).await;
    // With our own addresses in the environment the servers are still ours.
    up(". ./env;");
    let second = Stack::status_with(dir.path(), &stores()).await.unwrap();
    assert_eq!(states(&second), states(&first));

    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(dir.path().join("env")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600, "the file may hold passwords");
    assert_written(&second, 1).await;
}

#[tokio::test]
async fn logs_are_shown_and_followed() {
    let dir = Down::new();
    let options = StackOptions { services: vec![Service::RedisCache], external: BTreeMap::new() };
    Stack::up_with(dir.path(), &options).await.unwrap();
    let mut shown = Vec::new();
    Stack::logs(dir.path(), Service::RedisCache, false, &mut shown).await.unwrap();
    assert!(String::from_utf8(shown).unwrap().contains("Ready to accept connections"));

    let (mut reader, mut writer) = tokio::io::duplex(64 * 1024);
    let path = dir.path().to_owned();
    let follow =
        tokio::spawn(async move { Stack::logs(&path, Service::RedisCache, true, &mut writer).await });
    Stack::down(dir.path()).await.unwrap();
    let mut seen = String::new();
    let read = async {
        let mut chunk = [0; 4096];
        while !seen.contains("bye bye") {
            let length = tokio::io::AsyncReadExt::read(&mut reader, &mut chunk).await.unwrap();
            seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
        }
    };
    let outcome = tokio::time::timeout(DEADLINE, read).await;
    assert!(outcome.is_ok(), "the end of the log never came: {seen}");
    follow.abort();
}
