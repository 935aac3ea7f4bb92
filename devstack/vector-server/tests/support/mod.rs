//! A real server process on a free port, and the data that the tests put into it.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::qdrant_client::qdrant::*;
use ::qdrant_client::{Qdrant, QdrantError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

/// Flotilla's own: 384 dimensions, unit length, compared by dot product.
pub const DIMENSIONS: usize = 384;
const START_LIMIT: Duration = Duration::from_mins(1);

/// A server of our own. Killed when dropped.
pub struct Server {
    child: Child,
    pub url: String,
    log: Arc<Mutex<Vec<String>>>,
}

/// Starts the program without waiting for it to listen.
pub fn spawn(data: &Path, listen: &str, more: &[&str]) -> Child {
    // At run time: the shell of our rustc wrapper drops variables with a hyphen in their name, so `env!` has none.
    let program = std::env::var_os("CARGO_BIN_EXE_flotilla-vectors").expect("run by cargo test");
    Command::new(program)
        .arg("--data")
        .arg(data)
        .args(["--listen", listen])
        .args(more)
        .env_remove("FLOTILLA_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

impl Server {
    pub fn start(data: &Path) -> Self {
        Self::start_with(data, &[])
    }

    /// Starts on a free port and waits until it listens.
    pub fn start_with(data: &Path, more: &[&str]) -> Self {
        let mut child = spawn(data, "127.0.0.1:0", more);
        let log = Arc::new(Mutex::new(Vec::new()));
        let (ready, listening) = std::sync::mpsc::channel();
        let (stderr, lines) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once("listening on ") {
                    let url = rest.split_whitespace().next().unwrap().to_owned();
                    // Nobody listens any more if the start took too long.
                    drop(ready.send(url));
                }
                lines.lock().unwrap().push(line);
            }
        });
        let Ok(url) = listening.recv_timeout(START_LIMIT) else {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the server did not listen within {START_LIMIT:?}: {:#?}", log.lock().unwrap());
        };
        Self { child, url, log }
    }

    pub fn client(&self) -> Qdrant {
        client(&self.url)
    }

    /// `kill -9`, at once.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns the exit status.
    pub fn terminate(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        self.child.wait().unwrap()
    }

    /// What the server logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already reaped after `kill` and `terminate`: both calls then do nothing.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub fn client(url: &str) -> Qdrant {
    Qdrant::from_url(url).timeout(Duration::from_mins(1)).build().unwrap()
}

/// The server under test: the one that `QDRANT_URL` names, or one of our own.
pub struct Subject {
    pub client: Qdrant,
    pub url: String,
    /// A name no other test uses; deleted at the end on a foreign server.
    pub collection: String,
    own: Option<(Server, tempfile::TempDir)>,
}

impl Subject {
    pub fn start(test: &str) -> Self {
        let collection = format!("contract_{test}_{}", std::process::id());
        if let Ok(url) = std::env::var("QDRANT_URL") {
            return Self { client: client(&url), url, collection, own: None };
        }
        let data = tempfile::tempdir().unwrap();
        let server = Server::start(data.path());
        let (client, url) = (server.client(), server.url.clone());
        Self { client, url, collection, own: Some((server, data)) }
    }

    /// Whether this is flotilla-vectors: some assertions are about it alone.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// A collection of unit vectors with the indexes that Flotilla makes.
    pub async fn with_collection(test: &str) -> Self {
        let subject = Self::start(test);
        create(&subject.client, &subject.collection).await;
        subject
    }

    pub async fn finish(self, more: &[&str]) {
        for name in more.iter().copied().chain([self.collection.as_str()]) {
            self.client.delete_collection(name).await.unwrap();
        }
    }
}

pub async fn create(client: &Qdrant, name: &str) {
    let vectors = VectorParamsBuilder::new(DIMENSIONS as u64, Distance::Dot);
    client.create_collection(CreateCollectionBuilder::new(name).vectors_config(vectors)).await.unwrap();
    let tenant = KeywordIndexParamsBuilder::default().is_tenant(true);
    let indexes = [
        CreateFieldIndexCollectionBuilder::new(name, "tenant", FieldType::Keyword).field_index_params(tenant),
        CreateFieldIndexCollectionBuilder::new(name, "version", FieldType::Uuid),
        CreateFieldIndexCollectionBuilder::new(name, "n", FieldType::Integer),
    ];
    for index in indexes {
        client.create_field_index(index.wait(true)).await.unwrap();
    }
}

pub async fn upsert(client: &Qdrant, name: &str, points: Vec<PointStruct>) {
    client.upsert_points(UpsertPointsBuilder::new(name, points).wait(true)).await.unwrap();
}

pub async fn count(client: &Qdrant, name: &str, filter: Filter) -> u64 {
    let request = CountPointsBuilder::new(name).exact(true).filter(filter);
    client.count(request).await.unwrap().result.unwrap().count
}

/// Waits until the optimiser has nothing left to do.
pub async fn settled(client: &Qdrant, name: &str) {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let info = client.collection_info(name).await.unwrap().result.unwrap();
        if info.status() == CollectionStatus::Green {
            return;
        }
        assert!(Instant::now() < deadline, "still not green: {info:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The gRPC code and message of a refusal.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, QdrantError>) -> (Code, String) {
    match result {
        Err(QdrantError::ResponseError { status }) => (status.code(), status.message().to_owned()),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Repeatable numbers (splitmix64, Steele and others 2014): every process makes the same data.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A unit vector; vectors whose number is the same modulo 32 are near each other, as texts on one subject are.
pub fn vector(number: u64) -> Vec<f32> {
    let mut subject = Numbers::new(number % 32 + 1);
    let mut own = Numbers::new(number.wrapping_mul(104_729) + 17);
    let raw: Vec<f32> = (0..DIMENSIONS).map(|_| subject.signed() + 0.7 * own.signed()).collect();
    let length = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
    raw.into_iter().map(|x| x / length).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The id of the point with this number.
pub fn id(number: u64) -> String {
    uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, &number.to_le_bytes()).to_string()
}

pub fn tenant(number: u64) -> String {
    format!("tenant-{}", number % 5)
}

pub fn version(number: u64) -> String {
    id(1_000_000 + number / 10)
}

pub fn payload(number: u64) -> HashMap<String, Value> {
    HashMap::from([
        ("n".to_owned(), Value::from(number as i64)),
        ("tenant".to_owned(), Value::from(tenant(number))),
        ("version".to_owned(), Value::from(version(number))),
        ("price".to_owned(), Value::from(number as f64 / 8.0)),
    ])
}

pub fn point(number: u64) -> PointStruct {
    PointStruct::new(id(number), vector(number), payload(number))
}

/// The `n` of a returned point.
pub fn number(payload: &HashMap<String, Value>) -> u64 {
    payload["n"].as_integer().unwrap() as u64
}

/// The elements of a returned unnamed vector.
pub fn elements(vectors: Option<VectorsOutput>) -> Vec<f32> {
    match vectors.unwrap().get_vector().unwrap() {
        vector_output::Vector::Dense(dense) => dense.data,
        other => panic!("expected a dense vector, got {other:?}"),
    }
}

pub fn ids(numbers: impl IntoIterator<Item = u64>) -> Vec<PointId> {
    numbers.into_iter().map(|number| PointId::from(id(number))).collect()
}

/// The points with these numbers, by number.
pub async fn fetch(
    client: &Qdrant,
    name: &str,
    numbers: impl IntoIterator<Item = u64>,
) -> Vec<RetrievedPoint> {
    let request = GetPointsBuilder::new(name, ids(numbers)).with_payload(true).with_vectors(true);
    client.get_points(request).await.unwrap().result
}
