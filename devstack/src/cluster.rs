//! Making Postgres data directories quickly: initdb runs once per version and machine, then its result is copied.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::account::{Account, private_dir};
use crate::error::{IoContext, StartError};
use crate::launch::{find_program, without_client_settings};
use crate::postgres::{DATABASE, ROLE};

/// Changes whenever a template made by older code must not be used again.
const TEMPLATE_FORMAT: u32 = 1;

/// The Postgres programs in use.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) postgres: PathBuf,
    initdb: PathBuf,
    /// As `postgres --version` prints it, for example `15.18`.
    version: String,
}

/// How much a directory holds; a cleaner of temporary files may have taken parts of a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Size {
    dirs: u64,
    files: u64,
    bytes: u64,
}

impl Programs {
    /// Finds the newest installed server.
    pub(crate) fn find() -> Result<Self, StartError> {
        let mut dirs: Vec<(u32, PathBuf)> = Vec::new();
        // Debian and PGDG keep the server programs out of PATH, one directory per major version.
        for (root, prefix) in
            [("/usr/lib/postgresql", ""), ("/usr", "pgsql-"), ("/opt/homebrew/opt", "postgresql@")]
        {
            for entry in fs::read_dir(root).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let major = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
                dirs.extend(major.map(|major| (major, entry.path().join("bin"))));
            }
        }
        dirs.sort_by(|a, b| b.cmp(a));
        let dirs: Vec<_> = dirs.into_iter().map(|(_, dir)| dir).collect();
        let missing = |program| StartError::MissingProgram {
            program,
            looked_in: "looked in /usr/lib/postgresql/*/bin, /usr/pgsql-*/bin and PATH".into(),
            install: "Run scripts/setup.sh, or install the server: \
                      apt install postgresql | dnf install postgresql-server | pacman -S postgresql | brew install postgresql@16",
        };
        let postgres = find_program("postgres", &dirs).ok_or_else(|| missing("postgres"))?;
        // The link in PATH may be alone; its siblings are where it points to.
        let postgres = postgres.canonicalize().context("cannot find", &postgres)?;
        let siblings = postgres.parent().map(Path::to_owned);
        let initdb = find_program("initdb", siblings.as_slice()).ok_or_else(|| missing("initdb"))?;
        let output = Command::new(&postgres).arg("--version").output().context("cannot run", &postgres)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        let version = version.unwrap_or("unknown").to_owned();
        Ok(Self { postgres, initdb, version })
    }

    fn major(&self) -> &str {
        let end = self.version.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.version.len());
        &self.version[..end]
    }
}

