//! A changed document that can't be ingested stays as it was: in every store, for every reader, all the time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, SHORT, TENANT, text, wait_until};

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
