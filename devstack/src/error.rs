//! What can go wrong, told so that a person can act on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a service could not be started or controlled.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A server program is not on this machine.
    #[error("{program} was not found ({looked_in}). {install}")]
    MissingProgram {
        /// File name of the program.
        program: &'static str,
        /// Where it was looked for.
        looked_in: String,
        /// What to do about it, for each package manager.
        install: &'static str,
    },
    /// A file, directory or process operation failed.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, for example `cannot write`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Postgres refuses to run as root and there is no other account to give it.
    #[error(
        "Postgres refuses to run as root and this machine has neither a `postgres` nor a `nobody` account: create one (useradd --system postgres) or run as an ordinary user"
    )]
    NoAccount,
    /// A program that runs to its end (initdb, the build of the vector server) failed.
    #[error("{what} failed ({status}):\n{output}")]
    Preparation {
        /// Which one.
        what: String,
        /// How it ended.
        status: String,
        /// Its last lines.
        output: String,
    },
    /// The server ended before it was ready.
    #[error("{service} ended before it was ready ({status}). Last lines of {log}:\n{tail}", log = log.display())]
    Exited {
        /// Which service.
        service: &'static str,
        /// How it ended.
        status: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The server runs but did not answer in time.
    #[error("{service} (pid {pid}) did not answer within {} s; last answer: {last}. Last lines of {log}:\n{tail}", waited.as_secs(), log = log.display())]
    NotReady {
        /// Which service.
        service: &'static str,
        /// Its process.
        pid: u32,
        /// How long it was waited for.
        waited: Duration,
        /// What the last probe said.
        last: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The wanted port is in use by another process.
    #[error(
        "port {port} for {service} is in use by another process: end that process, or choose another port (no port: a free one is taken)"
    )]
    PortTaken {
        /// Which service.
        service: &'static str,
        /// The port.
        port: u16,
    },
    /// No free port was found.
    #[error("no free TCP port on 127.0.0.1 between {from} and {to}")]
    NoFreePort {
        /// First port tried.
        from: u16,
        /// Last port tried.
        to: u16,
    },
    /// Another server already works on this data directory.
    #[error("{service} already runs on {dir} as pid {pid}, not started from here: stop it, or choose another directory", dir = dir.display())]
    AlreadyRunning {
        /// Which service.
        service: &'static str,
        /// The data directory.
        dir: PathBuf,
        /// The process that holds it.
        pid: u32,
    },
    /// The data directory belongs to another major version of Postgres.
    #[error("{dir} was made by Postgres {found} but Postgres {program} is installed: install {found}, or move the directory away to begin empty", dir = dir.display())]
    WrongVersion {
        /// The data directory.
        dir: PathBuf,
        /// Version that made it.
        found: String,
        /// Version of the programs.
        program: String,
    },
    /// The operation needs a running server, and it is not running.
    #[error("{service} is not running: call restart() first")]
    NotRunning {
        /// Which service.
        service: &'static str,
    },
    /// Processes stayed after SIGKILL; only a stuck kernel call does that.
    #[error("{service}: processes {pids:?} did not end within {} s of SIGKILL", waited.as_secs())]
    Unkillable {
        /// Which service.
        service: &'static str,
        /// Who stayed.
        pids: Vec<u32>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The recorded state of a stack can't be read.
    #[error("{path} is not a service record ({reason}): run `down`, or remove the file if no server of this directory runs", path = path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
}

/// Adds what was tried, and on which path, to an I/O error.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: impl AsRef<Path>) -> Result<T, StartError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: impl AsRef<Path>) -> Result<T, StartError> {
        self.map_err(|source| StartError::Io { action, path: path.as_ref().to_owned(), source })
    }
}
