//! Circuit breakers of several processes over one queue: they open together, one probes for all, and none depends on it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use devstack::testing::{Port, TestServices};
use queue::{BreakerReport, Queue, QueueConfig, WorkerId};
use sagas::{
    Dependency, StoreError,
    engine::{
        Breakers,
        breaker::{Probe, State},
    },
    error::Class,
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{Postgres, PostgresConfig},
    },
};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

const D: Dependency = Dependency::Cache;
const PATIENCE: Duration = Duration::from_secs(30);

/// Who probed, and when.
type Probes = Arc<Mutex<Vec<(usize, Instant)>>>;

/// What one process has, but the process: its own connections, its own breakers.
struct Process {
    breakers: Breakers,
    queue: Queue,
    _stop: DropGuard,
}

struct Stage {
    services: TestServices,
    probes: Probes,
    count: usize,
}

impl Stage {
    async fn new() -> Self {
        let services = TestServices::builder().redis_queue().redis_cache().start().await.unwrap();
        Self { services, probes: Probes::default(), count: 0 }
    }

    /// A process that reaches the cache at `url`.
    fn process_to(&mut self, url: &str) -> Process {
        let number = self.count;
        self.count += 1;
        let cache = Cache::lazy(&CacheConfig { url: url.to_owned(), ..CacheConfig::default() }).unwrap();
        let probes = Arc::clone(&self.probes);
        let probe: Probe = Arc::new(move || {
            probes.lock().unwrap().push((number, Instant::now()));
            let cache = cache.clone();
            Box::pin(async move { cache.probe().await })
        });
        let stop = CancellationToken::new();
        let config =
            QueueConfig { url: self.services.redis_queue().url().to_owned(), ..QueueConfig::default() };
        let queue = Queue::lazy(config).unwrap();
        let breakers = Breakers::new([(D, probe)], stop.clone())
            .share(queue.clone(), WorkerId::new(format!("process-{number}")));
        Process { breakers, queue, _stop: stop.drop_guard() }
    }

    fn process(&mut self) -> Process {
        let url = self.services.redis_cache().url().to_owned();
        self.process_to(&url)
    }

    /// Waits until so many processes hear the news.
    async fn listening(&self, processes: usize) {
        let client = redis::Client::open(self.services.redis_queue().url()).unwrap();
        let mut raw = client.get_multiplexed_async_connection().await.unwrap();
        until("all processes listen", async || {
            let (_, heard): (String, usize) = redis::cmd("PUBSUB")
                .arg("NUMSUB")
                .arg("{flotilla:breakers}:news")
                .query_async(&mut raw)
                .await
                .unwrap();
            (heard == processes).then_some(()).ok_or(format!("{heard} listen"))
        })
        .await;
    }

    fn probes_since(&self, since: Instant) -> Vec<usize> {
        let all = self.probes.lock().unwrap();
        all.iter().filter(|(_, at)| *at >= since).map(|(who, _)| *who).collect()
    }
}

impl Process {
    /// A call of this process failed as in an outage.
    async fn fails(&self) -> bool {
        let error = StoreError::new(D, Class::Unavailable, "refused");
        self.breakers.confirm_outage(D, &error).await
    }

    fn is_closed(&self) -> bool {
        self.breakers.state(D) == State::Closed
    }
}

