//! Sealed payloads in the ledger: what is at rest shows nothing, opens in its own row alone, and outlives a rotation.

use sagas::{
    encryption::{Keyring, PayloadCipher},
    stores::postgres::{
        Postgres,
        accept::{Accepted, Idempotency, NewJob, Until},
        batches::{BatchId, Callback, CallbackOn, Created, NewBatch},
        dead_letters::{Replay, Resolved},
        ending::{GivenBack, Verdict},
        inspect::JobFilter,
        sealing::Rotated,
        waits::Signalled,
    },
};
use serde_json::{Value, json};
use std::{pin::pin, time::Duration};
use uuid::Uuid;

use crate::{
    ledger::{Ledger, failure, job, run_of},
    lock_order::until_someone_waits,
};

const SECRET: &str = "swordfish-7719";

fn keys(ids: &[&str]) -> PayloadCipher {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let one = |id: &&str| format!("{id}:{}", BASE64_STANDARD.encode([id.as_bytes()[0]; 32]));
    Keyring::parse(&ids.iter().map(one).collect::<Vec<_>>().join(",")).unwrap().into()
}

fn secret() -> NewJob {
    job("secret", json!({ "card": SECRET }))
}

impl Ledger {
    async fn with_keys(ids: &[&str]) -> Self {
        Self::start().await.rekeyed(ids)
    }

    /// The same ledger, as a process with these keys sees it.
    fn rekeyed(self, ids: &[&str]) -> Self {
        Self { postgres: self.postgres.clone().with_cipher(keys(ids)), services: self.services }
    }

    fn seen_with(&self, ids: &[&str]) -> Postgres {
        self.postgres.clone().with_cipher(keys(ids))
    }

    async fn assert_nothing_shows(&self) {
        for (table, rows) in self.snapshot().await {
            for row in rows {
                assert!(!row.contains(SECRET), "{table}: {row}");
            }
        }
    }
}

#[tokio::test]
async fn sealed_payloads_results_letters_and_callbacks_show_nothing_at_rest_and_work() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let ids = ledger.accept(&[secret(), secret()]).await;
    ledger.assert_nothing_shows().await;
    // A handler gets what was enqueued, and what it returns is sealed, too.
    let taken = ledger.take("w", ids[0]).await;
    assert_eq!((taken.payload.clone(), taken.unreadable.clone()), (json!({ "card": SECRET }), None));
    let result = json!({ "charged": SECRET });
    assert!(ledger.postgres.complete(&run_of(&taken, None), &result, &[]).await.unwrap());
    ledger.assert_nothing_shows().await;
    assert_eq!(ledger.postgres.job(ids[0], None).await.unwrap().unwrap().result, Some(result));
    let all = JobFilter { limit: 10, ..JobFilter::default() };
    let listed = ledger.postgres.jobs(&all).await.unwrap();
    assert!(listed.iter().all(|job| job.result.is_none()));
    // Its death and its replay.
    let taken = ledger.take("w", ids[1]).await;
    let dead = Verdict::Dead { failure: failure() };
    assert!(ledger.postgres.finish(&run_of(&taken, None), &dead, &[]).await.unwrap());
    ledger.assert_nothing_shows().await;
    let letter = ledger.postgres.dead_letter(ids[1].0).await.unwrap().unwrap();
    assert_eq!((letter.payload.clone(), letter.payload_key_id.as_deref()), (Value::Null, Some("a")));
    assert_eq!(ledger.postgres.letter_payload(&letter).await.unwrap(), json!({ "card": SECRET }));
    let replayed = ledger.postgres.replay(letter.id, &Replay::default()).await.unwrap();
    let Resolved::Done(Some(replay)) = replayed else { panic!("{replayed:?}") };
    assert_eq!(ledger.take("w", replay).await.payload, json!({ "card": SECRET }));
    // A batch's callback.
    let batch = NewBatch {
        id: BatchId::new(),
        tenant: secret().tenant,
        name: "a".to_owned(),
        parent: None,
        callback: Some(Callback { on: CallbackOn::Complete, job: secret() }),
    };
    let made = ledger.postgres.create_batch(&batch, &[], true, true).await.unwrap();
    let callback = batch.callback.as_ref().map(|callback| callback.job.id);
    assert_eq!(made, Created::Batch { jobs: vec![], callback });
    ledger.assert_nothing_shows().await;
    let called = ledger.postgres.fold_batch(batch.id).await.unwrap().called.unwrap();
    ledger.assert_nothing_shows().await;
    assert_eq!(ledger.take("w", called).await.payload["card"], json!(SECRET));
}

