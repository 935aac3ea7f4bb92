//! The remote provider against a real server on loopback, and against none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use embedding::http::{HttpConfig, HttpEmbedder};
use embedding::{EmbedError, Embedder, ErrorClass};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

type Behaviour = dyn Fn(&[String]) -> Response + Send + Sync;

#[derive(Clone)]
struct Seen {
    behaviour: Arc<Behaviour>,
    requests: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
}

/// An embedding server that answers as the test says. Ends with the test.
struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(behaviour: impl Fn(&[String]) -> Response + Send + Sync + 'static) -> Self {
        let requests = Arc::default();
        let seen = Seen { behaviour: Arc::new(behaviour), requests: Arc::clone(&requests) };
        let app = Router::new().route("/v1/embeddings", post(answer)).with_state(seen);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, requests, task }
    }

    fn sizes(&self) -> Vec<usize> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|(_, body)| body["input"].as_array().unwrap().len()).collect()
    }
}

async fn answer(State(seen): State<Seen>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let texts: Vec<String> = serde_json::from_value(body["input"].clone()).unwrap();
    seen.requests.lock().unwrap().push((headers, body));
    (seen.behaviour)(&texts)
}

/// A vector that tells which text it is of, and is not of unit length.
fn vector(text: &str) -> Vec<f32> {
    let number: f32 = text.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0.0);
    vec![3.0, number, 0.0, 4.0]
}

fn vectors(texts: &[String]) -> Response {
    // Last first: the order of an answer is in its indexes.
    let data: Vec<_> = texts
        .iter()
        .enumerate()
        .rev()
        .map(|(n, text)| json!({"object": "embedding", "index": n, "embedding": vector(text)}))
        .collect();
    Json(json!({"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}})).into_response()
}

fn config(address: SocketAddr) -> HttpConfig {
    HttpConfig {
        url: format!("http://{address}"),
        api_key: Some("key-1".to_owned()),
        model: "house-model".to_owned(),
        dimensions: Some(4),
        batch_size: 8,
        timeout: Duration::from_secs(10),
        ..HttpConfig::default()
    }
}

fn embedder(address: SocketAddr) -> HttpEmbedder {
    HttpEmbedder::new(config(address)).unwrap()
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("text {n}")).collect()
}

fn error(status: u16, message: &str) -> Response {
    (StatusCode::from_u16(status).unwrap(), Json(json!({"error": {"message": message}}))).into_response()
}

async fn failure(embedder: &HttpEmbedder, count: usize) -> EmbedError {
    embedder.embed(texts(count)).await.expect_err("it must fail")
}

#[tokio::test]
async fn vectors_come_back_in_order_and_of_unit_length_over_many_requests() {
    let server = Server::start(vectors).await;
    let embedder = embedder(server.address);
    assert_eq!((embedder.model(), embedder.dimensions()), ("openai:house-model", 4));
    let found = embedder.embed(texts(21)).await.unwrap();
    assert_eq!(found.len(), 21);
    for (n, found) in found.iter().enumerate() {
        let length = found.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-6, "{found:?}");
        assert!((found[1] / found[0] * 3.0 - n as f32).abs() < 1e-4, "number {n} is {found:?}");
    }
    let mut sizes = server.sizes();
    sizes.sort_unstable();
    assert_eq!(sizes, [5, 8, 8]);
    let requests = server.requests.lock().unwrap();
    let (headers, body) = &requests[0];
    assert_eq!(headers[header::AUTHORIZATION], "Bearer key-1");
    assert_eq!((&body["model"], &body["encoding_format"]), (&json!("house-model"), &json!("float")));
    assert!(body.get("dimensions").is_none(), "not every server knows this parameter");
}

#[tokio::test]
async fn nothing_is_sent_for_no_texts() {
    let server = Server::start(vectors).await;
    assert!(embedder(server.address).embed(Vec::new()).await.unwrap().is_empty());
    assert_eq!(server.sizes(), [] as [usize; 0]);
}

#[tokio::test]
async fn a_shorter_vector_of_a_known_model_is_asked_for() {
    let server = Server::start(vectors).await;
    let model = "text-embedding-3-small".to_owned();
    HttpEmbedder::new(HttpConfig { model: model.clone(), ..config(server.address) })
        .unwrap()
        .probe()
        .await
        .unwrap();
    assert_eq!(server.requests.lock().unwrap()[0].1["dimensions"], json!(4));
    let unset = HttpConfig { model, dimensions: None, ..config(server.address) };
    assert_eq!(HttpEmbedder::new(unset).unwrap().dimensions(), 1536);
}

#[tokio::test]
async fn an_unknown_model_needs_its_dimensions() {
    let config = HttpConfig { dimensions: None, ..config(([127, 0, 0, 1], 9).into()) };
    let error = HttpEmbedder::new(config).unwrap_err();
    assert!(error.to_string().starts_with("FLOTILLA_OPENAI_DIMENSIONS"), "{error}");
}

#[tokio::test]
async fn too_many_requests_carry_the_wait_that_the_server_asks_for() {
    for (header_value, expected) in
        [("7", Some(Duration::from_secs(7))), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None)]
    {
        let server = Server::start(move |_| {
            ([(header::RETRY_AFTER, header_value)], error(429, "slow down")).into_response()
        })
        .await;
        let error = failure(&embedder(server.address), 2).await;
        assert_eq!(error.class(), ErrorClass::RateLimited { retry_after: expected }, "{error}");
        assert!(error.to_string().contains("slow down"), "{error}");
        assert_eq!(server.sizes().len(), 1, "this provider does not retry");
    }
}

