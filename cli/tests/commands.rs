//! The commands over real private services, with a worker process.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use devstack::testing::TestServices;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// How long anything may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

struct Cli {
    services: TestServices,
}

impl Cli {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flotilla"));
        command
            .args(arguments)
            .env_clear()
            .envs(self.services.env())
            .envs([("FLOTILLA_EMBEDDER", "hash"), ("USER", "tester"), ("FLOTILLA_HEARTBEAT_MS", "500")])
            .envs([("FLOTILLA_LEASE_MS", "4000"), ("FLOTILLA_UNROUTABLE_AFTER_MS", "100")])
            // A command that meets a pause of this busy machine must not fail for it.
            .envs([("FLOTILLA_REDIS_CONNECT_MS", "10000"), ("FLOTILLA_REDIS_RESPONSE_MS", "10000")])
            .stdin(Stdio::null())
            .current_dir(self.services.dir());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The output of a command that ends with `code`.
    fn text(&self, code: i32, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\nstdout: {out}\nstderr: {err}");
        (out, err)
    }

    fn json(&self, code: i32, arguments: &[&str]) -> Value {
        let (out, err) = self.text(code, &[arguments, &["--json"]].concat());
        serde_json::from_str(&out)
            .unwrap_or_else(|e| panic!("{arguments:?}: {e}\nstdout: {out}\nstderr: {err}"))
    }
}

/// A worker process that is killed with its handle, should a test fail before it ends.
struct Worker(Child);

impl Worker {
    fn start(cli: &Cli) -> Self {
        Self::start_with(cli, &[])
    }

