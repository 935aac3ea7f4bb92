//! Why telemetry can't be set up, told so that a person can act on it.

/// An error of [`init`](crate::init).
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A setting that can't be read.
    #[error("{setting} is {value:?}: {allowed}")]
    Config {
        /// The environment variable.
        setting: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: String,
    },
    /// The exporter can't be built.
    #[error("the OTLP exporter for OTEL_EXPORTER_OTLP_ENDPOINT={endpoint} can't be made: {reason}")]
    Exporter {
        /// Where it should send.
        endpoint: String,
        /// What the library said.
        reason: String,
    },
    /// The metrics recorder refused its settings.
    #[error("the metrics recorder can't be made: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
    /// Something in this process has set up logs or metrics before.
    #[error("telemetry was already set up in this process")]
    AlreadySet,
    /// Not called inside a tokio runtime.
    #[error("telemetry must be set up inside a tokio runtime")]
    NoRuntime,
}
