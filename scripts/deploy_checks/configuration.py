"""Syntax of every file, and what the configurations of Redis, Postgres and the collector must say."""

import json
import re


def deploy_files(here, *suffixes):
    return sorted(
        str(path.relative_to(here.root)) for path in (here.root / "deploy").rglob("*") if path.suffix in suffixes
    )


def check_syntax(here):
    files = ["docker-compose.yml", *deploy_files(here, ".yml", ".yaml")]
    for file in files:
        here.documents(file)
    here.tool("yamllint", "yamllint", "--strict", "-f", "parsable", "-c", "deploy/.yamllint.yaml", *files)
    dashboards = deploy_files(here, ".json")
    for file in dashboards:
        json.loads(here.text(file))
    return f"{len(files)} YAML, {len(dashboards)} JSON"


def directives(here, file):
    """Redis' directives; the last of several wins, as in the server."""
    found = {}
    for line in here.text(file).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            name, _, value = line.strip().partition(" ")
            found[name.lower()] = value.strip().lower()
    return found


def check_redis(here):
    expected = {
        "deploy/redis/redis-queue.conf": {"maxmemory-policy": "noeviction", "appendonly": "yes"},
        "deploy/redis/redis-cache.conf": {"maxmemory-policy": "allkeys-lru", "appendonly": "no"},
    }
    for file, wanted in expected.items():
        found = directives(here, file)
        for name, value in wanted.items():
            if found.get(name) != value:
                here.bad(file, f"{name} is {found.get(name)!r}, must be {value!r}")
        if not re.fullmatch(r"[1-9]\d*(kb|mb|gb)?", found.get("maxmemory", "")):
            here.bad(file, f"maxmemory is {found.get('maxmemory')!r}: it needs a limit")
        if "requirepass" in found:
            here.bad(file, "requirepass holds a password: give it on the command line or by ACL file")
        if found.get("protected-mode") != "no" or "127.0.0.1" in found.get("bind", ""):
            here.bad(file, "other containers cannot reach it: protected-mode no, and no bind to loopback")
    if directives(here, "deploy/redis/redis-queue.conf").get("appendfsync") not in ("everysec", "always"):
        here.bad("deploy/redis/redis-queue.conf", "appendfsync must be everysec or always")
    return "queue keeps everything (noeviction, AOF), cache evicts (allkeys-lru)"


def check_postgres(here):
    file = "deploy/postgres/postgresql.conf"
    found = dict(re.findall(r"^\s*([a-z_.]+)\s*=\s*'?([^'#\n]*?)'?\s*(?:#.*)?$", here.text(file), re.M))
    for name in ("fsync", "synchronous_commit", "full_page_writes"):
        if found.get(name, "on") != "on":
            here.bad(file, f"{name} is {found[name]!r}: an accepted job must survive a crash")
    if found.get("listen_addresses") != "*":
        here.bad(file, "listen_addresses must be '*': other containers connect")
    for name in ("max_connections", "shared_buffers"):
        if name not in found:
            here.bad(file, f"{name} is not set")
    return f"{len(found)} settings"


def check_collector(here):
    file = "deploy/otel/collector.yaml"
    config = here.yaml(file)
    connectors = set(config.get("connectors") or {})
    known = {kind: set(config.get(kind) or {}) for kind in ("receivers", "processors", "exporters")}
    used = {"receivers": set(), "processors": set(), "exporters": set(), "extensions": set()}
    for name, pipeline in config["service"]["pipelines"].items():
        for kind in ("receivers", "processors", "exporters"):
            for part in pipeline.get(kind, []):
                used[kind].add(part)
                if part not in known[kind] | (connectors if kind != "processors" else set()):
                    here.bad(file, f"pipeline {name} uses {kind[:-1]} {part}, which is not defined")
        if (pipeline.get("processors") or [None])[0] != "memory_limiter":
            here.bad(file, f"pipeline {name} must begin with memory_limiter")
    for kind, names in known.items():
        for part in sorted(names - used[kind]):
            here.bad(file, f"{kind[:-1]} {part} is defined and not used")
    for part in sorted(connectors):
        if part not in used["receivers"] or part not in used["exporters"]:
            here.bad(file, f"connector {part} must end one pipeline and begin another")
    for part in config["service"].get("extensions", []):
        if part not in (config.get("extensions") or {}):
            here.bad(file, f"extension {part} is not defined")
    # The ports that compose, Kubernetes and Prometheus use.
    for endpoint, port in (
        (config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"], 4317),
        (config["exporters"]["prometheus"]["endpoint"], 8889),
        (config["extensions"]["health_check"]["endpoint"], 13133),
    ):
        if endpoint != f"0.0.0.0:{port}":
            here.bad(file, f"listens on {endpoint}, others expect 0.0.0.0:{port}")
    return ", ".join(config["service"]["pipelines"])


def check_scripts(here):
    scripts = [*deploy_files(here, ".sh"), "scripts/lint-deploy.sh"]
    here.tool("shellcheck", "shellcheck", "--severity=style", *scripts)
    for script in scripts:
        if not (here.root / script).stat().st_mode & 0o111:
            here.bad(script, "is not executable")
        if "set -euo pipefail" not in here.text(script):
            here.bad(script, "does not stop at the first error: set -euo pipefail")
    return ", ".join(scripts)
