//! Runs that can be neither finished nor undone wait for a person, with all that the person needs; they go on when the cause
//! is mended, or are closed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, LONG, Subject, TENANT, text, wait_until};
use serde_json::Value;

/// Parks an ingest whose points can't be removed, as a person sees it with the program.
const REFUSED: &str = "ingest.publish.before=permanent;ingest.vectors.compensate.before=permanent";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_saga_is_listed_with_what_stands_and_ends_right_by_retry_or_resolve() {
    let fleet = Fleet::start().await;
    let first = fleet.worker().faults(REFUSED.replace("permanent", "permanent*2")).start();
    let (mended, closed) = (fleet.ingest("a", &text("a", 1)).await, fleet.ingest("b", &text("b", 1)).await);
    for job in [mended, closed] {
        assert_eq!(fleet.ended(job).await, "parked", "{}", fleet.describe(job).await);
    }
    assert!(first.terminate().await.success(), "{}", first.tail());

    // Listed, and each shown with its errors, its steps and what is in each store.
    let listed =
        fleet.flotilla(0, &["sagas", "list", "--state", "parked", "--tenant", TENANT, "--since", "1h"]);
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    let shown = fleet.flotilla(0, &["sagas", "show", &mended.to_string()]);
    let standing = &shown["sagas"][0]["standing"];
    let errors = standing["errors"].to_string();
    assert!(
        errors.contains("compensation of vectors failed") && errors.contains("ingest.publish.before"),
        "{errors}"
    );
    let effects: Vec<(&str, &str)> = standing["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| (step["step"].as_str().unwrap(), step["effect"].as_str().unwrap()))
        .collect();
    assert_eq!(
        effects,
        [("stage", "stands"), ("vectors", "stands"), ("cache", "undone"), ("publish", "may_stand")],
        "{standing}"
    );
    let version = &standing["versions"][0];
    assert_eq!(version["state"], "staged", "{version}");
    assert_eq!(version["points"], version["chunk_count"], "{version}");
    assert_eq!(
        (&version["cached"], &version["has_body"]),
        (&Value::Bool(false), &Value::Bool(true)),
        "{version}"
    );
    // The audit has nothing to complain about, and says who waits.
    let audit = fleet.flotilla(0, &["audit"]);
    assert_eq!(
        (&audit["by_kind"], &audit["pending"]["parked"]),
        (&serde_json::json!({}), &2.into()),
        "{audit}"
    );
    assert!(audit["pending"]["unseen_points"].as_u64().unwrap() > 0, "{audit}");

    // The cause is mended: this worker has no fault points. The job ends as its verdict said.
    let second = fleet.worker().start();
    let retried = fleet.flotilla(0, &["sagas", "retry", &mended.to_string()]);
    assert_eq!(retried["job"], mended.to_string(), "{retried}");
    assert_eq!(fleet.ended(mended).await, "dead", "{}", fleet.describe(mended).await);
    fleet.flotilla(1, &["sagas", "retry", &mended.to_string()]);
    assert!(fleet.stores.document(TENANT, "a").await.unwrap().is_none());

    // The other is closed as it is.
    let resolved =
        fleet.flotilla(0, &["sagas", "resolve", &closed.to_string(), "--reason", "the collection is gone"]);
    assert_eq!(
        (&resolved["job_state"], &resolved["stood"]["versions"][0]["state"]),
        (&"dead".into(), &"staged".into())
    );
    fleet.flotilla(1, &["sagas", "resolve", &closed.to_string(), "--reason", "again"]);
    let actions: Vec<(String, Value)> =
        sqlx::query_as("SELECT action, detail FROM audit_log WHERE action LIKE 'saga.%' ORDER BY at")
            .fetch_all(fleet.postgres.pool())
            .await
            .unwrap();
    assert_eq!(
        actions.iter().map(|(action, _)| action.as_str()).collect::<Vec<_>>(),
        ["saga.retry", "saga.resolve"]
    );
    assert_eq!(actions[1].1["reason"], "the collection is gone");

    // Nothing of either stands, and both documents take new versions.
    let again = [fleet.ingest("a", &text("a", 2)).await, fleet.ingest("b", &text("b", 2)).await];
    fleet.assert_all_succeeded(&again).await;
    let report = fleet.audit_clean().await;
    assert_eq!(report.counts.documents, 2);
    let letters = fleet.flotilla(0, &["dlq", "list"]);
    assert_eq!(letters.as_array().unwrap().len(), 2, "{letters}");
    assert!(second.terminate().await.success(), "{}", second.tail());
    drop((first, second));
    fleet.end();
}

/// The first run of a repeatable saga has its job's id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_jobs_id_means_its_parked_run_also_where_the_first_run_has_the_same_id() {
    let fleet = Fleet::start().await;
    let mut subjects = [Subject::new("probe", "p", "lane")];
    fleet.seed(&mut subjects).await;
    let first = fleet.worker().queues(&["lane"]).faults("probe.second.before=error*9").start();
    let job = fleet.begin(&subjects[0]).await;
    wait_until("the first run is undone", LONG, async || {
        match fleet.postgres.attempts(job).await.unwrap().len() {
            0 => Err(fleet.describe(job).await),
            _ => Ok(()),
        }
    })
    .await;
    assert!(first.terminate().await.success(), "{}", first.tail());
    let refused = "probe.second.before=permanent;probe.first.compensate.before=permanent";
    let refused = fleet.faults("refused", refused.to_owned());
    let second = fleet.worker().queues(&["lane"]).armed(&refused).start();
    assert_eq!(fleet.ended(job).await, "parked", "{}", fleet.describe(job).await);
    assert!(second.terminate().await.success(), "{}", second.tail());

    let shown = fleet.flotilla(0, &["sagas", "show", &job.to_string()]);
    let runs = shown["sagas"].as_array().unwrap();
    assert_eq!(
        (&runs[0]["id"], &runs[0]["state"]),
        (&job.to_string().into(), &"compensated".into()),
        "{shown}"
    );
    let parked = runs.last().unwrap();
    assert_eq!(parked["state"], "parked", "{shown}");
    assert_ne!(parked["id"], runs[0]["id"]);
    let third = fleet.worker().queues(&["lane"]).start();
    let retried = fleet.flotilla(0, &["sagas", "retry", &job.to_string()]);
    assert_eq!((&retried["job"], &retried["saga"]), (&job.to_string().into(), &parked["id"]), "{retried}");
    assert_eq!(fleet.ended(job).await, "dead", "{}", fleet.describe(job).await);
    assert!(third.terminate().await.success(), "{}", third.tail());
    fleet.audit_clean().await;
    drop((first, second, third));
    fleet.end();
}
