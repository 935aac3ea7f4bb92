//! Logs to stderr and spans to a collector.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{LogFormat, TelemetryConfig, TelemetryError};

/// How long one export may take before it is given up.
const EXPORT_WITHIN: Duration = Duration::from_secs(5);

/// Libraries whose own spans say nothing about jobs. The exporter's transport is among them: its spans would be
/// exported too, and so on without an end.
const SILENT: [&str; 8] =
    ["h2", "hyper", "hyper_util", "tonic", "tower", "reqwest", "opentelemetry", "opentelemetry_sdk"];

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Installs the subscriber. Returns the tracer's provider if there is an endpoint.
pub fn install(
    service_name: &'static str,
    config: &TelemetryConfig,
) -> Result<Option<SdkTracerProvider>, TelemetryError> {
    let provider =
        config.otlp_endpoint.as_deref().map(|endpoint| provider(service_name, endpoint)).transpose()?;
    let mut layers: Vec<BoxedLayer> = vec![logs(config)?];
    if let Some(provider) = &provider {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        opentelemetry::global::set_tracer_provider(provider.clone());
        let spans = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("flotilla"))
            .with_location(false)
            .with_threads(false)
            .with_filter(exported());
        layers.push(spans.boxed());
    }
    tracing_subscriber::registry().with(layers).try_init().map_err(|_| TelemetryError::AlreadySet)?;
    Ok(provider)
}

fn logs(config: &TelemetryConfig) -> Result<BoxedLayer, TelemetryError> {
    let filter = EnvFilter::try_new(&config.log_filter).map_err(|error| TelemetryError::Config {
        setting: "FLOTILLA_LOG",
        value: config.log_filter.clone(),
        allowed: format!("allowed are filters such as info, or warn,sagas=debug ({error})"),
    })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    Ok(match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_filter(filter)
            .boxed(),
    })
}

/// Which spans and events are exported: those of level info and above, whatever the log's filter says.
fn exported<S>() -> impl tracing_subscriber::layer::Filter<S> {
    Targets::new()
        .with_default(LevelFilter::INFO)
        .with_targets(SILENT.map(|target| (target, LevelFilter::OFF)))
        .and(LevelFilter::INFO)
}

fn provider(service_name: &'static str, endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let failed = |reason: String| TelemetryError::Exporter { endpoint: endpoint.to_owned(), reason };
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_WITHIN)
        .build()
        .map_err(|error| failed(error.to_string()))?;
    // `Resource::builder` also reads OTEL_RESOURCE_ATTRIBUTES; OTEL_SERVICE_NAME goes before our own name.
    let resource = match std::env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => Resource::builder().with_service_name(name).build(),
        _ => Resource::builder().with_service_name(service_name).build(),
    };
    // The sampler is the SDK's default, which reads OTEL_TRACES_SAMPLER and is parentbased_always_on without it.
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}
