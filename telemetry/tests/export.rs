//! `init` as a whole, against a real OTLP receiver: spans arrive, and the metrics of the process are rendered.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
};
use telemetry::TelemetryConfig;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Keeps what it receives.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_reach_the_collector_and_metrics_are_rendered() {
    let collector = Collector::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    // The log is silent: what is exported doesn't depend on it.
    let config = TelemetryConfig {
        log_filter: "off".to_owned(),
        otlp_endpoint: Some(endpoint),
        ..TelemetryConfig::default()
    };
    let telemetry = telemetry::init("flotilla-test", &config).unwrap();
    assert!(telemetry::init("flotilla-test", &config).is_err(), "a second call is refused");

    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let span = tracing::info_span!("job", job = "42");
    telemetry::set_parent(&span, Some(traceparent), None);
    let carried = span.in_scope(|| telemetry::current_trace().expect("a span that is exported has a trace"));
    drop(span);
    metrics::counter!("jobs_accepted_total", "kind" => "ingest").increment(2);
    assert!(telemetry.render().contains(r#"jobs_accepted_total{kind="ingest"} 2"#), "{}", telemetry.render());

    telemetry.shutdown(Duration::from_secs(10)).await;
    server.abort();
    let received = collector.0.lock().unwrap();
    let resource = received.iter().flat_map(|request| &request.resource_spans).next().expect("spans arrive");
    let service =
        resource.resource.as_ref().unwrap().attributes.iter().find(|a| a.key == "service.name").unwrap();
    let name = service.value.as_ref().unwrap().value.clone().unwrap();
    assert!(matches!(&name, Value::StringValue(name) if name == "flotilla-test"), "{name:?}");
    let span = resource.scope_spans.iter().flat_map(|scope| &scope.spans).find(|s| s.name == "job").unwrap();
    let number = |bytes: &[u8]| bytes.iter().fold(0u128, |number, byte| (number << 8) | u128::from(*byte));
    assert_eq!(number(&span.trace_id), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    assert_eq!(number(&span.parent_span_id), 0x00f0_67aa_0ba9_02b7);
    let expected = format!("00-{:032x}-{:016x}-01", number(&span.trace_id), number(&span.span_id));
    assert_eq!(carried.traceparent, expected);
}
