//! Redis servers with options of the test's own: nodes of a cluster, replicas, Sentinels, TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::Mutex;

use crate::error::{IoContext, StartError};
use crate::launch::{Launch, Lifetime, Running, find_program};
use crate::logs;
use crate::ports::PortLease;

/// What it is called in errors.
const NAME: &str = "redis";
/// Nothing of Redis stays in the kernel, so it ends at once.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A `redis-server` process on loopback ports that stay its own over restarts. Unlike [`Redis`](crate::Redis) it is
/// not waited for, because what counts as serving differs: ask it. Dropping it kills the process; so does the end of ours.
#[derive(Debug)]
pub struct RedisProcess {
    program: PathBuf,
    dir: PathBuf,
    port: PortLease,
    bus: PortLease,
    running: Mutex<Option<Running>>,
}

impl RedisProcess {
    /// Reserves two ports and makes the directory; starts nothing, so that options may name other servers' ports.
    pub fn reserve(dir: &Path) -> Result<Self, StartError> {
        fs::create_dir_all(dir).context("cannot create", dir)?;
        let program = find_program("redis-server", &["/opt/homebrew/bin".into(), "/usr/local/bin".into()]);
        Ok(Self {
            program: program.ok_or(StartError::MissingProgram {
                program: "redis-server",
                looked_in: "looked in PATH".into(),
                install: "Run scripts/setup.sh",
            })?,
            dir: dir.canonicalize().context("cannot find", dir)?,
            port: PortLease::free()?,
            bus: PortLease::free()?,
            running: Mutex::new(None),
        })
    }

    /// The port on 127.0.0.1 that is reserved for clients; the options decide whether the server uses it.
    pub fn port(&self) -> u16 {
        self.port.port
    }

    /// A second reserved port, for the bus of a cluster or for TLS beside the plain port.
    pub fn second_port(&self) -> u16 {
        self.bus.port
    }

    /// Its directory, which is also the server's working directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes `options`, lines of a redis.conf, and starts the server with them. `args` come after the file's name,
    /// for example `--sentinel`.
    pub async fn start(&self, options: &str, args: &[&str]) -> Result<(), StartError> {
        let path = self.dir.join("redis.conf");
        fs::write(&path, format!("bind 127.0.0.1\ndaemonize no\nlogfile \"\"\n{options}\n"))
            .context("cannot write", &path)?;
        self.restart(args).await
    }

    /// Starts the server again with the file as it is now; Sentinels and nodes of a cluster write to theirs.
    pub async fn restart(&self, args: &[&str]) -> Result<(), StartError> {
        self.kill9().await?;
        let mut words = vec![self.dir.join("redis.conf").into_os_string()];
        words.extend(args.iter().map(Into::into));
        let launch =
            Launch { program: self.program.clone(), args: words, cwd: self.dir.clone(), account: None };
        let running = launch.spawn(&self.dir.join("redis.log"), &Lifetime::Handle).await?;
        *self.running.lock().await = Some(running);
        Ok(())
    }

    /// Kills the server with SIGKILL and waits until it is gone. Does nothing if it doesn't run.
    pub async fn kill9(&self) -> Result<(), StartError> {
        match self.running.lock().await.take() {
            Some(mut running) => running.kill(NAME).await,
            None => Ok(()),
        }
    }

    /// The last lines of its output, for a test that fails.
    pub fn log(&self) -> String {
        logs::tail(&self.dir.join("redis.log"))
    }
}

impl Drop for RedisProcess {
    fn drop(&mut self) {
        if let Some(running) = self.running.get_mut() {
            running.terminate_blocking(NAME, Signal::SIGKILL, END_WITHIN);
        }
    }
}
