//! Where settings come from: flag before environment before the development stack's file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{path::Path, process::Command};

/// Runs `jobs list` in `dir` and returns what it said on stderr: no server is at any of the addresses.
fn said(dir: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_flotilla"))
        .args(["jobs", "list"])
        .args(arguments)
        .current_dir(dir)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn flags_go_before_the_environment_and_that_before_the_stacks_file() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = said(dir.path(), &[], &[]);
    assert!(nothing.contains("DATABASE_URL is not set"), "{nothing}");
    assert!(nothing.contains("flotilla dev up"), "{nothing}");

    for (folder, database) in [(".flotilla", "from_file"), ("other", "from_other")] {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
        let line = format!("export DATABASE_URL='postgres://u:pw@127.0.0.1:1/{database}'\n");
        std::fs::write(dir.path().join(folder).join("env"), line).unwrap();
    }
    let environment = [("DATABASE_URL", "postgres://u:pw@127.0.0.1:1/from_environment")];
    let flag = ["--database-url", "postgres://u:pw@127.0.0.1:1/from_flag"];
    for (environment, arguments, expected) in [
        (&[][..], &[][..], "from_file"),
        (&[], &["--dir", "other"], "from_other"),
        (&environment, &[], "from_environment"),
        (&environment, &flag, "from_flag"),
        (&[("DATABASE_URL", ""), ("FLOTILLA_PREFIX", "")], &[], "from_file"),
    ] {
        let text = said(dir.path(), environment, arguments);
        assert!(
            text.contains(&format!("DATABASE_URL postgres://u:***@127.0.0.1:1/{expected} ")),
            "{expected}: {text}"
        );
        assert!(!text.contains("u:pw"), "a password was shown: {text}");
        assert_eq!(
            text.contains("flotilla dev status"),
            expected == "from_file" || expected == "from_other",
            "{text}"
        );
    }
    let text = said(dir.path(), &[("FLOTILLA_LOG", "flotilla=debug")], &[]);
    assert!(text.contains("settings from the development stack"), "{text}");
}

#[test]
fn a_bad_setting_is_named_with_its_value_and_what_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let url = ("DATABASE_URL", "postgres://127.0.0.1:1/x");
    let text = said(dir.path(), &[url, ("FLOTILLA_CALL_TIMEOUT_MS", "soon")], &[]);
    assert!(text.contains(r#"FLOTILLA_CALL_TIMEOUT_MS is "soon": a whole number is allowed"#), "{text}");
    let text = said(dir.path(), &[url, ("FLOTILLA_LOG_FORMAT", "xml")], &[]);
    assert!(text.contains(r#"FLOTILLA_LOG_FORMAT is "xml": allowed are text and json"#), "{text}");
}

#[test]
fn an_empty_variable_counts_as_not_set_for_every_flag() {
    let dir = tempfile::tempdir().unwrap();
    // As a compose file with `${FLOTILLA_WORKER_ADDR:-}` gives them.
    let output = Command::new(env!("CARGO_BIN_EXE_flotilla"))
        .arg("worker")
        .current_dir(dir.path())
        .env_clear()
        .envs(["FLOTILLA_WORKER_ADDR", "FLOTILLA_QUEUES", "FLOTILLA_CONCURRENCY"].map(|name| (name, "")))
        .envs(["FLOTILLA_DRAIN_GRACE_MS", "DATABASE_URL"].map(|name| (name, "")))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("DATABASE_URL is not set"), "{text}");
}
