//! SIGTERM and SIGINT: the first asks for a drain, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that the first signal cancels. The second ends the process with 128 + the signal's number, as a shell
/// would say of a process that a signal ended.
pub fn drain_on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let drain = token.clone();
    tokio::spawn(async move {
        loop {
            let (name, code) = tokio::select! {
                _ = terminate.recv() => ("SIGTERM", 143),
                _ = interrupt.recv() => ("SIGINT", 130),
            };
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

/// What `work` comes to, unless the process is asked to end first.
pub async fn unless_asked_to_end<T>(
    asked: &CancellationToken,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    asked.run_until_cancelled(work).await.unwrap_or_else(|| Err(anyhow::anyhow!("interrupted")))
}