    fn start_with(cli: &Cli, environment: &[(&str, &str)]) -> Self {
        let log = fs::File::create(cli.services.dir().join("worker.log")).unwrap();
        let child = cli
            .command(&["worker", "--queues", "ingest,embed,delete", "--concurrency", "4"])
            .env("FLOTILLA_WORKER_ADDR", "127.0.0.1:0")
            .env("FLOTILLA_FAULTS_DIR", cli.services.dir())
            .envs(environment.iter().copied())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + WITHIN;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the worker still runs");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|status| status.is_none()) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_day_with_the_command_line() {
    let cli = Cli { services: TestServices::start().await.unwrap() };

    // Nothing starts on a schema that is not there.
    for server in ["worker", "producer"] {
        let (_, err) = cli.text(2, &[server]);
        assert!(err.contains("flotilla migrate up"), "{server}: {err}");
    }
    let (_, err) = cli.text(2, &["jobs", "list"]);
    assert!(err.contains("hint: ") && err.contains("flotilla migrate up"), "{err}");
    cli.text(1, &["migrate", "status"]);
    cli.text(0, &["migrate", "up"]);
    let applied = cli.json(0, &["migrate", "status"]);
    assert!(applied.as_array().unwrap().iter().all(|one| one["applied"] == true), "{applied}");
    cli.text(0, &["migrate", "down"]);
    cli.text(1, &["migrate", "status"]);
    cli.text(0, &["migrate", "down", "--to", "0"]);
    cli.text(0, &["migrate", "up"]);

    // Tenants and keys.
    let (_, err) = cli
        .text(1, &["enqueue", "ingest", "--tenant", "acme", "--payload", r#"{"document":"a","text":"b"}"#]);
    assert!(err.contains("flotilla tenants create acme"), "{err}");
    assert_eq!(cli.json(0, &["tenants", "create", "acme"])["created"], true);
    assert_eq!(cli.json(0, &["tenants", "create", "acme"])["created"], false);
    let key = cli.json(0, &["keys", "create", "acme", "--name", "test"]);
    assert!(key["key"].as_str().unwrap().starts_with("flk_"), "{key}");
    let listed = cli.json(0, &["keys", "list", "--tenant", "acme"]);
    assert_eq!(
        (&listed[0]["id"], &listed[0]["name"], listed[0].get("key")),
        (&key["id"], &"test".into(), None)
    );
    cli.text(0, &["keys", "revoke", key["id"].as_str().unwrap()]);
    assert!(cli.text(0, &["keys", "list", "--tenant", "acme"]).0.contains("no keys"));
    assert!(cli.json(0, &["keys", "list", "--revoked"])[0]["revoked_at"].is_string());
    cli.text(1, &["keys", "revoke", key["id"].as_str().unwrap()]);

    // A scheduled job waits, is seen, and is cancelled.
    let later = cli.json(
        0,
        &[
            "enqueue",
            "ingest",
            "--tenant",
            "acme",
            "--run-at",
            "+3600",
            "--payload",
            r#"{"document":"later","text":"x"}"#,
        ],
    );
    let later = later["id"].as_str().unwrap();
    assert_eq!(cli.json(0, &["jobs", "show", later])["state"], "waiting");
    assert_eq!(cli.json(0, &["stats"])["queues"]["ingest"]["scheduled"], 1);
    let rates = cli.json(0, &["queues", "rates"]);
    let ingest = rates.as_array().unwrap().iter().find(|one| one["queue"] == "ingest").unwrap();
    assert!(ingest["minute"]["ended"].is_u64() && ingest["days"].as_array().unwrap().len() == 7, "{rates}");
    let (table, _) = cli.text(0, &["queues", "rates", "ingest", "unheard-of"]);
    assert!(table.contains("ENDED/S") && table.contains("unheard-of"), "{table}");
    assert_eq!(cli.json(0, &["jobs", "cancel", later])["cancel"], "cancelled");
    assert_eq!(cli.json(1, &["jobs", "cancel", later])["cancel"], "ended");
    cli.text(1, &["jobs", "show", "00000000-0000-7000-8000-000000000000"]);

    // A folder with good and bad files, while a worker runs.
    let mut worker = Worker::start(&cli);
    let docs = cli.services.dir().join("docs");
    for number in 0..20 {
        write(
            &docs,
            &format!("guide/{number:02}.md"),
            format!("How to mend pipe number {number}.").as_bytes(),
        );
    }
    write(&docs, "latin1.txt", &[&b"M\xfcller"[..], &[b'x'; 6000]].concat());
    write(&docs, "blank.txt", b" \n");
    write(&docs, "picture.png", b"\x89PNG");
    let docs = docs.to_str().unwrap();
    let import = ["import", docs, "--tenant", "acme", "--prefix", "docs/", "--once", "--wait=60"];
    let first = cli.json(1, &import);
    assert_eq!((&first["accepted"], &first["skipped"]), (&22.into(), &1.into()), "{first}");
    assert_eq!((&first["ended"]["succeeded"], &first["ended"]["dead"]), (&20.into(), &2.into()), "{first}");
    let again = cli.json(1, &import);
    assert_eq!((&again["accepted"], &again["duplicates"]), (&0.into(), &22.into()), "{again}");

    // Dead letters say why, and are replayed and discarded once.
    let letters = cli.json(0, &["dlq", "list", "--tenant", "acme"]);
    let letter = |class: &str| {
        let found = letters.as_array().unwrap().iter().find(|letter| letter["class"] == class);
        found.unwrap_or_else(|| panic!("no {class} in {letters}")).clone()
    };
    let not_utf8 = letter("not_utf8");
    assert_eq!((&not_utf8["document"], &not_utf8["payload"]), (&"docs/latin1.txt".into(), &Value::Null));
    let id = not_utf8["id"].as_str().unwrap();
    // The payload is shown only on request, and what is named secret not even then.
    let (shown, _) = cli.text(0, &["dlq", "show", id]);
    assert!(shown.contains("docs/latin1.txt") && shown.contains("dlq replay"), "{shown}");
    assert!(shown.contains("hidden; --payload shows it") && shown.contains("attempts"), "{shown}");
    let shown = cli.json(0, &["dlq", "show", id, "--payload"]);
    assert_eq!(shown["payload"]["document"], "docs/latin1.txt", "{shown}");
    let (whole, _) = cli.text(0, &["dlq", "show", id, "--payload"]);
    assert!(whole.contains(shown["payload"]["text_base64"].as_str().unwrap()), "{whole}");
    assert!(
        shown["attempts"][0]["worker"].is_string() && shown["attempts"][0]["ended_at"].is_string(),
        "{shown}"
    );
    let redacted = cli
        .command(&["dlq", "show", id, "--payload", "--json"])
        .env("FLOTILLA_REDACT", "Document")
        .output()
        .unwrap();
    let redacted: Value = serde_json::from_slice(&redacted.stdout).unwrap();
    assert_eq!(redacted["payload"]["document"], "[redacted]", "{redacted}");

    // By filter: a dry run changes nothing; an export has a line for each.
    let dry = cli.json(0, &["dlq", "replay", "--all", "--dry-run", "--text", "UTF-8"]);
    assert_eq!(
        (&dry["letters"], &dry["by_kind_and_class"][0]["class"]),
        (&1.into(), &"not_utf8".into()),
        "{dry}"
    );
    assert_eq!(cli.json(0, &["dlq", "discard", "--all", "--dry-run", "--reason", "x"])["letters"], 2);
    let (lines, _) = cli.text(0, &["dlq", "export", "--state", "open", "--since", "1h"]);
    let exported: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(exported.len(), 2, "{lines}");
    assert!(
        exported.iter().all(|letter| letter["payload"].is_null() && letter["runs"].is_array()),
        "{lines}"
    );
    assert_eq!(cli.json(0, &["dlq", "list", "--until", "1h"]), Value::Array(vec![]));
    let mended = r#"{"document":"docs/latin1.txt","text":"Müller mends pipes"}"#;
    // A mended request could be enqueued, and is about the same document: nobody means to overwrite another one.
    let other = r#"{"document":"docs/other.txt","text":"Müller mends pipes"}"#;
    assert!(cli.text(1, &["dlq", "replay", id, "--payload", other]).1.contains("docs/latin1.txt"));
    assert!(cli.text(1, &["dlq", "replay", id, "--payload", r#"{"text":"x"}"#]).1.contains("document"));
    let hidden = r#"{"document":"docs/latin1.txt","text":"x","metadata":{"token":"[redacted]"}}"#;
    assert!(cli.text(1, &["dlq", "replay", id, "--payload", hidden]).1.contains("FLOTILLA_REDACT=none"));
    cli.text(2, &["dlq", "discard", id, "--tenant", "other", "--reason", "x"]);
    let dead = cli.json(0, &["jobs", "show", not_utf8["job_id"].as_str().unwrap()]);
    assert_eq!(
        (&dead["dead_letter"]["state"], &dead["dead_letter"]["payload"]),
        (&"open".into(), &Value::Null)
    );
    let replayed = cli.json(0, &["dlq", "replay", id, "--payload", mended]);
    let job = replayed[0]["job"].as_str().unwrap().to_owned();
    cli.text(1, &["dlq", "replay", id]);
    let blank = letter("empty_document")["id"].as_str().unwrap().to_owned();
    cli.text(0, &["dlq", "discard", &blank, "--reason", "nothing in it"]);
    cli.text(1, &["dlq", "discard", &blank, "--reason", "nothing in it"]);
    assert_eq!(cli.json(0, &["dlq", "list"]), Value::Array(vec![]));
    let deadline = Instant::now() + WITHIN;
    while cli.json(0, &["jobs", "show", &job])["state"] != "succeeded" {
        assert!(Instant::now() < deadline, "{}", cli.text(0, &["jobs", "show", &job]).0);
    }

    // What was done is found, read, and drawn.
    let (drawn, _) = cli.text(0, &["sagas", "show", &job]);
    for word in ["queued", "stage", "vectors", "cache", "succeeded", "in all"] {
        assert!(drawn.contains(word), "{word} is missing:\n{drawn}");
    }
    let hits = cli.json(0, &["search", "How to mend pipe number 7.", "--tenant", "acme", "-k", "3"]);
    assert_eq!(hits[0]["document"], "docs/guide/07.md", "{hits}");
    assert_eq!(hits.as_array().unwrap().len(), 3);
    let (text, _) = cli.text(0, &["documents", "get", "docs/latin1.txt", "--tenant", "acme"]);
    assert_eq!(text, "Müller mends pipes\n");
    cli.text(1, &["documents", "get", "docs/latin1.txt"]);
    let succeeded = cli.json(0, &["jobs", "list", "--state", "succeeded", "--limit", "100"]);
    assert_eq!(succeeded.as_array().unwrap().len(), 21);

    // A job that dies, waited for: exit code 1. The key of the first one is known to nobody else.
    let key = cli.json(0, &["encryption", "new-key"])["key"].as_str().unwrap().to_owned();
    let sealed = cli
        .command(&["enqueue", "ingest", "--tenant", "acme", "--wait=60", "--json"])
        .args(["--payload", r#"{"document":"sealed","text":"x"}"#])
        .env("FLOTILLA_ENCRYPTION_KEYS", format!("lost:{key}"))
        .output()
        .unwrap();
    let sealed: Value = serde_json::from_slice(&sealed.stdout).unwrap();
    assert_eq!(sealed["job"]["state"], "dead", "{sealed}");
    let unknown = cli.json(
        1,
        &["enqueue", "translate", "--queue", "ingest", "--tenant", "acme", "--payload", "{}", "--wait=60"],
    );
    assert_eq!(unknown["job"]["state"], "dead", "{unknown}");
    // An export leaves out what it can't open, says so, and goes on.
    let (lines, err) = cli.text(1, &["dlq", "export", "--state", "open", "--payload"]);
    let exported: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let payloads: Vec<_> = exported.iter().map(|letter| (&letter["class"], &letter["payload"])).collect();
    assert_eq!(
        payloads,
        [(&json!("unreadable_payload"), &Value::Null), (&json!("unknown_kind"), &json!({}))],
        "{lines}"
    );
    assert!(err.contains(exported[0]["id"].as_str().unwrap()) && err.contains("lost"), "{err}");
    let done = cli.json(
        0,
        &[
            "enqueue",
            "delete",
            "--tenant",
            "acme",
            "--payload",
            r#"{"document":"docs/guide/07.md"}"#,
            "--wait=60",
        ],
    );
    assert_eq!(done["job"]["state"], "succeeded", "{done}");
    cli.text(1, &["documents", "get", "docs/guide/07.md", "--tenant", "acme"]);

    // Other services hear of it: once no transaction is under way that could come before.
    let deadline = Instant::now() + WITHIN;
    let heard = loop {
        let heard = cli.json(0, &["events", "list", "--tenant", "acme"]);
        if heard["events"].as_array().unwrap().len() == 22 {
            break heard;
        }
        assert!(Instant::now() < deadline, "{heard}");
    };
    let last = &heard["events"][21];
    assert_eq!((&last["event"], &last["document"]), (&"document.deleted".into(), &"docs/guide/07.md".into()));
    let cursor = heard["events"][19]["cursor"].as_str().unwrap();
    let rest = cli.json(0, &["events", "list", "--after", cursor, "--limit", "1"]);
    assert_eq!((&rest["events"][0], &rest["next"]), (&heard["events"][20], &heard["events"][20]["cursor"]));
    assert!(cli.text(0, &["events", "list"]).0.contains("document.published"));
    assert_eq!(cli.json(0, &["events", "list", "--after", "now"])["events"], json!([]));
    cli.text(2, &["events", "list", "--after", "yesterday"]);
    let mut tail = cli
        .command(&["events", "tail", "--after", "0-0", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(tail.stdout.take().unwrap()).lines().take(22);
    let tailed: Vec<Value> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!(&Value::Array(tailed), &heard["events"]);
    kill(Pid::from_raw(tail.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(tail.wait().unwrap().code(), Some(0));
    let breakers = cli.json(0, &["breakers"]);
    assert_eq!(breakers.as_array().unwrap().len(), 4, "{breakers}");
    assert!(breakers.as_array().unwrap().iter().all(|one| one["state"] == "closed"), "{breakers}");
    assert!(cli.text(0, &["breakers"]).0.contains("embedder"));

    let audit = cli.json(0, &["audit"]);
    assert_eq!(audit["by_kind"], json!({}), "{audit}");

    // A reader that goes away is no failure, and SIGTERM drains.
    let mut child = cli
        .command(&["jobs", "list", "--limit", "1000", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
    worker.signal(Signal::SIGTERM);
    assert_eq!(
        worker.exit_code(),
        Some(0),
        "{}",
        fs::read_to_string(cli.services.dir().join("worker.log")).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_may_evict_is_refused_and_one_of_another_ledger() {
    let cli = Cli { services: TestServices::start().await.unwrap() };
    cli.text(0, &["migrate", "up"]);
    // The cache evicts.
    let environment = cli.services.env();
    let url_of = |name: &str| environment.iter().find(|(one, _)| *one == name).unwrap().1.clone();
    let (_, err) = cli.text(2, &["worker", "--redis-queue-url", &url_of("REDIS_CACHE_URL")]);
    assert!(err.contains("noeviction"), "{err}");

    // A second ledger beside the first one, by mistake with the same Redis and prefix.
    let url = url_of("DATABASE_URL");
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    sqlx::query("CREATE DATABASE other").execute(&pool).await.unwrap();
    let other = format!("{}/other", url.rsplit_once('/').unwrap().0);
    let others = |arguments: &[&str]| cli.run(&[arguments, &["--database-url", &other]].concat());
    assert!(others(&["migrate", "up"]).status.success());
    let (_, err) = cli.text(0, &["audit"]);
    assert!(err.contains("no stamp of this ledger under the prefix \"flotilla\""), "{err}");
    // The first ledger's worker stamps the prefix once it has seen that no data was lost.
    let _worker = Worker::start(&cli);
    let enqueue = ["enqueue", "ingest", "--payload", r#"{"document":"a","text":"b"}"#];
    let deadline = Instant::now() + WITHIN;
    let refused = loop {
        let output = others(&enqueue);
        if !output.status.success() {
            break output;
        }
        assert!(Instant::now() < deadline, "the prefix is never stamped");
    };
    let (_, err) = cli.text(0, &["audit"]);
    assert_eq!(err, "");
    let asked: [&[&str]; 3] =
        [&["worker", "--addr", "127.0.0.1:0"], &["audit", "--repair"], &["dlq", "replay", "--all"]];
    for output in std::iter::once(refused).chain(asked.map(others)) {
        assert_eq!(output.status.code(), Some(2));
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(err.contains("belongs to ledger"), "{err}");
    }
}

#[cfg(feature = "faults")]
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_worker_that_drains() {
    let cli = Cli { services: TestServices::start().await.unwrap() };
    cli.text(0, &["migrate", "up"]);
    let log = cli.services.dir().join("worker.log");
    let said = |what: &str| fs::read_to_string(&log).unwrap_or_default().contains(what);
    for (first, second, code) in
        [(Signal::SIGTERM, Signal::SIGINT, 130), (Signal::SIGINT, Signal::SIGTERM, 143)]
    {
        let mut worker = Worker::start_with(&cli, &[("FLOTILLA_FAULTS", "ingest.vectors.before=hang*9")]);
        let payload = format!(r#"{{"document":"slow-{code}","text":"x"}}"#);
        let id = cli.json(0, &["enqueue", "ingest", "--payload", &payload])["id"].clone();
        let id = id.as_str().unwrap();
        let deadline = Instant::now() + WITHIN;
        while cli.json(0, &["jobs", "show", id])["state"] != "running" {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(&log).unwrap());
        }
        worker.signal(first);
        while !said("draining; a second signal") {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(&log).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(worker.0.try_wait().unwrap(), None, "the first signal drains");
        worker.signal(second);
        assert_eq!(worker.exit_code(), Some(code));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_only_redis_has_are_chosen_too_and_without_redis_their_absence_is_told() {
    let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
    let cli = Cli { services };
    cli.text(0, &["migrate", "up"]);
    let fast = || {
        let job = cli.json(0, &["enqueue", "report", "--payload", "{}", "--durability", "fast"]);
        job["id"].as_str().unwrap().to_owned()
    };
    let first = fast();
    fast();
    // The record of one is sealed with a key that is exchanged before a worker comes.
    let keys: Vec<String> =
        (0..2).map(|_| cli.json(0, &["encryption", "new-key"])["key"].as_str().unwrap().to_owned()).collect();
    let with_keys = |keys: &str, arguments: &[&str]| {
        let output = cli.command(arguments).env("FLOTILLA_ENCRYPTION_KEYS", keys).output().unwrap();
        let text = format!("{output:?}");
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).expect(&text))
    };
    let (old, both) = (format!("old:{}", keys[0]), format!("new:{},old:{}", keys[1], keys[0]));
    let sealed = ["enqueue", "report", "--payload", "{}", "--durability", "fast", "--json"];
    assert_eq!(with_keys(&old, &sealed).0, Some(0));
    let in_use = |keys: &str| {
        let (code, status) = with_keys(keys, &["encryption", "status", "--json"]);
        let mut counts: Vec<(Value, Value, Value)> = status["in_use"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| (one["key_id"].clone(), one["unfinished"].clone(), one["only_in_redis"].clone()))
            .collect();
        counts.sort_by_key(|one| one.0.to_string());
        (code, json!(counts))
    };
    assert_eq!(in_use(&both), (Some(0), json!([["old", 0, 1], [null, 0, 2]])));
    let new = format!("new:{}", keys[1]);
    assert_eq!(in_use(&new).0, Some(1), "the old key is in use");
    let (code, rotated) = with_keys(&both, &["encryption", "rotate", "--json"]);
    // The plain ones were sealed as they came in.
    assert_eq!((code, &rotated["rotated"]["jobs"], &rotated["complete"]), (Some(0), &json!(1), &json!(true)));
    assert_eq!(in_use(&new), (Some(0), json!([["new", 3, 0]])));
    fast();
    let gone = cli.json(0, &["jobs", "cancel", "--queue", "report"]);
    assert_eq!(gone["cancelled"], 4, "{gone}");
    assert_eq!(cli.json(0, &["jobs", "show", &first])["state"], "cancelled");

    let last = fast();
    cli.services.redis_queue().kill9().await.unwrap();
    for (code, command) in [
        (2, &["jobs", "show", &last][..]),
        (2, &["jobs", "cancel", &last]),
        (2, &["sagas", "signal", &last, "go"]),
        (1, &["jobs", "snooze", &last, "--for", "1h"]),
        (1, &["jobs", "cancel", &last, &first]),
    ] {
        let (_, err) = cli.text(code, command);
        assert!(err.contains("The queue's Redis, which may have it"), "{command:?}: {err}");
    }
    let (out, err) = cli.text(1, &["jobs", "cancel", "--queue", "report"]);
    assert_eq!(out, "no such jobs\n");
    assert!(err.contains("that no worker has claimed may be left out"), "{err}");
    let (out, err) = cli.text(1, &["stats", "--json"]);
    let stats: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&stats["queues"], &stats["jobs"]["cancelled"]), (&Value::Null, &json!(4)), "{stats}");
    assert!(err.contains("how deep the queues are can't be told"), "{err}");
    // Who watches sees it in the table's place.
    let (table, _) = cli.text(1, &["stats"]);
    assert!(
        table.contains("how deep the queues are can't be told") && table.contains("UNDISPATCHED"),
        "{table}"
    );
    cli.text(1, &["encryption", "status"]);
    assert_eq!(with_keys(&both, &["encryption", "rotate", "--json"]).0, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn schedules_and_waiting_jobs_are_changed_from_the_command_line() {
    let services = TestServices::builder().postgres().redis_queue().start().await.unwrap();
    let cli = Cli { services };
    cli.text(0, &["migrate", "up"]);
    let spec = [
        "--kind",
        "report",
        "--payload",
        r#"{"of":"day"}"#,
        "--cron",
        "30 2 * * *",
        "--time-zone",
        "Europe/Berlin",
    ];
    let made = cli.json(0, &[&["schedules", "create", "nightly", "--catch-up", "all"][..], &spec].concat());
    assert_eq!((&made["catch_up"], &made["tenant"]), (&"all".into(), &"default".into()));
    let (_, err) = cli.text(1, &[&["schedules", "create", "nightly"][..], &spec].concat());
    assert!(err.contains("there is a schedule \"nightly\" already"), "{err}");
    let wrong = [&["schedules", "create", "odd"][..], &spec[..5], &["61 * * * *"]].concat();
    assert!(cli.text(1, &wrong).1.contains("cron is \"61 * * * *\""));
    assert_eq!(cli.json(0, &["schedules", "next", "nightly", "-n", "3"]).as_array().unwrap().len(), 3);
    assert!(cli.text(0, &["schedules", "next", "nightly"]).0.contains("T02:30:00+0"));
    assert!(cli.text(0, &["schedules", "list"]).0.contains("Europe/Berlin"));
    assert!(cli.json(0, &["schedules", "pause", "nightly"])["paused_at"].is_string());
    assert!(cli.text(0, &["schedules", "show", "nightly"]).0.contains("paused"));
    assert!(cli.json(0, &["schedules", "resume", "nightly"])["paused_at"].is_null());
    let update =
        ["schedules", "update", "nightly", "--kind", "report", "--payload", "{}", "--cron", "@hourly"];
    assert_eq!(cli.json(0, &update)["cron"], "@hourly");
    // Two tenants' schedules of one name: no page leaves one out.
    cli.text(0, &["tenants", "create", "acme"]);
    cli.text(0, &[&["schedules", "create", "nightly", "--tenant", "acme"][..], &spec].concat());
    let mut pages = vec![];
    let mut arguments = vec!["schedules", "list", "--limit", "1"];
    for after in ["acme/nightly", "default/nightly"] {
        let page = cli.json(0, &arguments);
        pages.push(format!("{}/{}", page[0]["tenant"].as_str().unwrap(), page[0]["name"].as_str().unwrap()));
        arguments = vec!["schedules", "list", "--limit", "1", "--after", after];
    }
    assert_eq!(pages, ["acme/nightly", "default/nightly"]);
    assert_eq!(cli.json(0, &arguments), json!([]));
    cli.text(2, &["schedules", "list", "--after", "nightly"]);
    cli.text(0, &["schedules", "delete", "nightly"]);
    cli.text(1, &["schedules", "show", "nightly"]);

    let enqueue = |document: &str| {
        let payload = format!(r#"{{"document":"{document}","text":"x"}}"#);
        cli.json(0, &["enqueue", "ingest", "--payload", &payload])["id"].as_str().unwrap().to_owned()
    };
    let (first, second) = (enqueue("a"), enqueue("b"));
    let up = cli.json(0, &["jobs", "reprioritise", &first, "--priority", "9"]);
    assert_eq!(up[0]["change"], "done", "{up}");
    assert_eq!(cli.json(0, &["jobs", "show", &first])["priority"], 9);
    cli.json(0, &["jobs", "snooze", &second, "--for", "2h"]);
    let stats = cli.json(0, &["stats"]);
    assert_eq!(stats["queues"]["ingest"]["scheduled"], 1, "{stats}");
    cli.json(1, &["jobs", "reprioritise", "00000000-0000-7000-8000-000000000000", "--priority", "1"]);
    let listed = cli.json(0, &["jobs", "list", "--queue", "ingest"]);
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    assert_eq!(cli.json(0, &["jobs", "list", "--queue", "embed"]), json!([]));
    let all = cli.json(0, &["jobs", "reprioritise", "--queue", "ingest", "--priority", "2", "--limit", "1"]);
    assert_eq!((all.as_array().unwrap().len(), &all[0]["job"]), (1, &first.as_str().into()));
    let filter = ["jobs", "reprioritise", "--queue", "ingest", "--priority", "2", "--limit", "1", "--after"];
    let rest = cli.json(0, &[&filter[..], &[&first]].concat());
    assert_eq!((rest.as_array().unwrap().len(), &rest[0]["job"]), (1, &second.as_str().into()));
    // Neither ids nor a filter; both.
    cli.text(2, &["jobs", "cancel"]);
    cli.text(2, &["jobs", "cancel", &first, "--queue", "ingest"]);
    let gone = cli.json(0, &["jobs", "cancel", "--tenant", "default"]);
    assert_eq!(gone["cancelled"], 2, "{gone}");
    assert_eq!(cli.text(0, &["jobs", "cancel", "--tenant", "default"]).0, "no such jobs\n");
    assert_eq!(cli.json(1, &["jobs", "cancel", &first, &second])["ended"], 2);

    let held =
        ["enqueue", "report", "--payload", "{}", "--idempotency-key", "k", "--idempotency-until", "finished"];
    let one = cli.json(0, &held);
    let two = cli.json(0, &held);
    assert_eq!((&two["duplicate"], &two["job"]["state"]), (&true.into(), &"waiting".into()));
    assert_eq!(one["id"], two["id"]);
}
