//! One trace from the caller's request through the producer, the queue and every step of the worker, as an OTLP collector
//! receives it from two processes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use devstack::testing::{Port, TestServices};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const WITHIN: Duration = Duration::from_secs(60);
const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
const CALLER: u128 = 0x00f0_67aa_0ba9_02b7;

/// Keeps the spans that it receives, each with its service's name.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap();
        for one in request.into_inner().resource_spans {
            let service = attribute(&one.resource.unwrap().attributes, "service.name");
            let spans = one.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn attribute(attributes: &[KeyValue], name: &str) -> String {
    let value = attributes.iter().find(|one| one.key == name).and_then(|one| one.value.clone()?.value);
    match value {
        Some(Value::StringValue(text)) => text,
        other => format!("{other:?}"),
    }
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |number, byte| (number << 8) | u128::from(*byte))
}

/// A server process; killed with its handle, should the test fail before it ends.
struct Server(Child);

impl Server {
    fn start(services: &TestServices, collector: &str, arguments: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_flotilla"))
            .args(arguments)
            .env_clear()
            .envs(services.env())
            .envs([
                ("FLOTILLA_EMBEDDER", "hash"),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
                ("FLOTILLA_AUTH", "open"),
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Ends it in order, which sends its last spans.
    fn drain(mut self) {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM).unwrap();
        let deadline = Instant::now() + WITHIN;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "a server does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|status| status.is_none()) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}

/// One HTTP request; the whole answer. `None`: nobody listens yet.
fn http(addr: &str, head: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(addr).ok()?;
    stream.set_read_timeout(Some(WITHIN)).unwrap();
    let length = body.len();
    write!(stream, "{head}\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + WITHIN;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_goes_through_producer_queue_and_worker() {
    let services = TestServices::start().await.unwrap();
    let collector = Collector::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let receiving = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let migrated =
        Command::new(env!("CARGO_BIN_EXE_flotilla")).args(["migrate", "up"]).envs(services.env()).status();
    assert!(migrated.unwrap().success());
    let port = Port::free().unwrap();
    let addr = format!("127.0.0.1:{}", port.number());
    let producer = Server::start(&services, &endpoint, &["producer", "--addr", &addr]);
    let worker = Server::start(&services, &endpoint, &["worker", "--addr", "127.0.0.1:0"]);
    until("the producer", || {
        http(&addr, "GET /readyz HTTP/1.1", "").filter(|answer| answer.contains(" 200 "))
    });

    let traceparent = format!("00-{TRACE:032x}-{CALLER:016x}-01");
    let head =
        format!("POST /v1/jobs HTTP/1.1\r\nContent-Type: application/json\r\ntraceparent: {traceparent}");
    let body = r#"{"kind":"ingest","payload":{"document":"traced","text":"a document that leaves a trace"}}"#;
    let answer = http(&addr, &head, body).unwrap();
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    until("the document", || {
        http(&addr, "GET /v1/documents/traced HTTP/1.1", "")
            .filter(|answer| answer.contains("leaves a trace"))
    });
    let metrics = http(&addr, "GET /metrics HTTP/1.1", "").unwrap();
    assert!(metrics.contains(r#"jobs_accepted_total{kind="ingest"} 1"#), "{metrics}");
    worker.drain();
    producer.drain();
    receiving.abort();

    let kept = collector.0.lock().unwrap().clone();
    let ours: Vec<&(String, Span)> =
        kept.iter().filter(|(_, span)| number(&span.trace_id) == TRACE).collect();
    let told = ours
        .iter()
        .map(|(service, span)| format!("{service}: {} {}", span.name, attribute(&span.attributes, "step")))
        .collect::<Vec<_>>()
        .join("\n");
    let named = |service: &str, name: &str| {
        let found: Vec<&Span> =
            ours.iter().filter(|(s, span)| s == service && span.name == name).map(|(_, span)| span).collect();
        assert_eq!(found.len(), 1, "{name} of {service} among\n{told}");
        found[0]
    };
    let request = named("flotilla-producer", "request");
    assert_eq!(number(&request.parent_span_id), CALLER, "the request is the caller's child");
    let wait = named("flotilla-worker", "queue wait");
    let job = named("flotilla-worker", "job");
    let claim = named("flotilla-worker", "claim");
    let carried = number(&job.parent_span_id);
    assert_eq!(carried, number(&wait.parent_span_id), "wait and job hang on the span that enqueued");
    assert!(
        ours.iter().any(|(service, span)| service == "flotilla-producer" && number(&span.span_id) == carried),
        "the job hangs on a span of the producer\n{told}"
    );
    assert_eq!(claim.parent_span_id, job.span_id);
    assert!(
        wait.start_time_unix_nano <= job.start_time_unix_nano
            && wait.end_time_unix_nano > wait.start_time_unix_nano
    );
    let steps: Vec<String> = ours
        .iter()
        .filter(|(_, span)| span.name == "step")
        .map(|(_, span)| attribute(&span.attributes, "step"))
        .collect();
    for step in ["stage", "vectors", "cache", "publish"] {
        assert!(steps.iter().any(|one| one == step), "no step {step} among\n{told}");
    }
}
