"""Proof that the checks can fail: each fault is planted in a copy of the files, and its check must name it.

A fault is a check, a file, the text to replace, its replacement (None deletes the file), and a part of the report that
must be new. The text must occur, so a fault that no longer fits the files is an error and not a silent pass."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import tempfile

from . import site

COMPOSE, K8S, RULES = "docker-compose.yml", "deploy/kubernetes/", "deploy/prometheus/rules/flotilla.yml"
BASE, OVERLAYS, COMPONENTS = K8S + "base/", K8S + "overlays/", K8S + "components/"
QUEUE, CACHE, POSTGRES = "deploy/redis/redis-queue.conf", "deploy/redis/redis-cache.conf", "deploy/postgres/postgresql.conf"
SAGAS, QUEUES = "deploy/grafana/dashboards/sagas.json", "deploy/grafana/dashboards/queues.json"
SCALED = COMPONENTS + "keda/scaled-object.yaml"
FOLDED_DEPTH = 'sum(max by (queue, priority) (queue_depth{queue=~"ingest|embed|delete"}))'

FAULTS = [
    ("yaml", COMPOSE, "services:\n", "services:\n\tx: 1\n", "found character"),
    ("yaml", "deploy/otel/collector.yaml", "receivers:\n", "receivers: {}\nreceivers:\n", "duplication of key"),
    ("yaml", SAGAS, '"panels": [', '"panels": [,', "JSONDecodeError"),
    ("compose-schema", COMPOSE, "    shm_size: 256m", "    shm_sise: 256m", "shm_sise"),
    ("compose-schema", COMPOSE, "      retries: 12\n", "      retries: {a: b}\n", "retries"),
    ("compose", COMPOSE, "  grafana:\n    image", "  grafanas:\n    image", "service grafana is missing"),
    ("compose", COMPOSE, "    healthcheck: *redis-healthcheck\n", "", "redis-cache: has no health check"),
    ("compose", COMPOSE, 'ping | grep -qx PONG"]', 'ping | grep -qx $PONG"]', "a single .: write"),
    ("compose", COMPOSE, "    volumes: [\"qdrant-data:/qdrant/storage\"]", "    volumes: [\"qdrant:/qdrant/storage\"]",
     "volume qdrant is not defined"),
    ("compose", COMPOSE, "redis:7.2-bookworm", "redis:latest", "'redis:latest' is not pinned"),
    ("compose", COMPOSE, "prom/prometheus:v3.5.0", "prom/prometheus", "'prom/prometheus' is not pinned"),
    ("compose", COMPOSE, "  worker:\n    <<: *flotilla\n", "  worker:\n    <<: *flotilla\n    container_name: worker\n",
     "container_name"),
    ("compose", COMPOSE, "  worker:\n    <<: *flotilla\n", '  worker:\n    <<: *flotilla\n    ports: ["127.0.0.1:1:9090"]\n',
     "publishes a host port"),
    ("compose", COMPOSE, '"127.0.0.1:${GRAFANA_PORT:-3000}:3000"', '"${GRAFANA_PORT:-3000}:3000"', "every address"),
    ("compose", COMPOSE, "  QDRANT_URL: http", "  QDRANT_ADDRESS: http", "unknown setting QDRANT_ADDRESS"),
    ("compose", COMPOSE, "  REDIS_CACHE_URL: redis", "  FLOTILLA_LOG_: redis", "REDIS_CACHE_URL is not set"),
    ("compose", COMPOSE, "stop_grace_period: 40s", "stop_grace_period: 30s", "draining takes up to 25 s"),
    ("compose", COMPOSE, 'FLOTILLA_HEARTBEAT_MS: "10000"', 'FLOTILLA_HEARTBEAT_MS: "20000"', "two heartbeats"),
    ("compose", COMPOSE, "FLOTILLA_WORKER_ADDR: 0.0.0.0:9090", "FLOTILLA_WORKER_ADDR: 127.0.0.1:9090", "0.0.0.0:9090"),
    ("compose", COMPOSE, "/dev/tcp/127.0.0.1/9090", "/dev/tcp/127.0.0.1/9091", "does not ask"),
    ("compose", COMPOSE, "command: [migrate, up]", "command: [migrations, up]", "unknown subcommand"),
    ("compose", COMPOSE, "./deploy/redis/redis-queue.conf:", "./deploy/redis/redis-cache.conf:", "does not run with"),
    ("compose", COMPOSE, "./deploy/prometheus/rules:", "./deploy/prometheus/rulez:", "does not exist"),
    ("compose", COMPOSE, "migrate: {condition", "migration: {condition", "depends on migration"),
    ("compose", COMPOSE, 'restart: "no"', "restart: always", "wait for its end"),
    ("compose", "deploy/compose.env.example", "GRAFANA_PORT=3000", "GRAFANA_PORT=3001", "GRAFANA_PORT is '3001'"),
    ("compose", COMPOSE, "dockerfile: Dockerfile}\n    command", "dockerfile: Containerfile}\n    command", "does not exist"),
    ("image", "Dockerfile", "FROM python:3.11-slim-bookworm", "FROM python:latest", "python:latest is not pinned"),
    ("image", "Dockerfile", "FROM rust:1.95-bookworm", "FROM rust:1.94-bookworm", "does not build with rust:1.95"),
    ("image", "Dockerfile", "USER 10001:10001", "USER root", "use a number"),
    ("image", "Dockerfile", "--from=model", "--from=models", "names no stage"),
    ("image", "Dockerfile", "COPY scripts/fetch_model.py", "COPY scripts/get_model.py", "get_model.py, which does not"),
    ("image", "Dockerfile", 'ENTRYPOINT ["/usr/local/bin/flotilla"]', "ENTRYPOINT flotilla", "swallow SIGTERM"),
    ("image", ".dockerignore", "!telemetry\n", "", "keeps telemetry out"),
    ("image", ".dockerignore", "!deploy/redis/redis-queue.conf\n", "", "redis-queue.conf out of the build, and devstack/src"),
    ("image", ".dockerignore", "**/target\n", "", "lets queue/target into"),
    ("redis", QUEUE, "maxmemory-policy noeviction", "maxmemory-policy allkeys-lru", "must be 'noeviction'"),
    ("redis", QUEUE, "appendonly yes", "appendonly no", "must be 'yes'"),
    ("redis", QUEUE, "appendfsync everysec", "appendfsync no", "appendfsync must be"),
    ("redis", CACHE, "maxmemory-policy allkeys-lru", "maxmemory-policy noeviction", "must be 'allkeys-lru'"),
    ("redis", CACHE, "maxmemory 1gb", "maxmemory 0", "needs a limit"),
    ("redis", CACHE, None, None, "FileNotFoundError"),
    ("postgres", POSTGRES, "synchronous_commit = on", "synchronous_commit = off", "survive a crash"),
    ("postgres", POSTGRES, "listen_addresses = '*'", "listen_addresses = 'localhost'", "other containers connect"),
    ("collector", "deploy/otel/collector.yaml", "exporters: [debug, spanmetrics]", "exporters: [debug, jaeger]",
     "exporter jaeger, which is not defined"),
    ("collector", "deploy/otel/collector.yaml", "endpoint: 0.0.0.0:4317", "endpoint: 0.0.0.0:4319", "others expect"),
    ("collector", "deploy/otel/collector.yaml", "processors: [memory_limiter, batch]", "processors: [batch]", "begin with"),
    ("kubernetes", BASE + "worker.yaml", "terminationGracePeriodSeconds: 45", "terminationGracePeriodSecond: 45",
     "terminationGracePeriodSecond' was unexpected"),
    ("kubernetes", BASE + "worker.yaml", "terminationGracePeriodSeconds: 45", "terminationGracePeriodSeconds: 30",
     "draining takes up to 25 s"),
    ("kubernetes", BASE + "worker.yaml", "  selector:\n    matchLabels: {app.kubernetes.io/name: worker}\n  strategy",
     "  selector:\n    matchLabels: {app.kubernetes.io/name: walker}\n  strategy", "does not match its own pods"),
    ("kubernetes", BASE + "worker.yaml", "readinessProbe:", "x-readinessProbe:", "has no readinessProbe"),
    ("kubernetes", BASE + "worker.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
    ("kubernetes", BASE + "worker.yaml", "secretRef: {name: flotilla}", "secretRef: {name: fleet}", "which nobody makes"),
    ("kubernetes", BASE + "worker.yaml", "maxUnavailable: 25%\n  selector:\n    matchLabels: {app.kubernetes.io/name: worker}",
     "maxUnavailable: 25%\n  selector:\n    matchLabels: {app.kubernetes.io/name: x}", "PodDisruptionBudget/worker: selects no pods"),
    ("kubernetes", BASE + "worker.yaml", "targetPort: http}", "targetPort: metrics}", "is no port of worker"),
    ("kubernetes", BASE + "worker.yaml", "{name: tmp, mountPath: /tmp}", "{name: tmpdir, mountPath: /tmp}", "volume tmpdir"),
    ("kubernetes", BASE + "kustomization.yaml", "FLOTILLA_PREFIX=", "FLOTILLA_PREFIXES=", "unknown setting FLOTILLA_PREFIXES"),
    ("kubernetes", BASE + "kustomization.yaml", "  - migrate.yaml\n", "", "Job/migrate is missing"),
    ("kubernetes", BASE + "kustomization.yaml", "- worker.yaml", "- workers.yaml", "kubectl kustomize .* found"),
    ("kubernetes", BASE + "producer.yaml", "{name: FLOTILLA_EMBEDDER_THREADS,", "{name: FLOTILLA_LOG,", "every core of the node"),
    ("kubernetes", BASE + "producer.yaml", "args: [producer]", "args: [produce]", "unknown subcommand 'produce'"),
    ("kubernetes", BASE + "producer.yaml", "httpGet: {path: /readyz, port: http}", "httpGet: {path: /, port: http}",
     "readinessProbe must ask /readyz"),
    ("kubernetes", BASE + "producer.yaml", "limits: {memory: 768Mi}", "limits: {}", "a memory limit"),
    ("kubernetes", BASE + "network-policies.yaml", "app.kubernetes.io/name: producer}", "app.kubernetes.io/name: api}",
     "NetworkPolicy/producer: selects no pods"),
    ("kubernetes", BASE + "secret.example.yaml", "  QDRANT_URL:", "  QDRANT:", "unknown setting QDRANT$"),
    ("kubernetes", OVERLAYS + "dev/kustomization.yaml", "newTag: 0.1.0", "newTag: latest", "flotilla:latest is not pinned"),
    ("kubernetes", OVERLAYS + "dev/kustomization.yaml", "QDRANT_URL=", "QDRANT=", "QDRANT_URL is not set"),
    ("kubernetes", OVERLAYS + "dev/kustomization.yaml", "prometheus.flotilla-dev.svc", "prometheus.flotilla.svc",
     "no service of this overlay"),
    ("kubernetes", OVERLAYS + "production/sizes.yaml", "  name: worker\nspec:\n", "  name: worker\nspec:\n  replicas: 3\n",
     "KEDA does too"),
    ("kubernetes", COMPONENTS + "stores/redis-queue.yaml", "configMap: {name: redis-queue}", "configMap: {name: redis}",
     "ConfigMap redis, which nobody makes"),
    ("kubernetes", SCALED, FOLDED_DEPTH, "sum(queue_depths)", "unknown metric queue_depths"),
    ("kubernetes", SCALED, FOLDED_DEPTH, "sum(queue_depth)", "fold with max first"),
    ("kubernetes", SCALED, FOLDED_DEPTH, "sum(max by (queue) (queue_depth)", "unclosed|parse"),
    ("kubernetes", SCALED, "    name: worker\n  minReplicaCount", "    name: walker\n  minReplicaCount", "scales walker"),
    ("kubernetes", SCALED, "minReplicaCount: 1", "minReplicaCount: 0", "must keep 1 <="),
    ("kubernetes", SCALED, 'threshold: "200"', "threshold: 200", "200 is not of type 'string'"),
    ("rules", "deploy/prometheus/prometheus.yml", "dns_sd_configs:", "dns_configs:", "promtool check config found"),
    ("rules", "deploy/prometheus/prometheus.yml", "names: [worker]", "names: [workers]", "every address of worker"),
    ("rules", RULES, "max(parked_sagas) > 0", "max(parked_sagas > 0", "promtool"),
    ("rules", RULES, "max(parked_sagas) > 0", "max(parked_sagas) > 5", "FlotillaSagaParked"),
    ("rules", RULES, "max(parked_sagas)", "max(parked_saga)", "unknown metric parked_saga$"),
    ("rules", RULES, "max by (queue) (queue_oldest", "max by (queues) (queue_oldest", "unknown label queues"),
    ("rules", RULES, "runbook: docs/runbook.md#no-workers", "info: x", "FlotillaNoWorkers: has no runbook"),
    ("rules", "deploy/prometheus/tests/flotilla.yml", "alertname: FlotillaApiErrors\n", "alertname: FlotillaNoWorkers\n",
     "FlotillaApiErrors: no test"),
    ("dashboards", SAGAS, "max(parked_sagas)", "max(parked_sagaz)", "unknown metric parked_sagaz"),
    ("dashboards", SAGAS, "sum by (saga) (saga_active_count", "sum by (sagas) (saga_active_count", "unknown label sagas"),
    ("dashboards", SAGAS, "(rate(saga_executions_total{saga=~\\\"$saga\\\"}[$__rate_interval]))", "(saga_executions_total)",
     "only grows"),
    ("dashboards", SAGAS, "sum(saga_active_count)", "sum(saga_active_count))", "promtool check rules found"),
    ("dashboards", SAGAS, "flotilla-prometheus", "prometheus-1", "reads data source"),
    ("dashboards", QUEUES, '"uid": "flotilla-queues"', '"uid": "flotilla-sagas"', "missing or taken"),
    ("dashboards", QUEUES, "sum(rate(reconciler_redispatched_total[$__rate_interval]))", "vector(0)",
     "no dashboard or alert uses reconciler_redispatched_total"),
    ("dashboards", QUEUES, "label_values(queue_depth, queue)", "label_values(queue_depth, name)", "unknown metric or label"),
    ("dashboards", QUEUES, '"y": 1\n', '"y": 0\n', "lies over"),
    ("drift", "deploy/prometheus/metrics.yaml", "parked_sagas:", "parked_saga_runs:", "no Rust source reports parked_saga_runs"),
    ("drift", RULES, "docs/runbook.md#parked-sagas", "docs/runbook.md#nowhere", "no heading for #nowhere"),
    ("scripts", "deploy/backup/backup.sh", 'mv "$partial" "$file"', "mv $partial $file", "Double quote"),
    ("scripts", "deploy/backup/restore.sh", "set -euo pipefail", "set -e", "does not stop at the first error"),
]  # fmt: skip
# What the copy needs: the files under check, and what they are compared with.
COPIED = [
    COMPOSE, "Dockerfile", ".dockerignore", "Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "deploy",
    "scripts/fetch_model.py", "scripts/lint-deploy.sh", "docs/runbook.md", "devstack/src", "devstack/Cargo.toml",
]  # fmt: skip




class Bench:
    """One process's own copy of the files, in which it plants one fault after another."""

    def __init__(self, root, checks):
        self.folder = tempfile.TemporaryDirectory()
        self.copy = pathlib.Path(self.folder.name)
        self.checks = checks
        self.before = {}
        for name in COPIED:
            if (root / name).exists():
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (root / name).is_dir() else shutil.copy2)(root / name, self.copy / name)

    def problems(self, check, overlay=None):
        here = site.Site(self.copy)
        if overlay:
            here.overlays = {overlay: here.overlays[overlay]}
        site.run_check(here, self.checks[check])
        return set(here.problems)

    def plant(self, check, file, old, new, expected):
        """What is wrong with the check, or None where it named the fault."""
        if check not in self.before:
            self.before[check] = self.problems(check)
        path = self.copy / file
        if not path.is_file():
            return f"{file} does not exist"
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
        if old is None:
            path.unlink()
        elif old not in text:
            return f"{file} does not contain {old!r}: bring this fault up to date"
        else:
            path.write_text(text.replace(old, new, 1), encoding="utf-8")
        try:
            found = self.problems(check, "production" if "/production/" in file else "dev") - self.before[check]
        finally:
            path.write_text(text, encoding="utf-8")
            path.chmod(mode)
        if any(re.search(expected, problem) for problem in found):
            return None
        return f"not found; new were only: {sorted(found) or 'none'}"


BENCH = None  # of this process


def begin(root, checks):
    global BENCH
    BENCH = Bench(root, checks)


def plant(fault):
    return BENCH.plant(*fault)


def self_test(root, checks):
    missed = 0
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=begin, initargs=(root, checks)) as pool:
        for fault, wrong in zip(FAULTS, pool.map(plant, FAULTS)):
            if wrong:
                missed += 1
                print(f"✗ {fault[0]}: {fault[1]}: {fault[2]!r} -> {fault[3]!r}: {wrong}")
    without = sorted(set(checks) - {fault[0] for fault in FAULTS})
    for name in without:
        print(f"✗ {name}: no fault proves that this check can fail")
    if not missed and not without:
        print(f"✓ self-test: {len(FAULTS)} planted faults, each found by its check")
    print(f"self-test: {len(FAULTS) - missed} passed, {missed + len(without)} failed")
    return 1 if missed or without else 0
