//! The outbox of events: none is missed, none comes twice, and those of a document come in the order readers saw the changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{path::Path, process::Command, time::Duration};

use devstack::testing::TestServices;
use sagas::stores::postgres::{
    Postgres, PostgresConfig,
    events::{Event, Events, FIRST},
};
use sqlx::PgConnection;
use uuid::Uuid;

const TENANT: &str = "acme";

struct Stage {
    postgres: Postgres,
    services: TestServices,
}

impl Stage {
    async fn new() -> Self {
        let services = TestServices::builder().postgres().start().await.unwrap();
        let postgres = Postgres::connect(&PostgresConfig::new(services.postgres().url())).await.unwrap();
        postgres.migrate_up().await.unwrap();
        postgres.create_tenant(TENANT).await.unwrap();
        Self { postgres, services }
    }

    /// A document with so many versions, none of which is published.
    async fn document(&self, key: &str, versions: usize) -> (Uuid, Vec<Uuid>) {
        let document = Uuid::now_v7();
        sqlx::query("INSERT INTO documents (id, tenant, key, last_order) VALUES ($1, $2, $3, 100)")
            .bind(document)
            .bind(TENANT)
            .bind(key)
            .execute(self.postgres.pool())
            .await
            .unwrap();
        let mut ids = vec![];
        for order in 1..=versions {
            let id = Uuid::now_v7();
            sqlx::query(
                "INSERT INTO document_versions (id, document_id, tenant, doc_order, saga_id, state, body, content_hash, model,
                     dimensions, collection, chunk_count)
                 VALUES ($1, $2, $3, $4, $5, 'staged', 'x', sha256('x'), 'm', 1, 'c', 1)",
            )
            .bind(id)
            .bind(document)
            .bind(TENANT)
            .bind(order as i64)
            .bind(Uuid::now_v7())
            .execute(self.postgres.pool())
            .await
            .unwrap();
            ids.push(id);
        }
        (document, ids)
    }

    async fn page(&self, after: &str, limit: i32) -> Vec<Event> {
        match self.postgres.events_after(after, Some(TENANT), limit).await.unwrap() {
            Events::Page(events) => events,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until no transaction is under way, not even one of the server's own.
    async fn quiet(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            let quiet: bool = sqlx::query_scalar(
                "SELECT pg_snapshot_xmin(s) = pg_snapshot_xmax(s) FROM pg_current_snapshot() AS s",
            )
            .fetch_one(self.postgres.pool())
            .await
            .unwrap();
            if quiet {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "a transaction stays open");
        }
    }

    /// The versions told of, in the order in which a reader with small pages hears of them.
    async fn heard(&self) -> Vec<Uuid> {
        let (mut after, mut versions) = (FIRST.to_owned(), vec![]);
        loop {
            let page = self.page(&after, 2).await;
            let Some(last) = page.last() else { return versions };
            after.clone_from(&last.cursor);
            versions.extend(page.iter().map(|event| event.version));
        }
    }
}

async fn show(connection: &mut PgConnection, document: Uuid, version: Option<Uuid>) {
    sqlx::query("UPDATE documents SET current_version = $2 WHERE id = $1")
        .bind(document)
        .bind(version)
        .execute(connection)
        .await
        .unwrap();
}

/// Makes a transaction draw its number.
async fn draw(connection: &mut PgConnection) {
    sqlx::query("SELECT pg_current_xact_id()").execute(connection).await.unwrap();
}

#[tokio::test]
async fn what_could_still_be_overtaken_is_not_shown() {
    let stage = Stage::new().await;
    let ((a, of_a), (b, of_b)) = (stage.document("a", 1).await, stage.document("b", 1).await);
    let (mut early, mut late) =
        (stage.postgres.begin().await.unwrap(), stage.postgres.begin().await.unwrap());
    draw(&mut early).await;
    show(&mut late, b, Some(of_b[0])).await;
    late.commit().await.unwrap();
    // A reader that went on past this event would never see the one that the open transaction writes now.
    assert!(stage.heard().await.is_empty());
    let now = stage.postgres.events_now().await.unwrap();
    show(&mut early, a, Some(of_a[0])).await;
    early.commit().await.unwrap();
    stage.quiet().await;
    assert_eq!(stage.heard().await, [of_a[0], of_b[0]]);
    // What was committed after a cursor of now was taken comes after it.
    assert!(stage.page(&now, 10).await.iter().any(|event| event.version == of_a[0]), "{now}");

    let mut lost = stage.postgres.begin().await.unwrap();
    show(&mut lost, a, None).await;
    lost.rollback().await.unwrap();
    stage.quiet().await;
    assert_eq!(stage.heard().await.len(), 2, "a change that was rolled back was told");
}

