//! Readers while a store hangs, and while what they read is replaced.

use std::time::{Duration, Instant};

use super::stage::{Stage, TENANT};

const WITHIN: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_hung_cache_delays_one_reader_a_second_for_a_moment_and_no_other() {
    let stage = Stage::new().await;
    stage.ingest("story", "The text that readers see.").await;
    let read = async || stage.stores.document(TENANT, "story").await.unwrap().unwrap();
    let cached = async || {
        let begun = Instant::now();
        while !read().await.cached {
            assert!(begun.elapsed() < WITHIN, "no reader gets the text from the cache");
            tokio::task::yield_now().await;
        }
    };
    cached().await;
    stage.services.redis_cache().pause().await.unwrap();
    let begun = Instant::now();
    for _ in 0..50 {
        let seen = read().await;
        assert_eq!((seen.text.as_str(), seen.cached), ("The text that readers see.", false));
    }
    // The stage's calls have 5 s, and each read would make two.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    stage.services.redis_cache().resume().await.unwrap();
    cached().await;
}
