//! `flotilla bench chaos`, short: a fleet under random faults keeps what it promises, and a promise that is broken on purpose is
//! noticed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Output};

use serde_json::Value;

fn chaos(arguments: &[&str]) -> (Output, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_flotilla"))
        .args(["bench", "chaos", "--json"])
        .args(arguments)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (output, report)
}

fn result(report: &Value, name: &str) -> u64 {
    let of = report["results"].as_array().unwrap().iter().find(|count| count["name"] == name);
    of.and_then(|count| count["value"].as_u64()).unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[test]
fn a_fleet_under_random_faults_ends_every_accepted_job_as_it_should() {
    let (output, report) = chaos(&["--minutes", "0.3", "--seed", "4"]);
    println!("{report}");
    assert_eq!(report["verdict"], "pass", "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0));
    for name in ["lost", "duplicate_effects", "half_visible", "violations"] {
        assert_eq!(result(&report, name), 0, "{report}");
    }
    let accepted = result(&report, "accepted");
    assert_eq!(result(&report, "ended"), accepted);
    for name in ["accepted", "succeeded", "dead", "published", "looks", "faults"] {
        assert!(result(&report, name) > 0, "{name} in {report}");
    }
}

#[test]
fn what_is_wrong_in_the_end_is_found_and_is_exit_code_1() {
    let (output, report) =
        chaos(&["--minutes", "0.1", "--seed", "5", "--plant", "lost,duplicate,half,drift"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report["verdict"], "violations");
    assert_eq!(result(&report, "lost"), 1, "{report}");
    assert_eq!(result(&report, "ended"), result(&report, "accepted") - 1, "{report}");
    assert!(result(&report, "duplicate_effects") >= 1, "{report}");
    assert!(result(&report, "half_visible") >= 1, "{report}");
    let found = report["found"].to_string();
    assert!(found.contains("auditor: point_missing"), "{report}");
    let sum =
        ["lost", "duplicate_effects", "half_visible"].map(|name| result(&report, name)).iter().sum::<u64>();
    assert!(result(&report, "violations") > sum, "{report}");
}
