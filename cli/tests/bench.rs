//! A benchmark that is told to end takes its servers and their data with it.
#![allow(clippy::unwrap_used)]

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
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

/// A benchmark under way.
struct Bench {
    process: Child,
    said: BufReader<ChildStderr>,
}

impl Bench {
    fn start(program: impl AsRef<OsStr>, arguments: &[&str]) -> Self {
        let mut process = Command::new(program)
            .arg("bench")
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stderr.take().unwrap());
        Self { process, said }
    }

    /// Waits until it says this; the whole line.
    fn until(&mut self, text: &str) -> String {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended before it said {text}");
        }
        line
    }

    /// Tells it to end, which it does as one that was interrupted; what it says meanwhile.
    fn end(mut self, signal: Signal) -> String {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        assert_eq!(self.process.wait().unwrap().code(), Some(2), "{rest}");
        assert!(rest.contains("interrupted"), "{rest}");
        rest
    }
}

#[test]
fn a_benchmark_that_is_told_to_end_takes_its_servers_with_it() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut bench = Bench::start(env!("CARGO_BIN_EXE_flotilla"), &["enqueue"]);
        let line = bench.until("private servers in ");
        let dir = line.trim().rsplit(' ').next().unwrap();
        bench.end(signal);
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
    let mut bench = Bench::start(&own, &["saga", "--rate", "1"]);
    bench.until("it measures");
    let rest = bench.end(Signal::SIGTERM);
    assert!(rest.contains("it removes its servers"), "{rest}");
}
