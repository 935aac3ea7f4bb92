"""The kustomize overlays, rendered: valid by Kubernetes' schemas, and consistent with each other."""

import functools
import json
import re

import jsonschema
import kubernetes_validate

from .observability import check_grammar, check_query
from .site import REQUIRED, ROLES, check_drain, check_environment, parse_all, pinned

# The oldest release of Kubernetes that the manifests are written for.
VERSION = "1.30"
# Secrets that production gets from outside (overlays/production/kustomization.yaml says so), with their keys.
GIVEN_SECRETS = {"production": {"flotilla": REQUIRED, "grafana": {"admin-password"}}, "dev": {}}
WORKLOADS = {"Deployment", "StatefulSet", "Job"}
# What KEDA's own validation asks of a ScaledObject, as far as it is used here.
SCALED_OBJECT = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {key: {"type": "string"} for key in ("apiVersion", "kind", "name", "envSourceContainerName")},
        },
        "pollingInterval": {"type": "integer", "minimum": 1},
        "cooldownPeriod": {"type": "integer", "minimum": 0},
        "initialCooldownPeriod": {"type": "integer", "minimum": 0},
        "idleReplicaCount": {"type": "integer", "minimum": 0},
        "minReplicaCount": {"type": "integer", "minimum": 0},
        "maxReplicaCount": {"type": "integer", "minimum": 1},
        "fallback": {
            "type": "object",
            "required": ["failureThreshold", "replicas"],
            "additionalProperties": False,
            "properties": {
                "failureThreshold": {"type": "integer", "minimum": 1},
                "replicas": {"type": "integer", "minimum": 0},
                "behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
            },
        },
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "restoreToOriginalReplicaCount": {"type": "boolean"},
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"name": {"type": "string"}, "behavior": {"type": "object"}},
                },
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "metadata"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "prometheus"},
                    "name": {"type": "string"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "metadata": {
                        "type": "object",
                        "required": ["serverAddress", "query", "threshold"],
                        # Numbers and booleans must be quoted: the field is a map of strings.
                        "additionalProperties": {"type": "string"},
                    },
                },
            },
        },
    },
}


def check_overlays(here):
    counts = []
    for overlay, namespace in here.overlays.items():
        where = f"deploy/kubernetes/overlays/{overlay}"
        resources = [r for r in parse_all(here.tool(where, "kubectl", "kustomize", where)) if r]
        if not resources:
            return "stopped"
        Overlay(here, where, overlay, namespace, resources).check()
        counts.append(f"{overlay} {len(resources)}")
    check_example(here)
    return ", ".join(counts) + f" resources, Kubernetes {VERSION}"


def check_example(here):
    file = "deploy/kubernetes/base/secret.example.yaml"
    example = here.yaml(file)
    keys = set(example["stringData"])
    check_environment(here, file, keys)
    for name in sorted(REQUIRED - keys):
        here.bad(file, f"{name} is not shown")
    validate(here, file, example)


def validate(here, where, resource):
    if resource["apiVersion"].startswith("keda.sh/"):
        for error in jsonschema.Draft202012Validator(SCALED_OBJECT).iter_errors(resource["spec"]):
            here.bad(where, f"spec.{'.'.join(map(str, error.path))}: {error.message[:200]}")
        return
    problem = against_schema(json.dumps(resource, sort_keys=True))
    if problem:
        here.bad(where, problem)


