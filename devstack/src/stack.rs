//! The services behind `flotilla dev`: they go on when the command has ended, and are found again by their records.

mod record;
mod service;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::AsyncWrite;

pub use self::service::Service;

use self::record::{Record, write_private};
use crate::cluster::blocking;
use crate::error::{IoContext, StartError};
use crate::launch::{Lifetime, Running};
use crate::logs;
use crate::ports;
use crate::postgres::PostgresOptions;
use crate::process::ProcessId;
use crate::redis::RedisOptions;
use crate::server::{Engine, READY_WITHIN, STOP_WITHIN, Server};
use crate::vectors::VectorsOptions;
use crate::{PostgresEngine, RedisEngine, VectorsEngine};

/// How long `status` waits for an answer.
const PROBE_LIMIT: Duration = Duration::from_secs(3);
/// How often a kept server is asked until it answers.
const PROBE_EVERY: Duration = Duration::from_millis(50);

/// A set of services that belongs to a directory. Data, logs, records and the `env` file are all in there.
#[derive(Debug)]
pub struct Stack;

/// Which services a stack has.
#[derive(Clone, Debug)]
pub struct StackOptions {
    /// The services to start. Default: all four.
    pub services: Vec<Service>,
    /// Servers that somebody else runs: nothing is started for these. Default: from the environment variables
    /// `DATABASE_URL`, `REDIS_QUEUE_URL`, `REDIS_CACHE_URL` and `QDRANT_URL`; a URL that this stack itself handed out
    /// (a shell has read its `env` file) doesn't count.
    pub external: BTreeMap<Service, String>,
}

impl Default for StackOptions {
    fn default() -> Self {
        let set = |service: &Service| Some((*service, std::env::var(service.variable()).ok()?));
        let external = Service::ALL.iter().filter_map(set).filter(|(_, url)| !url.is_empty()).collect();
        Self { services: Service::ALL.to_vec(), external }
    }
}

/// How a service of a stack is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Somebody else runs it; its variable was set in the environment.
    External,
    /// Its process runs.
    Running {
        /// The server's process.
        pid: u32,
    },
    /// Its process ended without `down`.
    Crashed {
        /// The process that ended.
        pid: u32,
    },
    /// It was stopped by `down`.
    Stopped,
    /// It was never started here.
    Absent,
}

/// One service of a stack.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceStatus {
    /// Which one.
    pub service: Service,
    /// How it is.
    #[serde(flatten)]
    pub state: State,
    /// Where it listens, or will listen again. May hold a password if it is external; see [`ServiceStatus::shown_url`].
    pub url: Option<String>,
    /// Why it doesn't serve although it should; `None` if it answers or isn't meant to run.
    pub problem: Option<String>,
    /// What a person should know, for example that it was restarted after a crash.
    pub note: Option<String>,
    /// Its log file, if we run it.
    pub log: Option<PathBuf>,
}

impl ServiceStatus {
    /// The URL without its password, for people to see.
    pub fn shown_url(&self) -> Option<String> {
        let url = self.url.as_ref()?;
        let parts = url.split_once("://").and_then(|(scheme, rest)| {
            let (user, place) = rest.rsplit_once('@')?;
            let (name, _) = user.split_once(':')?;
            Some(format!("{scheme}://{name}:***@{place}"))
        });
        Some(parts.unwrap_or_else(|| url.clone()))
    }
}

/// All services of a stack.
#[derive(Clone, Debug, Serialize)]
pub struct StackStatus {
    /// The stack's directory.
    pub dir: PathBuf,
    /// Its services, in a fixed order.
    pub services: Vec<ServiceStatus>,
}

impl StackStatus {
    /// Environment variables for the `flotilla` programs, for the services that have an address.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        self.services.iter().filter_map(|one| Some((one.service.variable(), one.url.clone()?))).collect()
    }
}

impl Stack {
    /// Starts what doesn't run yet and writes `<dir>/env`; see [`Stack::up_with`].
    pub async fn up(dir: &Path) -> Result<StackStatus, StartError> {
        Box::pin(Self::up_with(dir, &StackOptions::default())).await
    }

