//! A document that changes is whole for every reader all the time, in every store: the old content, then the new, also when
//! the change fails and when workers die.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, LONG, SHORT, TENANT, text, wait_until};

const DOCUMENT: &str = "handbook";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reingest_that_fails_at_any_step_leaves_the_old_version_readable_throughout() {
    let fleet = Fleet::start().await;
    // Each point acts once, so each attempt to change the document dies at the next one.
    let points: Vec<String> = ["stage", "vectors", "cache", "publish"]
        .iter()
        .flat_map(|step| ["before", "inside", "after"].map(|at| format!("ingest.{step}.{at}")))
        .filter(|point| fleet.fault_points().contains(point))
        // From the pivot on, nothing fails any more.
        .filter(|point| point != "ingest.publish.after")
        .collect();
    assert_eq!(points.len(), 10, "{points:?}");
    let (old, new) = (text(DOCUMENT, 1), text(DOCUMENT, 2));
    let seeding = fleet.worker().start();
    let first = fleet.ingest(DOCUMENT, &old).await;
    assert_eq!(fleet.ended(first).await, "succeeded");
    assert!(seeding.terminate().await.success());
    let version = fleet.postgres.current_version(TENANT, DOCUMENT).await.unwrap().unwrap().version;

    let armed: Vec<String> = points.iter().map(|point| format!("{point}=permanent")).collect();
    let worker = fleet.worker().faults(armed.join(";")).start();
    let reader = fleet.reader([(DOCUMENT.to_owned(), vec![old.clone(), new.clone()])]);
    for (no, point) in points.iter().enumerate() {
        let job = fleet.ingest(DOCUMENT, &new).await;
        assert_eq!(fleet.ended(job).await, "dead", "{point}{}", fleet.describe(job).await);
        assert_eq!(
            fleet.fired(point),
            1,
            "attempt {no} died elsewhere than at {point}{}",
            fleet.describe(job).await
        );
        let shown = fleet.stores.document(TENANT, DOCUMENT).await.unwrap().unwrap();
        assert_eq!((shown.version.version, shown.text.as_str()), (version, old.as_str()), "after {point}");
        let looks = reader.looks();
        wait_until("the reader looks again", SHORT, async || {
            if reader.looks() > looks + 1 { Ok(()) } else { Err(format!("{looks} looks")) }
        })
        .await;
    }
    fleet.audit_clean().await;
    // The same change succeeds as soon as nothing fails.
    let job = fleet.ingest(DOCUMENT, &new).await;
    assert_eq!(fleet.ended(job).await, "succeeded", "{}", fleet.describe(job).await);
    fleet.audit_clean().await;
    let history = reader.finish().await;
    assert_eq!(
        history.texts(DOCUMENT),
        [old.as_str(), new.as_str()],
        "first the old text, then the new, nothing between"
    );
    println!("{} failed re-ingests, {} looks of a reader, no half state", points.len(), history.looks);
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    drop((seeding, worker));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_that_change_while_workers_die_are_always_whole_and_never_go_back() {
    const DOCUMENTS: usize = 12;
    const REVISIONS: u32 = 10;
    let fleet = Fleet::start().await;
    let names: Vec<String> = (0..DOCUMENTS).map(|no| format!("page-{no}")).collect();
    let mut workers: Vec<_> = (0..2).map(|_| fleet.worker().start()).collect();
    let reader = fleet.reader(
        names
            .iter()
            .map(|name| (name.clone(), (1..=REVISIONS).map(|revision| text(name, revision)).collect())),
    );
    let jobs = (1..=REVISIONS).flat_map(|revision| names.iter().map(move |name| (name, revision)));
    let jobs = fleet
        .accept(jobs.map(|(name, revision)| fleet.ingest_job(name, &text(name, revision))).collect())
        .await;
    // Whenever a sixth of the work is done, a worker dies and another takes its place.
    for kills in 1..=5 {
        let share = jobs.len() as i64 * kills / 6;
        wait_until(&format!("{share} jobs have ended"), LONG, async || {
            let counts = fleet.postgres.job_counts(None).await.unwrap();
            if counts.succeeded >= share { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
        workers.remove(0).kill9().await;
        workers.push(fleet.worker().start());
    }
    for worker in &workers {
        worker.ready().await;
    }
    fleet.assert_all_succeeded(&jobs).await;
    for name in &names {
        assert_eq!(fleet.stores.document(TENANT, name).await.unwrap().unwrap().text, text(name, REVISIONS));
    }
    let report = fleet.audit_clean().await;
    let history = reader.finish().await;
    for name in &names {
        let seen: Vec<u32> = history
            .texts(name)
            .iter()
            .map(|seen| (1..=REVISIONS).find(|revision| text(name, *revision) == *seen).unwrap())
            .collect();
        assert!(seen.is_sorted(), "{name} went back: {seen:?}");
    }
    println!(
        "{} looks at {DOCUMENTS} documents in change, no half state; audited {:?}",
        history.looks, report.counts
    );
    for worker in &workers {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    drop(workers);
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_re_embedding_of_all_documents_goes_on_behind_those_that_have_their_jobs() {
    let fleet = Fleet::start().await;
    let names = ["a", "b", "c"];
    let ids = fleet.enqueue(names.map(|name| fleet.ingest_job(name, &text(name, 1))).into()).await;
    // Nobody comes to the documents' own jobs: one job at a time, and it fails again and again.
    let worker = fleet.worker().concurrency(1).faults("embed.fan_out.after=error*1000").start();
    fleet.assert_all_succeeded(&ids).await;
    let job = fleet.enqueue(vec![fleet.job("embed", serde_json::json!({ "all": true }))]).await[0];
    wait_until("the log has how far it came", LONG, async || {
        let enqueued: Option<i64> =
            sqlx::query_scalar("SELECT (data ->> 'enqueued')::bigint FROM sagas WHERE job_id = $1")
                .bind(job.0)
                .fetch_optional(fleet.postgres.pool())
                .await
                .map_err(|e| e.to_string())?
                .flatten();
        if enqueued == Some(3) { Ok(()) } else { Err(format!("{enqueued:?}{}", fleet.describe(job).await)) }
    })
    .await;
    worker.kill9().await;
    // As after the time for which each document's key is kept.
    sqlx::query("DELETE FROM idempotency_keys").execute(fleet.postgres.pool()).await.unwrap();
    let worker = fleet.worker().start();
    assert_eq!(fleet.ended(job).await, "succeeded", "{}", fleet.describe(job).await);
    let result = fleet.postgres.job(job, None).await.unwrap().unwrap().result;
    assert_eq!(result, Some(serde_json::json!({ "enqueued": 3 })));
    let children: i64 = sqlx::query_scalar("SELECT count(*) FROM jobs WHERE parent = $1")
        .bind(job.0)
        .fetch_one(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(children, 3);
    fleet.audit_clean().await;
    assert!(worker.terminate().await.success());
    drop(worker);
    fleet.end();
}
