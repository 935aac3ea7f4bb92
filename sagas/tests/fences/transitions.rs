//! What the database lets become of jobs and runs is what the code says may become of them.

use sagas::{JobState, RunState};

use crate::ledger::Ledger;

/// Puts the one row of a table into a state, past its triggers, and tells whether it may become the other.
async fn allowed(ledger: &Ledger, table: &str, from: &str, to: &str) -> bool {
    let (rest, ended) = match table {
        "jobs" => ("worker = 'w'", "'succeeded', 'cancelled', 'dead', 'parked'"),
        _ => ("verdict = '{}'", "'completed', 'compensated'"),
    };
    let set = |state: &str| {
        format!(
            "UPDATE {table} SET state = '{state}', {rest},
                    finished_at = CASE WHEN '{state}' IN ({ended}) THEN now() END"
        )
    };
    let sql =
        async |sql: String| sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(ledger.postgres.pool()).await;
    sql(format!("ALTER TABLE {table} DISABLE TRIGGER USER")).await.unwrap();
    sql(set(from)).await.unwrap();
    sql(format!("ALTER TABLE {table} ENABLE TRIGGER USER")).await.unwrap();
    match sql(set(to)).await {
        Ok(done) => {
            assert_eq!(done.rows_affected(), 1);
            true
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(&format!("is {from} and can not become {to}")), "{text}");
            false
        }
    }
}

#[tokio::test]
async fn the_database_lets_a_job_and_a_run_become_what_the_code_says_they_may() {
    let ledger = Ledger::start().await;
    let job = ledger.take("w", ledger.ingest("a").await).await;
    ledger.staged(&job).await;
    for (from, to) in pairs(JobState::ALL) {
        let may = from == to || from.may_become(to);
        assert_eq!(allowed(&ledger, "jobs", from.as_str(), to.as_str()).await, may, "job: {from} to {to}");
    }
    for (from, to) in pairs(RunState::ALL) {
        let may = from == to || from.may_become(to);
        assert_eq!(allowed(&ledger, "sagas", from.as_str(), to.as_str()).await, may, "run: {from} to {to}");
    }
}

fn pairs<S: Copy>(all: &[S]) -> impl Iterator<Item = (S, S)> {
    all.iter().flat_map(|from| all.iter().map(|to| (*from, *to)))
}
