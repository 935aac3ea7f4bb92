//! Circuit breakers of a fleet (PROTOCOL.md 16): the processes open and close together, one probes for all, and one that alone is
//! cut off stops nobody else.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod proxy;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use e2e::{Fleet, LONG, SHORT, WorkerProcess, text, wait_until};
use proxy::Proxy;
use queue::{JobId, QueueName};
use sagas::stores::postgres::accept::NewJob;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The body of a worker's answer.
async fn get(worker: &WorkerProcess, path: &str) -> String {
    let url = worker.health_url();
    let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: test\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// The sum of a worker's samples of a metric that have this label.
async fn metric(worker: &WorkerProcess, name: &str, label: &str) -> f64 {
    let text = get(worker, "/metrics").await;
    text.lines()
        .filter(|line| line.starts_with(name) && line.contains(label))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

async fn sum(workers: &[WorkerProcess], name: &str, label: &str) -> f64 {
    let mut sum = 0.0;
    for worker in workers {
        sum += metric(worker, name, label).await;
    }
    sum
}

/// What `/readyz` says.
async fn readiness(worker: &WorkerProcess) -> String {
    get(worker, "/readyz").await
}

async fn all_say(workers: &[WorkerProcess], word: &str) -> Duration {
    let begin = Instant::now();
    wait_until(&format!("all workers say {word:?}"), LONG, async || {
        let mut said = vec![];
        for worker in workers {
            said.push(readiness(worker).await);
        }
        if said.iter().all(|one| one == word) { Ok(()) } else { Err(format!("{said:?}")) }
    })
    .await;
    begin.elapsed()
}

fn jobs(fleet: &Fleet, name: &str, queue: &str, count: usize) -> Vec<NewJob> {
    (0..count)
        .map(|no| {
            let document = format!("{name}-{no:04}");
            NewJob {
                queue: QueueName::new(queue).unwrap(),
                ..fleet.ingest_job(&document, &text(&document, 1))
            }
        })
        .collect()
}

async fn succeeded(fleet: &Fleet, at_least: i64) {
    wait_until(&format!("{at_least} jobs have succeeded"), LONG, async || {
        let counts = fleet.postgres.job_counts(None).await.map_err(|e| e.to_string())?;
        if counts.succeeded >= at_least { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;
}

/// Every job has succeeded, and none was charged anything.
async fn free_of_charge(fleet: &Fleet, ids: &[JobId]) {
    fleet.assert_all_succeeded(ids).await;
    let (charged, attempts, letters): (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM jobs WHERE attempts > 0), (SELECT count(*) FROM job_attempts),
                (SELECT count(*) FROM dead_letters)",
    )
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    assert_eq!((charged, attempts, letters), (0, 0, 0), "jobs charged, attempts, dead letters");
}

async fn flotilla_breakers(fleet: &Fleet) -> Value {
    let binary = std::env::var_os("FLOTILLA_BIN").map_or_else(
        || std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("flotilla"),
        Into::into,
    );
    let env = fleet.env();
    let run = move || Command::new(binary).args(["breakers", "--json"]).envs(env).output().unwrap();
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn breaker<'a>(breakers: &'a Value, dependency: &str) -> &'a Value {
    breakers.as_array().unwrap().iter().find(|one| one["dependency"] == dependency).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_a_fleet_stops_claiming_together_and_goes_on_together() {
    let fleet = Fleet::start().await;
    // The third has nothing to do when the store dies, and serves a queue that is no kind's own.
    let queues: [&[&str]; 3] = [&["ingest"], &["ingest"], &["bulk"]];
    let workers: Vec<_> = queues.iter().map(|names| fleet.worker().queues(names).start()).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let mut ids = fleet.accept(jobs(&fleet, "seen", "bulk", 5)).await;
    fleet.assert_all_succeeded(&ids).await;
    ids.extend(fleet.accept(jobs(&fleet, "busy", "ingest", 400)).await);
    succeeded(&fleet, 40).await;

    fleet.services.vectors().kill9().await.unwrap();
    let open = all_say(&workers, "waiting for vectors").await;
    assert!(open < Duration::from_secs(3), "{open:?}");
    let busy = fleet.postgres.job_counts(None).await.unwrap();
    assert!(busy.waiting > 100, "the outage came too late to meet any work: {busy:?}");

    // From here on nothing is claimed, and probes are made by one at a time.
    ids.extend(fleet.accept(jobs(&fleet, "late", "bulk", 10)).await);
    let claimed = sum(&workers, "queue_jobs_claimed_total", "").await;
    let (begin, probed) = (Instant::now(), sum(&workers, "circuit_breaker_probes_total", "vectors").await);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let probes = sum(&workers, "circuit_breaker_probes_total", "vectors").await - probed;
    let most = begin.elapsed().as_secs_f64() / 0.2 + 3.0;
    println!("all open after {open:?}; {probes} probes in {:?}", begin.elapsed());
    assert!((4.0..=most).contains(&probes), "{probes} probes of at most {most}");
    assert!(sum(&workers, "queue_jobs_claimed_total", "").await <= claimed, "jobs were claimed in an outage");
    let bulk = fleet.queue.stats(&QueueName::new("bulk").unwrap()).await.unwrap();
    assert_eq!((bulk.depth(), bulk.in_flight), (10, 0), "a queue that is no kind's own was claimed from");
    let ingest = fleet.queue.stats(&QueueName::new("ingest").unwrap()).await.unwrap();
    assert!(
        ingest.in_flight <= 16,
        "more jobs are claimed than two workers have slots: {}",
        ingest.in_flight
    );
    let shown = flotilla_breakers(&fleet).await;
    let vectors = breaker(&shown, "vectors");
    assert_eq!(
        (&vectors["state"], vectors["workers"].as_array().unwrap().len()),
        (&"open".into(), 3),
        "{shown}"
    );
    assert!(vectors["prober"].is_string() && breaker(&shown, "cache")["state"] == "closed", "{shown}");

    fleet.services.vectors().restart().await.unwrap();
    let closed = all_say(&workers, "ready").await;
    println!("all closed after {closed:?}");
    assert!(closed < Duration::from_secs(5), "{closed:?}");
    free_of_charge(&fleet, &ids).await;
    let shown = flotilla_breakers(&fleet).await;
    assert!(shown.as_array().unwrap().iter().all(|one| one["state"] == "closed"), "{shown}");
    fleet.audit_clean().await;
    drop(workers);
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_a_worker_that_alone_is_cut_off_stops_only_itself() {
    let fleet = Fleet::start().await;
    let proxy = Proxy::to(fleet.services.redis_cache().port()).await;
    let mut workers = vec![
        fleet.worker().env("REDIS_CACHE_URL", format!("redis://127.0.0.1:{}", proxy.port)).start(),
        fleet.worker().start(),
        fleet.worker().start(),
    ];
    for worker in &workers {
        worker.ready().await;
    }
    let mut ids = fleet.accept(jobs(&fleet, "before", "ingest", 300)).await;
    succeeded(&fleet, 30).await;
    proxy.cut();
    wait_until("the worker that is cut off waits", SHORT, async || {
        let said = readiness(&workers[0]).await;
        if said == "waiting for cache" { Ok(()) } else { Err(said) }
    })
    .await;
    let shown = flotilla_breakers(&fleet).await;
    assert_eq!(breaker(&shown, "cache")["workers"].as_array().unwrap().len(), 1, "{shown}");
    let claimed = metric(&workers[0], "queue_jobs_claimed_total", "").await;
    let before = fleet.postgres.job_counts(None).await.unwrap().succeeded;
    ids.extend(fleet.accept(jobs(&fleet, "meanwhile", "ingest", 200)).await);
    succeeded(&fleet, before + 200).await;
    assert!(metric(&workers[0], "queue_jobs_claimed_total", "").await <= claimed, "it goes on claiming");
    proxy.mend();
    all_say(&workers, "ready").await;
    free_of_charge(&fleet, &ids).await;
    let first = workers.remove(0);
    assert!(first.log().contains("circuit breaker opens"), "{}", first.tail());
    for worker in &workers {
        let log = worker.log();
        assert!(!log.contains("circuit breaker opens"), "{} stopped for another's trouble", worker.name);
    }
    drop((first, workers));
    fleet.end();
}
