"""What `deploy/kustomize` renders to, and what is wrong with it: `faults` names whatever the service does not know."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from service.access.api_keys import Scope
from service.api.security import NEEDS
from service.app import create_app
from service.multiprocess.supervisor import _MARGIN_S
from service.settings import Settings
from service.stores.embedded.server import _STOP_S
from tests.deploy.observability import ROOT, exposed, grouped, selected

KUSTOMIZE = ROOT / "deploy" / "kustomize"
README = ROOT / "deploy" / "README.md"
OVERLAYS = sorted(path.name for path in (KUSTOMIZE / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUSTOMIZE / "components").iterdir())
COMPOSE = ROOT / "docker" / "compose.yaml"
ADAPTER = KUSTOMIZE / "components" / "hpa" / "adapter.yaml"

Object = dict[str, Any]


# Rendering ------------------------------------------------------------------------------------------------------------


def render(folder: Path) -> list[Object]:
    """Return the objects that a folder renders to."""
    kubectl = Path(sys.executable).with_name("kubectl")
    told = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return [one for one in yaml.safe_load_all(told.stdout) if one]


@cache
def _overlay(name: str) -> str:
    return yaml.safe_dump_all(render(KUSTOMIZE / "overlays" / name))


def overlay(name: str) -> list[Object]:
    """Return a copy of what an overlay renders to."""
    return list(yaml.safe_load_all(_overlay(name)))


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    """Return the objects of a kind."""
    return [one for one in objects if one["kind"] == kind]


def service_pod(objects: Sequence[Object]) -> Object:
    """Return the pod of the service."""
    (deployment,) = of_kind(objects, "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


def container(objects: Sequence[Object]) -> Object:
    """Return the service's container."""
    (one,) = service_pod(objects)["containers"]
    return dict(one)


