//! A test program that runs one of its own tests again, with a rule of the product taken out: a test that then passes shows nothing.

use std::process::Stdio;

use tokio::process::Command;

/// Runs one test of this program with a variable set; whether it passed, and what it said.
pub async fn passes(test: &str, variable: (&str, &str)) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).stdin(Stdio::null()).kill_on_drop(true);
    command.env(variable.0, variable.1);
    let output = command.output().await.unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("running 1 test"), "no such test: {test}\n{said}");
    (output.status.success(), said)
}

/// Fails unless this test, which passes with the rule, is failed by its own assertions without it.
#[allow(dead_code)] // not by every program
pub async fn misses(test: &str, rule: &str) {
    assert!(sagas::fault::RULES.contains(&rule), "no rule can be taken out as {rule}");
    let (passed, said) = passes(test, ("FLOTILLA_WITHOUT", rule)).await;
    assert!(!passed && said.contains("panicked"), "{test} does not miss {rule}:\n{said}");
}
