//! Naming, listing and signalling processes without ever hitting the wrong one.
//!
//! A pid alone is not a name: it is reused after its process ends. Every signal sent by this crate goes to a
//! [`ProcessId`], which carries the start time too and is compared with the living process first.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How often a wait looks again at a process. Short, because tests kill and restart servers all the time.
const POLL: Duration = Duration::from_millis(5);

/// One process for ever: its pid and the moment it started.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The operating system's number, reused after the process has ended.
    pub pid: u32,
    /// Boot and start time in the operating system's own words; only compared for equality.
    pub started: String,
}

/// What the process table says about one process.
#[derive(Clone, Debug)]
struct Entry {
    id: ProcessId,
    parent: u32,
    ended: bool,
}

impl ProcessId {
    /// The process that has this pid now. `None` where there is none, or it has ended and only waits to be reaped.
    pub fn of(pid: u32) -> Option<Self> {
        table::entry(pid).filter(|entry| !entry.ended).map(|entry| entry.id)
    }

    /// Whether the process still runs (a stopped one does; one that waits to be reaped doesn't).
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Sends a signal, unless the process has ended.
    ///
    /// Returns whether it was sent. Errors: the operating system refused it, normally for lack of permission.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        if !self.is_alive() {
            return Ok(false);
        }
        match kill(self.raw(), signal) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// All living descendants, parents before their children.
    pub fn descendants(&self) -> Vec<Self> {
        let entries = table::all();
        let mut known = HashSet::from([self.pid]);
        let mut found = Vec::new();
        loop {
            let before = found.len();
            for entry in &entries {
                if !entry.ended && known.contains(&entry.parent) && known.insert(entry.id.pid) {
                    found.push(entry.id.clone());
                }
            }
            if found.len() == before {
                return found;
            }
        }
    }

    /// Stops (SIGSTOP) the process and all its descendants; returns the descendants.
    ///
    /// The parent goes first, so that it can't fork while its children are listed; the listing is repeated until it
    /// shows nobody new, because children may have been forking too.
    pub fn freeze(&self) -> io::Result<Vec<Self>> {
        self.signal(Signal::SIGSTOP)?;
        let mut frozen = HashSet::new();
        loop {
            let descendants = self.descendants();
            let fresh: Vec<_> = descendants.iter().filter(|one| !frozen.contains(*one)).cloned().collect();
            if fresh.is_empty() {
                return Ok(descendants);
            }
            for one in fresh {
                one.signal(Signal::SIGSTOP)?;
                frozen.insert(one);
            }
        }
    }

    /// Lets the process and all its descendants run again (SIGCONT), children first.
    pub fn thaw(&self) -> io::Result<()> {
        for one in self.descendants().iter().rev() {
            one.signal(Signal::SIGCONT)?;
        }
        self.signal(Signal::SIGCONT)?;
        Ok(())
    }

    /// Kills (SIGKILL) the process and all its descendants and returns whom to wait for.
    pub fn kill_tree(&self) -> io::Result<Vec<Self>> {
        let mut tree = self.freeze()?;
        tree.insert(0, self.clone());
        for one in &tree {
            one.signal(Signal::SIGKILL)?;
        }
        Ok(tree)
    }

    pub(crate) fn raw(&self) -> Pid {
        Pid::from_raw(self.pid as i32)
    }
}