#[tokio::test]
async fn each_status_has_its_class() {
    let expected: HashMap<u16, &str> = HashMap::from([
        (401, "auth"),
        (403, "auth"),
        (404, "model"),
        (408, "unavailable"),
        (424, "unavailable"),
        (400, "input"),
        (413, "input"),
        (422, "input"),
        (500, "unavailable"),
        (502, "unavailable"),
        (503, "unavailable"),
        (307, "answer"),
    ]);
    for (status, expected) in expected {
        let server = Server::start(move |_| error(status, "the reason")).await;
        let error = failure(&embedder(server.address), 1).await;
        let found = match &error {
            EmbedError::Auth { .. } => "auth",
            EmbedError::ModelInvalid { .. } => "model",
            EmbedError::Unavailable { .. } => "unavailable",
            EmbedError::BadInput { index: Some(0), .. } => "input",
            EmbedError::InvalidResponse { .. } => "answer",
            other => panic!("{status}: {other:?}"),
        };
        assert_eq!(found, expected, "{status}: {error}");
        assert!(error.to_string().contains("the reason"), "{error}");
        assert!(!error.to_string().contains("key-1"), "{error}");
    }
}

#[tokio::test]
async fn a_model_that_the_server_does_not_know_is_no_fault_of_the_text() {
    let server = Server::start(|_| {
        let body = json!({"error": {"message": "no such model", "code": "model_not_found"}});
        (StatusCode::BAD_REQUEST, Json(body)).into_response()
    })
    .await;
    let error = failure(&embedder(server.address), 8).await;
    assert!(matches!(&error, EmbedError::ModelInvalid { model, .. } if model == "house-model"), "{error}");
    assert_eq!(error.class(), ErrorClass::Unavailable);
}

#[tokio::test]
async fn the_text_that_is_refused_is_found_by_halving() {
    let server = Server::start(|texts| {
        if texts.iter().any(|text| text == "text 13") { error(400, "too long") } else { vectors(texts) }
    })
    .await;
    let error = failure(&embedder(server.address), 20).await;
    assert!(
        matches!(&error, EmbedError::BadInput { index: Some(13), reason } if reason.contains("too long")),
        "{error}"
    );
    assert_eq!(error.class(), ErrorClass::Permanent);
}

#[tokio::test]
async fn a_request_refused_for_its_size_gets_through_in_parts() {
    let server =
        Server::start(|texts| if texts.len() > 3 { error(413, "batch too large") } else { vectors(texts) })
            .await;
    assert_eq!(embedder(server.address).embed(texts(8)).await.unwrap().len(), 8);
    assert_eq!(server.sizes(), [8, 4, 2, 2, 4, 2, 2]);
}

