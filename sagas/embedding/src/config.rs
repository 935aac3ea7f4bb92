//! Which provider to open, from code or from the environment.

use std::path::PathBuf;

use crate::EmbedError;
use crate::http::HttpConfig;
use crate::local::LocalConfig;

/// The provider and its settings.
#[derive(Debug, Clone)]
pub enum EmbedderConfig {
    /// A model in this process.
    Local(LocalConfig),
    /// Feature hashing, without a model.
    Hashing,
    /// An OpenAI-compatible endpoint.
    Http(HttpConfig),
}

impl Default for EmbedderConfig {
    fn default() -> Self {
        Self::Local(LocalConfig::default())
    }
}

impl EmbedderConfig {
    /// Reads the environment of this process.
    ///
    /// | variable | for | default |
    /// |---|---|---|
    /// | `FLOTILLA_EMBEDDER` | `local`, `hash` or `openai` | `local` |
    /// | `FLOTILLA_MODEL_DIR` | local: the model's folder | `models/all-MiniLM-L6-v2` |
    /// | `FLOTILLA_EMBEDDER_THREADS` | local: engines, one thread each | one per core |
    /// | `FLOTILLA_OPENAI_URL` | openai: base URL | `https://api.openai.com/v1` |
    /// | `FLOTILLA_OPENAI_API_KEY` | openai: bearer token | none |
    /// | `FLOTILLA_OPENAI_MODEL` | openai: the model's name | `text-embedding-3-small` |
    /// | `FLOTILLA_OPENAI_DIMENSIONS` | openai: length of the vectors | known for common models |
    ///
    /// A variable that is set to the empty string counts as not set.
    pub fn from_env() -> Result<Self, EmbedError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), from any source of variables.
    pub fn from_variables(read: impl Fn(&str) -> Option<String>) -> Result<Self, EmbedError> {
        let read = |name: &str| read(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        match read("FLOTILLA_EMBEDDER").as_deref() {
            None | Some("local") => {
                let mut local = LocalConfig::default();
                if let Some(dir) = read("FLOTILLA_MODEL_DIR") {
                    local.dir = PathBuf::from(dir);
                }
                if let Some(threads) = read("FLOTILLA_EMBEDDER_THREADS") {
                    local.threads = number("FLOTILLA_EMBEDDER_THREADS", &threads, 1, 1024)?;
                }
                Ok(Self::Local(local))
            }
            Some("hash") => Ok(Self::Hashing),
            Some("openai") => {
                let mut http = HttpConfig::default();
                if let Some(url) = read("FLOTILLA_OPENAI_URL") {
                    http.url = url;
                }
                if let Some(model) = read("FLOTILLA_OPENAI_MODEL") {
                    http.model = model;
                }
                if let Some(dimensions) = read("FLOTILLA_OPENAI_DIMENSIONS") {
                    // The widest vector that the vector store takes is 65,536.
                    http.dimensions = Some(number("FLOTILLA_OPENAI_DIMENSIONS", &dimensions, 1, 65_536)?);
                }
                http.api_key = read("FLOTILLA_OPENAI_API_KEY");
                Ok(Self::Http(http))
            }
            Some(other) => Err(EmbedError::Config {
                setting: "FLOTILLA_EMBEDDER",
                value: other.to_owned(),
                allowed: "local, hash, openai".to_owned(),
            }),
        }
    }
}

fn number(setting: &'static str, value: &str, least: usize, most: usize) -> Result<usize, EmbedError> {
    value.parse().ok().filter(|n| (least..=most).contains(n)).ok_or_else(|| EmbedError::Config {
        setting,
        value: value.to_owned(),
        allowed: format!("a whole number from {least} to {most}"),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::EmbedderConfig;
    use crate::EmbedError;

    fn read(pairs: &[(&str, &str)]) -> Result<EmbedderConfig, EmbedError> {
        EmbedderConfig::from_variables(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn local_is_the_default() {
        for pairs in [&[][..], &[("FLOTILLA_EMBEDDER", "")], &[("FLOTILLA_EMBEDDER", "local")]] {
            let EmbedderConfig::Local(local) = read(pairs).unwrap() else { panic!("{pairs:?}") };
            assert_eq!(local.dir.to_str().unwrap(), "models/all-MiniLM-L6-v2");
            assert!(local.threads >= 1);
        }
    }

    #[test]
    fn each_provider_takes_its_own_variables() {
        let pairs = [("FLOTILLA_MODEL_DIR", "/m"), ("FLOTILLA_EMBEDDER_THREADS", "3")];
        let EmbedderConfig::Local(local) = read(&pairs).unwrap() else { panic!("not local") };
        assert_eq!((local.dir.to_str().unwrap(), local.threads), ("/m", 3));

        assert!(matches!(read(&[("FLOTILLA_EMBEDDER", "hash")]).unwrap(), EmbedderConfig::Hashing));

        let pairs = [
            ("FLOTILLA_EMBEDDER", "openai"),
            ("FLOTILLA_OPENAI_URL", "http://127.0.0.1:8000"),
            ("FLOTILLA_OPENAI_API_KEY", "sk-very-secret"),
            ("FLOTILLA_OPENAI_MODEL", "bge-m3"),
            ("FLOTILLA_OPENAI_DIMENSIONS", "1024"),
        ];
        let config = read(&pairs).unwrap();
        assert!(!format!("{config:?}").contains("very-secret"), "the key must not reach a log");
        let EmbedderConfig::Http(http) = config else { panic!("not http") };
        assert_eq!(http.url, "http://127.0.0.1:8000");
        assert_eq!(http.api_key.as_deref(), Some("sk-very-secret"));
        assert_eq!((http.model.as_str(), http.dimensions), ("bge-m3", Some(1024)));
    }

    #[test]
    fn a_wrong_value_names_the_setting_the_value_and_what_is_allowed() {
        let error = read(&[("FLOTILLA_EMBEDDER", "hsah")]).unwrap_err().to_string();
        assert_eq!(error, "FLOTILLA_EMBEDDER is \"hsah\"; allowed: local, hash, openai");
        for threads in ["0", "many", "-1"] {
            let error = read(&[("FLOTILLA_EMBEDDER_THREADS", threads)]).unwrap_err();
            assert!(matches!(error, EmbedError::Config { .. }), "{error}");
        }
    }
}
