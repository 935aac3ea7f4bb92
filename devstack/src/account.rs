//! The account that servers run as when we are root.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{Gid, Uid, User};
use sha2::{Digest, Sha256};

use crate::error::{IoContext, StartError};

/// An unprivileged account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub(crate) name: String,
    uid: Uid,
    gid: Gid,
}

/// Where a service's data really is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    /// What a person should know: set when the wanted directory could not be used.
    pub(crate) note: Option<String>,
}

impl Account {
    /// Who Postgres has to run as: `None` means as we are, because we are not root.
    pub(crate) fn for_postgres() -> Result<Option<Self>, StartError> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        for name in ["postgres", "nobody"] {
            let user =
                User::from_name(name).map_err(io::Error::from).context("cannot look up account", name)?;
            if let Some(user) = user {
                return Ok(Some(Self { name: user.name, uid: user.uid, gid: user.gid }));
            }
        }
        Err(StartError::NoAccount)
    }

    pub(crate) fn apply(&self, command: &mut Command) {
        command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
    }

    pub(crate) fn give(&self, path: &Path) -> Result<(), StartError> {
        chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
            .context("cannot change the owner of", path)
    }

    /// Whether the account can get into the directory; tried, because permission bits don't tell the whole truth.
    fn can_enter(&self, dir: &Path) -> io::Result<bool> {
        let mut test = Command::new("/bin/sh");
        test.args(["-c", "cd -- \"$1\" 2>/dev/null", "sh"]).arg(dir);
        test.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.apply(&mut test);
        test.status().map(|status| status.success())
    }

    /// Finds a directory for data that this account can reach: `wanted`, or one under /var/tmp named after it.
    ///
    /// The other directory's path is noted in `wanted`: whoever removes `wanted` begins empty, as with the other services.
    pub(crate) fn place(&self, wanted: &Path) -> Result<Place, StartError> {
        if self.can_enter(wanted).context("cannot look into", wanted)? {
            return Ok(Place { dir: wanted.to_owned(), note: None });
        }
        let marker = wanted.join("elsewhere");
        let dir = match fs::read_to_string(&marker) {
            Ok(text) => {
                let dir = PathBuf::from(text.trim_end());
                private_dir(&dir)?;
                dir
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let dir = fresh_elsewhere(wanted)?;
                fs::write(&marker, format!("{}\n", dir.display())).context("cannot write", &marker)?;
                dir
            }
            Err(error) => return Err(error).context("cannot read", &marker),
        };
        self.give(&dir)?;
        let note = format!(
            "Postgres can't run as root, and the account `{}` can't enter {}: its data is in {} instead",
            self.name,
            wanted.display(),
            dir.display()
        );
        Ok(Place { dir, note: Some(note) })
    }
}

/// Makes a new directory under /var/tmp (kept over reboots), named after `wanted`.
fn fresh_elsewhere(wanted: &Path) -> Result<PathBuf, StartError> {
    let full = wanted.canonicalize().context("cannot find", wanted)?;
    let hash = Sha256::digest(full.as_os_str().as_encoded_bytes());
    let hash = hash.iter().take(8).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let mut number = 0;
    loop {
        let suffix = if number == 0 { String::new() } else { format!("-{number}") };
        let dir = Path::new("/var/tmp").join(format!("flotilla-{hash}{suffix}"));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error).context("cannot create", &dir),
        }
    }
}

/// Creates a directory in a place where others may write too, or accepts it if it is ours.
///
/// Errors: something of that name belongs to somebody else, or is a link.
pub(crate) fn private_dir(dir: &Path) -> Result<(), StartError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).context("cannot create", dir),
    }
    let meta = fs::symlink_metadata(dir).context("cannot look at", dir)?;
    let us = nix::unistd::geteuid();
    let trusted = Account::for_postgres()?.map_or(us, |account| account.uid);
    let owner = Uid::from_raw(meta.uid());
    if meta.is_dir() && (owner == us || owner == trusted) && meta.permissions().mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other("it exists and is not a private directory of ours: remove it"))
        .context("cannot use", dir)
}