#[tokio::test]
async fn the_events_of_a_document_come_in_the_order_of_its_changes() {
    let stage = Stage::new().await;
    let (document, versions) = stage.document("a", 2).await;
    let mut first_to_begin = stage.postgres.begin().await.unwrap();
    draw(&mut first_to_begin).await;
    let mut between = stage.postgres.begin().await.unwrap();
    draw(&mut between).await;
    let mut first_to_publish = stage.postgres.begin().await.unwrap();
    show(&mut first_to_publish, document, Some(versions[0])).await;
    first_to_publish.commit().await.unwrap();
    show(&mut first_to_begin, document, Some(versions[1])).await;
    first_to_begin.commit().await.unwrap();
    // Were it known by its own number, the second change would be shown before the first, which is held back.
    assert!(stage.heard().await.is_empty());
    between.commit().await.unwrap();
    stage.quiet().await;
    assert_eq!(stage.heard().await, versions);
}

#[tokio::test]
async fn retention_leaves_no_gap_unnoticed() {
    let stage = Stage::new().await;
    let (document, versions) = stage.document("a", 3).await;
    let mut connection = stage.postgres.pool().acquire().await.unwrap();
    for version in &versions {
        show(&mut connection, document, Some(*version)).await;
    }
    show(&mut connection, document, None).await;
    stage.quiet().await;
    let all = stage.page(FIRST, 100).await;
    assert_eq!(all.len(), 4);
    assert_eq!((all[3].event.as_str(), all[3].version), ("document.deleted", versions[2]));
    let hour = Duration::from_secs(3600);
    assert_eq!(stage.postgres.expire_events(hour, 100).await.unwrap(), 0, "they are not old yet");
    assert_eq!(stage.postgres.expire_events(Duration::ZERO, 2).await.unwrap(), 2);
    let after = async |cursor: &str| stage.postgres.events_after(cursor, None, 100).await.unwrap();
    assert_eq!(after(&all[0].cursor).await, Events::Expired, "the second event is gone");
    assert_eq!(after(&all[1].cursor).await, Events::Page(all[2..].to_vec()));
    assert_eq!(after(FIRST).await, Events::Page(all[2..].to_vec()));
    for junk in ["", "7", "a-b", "1-2-3", "-1-1", "99999999999999999999999-1"] {
        assert_eq!(after(junk).await, Events::NoCursor, "{junk}");
    }
}

/// Runs a script of `deploy/backup`; returns what it printed last.
fn script(name: &str, database: &str, argument: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/backup").join(name);
    let done = Command::new(path).env("DATABASE_URL", database).arg(argument).output().unwrap();
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().lines().last().unwrap().to_owned()
}

#[tokio::test]
async fn after_a_restore_cursors_from_before_have_ended_and_events_are_told_again() {
    let stage = Stage::new().await;
    let (document, versions) = stage.document("a", 3).await;
    let mut connection = stage.postgres.pool().acquire().await.unwrap();
    show(&mut connection, document, Some(versions[0])).await;
    // As if the cluster had counted far; the one that it is restored into begins from below.
    for sql in ["UPDATE events SET tx = '3000000000'", "UPDATE documents SET event_tx = '3000000000'"] {
        sqlx::query(sql).execute(&mut *connection).await.unwrap();
    }
    let url = stage.services.postgres().url();
    let dump = script("backup.sh", url, stage.services.dir());
    sqlx::query("CREATE DATABASE restored").execute(&mut *connection).await.unwrap();
    let (server, _) = url.rsplit_once('/').unwrap();
    let restored = format!("{server}/restored");
    script("restore.sh", &restored, Path::new(&dump));
    drop(connection);
    let postgres = Postgres::connect(&PostgresConfig::new(&restored)).await.unwrap();
    let stage = Stage { postgres, services: stage.services };

    let (_, begun) = stage.postgres.events_page(FIRST, Some(TENANT), 10).await.unwrap();
    let mut connection = stage.postgres.pool().acquire().await.unwrap();
    show(&mut connection, document, Some(versions[1])).await;
    stage.quiet().await;
    // Of what was told last, what the lost cluster went on to tell, and what this one's count would be.
    for cursor in ["3000000000-1", "4000000000-7", "900-1"] {
        let answer = stage.postgres.events_after(cursor, None, 10).await.unwrap();
        assert_eq!(answer, Events::Expired, "{cursor}");
    }
    assert_eq!(stage.heard().await, [versions[1]]);
    let page = stage.page(&begun, 10).await;
    assert_eq!(page.iter().map(|event| event.version).collect::<Vec<_>>(), [versions[1]]);
    show(&mut connection, document, Some(versions[2])).await;
    stage.quiet().await;
    let next = stage.page(&page[0].cursor, 10).await;
    assert_eq!(next.iter().map(|event| event.version).collect::<Vec<_>>(), [versions[2]]);
}
