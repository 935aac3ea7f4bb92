//! `flotilla queues` and `flotilla tenants`: what is set is shown, and what can't hold is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Stdio};

use devstack::testing::TestServices;
use serde_json::{Value, json};

struct Cli(TestServices);

impl Cli {
    fn text(&self, code: i32, arguments: &str) -> (String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_flotilla"))
            .args(arguments.split_whitespace())
            .env_clear()
            .env("DATABASE_URL", self.0.postgres().url())
            .env("USER", "tester")
            .stdin(Stdio::null())
            .current_dir(self.0.dir())
            .output()
            .unwrap();
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(code), "{arguments}\nstdout: {out}\nstderr: {err}");
        (out, err)
    }

    fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.text(0, &format!("{arguments} --json")).0).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_for_queues_and_tenants_is_shown() {
    let cli = Cli(TestServices::builder().postgres().start().await.unwrap());
    cli.text(0, "migrate up");

    assert!(cli.text(0, "queues list").0.contains("nothing is held back"));
    assert_eq!(cli.json("queues show embed")["policy"]["paused"], false);
    assert_eq!(cli.json("queues pause embed")["policy"]["paused"], true);
    assert_eq!(cli.json("queues drain embed")["policy"]["draining"], true);
    let resumed = cli.json("queues resume embed");
    assert_eq!(
        (&resumed["policy"]["paused"], &resumed["policy"]["draining"]),
        (&json!(false), &json!(false))
    );
    let limited = cli.json("queues limit embed --max-concurrency 4 --rate 0.5 --max-waiting 100");
    assert_eq!(limited["policy"]["rate"], json!({ "per_second": 0.5, "burst": 1 }));
    let limited = cli.json("queues limit embed --burst 7 --max-waiting none");
    assert_eq!(limited["policy"]["rate"], json!({ "per_second": 0.5, "burst": 7 }));
    assert_eq!(
        (&limited["policy"]["max_concurrency"], &limited["policy"]["max_depth"]),
        (&json!(4), &Value::Null)
    );
    let weighted = cli.json("queues mode embed weighted --weights 1,1,1,1,1,2,2,2,2,9");
    assert_eq!(weighted["policy"]["mode"]["weighted"][9], 9);
    assert_eq!(cli.json("queues list").as_array().unwrap().len(), 1);
    let (table, _) = cli.text(0, "queues list");
    assert!(table.contains("embed") && table.contains("0.5, 7 at once"), "{table}");
    assert_eq!(cli.json("queues mode embed strict")["policy"]["mode"], "strict");
    for (code, wrong) in [
        (1, "queues limit embed"),
        (1, "queues mode embed weighted --weights 1,2"),
        (1, "queues mode embed strict --weights 1,1,1,1,1,1,1,1,1,1"),
        (2, "queues limit embed --max-concurrency 0"),
        (2, "queues limit embed --rate nan"),
        (2, "queues mode embed weighted --weights 0,1,1,1,1,1,1,1,1,1"),
    ] {
        cli.text(code, wrong);
    }

    let (_, err) = cli.text(1, "tenants set acme --weight 3");
    assert!(err.contains("flotilla tenants create acme"), "{err}");
    cli.text(0, "tenants create acme");
    cli.text(0, "tenants set acme --weight 3 --max-concurrency 2");
    // What a queue gets of its own starts as a copy.
    let own = cli.json("tenants set acme --queue embed --max-concurrency 5");
    assert_eq!((&own[0]["policy"]["weight"], &own[0]["policy"]["max_concurrency"]), (&json!(3), &json!(5)));
    let paused = cli.json("tenants pause acme");
    assert_eq!(paused.as_array().unwrap().len(), 2, "everywhere: {paused}");
    assert!(paused.as_array().unwrap().iter().all(|row| row["policy"]["paused"] == true), "{paused}");
    let resumed = cli.json("tenants resume acme --queue embed");
    assert_eq!(resumed[0]["policy"]["paused"], false);
    assert_eq!(cli.json("tenants list")[0]["policy"]["paused"], true, "in every other queue");
    let left = cli.json("tenants reset acme --queue embed");
    assert_eq!((left.as_array().unwrap().len(), &left[0]["queue"]), (1, &Value::Null));
    cli.text(0, "tenants reset acme");
    assert!(cli.text(0, "tenants list").0.contains("nothing is held back"));
    cli.text(2, "tenants set acme --weight 0");
    cli.text(1, "tenants set acme");
}
