//! The processes: servers behind proxies, supervised workers, and the faults that meet them.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex as StdMutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use devstack::{Link, Proxy, StartError, testing::TestServices};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::Mutex,
};

use super::plan::{Fault, Store, Target, Trouble, WORKERS};
use crate::output;

/// How long a worker may take to drain before it is killed.
const DRAIN_WITHIN: Duration = Duration::from_secs(20);
/// How often the supervisor looks after the workers.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Does the same to whichever server it is.
macro_rules! on_server {
    ($services:expr, $store:expr, $action:ident) => {
        match $store {
            Store::Postgres => $services.postgres().$action().await,
            Store::Queue => $services.redis_queue().$action().await,
            Store::Cache => $services.redis_cache().$action().await,
            Store::Vectors => $services.vectors().$action().await,
        }
    };
}

/// Servers with a proxy in front of each.
pub struct Servers {
    services: TestServices,
    proxies: BTreeMap<Store, Proxy>,
}

impl Servers {
    pub async fn start() -> Result<Self, StartError> {
        let services = TestServices::start().await?;
        let proxies = [
            (Store::Postgres, services.postgres().port()),
            (Store::Queue, services.redis_queue().port()),
            (Store::Cache, services.redis_cache().port()),
            (Store::Vectors, services.vectors().port()),
        ];
        let proxies = proxies
            .into_iter()
            .map(|(store, port)| Ok((store, Proxy::start(port)?)))
            .collect::<Result<_, StartError>>()?;
        Ok(Self { services, proxies })
    }

    /// Where the servers are.
    pub fn direct(&self) -> Vec<(&'static str, String)> {
        self.services.env()
    }

    /// Where they are for workers and load: behind the proxies.
    pub fn proxied(&self) -> Vec<(&'static str, String)> {
        let ports = HashMap::from([
            ("DATABASE_URL", (self.services.postgres().port(), Store::Postgres)),
            ("REDIS_QUEUE_URL", (self.services.redis_queue().port(), Store::Queue)),
            ("REDIS_CACHE_URL", (self.services.redis_cache().port(), Store::Cache)),
            ("QDRANT_URL", (self.services.vectors().port(), Store::Vectors)),
        ]);
        let behind = |(name, url): (&'static str, String)| {
            let url = ports.get(name).map_or(url.clone(), |(port, store)| {
                url.replace(&format!(":{port}"), &format!(":{}", self.proxies[store].port()))
            });
            (name, url)
        };
        self.direct().into_iter().map(behind).collect()
    }

    /// For logs of the workers.
    pub fn dir(&self) -> &Path {
        self.services.dir()
    }

    async fn server(&self, store: Store, trouble: Trouble, lasts: Duration) -> anyhow::Result<()> {
        let services = &self.services;
        match trouble {
            Trouble::Kill => {
                on_server!(services, store, kill9)?;
                tokio::time::sleep(lasts).await;
                on_server!(services, store, restart)?;
            }
            Trouble::Pause => {
                on_server!(services, store, pause)?;
                tokio::time::sleep(lasts).await;
                on_server!(services, store, resume)?;
            }
            Trouble::Flush => {
                let url = if store == Store::Queue {
                    services.redis_queue().url()
                } else {
                    services.redis_cache().url()
                };
                let mut redis = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
                redis::cmd("FLUSHALL").exec_async(&mut redis).await?;
            }
            _ => on_server!(services, store, restart)?,
        }
        Ok(())
    }

    async fn link(&self, store: Store, trouble: Trouble, lasts: Duration) {
        let link = match trouble {
            Trouble::Hang => Link::Hung,
            Trouble::Slow(delay) => Link::Slow(delay),
            _ => Link::Cut,
        };
        self.proxies[&store].set(link);
        tokio::time::sleep(lasts).await;
        self.proxies[&store].set(Link::Open);
    }
}

/// A worker process with its log.
struct Worker {
    child: Child,
    log: PathBuf,
}

/// How workers are started.
pub struct Start {
    /// Settings, the stores' addresses among them.
    pub env: Vec<(&'static str, String)>,
    pub dir: PathBuf,
}

impl Start {
    fn worker(&self, no: usize, starts: u32) -> anyhow::Result<Worker> {
        let log = self.dir.join(format!("worker-{no}-{starts}.log"));
        let file = File::create(&log).with_context(|| format!("{} can't be made", log.display()))?;
        let own = std::env::current_exe()?;
        // So that no worker outlives a run that is killed.
        let mut command = if Path::new("/usr/bin/setpriv").exists() {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]).arg(own);
            command
        } else {
            Command::new(own)
        };
        let child = command
            .args(["bench", "chaos-worker", "--addr", "127.0.0.1:0"])
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .context("a worker can't be started")?;
        Ok(Worker { child, log })
    }
}

impl Worker {
    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id() {
            kill(Pid::from_raw(pid.cast_signed()), signal).context("a worker can't be signalled")?;
        }
        Ok(())
    }

    /// The end of its log, if it had begun to work.
    fn was_ready(&self) -> Option<String> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        log.contains("worker ready").then(|| lines[lines.len().saturating_sub(3)..].join(" / "))
    }
}

