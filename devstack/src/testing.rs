//! Private services for one test: started together, killed together.
//!
//! ```no_run
//! # async fn example() -> Result<(), devstack::StartError> {
//! use devstack::testing::TestServices;
//!
//! let services = TestServices::builder().postgres().redis_queue().start().await?;
//! let url = services.postgres().url();
//! services.redis_queue().kill9().await?;
//! services.redis_queue().restart().await?;
//! # Ok(()) }
//! ```

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::{fs, io};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::cluster;
use crate::error::{IoContext, StartError};
use crate::ports::PortLease;
use crate::postgres::{Postgres, PostgresOptions};
use crate::process::ProcessId;
use crate::redis::{Redis, RedisOptions};
use crate::vectors::{Vectors, VectorsOptions};

/// Set (to anything) to keep the directory with data and logs after the test.
pub const KEEP_VARIABLE: &str = "FLOTILLA_TEST_KEEP";
const KEEP_MARK: &str = "keep";
const PREFIX: &str = "flotilla-test-";

/// The services of one test, with their data in a directory of their own.
///
/// Dropping it kills them and removes the directory, also when the test panics; if the test process is killed, the
/// servers are killed with it, and a later test removes the directory.
#[derive(Debug)]
pub struct TestServices {
    postgres: Option<Postgres>,
    redis_queue: Option<Redis>,
    redis_cache: Option<Redis>,
    vectors: Option<Vectors>,
    // Dropped last: the servers work in it.
    dir: TestDir,
}

/// Chooses which services to start.
#[derive(Debug, Default)]
pub struct TestServicesBuilder {
    postgres: Option<PostgresOptions>,
    redis_queue: Option<RedisOptions>,
    redis_cache: Option<RedisOptions>,
    vectors: Option<VectorsOptions>,
}

impl TestServicesBuilder {
    /// Postgres with its defaults (fsync on).
    pub fn postgres(self) -> Self {
        self.postgres_with(PostgresOptions::default())
    }

    /// Postgres with these options.
    pub fn postgres_with(mut self, options: PostgresOptions) -> Self {
        self.postgres = Some(options);
        self
    }

    /// The queue Redis.
    pub fn redis_queue(self) -> Self {
        self.redis_queue_with(RedisOptions::queue())
    }

    /// The queue Redis with these options, for example a small `maxmemory`.
    pub fn redis_queue_with(mut self, options: RedisOptions) -> Self {
        self.redis_queue = Some(options);
        self
    }

    /// The cache Redis.
    pub fn redis_cache(mut self) -> Self {
        self.redis_cache = Some(RedisOptions::cache());
        self
    }

    /// The vector server.
    pub fn vectors(mut self) -> Self {
        self.vectors = Some(VectorsOptions::default());
        self
    }

    /// Starts the chosen services in parallel and waits until all answer.
    pub async fn start(self) -> Result<TestServices, StartError> {
        sweep();
        let dir = TestDir::create()?;
        let at = |name: &str| dir.path.join(name);
        let (postgres_dir, queue_dir, cache_dir, vectors_dir) =
            (at("postgres"), at("redis-queue"), at("redis-cache"), at("vectors"));
        let (postgres, redis_queue, redis_cache, vectors) = tokio::join!(
            async { start(self.postgres, |options| Postgres::start(&postgres_dir, options)).await },
            async { start(self.redis_queue, |options| Redis::start(&queue_dir, options)).await },
            async { start(self.redis_cache, |options| Redis::start(&cache_dir, options)).await },
            async { start(self.vectors, |options| Vectors::start(&vectors_dir, options)).await },
        );
        Ok(TestServices {
            postgres: postgres?,
            redis_queue: redis_queue?,
            redis_cache: redis_cache?,
            vectors: vectors?,
            dir,
        })
    }
}

async fn start<O, S, F>(options: Option<O>, begin: impl FnOnce(O) -> F) -> Result<Option<S>, StartError>
where
    F: Future<Output = Result<S, StartError>>,
{
    match options {
        Some(options) => begin(options).await.map(Some),
        None => Ok(None),
    }
}

impl TestServices {
    /// Starts all four services. With a cold cache the vector server is built first, which takes minutes.
    pub async fn start() -> Result<Self, StartError> {
        Self::builder().postgres().redis_queue().redis_cache().vectors().start().await
    }