async fn until<T>(what: &str, mut seen: impl AsyncFnMut() -> Result<T, String>) -> (T, Duration) {
    let begin = Instant::now();
    loop {
        match seen().await {
            Ok(value) => return (value, begin.elapsed()),
            Err(state) => assert!(begin.elapsed() < PATIENCE, "{what}: {state}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn all(processes: &[Process], closed: bool) -> Duration {
    until("all breakers change", async || {
        let states: Vec<State> = processes.iter().map(|process| process.breakers.state(D)).collect();
        if states.iter().all(|state| (*state == State::Closed) == closed) {
            Ok(())
        } else {
            Err(format!("{states:?}"))
        }
    })
    .await
    .1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_all_open_by_one_processes_news_one_probes_for_all_and_all_close() {
    let mut stage = Stage::new().await;
    let mut processes: Vec<_> = (0..4).map(|_| stage.process()).collect();
    stage.listening(4).await;
    stage.services.redis_cache().kill9().await.unwrap();
    assert!(processes[0].fails().await);
    // The others call nothing: what they know, they know from the first.
    let opened = all(&processes, false).await;
    assert!(opened < Duration::from_secs(2), "{opened:?}");

    // One that starts now looks at the board, and a probe tells it the rest.
    processes.push(stage.process());
    all(&processes, false).await;
    until("all are on the board", async || {
        let board = processes[1]
            .queue
            .report_breaker(&WorkerId::new("observer"), D.name(), BreakerReport::Look)
            .await
            .unwrap();
        if board.open == 5 && board.turn.is_some() { Ok(()) } else { Err(format!("{board:?}")) }
    })
    .await;

    let watched = Duration::from_secs(7);
    let begin = Instant::now();
    tokio::time::sleep(watched).await;
    let probes = stage.probes_since(begin);
    // One process makes at most 5 probes a second: 250 ms less a fifth lie between two. Each on its own: 5 times that.
    let one = (watched.as_secs_f64() / 0.2) as usize;
    let mut who = probes.clone();
    who.sort_unstable();
    who.dedup();
    println!("opened after {opened:?}; {} probes by {who:?} in {watched:?}", probes.len());
    assert!((10..=one + 3).contains(&probes.len()), "{probes:?}");
    assert!(who.len() >= 3, "the turn does not pass on: {probes:?}");

    stage.services.redis_cache().restart().await.unwrap();
    let closed = all(&processes, true).await;
    println!("closed after {closed:?}");
    assert!(closed < Duration::from_secs(3), "{closed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_a_process_that_alone_is_cut_off_opens_nobody_elses_breaker() {
    let mut stage = Stage::new().await;
    let nowhere = Port::free().unwrap();
    let cut_off = stage.process_to(&format!("redis://127.0.0.1:{}", nowhere.number()));
    let others = [stage.process(), stage.process()];
    let states: Vec<_> = others.iter().map(|process| process.breakers.watch(D).unwrap()).collect();
    stage.listening(3).await;
    let begin = Instant::now();
    assert!(cut_off.fails().await);
    until("the others look into the news", async || {
        let probes = stage.probes_since(begin);
        if probes.contains(&1) && probes.contains(&2) { Ok(()) } else { Err(format!("{probes:?}")) }
    })
    .await;
    // Whatever it tells how often, it costs each of the others a probe a second at most.
    let (begin, watched) = (Instant::now(), Duration::from_secs(4));
    while begin.elapsed() < watched {
        for report in [BreakerReport::Closed, BreakerReport::Open] {
            cut_off.queue.report_breaker(&WorkerId::new("flapping"), D.name(), report).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let probes = stage.probes_since(begin);
    for other in [1, 2] {
        let count = probes.iter().filter(|who| **who == other).count();
        assert!((1..=5).contains(&count), "process {other} probed {count} times");
    }
    for (process, state) in others.iter().zip(states) {
        assert!(process.is_closed() && !state.has_changed().unwrap(), "another process's trouble opened it");
    }
    assert!(!cut_off.is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_a_prober_that_stays_cut_off_keeps_nobody_waiting() {
    let mut stage = Stage::new().await;
    let nowhere = Port::free().unwrap();
    let url = format!("redis://127.0.0.1:{}", nowhere.number());
    let cut_off = [stage.process_to(&url), stage.process_to(&url)];
    let others = [stage.process(), stage.process()];
    stage.listening(4).await;
    stage.services.redis_cache().kill9().await.unwrap();
    // First on the board, so first to have their turn.
    for process in cut_off.iter().chain(&others) {
        process.fails().await;
        assert!(!process.is_closed());
    }
    stage.services.redis_cache().restart().await.unwrap();
    let closed = all(&others, true).await;
    println!("closed after {closed:?}");
    // Four turns of two seconds, and what a busy machine adds.
    assert!(closed < Duration::from_secs(12), "{closed:?}");
    assert!(cut_off.iter().all(|process| !process.is_closed()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_without_the_queues_redis_each_process_has_its_own_breaker() {
    let mut stage = Stage::new().await;
    let processes = [stage.process(), stage.process()];
    stage.listening(2).await;
    // Once the board is gone before the outage, once during it, and once it hangs.
    for away in ["before", "during", "hung"] {
        if away == "before" {
            stage.services.redis_queue().kill9().await.unwrap();
        }
        stage.services.redis_cache().kill9().await.unwrap();
        for process in &processes {
            assert!(process.fails().await, "{away}");
        }
        match away {
            "during" => stage.services.redis_queue().kill9().await.unwrap(),
            "hung" => stage.services.redis_queue().pause().await.unwrap(),
            _ => {}
        }
        let begin = Instant::now();
        until("each probes for itself", async || {
            let probes = stage.probes_since(begin);
            let each = [0, 1].map(|one| probes.iter().filter(|who| **who == one).count());
            if each.iter().all(|count| *count >= 5) { Ok(()) } else { Err(format!("{away}: {each:?}")) }
        })
        .await;
        stage.services.redis_cache().restart().await.unwrap();
        let closed = all(&processes, true).await;
        println!("{away}: closed after {closed:?}");
        assert!(closed < Duration::from_secs(3), "{away}: {closed:?}");
        match away {
            "hung" => stage.services.redis_queue().resume().await.unwrap(),
            _ => stage.services.redis_queue().restart().await.unwrap(),
        }
        stage.listening(2).await;
    }
}

#[tokio::test]
async fn protocol_16_trouble_with_what_one_statement_asks_for_is_no_outage() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let mut own = PgConnection::connect(services.postgres().url()).await.unwrap();
    for (state, class) in [
        ("53100", Class::Unavailable),
        ("57P01", Class::Unavailable),
        ("25006", Class::Unavailable),
        // A page that can't be read, or makes no sense.
        ("58030", Class::Transient),
        ("XX001", Class::Transient),
    ] {
        let sql = format!("DO $$ BEGIN RAISE EXCEPTION 'a test''s' USING ERRCODE = '{state}'; END $$");
        let error = StoreError::from(own.execute(AssertSqlSafe(sql)).await.unwrap_err());
        let expected = (class, class == Class::Transient);
        assert_eq!((error.class, error.trouble), expected, "{state}: {error}");
    }
}

#[tokio::test]
async fn protocol_16_a_postgres_that_may_only_be_read_from_is_an_outage() {
    let services = TestServices::builder().postgres().start().await.unwrap();
    let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
    postgres.migrate_up().await.unwrap();
    postgres.probe().await.unwrap();
    // As the old primary after a switch.
    let switch = async |to: &str| {
        let mut own = PgConnection::connect(services.postgres().url()).await.unwrap();
        let setting = format!("ALTER SYSTEM SET default_transaction_read_only = {to}");
        own.execute(AssertSqlSafe(setting)).await.unwrap();
        own.execute("SELECT pg_reload_conf()").await.unwrap();
    };
    switch("on").await;
    let (refused, _) = until("writes are refused", async || {
        postgres.create_tenant("acme").await.err().ok_or_else(|| "it was written".to_owned())
    })
    .await;
    assert_eq!(refused.class, Class::Unavailable, "{refused}");
    assert_eq!(postgres.probe().await.unwrap_err().class, Class::Unavailable);
    // Whoever would write begins nothing, and isn't kept.
    let reached = tokio::time::timeout(Duration::from_secs(10), postgres.reach()).await.expect("no answer");
    assert_eq!(reached.unwrap_err().class, Class::Unavailable);
    switch("off").await;
    until("writes pass", async || postgres.create_tenant("globex").await.map_err(|error| error.to_string()))
        .await;
    postgres.probe().await.unwrap();
}
