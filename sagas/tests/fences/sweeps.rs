//! The janitor before a vector store of which a part is ill.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use embedding::hashing::HashingEmbedder;
use sagas::{
    audit::{AuditSettings, Auditor, FindingKind},
    janitor,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{Postgres, PostgresConfig},
        vectors::{Vectors, VectorsConfig},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
};
use uuid::Uuid;

use crate::ledger::Ledger;

const CALL: Duration = Duration::from_secs(5);

/// A way to Qdrant on which every connection ends, after a while, that speaks of `ill-collection`, while it is ill.
async fn way_to(server: &str, ill: Arc<AtomicBool>, after: Duration) -> String {
    let server = server.rsplit_once('/').unwrap().1.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let (server, ill) = (server.clone(), Arc::clone(&ill));
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) =
                    TcpStream::connect(&server).await.unwrap().into_split();
                let asks = async {
                    let mut bytes = vec![0; 1 << 16];
                    loop {
                        let read = from_client.read(&mut bytes).await.unwrap_or(0);
                        let speaks = bytes[..read]
                            .windows(b"ill-collection".len())
                            .any(|name| name == b"ill-collection");
                        if speaks && ill.load(Ordering::Relaxed) {
                            tokio::time::sleep(after).await;
                            return;
                        }
                        if read == 0 {
                            return;
                        }
                        to_server.write_all(&bytes[..read]).await.unwrap();
                    }
                };
                tokio::select! {
                    () = asks => {}
                    _ = copy(&mut from_server, &mut to_client) => {}
                }
            });
        }
    });
    url
}

/// Stores over a ledger whose Qdrant is behind `url`.
fn stores_of(ledger: &Ledger, postgres: &Postgres, url: String) -> Stores {
    let cache = CacheConfig {
        url: ledger.services.redis_cache().url().to_owned(),
        call_timeout: CALL,
        ..CacheConfig::default()
    };
    Stores::new(
        postgres.clone(),
        Vectors::lazy(&VectorsConfig { url, api_key: None, call_timeout: CALL }).unwrap(),
        Cache::lazy(&cache).unwrap(),
        Arc::new(HashingEmbedder::new()),
        vec![],
        DocumentSettings::default(),
    )
}

/// Versions that were replaced, one of each of these documents; their sweep is due.
async fn due(ledger: &Ledger, documents: &[&str]) -> Vec<Uuid> {
    let mut replaced = vec![];
    for document in documents {
        replaced.push(ledger.ingested(document).await);
        ledger.ingested(document).await;
    }
    sqlx::query(
        "UPDATE document_versions SET sweep_after = now() - interval '1 hour' WHERE state = 'retired'",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    replaced
}

async fn set(ledger: &Ledger, sql: &'static str, id: Uuid, to: &str) {
    sqlx::query(sql).bind(id).bind(to).execute(ledger.postgres.pool()).await.unwrap();
}

const SWEPT: &str = "SELECT count(*) FROM document_versions WHERE sweeps = 1";

#[tokio::test]
async fn collections_that_are_slow_to_fail_hold_up_none_behind_them() {
    let services = devstack::testing::TestServices::builder().postgres().redis_cache().vectors();
    let ledger = Ledger::over(services.start().await.unwrap()).await;
    // The server ends what is idle in a transaction for 2 s.
    let config = PostgresConfig {
        call_timeout: Duration::from_secs(1),
        ..PostgresConfig::new(ledger.services.postgres().url())
    };
    let postgres = Postgres::connect(&config).await.unwrap();
    let ill = Arc::new(AtomicBool::new(true));
    let slow = Duration::from_millis(2200);
    let url = way_to(ledger.services.vectors().url(), Arc::clone(&ill), slow).await;
    let stores = stores_of(&ledger, &postgres, url);
    let versions = due(&ledger, &["a", "b", "c"]).await;
    for (version, collection) in
        versions.iter().zip(["ill-collection", "ill-collection-2", "well-collection"])
    {
        set(&ledger, "UPDATE document_versions SET collection = $2 WHERE id = $1", *version, collection)
            .await;
    }
    let left = "SELECT count(*) FROM document_versions WHERE sweep_after <= now()";
    for (swept, due) in [(0, 2), (0, 1), (1, 0)] {
        assert_eq!(janitor::sweep(&stores).await.unwrap(), swept);
        assert_eq!(ledger.count(left).await, due, "a round's time is that of one that is ill");
    }
    assert_eq!(ledger.count(SWEPT).await, 1);
}

#[tokio::test]
async fn one_round_sweeps_no_more_points_than_one_statement_can_remove() {
    let services = devstack::testing::TestServices::builder().postgres().redis_cache().vectors();
    let ledger = Ledger::over(services.start().await.unwrap()).await;
    let stores = stores_of(&ledger, &ledger.postgres, ledger.services.vectors().url().to_owned());
    for version in due(&ledger, &["a", "b", "c"]).await {
        let sql = "UPDATE document_versions SET chunk_count = $2::text::integer WHERE id = $1";
        set(&ledger, sql, version, "25000").await;
    }
    for (swept, all) in [(2, 2), (1, 3), (0, 3)] {
        assert_eq!(janitor::sweep(&stores).await.unwrap(), swept);
        assert_eq!(ledger.count(SWEPT).await, all);
    }
}

#[tokio::test]
async fn a_collection_that_is_away_alone_stops_no_other_sweep_and_is_overdue_in_the_end() {
    let services = devstack::testing::TestServices::builder().postgres().redis_cache().vectors();
    let ledger = Ledger::over(services.start().await.unwrap()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let url = way_to(ledger.services.vectors().url(), Arc::clone(&ill), Duration::ZERO).await;
    let stores = stores_of(&ledger, &ledger.postgres, url);
    let (stuck, other) = (ledger.ingested("a").await, ledger.ingested("b").await);
    for document in ["a", "b"] {
        ledger.ingested(document).await;
    }
    let run = async |sql: &'static str, id: Uuid| {
        sqlx::query(sql).bind(id).execute(ledger.postgres.pool()).await.unwrap();
    };
    run(
        "UPDATE document_versions SET sweep_after = now() - interval '1 hour', collection = CASE WHEN id = $1 THEN 'ill-collection' ELSE 'well-collection' END
         WHERE state = 'retired'",
        stuck,
    )
    .await;
    let due = "SELECT count(*) FROM document_versions WHERE sweep_after <= now()";
    assert_eq!(janitor::sweep(&stores).await.unwrap(), 1);
    let swept: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM document_versions WHERE sweeps = 1")
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
    assert_eq!(swept, [other]);
    assert_eq!(ledger.count(due).await, 0, "the other is put off");
    // A second time, and it is still late since it was due first.
    run("UPDATE document_versions SET sweep_after = now() WHERE id = $1", stuck).await;
    assert_eq!(janitor::sweep(&stores).await.unwrap(), 0);

    let overdue = async || {
        ill.store(false, Ordering::Relaxed);
        let settings = AuditSettings { confirm_after: Duration::from_millis(50), ..AuditSettings::default() };
        let report = Auditor::new(stores.clone(), None).run(&settings).await.unwrap();
        let late = report.findings.into_iter().filter(|finding| finding.kind == FindingKind::JanitorOverdue);
        late.map(|finding| finding.version).collect::<Vec<_>>()
    };
    assert_eq!(overdue().await, [Some(stuck)]);
    run("UPDATE document_versions SET sweep_after = now() WHERE id = $1", stuck).await;
    assert_eq!(janitor::sweep(&stores).await.unwrap(), 1);
    assert!(overdue().await.is_empty());
}