#[tokio::test]
async fn a_payload_moved_to_another_job_or_tenant_is_refused() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let ids = ledger.accept(&[secret(), job("secret", json!({ "card": "mine" })), secret()]).await;
    // Somebody who may write to the table gives one job another's payload.
    sqlx::query("UPDATE jobs SET payload = (SELECT payload FROM jobs WHERE id = $1) WHERE id = $2")
        .bind(ids[0].0)
        .bind(ids[1].0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    ledger.postgres.create_tenant("mallory").await.unwrap();
    sqlx::query("UPDATE jobs SET tenant = 'mallory' WHERE id = $1")
        .bind(ids[2].0)
        .execute(ledger.postgres.pool())
        .await
        .unwrap();
    for id in [ids[1], ids[2]] {
        let taken = ledger.take("w", id).await;
        assert_eq!(taken.payload, Value::Null);
        assert!(
            taken.unreadable.as_deref().is_some_and(|why| why.contains("moved here")),
            "{:?}",
            taken.unreadable
        );
    }
    assert_eq!(ledger.take("w", ids[0]).await.unreadable, None);
}

#[tokio::test]
async fn a_wrong_or_missing_key_is_named_and_nothing_is_lost() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let id = ledger.accept(&[secret()]).await[0];
    for (postgres, said) in [
        (ledger.seen_with(&["b"]), "\"a\", which this process doesn't have (it has: b)"),
        (ledger.postgres.clone().with_cipher(PayloadCipher::default()), "(it has: none)"),
        // Another key under the same id.
        (
            ledger.postgres.clone().with_cipher(
                Keyring::parse("a:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap().into(),
            ),
            "another one under the same id",
        ),
    ] {
        let other =
            Ledger { postgres, services: devstack::testing::TestServices::builder().start().await.unwrap() };
        let taken = other.take("w", id).await;
        let why = taken.unreadable.clone().expect("unreadable");
        assert!(why.contains(said) && taken.payload.is_null(), "{why}");
        other.give_back(&taken, Duration::ZERO, GivenBack::Unroutable(Duration::ZERO)).await;
    }
    let taken = ledger.take("w", id).await;
    assert_eq!((taken.payload, taken.attempts), (json!({ "card": SECRET }), 0));
}

#[tokio::test]
async fn a_rotation_wraps_everything_that_may_still_run_and_the_old_key_can_go() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let ids = ledger.accept(&(0..7).map(|_| secret()).collect::<Vec<_>>()).await;
    let taken = ledger.take("w", ids[0]).await;
    let dead = Verdict::Dead { failure: failure() };
    assert!(ledger.postgres.finish(&run_of(&taken, None), &dead, &[]).await.unwrap());
    let batch = NewBatch {
        id: BatchId::new(),
        tenant: secret().tenant,
        name: "a".to_owned(),
        parent: None,
        callback: Some(Callback { on: CallbackOn::Complete, job: secret() }),
    };
    ledger.postgres.create_batch(&batch, &[], false, true).await.unwrap();
    // Enqueued while there were no keys.
    let plain = ledger.postgres.clone().with_cipher(PayloadCipher::default());
    let old = secret();
    assert_eq!(plain.accept(std::slice::from_ref(&old), true).await.unwrap(), [Accepted::New(old.id)]);

    let both = ledger.seen_with(&["b", "a"]);
    let (mut after, mut all) = (Uuid::nil(), Rotated::default());
    while let Some((last, page)) = both.rotate_page(after, 3).await.unwrap() {
        assert!(page.jobs <= 3);
        after = last;
        all.jobs += page.jobs;
        all.dead_letters += page.dead_letters;
        all.callbacks += page.callbacks;
    }
    assert_eq!(all, Rotated { jobs: 8, dead_letters: 1, callbacks: 1 });
    ledger.assert_nothing_shows().await;
    assert!(both.keys_in_use().await.unwrap().iter().all(|used| used.key_id.as_deref() == Some("b")));

    let new = ledger.rekeyed(&["b"]);
    for id in ids[1..].iter().chain([&old.id]) {
        assert_eq!(new.take("w", *id).await.payload, json!({ "card": SECRET }));
    }
    let replayed = new.postgres.replay(ids[0].0, &Replay::default()).await.unwrap();
    let Resolved::Done(Some(replay)) = replayed else { panic!("{replayed:?}") };
    assert_eq!(new.take("w", replay).await.payload, json!({ "card": SECRET }));
    new.postgres.seal_batch(batch.id, None).await.unwrap();
    assert!(new.postgres.fold_batch(batch.id).await.unwrap().called.is_some());
}

