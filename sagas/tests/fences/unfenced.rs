//! The test of the tests of rule 2: the fence's predicate is taken out of each statement in turn, and a named test must fail then.
//!
//! The statements are found in the sources: a new one without an entry here fails this test.

use std::{collections::BTreeMap, path::Path};

use futures::{StreamExt, stream};

use crate::itself::{misses, passes};

/// File and function of each fenced write, and the test that fails without its fence.
const TESTS: &[(&str, &str)] = &[
    (
        "compensation.rs turn_all",
        "stale_writes::protocol_02_begin_compensation_with_a_stale_fence_writes_nothing",
    ),
    ("deletion.rs bury", "stale_writes::protocol_02_bury_with_a_stale_fence_writes_nothing"),
    ("deletion.rs erase_text", "stale_writes::protocol_02_erase_text_with_a_stale_fence_writes_nothing"),
    ("ending.rs complete_all", "stale_writes::protocol_02_complete_with_a_stale_fence_writes_nothing"),
    ("ending.rs finish_all", "stale_writes::protocol_02_finish_with_a_stale_fence_writes_nothing"),
    ("ending.rs log_runs", "stale_writes::protocol_02_log_run_with_a_stale_fence_writes_nothing"),
    ("ending.rs park", "stale_writes::protocol_02_park_with_a_stale_fence_writes_nothing"),
    ("ending.rs release", "stale_writes::protocol_02_release_with_a_stale_fence_writes_nothing"),
    (
        "fenced.rs fenced",
        "stale_writes::protocol_02_07_the_fenced_handle_of_user_steps_opens_only_under_the_newest_fence",
    ),
    ("forward.rs begin_pivots", "stale_writes::protocol_02_begin_pivot_with_a_stale_fence_writes_nothing"),
    ("forward.rs keep_all", "stale_writes::protocol_02_keep_with_a_stale_fence_writes_nothing"),
    ("progress.rs record_progress", "progress::protocol_02_a_zombies_progress_is_refused_by_the_fence"),
    ("publish.rs flush", "stale_writes::protocol_02_publish_with_a_stale_fence_writes_nothing"),
    ("sealing.rs note_error", "steps::protocol_02_a_zombie_says_nothing_about_a_job_that_another_runs"),
    ("stage.rs abandon_all", "stale_writes::protocol_02_abandon_version_with_a_stale_fence_writes_nothing"),
    ("stage.rs begin_sagas", "stale_writes::protocol_02_begin_saga_with_a_stale_fence_writes_nothing"),
    ("stage.rs flush", "stale_writes::protocol_02_stage_with_a_stale_fence_writes_nothing"),
    ("take.rs mark_alone", "stale_writes::protocol_02_mark_alone_with_a_stale_fence_writes_nothing"),
    (
        "waits.rs await_cancelled_children",
        "stale_writes::protocol_02_await_cancelled_children_with_a_stale_fence_writes_nothing",
    ),
    ("waits.rs await_children", "stale_writes::protocol_02_await_children_with_a_stale_fence_writes_nothing"),
    ("waits.rs await_signal", "stale_writes::protocol_02_await_signal_with_a_stale_fence_writes_nothing"),
    ("waits.rs await_timer", "stale_writes::protocol_02_await_timer_with_a_stale_fence_writes_nothing"),
    ("waits.rs suspend", "stale_writes::protocol_02_suspend_with_a_stale_fence_writes_nothing"),
];
/// Rules of the pivot beside the fence, and the test that fails without each. The decision to compensate has its own in
/// `tests/flow.rs`.
const RULES: &[(&str, &str)] = &[
    ("publish.order", "document_order::protocol_08_a_lower_order_never_replaces_a_higher_one"),
    ("publish.replaces", "document_order::protocol_08_a_re_embedding_replaces_only_the_version_it_copied"),
    ("publish.cancel", "document_order::protocol_14_a_cancel_before_the_pivot_holds_it_back"),
    ("bury.order", "document_order::protocol_09_a_delete_older_than_what_is_shown_is_superseded"),
];
/// Tests that run side by side, each with a Postgres of its own.
const AT_ONCE: usize = 3;

/// Each fenced write of the sources: file and function, and the line that `FLOTILLA_UNFENCED` names.
fn writes() -> BTreeMap<String, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/stores/postgres");
    let mut writes = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let (mut function, mut fences, mut predicates) = (String::new(), 0, 0);
        for (no, line) in text.lines().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            if let Some((_, rest)) = code.split_once("fn ") {
                rest.split(['(', '<']).next().unwrap().clone_into(&mut function);
            }
            // The statement's own predicate stands in the text once more, as what can be taken out.
            predicates +=
                usize::from(code.contains("fence = held.fence") || code.contains("fence = said.fence"))
                    + usize::from(code.contains("AND fence = $2"));
            let fenced = code.contains("fenced_sql!(");
            fences += usize::from(fenced);
            if (fenced && function != "lock_alive")
                || (code.contains("lock_alive(") && !code.contains("fn lock_alive"))
            {
                let known = writes.insert(format!("{file} {function}"), format!("{file}:{}", no + 1));
                assert_eq!(known, None, "{file} {function} has two fences: name them apart");
            }
        }
        assert!(
            predicates <= fences * 2,
            "{file}: a statement has a fence that can't be taken out: write it with fenced_sql!"
        );
    }
    writes
}

#[tokio::test]
async fn each_write_without_its_fence_fails_its_named_test() {
    let writes = writes();
    let known: Vec<&str> = TESTS.iter().map(|(write, _)| *write).collect();
    let found: Vec<&str> = writes.keys().map(String::as_str).collect();
    assert_eq!(found, known, "left: fenced writes of the sources; right: those that have a test here");
    let unnoticed: Vec<String> = stream::iter(TESTS)
        .map(async |(write, test)| {
            let site = &writes[*write];
            let (passed, said) = passes(test, ("FLOTILLA_UNFENCED", site)).await;
            // It must be the fence that is missed, and not, say, the server.
            let noticed = !passed && said.contains("panicked");
            println!(
                "{write} ({site}) without its fence: {test} {}",
                if noticed { "fails" } else { "PASSES" }
            );
            (!noticed).then(|| format!("{write} ({site}): {test}\n{said}"))
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(async |unnoticed| unnoticed)
        .collect()
        .await;
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
    println!("{} fences taken out, each is missed by a test", TESTS.len());
}

#[tokio::test]
async fn each_rule_of_the_pivot_taken_out_fails_its_named_test() {
    let known = RULES.iter().map(|(rule, _)| *rule).chain(["engine.turn"]);
    assert_eq!(sagas::fault::RULES.to_vec(), known.collect::<Vec<_>>());
    stream::iter(RULES).for_each_concurrent(AT_ONCE, |(rule, test)| misses(test, rule)).await;
}
