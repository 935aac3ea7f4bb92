//! Starting a server process: whose it is, where its output goes, and what becomes of it when we end.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use tokio::sync::oneshot;

use crate::account::Account;
use crate::error::{IoContext, StartError};
use crate::logs;
use crate::process::{ProcessId, wait_gone, wait_gone_blocking};

/// SIGKILL takes effect at once, except in a stuck kernel call.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// How long a server lives.
#[derive(Clone, Debug)]
pub enum Lifetime {
    /// Until its handle is dropped, or our process ends in whatever way.
    Handle,
    /// Until somebody stops it: it has its own session and survives us.
    Detached,
}

/// What to run.
#[derive(Debug)]
pub struct Launch {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) cwd: PathBuf,
    /// Run as this account; `None`: as we are.
    pub(crate) account: Option<Account>,
}

/// A server process that was started and not yet ended by us; it may have ended by itself.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) id: ProcessId,
    child: Option<Child>,
    watchdog: Option<Child>,
}

/// Who ends the server when our own process is killed and can't do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// Nobody: it is meant to go on.
    Nobody,
    /// The kernel, through `setpriv --pdeathsig` of util-linux.
    Kernel,
    /// A shell that waits for the end of a pipe which only we hold open. For systems without that `setpriv`.
    Watchdog,
}

impl Launch {
    /// Starts the program, appending its output to `log`.
    pub(crate) async fn spawn(self, log: &Path, lifetime: &Lifetime) -> Result<Running, StartError> {
        let guard = match lifetime {
            Lifetime::Detached => Guard::Nobody,
            Lifetime::Handle if works("setpriv", &["--pdeathsig", "KILL", "--", "true"]) => Guard::Kernel,
            Lifetime::Handle => Guard::Watchdog,
        };
        self.spawn_guarded(log, guard).await
    }

    async fn spawn_guarded(self, log: &Path, guard: Guard) -> Result<Running, StartError> {
        logs::rotate(log)?;
        let output = OpenOptions::new().create(true).append(true).open(log).context("cannot open", log)?;
        let errors = output.try_clone().context("cannot open", log)?;

        let mut words: Vec<OsString> = Vec::new();
        let mut own_group = true;
        if guard == Guard::Kernel {
            words.extend(["setpriv", "--pdeathsig", "KILL", "--"].map(OsString::from));
        } else if guard == Guard::Nobody && works("setsid", &["true"]) {
            words.push("setsid".into());
            // setsid(1) forks when it already leads a process group, and then our child would not be the server.
            own_group = false;
        }
        words.push(self.program.clone().into());
        words.extend(self.args);

        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(&self.cwd);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        without_client_settings(&mut command);
        if own_group {
            // Ctrl-C in the terminal is for us; we then end the servers in our own way.
            command.process_group(0);
        }
        if let Some(account) = &self.account {
            account.apply(&mut command);
        }
        let child = spawn_on_lasting_thread(command).await.context("cannot start", &self.program)?;
        let pid = child.id();
        let id = ProcessId::of(pid).unwrap_or_else(|| ProcessId { pid, started: "ended at once".into() });
        let watchdog = match guard {
            Guard::Watchdog => Some(watch(pid).context("cannot start the watchdog of", &self.program)?),
            Guard::Nobody | Guard::Kernel => None,
        };
        Ok(Running { id, child: Some(child), watchdog })
    }
}

impl Running {
    /// Takes over a process that an earlier run of ours started.
    pub(crate) fn found(id: ProcessId) -> Self {
        Self { id, child: None, watchdog: None }
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.reap().is_none() && self.id.is_alive()
    }

    /// How it ended, if it has ended and is our own child. Frees its entry in the process table.
    pub(crate) fn reap(&mut self) -> Option<ExitStatus> {
        if let Some(child) = self.child.as_mut() {
            return child.try_wait().ok().flatten();
        }
        // Found by its record, but perhaps started by this very process through another handle.
        if let Err(error) = waitpid(self.id.raw(), Some(WaitPidFlag::WNOHANG)) {
            tracing::trace!(pid = self.id.pid, %error, "not our child");
        }
        None
    }

    /// Sends SIGKILL to the whole tree and waits until every member is gone.
    pub(crate) async fn kill(&mut self, service: &'static str) -> Result<(), StartError> {
        let tree = self.id.kill_tree().context("cannot kill", service)?;
        let left = wait_gone(tree, KILL_LIMIT).await;
        self.finish(service, left)
    }

    /// Sends `signal` (resuming first what is paused), waits up to `grace` for the whole tree, kills what is left.
    pub(crate) async fn terminate(
        &mut self,
        service: &'static str,
        signal: Signal,
        grace: Duration,
    ) -> Result<(), StartError> {
        let tree = self.ask_to_end(signal).context("cannot stop", service)?;
        let left = wait_gone(tree, grace).await;
        if !left.is_empty() {
            tracing::warn!(service, %signal, grace_s = grace.as_secs(), "did not stop in time and is killed");
        }
        for one in &left {
            one.kill_tree().context("cannot kill", service)?;
        }
        let left = wait_gone(left, KILL_LIMIT).await;
        self.finish(service, left)
    }

