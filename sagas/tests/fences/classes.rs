//! Classes of tenants, as the ledger counts them.

use std::time::Duration;

use sagas::stores::postgres::classes::{ClassCount, Classified, MAX_CLASSES};
use serde_json::json;

use crate::ledger::{Ledger, job, run_of};

const OFTEN: Duration = Duration::ZERO;

fn count(class: &str, waiting: i64, running: i64, ended: i64) -> ClassCount {
    ClassCount {
        queue: "report".to_owned(),
        class: class.to_owned(),
        waiting,
        oldest_s: None,
        running,
        ended,
    }
}

#[tokio::test]
async fn each_class_is_counted_and_only_when_it_is_time() {
    let ledger = Ledger::start().await;
    ledger.postgres.create_tenant("big").await.unwrap();
    let of_big = || {
        let mut job = job("report", json!({}));
        job.tenant = queue::TenantId::new("big").unwrap();
        job
    };
    let ids = ledger.accept(&[job("report", json!({})), of_big(), of_big(), of_big()]).await;
    // Without classes there is nothing to count by.
    assert!(!ledger.postgres.count_classes(OFTEN).await.unwrap());
    assert_eq!(ledger.postgres.class_counts().await.unwrap(), []);

    assert_eq!(ledger.postgres.set_class("big", "gold", "someone").await.unwrap(), Classified::Done);
    ledger.take("w", ids[1]).await;
    let ends = ledger.take("w", ids[2]).await;
    assert!(ledger.postgres.complete(&run_of(&ends, None), &json!(1), &[]).await.unwrap());
    assert!(ledger.postgres.count_classes(OFTEN).await.unwrap());
    let mut counts = ledger.postgres.class_counts().await.unwrap();
    for one in &mut counts {
        assert_eq!(one.oldest_s.take().is_some_and(|age| age >= 0.0), one.waiting > 0);
    }
    assert_eq!(counts, [count("default", 1, 0, 0), count("gold", 1, 1, 1)]);

    // A long pause holds for everybody. The pause before was 20 times what that count took.
    sqlx::query("UPDATE class_counting SET next_at = now()").execute(ledger.postgres.pool()).await.unwrap();
    assert!(ledger.postgres.count_classes(Duration::from_secs(60)).await.unwrap());
    assert!(!ledger.postgres.count_classes(OFTEN).await.unwrap());

    // What was counted for the last class doesn't come back with the next.
    ledger.postgres.set_class("big", "default", "someone").await.unwrap();
    ledger.postgres.set_class("big", "silver", "someone").await.unwrap();
    assert_eq!(ledger.postgres.class_counts().await.unwrap(), []);
    assert!(ledger.postgres.count_classes(OFTEN).await.unwrap());
}

#[tokio::test]
async fn classes_are_few_because_each_is_a_label() {
    let ledger = Ledger::start().await;
    let set = async |number: i64, class: &str| {
        let tenant = format!("t{number}");
        ledger.postgres.create_tenant(&tenant).await.unwrap();
        ledger.postgres.set_class(&tenant, class, "someone").await.unwrap()
    };
    for number in 0..MAX_CLASSES {
        assert_eq!(set(number, &format!("c{number}")).await, Classified::Done);
    }
    assert_eq!(set(MAX_CLASSES, "more").await, Classified::TooMany);
    assert_eq!(set(MAX_CLASSES, "c0").await, Classified::Done);
    // A class is there as long as a tenant has it.
    assert_eq!(set(1, "default").await, Classified::Done);
    assert_eq!(set(MAX_CLASSES, "more").await, Classified::Done);
    let nobody = ledger.postgres.set_class("nobody", "c0", "someone").await.unwrap();
    assert_eq!(nobody, Classified::UnknownTenant);
}