def settings_of(objects: Sequence[Object]) -> dict[str, str]:
    """Return the settings that the service's container has, but those that come from a Secret."""
    own = container(objects)
    (config,) = (one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"].startswith("dmn-settings"))
    plain = {one["name"]: one["value"] for one in own["env"] if "value" in one}
    return {**config["data"], **plain}


def secrets(objects: Sequence[Object]) -> set[tuple[str, str]]:
    """Return the Secrets that objects refer to, and which key of each."""
    found = {(one["name"], one["key"]) for one in _under(objects, "secretKeyRef")}
    found |= {(one["name"], one["key"]) for one in _under(objects, "credentials")}
    return found | {(one["secretName"], item["key"]) for one in _under(objects, "secret") for item in one["items"]}


def _under(node: Any, name: str) -> Iterator[Any]:
    """Yield whatever stands under a name, however deep."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == name:
                yield value
            yield from _under(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _under(value, name)


# What is wrong --------------------------------------------------------------------------------------------------------

PROBES = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
_SECRET_ROW = re.compile(r"^\| `([\w-]+)` \| `(\w+)` \|", re.MULTILINE)


def faults(objects: Sequence[Object]) -> list[str]:
    """Return what the service would not know, or would not bear, of what an overlay renders to; a sentence each."""
    wrong = list(_settings(objects))
    if wrong:
        return wrong
    checks = (_images, _references, _ports, _probes, _grace, _places, _privileges, _scaling, _asked, _routes)
    return [fault for check in checks for fault in check(objects)]


def images() -> set[str]:
    """Return the images that there are: those that the Dockerfile makes, and those of others that compose runs."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    others = {one["image"] for one in yaml.safe_load(COMPOSE.read_text())["services"].values()}
    return others | {f"dmn-clip-service:{version}-{device}" for device in ("cpu", "cuda")}


def _images(objects: Sequence[Object]) -> Iterator[str]:
    for own in _containers(objects):
        if own["image"] not in images():
            yield f"there is no image {own['image']}"
    cuda = "nvidia.com/gpu" in container(objects)["resources"]["limits"]
    if cuda is not container(objects)["image"].endswith("-cuda"):
        yield "the image is not that of the device"


def _settings(objects: Sequence[Object]) -> Iterator[str]:
    told, known = settings_of(objects), {f"DMN_{name.upper()}" for name in Settings.model_fields}
    named = {*told, *(one["name"] for one in container(objects)["env"] if one["name"].startswith("DMN_"))}
    yield from (f"{name} is no setting" for name in sorted(named - known))
    if "DMN_STORE" not in named:
        yield "nothing says where memories live"
    try:
        Settings(**{name[4:].lower(): value for name, value in told.items() if name in known})  # type: ignore[arg-type]
    except ValidationError as error:
        yield from (f"DMN_{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors())


def _references(objects: Sequence[Object]) -> Iterator[str]:
    told = set(_SECRET_ROW.findall(README.read_text()))
    yield from (f"nothing says what Secret {name} holds in {key}" for name, key in sorted(secrets(objects) - told))
    maps = {one["metadata"]["name"] for one in of_kind(objects, "ConfigMap")}
    yield from (
        f"there is no ConfigMap {one['name']}" for one in _under(objects, "configMapRef") if one["name"] not in maps
    )
    claims = {one["metadata"]["name"] for one in of_kind(objects, "PersistentVolumeClaim")}
    named = [one["claimName"] for one in _under(objects, "persistentVolumeClaim")]
    yield from (f"there is no claim {name}" for name in named if name not in claims)
    for pod in _pods(objects):
        volumes = {one["name"] for one in pod["volumes"]} if "volumes" in pod else {"data"}
        mounted = {one["name"] for own in pod["containers"] for one in own["volumeMounts"]}
        yield from (f"volume {name} is not both there and mounted" for name in sorted(volumes ^ mounted))


def _ports(objects: Sequence[Object]) -> Iterator[str]:
    own = {one["name"]: one["containerPort"] for one in container(objects)["ports"]}
    if str(own.get("http")) != settings_of(objects).get("DMN_PORT"):
        yield "the port is not that of DMN_PORT"
    pods = {_labels(pod): pod for pod in _templates(objects)}
    for one in of_kind(objects, "Service"):
        found = pods.get(frozenset(one["spec"]["selector"].items()))
        names = {port["name"] for part in found["spec"]["containers"] for port in part["ports"]} if found else set()
        yield from (
            f"Service {one['metadata']['name']} leads nowhere"
            for port in one["spec"]["ports"]
            if port["targetPort"] not in names
        )
    for one in (*of_kind(objects, "NetworkPolicy"), *of_kind(objects, "PodDisruptionBudget")):
        wanted = one["spec"].get("podSelector") or one["spec"]["selector"]
        if frozenset(wanted["matchLabels"].items()) not in pods:
            yield f"{one['kind']} {one['metadata']['name']} is of no pods"
        let = [port["port"] for rule in one["spec"].get("ingress", ()) for port in rule["ports"]]
        yield from (f"there is no port {port}" for port in let if port not in {"http", "valkey"})


def _probes(objects: Sequence[Object]) -> Iterator[str]:
    own = container(objects)
    for name, path in PROBES.items():
        asked = own.get(name, {}).get("httpGet", {})
        if asked != {"path": path, "port": "http"} or NEEDS.get(path, "") is not None:
            yield f"{name} does not ask {path}"
    start = own["startupProbe"]
    if start["periodSeconds"] * start["failureThreshold"] < 300:
        yield "an encoder that takes five minutes to load is killed before"


def _grace(objects: Sequence[Object]) -> Iterator[str]:
    told, pod = settings_of(objects), service_pod(objects)
    settings = Settings(
        **{name[4:].lower(): value for name, value in told.items() if name[4:].lower() in Settings.model_fields}
    )  # type: ignore[arg-type]
    before = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needs = before + settings.drain_delay_s + settings.drain_timeout_s + _MARGIN_S
    if settings.http_workers:
        needs += settings.drain_timeout_s + _MARGIN_S
    if settings.store == "embedded" and told.get("DMN_STORE"):
        needs += _STOP_S
    if not needs <= pod["terminationGracePeriodSeconds"] <= needs + 30:
        yield f"a pod that stops may need {needs:.0f} s"
    if settings.drain_timeout_s * 1000 < settings.deadline_ms:
        yield "a call may take longer than a pod that stops waits for it"


def _places(objects: Sequence[Object]) -> Iterator[str]:
    """Yield where the container would write, or read, and no volume is."""
    told, mounts = settings_of(objects), {one["mountPath"]: one for one in container(objects)["volumeMounts"]}
    wanted = {"/tmp", "/cache"} | ({"/data"} if told.get("DMN_STORE") == "embedded" else set())  # noqa: S108 - of the container
    yield from (f"nothing can be written to {place}" for place in sorted(wanted - set(mounts)))
    key = Path(told["DMN_OPERATOR_KEY_FILE"])
    volume = mounts.get(str(key.parent), {}).get("name")
    files = [
        item["path"]
        for one in service_pod(objects)["volumes"]
        if one["name"] == volume
        for item in one["secret"]["items"]
    ]
    if files != [key.name]:
        yield f"there is no file {key}"


def _privileges(objects: Sequence[Object]) -> Iterator[str]:
    for pod in _pods(objects):
        whole = pod["securityContext"]
        if (
            not whole.get("runAsNonRoot")
            or not whole.get("runAsUser")
            or pod.get("automountServiceAccountToken") is not False
        ):
            yield "a pod is more than it has to be"
        if pod.get("enableServiceLinks") is not False:
            yield "Services would set settings"
        for own in pod["containers"]:
            tight = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if own["securityContext"] != tight:
                yield f"the container {own['name']} may do more than it has to"
            if not {"cpu", "memory"} <= set(own["resources"]["requests"]) or "memory" not in own["resources"]["limits"]:
                yield f"the container {own['name']} may take what it likes"


def _scaling(objects: Sequence[Object]) -> Iterator[str]:
    (deployment,) = of_kind(objects, "Deployment")
    scalers = [*of_kind(objects, "HorizontalPodAutoscaler"), *of_kind(objects, "ScaledObject")]
    if len(scalers) > 1:
        yield "two autoscalers would quarrel"
    if bool(scalers) is ("replicas" in deployment["spec"]):
        yield "it has to be either the Deployment or an autoscaler that says how many pods there are"
    if settings_of(objects).get("DMN_STORE") == "embedded" and (scalers or deployment["spec"]["replicas"] != 1):
        yield "pods that keep their memories themselves would each have others"
    for one in scalers:
        if one["spec"]["scaleTargetRef"]["name"] != deployment["metadata"]["name"]:
            yield f"{one['kind']} {one['metadata']['name']} scales nothing"


def _asked(objects: Sequence[Object]) -> Iterator[str]:
    """Yield metrics and labels that nobody has, of those that autoscalers ask for."""
    rules = {rule["name"]["as"]: rule for rule in yaml.safe_load(ADAPTER.read_text())}
    names = [one["metric"]["name"] for one in _under(of_kind(objects, "HorizontalPodAutoscaler"), "pods")]
    yield from (f"the adapter is told of no {name}" for name in names if name not in rules)
    queries = [filled(rules[name]["metricsQuery"]) for name in names if name in rules]
    queries += [one["metadata"]["query"] for part in _under(objects, "triggers") for one in part]
    for query in queries:
        for series, labels in selected(query):
            if not labels | grouped(query) <= known_labels(series):
                yield f"nobody has {series} with {sorted(labels | grouped(query))}"


def filled(query: str) -> str:
    """Return a query of the adapter's as it asks it for pods."""
    return query.replace("<<.LabelMatchers>>", 'namespace="dmn", pod=~"a|b"').replace("<<.GroupBy>>", "pod")


def known_labels(series: str) -> frozenset[str]:
    """Return the labels that a series has in a cluster, none if there is no such series."""
    own = exposed().get(series, frozenset[str]())
    return own | {"namespace", "pod"} if own else own


def _routes(objects: Sequence[Object]) -> Iterator[str]:
    services = {one["metadata"]["name"]: one for one in of_kind(objects, "Service")}
    for one in of_kind(objects, "ServiceMonitor"):
        found = [
            s
            for s in services.values()
            if one["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
        ]
        if [s["metadata"]["labels"].get(one["spec"]["jobLabel"]) for s in found] != ["dmn"]:
            yield "Prometheus would not call the job dmn"
        for end in one["spec"]["endpoints"]:
            if NEEDS.get(end["path"]) is not Scope.METRICS or end["port"] != "http":
                yield "Prometheus would ask somewhere else"
    for one in of_kind(objects, "DestinationRule"):
        if one["spec"]["host"] not in services:
            yield f"there is no Service {one['spec']['host']}"
        if one["spec"]["trafficPolicy"]["loadBalancer"]["consistentHash"]["httpHeaderName"].lower() not in headers():
            yield "the service heeds no such header"
    for where in _under(of_kind(objects, "VirtualService"), "destination"):
        ports = [port["port"] for port in services.get(where["host"], {"spec": {"ports": ()}})["spec"]["ports"]]
        if where["port"]["number"] not in ports:
            yield "calls would be sent nowhere"


@cache
def headers() -> frozenset[str]:
    """Return the headers that the service's routes heed, in small letters."""
    told = create_app(Settings(store="memory")).openapi()
    asked = (one for part in _under(told["paths"], "parameters") for one in part)
    return frozenset(one["name"].lower() for one in asked if one["in"] == "header")


def _templates(objects: Sequence[Object]) -> list[Object]:
    return [one for one in _under(objects, "template") if "containers" in one["spec"]]


def _pods(objects: Sequence[Object]) -> list[Object]:
    return [one["spec"] for one in _templates(objects)]


def _containers(objects: Sequence[Object]) -> list[Object]:
    return [own for pod in _pods(objects) for own in pod["containers"]]


def _labels(template: Object) -> frozenset[tuple[str, str]]:
    return frozenset(template.get("metadata", {}).get("labels", {}).items())
