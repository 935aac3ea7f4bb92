#!/usr/bin/env python3
"""Flotilla's main job on this machine, from nothing: `make demo`.

Builds, starts private services, a producer and three workers, imports a real corpus, kills one worker half-way, shows dead
letters and replays one, searches, audits, and stops everything it started. Its figures come from the ledger (SQL) and from the
audit after the run; they are written to target/demo.json.

CORPUS=DIR       your own folder of text files (default: the documentation of the crates Flotilla is built from)
EMBEDDER=hash    feature hashing in place of the local model: no meaning, much faster
FLOTILLA_BIN=FILE a binary that is built already
DOCUMENTS=N      at most so many of the default corpus (default 2400; at least 2000 for the real thing)
"""
import json, os, signal, socket, subprocess, sys, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.path.abspath(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")))
BIN = os.environ.get("FLOTILLA_BIN") or os.path.join(TARGET, "release", "flotilla")
STACK = os.path.join(ROOT, ".flotilla", "demo")
WORK = os.path.join(TARGET, "demo")
TENANT = "demo"
WORKERS = 3
COLUMNS = "succeeded", "dead", "waiting", "running", "cancelled", "parked"

phases, started = {}, {}
stack_up = False


def say(text):
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


class phase:
    """Times what is inside it."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, *_):
        phases[self.name] = round(time.monotonic() - self.start, 2)


def fail(text):
    raise SystemExit(f"demo: {text}")


def run(*args, check=True, **kwargs):
    return subprocess.run(args, check=check, cwd=ROOT, **kwargs)


def flotilla(*args, check=True, show=True):
    """Runs the CLI; its data goes to our stdout, or comes back with show=False."""
    if show:
        print(f"$ flotilla {' '.join(args)}", flush=True)
        return run(BIN, *args, check=check)
    return run(BIN, *args, check=check, stdout=subprocess.PIPE, text=True)


def answer(*args, check=True):
    """The JSON that a CLI command prints."""
    return json.loads(flotilla(*args, "--json", check=check, show=False).stdout)


def sql(text):
    done = run("psql", os.environ["DATABASE_URL"], "-XAtqF", "\t", "-v", "ON_ERROR_STOP=1", "-c",
               f"SET search_path = flotilla; {text}", stdout=subprocess.PIPE, text=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def counts():
    """Jobs of the ledger by state."""
    by_state = {state: int(n) for state, n in sql("SELECT state, count(*) FROM jobs GROUP BY 1")}
    return {state: by_state.get(state, 0) for state in COLUMNS}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(name, *args, **env):
    log = open(os.path.join(WORK, f"{name}.log"), "w")
    # A group of its own, so that Ctrl-C reaches this script alone, which then ends everything in order.
    started[name] = subprocess.Popen([BIN, *args], cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **env},
                                     start_new_session=True)
    return started[name]


def stop_processes():
    for process in started.values():
        if process.poll() is None:
            process.terminate()
    for name, process in started.items():
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            print(f"demo: {name} did not drain in 30 s; killed", file=sys.stderr)
            process.kill()
            process.wait()


def wait_until_ready(port, what, process):
    import urllib.error, urllib.request
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            fail(f"{what} ended at once; see {WORK}/{what}.log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    fail(f"{what} is not ready after 60 s; see {WORK}/{what}.log")


def progress(began, total, kill_at=None, victim=None):
    """Shows the fleet at work until every accepted job has ended; kills the victim half-way."""
    killed, shown = False, 0.0
    depths = "SELECT priority, count(*) FROM jobs WHERE state = 'waiting' GROUP BY 1 ORDER BY 1 DESC"
    while True:
        now = counts()
        done = now["succeeded"] + now["dead"] + now["cancelled"] + now["parked"]
        if victim and not killed and done >= kill_at and now["running"] > 0:
            held = int(sql(f"SELECT count(*) FROM jobs WHERE state = 'running' AND worker LIKE '%:{victim.pid}:%'")[0][0])
            if held:
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                killed = True
                print(f"    !! SIGKILL to worker {victim.pid}, which held {held} jobs", flush=True)
        if time.monotonic() - shown >= 2 or done >= total:
            shown = time.monotonic()
            waiting = " ".join(f"p{priority}:{n}" for priority, n in sql(depths)) or "none"
            rate = done / max(shown - began, 0.001)
            print(f"    {done:5}/{total}  {rate:6.1f} documents/s  running {now['running']:3}  waiting {waiting}  "
                  f"failed {now['dead'] + now['parked']}", flush=True)
        if done >= total:
            return killed
        if all(p.poll() is not None for n, p in started.items() if n.startswith("worker")):
            fail("all workers have ended; see target/demo/*.log")
        time.sleep(0.1)


def broken_documents():
    """What people really send: each dies for a reason of its own, and disturbs nobody."""
    folder = os.path.join(WORK, "broken")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "blank.txt"), "w") as file:
        file.write(" \n\t\n ")
    with open(os.path.join(folder, "latin1.txt"), "wb") as file:
        file.write("Müller hat 20 \u00a3 für Käse bezahlt.".encode("latin-1"))
    flotilla("import", folder, "--tenant", TENANT, "--prefix", "broken/", "--wait", check=False)
    short = {"document": "broken/vector", "chunks": [{"text": "three numbers are no embedding", "vector": [1, 2, 3]}]}
    flotilla("enqueue", "ingest", "--tenant", TENANT, "--payload", json.dumps(short), "--wait", check=False)
    flotilla("enqueue", "translate", "--tenant", TENANT, "--queue", "ingest", "--payload", '{"document": "broken/kind"}',
             "--wait", check=False)


def percentile(name, q):
    return float(sql(f"SELECT percentile_cont({q}) WITHIN GROUP (ORDER BY extract(epoch FROM {name}) * 1000)::numeric(12,1) "
                     f"FROM jobs WHERE state = 'succeeded'")[0][0] or 0)


def main():
    global stack_up
    wall = time.monotonic()
    os.makedirs(WORK, exist_ok=True)
    with phase("build"):
        say("Building (the first time takes some minutes)")
        if "FLOTILLA_BIN" not in os.environ:
            run("cargo", "build", "--release", "--locked", "-p", "cli")
        os.environ["FLOTILLA_VECTORS_BIN"] = run("scripts/build-vectors.sh", stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    embedder = os.environ.get("EMBEDDER", "local")
    with phase("model"):
        if embedder == "local":
            say("Getting the embedding model")
            model = os.environ.setdefault("FLOTILLA_MODEL_DIR", os.path.join(ROOT, "models", "all-MiniLM-L6-v2"))
            run("python3", "scripts/fetch_model.py", model)
    with phase("services"):
        say("Starting private services")
        run(BIN, "dev", "down", "--dir", STACK, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run("rm", "-rf", STACK)
        stack_up = True
        flotilla("dev", "up", "--dir", STACK)
        with open(os.path.join(STACK, "env")) as file:
            for line in file:
                if line.startswith("export "):
                    name, _, value = line[len("export "):].strip().partition("=")
                    os.environ[name] = value.strip("'\"")
        os.environ.update(FLOTILLA_EMBEDDER=embedder, FLOTILLA_LEASE_MS="4000", FLOTILLA_HEARTBEAT_MS="1000",
                          FLOTILLA_GRACE_MS="2000", FLOTILLA_SWEEP_BOUND_MS="10000", FLOTILLA_UNROUTABLE_AFTER_MS="2000",
                          FLOTILLA_EMBEDDER_THREADS="1")
        flotilla("migrate", "up")
        flotilla("tenants", "create", TENANT)
    with phase("fleet"):
        say(f"Starting a producer and {WORKERS} workers")
        port = free_port()
        producer = start("producer", "producer", "--addr", f"127.0.0.1:{port}", FLOTILLA_AUTH="open")
        wait_until_ready(port, "producer", producer)
        for number in range(1, WORKERS + 1):
            port = free_port()
            worker = start(f"worker{number}", "worker", "--queues", "ingest,embed,delete", "--concurrency", "8", "--addr", f"127.0.0.1:{port}")
            wait_until_ready(port, f"worker{number}", worker)
            print(f"    worker {number}: process {worker.pid}", flush=True)
    with phase("import"):
        corpus = os.environ.get("CORPUS")
        if not corpus:
            corpus = os.path.join(WORK, "corpus")
            run("python3", "scripts/demo_corpus.py", corpus, os.environ.get("DOCUMENTS", "2400"), stdout=subprocess.DEVNULL)
        say(f"Importing {corpus}")
        began = time.monotonic()
        flotilla("import", corpus, "--tenant", TENANT)
        total = int(sql("SELECT count(*) FROM jobs")[0][0])
        if total < 2000 and not (os.environ.get("CORPUS") or os.environ.get("DOCUMENTS")):
            fail(f"the corpus has {total} documents; at least 2000 were expected")
        if not total:
            fail(f"no documents found in {corpus}")
        killed = progress(began, total, total // 2, started["worker2"])
        took = time.monotonic() - began
        if not killed:
            fail("the corpus was through before a worker could be killed; use a larger one")
    with phase("broken documents"):
        say("Broken documents: each becomes a dead letter with its reason")
        broken_documents()
        flotilla("dlq", "list", "--tenant", TENANT)
        letters = answer("dlq", "list", "--tenant", TENANT)
        blank = next(letter for letter in letters if letter["class"] == "empty_document")
        say("One of them, mended and replayed")
        mended = {"document": "broken/blank.txt", "text": "This document is blank no more: it tells how a dead letter is replayed."}
        flotilla("dlq", "replay", blank["id"], "--payload", json.dumps(mended))
        progress(time.monotonic(), int(sql("SELECT count(*) FROM jobs")[0][0]))
    with phase("search"):
        say("Three searches")
        for text in ("retry a failed operation with exponential backoff and jitter", "parse command line arguments",
                     "how is a dead letter replayed"):
            flotilla("search", text, "--tenant", TENANT, "--k", "3")
    with phase("audit"):
        say("Auditing the three stores")
        audit = flotilla("audit", "--wait", "60", check=False)
    with phase("stop"):
        say("Stopping the fleet")
        now = counts()
        jobs, redelivered = (int(n) for n in sql("SELECT count(*), count(*) FILTER (WHERE lost_deliveries > 0) FROM jobs")[0])
        latency = {q: percentile("finished_at - taken_at", q) for q in (0.5, 0.99)}
        stop_processes()
        exits = {name: process.returncode for name, process in started.items()}
    summary = {
        "documents": jobs, "succeeded": now["succeeded"], "dead_letters": now["dead"], "cancelled": now["cancelled"],
        "parked": now["parked"], "redelivered": redelivered, "audit_clean": audit.returncode == 0,
        "documents_per_second": round(total / took, 1), "embedder": embedder,
        "saga_ms": {"p50": latency[0.5], "p99": latency[0.99]}, "phases": phases,
        "wall_seconds": round(time.monotonic() - wall, 1),
    }
    with open(os.path.join(TARGET, "demo.json"), "w") as file:
        json.dump(summary, file, indent=2)
    say("Summary (also in target/demo.json)")
    print(json.dumps(summary, indent=2))
    if summary["documents"] != sum(now[state] for state in ("succeeded", "dead", "cancelled", "parked")):
        fail(f"not every accepted job has ended: {now}")
    if not redelivered:
        fail("the kill hit nothing: no job was redelivered")
    if not summary["audit_clean"]:
        fail("the audit found disagreements")
    if any(code for name, code in exits.items() if name != "worker2"):
        fail(f"a process did not drain cleanly: {exits}")
    say("Every accepted job has ended, one worker was killed on the way, and the three stores agree.")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    # A plain kill ends the demo as Ctrl-C does: with everything stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("\ndemo: interrupted; stopping what was started", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {' '.join(map(str, error.cmd[:4]))} … failed with exit code {error.returncode}")
    finally:
        stop_processes()
        if stack_up:
            run(BIN, "dev", "down", "--dir", STACK, check=False)
