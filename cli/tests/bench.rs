//! A benchmark that is told to end takes its servers and their data with it.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Processes whose command line names `dir`.
fn processes_of(dir: &str) -> Vec<String> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.unwrap().path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(dir))
        .collect()
}

#[test]
fn a_benchmark_that_is_told_to_end_takes_its_servers_with_it() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut bench = Command::new(env!("CARGO_BIN_EXE_flotilla"))
            .args(["bench", "enqueue"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(bench.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("private servers in ") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "it ended before it started its servers");
        }
        let dir = line.trim().rsplit(' ').next().unwrap();
        kill(Pid::from_raw(i32::try_from(bench.id()).unwrap()), signal).unwrap();
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        assert_eq!(bench.wait().unwrap().code(), Some(2), "{rest}");
        assert!(rest.contains("interrupted"), "{rest}");
        assert!(!Path::new(dir).exists(), "{dir} is left");
        assert_eq!(processes_of(dir), Vec::<String>::new());
    }
}

#[test]
fn the_program_that_measures_is_told_to_end_and_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (own, program) = (dir.path().join("flotilla"), dir.path().join("flotilla-bench"));
    std::fs::copy(env!("CARGO_BIN_EXE_flotilla"), &own).unwrap();
    let script = "#!/bin/sh\ntrap 'echo it removes its servers >&2; exit 1' TERM\necho it measures >&2\nwhile :; do sleep 0.1; done\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut bench = Command::new(&own)
        .args(["bench", "saga", "--rate", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("it measures") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended before it measured");
    }
    kill(Pid::from_raw(i32::try_from(bench.id()).unwrap()), Signal::SIGTERM).unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(bench.wait().unwrap().code(), Some(2), "{rest}");
    assert!(rest.contains("it removes its servers") && rest.contains("interrupted"), "{rest}");
}