    /// Starts what doesn't run yet, in parallel, waits until everything answers, and writes `<dir>/env` with lines
    /// `export NAME='url'` for a shell.
    ///
    /// Running servers are kept, ended ones are started again on their data and, if it is still free, their port.
    /// Servers survive the end of our process. Errors: the first of those that didn't start; the others go on running.
    pub async fn up_with(dir: &Path, options: &StackOptions) -> Result<StackStatus, StartError> {
        let dir = open(dir)?;
        let _lock = lock(&dir).await?;
        let wanted = |service| options.services.contains(&service);
        let (postgres, queue, cache, vectors) = tokio::join!(
            one::<PostgresEngine>(wanted(Service::Postgres), &dir, Service::Postgres, options, |port| {
                PostgresOptions { port, sync_new_directory: true, ..PostgresOptions::default() }
            }),
            one::<RedisEngine>(wanted(Service::RedisQueue), &dir, Service::RedisQueue, options, |port| {
                RedisOptions { port, ..RedisOptions::queue() }
            }),
            one::<RedisEngine>(wanted(Service::RedisCache), &dir, Service::RedisCache, options, |port| {
                RedisOptions { port, ..RedisOptions::cache() }
            }),
            one::<VectorsEngine>(wanted(Service::Vectors), &dir, Service::Vectors, options, |port| {
                VectorsOptions { port, ..VectorsOptions::default() }
            }),
        );
        let services: Vec<_> = [postgres?, queue?, cache?, vectors?].into_iter().flatten().collect();
        let status = StackStatus { dir, services };
        write_env(&status)?;
        Ok(status)
    }

    /// How each service is; asks those that should serve, waiting at most 3 s. Changes nothing.
    pub async fn status(dir: &Path) -> Result<StackStatus, StartError> {
        Self::status_with(dir, &StackOptions::default()).await
    }

    /// The same for a choice of services.
    pub async fn status_with(dir: &Path, options: &StackOptions) -> Result<StackStatus, StartError> {
        // A stack that was never started has no directory, and asking doesn't make one.
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let mut services = Vec::new();
        for service in Service::ALL.into_iter().filter(|service| options.services.contains(service)) {
            services.push(status_of(&dir, service, options).await?);
        }
        Ok(StackStatus { dir, services })
    }

    /// Stops all services gracefully, in parallel; data, ports and logs stay. Returns those that were running.
    ///
    /// Never touches a process it didn't start: a recorded pid that now belongs to another process is left alone.
    pub async fn down(dir: &Path) -> Result<Vec<Service>, StartError> {
        if !dir.exists() {
            return Ok(Vec::new());
        }
        let dir = open(dir)?;
        let _lock = lock(&dir).await?;
        let (postgres, queue, cache, vectors) = tokio::join!(
            stop::<PostgresEngine>(&dir, Service::Postgres),
            stop::<RedisEngine>(&dir, Service::RedisQueue),
            stop::<RedisEngine>(&dir, Service::RedisCache),
            stop::<VectorsEngine>(&dir, Service::Vectors),
        );
        let stopped = [postgres?, queue?, cache?, vectors?];
        Ok(Service::ALL
            .into_iter()
            .zip(stopped)
            .filter_map(|(service, ran)| ran.then_some(service))
            .collect())
    }

    /// Writes the last lines of a service's log to `out`; with `follow` goes on until cancelled.
    ///
    /// Cancel-safe: at worst a part of a line was written.
    pub async fn logs(
        dir: &Path,
        service: Service,
        follow: bool,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), StartError> {
        logs::show(&service.log(dir), follow, out).await
    }
}

fn open(dir: &Path) -> Result<PathBuf, StartError> {
    fs::create_dir_all(dir).context("cannot create", dir)?;
    dir.canonicalize().context("cannot find", dir)
}

/// One `up` or `down` at a time; freed when dropped.
async fn lock(dir: &Path) -> Result<File, StartError> {
    let path = dir.join("lock");
    blocking(move || {
        let file = OpenOptions::new().create(true).append(true).open(&path).context("cannot open", &path)?;
        file.lock().context("cannot lock", &path)?;
        Ok(file)
    })
    .await
}

/// The server that somebody else runs for this service, unless it is really ours.
fn external<'a>(options: &'a StackOptions, service: Service, record: Option<&Record>) -> Option<&'a String> {
    let ours = |url: &&String| record.is_some_and(|record| record.urls.contains(*url));
    options.external.get(&service).filter(|url| !ours(url))
}

