//! Readers and the cache while documents change all the time: no read that begins after a change was answered shows what was
//! before it, the outbox tells each change once and in order, and who listens hears of each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use e2e::{Fleet, LONG, SHORT, TENANT, text, wait_until};
use futures::StreamExt;
use sagas::stores::postgres::events::{Event, Events, FIRST};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const DOCUMENTS: usize = 4;
const CHANGES: usize = 40;
const READERS: usize = 4;

/// Each tenth change of a document deletes it.
fn deletes(change: usize) -> bool {
    change.is_multiple_of(10)
}

/// How far a document's changes have come.
#[derive(Default)]
struct Progress {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

/// The change by which a text came.
fn change_of(text: &str) -> usize {
    text.split("in revision ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[derive(Default)]
struct Reads {
    all: AtomicU64,
    hits: AtomicU64,
}

async fn read(fleet: &Fleet, progress: &[Progress], reads: &Reads, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        for (no, one) in progress.iter().enumerate() {
            let ended = one.ended.load(Ordering::SeqCst);
            let found = fleet.stores.document(TENANT, &format!("doc-{no}")).await.unwrap();
            let begun = one.begun.load(Ordering::SeqCst);
            reads.all.fetch_add(1, Ordering::Relaxed);
            match found {
                Some(document) => {
                    let change = change_of(&document.text);
                    assert!(change >= ended, "doc-{no} shows change {change} after change {ended} had ended");
                    reads.hits.fetch_add(u64::from(document.cached), Ordering::Relaxed);
                }
                None => assert!(
                    (ended..=begun).any(deletes),
                    "doc-{no} is not there, and no change from {ended} to {begun} deletes it"
                ),
            }
        }
    }
}

async fn change(fleet: &Fleet, no: usize, progress: &Progress) {
    let key = format!("doc-{no}");
    for change in 1..=CHANGES {
        progress.begun.store(change, Ordering::SeqCst);
        let job = if deletes(change) {
            fleet.job("delete", json!({ "document": key }))
        } else {
            fleet.ingest_job(&key, &text(&key, change as u32))
        };
        let id = fleet.accept(vec![job]).await[0];
        assert_eq!(fleet.ended(id).await, "succeeded");
        progress.ended.store(change, Ordering::SeqCst);
    }
}

/// Follows the outbox as another service would, with a cursor and small pages.
async fn follow(fleet: &Fleet, stop: &CancellationToken) -> Vec<Event> {
    let (mut after, mut events) = (FIRST.to_owned(), vec![]);
    let mut stopped = None;
    loop {
        if stop.is_cancelled() {
            stopped.get_or_insert_with(Instant::now);
        }
        // Whatever transaction is open somewhere holds the last ones back for a while.
        let all = events.len() >= DOCUMENTS * CHANGES;
        let last_look = stopped.is_some_and(|at| all || at.elapsed() > SHORT);
        match fleet.postgres.events_after(&after, Some(TENANT), 7).await.unwrap() {
            Events::Page(page) if page.is_empty() && last_look => return events,
            Events::Page(page) => {
                if let Some(last) = page.last() {
                    after.clone_from(&last.cursor);
                }
                events.extend(page);
            }
            other => panic!("{other:?}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_11_no_read_is_stale_and_every_change_is_told_once_and_in_order() {
    let fleet = Arc::new(Fleet::start().await);
    let client = redis::Client::open(fleet.services.redis_cache().url()).unwrap();
    let mut listener = client.get_async_pubsub().await.unwrap();
    listener.subscribe("flotilla:events").await.unwrap();
    let heard = Arc::new(std::sync::Mutex::new(HashMap::<String, Vec<(String, i64)>>::new()));
    let listening = tokio::spawn({
        let heard = Arc::clone(&heard);
        async move {
            let mut messages = listener.on_message();
            while let Some(message) = messages.next().await {
                let told: Value = serde_json::from_str(&message.get_payload::<String>().unwrap()).unwrap();
                let (document, event) = (told["document"].as_str().unwrap(), told["event"].as_str().unwrap());
                let entry = (event.to_owned(), told["order"].as_i64().unwrap());
                heard.lock().unwrap().entry(document.to_owned()).or_default().push(entry);
            }
        }
    });
    let workers: Vec<_> = (0..2).map(|_| fleet.worker().patient().start()).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let progress: Arc<Vec<Progress>> = Arc::new((0..DOCUMENTS).map(|_| Progress::default()).collect());
    let (reads, stop) = (Arc::new(Reads::default()), CancellationToken::new());
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let (fleet, progress) = (Arc::clone(&fleet), Arc::clone(&progress));
            let (reads, stop) = (Arc::clone(&reads), stop.clone());
            tokio::spawn(async move { read(&fleet, &progress, &reads, &stop).await })
        })
        .collect();
    let follower = tokio::spawn({
        let (fleet, stop) = (Arc::clone(&fleet), stop.clone());
        async move { follow(&fleet, &stop).await }
    });
    futures::future::join_all((0..DOCUMENTS).map(|no| change(&fleet, no, &progress[no]))).await;
    stop.cancel();
    for reader in readers {
        reader.await.expect("a reader");
    }
    let events = follower.await.expect("the follower");

    let expected: Vec<(String, i64)> = (1..=CHANGES)
        .map(|change| {
            let event = if deletes(change) { "document.deleted" } else { "document.published" };
            (event.to_owned(), change as i64)
        })
        .collect();
    for no in 0..DOCUMENTS {
        let key = format!("doc-{no}");
        let told: Vec<_> =
            events.iter().filter(|e| e.document == key).map(|e| (e.event.clone(), e.order)).collect();
        assert_eq!(told, expected, "the outbox on {key}");
        wait_until("every change was announced", LONG, async || {
            let mut told = heard.lock().unwrap().get(&key).cloned().unwrap_or_default();
            // Two workers announce side by side.
            told.sort_by_key(|(_, order)| *order);
            if told == expected { Ok(()) } else { Err(format!("{key}: {told:?}")) }
        })
        .await;
    }
    let (all, hits) = (reads.all.load(Ordering::Relaxed), reads.hits.load(Ordering::Relaxed));
    println!(
        "{all} reads of {DOCUMENTS} documents during {} changes, {hits} hits; {} events",
        CHANGES * DOCUMENTS,
        events.len()
    );
    assert!(all > 500 && hits > 0, "too few reads to see anything: {all}, {hits} hits");
    listening.abort();
    fleet.audit_clean().await;
    drop(workers);
    Arc::into_inner(fleet).expect("nobody else holds the fleet").end();
}
