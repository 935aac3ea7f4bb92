//! The producer as a process runs it: served over TCP, with a worker behind it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use devstack::testing::{Port, TestServices};
use producer::{Auth, Client, ClientSettings, ProducerSettings, ServeError, serve};
use queue::{Queue, QueueConfig, WorkerId};
use sagas::{
    engine::EngineSettings,
    janitor::JanitorSettings,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::Postgres,
        vectors::{Vectors, VectorsConfig},
    },
};
use serde_json::{Value, json};
use support::{Maintenance, eventually, migrated, name, queue_config, quick};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use worker::WorkerSettings;

fn stores(postgres: Postgres, services: &TestServices) -> Stores {
    let call_timeout = Duration::from_secs(10);
    let vectors = Vectors::lazy(&VectorsConfig {
        url: services.vectors().url().to_owned(),
        api_key: None,
        call_timeout,
    })
    .unwrap();
    let cache = Cache::lazy(&CacheConfig {
        url: services.redis_cache().url().to_owned(),
        call_timeout,
        ..CacheConfig::default()
    })
    .unwrap();
    let embedder = Arc::new(embedding::hashing::HashingEmbedder::new());
    Stores::new(postgres, vectors, cache, embedder, vec![], DocumentSettings::default())
}

/// One request on a connection of its own: status and body.
async fn ask(addr: SocketAddr, request: &str, body: &str) -> Result<(u16, Value), std::io::Error> {
    let answer = answer(addr, request, body).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
    Ok((status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()))))
}