/// Brings one service up; `None` if it isn't wanted.
async fn one<E: Engine>(
    wanted: bool,
    dir: &Path,
    service: Service,
    options: &StackOptions,
    with_port: impl FnOnce(Option<u16>) -> E::Options,
) -> Result<Option<ServiceStatus>, StartError> {
    if !wanted {
        return Ok(None);
    }
    let record = Record::read(dir, service)?;
    if external(options, service, record.as_ref()).is_some() {
        return status_of(dir, service, options).await.map(Some);
    }
    if let Some((record, process)) = record.as_ref().and_then(|record| Some((record, record.living()?))) {
        answers_at_last(service, record.url(), process, &service.log(dir)).await?;
        return status_of(dir, service, options).await.map(Some);
    }

    let home = service.dir(dir);
    fs::create_dir_all(&home).context("cannot create", &home)?;
    let former = record.as_ref().map(|record| record.port);
    let port = former.filter(|port| ports::is_free(*port));
    let crashed = record.as_ref().is_some_and(|record| record.process.is_some());
    let urls = record.map(|record| record.urls).unwrap_or_default();
    let on_spawn = |process: &ProcessId, port: u16| {
        let mut record = Record { port, process: Some(process.clone()), urls: urls.clone(), note: None };
        record.add_url(E::url(port));
        record.write(dir, service)
    };
    let starting = Server::<E>::start_as(&home, with_port(port), Lifetime::Detached, &on_spawn);
    let server = Box::pin(starting).await?;

    if let Some(note) = server.note()
        && let Some(mut record) = Record::read(dir, service)?
    {
        record.note = Some(note.to_owned());
        record.write(dir, service)?;
    }
    let mut status = status_of(dir, service, options).await?;
    let mut notes: Vec<_> = status.note.take().into_iter().collect();
    if crashed {
        notes.push("had ended unexpectedly and was started again on its data".into());
    }
    if let (Some(former), None) = (former, port) {
        notes.push(format!(
            "port {former} was taken meanwhile: now on {}, read the env file again",
            server.port()
        ));
    }
    status.note = (!notes.is_empty()).then(|| notes.join("; "));
    Ok(Some(status))
}

/// Waits for a server that an earlier run started; it may still be recovering.
async fn answers_at_last(
    service: Service,
    url: &str,
    process: &ProcessId,
    log: &Path,
) -> Result<(), StartError> {
    let begun = Instant::now();
    loop {
        let last = match service.probe(url, PROBE_LIMIT).await {
            Ok(()) => return Ok(()),
            Err(problem) => problem,
        };
        // If it ends meanwhile, the status tells so, and the next `up` starts it again.
        if !process.is_alive() || begun.elapsed() >= READY_WITHIN {
            return Err(StartError::NotReady {
                service: service.name(),
                pid: process.pid,
                waited: begun.elapsed(),
                last,
                log: log.to_owned(),
                tail: logs::tail(log),
            });
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

async fn status_of(
    dir: &Path,
    service: Service,
    options: &StackOptions,
) -> Result<ServiceStatus, StartError> {
    let record = Record::read(dir, service)?;
    if let Some(url) = external(options, service, record.as_ref()) {
        let problem = service.probe(url, PROBE_LIMIT).await.err();
        let problem = problem.map(|problem| format!("{} is set, but: {problem}", service.variable()));
        return Ok(ServiceStatus {
            service,
            state: State::External,
            url: Some(url.clone()),
            problem,
            note: None,
            log: None,
        });
    }
    let Some(record) = record else {
        return Ok(ServiceStatus {
            service,
            state: State::Absent,
            url: None,
            problem: None,
            note: None,
            log: None,
        });
    };
    let (state, problem) = match (record.living(), &record.process) {
        (Some(process), _) => {
            let problem = service.probe(record.url(), PROBE_LIMIT).await.err();
            (State::Running { pid: process.pid }, problem)
        }
        (None, Some(process)) => {
            let problem =
                format!("process {} has ended: run `up` again, the data is still there", process.pid);
            (State::Crashed { pid: process.pid }, Some(problem))
        }
        (None, None) => (State::Stopped, None),
    };
    Ok(ServiceStatus {
        service,
        state,
        url: Some(record.url().to_owned()),
        problem,
        note: record.note,
        log: Some(service.log(dir)),
    })
}

/// Stops one service; returns whether it ran.
async fn stop<E: Engine>(dir: &Path, service: Service) -> Result<bool, StartError> {
    let Some(mut record) = Record::read(dir, service)? else { return Ok(false) };
    let Some(process) = record.process.take() else { return Ok(false) };
    let ran = process.is_alive();
    Running::found(process).terminate(E::NAME, E::STOP, STOP_WITHIN).await?;
    record.write(dir, service)?;
    Ok(ran)
}

/// Lines for a shell. Private, because an external URL may hold a password.
fn write_env(status: &StackStatus) -> Result<(), StartError> {
    let lines = status
        .env()
        .into_iter()
        .map(|(name, url)| format!("export {name}='{}'\n", url.replace('\'', r"'\''")));
    write_private(&status.dir.join("env"), &lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(url: &str) -> ServiceStatus {
        ServiceStatus {
            service: Service::Postgres,
            state: State::External,
            url: Some(url.into()),
            problem: None,
            note: None,
            log: None,
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let shown = |url| status(url).shown_url();
        assert_eq!(shown("postgres://a:b@c:1/d").as_deref(), Some("postgres://a:***@c:1/d"));
        assert_eq!(shown("redis://:se@cret@c:1/0").as_deref(), Some("redis://:***@c:1/0"));
        assert_eq!(shown("http://127.0.0.1:6334").as_deref(), Some("http://127.0.0.1:6334"));
        assert_eq!(shown("postgres://a@c/d").as_deref(), Some("postgres://a@c/d"));
    }
}
