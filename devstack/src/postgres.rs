//! A private Postgres: trust on loopback only, fsync on, its own data directory, never a system service.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::account::{Account, Place};
use crate::cluster::{self, LockFile, Programs};
use crate::error::{IoContext, StartError};
use crate::launch::Launch;
use crate::probe;
use crate::process::{ProcessId, living_in, wait_gone};
use crate::server::{Engine, READY_WITHIN, Server};

/// The role and the database that clients use. The role is a superuser, so that migrations may create extensions.
pub(crate) const ROLE: &str = "flotilla";
pub(crate) const DATABASE: &str = "flotilla";
/// The configuration that production starts from; ours changes only what a private server needs.
const BASE_CONFIG: &str = include_str!("../../deploy/postgres/postgresql.conf");
/// Longest path of a unix socket on Linux is 107 bytes (`sun_path`); `/.s.PGSQL.12345` is added to the directory.
const LONGEST_SOCKET_DIR: usize = 107 - 15;
/// Backends whose postmaster was killed notice it at once unless they are in a long computation.
const ORPHANS_LIMIT: Duration = Duration::from_secs(10);

/// A private Postgres server. URL: `postgres://flotilla@127.0.0.1:PORT/flotilla`.
pub type Postgres = Server<PostgresEngine>;

/// How to start Postgres.
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// TCP port on 127.0.0.1; `None`: a free one.
    pub port: Option<u16>,
    /// Limit for the start, recovery included.
    pub ready_within: Duration,
    /// Whether commits are on disk when they are acknowledged. Default on, in tests too: what we promise depends on it.
    pub fsync: bool,
    /// `max_connections`. Default 200.
    pub max_connections: u16,
    /// `shared_buffers` in MB. Default 64.
    pub shared_buffers_mb: u32,
    /// Whether a new data directory is itself brought to disk (a second or more). Off: power loss soon after the first
    /// start may cost the whole directory, which is fine in tests.
    pub sync_new_directory: bool,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self {
            port: None,
            ready_within: READY_WITHIN,
            fsync: true,
            max_connections: 200,
            shared_buffers_mb: 64,
            sync_new_directory: false,
        }
    }
}

/// How [`Postgres`] differs from the other services.
#[derive(Debug)]
pub struct PostgresEngine {
    programs: Programs,
    account: Option<Account>,
    data: PathBuf,
    socket: PathBuf,
    options: PostgresOptions,
    note: Option<String>,
}

impl Engine for PostgresEngine {
    type Options = PostgresOptions;
    const NAME: &'static str = "postgres";
    // "Fast" shutdown: ends sessions, writes a checkpoint.
    const STOP: Signal = Signal::SIGINT;
    // "Immediate" shutdown: no checkpoint, but shared memory is freed, which SIGKILL would leave behind.
    const DISCARD: Signal = Signal::SIGQUIT;

    fn wishes(options: &PostgresOptions) -> (Option<u16>, Duration) {
        (options.port, options.ready_within)
    }

    async fn prepare(dir: &Path, options: PostgresOptions) -> Result<Self, StartError> {
        let programs = Programs::find()?;
        let account = Account::for_postgres()?;
        let place = match &account {
            Some(account) => account.place(dir)?,
            None => Place { dir: dir.to_owned(), note: None },
        };
        let data = place.dir.join("data");
        let socket = place.dir.join("socket");
        cluster::ensure(&programs, account.as_ref(), &data, options.sync_new_directory).await?;
        fs::create_dir_all(&socket).context("cannot create", &socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o700)).context("cannot protect", &socket)?;
        if let Some(account) = &account {
            account.give(&socket)?;
        }
        Ok(Self { programs, account, data, socket, options, note: place.note })
    }

    async fn launch(&self, port: u16) -> Result<Launch, StartError> {
        self.clear_stale().await?;
        self.write("postgresql.conf", &self.config(port))?;
        self.write(
            "pg_hba.conf",
            "local all all trust\nhost all all 127.0.0.1/32 trust\nhost all all ::1/128 trust\n",
        )?;
        Ok(Launch {
            program: self.programs.postgres.clone(),
            args: vec!["-D".into(), self.data.clone().into()],
            cwd: self.data.clone(),
            account: self.account.clone(),
        })
    }

    fn url(port: u16) -> String {
        format!("postgres://{ROLE}@127.0.0.1:{port}/{DATABASE}")
    }

    async fn probe(&self, url: &str, pid: u32) -> Result<(), String> {
        if LockFile::read(&self.data).and_then(|file| file.pid) != Some(pid) {
            return Err(format!("postmaster.pid does not name process {pid} yet"));
        }
        probe::postgres(url).await
    }

    fn discard(&self) {
        cluster::free_leftovers(&self.data);
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

impl PostgresEngine {
    /// Removes what a killed postmaster left in the data directory, once nobody works on it any more.
    ///
    /// Postgres checks its lock files itself, but takes any process that got the old pid (or the old one, as long as its
    /// parent hasn't reaped it) for a postmaster and then refuses to start; and it must never start while old backends still write.
    async fn clear_stale(&self) -> Result<(), StartError> {
        if !cfg!(target_os = "linux") {
            return Ok(());
        }
        let living = living_in(&self.data);
        let named = LockFile::read(&self.data).and_then(|file| file.pid).and_then(ProcessId::of);
        if let Some(postmaster) = named
            && living.contains(&postmaster)
        {
            return Err(StartError::AlreadyRunning {
                service: Self::NAME,
                dir: self.data.clone(),
                pid: postmaster.pid,
            });
        }
        for orphan in wait_gone(living, ORPHANS_LIMIT).await {
            tracing::warn!(pid = orphan.pid, "a backend outlived its killed postmaster and is killed");
            let tree = orphan.kill_tree().context("cannot kill an old backend of", &self.data)?;
            if let Some(stuck) = wait_gone(tree, ORPHANS_LIMIT).await.first() {
                return Err(StartError::Unkillable {
                    service: Self::NAME,
                    pids: vec![stuck.pid],
                    waited: ORPHANS_LIMIT,
                });
            }
        }
        // The socket has a lock file as well, with the same pid in it.
        let sockets = fs::read_dir(&self.socket).context("cannot list", &self.socket)?;
        let sockets = sockets.flatten().map(|entry| entry.path());
        for path in sockets.chain([LockFile::path(&self.data)]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context("cannot remove", &path);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn config(&self, port: u16) -> String {
        let socket = self.socket.to_string_lossy();
        let socket = if socket.len() <= LONGEST_SOCKET_DIR { quoted(&socket) } else { "''".into() };
        let fsync = if self.options.fsync { "on" } else { "off" };
        format!(
            "{BASE_CONFIG}\n\
             # Written at each start by devstack; of two lines with one name the last counts.\n\
             listen_addresses = '127.0.0.1'\n\
             port = {port}\n\
             unix_socket_directories = {socket}\n\
             # A killed server would leave segments in /dev/shm; files in its own directory go away with it.\n\
             dynamic_shared_memory_type = mmap\n\
             max_connections = {}\n\
             shared_buffers = {}MB\n\
             fsync = {fsync}\n\
             full_page_writes = {fsync}\n",
            self.options.max_connections, self.options.shared_buffers_mb,
        )
    }

    fn write(&self, name: &str, text: &str) -> Result<(), StartError> {
        let path = self.data.join(name);
        fs::write(&path, text).context("cannot write", &path)?;
        match &self.account {
            Some(account) => account.give(&path),
            None => Ok(()),
        }
    }
}

/// A string in the syntax of postgresql.conf.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
