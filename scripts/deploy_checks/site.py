"""The files under check, the problems found in them, and the facts that several checks need."""

import functools
import os
import pathlib
import re
import subprocess

import yaml

# The names a process reads from its environment. Nothing else may be set in a Flotilla container.
ENVIRONMENT = {
    "DATABASE_URL", "REDIS_QUEUE_URL", "REDIS_CACHE_URL", "QDRANT_URL",
    "FLOTILLA_PREFIX", "FLOTILLA_EMBEDDER", "FLOTILLA_EMBEDDER_THREADS", "FLOTILLA_MODEL_DIR",
    "FLOTILLA_OPENAI_URL", "FLOTILLA_OPENAI_API_KEY", "FLOTILLA_OPENAI_MODEL", "FLOTILLA_OPENAI_DIMENSIONS",
    "FLOTILLA_PRODUCER_ADDR", "FLOTILLA_WORKER_ADDR", "FLOTILLA_QUEUES", "FLOTILLA_CONCURRENCY",
    "FLOTILLA_LEASE_MS", "FLOTILLA_HEARTBEAT_MS", "FLOTILLA_DRAIN_GRACE_MS", "FLOTILLA_LOG", "FLOTILLA_LOG_FORMAT",
    "FLOTILLA_AUTH", "FLOTILLA_ENCRYPTION_KEYS", "OTEL_EXPORTER_OTLP_ENDPOINT",
}  # fmt: skip
# What a process cannot start without.
REQUIRED = {"DATABASE_URL", "REDIS_QUEUE_URL", "REDIS_CACHE_URL", "QDRANT_URL"}
# Roles of the image, by the first word of the command; the health port's setting and port of each.
ROLES = {"migrate": None, "producer": ("FLOTILLA_PRODUCER_ADDR", 8080), "worker": ("FLOTILLA_WORKER_ADDR", 9090)}
# A process needs this long after its drain to close connections and write its last lines.
DRAIN_MARGIN_SECONDS = 10
TOOL_LIMIT_SECONDS = 120


# The same safe loader, written in C where PyYAML has it: ten times faster.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_all(text):
    return [document for document in yaml.load_all(text, Loader=LOADER) if document]


class Site:
    """A checkout. Checks read it through here and report what they find; nothing writes to it."""

    def __init__(self, root):
        self.root = root
        self.problems = []
        # Kubernetes overlays to look at; the self-test looks only at the one that shows its fault.
        self.overlays = {"dev": "flotilla-dev", "production": "flotilla"}

    def bad(self, where, what):
        self.problems.append(f"{where}: {what}")

    def text(self, path):
        return (self.root / path).read_text(encoding="utf-8")

    def yaml(self, path):
        return yaml.load(self.text(path), Loader=LOADER)

    def documents(self, path):
        return parse_all(self.text(path))

    @functools.cached_property
    def metrics(self):
        return self.yaml("deploy/prometheus/metrics.yaml")

    def tool(self, where, *command):
        """Runs a command in the checkout; a failure is a problem at `where`. Returns its output."""
        done = subprocess.run(
            command, cwd=self.root, capture_output=True, text=True, timeout=TOOL_LIMIT_SECONDS, check=False
        )
        if done.returncode:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            self.bad(where, f"{' '.join(command[:3])} found: " + " | ".join(lines[:12]))
        return done.stdout


def rust_sources(root):
    for folder, folders, files in os.walk(root):
        # Build outputs are not sources, and there are very many of them.
        folders[:] = [name for name in folders if name not in ("target", "node_modules") and not name.startswith(".")]
        yield from (pathlib.Path(folder) / name for name in files if name.endswith(".rs"))


def run_check(here, function):
    """Runs one check. A file that is missing or malformed is a finding, not a crash."""
    try:
        return function(here)
    except (OSError, KeyError, IndexError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        here.bad(function.__name__, f"{type(error).__name__}: {error}")
        return "stopped"


def pinned(image):
    """Whether an image name fixes a version: a digest, or a tag that begins with one."""
    if "@sha256:" in image:
        return True
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(re.match(r"v?\d", tag))


def seconds(text):
    """A compose duration such as 40s or 1m30s in seconds."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", str(text))
    if not parts:
        raise ValueError(f"not a duration: {text!r}")
    return sum(int(count) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for count, unit in parts)


def check_environment(here, where, names):
    for name in sorted(set(names) - ENVIRONMENT):
        here.bad(where, f"unknown setting {name}")


def check_drain(here, where, environment, grace):
    """The time before SIGKILL must outlast the drain."""
    drain = int(environment.get("FLOTILLA_DRAIN_GRACE_MS", 25000)) / 1000
    if grace < drain + DRAIN_MARGIN_SECONDS:
        here.bad(where, f"stops after {grace:g} s, but draining takes up to {drain:g} s; "
                        f"allow {drain + DRAIN_MARGIN_SECONDS:g} s or more")  # fmt: skip
    if int(environment.get("FLOTILLA_HEARTBEAT_MS", 10000)) * 2 > int(environment.get("FLOTILLA_LEASE_MS", 30000)):
        here.bad(where, "FLOTILLA_HEARTBEAT_MS must leave room for two heartbeats in FLOTILLA_LEASE_MS")
