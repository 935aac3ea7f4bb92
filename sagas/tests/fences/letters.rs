//! Dead letters by the hundred: read in pages, replayed and closed by filter, each once whoever asks.

use std::time::Duration;

use sagas::stores::postgres::{
    dead_letters::{DeadLetterFilter, Replay, Resolved},
    ending::{Failure, Verdict},
    retention::Place,
};
use uuid::Uuid;

use crate::ledger::{HOUR, Ledger, TENANT, failure, job, run_of};

impl Ledger {
    /// Jobs that died, the first half of them with the class `odd`; their ids, oldest first.
    async fn letters(&self, count: usize) -> Vec<Uuid> {
        let jobs: Vec<_> = (0..count).map(|n| job("report", serde_json::json!({ "n": n }))).collect();
        let ids = self.accept(&jobs).await;
        for (n, id) in ids.iter().enumerate() {
            let taken = self.take("w", *id).await;
            let (code, error) =
                if n < count / 2 { ("odd", "the harbour is CLOSED") } else { ("test", "a test's") };
            let failure = Failure { code: code.to_owned(), error: error.to_owned(), ..failure() };
            assert!(
                self.postgres.finish(&run_of(&taken, None), &Verdict::Dead { failure }, &[]).await.unwrap()
            );
        }
        ids.iter().map(|id| id.0).collect()
    }

    /// One operator's replay of all that the filter lets through, page by page; how many were theirs.
    async fn replay_all(&self, actor: &str, filter: &DeadLetterFilter) -> usize {
        let (mut filter, mut replayed) = (filter.clone(), 0);
        let how = Replay { actor: actor.to_owned(), ..Replay::default() };
        loop {
            let page = self.postgres.letter_places(&filter).await.unwrap();
            let Some(last) = page.last() else { return replayed };
            filter.from = Some(*last);
            for (_, id) in page {
                match self.postgres.replay(id, &how).await.unwrap() {
                    Resolved::Done(job) => {
                        assert!(job.is_some());
                        replayed += 1;
                    }
                    Resolved::Already(state) => assert_eq!(state, "replayed"),
                    other => panic!("{id}: {other:?}"),
                }
            }
        }
    }
}

