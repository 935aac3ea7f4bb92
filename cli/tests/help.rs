//! Every command explains itself, and keeps the names that scripts use.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Each command with flags that documentation and scripts rely on.
const COMMANDS: &[(&str, &[&str])] = &[
    ("", &["--json", "--database-url", "--redis-queue-url", "--redis-cache-url", "--qdrant-url", "--dir"]),
    ("dev", &[]),
    ("dev up", &[]),
    ("dev status", &[]),
    ("dev down", &[]),
    ("dev logs", &["--follow"]),
    ("migrate", &[]),
    ("migrate up", &[]),
    ("migrate down", &["--to"]),
    ("migrate status", &[]),
    ("producer", &["--addr", "--auth", "--drain-grace"]),
    ("worker", &["--queues", "--concurrency", "--addr", "--drain-grace"]),
    ("tenants create", &[]),
    ("tenants show", &[]),
    ("tenants class", &[]),
    ("keys create", &["--name"]),
    ("keys list", &["--tenant", "--revoked", "--limit"]),
    ("keys revoke", &[]),
    (
        "enqueue",
        &[
            "--payload",
            "--tenant",
            "--priority",
            "--queue",
            "--run-at",
            "--idempotency-key",
            "--idempotency-until",
            "--idempotency-ttl",
            "--max-attempts",
            "--timeout",
            "--wait",
            "--durability",
        ],
    ),
    (
        "import",
        &["--tenant", "--priority", "--glob", "--ext", "--limit", "--batch", "--wait", "--prefix", "--once"],
    ),
    ("jobs list", &["--state", "--queue", "--kind", "--tenant", "--limit", "--before"]),
    ("jobs show", &[]),
    ("jobs cancel", &["--queue", "--tenant", "--kind", "--limit", "--after"]),
    ("jobs reprioritise", &["--priority", "--queue", "--tenant", "--kind", "--limit", "--after"]),
    ("jobs snooze", &["--for", "--until", "--queue", "--tenant", "--kind", "--limit", "--after"]),
    ("schedules list", &["--tenant", "--after", "--limit"]),
    ("schedules show", &["--tenant"]),
    (
        "schedules create",
        &["--cron", "--time-zone", "--catch-up", "--max-catch-up", "--kind", "--payload", "--queue"],
    ),
    ("schedules update", &["--cron", "--time-zone", "--catch-up", "--max-catch-up", "--kind", "--payload"]),
    ("schedules pause", &["--tenant"]),
    ("schedules resume", &["--tenant"]),
    ("schedules delete", &["--tenant"]),
    ("schedules next", &["--count"]),
    ("batches list", &["--tenant", "--unfinished", "--limit", "--before"]),
    ("batches show", &[]),
    ("batches cancel", &[]),
    (
        "dlq list",
        &["--tenant", "--kind", "--class", "--since", "--until", "--text", "--state", "--limit", "--before"],
    ),
    ("dlq show", &["--payload"]),
    (
        "dlq replay",
        &["--payload", "--as-kind", "--as-latest", "--all", "--text", "--rate", "--limit", "--dry-run"],
    ),
    ("dlq discard", &["--reason", "--all", "--text", "--dry-run"]),
    (
        "dlq export",
        &["--state", "--payload", "--tenant", "--kind", "--class", "--since", "--until", "--text"],
    ),
    ("breakers", &[]),
    ("queues list", &[]),
    ("queues show", &[]),
    ("queues rates", &[]),
    ("queues pause", &[]),
    ("queues resume", &[]),
    ("queues drain", &[]),
    ("queues limit", &["--max-concurrency", "--rate", "--burst", "--max-waiting"]),
    ("queues mode", &["--weights"]),
    ("tenants list", &[]),
    ("tenants set", &["--queue", "--weight", "--max-concurrency", "--rate", "--burst", "--max-waiting"]),
    ("tenants reset", &["--queue"]),
    ("tenants pause", &["--queue"]),
    ("tenants resume", &["--queue"]),
    ("sagas list", &["--state", "--tenant", "--kind", "--since", "--until", "--before", "--limit"]),
    ("sagas signal", &[]),
    ("sagas show", &[]),
    ("sagas retry", &[]),
    ("sagas resolve", &["--reason"]),
    ("search", &["-k", "--tenant", "--model", "--collection"]),
    ("documents get", &["--tenant"]),
    ("events list", &["--after", "--limit", "--tenant"]),
    ("events tail", &["--after", "--tenant"]),
    ("encryption new-key", &[]),
    ("encryption status", &[]),
    ("encryption rotate", &["--page"]),
    ("stats", &["--watch", "--queues"]),
    ("audit", &["--repair", "--wait", "--last"]),
    ("bench audit", &["--points", "--dimensions"]),
    ("bench chaos", &["--minutes", "--seed"]),
    ("bench embed", &["--texts", "--embedder"]),
    ("bench enqueue", &["--jobs"]),
    ("bench ingest", &["--documents", "--embedder", "--workers"]),
    ("bench queue", &["--quick", "--only", "--rounds"]),
    ("bench saga", &["--quick", "--jobs", "--rounds", "--workers"]),
];

