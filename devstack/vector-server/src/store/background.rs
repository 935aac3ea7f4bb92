//! A loop that does its work once per period until it is stopped.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Owns the loop's thread. Dropping it asks the loop to end after the round it is in, without waiting.
#[derive(Debug)]
pub struct BackgroundLoop {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl BackgroundLoop {
    /// Starts `round` on a thread of its own, first after one period.
    pub fn spawn(
        name: &str,
        period: Duration,
        mut round: impl FnMut() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(period) {
                round();
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// Asks the loop to end and waits for the round it is in.
    pub fn stop(self) {
        let Self { stop, thread } = self;
        drop(stop);
        if thread.join().is_err() {
            tracing::error!("a background loop panicked");
        }
    }
}