/// Makes the data directory, unless it exists.
///
/// Errors: it exists but was made by another major version, which can't read it.
pub(crate) async fn ensure(
    programs: &Programs,
    account: Option<&Account>,
    data: &Path,
    sync: bool,
) -> Result<(), StartError> {
    let marker = data.join("PG_VERSION");
    match fs::read_to_string(&marker) {
        Ok(found) if found.trim() == programs.major() => return Ok(()),
        Ok(found) => {
            return Err(StartError::WrongVersion {
                dir: data.to_owned(),
                found: found.trim().to_owned(),
                program: programs.major().to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("cannot read", &marker),
    }
    let (programs, account, data) = (programs.clone(), account.cloned(), data.to_owned());
    blocking(move || make(&programs, account.as_ref(), &data, sync)).await
}

/// Copies the template next to the wanted place and then moves it there, so that a half-made directory never counts.
fn make(programs: &Programs, account: Option<&Account>, data: &Path, sync: bool) -> Result<(), StartError> {
    let home = template_home()?;
    let who = account.map_or("self", |account| account.name.as_str());
    let template = home.join(format!("{}-{who}-{TEMPLATE_FORMAT}", programs.version));
    let lock = home.join("lock");
    let lock_file = OpenOptions::new().create(true).append(true).open(&lock).context("cannot open", &lock)?;
    lock_file.lock().context("cannot lock", &lock)?;
    let wanted = match read_size(&template) {
        Some(size) => size,
        None => initdb(programs, account, &template)?,
    };
    let partial = data.with_extension("partial");
    let mut copied = copy_fresh(&template, &partial, account)?;
    if copied != wanted {
        tracing::info!(template = %template.display(), "parts of the template are gone: making it again");
        let again = initdb(programs, account, &template)?;
        copied = copy_fresh(&template, &partial, account)?;
        debug_assert_eq!(copied, again);
    }
    drop(lock_file);
    if sync {
        let mut command = Command::new(&programs.initdb);
        command.arg("--sync-only").arg("-D").arg(&partial);
        run(command, account, "initdb --sync-only", None)?;
    }
    // An empty directory may stand there; anything else is not ours to remove.
    fs::rename(&partial, data).context("cannot move the new data directory to", data)
}

/// Runs initdb and creates the database; the marker with the size is written last.
fn initdb(programs: &Programs, account: Option<&Account>, template: &Path) -> Result<Size, StartError> {
    tracing::info!(version = programs.version, "initdb: making the template for Postgres data directories");
    remove_tree(template)?;
    fs::DirBuilder::new().mode(0o700).create(template).context("cannot create", template)?;
    if let Some(account) = account {
        account.give(template)?;
    }
    let mut command = Command::new(&programs.initdb);
    command.args(["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    command.arg(format!("--username={ROLE}")).arg("-D").arg(template);
    run(command, account, "initdb", None)?;
    // Single-user mode: a database without starting and stopping a server.
    let mut command = Command::new(&programs.postgres);
    command.args(["--single", "-F", "-D"]).arg(template).arg("postgres");
    run(command, account, "postgres --single", Some(&format!("CREATE DATABASE {DATABASE};\n")))?;
    let size = measure(template)?;
    let marker = size_path(template);
    let text = serde_json::to_vec(&size).map_err(io::Error::from).context("cannot write", &marker)?;
    fs::write(&marker, text).context("cannot write", &marker)?;
    Ok(size)
}

fn run(
    mut command: Command,
    account: Option<&Account>,
    what: &str,
    input: Option<&str>,
) -> Result<(), StartError> {
    without_client_settings(&mut command);
    command.current_dir("/").env("LC_ALL", "C");
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(account) = account {
        account.apply(&mut command);
    }
    let mut child = command.spawn().context("cannot run", command.get_program())?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(input.as_bytes()).context("cannot write to", what)?;
    }
    let output = child.wait_with_output().context("cannot run", what)?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Single-user mode reports a failed statement and still ends with success.
    if output.status.success() && !text.contains("ERROR:") {
        return Ok(());
    }
    Err(StartError::Preparation { what: what.to_owned(), status: output.status.to_string(), output: text })
}

/// One directory for all templates of this account. Under the temporary directory, because they are cheap to make again.
fn template_home() -> Result<PathBuf, StartError> {
    let home = std::env::temp_dir().join(format!("flotilla-initdb-{}", nix::unistd::geteuid()));
    private_dir(&home)?;
    // The account that Postgres runs as has to pass through; what is inside stays private.
    fs::set_permissions(&home, fs::Permissions::from_mode(0o711)).context("cannot open up", &home)?;
    Ok(home)
}

fn size_path(template: &Path) -> PathBuf {
    // Not `with_extension`: the name ends in a version.
    let mut name = template.as_os_str().to_owned();
    name.push(".size");
    name.into()
}

fn read_size(template: &Path) -> Option<Size> {
    serde_json::from_slice(&fs::read(size_path(template)).ok()?).ok()
}

fn remove_tree(dir: &Path) -> Result<(), StartError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("cannot remove", dir),
        _ => Ok(()),
    }
}

fn copy_fresh(from: &Path, to: &Path, account: Option<&Account>) -> Result<Size, StartError> {
    remove_tree(to)?;
    let mut size = Size::default();
    if from.exists() {
        copy_tree(from, to, account, &mut size)?;
    }
    Ok(size)
}

/// Copies directories and plain files (there is nothing else in a fresh data directory), private to the account.
fn copy_tree(from: &Path, to: &Path, account: Option<&Account>, size: &mut Size) -> Result<(), StartError> {
    fs::DirBuilder::new().mode(0o700).create(to).context("cannot create", to)?;
    size.dirs += 1;
    for entry in fs::read_dir(from).context("cannot list", from)? {
        let entry = entry.context("cannot list", from)?;
        let target = to.join(entry.file_name());
        if entry.file_type().context("cannot look at", &target)?.is_dir() {
            copy_tree(&entry.path(), &target, account, size)?;
        } else {
            // Shares blocks with the original where the file system can.
            size.bytes += fs::copy(entry.path(), &target).context("cannot copy to", &target)?;
            size.files += 1;
            if let Some(account) = account {
                account.give(&target)?;
            }
        }
    }
    match account {
        Some(account) => account.give(to),
        None => Ok(()),
    }
}

fn measure(dir: &Path) -> Result<Size, StartError> {
    let mut size = Size { dirs: 1, ..Size::default() };
    for entry in fs::read_dir(dir).context("cannot list", dir)? {
        let entry = entry.context("cannot list", dir)?;
        let meta = entry.metadata().context("cannot look at", entry.path())?;
        if meta.is_dir() {
            let inner = measure(&entry.path())?;
            size.dirs += inner.dirs;
            size.files += inner.files;
            size.bytes += inner.bytes;
        } else {
            size.files += 1;
            size.bytes += meta.len();
        }
    }
    Ok(size)
}

/// What `postmaster.pid` says; it stays behind when the postmaster is killed.
pub(crate) struct LockFile {
    pub(crate) pid: Option<u32>,
    /// Id of the System V shared memory segment.
    shared_memory: Option<u32>,
}

impl LockFile {
    pub(crate) fn path(data: &Path) -> PathBuf {
        data.join("postmaster.pid")
    }

    pub(crate) fn read(data: &Path) -> Option<Self> {
        // Lines: pid, data directory, start time, port, socket directory, listen address, shared memory (key id), status.
        let text = fs::read_to_string(Self::path(data)).ok()?;
        let lines: Vec<_> = text.lines().collect();
        Some(Self {
            pid: lines.first().and_then(|line| line.trim().parse().ok()),
            shared_memory: lines.get(6).and_then(|line| line.split_whitespace().nth(1)?.parse().ok()),
        })
    }
}

/// Removes the System V segment of a postmaster that was killed, if nobody is attached to it.
///
/// A restart on the same data directory would do it; a test's directory is never started again, and the kernel has a
/// limited number of segments.
pub(crate) fn free_leftovers(data: &Path) {
    let Some(segment) = LockFile::read(data).and_then(|file| file.shared_memory) else { return };
    // sysvipc(5): key shmid perms size cpid lpid nattch ...
    let Ok(table) = fs::read_to_string("/proc/sysvipc/shm") else { return };
    let unused = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        fields.get(1).and_then(|id| id.parse().ok()) == Some(segment) && fields.get(6) == Some(&"0")
    });
    if !unused {
        return;
    }
    match Command::new("ipcrm").args(["-m", &segment.to_string()]).status() {
        Ok(status) if status.success() => {}
        Ok(status) => tracing::warn!(segment, %status, "ipcrm could not remove a shared memory segment"),
        Err(error) => tracing::warn!(segment, %error, "cannot run ipcrm to remove a shared memory segment"),
    }
}

/// File operations off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)).context("interrupted while preparing", "a data directory"),
    }
}
