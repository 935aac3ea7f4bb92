//! Runs `flotilla-bench`, a program of its own, so that this one depends on no other queue.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, anyhow, bail};
use devstack::ProcessId;
use nix::sys::signal::Signal;
use tokio::process::Command;

use super::Report;
use crate::signals;

const PROGRAM: &str = "flotilla-bench";

/// What one of its benchmarks reports. Its progress goes to our stderr; it is ended with us.
pub async fn run(bench: &str, args: &[String]) -> anyhow::Result<Report> {
    let own = std::env::current_exe()?;
    let program = find(&own).ok_or_else(|| {
        anyhow!(
            "{PROGRAM} is not beside {}: build both: `cargo build --profile dist -p bench -p cli`",
            own.display()
        )
    })?;
    let mut command = Command::new(&program);
    command.args([bench, "--json"]).args(args);
    let asked = signals::drain_on_signal()?;
    let running = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let running = running.with_context(|| format!("{} can't be started", program.display()))?;
    let child = running.id().and_then(ProcessId::of);
    let mut output = tokio::spawn(running.wait_with_output());
    let output = tokio::select! {
        output = &mut output => output??,
        () = asked.cancelled() => {
            // It removes its servers and their data.
            if let Some(child) = child {
                child.signal(Signal::SIGTERM)?;
            }
            output.await??;
            bail!("interrupted");
        }
    };
    if !output.status.success() {
        bail!("{PROGRAM} ended with {}; what it said is above", output.status);
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("{PROGRAM} printed no report"))
}

/// Beside this program, or in the folder above, where cargo puts programs of a test's.
fn find(own: &Path) -> Option<PathBuf> {
    let folder = own.parent()?;
    [Some(folder), folder.parent()]
        .into_iter()
        .flatten()
        .map(|dir| dir.join(PROGRAM))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_program_is_found_beside_this_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("bin/flotilla");
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        assert_eq!(find(&own), None);
        std::fs::write(dir.path().join("bin").join(PROGRAM), "").unwrap();
        assert_eq!(find(&own), Some(dir.path().join("bin").join(PROGRAM)));
    }
}
