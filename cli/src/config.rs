//! Where settings come from: a flag, else the environment, else the development stack's `env` file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

/// Flags that every command takes: where the stores are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StoreArgs {
    /// Postgres: the ledger and the documents
    #[arg(
        long,
        env = "DATABASE_URL",
        value_name = "URL",
        global = true,
        hide_env_values = true,
        help_heading = "Stores"
    )]
    pub database_url: Option<String>,
    /// Redis for the queue
    #[arg(
        long,
        env = "REDIS_QUEUE_URL",
        value_name = "URL",
        global = true,
        hide_env_values = true,
        help_heading = "Stores"
    )]
    pub redis_queue_url: Option<String>,
    /// Redis for the cache
    #[arg(
        long,
        env = "REDIS_CACHE_URL",
        value_name = "URL",
        global = true,
        hide_env_values = true,
        help_heading = "Stores"
    )]
    pub redis_cache_url: Option<String>,
    /// Qdrant's gRPC address
    #[arg(
        long,
        env = "QDRANT_URL",
        value_name = "URL",
        global = true,
        hide_env_values = true,
        help_heading = "Stores"
    )]
    pub qdrant_url: Option<String>,
    /// What every Redis key starts with [default: flotilla]
    #[arg(long, env = "FLOTILLA_PREFIX", value_name = "NAME", global = true, help_heading = "Stores")]
    pub redis_prefix: Option<String>,
    /// Directory of the development stack; its file `env` stands in for addresses that are not set
    #[arg(long, default_value = ".flotilla", value_name = "DIR", global = true, help_heading = "Stores")]
    pub dir: PathBuf,
}

/// All settings of this process, by the name of their environment variable.
#[derive(Debug, Clone)]
pub struct Settings {
    given: BTreeMap<&'static str, String>,
    file: BTreeMap<String, String>,
    path: PathBuf,
}

impl Settings {
    /// Puts the flags and the stack's file together. Clap has merged flags and environment for those that have a flag.
    pub fn new(args: &StoreArgs) -> anyhow::Result<Self> {
        let flags = [
            ("DATABASE_URL", &args.database_url),
            ("REDIS_QUEUE_URL", &args.redis_queue_url),
            ("REDIS_CACHE_URL", &args.redis_cache_url),
            ("QDRANT_URL", &args.qdrant_url),
            ("FLOTILLA_PREFIX", &args.redis_prefix),
        ];
        let given =
            flags.into_iter().filter_map(|(name, value)| Some((name, filled(value.as_deref()?)?))).collect();
        let path = args.dir.join("env");
        Ok(Self { given, file: read_file(&path)?, path })
    }

    /// The same settings but for these, which go before everything else.
    #[must_use]
    pub fn with(&self, settings: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let mut changed = self.clone();
        changed.given.extend(settings);
        changed
    }

    /// The value of a setting, wherever it comes from. An empty value counts as not set.
    pub fn get(&self, name: &str) -> Option<String> {
        self.given
            .get(name)
            .cloned()
            .or_else(|| filled(&std::env::var(name).ok()?))
            .or_else(|| self.file.get(name).cloned())
    }

    /// The value of a setting without which the command can't work.
    pub fn require(&self, name: &'static str) -> anyhow::Result<String> {
        self.get(name).with_context(|| {
            format!(
                "{name} is not set: export it or give --{}, or start a development stack with `flotilla dev up` \
                 ({} was looked for)",
                name.to_lowercase().replace('_', "-"),
                self.path.display()
            )
        })
    }

    /// Whether a setting comes from the development stack's file.
    pub fn is_from_stack(&self, name: &str) -> bool {
        self.file.contains_key(name) && self.get(name).as_ref() == self.file.get(name)
    }

    /// A setting that is a whole number.
    pub fn number(&self, name: &str, default: u64) -> anyhow::Result<u64> {
        match self.get(name) {
            None => Ok(default),
            Some(text) => {
                text.trim().parse().with_context(|| format!("{name} is {text:?}: a whole number is allowed"))
            }
        }
    }

    /// A setting in milliseconds.
    pub fn millis(&self, name: &str, default: std::time::Duration) -> anyhow::Result<std::time::Duration> {
        self.number(name, default.as_millis() as u64).map(std::time::Duration::from_millis)
    }

    /// A setting that is on or off.
    pub fn flag(&self, name: &str, default: bool) -> anyhow::Result<bool> {
        match self.get(name).as_deref().map(str::trim) {
            None => Ok(default),
            Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => anyhow::bail!("{name} is {other:?}: true and false are allowed"),
        }
    }

    /// Says in the log which settings come from the stack's file.
    pub fn log_sources(&self) {
        let from_file: Vec<&str> =
            self.file.keys().map(String::as_str).filter(|name| self.is_from_stack(name)).collect();
        if !from_file.is_empty() {
            tracing::debug!(file = %self.path.display(), settings = ?from_file, "settings from the development stack");
        }
    }
}

fn filled(value: &str) -> Option<String> {
    (!value.trim().is_empty()).then(|| value.to_owned())
}

/// The variables of a stack's `env` file; none if there is no such file.
fn read_file(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(variables(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

/// Reads lines `export NAME='value'`, the way `flotilla dev up` writes them; other lines are left out.
fn variables(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.trim().strip_prefix("export ")?.split_once('=')?;
            let value = value.strip_prefix('\'')?.strip_suffix('\'')?;
            Some((name.to_owned(), value.replace(r"'\''", "'")))
        })
        .collect()
}

/// A URL for people: without its password.
pub fn shown_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "(not a URL)".to_owned() };
    // A password may stand in the query too, and nothing there helps a person to find the server.
    let rest = rest.split_once('?').map_or(rest, |(place, _)| place);
    match rest.rsplit_once('@') {
        None => format!("{scheme}://{rest}"),
        Some((account, place)) => match account.split_once(':') {
            None => format!("{scheme}://{account}@{place}"),
            Some((user, _)) => format!("{scheme}://{user}:***@{place}"),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn passwords_are_never_shown() {
        for (url, shown) in [
            ("postgres://me:secret@db:5432/x", "postgres://me:***@db:5432/x"),
            ("postgres://me:se:cr@et@db/x", "postgres://me:***@db/x"),
            ("redis://:secret@r:6379/0", "redis://:***@r:6379/0"),
            ("postgres://db/x?user=me&password=secret", "postgres://db/x"),
            ("http://127.0.0.1:6334", "http://127.0.0.1:6334"),
            ("me:secret@db", "(not a URL)"),
        ] {
            assert_eq!(shown_url(url), shown);
        }
    }

    #[test]
    fn a_stacks_file_is_read_as_a_shell_would() {
        let read = variables("# made by flotilla\nexport A='x y'\nexport B='it'\\''s'\nC=3\n");
        assert_eq!(
            read.into_iter().collect::<Vec<_>>(),
            [("A".into(), "x y".into()), ("B".into(), "it's".into())]
        );
    }
}