    /// Begins a choice of services.
    pub fn builder() -> TestServicesBuilder {
        TestServicesBuilder::default()
    }

    /// The running services' environment variables, as the `flotilla` programs read them.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        [
            ("DATABASE_URL", self.postgres.as_ref().map(Postgres::url)),
            ("REDIS_QUEUE_URL", self.redis_queue.as_ref().map(Redis::url)),
            ("REDIS_CACHE_URL", self.redis_cache.as_ref().map(Redis::url)),
            ("QDRANT_URL", self.vectors.as_ref().map(Vectors::url)),
        ]
        .into_iter()
        .filter_map(|(name, url)| Some((name, url?.to_owned())))
        .collect()
    }

    /// The directory with data and logs; a test may put its own files here.
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// Postgres. Panics if it was not chosen.
    pub fn postgres(&self) -> &Postgres {
        chosen(self.postgres.as_ref(), "postgres")
    }

    /// The queue Redis. Panics if it was not chosen.
    pub fn redis_queue(&self) -> &Redis {
        chosen(self.redis_queue.as_ref(), "redis_queue")
    }

    /// The cache Redis. Panics if it was not chosen.
    pub fn redis_cache(&self) -> &Redis {
        chosen(self.redis_cache.as_ref(), "redis_cache")
    }

    /// The vector server. Panics if it was not chosen.
    pub fn vectors(&self) -> &Vectors {
        chosen(self.vectors.as_ref(), "vectors")
    }
}

fn chosen<'a, S>(service: Option<&'a S>, name: &str) -> &'a S {
    // A mistake in the test's own code, not a condition to handle.
    service.unwrap_or_else(|| panic!("this test did not choose {name}: call .{name}() on the builder"))
}

/// A free loopback port for a server that the test itself starts; no other test is given it while this lives.
///
/// A port that a listener was given and has left may be somebody else's before the server listens on it.
#[derive(Debug)]
pub struct Port(PortLease);

impl Port {
    /// Reserves one.
    pub fn free() -> Result<Self, StartError> {
        PortLease::free().map(Self)
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.0.port
    }
}

/// A directory named after the process that uses it.
#[derive(Debug)]
struct TestDir {
    path: PathBuf,
}

impl TestDir {
    fn create() -> Result<Self, StartError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", owner_mark(std::process::id())));
        fs::DirBuilder::new().mode(0o700).create(&path).context("cannot create", &path)?;
        let dir = Self { path };
        // As root, Postgres runs as another account and has to pass through.
        fs::set_permissions(&dir.path, fs::Permissions::from_mode(0o711))
            .context("cannot open up", &dir.path)?;
        Ok(dir)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if std::env::var_os(KEEP_VARIABLE).is_some() {
            eprintln!(
                "{KEEP_VARIABLE} is set: data and logs of the test are kept in {}",
                self.path.display()
            );
            if let Err(error) = fs::write(self.path.join(KEEP_MARK), "") {
                eprintln!("cannot mark {}: {error}", self.path.display());
            }
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Names a living process so that a recycled pid doesn't look like it: pid and the number at the end of its start time.
fn owner_mark(pid: u32) -> String {
    let started = ProcessId::of(pid).map_or_else(String::new, |id| id.started);
    let started = started.rsplit(':').next().unwrap_or_default();
    format!("{pid}-{}", started.replace(|c: char| !c.is_ascii_alphanumeric(), ""))
}

/// Removes the directories of test processes that were killed.
fn sweep() {
    let us = nix::unistd::geteuid().as_raw();
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.rsplit_once('-')) else {
            continue;
        };
        let pid = owner.0.split('-').next().and_then(|pid| pid.parse().ok());
        let ours = entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == us);
        let alive = pid.is_none_or(|pid| owner_mark(pid) == owner.0);
        if !ours || alive || entry.path().join(KEEP_MARK).exists() {
            continue;
        }
        cluster::free_leftovers(&entry.path().join("postgres/data"));
        // Another test process may be removing it at the same time.
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::debug!(dir = %entry.path().display(), %error, "cannot remove the directory of a dead test");
        }
    }
}

/// Answers like a Sentinel that watches a master on loopback, at whatever port it is told. Returns its own port; it ends with
/// the runtime.
pub async fn fake_sentinel(master: Arc<AtomicU16>) -> io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let own = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let master = Arc::clone(&master);
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                    let port = master.load(Ordering::Relaxed).to_string();
                    let answer = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(own)
}
