"""docker-compose.yml: valid, complete, and scalable."""

import importlib.resources
import json
import re

import jsonschema

from .site import REQUIRED, ROLES, check_drain, check_environment, pinned, seconds

FILE = "docker-compose.yml"
SETTINGS = "deploy/compose.env.example"
SERVICES = {
    "postgres", "redis-queue", "redis-cache", "qdrant", "migrate", "producer", "worker",
    "otel-collector", "prometheus", "grafana",
}  # fmt: skip


def check_schema(here):
    schema = json.loads(
        (importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8")
    )
    validator = jsonschema.validators.validator_for(schema)(schema)
    for error in validator.iter_errors(here.yaml(FILE)):
        here.bad(FILE, f"{'.'.join(map(str, error.path))}: {error.message[:200]}")
    return FILE


def check_structure(here):
    file = here.yaml(FILE)
    services = file["services"]
    for name in sorted(SERVICES - set(services)):
        here.bad(FILE, f"service {name} is missing")
    one_shots = {
        needed
        for service in services.values()
        for needed, how in depends_on(service).items()
        if how.get("condition") == "service_completed_successfully"
    }
    for name, service in services.items():
        where = f"{FILE} service {name}"
        check_health(here, where, service, name in one_shots)
        check_references(here, where, service, file)
        if runs_flotilla(service):
            check_flotilla(here, where, service)
    check_worker(here, services.get("worker", {}))
    check_mounted(here, services)
    check_settings(here)
    return f"{len(services)} services"


def runs_flotilla(service):
    return (service.get("build") or {}).get("context") == "."


def depends_on(service):
    needed = service.get("depends_on") or {}
    return {name: {} for name in needed} if isinstance(needed, list) else needed


def check_health(here, where, service, one_shot):
    if one_shot:
        if service.get("restart") != "no":
            here.bad(where, 'others wait for its end: it needs restart: "no"')
        return
    health = service.get("healthcheck") or {}
    test = health.get("test")
    if not test or test in (["NONE"], "NONE") or health.get("disable"):
        here.bad(where, "has no health check")
        return
    for key in ("interval", "timeout", "retries"):
        if key not in health:
            here.bad(where, f"its health check has no {key}")
    # Compose takes a single $ for its own variable.
    if any(re.search(r"(?<!\$)\$(?![${])", part) for part in test):
        here.bad(where, "its health check has a single $: write $$")


def check_references(here, where, service, file):
    image = service.get("image", "")
    if not pinned(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image)):
        here.bad(where, f"image {image!r} is not pinned to a version")
    build = service.get("build")
    if build and not (here.root / build["context"] / build.get("dockerfile", "Dockerfile")).is_file():
        here.bad(where, f"its Dockerfile {build} does not exist")
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith((".", "/")):
            if not (here.root / source).exists():
                here.bad(where, f"mounts {source}, which does not exist")
            if not volume.endswith(":ro"):
                here.bad(where, f"mounts {source} writable")
        elif source not in file["volumes"]:
            here.bad(where, f"volume {source} is not defined")
    for network in service.get("networks", []):
        if network not in file["networks"]:
            here.bad(where, f"network {network} is not defined")
    for needed, how in depends_on(service).items():
        if needed not in file["services"]:
            here.bad(where, f"depends on {needed}, which is not defined")
        elif how.get("condition") == "service_healthy" and "healthcheck" not in file["services"][needed]:
            here.bad(where, f"waits for {needed} to be healthy, which has no health check")
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            here.bad(where, f"publishes {port} to every address of the host; begin with 127.0.0.1:")


def check_flotilla(here, where, service):
    environment = service.get("environment") or {}
    check_environment(here, where, environment)
    needed = {"DATABASE_URL"} if service["command"][0] == "migrate" else REQUIRED
    for name in sorted(needed - set(environment)):
        here.bad(where, f"{name} is not set")
    role = service["command"][0]
    if role not in ROLES:
        here.bad(where, f"unknown subcommand {role!r}")
    elif ROLES[role]:
        setting, port = ROLES[role]
        if environment.get(setting) != f"0.0.0.0:{port}":
            here.bad(where, f"{setting} is {environment.get(setting)!r}: others reach it only on 0.0.0.0:{port}")
        probe = str((service.get("healthcheck") or {}).get("test"))
        if f"/{port}" not in probe or not re.search(r"GET /(readyz|healthz) ", probe):
            here.bad(where, f"its health check does not ask /readyz or /healthz on port {port}")
    check_drain(here, where, environment, seconds(service.get("stop_grace_period", "10s")))


def check_worker(here, worker):
    if "container_name" in worker:
        here.bad(f"{FILE} service worker", "has a container_name, so it cannot be scaled")
    if worker.get("ports"):
        here.bad(f"{FILE} service worker", "publishes a host port, so it cannot be scaled")


def check_mounted(here, services):
    """The Redis roles must not be swapped, and Postgres must use our file."""
    for name, file in (
        ("redis-queue", "./deploy/redis/redis-queue.conf"),
        ("redis-cache", "./deploy/redis/redis-cache.conf"),
        ("postgres", "./deploy/postgres/postgresql.conf"),
    ):
        service = services.get(name, {})
        mounts = dict(volume.split(":")[:2] for volume in service.get("volumes", []))
        target = mounts.get(file)
        if not target or target not in " ".join(service.get("command") or []):
            here.bad(f"{FILE} service {name}", f"does not run with {file}")


def check_settings(here):
    """Each ${NAME:-default} of the compose file stands in the example with the same default, and the other way round."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", here.text(FILE)))
    for name in re.findall(r"(?<!\$)\$\{(\w+)\}", here.text(FILE)):
        here.bad(FILE, f"${{{name}}} has no default")
    # A setting without a value is handed on from .env where it is set there: the example shows it commented out.
    used |= dict.fromkeys(re.findall(r"^  ([A-Z_]+):$", here.text(FILE), re.M), "(handed on)")
    shown = dict(re.findall(r"^([A-Z_]+)=(.*)$", here.text(SETTINGS), re.M))
    shown |= dict.fromkeys(re.findall(r"^# ?([A-Z_]+)=", here.text(SETTINGS), re.M), "(handed on)")
    for name in sorted(set(used) | set(shown)):
        if used.get(name) != shown.get(name):
            here.bad(SETTINGS, f"{name} is {shown.get(name)!r} here and {used.get(name)!r} in {FILE}")