fn open(limit: i64) -> DeadLetterFilter {
    DeadLetterFilter { state: Some("open".to_owned()), limit, ..DeadLetterFilter::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_operators_who_replay_the_same_300_letters_each_letter_is_replayed_once() {
    let ledger = Ledger::start().await;
    let dead = ledger.letters(300).await;
    let filter = open(50);
    let (one, two, three) = tokio::join!(
        ledger.replay_all("one", &filter),
        ledger.replay_all("two", &filter),
        ledger.replay_all("three", &filter)
    );
    assert_eq!(one + two + three, 300, "{one} + {two} + {three}");
    assert!(
        [one, two, three].iter().filter(|part| **part > 0).count() > 1,
        "they did not meet: {one} {two} {three}"
    );
    // One new job for each, which names its original; and the letter names it.
    assert_eq!(ledger.count("SELECT count(*) FROM jobs WHERE replay_of IS NOT NULL").await, 300);
    assert_eq!(ledger.count("SELECT count(DISTINCT replay_of) FROM jobs").await, dead.len() as i64);
    let linked =
        "SELECT count(*) FROM dead_letters l JOIN jobs j ON j.id = l.replay_job AND j.replay_of = l.job_id
                  WHERE l.state = 'replayed'";
    assert_eq!(ledger.count(linked).await, 300);
    assert_eq!(ledger.count("SELECT count(*) FROM audit_log WHERE action = 'dlq.replay'").await, 300);
}

#[tokio::test]
async fn filters_let_through_what_they_say_in_pages_without_gaps() {
    let ledger = Ledger::start().await;
    let dead = ledger.letters(10).await;
    let mut seen = vec![];
    let mut filter = open(3);
    loop {
        let page = ledger.postgres.letter_stories(&filter).await.unwrap();
        let Some(last) = page.last() else { break };
        filter.from = Some((last.letter.created_at, last.letter.id));
        for story in page {
            assert!(story.letter.payload.is_null());
            assert_eq!(story.attempts.as_array().unwrap().len(), 1, "{}", story.attempts);
            assert_eq!(story.attempts[0]["worker"], "w");
            seen.push(story.letter.job_id);
        }
    }
    assert_eq!(seen, dead, "oldest first");
    // The listing goes the other way.
    let newest = ledger.postgres.dead_letters(&open(4)).await.unwrap();
    let from = newest.last().map(|letter| (letter.created_at, letter.id));
    let rest = ledger.postgres.dead_letters(&DeadLetterFilter { from, ..open(100) }).await.unwrap();
    let listed: Vec<Uuid> = newest.iter().chain(&rest).map(|letter| letter.job_id).rev().collect();
    assert_eq!(listed, dead);

    let middle = newest[3].created_at;
    let counts = [
        (DeadLetterFilter { class: Some("odd".to_owned()), ..open(1) }, 5),
        (DeadLetterFilter { text: Some("harbour is closed".to_owned()), ..open(1) }, 5),
        (DeadLetterFilter { text: Some("100%".to_owned()), ..open(1) }, 0),
        (DeadLetterFilter { since: Some(middle), ..open(1) }, 4),
        (DeadLetterFilter { until: Some(middle), ..open(1) }, 6),
        (DeadLetterFilter { kind: Some("ingest".to_owned()), ..open(1) }, 0),
        (DeadLetterFilter { tenant: Some(TENANT.to_owned()), ..open(1) }, 10),
        (DeadLetterFilter { tenant: Some("other".to_owned()), ..open(1) }, 0),
    ];
    for (filter, expected) in counts {
        let (totals, _) = ledger.postgres.letter_totals(&filter).await.unwrap();
        assert_eq!(totals.iter().map(|total| total.2).sum::<i64>(), expected, "{filter:?}");
        let mut all = filter.clone();
        all.limit = 100;
        assert_eq!(ledger.postgres.letter_places(&all).await.unwrap().len() as i64, expected, "{filter:?}");
    }
}

#[tokio::test]
async fn letters_are_closed_by_filter_in_pages_and_by_retention() {
    let ledger = Ledger::start().await;
    let dead = ledger.letters(10).await;
    let odd = DeadLetterFilter { class: Some("odd".to_owned()), ..open(3) };
    let mut pages = vec![];
    loop {
        let closed = ledger.postgres.discard_page(&odd, "a test", "withdrawn").await.unwrap();
        pages.push(closed);
        if closed == 0 {
            break;
        }
    }
    assert_eq!(pages, [3, 2, 0]);
    let letter = ledger.postgres.dead_letter(dead[0]).await.unwrap().unwrap();
    assert_eq!((letter.state.as_str(), letter.note.as_deref()), ("discarded", Some("withdrawn")));
    assert_eq!(ledger.count("SELECT count(*) FROM audit_log WHERE action = 'dlq.discard'").await, 5);

    // Retention closes what nobody dealt with in time, and says so; then the jobs go with their letters.
    assert_eq!(ledger.postgres.expire_letters(HOUR, 100).await.unwrap(), 0);
    let older = "UPDATE dead_letters SET created_at = now() - interval '2 hours' WHERE id = ANY($1)";
    let two: Vec<Uuid> = ledger.postgres.dead_letters(&open(2)).await.unwrap().iter().map(|l| l.id).collect();
    sqlx::query(older).bind(&two).execute(ledger.postgres.pool()).await.unwrap();
    assert_eq!(ledger.postgres.expire_letters(HOUR, 1).await.unwrap(), 1, "no more than asked for");
    assert_eq!(ledger.postgres.expire_letters(HOUR, 100).await.unwrap(), 1);
    let gone = ledger.postgres.dead_letter(two[0]).await.unwrap().unwrap();
    assert_eq!((gone.state.as_str(), gone.resolved_by.as_deref()), ("discarded", Some("janitor")));
    assert_eq!(ledger.postgres.expire_jobs(Duration::ZERO, 100, &mut Place::default()).await.unwrap(), 7);
    assert_eq!(ledger.count("SELECT count(*) FROM dead_letters").await, 3);
    assert_eq!(ledger.count("SELECT count(*) FROM jobs").await, 3);
}

#[tokio::test]
async fn a_replay_as_another_kind_waits_where_that_kind_is_served() {
    let ledger = Ledger::start().await;
    let dead = ledger.letters(1).await[0];
    let payload = Some(serde_json::json!({ "document": "a" }));
    let how = Replay { kind: Some("embed_document".to_owned()), payload, ..Replay::default() };
    let Resolved::Done(Some(again)) = ledger.postgres.replay(dead, &how).await.unwrap() else {
        panic!("not replayed")
    };
    assert_eq!(ledger.postgres.job(again, None).await.unwrap().unwrap().queue, "embed");
}
