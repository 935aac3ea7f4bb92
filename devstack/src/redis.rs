//! A private Redis in one of its two roles.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::error::{IoContext, StartError};
use crate::launch::{Launch, find_program};
use crate::probe;
use crate::server::{Engine, READY_WITHIN, Server};

/// The configurations that production starts from; ours change only what a private server needs.
const QUEUE_CONFIG: &str = include_str!("../../deploy/redis/redis-queue.conf");
const CACHE_CONFIG: &str = include_str!("../../deploy/redis/redis-cache.conf");

/// A private Redis server. URL: `redis://127.0.0.1:PORT/0`.
pub type Redis = Server<RedisEngine>;

/// What the server is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisRole {
    /// Never evicts (`noeviction`) and writes an append-only file (`appendfsync everysec`): a killed server loses
    /// nothing that reached the file, a lost machine at most about a second.
    Queue,
    /// Evicts the least recently used (`allkeys-lru`) and forgets everything when it ends.
    Cache,
}

/// How to start Redis.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// What the server is for.
    pub role: RedisRole,
    /// TCP port on 127.0.0.1; `None`: a free one.
    pub port: Option<u16>,
    /// Limit for the start, loading included.
    pub ready_within: Duration,
    /// `maxmemory` in MB. Default: 512 for the queue, 128 for the cache.
    pub max_memory_mb: u32,
}

impl RedisOptions {
    /// The queue with its defaults.
    pub fn queue() -> Self {
        Self { role: RedisRole::Queue, port: None, ready_within: READY_WITHIN, max_memory_mb: 512 }
    }

    /// The cache with its defaults.
    pub fn cache() -> Self {
        Self { role: RedisRole::Cache, max_memory_mb: 128, ..Self::queue() }
    }
}

/// How [`Redis`] differs from the other services.
#[derive(Debug)]
pub struct RedisEngine {
    program: PathBuf,
    dir: PathBuf,
    options: RedisOptions,
}

impl Engine for RedisEngine {
    type Options = RedisOptions;
    const NAME: &'static str = "redis";
    const STOP: Signal = Signal::SIGTERM;
    // Nothing of Redis stays in the kernel.
    const DISCARD: Signal = Signal::SIGKILL;

    fn wishes(options: &RedisOptions) -> (Option<u16>, Duration) {
        (options.port, options.ready_within)
    }

    async fn prepare(dir: &Path, options: RedisOptions) -> Result<Self, StartError> {
        let program = find_program("redis-server", &["/opt/homebrew/bin".into(), "/usr/local/bin".into()]);
        let program = program.ok_or_else(|| StartError::MissingProgram {
            program: "redis-server",
            looked_in: "looked in PATH".into(),
            install: "Run scripts/setup.sh, or install it: \
                      apt install redis-server | dnf install redis | pacman -S redis | brew install redis",
        })?;
        let data = dir.join("data");
        fs::create_dir_all(&data).context("cannot create", &data)?;
        Ok(Self { program, dir: dir.to_owned(), options })
    }

    async fn launch(&self, port: u16) -> Result<Launch, StartError> {
        let path = self.dir.join("redis.conf");
        fs::write(&path, self.config(port)).context("cannot write", &path)?;
        Ok(Launch {
            program: self.program.clone(),
            args: vec![path.into()],
            cwd: self.dir.clone(),
            account: None,
        })
    }

    fn url(port: u16) -> String {
        format!("redis://127.0.0.1:{port}/0")
    }

    async fn probe(&self, url: &str, pid: u32) -> Result<(), String> {
        let info = probe::redis(url).await?;
        // Another server may have been quicker to take the port.
        if info.lines().any(|line| line.trim_end() == format!("process_id:{pid}")) {
            return Ok(());
        }
        Err(format!("a server answers, but it is not process {pid}"))
    }
}

impl RedisEngine {
    fn config(&self, port: u16) -> String {
        let base = match self.options.role {
            RedisRole::Queue => QUEUE_CONFIG,
            RedisRole::Cache => CACHE_CONFIG,
        };
        // Redis changes into `dir` as soon as it reads it, so the container's must not be there to be overridden.
        let base: String =
            base.lines().filter(|line| !line.starts_with("dir ")).flat_map(|line| [line, "\n"]).collect();
        format!(
            "{base}\n\
             # Written at each start by devstack; of two lines with one name the last counts.\n\
             bind 127.0.0.1\n\
             protected-mode yes\n\
             port {port}\n\
             daemonize no\n\
             logfile \"\"\n\
             dir {}\n\
             maxmemory {}mb\n",
            quoted(&self.dir.join("data")),
            self.options.max_memory_mb,
        )
    }
}

/// A string in the syntax of redis.conf.
fn quoted(path: &Path) -> String {
    let mut text = String::from("\"");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'"' | b'\\' => {
                text.push('\\');
                text.push(char::from(*byte));
            }
            0x20..=0x7e => text.push(char::from(*byte)),
            _ => {
                // Writing to a String can't fail.
                if write!(text, "\\x{byte:02x}").is_err() {
                    return text;
                }
            }
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_the_syntax_of_the_configuration() {
        assert_eq!(quoted(Path::new("/a b/\"c\"\\d/é")), r#""/a b/\"c\"\\d/\xc3\xa9""#);
    }
}
