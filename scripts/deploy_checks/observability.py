"""Prometheus, Grafana and the names they use: every query asks for a metric that exists, in the right way."""

import json
import pathlib
import re
import tempfile

import yaml

from .site import ENVIRONMENT, rust_sources

RULES = "deploy/prometheus/rules/flotilla.yml"
TESTS = "deploy/prometheus/tests/flotilla.yml"
RUNBOOK = "docs/runbook.md"
# Labels that Prometheus itself adds, and the series it writes about each target.
TARGET_LABELS = {"job", "instance"}
TARGET_METRICS = {"up"}
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool", "and", "or", "unless"}


def check_query(here, where, query):
    """Names and labels of a PromQL query. Its grammar is promtool's to judge. Returns the metrics it names."""
    bare = re.sub(r'"[^"]*"', '""', query)
    # Label names: in matchers, and in the lists after by, without, on and ignoring.
    labels = set(re.findall(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*\"\"", bare))
    for names in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        labels |= {name.strip() for name in names.split(",") if name.strip()}
    stripped = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    stripped = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", stripped)
    found, allowed = set(), set(TARGET_LABELS)
    for match in re.finditer(r"(?<![\w$:.])[a-zA-Z_:][\w:]*", stripped):
        name = match.group()
        if name in WORDS or re.match(r"\s*\(", stripped[match.end():]):
            continue
        if name in TARGET_METRICS:
            continue
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        metric = here.metrics.get(base if here.metrics.get(base, {}).get("type") == "histogram" else name)
        if metric is None:
            here.bad(where, f"unknown metric {name}")
            continue
        if metric["type"] == "histogram" and name == base:
            here.bad(where, f"{name} is a histogram: ask for its _bucket, _sum or _count")
        found.add(base if metric["type"] == "histogram" else name)
        allowed |= set(metric["labels"]) | ({"le"} if name.endswith("_bucket") else set())
        before = stripped[: match.start()].rstrip()
        if metric["type"] == "counter" or name != base and metric["type"] == "histogram":
            if not re.search(r"\b(rate|increase|irate)\($", before):
                here.bad(where, f"{name} only grows: take rate() or increase() first")
        elif metric["scope"] == "system" and not re.search(r"\b(max|absent)\s*\($", before):
            here.bad(where, f"every process reports {name}: fold with max first, or it counts once per process")
    for label in sorted(labels - allowed):
        here.bad(where, f"unknown label {label}")
    return found


def check_grammar(here, where, queries):
    """promtool reads each query as a recording rule; Grafana's variables get a value first."""
    rules = []
    for number, query in enumerate(queries):
        query = query.replace("$__rate_interval", "5m").replace("$__range", "1h")
        rules.append({"record": f"check:{number}", "expr": re.sub(r"\$\w+", "x", query)})
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "queries.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
        # Two panels may ask the same; that lint is for real recording rules.
        here.tool(where, "promtool", "check", "rules", "--lint=none", str(file))


