//! Classes of tenants: counted once for the fleet, reported by all of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use e2e::{Fleet, SHORT, TENANT, WorkerProcess, text, wait_until};
use serde_json::json;

/// Waits until a worker reports these gauges of a queue and a class: depth, in flight, ended.
async fn reports(worker: &WorkerProcess, queue: &str, class: &str, expected: [f64; 3]) {
    let names = ["queue_class_depth", "queue_class_in_flight", "queue_class_ended_last_minute"];
    wait_until("the class is reported", SHORT, async || {
        let metrics = worker.metrics().await.map_err(|error| error.to_string())?;
        let gauge = |name: &str| {
            let series = format!("{name}{{queue=\"{queue}\",tenant_class=\"{class}\"}}");
            WorkerProcess::gauge(&metrics, &series)
        };
        if names.map(gauge) == expected.map(Some) { Ok(()) } else { Err(metrics) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_and_ends_is_reported_by_the_class_of_its_tenant() {
    let fleet = Fleet::start().await;
    let worker = fleet.worker().start();
    let done = fleet.ingest("a", &text("a", 1)).await;
    fleet.assert_all_succeeded(&[done]).await;
    let waits = |_| {
        let mut job = fleet.job("report", json!({}));
        job.queue = queue::QueueName::new("nobody-serves").unwrap();
        job
    };
    fleet.accept((0..3).map(waits).collect()).await;
    assert!(!worker.metrics().await.unwrap().contains("tenant_class"), "nobody has a class");
    assert_eq!(fleet.flotilla(0, &["stats"])["tenant_classes"], json!([]));

    fleet.flotilla(0, &["tenants", "class", TENANT, "gold"]);
    assert_eq!(fleet.flotilla(0, &["tenants", "show", TENANT])["class"], "gold");
    reports(&worker, "nobody-serves", "gold", [3.0, 0.0, 0.0]).await;
    reports(&worker, "ingest", "gold", [0.0, 0.0, 1.0]).await;
    let stats = fleet.flotilla(0, &["stats"]);
    let counted = &stats["tenant_classes"][1];
    assert_eq!((&counted["queue"], &counted["waiting"]), (&json!("nobody-serves"), &json!(3)), "{counted}");
    let workers = |queue: &str| &stats["queues"][queue]["workers"];
    assert_eq!((workers("nobody-serves"), workers("ingest")), (&json!(0), &json!(1)), "{stats}");
    assert!(counted["oldest_s"].as_f64().unwrap() > 0.0, "{counted}");

    // Its gauges end with it.
    fleet.flotilla(0, &["tenants", "class", TENANT, "default"]);
    reports(&worker, "nobody-serves", "gold", [0.0, 0.0, 0.0]).await;
    assert!(worker.terminate().await.success(), "{}", worker.tail());
    drop(worker);
    fleet.end();
}