fn flotilla(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flotilla")).args(arguments).env_clear().output().unwrap()
}

#[test]
fn every_command_explains_itself_and_its_flags() {
    for (command, flags) in COMMANDS {
        let arguments: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let output = flotilla(&arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(
            text.contains(&format!("Usage: flotilla {command}").trim_end().to_owned()),
            "{command}:\n{text}"
        );
        // The first line says what the command is for.
        assert!(text.lines().next().is_some_and(|line| line.len() > 10), "{command}:\n{text}");
        for flag in flags.iter().chain(&["--json"]) {
            assert!(text.contains(flag), "{command} has no {flag}:\n{text}");
        }
    }
}

#[test]
fn help_shows_no_value_of_a_url_that_is_set() {
    let output = Command::new(env!("CARGO_BIN_EXE_flotilla"))
        .arg("--help")
        .env("DATABASE_URL", "postgres://u:hidden-word@h/d")
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&output.stdout).contains("hidden-word"));
}

#[test]
fn wrong_usage_is_exit_code_2_on_stderr() {
    for arguments in [
        &["nonsense"][..],
        &["jobs", "show", "no-uuid"],
        &["jobs", "list", "--state", "happy"],
        &["enqueue", "ingest", "--priority", "10", "--payload", "{}"],
        &["worker", "--concurrency", "0"],
        &["dlq", "replay"],
    ] {
        let output = flotilla(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("error"), "{arguments:?}");
    }
}

/// The files below a folder, but for what is built or downloaded.
fn below(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_file() {
            files.push(entry.path());
        } else if !name.starts_with('.') && !["target", "models"].contains(&name.as_str()) {
            below(&entry.path(), files);
        }
    }
}

#[test]
fn documents_name_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = vec![];
    below(root, &mut files);
    let tests: BTreeSet<&str> = files
        .iter()
        .filter(|path| path.extension().is_some_and(|ending| ending == "rs"))
        .filter_map(|path| {
            let (folder, name) = (path.parent()?, path.file_stem()?.to_str()?);
            match name {
                "main" if folder.parent()?.ends_with("tests") => folder.file_name()?.to_str(),
                name => folder.ends_with("tests").then_some(name),
            }
        })
        .collect();
    let mut named = 0;
    for path in files.iter().filter(|path| path.extension().is_some_and(|ending| ending == "md")) {
        let text = std::fs::read_to_string(path).unwrap();
        for name in text.split("binary(").skip(1).filter_map(|rest| rest.split(')').next()) {
            named += 1;
            assert!(tests.contains(name), "{}: there is no test program {name}", path.display());
        }
    }
    assert!(named > 5, "found {named} only");
}