#[tokio::test]
async fn unusable_answers_are_errors_and_never_vectors() {
    let item = |index: usize, embedding: Value| json!({"index": index, "embedding": embedding});
    let good = json!([1.0, 0.0, 0.0, 0.0]);
    let cases = [
        json!("not a list"),
        json!({"data": [item(0, good.clone())]}),
        json!({"data": [item(0, good.clone()), item(0, good.clone())]}),
        json!({"data": [item(0, good.clone()), item(2, good.clone())]}),
        json!({"data": [item(0, good.clone()), item(1, json!([0.0, 0.0, 0.0, 0.0]))]}),
        json!({"data": [item(0, good.clone()), item(1, json!([1e39, 0.0, 0.0, 0.0]))]}),
        json!({"data": [item(0, good.clone()), item(1, json!([null, 0.0, 0.0, 0.0]))]}),
        json!({"data": [item(0, good)], "padding": "x".repeat(1 << 20)}),
    ];
    for case in cases {
        let start: String = case.to_string().chars().take(120).collect();
        let server = Server::start(move |_| Json(case.clone()).into_response()).await;
        let error = failure(&embedder(server.address), 2).await;
        assert!(matches!(error, EmbedError::InvalidResponse { .. }), "{start}: {error:?}");
        assert_eq!(error.class(), ErrorClass::Transient);
    }
}

#[tokio::test]
async fn vectors_of_another_length_are_refused() {
    let server = Server::start(|_| {
        Json(json!({"data": [{"index": 0, "embedding": [1.0, 0.0, 0.0]}]})).into_response()
    })
    .await;
    let error = failure(&embedder(server.address), 1).await;
    assert!(matches!(error, EmbedError::WrongDimension { expected: 4, got: 3, .. }), "{error}");
}

/// A port that refuses connections and is nobody else's as long as this lives.
fn nobody_listens() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket
}

#[tokio::test]
async fn a_refused_connection_is_an_outage_and_ends_when_the_server_is_back() {
    let socket = nobody_listens();
    let address = socket.local_addr().unwrap();
    let embedder = embedder(address);
    let error = failure(&embedder, 1).await;
    assert!(
        matches!(&error, EmbedError::Unavailable { reason, .. } if reason.contains("can't connect")),
        "{error}"
    );
    assert_eq!(error.class(), ErrorClass::Unavailable);
    assert_eq!(embedder.probe().await.unwrap_err().class(), ErrorClass::Unavailable);

    let listener = socket.listen(16).unwrap();
    let seen = Seen { behaviour: Arc::new(vectors), requests: Arc::default() };
    let app = Router::new().route("/v1/embeddings", post(answer)).with_state(seen);
    let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    embedder.probe().await.unwrap();
    assert_eq!(embedder.embed(texts(1)).await.unwrap().len(), 1);
    task.abort();
}

#[tokio::test]
async fn a_connection_that_breaks_is_an_outage() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut some = [0; 16];
            assert!(stream.read(&mut some).await.unwrap() > 0);
        }
    });
    assert_eq!(failure(&embedder(address), 1).await.class(), ErrorClass::Unavailable);
    task.abort();
}

#[tokio::test]
async fn a_server_that_hangs_is_an_outage_after_the_time_limit() {
    // Accepts in the kernel and never answers, like a stopped process.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let limit = Duration::from_millis(300);
    let config =
        HttpConfig { timeout: limit, connect_timeout: limit, ..config(listener.local_addr().unwrap()) };
    let embedder = HttpEmbedder::new(config).unwrap();
    let started = Instant::now();
    let error = failure(&embedder, 1).await;
    assert!(
        matches!(&error, EmbedError::Unavailable { reason, .. } if reason.contains("in time")),
        "{error}"
    );
    assert_eq!(embedder.probe().await.unwrap_err().class(), ErrorClass::Unavailable);
    let took = started.elapsed();
    assert!(took >= limit && took < Duration::from_secs(10), "{took:?}");
    drop(listener);
}

#[tokio::test]
async fn an_https_endpoint_is_set_up_with_a_cryptography_provider() {
    // Nobody speaks TLS there: that it gets as far as failing to connect shows that the client exists.
    let socket = nobody_listens();
    let address = socket.local_addr().unwrap();
    let config = HttpConfig { url: format!("https://{address}"), ..config(address) };
    assert_eq!(failure(&HttpEmbedder::new(config).unwrap(), 1).await.class(), ErrorClass::Unavailable);
}
