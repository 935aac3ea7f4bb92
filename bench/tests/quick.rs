//! `flotilla-bench queue|saga --quick`: everything runs, every job is counted, and the report has its shape.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Output, Stdio},
};

use devstack::ProcessId;
use nix::sys::signal::Signal;
use serde_json::Value;

fn flotilla_bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flotilla-bench")).args(arguments).output().unwrap()
}

/// Runs a benchmark, which fails when a job was done twice, or not at all, or is left behind. The names of its figures.
fn figures(bench: &str, arguments: &[&str]) -> Vec<String> {
    let output = flotilla_bench(&[&[bench, "--json", "--quick"], arguments].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object on stdout");
    assert_eq!(report["bench"], bench);
    let results = report["results"].as_array().unwrap();
    for one in results {
        for field in ["value", "reference_value", "ratio", "p50", "p99"] {
            assert!(one[field].as_f64().is_some_and(f64::is_finite), "{field} of {one}");
        }
        // A machine that is all ours has nothing stolen.
        let none_is_fine = one["name"] == "three-step.latency.stolen";
        assert!(one["value"].as_f64().unwrap() > 0.0 || none_is_fine, "{one}");
        assert!(!one["unit"].as_str().unwrap().is_empty() && !one["reference"].as_str().unwrap().is_empty());
    }
    results.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_quick_run_counts_every_job_and_reports_every_workload() {
    let names = figures("queue", &[]);
    for wanted in [
        "enqueue.single.fast.vs-peer",
        "enqueue.batched.fast.vs-peer",
        "enqueue.batched.fast.vs-floor",
        "drain.fast.1-workers.vs-peer",
        "drain.fast.1-workers.vs-floor",
        "drain.fast.1-workers.vs-floor-plain",
        "drain.fast.1-workers.worker-rss",
        "drain.fast.2-workers.vs-peer",
        "drain.fast.2-workers.vs-floor",
        "drain-deep.fast.1-workers",
        "drain-deep.fast.2-workers",
        "pickup.fast.p50",
        "pickup.fast.p99",
        "memory.flat",
        "memory.deep",
        "drain.ledger.1-workers",
        "drain.ledger.2-workers",
        "pickup.ledger.p50",
    ] {
        assert!(names.iter().any(|name| name == wanted), "{wanted} is missing in {names:?}");
    }
}

#[test]
fn sagas_end_right_in_a_quick_run_also_with_errors() {
    let names = figures("saga", &["--workers", "2"]);
    for wanted in [
        "three-step",
        "three-step.store",
        "three-step.wal",
        "three-step.postgres-cpu",
        "three-step.latency.p99",
        "three-step.latency.stolen",
        "three-step.compensation.p90",
        "three-step.errors",
    ] {
        assert!(names.iter().any(|name| name == wanted), "{wanted} is missing in {names:?}");
    }
}

#[test]
fn what_it_is_asked_for_wrongly_is_refused_with_what_is_allowed() {
    let output = flotilla_bench(&["queue", "--only", "everything"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("enqueue") && said.contains("pickup"), "{said}");
}

#[test]
fn a_run_that_is_told_to_end_takes_its_servers_with_it() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_flotilla-bench"))
        .args(["saga", "--quick"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap());
    let mut line = String::new();
    // The servers of the first part have done their work, those of the next are about to start.
    while !line.starts_with("store: ") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended before it measured");
    }
    let own = ProcessId::of(bench.id()).unwrap();
    let others = own.descendants();
    own.signal(Signal::SIGTERM).unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert!(!bench.wait().unwrap().success());
    assert!(rest.contains("interrupted by SIGTERM"), "{rest}");
    assert!(!others.iter().any(ProcessId::is_alive), "of {others:?} some are left");
}
