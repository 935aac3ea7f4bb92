//! Settings of telemetry, with the environment variable of each.

use std::str::FromStr;

use crate::TelemetryError;

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; coloured if stderr is a terminal.
    #[default]
    Text,
    /// One JSON object a line, for log collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, TelemetryError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(TelemetryError::Config {
                setting: "FLOTILLA_LOG_FORMAT",
                value: text.to_owned(),
                allowed: "allowed are text and json".to_owned(),
            }),
        }
    }
}

/// What to log, and where spans go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// `FLOTILLA_LOG`: a filter of tracing-subscriber, such as `info`, or `warn,sagas=debug` (default `info`). It does
    /// not touch the spans that are exported.
    pub log_filter: String,
    /// `FLOTILLA_LOG_FORMAT`: `text` or `json` (default `text`).
    pub log_format: LogFormat,
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`: gRPC address of a collector, such as `http://127.0.0.1:4317`. No tracing if
    /// absent. Which traces are sampled is said by `OTEL_TRACES_SAMPLER` (default `parentbased_always_on`).
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log_filter: "info".to_owned(), log_format: LogFormat::default(), otlp_endpoint: None }
    }
}

impl TelemetryConfig {
    /// The environment of this process; `default_filter` stands in for an absent `FLOTILLA_LOG`.
    pub fn from_env(default_filter: &str) -> Result<Self, TelemetryError> {
        Self::from_lookup(default_filter, |name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), over any source of settings. An empty value counts as absent.
    pub fn from_lookup(
        default_filter: &str,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, TelemetryError> {
        let get = |name: &str| get(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        Ok(Self {
            log_filter: get("FLOTILLA_LOG").unwrap_or_else(|| default_filter.to_owned()),
            log_format: get("FLOTILLA_LOG_FORMAT").map_or(Ok(LogFormat::default()), |text| text.parse())?,
            otlp_endpoint: get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<TelemetryConfig, TelemetryError> {
        TelemetryConfig::from_lookup("warn", |name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn settings_come_from_the_environment() {
        let quiet = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]).unwrap();
        assert_eq!((quiet.log_filter.as_str(), quiet.otlp_endpoint), ("warn", None));
        let loud = read(&[
            ("FLOTILLA_LOG", "debug"),
            ("FLOTILLA_LOG_FORMAT", "json"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317"),
        ])
        .unwrap();
        assert_eq!(loud.log_filter, "debug");
        assert_eq!(loud.log_format, LogFormat::Json);
        assert_eq!(loud.otlp_endpoint.as_deref(), Some("http://c:4317"));
    }

    #[test]
    fn a_bad_format_is_named_with_its_value() {
        let error = read(&[("FLOTILLA_LOG_FORMAT", "xml")]).unwrap_err().to_string();
        assert_eq!(error, "FLOTILLA_LOG_FORMAT is \"xml\": allowed are text and json");
    }
}