struct Slot {
    worker: Worker,
    starts: u32,
}

/// Servers and workers, and what has happened to them.
pub struct Fleet {
    pub servers: Servers,
    start: Start,
    slots: Vec<Mutex<Slot>>,
    busy: HashMap<Target, Mutex<()>>,
    done: StdMutex<BTreeMap<String, u64>>,
    /// Workers that ended though nobody ended them.
    odd: StdMutex<Vec<String>>,
}

impl Fleet {
    pub fn start(servers: Servers, start: Start) -> anyhow::Result<Self> {
        let slots = (0..WORKERS)
            .map(|no| Ok(Mutex::new(Slot { worker: start.worker(no, 0)?, starts: 0 })))
            .collect::<anyhow::Result<_>>()?;
        let busy = Store::ALL
            .into_iter()
            .flat_map(|store| [Target::Server(store), Target::Link(store)])
            .map(|target| (target, Mutex::default()))
            .collect();
        Ok(Self { servers, start, slots, busy, done: StdMutex::default(), odd: StdMutex::default() })
    }

    /// How often each trouble has come.
    pub fn done(&self) -> BTreeMap<String, u64> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Workers that ended by themselves while they worked.
    pub fn odd(&self) -> Vec<String> {
        self.odd.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts workers again that have ended: a worker gives up when a store is away while it starts, and whoever runs it
    /// starts it again. One that had begun to work must not end.
    pub async fn supervise(&self) -> anyhow::Result<()> {
        loop {
            for (no, slot) in self.slots.iter().enumerate() {
                // Somebody who holds it makes trouble there, and starts it again himself.
                let Ok(mut slot) = slot.try_lock() else { continue };
                if let Some(status) = slot.worker.child.try_wait()? {
                    if let Some(tail) = slot.worker.was_ready() {
                        let mut odd = self.odd.lock().unwrap_or_else(PoisonError::into_inner);
                        odd.push(format!("worker {no} ended by itself ({status}): {tail}"));
                    }
                    self.start_again(no, &mut slot)?;
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn start_again(&self, no: usize, slot: &mut Slot) -> anyhow::Result<()> {
        slot.starts += 1;
        slot.worker = self.start.worker(no, slot.starts)?;
        Ok(())
    }

    /// Lets one fault happen, and its end. Not after `end`: what had to wait that long does not happen.
    pub async fn strike(&self, fault: Fault, begun: Instant, end: Instant) -> anyhow::Result<()> {
        tokio::time::sleep_until((begun + fault.at).into()).await;
        let named = format!("{} {}", kind(fault.target), name(fault.trouble));
        match fault.target {
            Target::Worker(no) => {
                let mut slot = self.slots[no].lock().await;
                if Instant::now() > end {
                    return Ok(());
                }
                self.trouble_worker(no, &mut slot, fault).await?;
            }
            Target::Server(store) => {
                let _busy = self.busy[&fault.target].lock().await;
                if Instant::now() > end {
                    return Ok(());
                }
                let done = self.servers.server(store, fault.trouble, fault.lasts).await;
                match done {
                    Err(error) if fault.trouble == Trouble::Flush => {
                        // It was away itself.
                        tracing::debug!(%error, "not flushed");
                        return Ok(());
                    }
                    done => done.with_context(|| format!("{fault}"))?,
                }
            }
            Target::Link(store) => {
                let _busy = self.busy[&fault.target].lock().await;
                if Instant::now() > end {
                    return Ok(());
                }
                self.servers.link(store, fault.trouble, fault.lasts).await;
            }
        }
        *self.done.lock().unwrap_or_else(PoisonError::into_inner).entry(named).or_default() += 1;
        tracing::info!("{fault}");
        Ok(())
    }

    async fn trouble_worker(&self, no: usize, slot: &mut Slot, fault: Fault) -> anyhow::Result<()> {
        match fault.trouble {
            Trouble::Pause => {
                slot.worker.signal(Signal::SIGSTOP)?;
                tokio::time::sleep(fault.lasts).await;
                return slot.worker.signal(Signal::SIGCONT);
            }
            Trouble::Restart => {
                slot.worker.signal(Signal::SIGTERM)?;
                if tokio::time::timeout(DRAIN_WITHIN, slot.worker.child.wait()).await.is_err() {
                    output::say(format!("worker {no} did not drain within {DRAIN_WITHIN:?}"));
                    slot.worker.child.kill().await?;
                }
            }
            _ => {
                slot.worker.child.kill().await?;
                tokio::time::sleep(fault.lasts).await;
            }
        }
        self.start_again(no, slot)
    }
}

fn kind(target: Target) -> String {
    match target {
        Target::Worker(_) => "worker".to_owned(),
        other => other.to_string(),
    }
}

fn name(trouble: Trouble) -> String {
    match trouble {
        Trouble::Slow(_) => "slowed".to_owned(),
        other => other.to_string(),
    }
}
