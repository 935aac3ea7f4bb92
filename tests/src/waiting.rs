//! Waiting for a condition, never for a time.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// For what takes a few leases at most on a busy machine.
pub const SHORT: Duration = Duration::from_secs(30);
/// For what works through hundreds of jobs.
pub const LONG: Duration = Duration::from_secs(120);

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Waits until `look` answers `Ok`, and returns that. `Err` is the state as it is, shown when `within` has passed; the test
/// fails then.
pub async fn wait_until<T, E: Display>(
    what: &str,
    within: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let began = Instant::now();
    loop {
        match look().await {
            Ok(done) => return done,
            Err(state) if began.elapsed() > within => {
                panic!("not within {within:?}: {what}; it stands so: {state}")
            }
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}