@functools.cache  # the self-test renders the same resources a hundred times
def against_schema(resource):
    try:
        kubernetes_validate.validate(json.loads(resource), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return error.message
    return None


def labels_match(selector, labels):
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions") or []:
        if expression["operator"] != "In" or labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


class Overlay:
    """One rendered overlay."""

    def __init__(self, here, where, name, namespace, resources):
        self.here, self.where, self.name, self.namespace, self.resources = here, where, name, namespace, resources
        self.workloads = self.of(*WORKLOADS)

    def of(self, *kinds):
        return [resource for resource in self.resources if resource["kind"] in kinds]

    def at(self, resource):
        return f"{self.where} {resource['kind']}/{resource['metadata']['name']}"

    def bad(self, resource, what):
        self.here.bad(self.at(resource), what)

    def check(self):
        seen = set()
        for resource in self.resources:
            key = (resource["kind"], resource["metadata"]["name"])
            if key in seen:
                self.bad(resource, "is defined twice")
            seen.add(key)
            validate(self.here, self.at(resource), resource)
            if resource["kind"] != "Namespace" and resource["metadata"].get("namespace") != self.namespace:
                self.bad(resource, f"is not in namespace {self.namespace}")
        for kind, name in (("Deployment", "producer"), ("Deployment", "worker"), ("Job", "migrate"),
                           ("ScaledObject", "worker"), ("PodDisruptionBudget", "worker")):  # fmt: skip
            if (kind, name) not in seen:
                self.here.bad(self.where, f"{kind}/{name} is missing")
        for workload in self.workloads:
            self.check_workload(workload)
        for service in self.of("Service"):
            self.check_service(service)
        for scaled in self.of("ScaledObject"):
            self.check_scaling(scaled)
        for policy in self.of("NetworkPolicy"):
            self.check_policy(policy)
        for budget in self.of("PodDisruptionBudget"):
            if not self.selected(budget["spec"]["selector"]):
                self.bad(budget, "selects no pods")

    def selected(self, selector):
        return [w for w in self.workloads if labels_match(selector, w["spec"]["template"]["metadata"]["labels"])]

    def check_workload(self, workload):
        spec, template = workload["spec"], workload["spec"]["template"]
        if "selector" in spec and not labels_match(spec["selector"], template["metadata"]["labels"]):
            self.bad(workload, "its selector does not match its own pods")
        pod = template["spec"]
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            self.bad(workload, "may run as root: runAsNonRoot")
        if pod.get("securityContext", {}).get("seccompProfile", {}).get("type") != "RuntimeDefault":
            self.bad(workload, "has no seccompProfile")
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        for container in pod["containers"]:
            self.check_container(workload, container, volumes)
        for kind, name, keys in self.references(pod):
            self.check_reference(workload, kind, name, keys)
        if pod["containers"][0]["image"].rpartition("/")[2].startswith("flotilla:"):
            self.check_flotilla(workload, pod)

    def check_container(self, workload, container, volumes):
        if not pinned(container["image"]):
            self.bad(workload, f"image {container['image']} is not pinned to a version")
        if workload["kind"] != "Job":
            for probe in ("readinessProbe", "livenessProbe"):
                if probe not in container:
                    self.bad(workload, f"container {container['name']} has no {probe}")
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
            self.bad(workload, f"container {container['name']} needs requests of cpu and memory and a memory limit")
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
            self.bad(workload, f"container {container['name']} keeps privileges it does not need")
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                self.bad(workload, f"mounts volume {mount['name']}, which is not defined")
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                self.bad(workload, f"{probe} asks port {port}, which the container does not name")

    def references(self, pod):
        """The ConfigMaps and Secrets that a pod needs: kind, name and keys."""
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"], set()
        for container in pod["containers"]:
            for source in container.get("envFrom", []):
                for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                    if field in source:
                        yield kind, source[field]["name"], set()
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    yield "Secret", reference["name"], {reference["key"]}

    def keys(self, kind, name):
        """The keys of a ConfigMap or Secret, or None where there is none."""
        if kind == "Secret" and name in GIVEN_SECRETS[self.name]:
            return set(GIVEN_SECRETS[self.name][name])
        for resource in self.of(kind):
            if resource["metadata"]["name"] == name:
                return set(resource.get("data", {})) | set(resource.get("stringData", {}))
        return None

    def check_reference(self, workload, kind, name, keys):
        found = self.keys(kind, name)
        if found is None:
            self.bad(workload, f"needs {kind} {name}, which nobody makes")
        elif not keys <= found:
            self.bad(workload, f"{kind} {name} has no {', '.join(sorted(keys - found))}")

    def check_flotilla(self, workload, pod):
        container = pod["containers"][0]
        role = container["args"][0]
        if role not in ROLES:
            self.bad(workload, f"unknown subcommand {role!r}")
            return
        own = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
        names = set(own)
        for kind, name, _ in self.references(pod):
            names |= self.keys(kind, name) or set()
        check_environment(self.here, self.at(workload), names)
        for name in sorted(REQUIRED - names):
            self.bad(workload, f"{name} is not set")
        # The default is one thread for each core of the node, which a pod shares with others.
        if ROLES[role] and "FLOTILLA_EMBEDDER_THREADS" not in names:
            self.bad(workload, "FLOTILLA_EMBEDDER_THREADS is not set: the model would take every core of the node")
        if ROLES[role]:
            setting, port = ROLES[role]
            if own.get(setting) != f"0.0.0.0:{port}" or container["ports"][0]["containerPort"] != port:
                self.bad(workload, f"must listen on 0.0.0.0:{port} ({setting}) and name that port")
            for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
                if container.get(probe, {}).get("httpGet", {}).get("path") != path:
                    self.bad(workload, f"{probe} must ask {path}")
        if role == "worker":
            check_drain(self.here, self.at(workload), own, pod.get("terminationGracePeriodSeconds", 30))

    def check_service(self, service):
        spec = service["spec"]
        pods = self.selected({"matchLabels": spec["selector"]})
        if not pods:
            self.bad(service, "selects no pods")
        for pod in pods:
            names = {p["name"] for c in pod["spec"]["template"]["spec"]["containers"] for p in c.get("ports", [])}
            for port in spec["ports"]:
                if port["targetPort"] not in names:
                    self.bad(service, f"targetPort {port['targetPort']} is no port of {pod['metadata']['name']}")

    def check_scaling(self, scaled):
        spec = scaled["spec"]
        target = [d for d in self.of("Deployment") if d["metadata"]["name"] == spec["scaleTargetRef"]["name"]]
        if not target:
            self.bad(scaled, f"scales {spec['scaleTargetRef']['name']}, which does not exist")
        elif "replicas" in target[0]["spec"]:
            self.bad(target[0], "sets replicas, and KEDA does too: each apply would undo the scaling")
        low, high = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
        if not 1 <= low <= spec.get("fallback", {}).get("replicas", low) <= high:
            self.bad(scaled, "must keep 1 <= minReplicaCount <= fallback.replicas <= maxReplicaCount")
        for trigger in spec["triggers"]:
            metadata = trigger["metadata"]
            if "queue_depth" not in check_query(self.here, self.at(scaled), metadata["query"]):
                self.bad(scaled, "does not scale on queue_depth")
            check_grammar(self.here, self.at(scaled), [metadata["query"]])
            host = re.match(r"http://([\w-]+)\.([\w-]+)\.svc", metadata["serverAddress"])
            services = {(s["metadata"]["name"], self.namespace) for s in self.of("Service")}
            if not host or host.groups() not in services:
                self.bad(scaled, f"asks {metadata['serverAddress']}, which is no service of this overlay")
            if metadata.get("ignoreNullValues") != "false":
                self.bad(scaled, 'a missing metric would count as an empty queue: ignoreNullValues: "false"')

    def check_policy(self, policy):
        selectors = [policy["spec"]["podSelector"]]
        for rule in policy["spec"].get("ingress", []):
            selectors += [peer["podSelector"] for peer in rule.get("from", []) if "podSelector" in peer]
        for selector in selectors:
            if selector and not self.selected(selector):
                self.bad(policy, f"selects no pods with {selector}")
