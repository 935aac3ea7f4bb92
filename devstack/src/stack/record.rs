//! What a stack remembers about each service between two commands.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Service;
use crate::error::{IoContext, StartError};
use crate::process::ProcessId;

/// The record of one service, `<dir>/<service>/service.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The port it has, and gets again.
    pub(super) port: u16,
    /// Its last process; `None` after `down`.
    pub(super) process: Option<ProcessId>,
    /// All URLs it ever had, the present one last: shells may still have an old one in their environment.
    pub(super) urls: Vec<String>,
    /// What a person should know.
    pub(super) note: Option<String>,
}

impl Record {
    fn path(dir: &Path, service: Service) -> PathBuf {
        service.dir(dir).join("service.json")
    }

    pub(super) fn read(dir: &Path, service: Service) -> Result<Option<Self>, StartError> {
        let path = Self::path(dir, service);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("cannot read", &path),
        };
        let bad = |reason: String| StartError::BadRecord { path: path.clone(), reason };
        let record: Self = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if record.urls.is_empty() {
            return Err(bad("it has no URL".into()));
        }
        Ok(Some(record))
    }

    pub(super) fn write(&self, dir: &Path, service: Service) -> Result<(), StartError> {
        let path = Self::path(dir, service);
        let text =
            serde_json::to_string_pretty(self).map_err(io::Error::from).context("cannot write", &path)?;
        write_private(&path, &text)
    }

    /// The present URL.
    pub(super) fn url(&self) -> &str {
        self.urls.last().map_or("", String::as_str)
    }

    pub(super) fn add_url(&mut self, url: String) {
        self.urls.retain(|one| *one != url);
        self.urls.push(url);
    }

    /// Its process, if that one still runs.
    pub(super) fn living(&self) -> Option<&ProcessId> {
        self.process.as_ref().filter(|process| process.is_alive())
    }
}

/// Replaces a file in one step, readable for its owner only.
pub(super) fn write_private(path: &Path, text: &str) -> Result<(), StartError> {
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&partial)
        .context("cannot write", &partial)?;
    file.write_all(text.as_bytes()).context("cannot write", &partial)?;
    fs::rename(&partial, path).context("cannot replace", path)
}
