//! Rule 17: what people change about waiting jobs is committed in the ledger.

use chrono::Utc;
use queue::{JobId, Priority};
use sagas::stores::postgres::{
    control::{Change, Changed, Selection},
    take::Take,
};
use serde_json::json;

use crate::ledger::{HOUR, Ledger, ingest, job, run_of};

fn priority(number: u8) -> Change {
    Change { priority: Some(Priority::try_from(number).unwrap()), run_at: None }
}

#[tokio::test]
async fn rule_17_a_waiting_job_is_changed_and_left_to_the_relay_and_others_are_left() {
    let ledger = Ledger::start().await;
    let ids = ledger.accept(&[ingest("a"), ingest("b"), ingest("c")]).await;
    let (waiting, running, ended) = (ids[0], ids[1], ids[2]);
    ledger.take("w", running).await;
    let taken = ledger.take("w", ended).await;
    ledger.postgres.complete(&run_of(&taken, None), &json!({}), &[]).await.unwrap();
    let asked = [running, waiting, JobId::new(), ended];
    let changed = ledger.postgres.change_jobs(&asked, None, priority(9)).await.unwrap();
    assert_eq!(changed, [Changed::Running, Changed::Done, Changed::Unknown, Changed::Ended]);
    let changed = ledger.postgres.change_jobs(&[waiting], Some("globex"), priority(1)).await.unwrap();
    assert_eq!(changed, [Changed::Unknown], "another tenant's");
    let batch = ledger.postgres.undispatched(10, &[], &[]).await.unwrap();
    let seen: Vec<_> = batch.envelopes.iter().map(|e| (e.id, e.priority.get())).collect();
    assert_eq!(seen, [(waiting, 9)]);
    drop(batch);
    for id in [running, ended] {
        assert_eq!(ledger.postgres.job(id, None).await.unwrap().unwrap().priority, 5);
    }
}

#[tokio::test]
async fn rule_17_a_job_that_is_put_off_is_not_taken_before_its_time() {
    let ledger = Ledger::start().await;
    let id = ledger.ingest("a").await;
    let later = Change { priority: None, run_at: Some(Utc::now() + HOUR) };
    assert_eq!(ledger.postgres.change_jobs(&[id], None, later).await.unwrap(), [Changed::Done]);
    match &ledger.takes("w", &[id]).await[0] {
        Take::NotYet(wait) => assert!(*wait > HOUR / 2, "{wait:?}"),
        other => panic!("{other:?}"),
    }
    let now = Change { priority: None, run_at: Some(Utc::now() - HOUR) };
    ledger.postgres.change_jobs(&[id], None, now).await.unwrap();
    ledger.take("w", id).await;
}

#[tokio::test]
async fn a_filter_chooses_what_has_not_ended_oldest_first_and_no_more_than_asked_for() {
    let ledger = Ledger::start().await;
    ledger.postgres.create_tenant("globex").await.unwrap();
    // Made in this order, so that their ids are in it.
    let mut jobs = vec![ingest("a"), job("report", json!({})), job("report", json!({})), ingest("b")];
    jobs[2].tenant = queue::TenantId::new("globex").unwrap();
    let ids = ledger.accept(&jobs).await;
    ledger.take("w", ids[3]).await;
    let choose = |change: fn(&mut Selection)| {
        let mut selection = Selection { limit: 10, ..Selection::default() };
        change(&mut selection);
        let postgres = ledger.postgres.clone();
        async move { postgres.select_jobs(&selection).await.unwrap() }
    };
    assert_eq!(choose(|_| ()).await, ids[..3]);
    assert_eq!(choose(|s| s.running = true).await, ids);
    assert_eq!(choose(|s| s.limit = 2).await, ids[..2]);
    let rest = Selection { after: Some(ids[1].0), limit: 10, ..Selection::default() };
    assert_eq!(
        ledger.postgres.select_jobs(&rest).await.unwrap(),
        ids[2..3],
        "goes on where the page before ended"
    );
    assert_eq!(choose(|s| s.queue = Some("report".into())).await, ids[1..3]);
    assert_eq!(choose(|s| s.tenant = Some("globex".into())).await, ids[2..3]);
    assert_eq!(choose(|s| s.kind = Some("ingest".into())).await, ids[..1]);
}