#[tokio::test]
async fn a_key_is_in_use_as_long_as_anything_needs_it() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let ids = ledger.accept(&[secret(), secret()]).await;
    assert_eq!(
        ledger.postgres.signal(ids[0], None, "go", &json!({ "card": SECRET })).await.unwrap(),
        Signalled::Sent
    );
    let taken = ledger.take("w", ids[1]).await;
    assert!(ledger.postgres.complete(&run_of(&taken, None), &json!({ "card": SECRET }), &[]).await.unwrap());
    let batch = NewBatch {
        id: BatchId::new(),
        tenant: secret().tenant,
        name: "a".to_owned(),
        parent: None,
        callback: Some(Callback { on: CallbackOn::Complete, job: secret() }),
    };
    ledger.postgres.create_batch(&batch, &[], false, true).await.unwrap();
    let used = ledger.postgres.keys_in_use().await.unwrap();
    let of_a = used.iter().find(|used| used.key_id.as_deref() == Some("a")).expect("the key");
    assert_eq!(
        (of_a.unfinished, of_a.ended, of_a.results, of_a.dead_letters, of_a.callbacks, of_a.signals),
        (1, 1, 1, 0, 1, 1)
    );
    // A callback whose batch somebody holds, as the collector does, is waited for.
    let mut held = ledger.postgres.pool().acquire().await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT FROM batches FOR NO KEY UPDATE").execute(&mut *held).await.unwrap();
    let both = ledger.seen_with(&["b", "a"]);
    let mut rotate = pin!(both.rotate_page(Uuid::nil(), 10));
    until_someone_waits(&ledger, &mut rotate).await;
    sqlx::raw_sql("COMMIT").execute(&mut *held).await.unwrap();
    let (_, page) = rotate.await.unwrap().unwrap();
    assert_eq!(page, Rotated { jobs: 1, dead_letters: 0, callbacks: 1 });
}

#[tokio::test]
async fn protocol_19_keys_know_the_same_request_before_and_after_encryption_and_rotation() {
    let ledger = Ledger::start().await;
    let keyed = |card: &str| NewJob {
        idempotency: Some(Idempotency {
            key: "k".to_owned(),
            scope: "test".to_owned(),
            ttl: Duration::from_secs(60),
            until: Until::Accepted,
        }),
        ..job("secret", json!({ "card": card }))
    };
    let first = keyed(SECRET);
    assert_eq!(
        ledger.postgres.accept(std::slice::from_ref(&first), true).await.unwrap(),
        [Accepted::New(first.id)]
    );
    for ids in [&["a"][..], &["b", "a"]] {
        let postgres = ledger.seen_with(ids);
        assert_eq!(postgres.accept(&[keyed(SECRET)], true).await.unwrap(), [Accepted::Duplicate(first.id)]);
        assert_eq!(postgres.accept(&[keyed("other")], true).await.unwrap(), [Accepted::Conflict(first.id)]);
    }
    // What was stored under a key tells nobody without it.
    let ledger = ledger.rekeyed(&["a"]);
    let mut second = keyed(SECRET);
    second.idempotency.as_mut().unwrap().key = "other".to_owned();
    ledger.accept(std::slice::from_ref(&second)).await;
    let prints: Vec<Vec<u8>> = sqlx::query_scalar("SELECT fingerprint FROM idempotency_keys ORDER BY key")
        .fetch_all(ledger.postgres.pool())
        .await
        .unwrap();
    assert_ne!(prints[0], prints[1], "equal requests look equal");
    let again = NewJob { id: queue::JobId::new(), ..second.clone() };
    let replies = ledger.seen_with(&["b", "a"]).accept(&[again], true).await.unwrap();
    assert_eq!(replies, [Accepted::Duplicate(second.id)]);
}

#[tokio::test]
async fn what_sql_enqueues_is_plain_until_the_relay_takes_it() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let id: Uuid = sqlx::query_scalar("SELECT enqueue('secret', jsonb_build_object('card', $1), 'acme')")
        .bind(SECRET)
        .fetch_one(ledger.postgres.pool())
        .await
        .unwrap();
    let relayed = ledger.postgres.undispatched(10, &[], &[]).await.unwrap();
    relayed.done(&[queue::JobId(id)]).await.unwrap();
    ledger.assert_nothing_shows().await;
    assert_eq!(ledger.take("w", queue::JobId(id)).await.payload, json!({ "card": SECRET }));
}

#[tokio::test]
async fn a_fast_jobs_record_is_sealed_and_admitted_as_it_is() {
    let ledger = Ledger::with_keys(&["a"]).await;
    let record = serde_json::to_string(&ledger.postgres.seal_job(&secret()).unwrap()).unwrap();
    assert!(!record.contains(SECRET), "{record}");
    let carried: NewJob = serde_json::from_str(&record).unwrap();
    let id = carried.id;
    ledger.postgres.admit_fast(vec![carried]).await.unwrap();
    ledger.assert_nothing_shows().await;
    assert_eq!(ledger.take("w", id).await.payload, json!({ "card": SECRET }));
}

#[tokio::test]
async fn without_keys_payloads_are_plain_as_ever() {
    let ledger = Ledger::start().await;
    let id = ledger.accept(&[secret()]).await[0];
    let stored: (Value, Option<String>) =
        sqlx::query_as("SELECT payload, payload_key_id FROM jobs WHERE id = $1")
            .bind(id.0)
            .fetch_one(ledger.postgres.pool())
            .await
            .unwrap();
    assert_eq!(stored, (json!({ "card": SECRET }), None));
    assert_eq!(ledger.take("w", id).await.payload, json!({ "card": SECRET }));
}
