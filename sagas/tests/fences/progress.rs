//! Rule 2 for progress: only the delivery that holds the job may say how far it is.

use sagas::stores::postgres::progress::{MAX_MESSAGE, Progress};
use serde_json::json;

use crate::ledger::{Ledger, job, run_of};

#[tokio::test]
async fn protocol_02_a_zombies_progress_is_refused_by_the_fence() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[job("member", json!({})), job("member", json!({}))]).await;
    let zombie = ledger.take("one", ids[0]).await;
    let other = ledger.take("one", ids[1]).await;
    let said = Progress::new(zombie.id, zombie.fence, 40, "half way");
    assert_eq!(ledger.postgres.record_progress(&[said]).await.unwrap(), [zombie.id]);
    let view = ledger.postgres.job(zombie.id, None).await.unwrap().unwrap();
    assert_eq!((view.progress, view.progress_message.as_deref()), (Some(40), Some("half way")));

    let heir = ledger.take("two", zombie.id).await;
    let view = ledger.postgres.job(zombie.id, None).await.unwrap().unwrap();
    assert_eq!((view.progress, view.progress_message), (None, None), "an earlier delivery's word");
    // In one statement with a job that still is its own.
    let late = Progress::new(zombie.id, zombie.fence, 90, "late");
    let fine = Progress::new(other.id, other.fence, 10, "");
    assert_eq!(ledger.postgres.record_progress(&[late.clone(), fine]).await.unwrap(), [other.id]);
    let said = Progress::new(heir.id, heir.fence, 5, "anew");
    assert_eq!(ledger.postgres.record_progress(&[said]).await.unwrap(), [heir.id]);
    assert!(ledger.postgres.record_progress(&[late]).await.unwrap().is_empty());
    let view = ledger.postgres.job(zombie.id, None).await.unwrap().unwrap();
    assert_eq!((view.progress, view.progress_message.as_deref()), (Some(5), Some("anew")));

    // Nor after the job's end.
    assert!(ledger.postgres.complete(&run_of(&heir, None), &json!({}), &[]).await.unwrap());
    let over = Progress::new(heir.id, heir.fence, 100, "over");
    assert!(ledger.postgres.record_progress(&[over]).await.unwrap().is_empty());
}

#[test]
fn progress_is_cut_to_what_the_ledger_takes() {
    let said =
        Progress::new(queue::JobId::new(), sagas::stores::postgres::Fence(1), 255, &"é\0".repeat(1000));
    assert_eq!(said.percent, 100);
    assert_eq!(said.message.unwrap(), "é".repeat(MAX_MESSAGE));
}
