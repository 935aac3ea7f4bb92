#!/usr/bin/env python3
"""Check docker-compose.yml, Dockerfile and deploy/ without starting anything.

    check_deploy.py               check the checkout this script stands in
    check_deploy.py --self-test   plant faults in a copy, one after another, and see each one found

Run it through scripts/lint-deploy.sh, which installs what it needs: PyYAML, jsonschema, check-jsonschema (for the
Compose Specification's schema), kubernetes-validate (for the schemas of Kubernetes), and on PATH yamllint, shellcheck,
kubectl (for its kustomize) and promtool.

Exits 0 when nothing was found, 1 when something was, 2 when a tool is missing or on wrong usage.
"""

import argparse
import pathlib
import shutil
import sys

from deploy_checks import compose, configuration, faults, image, kubernetes, observability, site

# Name, what is checked, function. A function takes the Site, reports problems to it and returns what it looked at.
CHECKS = [
    ("yaml", "YAML and JSON parse, yamllint", configuration.check_syntax),
    ("compose-schema", "Compose Specification schema", compose.check_schema),
    ("compose", "compose: health checks, pins, scaling, references, settings", compose.check_structure),
    ("image", "Dockerfiles and build context", image.check_images),
    ("redis", "Redis roles", configuration.check_redis),
    ("postgres", "Postgres durability", configuration.check_postgres),
    ("collector", "OTel collector pipelines", configuration.check_collector),
    ("kubernetes", "kustomize overlays against Kubernetes' schemas, references, scaling", kubernetes.check_overlays),
    ("rules", "Prometheus configuration, alert rules and their tests", observability.check_rules),
    ("dashboards", "Grafana dashboards and metric names", observability.check_dashboards),
    ("drift", "metrics, settings and runbook against code and docs", observability.check_drift),
    ("scripts", "shellcheck", configuration.check_scripts),
]
TOOLS = ["yamllint", "shellcheck", "kubectl", "promtool"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--self-test", action="store_true", help="plant faults in a copy and see each one found")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        print(f"check_deploy: not on PATH: {', '.join(missing)}; run scripts/lint-deploy.sh", file=sys.stderr)
        return 2
    if arguments.self_test:
        return faults.self_test(arguments.root, {name: function for name, _, function in CHECKS})

    failed = 0
    for _, title, function in CHECKS:
        here = site.Site(arguments.root)
        looked_at = site.run_check(here, function)
        print(f"{'✗' if here.problems else '✓'} {title}: {looked_at}")
        for problem in here.problems:
            print(f"    {problem}")
        failed += bool(here.problems)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
