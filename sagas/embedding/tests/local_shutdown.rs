//! Dropping the local provider ends its threads. In a file of its own, because it counts the threads
//! of its process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use embedding::Embedder;
use embedding::local::{LocalConfig, LocalEmbedder};

/// The names of this process' threads, as far as they are the engines'.
fn engines() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("embed-")).collect();
    names.sort();
    names
}

/// Waits until these are the engines' threads: a thread names itself once it runs, and leaves the list a moment after it was
/// joined.
fn engines_are(expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while engines() != expected {
        assert!(Instant::now() < deadline, "{:?} instead of {expected:?}", engines());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn dropping_the_embedder_joins_its_threads() {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/all-MiniLM-L6-v2");
    let dir =
        std::env::var_os("FLOTILLA_MODEL_DIR").filter(|d| !d.is_empty()).map_or_else(default, PathBuf::from);
    let config = LocalConfig { dir, threads: 3, ..LocalConfig::default() };
    let embedder = LocalEmbedder::open(&config).unwrap_or_else(|error| panic!("{error}"));
    embedder.embed(vec!["work".to_owned()]).await.unwrap();
    engines_are(&["embed-0\n", "embed-1\n", "embed-2\n"]);
    drop(embedder);
    engines_are(&[]);
}