async fn answer(addr: SocketAddr, request: &str, body: &str) -> Result<String, std::io::Error> {
    let mut stream = TcpStream::connect(addr).await?;
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

struct Deployment {
    addr: SocketAddr,
    stop: CancellationToken,
    api: JoinHandle<Result<(), ServeError>>,
    worker: JoinHandle<Result<(), worker::WorkerError>>,
    maintenance: Maintenance,
    _port: Port,
    services: TestServices,
}

impl Deployment {
    async fn start() -> Self {
        let services = TestServices::start().await.unwrap();
        let postgres = migrated(&services).await;
        let stores = stores(postgres.clone(), &services);
        let queue =
            Queue::lazy(QueueConfig { lease: Duration::from_secs(4), ..queue_config(&services) }).unwrap();
        let client = Client::new(postgres.clone(), Some(queue.clone()), ClientSettings::default());
        let stop = CancellationToken::new();
        let port = Port::free().unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], port.number()));
        let settings = ProducerSettings { addr, auth: Auth::Open, ..ProducerSettings::default() };
        let api = tokio::spawn(serve(settings, client, stores.clone(), String::new, stop.clone()));
        let settings = WorkerSettings {
            queues: ["ingest", "embed", "delete"].map(name).to_vec(),
            concurrency: 4,
            id: WorkerId::for_this_process(),
            heartbeat: Duration::from_secs(1),
            drain_grace: Duration::from_secs(5),
            addr: Some("127.0.0.1:0".parse().unwrap()),
            engine: EngineSettings::default(),
            janitor: JanitorSettings::default(),
            auditor: worker::AuditorSettings::default(),
        };
        let worker = tokio::spawn(worker::run(
            settings,
            stores.clone(),
            stores.registry(),
            queue.clone(),
            Arc::new(String::new),
            stop.clone(),
        ));
        let maintenance = Maintenance::start(postgres, queue, quick());
        Self { addr, stop, api, worker, maintenance, _port: port, services }
    }

    async fn cache(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.services.redis_cache().url()).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    async fn ask(&self, request: &str, body: &str) -> (u16, Value) {
        eventually(|| async { ask(self.addr, request, body).await.map_err(|error| error.to_string()) }).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_enqueued_over_http_is_read_searched_and_deleted_over_http() {
    let fleet = Deployment::start().await;
    // In open mode the tenant that requests fall back to is made at the start.
    let enqueue = |kind: &'static str, payload: Value| {
        let (fleet, body) = (&fleet, json!({ "kind": kind, "payload": payload }).to_string());
        async move {
            let id = eventually(|| async {
                match fleet.ask("POST /v1/jobs", &body).await {
                    (202, answer) => Ok(answer["id"].as_str().unwrap().to_owned()),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
            eventually(|| async {
                let (_, job) = fleet.ask(&format!("GET /v1/jobs/{id}"), "").await;
                if job["state"] == "succeeded" { Ok(job) } else { Err(job.to_string()) }
            })
            .await
        }
    };
    let job =
        enqueue("ingest", json!({ "document": "notes/möwe 1.txt", "text": "A gull sits on the mast." }))
            .await;
    assert_eq!((&job["document"], &job["attempts_made"]), (&json!("notes/möwe 1.txt"), &json!([])), "{job}");
    let steps: Vec<&str> = job["sagas"][0]["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["step_name"].as_str().unwrap())
        .collect();
    assert_eq!(steps[..3], ["stage", "vectors", "cache"], "{job}");
    let path = "GET /v1/documents/notes/m%C3%B6we%201.txt";
    let (status, document) = fleet.ask(path, "").await;
    assert_eq!((status, &document["text"]), (200, &json!("A gull sits on the mast.")), "{document}");
    assert_eq!(document["document"], json!("notes/möwe 1.txt"));
    // The saga wrote the text through; without the entry it comes from Postgres and fills the cache.
    let cached = async || {
        let answer = answer(fleet.addr, path, "").await.unwrap().to_lowercase();
        answer.lines().find_map(|line| Some(line.strip_prefix("x-cache: ")?.to_owned())).unwrap()
    };
    for flushed in [false, true] {
        if flushed {
            redis::cmd("FLUSHALL").exec_async(&mut fleet.cache().await).await.unwrap();
            assert_eq!(cached().await, "miss");
        }
        // Not at once: a reader waits for the cache for a moment only, which a busy machine may take.
        eventually(|| async {
            let cached = cached().await;
            if cached == "hit" { Ok(()) } else { Err(cached) }
        })
        .await;
    }
    let (status, found) = fleet.ask("GET /v1/search?q=gull+mast&k=3", "").await;
    assert_eq!((status, &found["hits"][0]["document"]), (200, &json!("notes/möwe 1.txt")), "{found}");
    enqueue("delete", json!({ "document": "notes/möwe 1.txt" })).await;
    assert_eq!(fleet.ask(path, "").await.0, 404);
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut fleet.cache().await).await.unwrap();
    assert!(keys.is_empty(), "entry and tag of a deleted document stay: {keys:?}");
    // They show once no transaction is under way that could come before.
    let told = eventually(|| async {
        let (_, told) = fleet.ask("GET /v1/events", "").await;
        let events = told["events"].as_array().unwrap().iter().map(|one| one["event"].as_str().unwrap());
        let told_all = events.eq(["document.published", "document.deleted"]);
        if told_all { Ok(told) } else { Err(told.to_string()) }
    })
    .await;
    assert_eq!(told["events"][0]["version"], document["version"], "{told}");
    assert_eq!(fleet.ask("GET /v1/search?q=gull+mast", "").await.1["hits"], json!([]));

    fleet.maintenance.stop().await;
    fleet.stop.cancel();
    fleet.api.await.unwrap().unwrap();
    fleet.worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_taken_address_is_named_with_its_setting() {
    let services =
        TestServices::builder().postgres().redis_queue().redis_cache().vectors().start().await.unwrap();
    let postgres = migrated(&services).await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let client = Client::new(postgres.clone(), None, ClientSettings::default());
    let settings = ProducerSettings { addr, ..ProducerSettings::default() };
    let error = serve(settings, client, stores(postgres, &services), String::new, CancellationToken::new())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.starts_with(&format!("FLOTILLA_PRODUCER_ADDR is {addr}")), "{error}");
}
