//! What all services have in common: start, wait until it answers, kill, stop, pause, resume, restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::sync::Mutex;

use crate::error::{IoContext, StartError};
use crate::launch::{Launch, Lifetime, Running};
use crate::logs;
use crate::ports::{self, PortLease};
use crate::process::ProcessId;

/// How long a server may take until it answers. Generous, because recovery after a crash counts too: the vector server
/// needs up to 20 s with 200,000 points.
pub const READY_WITHIN: Duration = Duration::from_secs(90);
/// How long a graceful stop may take (Postgres writes a checkpoint) before the server is killed.
pub(crate) const STOP_WITHIN: Duration = Duration::from_mins(1);
/// How long a dropped server may take to free what the kernel holds for it before it is killed.
const DISCARD_WITHIN: Duration = Duration::from_secs(10);
/// How often an unanswered probe is repeated, and how long one may take.
const PROBE_EVERY: Duration = Duration::from_millis(15);
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// How many free ports are tried when another process is quicker to take them.
const PORT_ATTEMPTS: usize = 5;

/// What differs between the services. Implemented in this crate only.
pub trait Engine: Sized + Send + Sync + 'static {
    /// The service's own options.
    type Options: Send;
    /// Name in messages, and of its log file.
    const NAME: &'static str;
    /// The signal for a graceful stop.
    const STOP: Signal;
    /// The signal for the quickest end that still leaves nothing behind in the kernel; the data is not needed again.
    const DISCARD: Signal;

    /// The port asked for and the time allowed.
    fn wishes(options: &Self::Options) -> (Option<u16>, Duration);
    /// Finds the programs and makes the data directory under `dir`.
    fn prepare(dir: &Path, options: Self::Options) -> impl Future<Output = Result<Self, StartError>> + Send;
    /// Writes the configuration for this port and says what to run. Called before each start.
    fn launch(&self, port: u16) -> impl Future<Output = Result<Launch, StartError>> + Send;
    /// The URL for clients.
    fn url(port: u16) -> String;
    /// Asks the server whether it serves; the text of the error is shown if it never does.
    fn probe(&self, url: &str, pid: u32) -> impl Future<Output = Result<(), String>> + Send;
    /// Frees what a killed server left in the kernel, once its data is not needed again.
    fn discard(&self) {}
    /// What a person should know, for example that the data is elsewhere.
    fn note(&self) -> Option<&str> {
        None
    }
}

/// A private server process on a loopback port.
///
/// Owns the process and its port: dropping it ends the process (its data stays). If our own process is killed, the
/// server is killed with it. All methods take `&self` and wait for each other, so that a test may share it.
#[derive(Debug)]
pub struct Server<E: Engine> {
    engine: Arc<E>,
    url: String,
    port: PortLease,
    log: PathBuf,
    lifetime: Lifetime,
    ready_within: Duration,
    // An async mutex, because kill, stop and restart hold it while they wait for the process.
    running: Mutex<Running>,
    pid: AtomicU32,
}

/// Called with each new process before anything else happens to it.
pub(crate) type OnSpawn<'a> = &'a (dyn Fn(&ProcessId, u16) -> Result<(), StartError> + Send + Sync);

impl<E: Engine> Server<E> {
    /// Starts the service with its data under `dir` (made if missing) and waits until it really answers.
    ///
    /// Errors: missing programs (with what to install), no port, or no answer in time (with the last log lines).
    /// If cancelled, the process is ended.
    pub async fn start(dir: &Path, options: E::Options) -> Result<Self, StartError> {
        // Boxed: together with what a caller adds it would be a large future.
        Box::pin(Self::start_as(dir, options, Lifetime::Handle, &|_, _| Ok(()))).await
    }

    pub(crate) async fn start_as(
        dir: &Path,
        options: E::Options,
        lifetime: Lifetime,
        on_spawn: OnSpawn<'_>,
    ) -> Result<Self, StartError> {
        std::fs::create_dir_all(dir).context("cannot create", dir)?;
        let dir = dir.canonicalize().context("cannot find", dir)?;
        let (fixed, ready_within) = E::wishes(&options);
        let engine = Arc::new(E::prepare(&dir, options).await?);
        if let Some(note) = engine.note() {
            tracing::warn!(service = E::NAME, "{note}");
        }
        let log = dir.join(format!("{}.log", E::NAME));
        let mut attempt = 1;
        loop {
            let port = match fixed {
                Some(port) => PortLease::fixed(E::NAME, port)?,
                None => PortLease::free()?,
            };
            let running = spawn(&*engine, port.port, &log, &lifetime, on_spawn).await?;
            let server = Self {
                engine: Arc::clone(&engine),
                url: E::url(port.port),
                port,
                log: log.clone(),
                lifetime: lifetime.clone(),
                ready_within,
                pid: AtomicU32::new(running.id.pid),
                running: Mutex::new(running),
            };
            let mut running = server.running.lock().await;
            let outcome = server.ready(&mut running).await;
            let Err(error) = outcome else {
                drop(running);
                return Ok(server);
            };
            running.kill(E::NAME).await?;
            drop(running);
            if fixed.is_some() || attempt == PORT_ATTEMPTS || !matches!(error, StartError::PortTaken { .. }) {
                return Err(error);
            }
            tracing::debug!(
                service = E::NAME,
                port = server.port(),
                "another process was quicker to take the port"
            );
            attempt += 1;
        }
    }

