//! The cache behind Sentinels: the same handle goes on when they name another master.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use devstack::testing::{TestServices, fake_sentinel};
use sagas::stores::cache::{Cache, CacheConfig, Entry};
use uuid::Uuid;

#[tokio::test]
async fn the_cache_follows_the_master_that_sentinels_name() {
    let services = TestServices::builder().redis_queue().redis_cache().start().await.unwrap();
    let (first, second) = (services.redis_cache(), services.redis_queue());
    let named = Arc::new(AtomicU16::new(first.port()));
    let sentinel = fake_sentinel(Arc::clone(&named)).await.unwrap();
    let cache = Cache::lazy(&CacheConfig {
        url: format!("redis-sentinel://127.0.0.1:{sentinel}/main"),
        call_timeout: Duration::from_secs(20),
        ..CacheConfig::default()
    })
    .unwrap();
    cache.probe().await.unwrap();
    let (version, entry) =
        (Uuid::now_v7(), Entry { body: "text".into(), content_hash: "x".into(), tenant: "acme".into() });
    cache.put(version, &entry).await.unwrap();
    assert_eq!(cache.peek(version).await.unwrap(), Some(entry.clone()));
    // The master becomes a replica without closing a connection.
    let client = redis::Client::open(first.url()).unwrap();
    let mut raw = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(second.port()).exec_async(&mut raw).await.unwrap();
    named.store(second.port(), Ordering::Relaxed);
    let error = cache.put(version, &entry).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    cache.put(version, &entry).await.unwrap();
    assert_eq!(cache.peek(version).await.unwrap(), Some(entry));
    second.kill9().await.unwrap();
    let error = cache.peek(version).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    second.restart().await.unwrap();
    cache.probe().await.unwrap();
    cache.peek(version).await.unwrap();
}
