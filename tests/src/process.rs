//! A worker as a process of its own, to be killed, stopped and drained.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
};

use devstack::testing::Port;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Faults, SHORT, wait_until};

/// Lines of a worker's log that a failed test shows.
const TAIL: usize = 60;

/// A worker to be started; see [`Fleet::worker`](crate::Fleet::worker).
pub struct WorkerBuilder {
    command: Command,
    name: String,
    log: PathBuf,
    port: Port,
}

impl WorkerBuilder {
    pub(crate) fn new(name: String, dir: &Path, env: Vec<(String, String)>) -> Self {
        let port = Port::free().expect("a port for the worker");
        let addr = format!("127.0.0.1:{}", port.number());
        let mut command = if Path::new("/usr/bin/setpriv").exists() {
            // So that a worker does not outlive a test that is killed.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]).arg(binary());
            command
        } else {
            Command::new(binary())
        };
        command
            .arg("worker")
            .envs(env)
            .env("FLOTILLA_WORKER_ADDR", &addr)
            .env_remove("FLOTILLA_FAULTS")
            .stdin(Stdio::null());
        Self { command, log: dir.join(format!("{name}.log")), name, port }
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Arms fault points, in the form of `FLOTILLA_FAULTS`: `ingest.vectors.after=kill;ingest.cache.before=error*3`. Each
    /// firing is counted over all workers of the fleet.
    pub fn faults(self, faults: impl Into<String>) -> Self {
        self.env("FLOTILLA_FAULTS", faults)
    }

    /// Arms fault points that are counted on their own.
    pub fn armed(self, faults: &Faults) -> Self {
        self.env("FLOTILLA_FAULTS_DIR", faults.dir.display().to_string()).faults(&faults.spec)
    }

    /// Lets it know nothing of a kind, as a release before it came.
    pub fn ignorant_of(self, kind: &str) -> Self {
        self.env("FLOTILLA_UNKNOWN_KIND", kind)
    }

    /// Gives it leases and time-outs that no pause of a busy machine uses up, for tests in which nothing is to fail: the
    /// harness's own are short, so that a second delivery or a charge could be the machine's.
    pub fn patient(self) -> Self {
        self.env("FLOTILLA_LEASE_MS", "20000").env("FLOTILLA_CALL_TIMEOUT_MS", "10000")
    }

    /// Makes it leave the embedding of its `ingest` jobs to who serves the queue `embed`.
    pub fn handing_over(self) -> Self {
        self.env("FLOTILLA_HAND_EMBEDDING_OVER", "true")
    }

    /// Jobs that run at once.
    pub fn concurrency(self, jobs: usize) -> Self {
        self.env("FLOTILLA_CONCURRENCY", jobs.to_string())
    }

    /// The queues that it serves instead of ingest, embed and delete.
    pub fn queues(self, queues: &[&str]) -> Self {
        self.env("FLOTILLA_QUEUES", queues.join(","))
    }

    /// Starts the process; does not wait until it serves.
    pub fn start(mut self) -> WorkerProcess {
        let log = File::create(&self.log).expect("a log file for the worker");
        let both = log.try_clone().expect("the log file a second time");
        let child = self.command.stdout(log).stderr(both).spawn().expect("start a worker");
        let pid = Pid::from_raw(child.id().cast_signed());
        WorkerProcess { name: self.name, port: self.port, log: self.log, pid, child: Mutex::new(child) }
    }
}

/// A running worker process. Killed when dropped; its log's end is shown if the test fails.
pub struct WorkerProcess {
    /// `worker-1`, …
    pub name: String,
    /// Its process.
    pub pid: Pid,
    port: Port,
    log: PathBuf,
    child: Mutex<Child>,
}

impl WorkerProcess {
    /// Where it serves `/healthz`, `/readyz` and `/metrics`: `http://127.0.0.1:PORT`.
    pub fn health_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port.number())
    }

    /// What it reports, by the plainest of requests.
    pub async fn metrics(&self) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port.number())).await?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    /// The value of a gauge in what [`metrics`](Self::metrics) answered, by its name and labels: `name{label="value"}`.
    pub fn gauge(metrics: &str, series: &str) -> Option<f64> {
        metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// All that it has written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it claims jobs.
    pub async fn ready(&self) {
        self.logged("worker ready").await;
    }

    /// Waits until its log holds `text`.
    pub async fn logged(&self, text: &str) {
        wait_until(&format!("{} logs {text:?}", self.name), SHORT, async || {
            if self.log().contains(text) {
                return Ok(());
            }
            if let Some(status) = self.ended() {
                panic!("{} ended ({status}) before it logged {text:?}:\n{}", self.name, self.tail());
            }
            Err(self.tail())
        })
        .await;
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().expect("ask for the state of a child")
    }

    /// Whether the process is there, running or stopped.
    pub fn alive(&self) -> bool {
        self.ended().is_none()
    }

    /// Sends SIGKILL and waits until the process is gone.
    pub async fn kill9(&self) -> ExitStatus {
        self.signal(Signal::SIGKILL);
        self.exit().await
    }

    /// Stops it as a whole (SIGSTOP): it lives, holds its connections, and does nothing.
    pub async fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        self.stopped().await;
    }

    /// Waits until it is stopped, by us or by one of its own fault points.
    pub async fn stopped(&self) {
        wait_until(&format!("{} is stopped", self.name), SHORT, async || match state_of(self.pid) {
            Some('T') => Ok(()),
            state => Err(format!("process state {state:?}\n{}", self.tail())),
        })
        .await;
    }

    /// Lets a stopped process go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Asks it to drain (SIGTERM) and waits for its end. A process that is not [`ready`](Self::ready) may not listen to
    /// signals yet, and just dies.
    pub async fn terminate(&self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.exit().await
    }

    /// Waits for its end.
    pub async fn exit(&self) -> ExitStatus {
        wait_until(&format!("{} ends", self.name), SHORT, async || self.ended().ok_or_else(|| self.tail()))
            .await
    }

    /// Waits until it was killed by SIGKILL, as a fault point does; any other end fails the test.
    pub async fn killed(&self) {
        let status = self.exit().await;
        assert_eq!(
            status.signal(),
            Some(Signal::SIGKILL as i32),
            "{} ended otherwise: {status}\n{}",
            self.name,
            self.tail()
        );
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        format!(
            "--- the end of the log of {}\n{}",
            self.name,
            lines[lines.len().saturating_sub(TAIL)..].join("\n")
        )
    }

    fn signal(&self, signal: Signal) {
        // Not to a pid that may be somebody else's by now.
        if self.alive() {
            kill(self.pid, signal).expect("signal a child");
        }
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
        let child = self.child.get_mut().unwrap();
        if matches!(child.try_wait(), Ok(None)) {
            child.kill().expect("kill a child");
            child.wait().expect("reap a child");
        }
    }
}

/// The letter that the kernel has for the state of a process: `T` is stopped.
fn state_of(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The pids of this process's children.
pub(crate) fn children() -> Vec<i32> {
    let us = std::process::id().to_string();
    let processes = fs::read_dir("/proc").expect("/proc");
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)) == Some(us.as_str())
        })
        .collect()
}

/// The program under test: `FLOTILLA_BIN`, or the one beside this test's own executable.
pub(crate) fn binary() -> PathBuf {
    let beside = || {
        let test = std::env::current_exe().expect("the path of this test");
        // target/debug/deps/<test> → target/debug/flotilla
        test.parent().and_then(Path::parent).expect("a target directory").join("flotilla")
    };
    let path = std::env::var_os("FLOTILLA_BIN").map_or_else(beside, PathBuf::from);
    assert!(
        path.is_file(),
        "no worker to test at {}: run `cargo build --workspace --features cli/faults`, or set FLOTILLA_BIN",
        path.display()
    );
    path
}
