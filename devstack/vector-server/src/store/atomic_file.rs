//! Replacing a small file so that a crash leaves the old content or the new one.

use std::fs::File;
use std::io::{Error, Result, Write};
use std::path::Path;

/// Writes beside the file, syncs, renames over it, and syncs the directory. Callers serialise writes to one file.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("tmp");
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    sync_parent(path)
}

/// Removes the file for good: the directory is synced.
pub fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path)?;
    sync_parent(path)
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().ok_or_else(|| Error::other(format!("{} has no parent", path.display())))?;
    File::open(parent)?.sync_all()
}