/// Waits until all of them have ended; returns those that outlived the limit. Cancel-safe.
pub(crate) async fn wait_gone(mut processes: Vec<ProcessId>, limit: Duration) -> Vec<ProcessId> {
    let deadline = Instant::now() + limit;
    loop {
        processes.retain(ProcessId::is_alive);
        if processes.is_empty() || Instant::now() >= deadline {
            return processes;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The same for `Drop`, which can't await.
pub(crate) fn wait_gone_blocking(mut processes: Vec<ProcessId>, limit: Duration) -> Vec<ProcessId> {
    let deadline = Instant::now() + limit;
    loop {
        processes.retain(ProcessId::is_alive);
        if processes.is_empty() || Instant::now() >= deadline {
            return processes;
        }
        std::thread::sleep(POLL);
    }
}

/// Living processes whose working directory is `dir`. Postgres and its backends live in their data directory, which
/// makes this the way to find those whose pid file is gone. Empty on systems without `/proc`.
pub(crate) fn living_in(dir: &std::path::Path) -> Vec<ProcessId> {
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    table::all()
        .into_iter()
        .filter(|entry| !entry.ended)
        .filter(|entry| std::fs::read_link(format!("/proc/{}/cwd", entry.id.pid)).is_ok_and(|cwd| cwd == dir))
        .map(|entry| entry.id)
        .collect()
}

#[cfg(target_os = "linux")]
mod table {
    use std::fs;
    use std::sync::OnceLock;

    use super::{Entry, ProcessId};

    /// Start times count from boot, so the same pid and tick may come back after a reboot: the boot is part of the name.
    fn boot() -> &'static str {
        static BOOT: OnceLock<String> = OnceLock::new();
        BOOT.get_or_init(|| {
            fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map_or_else(|_| "unknown-boot".into(), |id| id.trim().into())
        })
    }

    pub(super) fn entry(pid: u32) -> Option<Entry> {
        // proc(5): pid (comm) state ppid ... with num_threads as field 20 and starttime as field 22. The name may hold spaces and brackets.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let threads: u32 = fields.nth(15)?.parse().ok()?;
        let started = fields.nth(1)?;
        Some(Entry {
            id: ProcessId { pid, started: format!("{}:{started}", boot()) },
            parent,
            // A zombie with more than one thread is a first thread that ended before the others: they still hold the
            // process' files and sockets, and a restart would find the port in use.
            ended: matches!(state, "Z" | "X" | "x") && threads <= 1,
        })
    }

    pub(super) fn all() -> Vec<Entry> {
        let Ok(listing) = fs::read_dir("/proc") else { return Vec::new() };
        listing
            .flatten()
            .filter_map(|file| file.file_name().to_str()?.parse().ok())
            .filter_map(entry)
            .collect()
    }
}

#[cfg(not(target_os = "linux"))]
mod table {
    use std::process::Command;

    use super::{Entry, ProcessId};

    pub(super) fn entry(pid: u32) -> Option<Entry> {
        list(&["-p", &pid.to_string()]).into_iter().next()
    }

    pub(super) fn all() -> Vec<Entry> {
        list(&["-A"])
    }

    fn list(which: &[&str]) -> Vec<Entry> {
        let output = Command::new("ps").args(which).args(["-o", "pid=,ppid=,stat=,lstart="]).output();
        let Ok(output) = output else { return Vec::new() };
        String::from_utf8_lossy(&output.stdout).lines().filter_map(parse).collect()
    }

    fn parse(line: &str) -> Option<Entry> {
        let mut fields = line.split_whitespace();
        let pid = fields.next()?.parse().ok()?;
        let parent = fields.next()?.parse().ok()?;
        let ended = fields.next()?.starts_with('Z');
        let started = fields.collect::<Vec<_>>().join(" ");
        Some(Entry { id: ProcessId { pid, started }, parent, ended })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::process::{Child, Command, Stdio};

    use super::*;

    fn shell(script: &str) -> (Child, ProcessId) {
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        (child, id)
    }

    #[test]
    fn a_recycled_pid_is_another_process() {
        let (mut child, id) = shell("exec sleep 60");
        let impostor = ProcessId { pid: id.pid, started: "long ago".into() };
        assert!(id.is_alive());
        assert!(!impostor.is_alive());
        assert!(!impostor.signal(Signal::SIGKILL).unwrap(), "a recycled pid must not be signalled");
        assert!(child.try_wait().unwrap().is_none());
        id.signal(Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[tokio::test]
    async fn a_tree_is_frozen_thawed_and_killed_as_a_whole() {
        let (mut child, id) = shell("sleep 60 & sleep 60 & wait");
        let deadline = Instant::now() + Duration::from_secs(10);
        while id.descendants().len() < 2 {
            assert!(Instant::now() < deadline, "children never appeared: {:?}", id.descendants());
            tokio::time::sleep(POLL).await;
        }
        let children = id.freeze().unwrap();
        assert_eq!(children.len(), 2);
        id.thaw().unwrap();
        let tree = id.kill_tree().unwrap();
        assert_eq!(tree.len(), 3);
        child.wait().unwrap();
        assert_eq!(wait_gone(tree, Duration::from_secs(10)).await, []);
    }
}
