//! One server per data directory.

use std::fs::{File, TryLockError};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Owns the directory until it is dropped or the process dies, however it dies: the lock is the kernel's.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Creates the directory if need be and takes it, or fails at once if another server has it.
    pub fn take(data: &Path) -> Result<Self> {
        std::fs::create_dir_all(data).with_context(|| format!("cannot create --data {}", data.display()))?;
        let path = data.join("lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => bail!(
                "--data {} is in use by another flotilla-vectors; stop it, or give another directory",
                data.display()
            ),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }
}