    /// The same for `Drop`, which can neither wait asynchronously nor fail.
    pub(crate) fn terminate_blocking(&mut self, service: &'static str, signal: Signal, grace: Duration) {
        let outcome = self.ask_to_end(signal).and_then(|tree| {
            let left = wait_gone_blocking(tree, grace);
            for one in &left {
                one.kill_tree()?;
            }
            Ok(wait_gone_blocking(left, KILL_LIMIT))
        });
        let finished = outcome.context("cannot stop", service).and_then(|left| self.finish(service, left));
        if let Err(error) = finished {
            tracing::error!(service, %error, "the server may still run");
        }
    }

    fn ask_to_end(&mut self, signal: Signal) -> io::Result<Vec<ProcessId>> {
        let mut tree = self.id.descendants();
        tree.insert(0, self.id.clone());
        self.id.signal(signal)?;
        // A stopped process acts on the signal when it goes on.
        self.id.thaw()?;
        Ok(tree)
    }

    fn finish(&mut self, service: &'static str, left: Vec<ProcessId>) -> Result<(), StartError> {
        self.reap();
        if let Some(mut watchdog) = self.watchdog.take() {
            watchdog.kill().and_then(|()| watchdog.wait()).context("cannot end the watchdog of", service)?;
        }
        if left.is_empty() {
            return Ok(());
        }
        let pids = left.into_iter().map(|one| one.pid).collect();
        Err(StartError::Unkillable { service, pids, waited: KILL_LIMIT })
    }
}

/// Settings meant for clients (PGPORT, PGDATA, PGOPTIONS ...) must not reach a server or initdb.
pub(crate) fn without_client_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(name);
        }
    }
}

/// Whether this program exists and takes these arguments.
fn works(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Starts a child from a thread that lives as long as our process.
///
/// The kernel sends the parent-death signal when the *thread* that forked ends, and the threads of an async runtime
/// or of a test come and go.
async fn spawn_on_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, oneshot::Sender<io::Result<Child>>);
    static ORDERS: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in receiver {
                if let Err(Ok(mut orphan)) = reply.send(command.spawn()) {
                    // Whoever ordered it has been cancelled meanwhile: nobody else would end it.
                    if let Err(error) = orphan.kill().and_then(|()| orphan.wait()) {
                        tracing::error!(pid = orphan.id(), %error, "cannot end a server nobody waits for");
                    }
                }
            }
        });
        sender
    });
    let (reply, child) = oneshot::channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    orders.send((command, reply)).map_err(|_| gone())?;
    child.await.map_err(|_| gone())?
}

/// A shell that kills `pid` when the pipe to it closes, that is when we end in whatever way.
fn watch(pid: u32) -> io::Result<Child> {
    // The start time is compared so that a recycled pid is left alone.
    let script =
        r#"s=$(ps -o lstart= -p "$1"); read -r _; [ "$(ps -o lstart= -p "$1")" = "$s" ] && kill -KILL "$1""#;
    Command::new("sh")
        .args(["-c", script, "flotilla-watchdog", &pid.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

/// Looks for a program in these directories, then along PATH.
pub(crate) fn find_program(name: &str, first: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    first
        .iter()
        .cloned()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|file| fs::metadata(file).is_ok_and(|meta| meta.is_file()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::time::Instant;

    use super::*;

    fn sleeper(dir: &Path) -> Launch {
        Launch { program: "/bin/sleep".into(), args: vec!["300".into()], cwd: dir.into(), account: None }
    }

    #[tokio::test]
    async fn the_watchdog_kills_the_server_when_its_pipe_closes() {
        let dir = tempfile::tempdir().unwrap();
        let mut running =
            sleeper(dir.path()).spawn_guarded(&dir.path().join("log"), Guard::Watchdog).await.unwrap();
        assert!(running.is_alive());
        // What the end of our process does to the pipe.
        drop(running.watchdog.as_mut().unwrap().stdin.take());
        let deadline = Instant::now() + Duration::from_secs(10);
        while running.is_alive() {
            assert!(Instant::now() < deadline, "still alive: {running:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.kill("sleep").await.unwrap();
    }

    #[test]
    fn a_server_outlives_the_thread_and_runtime_that_started_it() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let path = dir.path().to_owned();
        let mut running = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(sleeper(&path).spawn(&log, &Lifetime::Handle)).unwrap()
        })
        .join()
        .unwrap();
        assert!(running.is_alive(), "the parent-death signal must not fire for a thread");
        running.terminate_blocking("sleep", Signal::SIGTERM, Duration::from_secs(10));
        assert!(!running.is_alive());
    }
}
