//! SIGTERM and SIGINT: the first asks for a drain, the second ends the process at once. Work that has nothing to drain ends with the
//! first.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Both signals, from now on.
#[derive(Debug)]
pub struct AskedToEnd {
    terminate: Signal,
    interrupt: Signal,
}

impl AskedToEnd {
    /// Listens for them; neither ends the process by itself any more.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one; its name, and the exit code of a process that it ended.
    pub async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", 143),
            _ = self.interrupt.recv() => ("SIGINT", 130),
        }
    }

    /// What `work` comes to, unless a signal comes first.
    pub async fn or<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            outcome = work => outcome,
            (signal, _) = self.next() => Err(anyhow::anyhow!("interrupted by {signal}")),
        }
    }
}

/// A token that the first signal cancels. The second ends the process with 128 + the signal's number, as a shell
/// would say of a process that a signal ended.
pub fn drain_on_signal() -> anyhow::Result<CancellationToken> {
    let mut asked = AskedToEnd::listen()?;
    let token = CancellationToken::new();
    let drain = token.clone();
    tokio::spawn(async move {
        loop {
            let (name, code) = asked.next().await;
            if drain.is_cancelled() {
                tracing::warn!(signal = name, "second signal: ending at once");
                std::process::exit(code);
            }
            tracing::info!(signal = name, "draining; a second signal ends at once");
            drain.cancel();
        }
    });
    Ok(token)
}