    /// The URL for clients, in the form the matching environment variable takes.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The TCP port on 127.0.0.1; stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port.port
    }

    /// The server's process (for Postgres the postmaster); after `stop` or `kill9` the one that was ended.
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Acquire)
    }

    /// The file that holds the server's output of all its starts.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What a person should know about this service, for example that its data had to go elsewhere.
    pub fn note(&self) -> Option<&str> {
        self.engine.note()
    }

    /// Whether the process runs; a paused one does.
    pub async fn is_running(&self) -> bool {
        self.running.lock().await.is_alive()
    }

    /// Kills the server with SIGKILL, all its children too, and waits until they are gone. Data and port stay.
    /// Does nothing if it doesn't run. Cancel-safe: the kill has happened, only the wait is cut short.
    pub async fn kill9(&self) -> Result<(), StartError> {
        self.running.lock().await.kill(E::NAME).await
    }

    /// Stops the server in its own graceful way; after 60 s it is killed. Does nothing if it doesn't run.
    pub async fn stop(&self) -> Result<(), StartError> {
        self.running.lock().await.terminate(E::NAME, E::STOP, STOP_WITHIN).await
    }

    /// Stops the time of the server (SIGSTOP for the whole process tree): connections stay open and nothing answers.
    pub async fn pause(&self) -> Result<(), StartError> {
        let mut running = self.running.lock().await;
        if !running.is_alive() {
            return Err(StartError::NotRunning { service: E::NAME });
        }
        running.id.freeze().context("cannot pause", E::NAME)?;
        Ok(())
    }

    /// Lets a paused server go on.
    pub async fn resume(&self) -> Result<(), StartError> {
        let mut running = self.running.lock().await;
        if !running.is_alive() {
            return Err(StartError::NotRunning { service: E::NAME });
        }
        running.id.thaw().context("cannot resume", E::NAME)
    }

    /// Starts the server again on the same port and data, stopping it gracefully first if it runs; waits until it
    /// answers. Errors: as [`Server::start`]; the port may have been taken meanwhile.
    pub async fn restart(&self) -> Result<(), StartError> {
        let mut running = self.running.lock().await;
        if running.is_alive() {
            running.terminate(E::NAME, E::STOP, STOP_WITHIN).await?;
        }
        *running = spawn(&*self.engine, self.port(), &self.log, &self.lifetime, &|_, _| Ok(())).await?;
        self.pid.store(running.id.pid, Ordering::Release);
        self.ready(&mut running).await
    }

    /// Waits until the server answers.
    async fn ready(&self, running: &mut Running) -> Result<(), StartError> {
        let begun = Instant::now();
        let mut last;
        loop {
            if !running.is_alive() {
                let status =
                    running.reap().map_or_else(|| "unknown exit status".into(), |status| status.to_string());
                if !ports::is_free(self.port()) {
                    return Err(StartError::PortTaken { service: E::NAME, port: self.port() });
                }
                let tail = logs::tail(&self.log);
                return Err(StartError::Exited { service: E::NAME, status, log: self.log.clone(), tail });
            }
            match tokio::time::timeout(PROBE_LIMIT, self.engine.probe(&self.url, running.id.pid)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(answer)) => last = answer,
                Err(_) => last = format!("none within {} s", PROBE_LIMIT.as_secs()),
            }
            if begun.elapsed() >= self.ready_within {
                return Err(StartError::NotReady {
                    service: E::NAME,
                    pid: running.id.pid,
                    waited: self.ready_within,
                    last,
                    log: self.log.clone(),
                    tail: logs::tail(&self.log),
                });
            }
            tokio::time::sleep(PROBE_EVERY).await;
        }
    }
}

impl<E: Engine> Drop for Server<E> {
    fn drop(&mut self) {
        if matches!(self.lifetime, Lifetime::Detached) {
            return;
        }
        self.running.get_mut().terminate_blocking(E::NAME, E::DISCARD, DISCARD_WITHIN);
        self.engine.discard();
    }
}

async fn spawn<E: Engine>(
    engine: &E,
    port: u16,
    log: &Path,
    lifetime: &Lifetime,
    on_spawn: OnSpawn<'_>,
) -> Result<Running, StartError> {
    let launch = engine.launch(port).await?;
    if !ports::is_free(port) {
        return Err(StartError::PortTaken { service: E::NAME, port });
    }
    let mut running = launch.spawn(log, lifetime).await?;
    if let Err(error) = on_spawn(&running.id, port) {
        running.kill(E::NAME).await?;
        return Err(error);
    }
    Ok(running)
}