def check_rules(here):
    here.tool("deploy/prometheus/prometheus.yml", "promtool", "check", "config", "deploy/prometheus/prometheus.yml")
    here.tool(TESTS, "promtool", "test", "rules", TESTS)
    alerts = alert_rules(here)
    tested = {
        case["alertname"]
        for test in here.yaml(TESTS)["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    for rule in alerts:
        where = f"{RULES} {rule['alert']}"
        check_query(here, where, rule["expr"])
        for name in ("summary", "description", "runbook"):
            if not rule.get("annotations", {}).get(name):
                here.bad(where, f"has no {name}")
        if rule.get("labels", {}).get("severity") not in ("critical", "warning", "info"):
            here.bad(where, "severity must be critical, warning or info")
        if rule["alert"] not in tested:
            here.bad(where, f"no test in {TESTS} makes it fire")
    check_targets(here)
    return f"{len(alerts)} alerts, each fires in a test"


def alert_rules(here):
    return [rule for group in here.yaml(RULES)["groups"] for rule in group["rules"] if "alert" in rule]


def check_targets(here):
    """The names that Prometheus looks up are services of compose, on the ports these listen on."""
    file = "deploy/prometheus/prometheus.yml"
    services = here.yaml("docker-compose.yml")["services"]
    jobs = {job["job_name"]: job for job in here.yaml(file)["scrape_configs"]}
    for role, port in (("worker", 9090), ("producer", 8080)):
        found = jobs.get(f"flotilla-{role}", {}).get("dns_sd_configs") or [{}]
        if found[0].get("names") != [role] or found[0].get("port") != port or found[0].get("type") != "A":
            here.bad(file, f"job flotilla-{role} must find every address of {role} in DNS, port {port}")
    networks = set(services["prometheus"]["networks"])
    for job in jobs.values():
        hosts = [name for entry in job.get("dns_sd_configs", []) for name in entry["names"]]
        hosts += [t.split(":")[0] for entry in job.get("static_configs", []) for t in entry["targets"]]
        for host in hosts:
            if host == "127.0.0.1":
                continue
            shared = networks & set(services.get(host, {}).get("networks", []))
            if len(shared) != 1:
                here.bad(file, f"{host} shares {len(shared)} networks with prometheus in docker-compose.yml; "
                               "with none it is not reached, with two each process counts twice")  # fmt: skip


def check_dashboards(here):
    source = here.yaml("deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]["uid"]
    folder = here.root / "deploy/grafana/dashboards"
    uids, queries, shown = set(), [], set()
    for path in sorted(folder.glob("*.json")):
        where = f"deploy/grafana/dashboards/{path.name}"
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        if not dashboard.get("uid") or dashboard["uid"] in uids:
            here.bad(where, f"uid {dashboard.get('uid')!r} is missing or taken")
        uids.add(dashboard.get("uid"))
        check_layout(here, where, dashboard["panels"])
        for found in sorted(set(re.findall(r'"type": "prometheus", "uid": "([^"]*)"', json.dumps(dashboard))) - {source}):
            here.bad(where, f"reads data source {found!r}; provisioned is {source!r}")
        for panel in dashboard["panels"]:
            if panel["type"] == "row":
                continue
            if not panel.get("targets"):
                here.bad(where, f"panel {panel['title']!r} asks for nothing")
            for target in panel.get("targets", []):
                shown |= check_query(here, f"{where} panel {panel['title']!r}", target["expr"])
                queries.append(target["expr"])
        for variable in dashboard["templating"]["list"]:
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            if variable["definition"] != variable["query"]["query"]:
                here.bad(where, f"variable {variable['name']} has two queries")
            if not asked or asked.group(2) not in here.metrics.get(asked.group(1), {}).get("labels", []):
                here.bad(where, f"variable {variable['name']} asks {variable['query']['query']!r}: unknown metric or label")
    check_grammar(here, "deploy/grafana/dashboards", queries)
    for rule in alert_rules(here):
        shown |= check_query(here, RULES, rule["expr"])
    for name in sorted(set(here.metrics) - shown):
        here.bad("deploy/prometheus/metrics.yaml", f"no dashboard or alert uses {name}")
    if not {"flotilla-sagas", "flotilla-queues", "flotilla-cache"} <= uids:
        here.bad("deploy/grafana/dashboards", "sagas, queues and cache must each have a dashboard")
    return f"{len(uids)} dashboards, {len(queries)} queries, all {len(here.metrics)} metrics used"


def check_layout(here, where, panels):
    taken, ids = {}, set()
    for panel in panels:
        if panel["id"] in ids:
            here.bad(where, f"panel id {panel['id']} is used twice")
        ids.add(panel["id"])
        grid = panel["gridPos"]
        if grid["x"] + grid["w"] > 24:
            here.bad(where, f"panel {panel['title']!r} is wider than the grid")
        cells = [(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])]
        over = next((taken[cell] for cell in cells if cell in taken), None)
        if over:
            here.bad(where, f"panel {panel['title']!r} lies over {over!r}")
        taken.update(dict.fromkeys(cells, panel["title"]))


def check_drift(here):
    """The names here are names in the code, and each alert's runbook entry exists."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in rust_sources(here.root))
    for name in here.metrics:
        if f'"{name}"' not in sources:
            here.bad("deploy/prometheus/metrics.yaml", f"no Rust source reports {name}")
    for name in sorted(ENVIRONMENT):
        if name not in sources:
            here.bad("scripts/deploy_checks/site.py", f"no Rust source reads {name}")
    runbook = here.text(RUNBOOK) if (here.root / RUNBOOK).is_file() else ""
    anchors = {anchor(line) for line in runbook.splitlines() if line.startswith("#")}
    anchors |= set(re.findall(r'<a (?:id|name)="([^"]+)"', runbook))
    for rule in alert_rules(here):
        file, _, part = rule["annotations"]["runbook"].partition("#")
        if file != RUNBOOK or part not in anchors:
            here.bad(f"{RULES} {rule['alert']}", f"{file} has no heading for #{part}")
    return f"{len(here.metrics)} metrics, {len(ENVIRONMENT)} settings, {len(anchors)} headings"


def anchor(heading):
    """The anchor that Markdown viewers make of a heading."""
    text = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
