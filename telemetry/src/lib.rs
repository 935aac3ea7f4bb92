#![doc = include_str!("../README.md")]

mod config;
mod error;
mod metric_list;
mod propagation;
mod queue_wait;
mod tracing_setup;

use std::time::Duration;

use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use opentelemetry_sdk::trace::SdkTracerProvider;

pub use config::{LogFormat, TelemetryConfig};
pub use error::TelemetryError;
pub use propagation::{current_trace, set_parent, trace_context};
pub use queue_wait::record_queue_wait;

/// How often recorded histogram values are folded into their buckets. Without it they would pile up while nobody
/// reads `/metrics`.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Bucket bounds of every histogram in seconds: 1 ms to 1 min. A step on a healthy store takes a few milliseconds, an
/// embedding batch up to seconds, an HTTP request at most 30 s.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Bucket bounds of histograms that count items of a batch.
const SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// What a process owns of its telemetry: the metrics, and the tracer that exports spans if there is an endpoint.
///
/// Call [`shutdown`](Self::shutdown) at the process' end; dropping it instead loses the spans of the last seconds.
#[derive(Debug)]
pub struct Telemetry {
    metrics: PrometheusHandle,
    upkeep: tokio::task::AbortHandle,
    tracer: Option<SdkTracerProvider>,
}

/// Sets up logs, metrics and traces of this process. Call it once, inside a tokio runtime, before anything is logged.
///
/// Logs go to stderr, metrics into a recorder that [`Telemetry::render`] reads, and spans to `config.otlp_endpoint` if
/// it is set. An endpoint that doesn't answer is no error: spans are dropped until it does.
///
/// Errors: a filter or endpoint that can't be read (the variable is named), a second call, no runtime.
pub fn init(service_name: &'static str, config: &TelemetryConfig) -> Result<Telemetry, TelemetryError> {
    let runtime = tokio::runtime::Handle::try_current().map_err(|_| TelemetryError::NoRuntime)?;
    let tracer = tracing_setup::install(service_name, config)?;
    let recorder = recorder()?;
    let metrics = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| TelemetryError::AlreadySet)?;
    metric_list::describe();
    let handle = metrics.clone();
    let upkeep = runtime.spawn(async move {
        let mut ticks = tokio::time::interval(UPKEEP_EVERY);
        loop {
            ticks.tick().await;
            handle.run_upkeep();
        }
    });
    Ok(Telemetry { metrics, upkeep: upkeep.abort_handle(), tracer })
}

impl Telemetry {
    /// All metrics in Prometheus' text format, for `GET /metrics`.
    pub fn render(&self) -> String {
        self.metrics.render()
    }

    /// [`render`](Self::render) as a function that servers can keep.
    pub fn renderer(&self) -> impl Fn() -> String + Clone + Send + Sync + 'static {
        let metrics = self.metrics.clone();
        move || metrics.render()
    }

    /// Exports the spans that are still here, for at most `deadline`. Never fails: what can't be sent is lost, and said
    /// in the log. Runs on a blocking thread, so the runtime goes on; not cancel-safe.
    pub async fn shutdown(self, deadline: Duration) {
        self.upkeep.abort();
        let Some(tracer) = self.tracer else { return };
        let flushed = tokio::task::spawn_blocking(move || tracer.shutdown_with_timeout(deadline));
        match tokio::time::timeout(deadline + Duration::from_millis(200), flushed).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the last spans were not exported"),
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not exported"),
            Err(_) => tracing::warn!(?deadline, "the last spans were not exported in time"),
        }
    }
}

fn recorder() -> Result<PrometheusRecorder, BuildError> {
    Ok(PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &SIZES)?
        .build_recorder())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn metrics_are_rendered_with_help_buckets_and_labels() {
        let recorder = recorder().unwrap();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            metric_list::describe();
            metrics::counter!("saga_executions_total", "saga" => "ingest", "status" => "succeeded")
                .increment(3);
            metrics::histogram!("saga_step_duration_seconds", "saga" => "ingest", "step_name" => "stage")
                .record(0.004);
            metrics::histogram!("coalescer_batch_size", "op" => "stage").record(20.0);
            metrics::gauge!("queue_depth", "queue" => "ingest", "priority" => "5").set(7.0);
        });
        let text = handle.render();
        for line in [
            "# TYPE saga_executions_total counter",
            r#"saga_executions_total{saga="ingest",status="succeeded"} 3"#,
            "# TYPE saga_step_duration_seconds histogram",
            r#"saga_step_duration_seconds_bucket{saga="ingest",step_name="stage",le="0.0025"} 0"#,
            r#"saga_step_duration_seconds_bucket{saga="ingest",step_name="stage",le="0.005"} 1"#,
            r#"saga_step_duration_seconds_bucket{saga="ingest",step_name="stage",le="+Inf"} 1"#,
            r#"coalescer_batch_size_bucket{op="stage",le="16"} 0"#,
            r#"coalescer_batch_size_bucket{op="stage",le="32"} 1"#,
            r#"queue_depth{queue="ingest",priority="5"} 7"#,
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("# HELP queue_depth "), "{text}");
    }
}
