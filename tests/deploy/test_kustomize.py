"""Manifests: every overlay renders, fits the schemas of what it asks for, and speaks of nothing that is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.istio.networking import v1 as istio
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

from service.stores.connection import url
from service.stores.connection.checks import check
from service.stores.connection.pools import connect
from tests.deploy.manifests import (
    ADAPTER,
    COMPONENTS,
    KUSTOMIZE,
    OVERLAYS,
    README,
    Object,
    container,
    faults,
    filled,
    of_kind,
    overlay,
    render,
    secrets,
    service_pod,
    settings_of,
)
from tests.deploy.observability import ROOT, RULES, read
from tests.support.servers import BINARIES, wait_until_listening

VERSION = "1.34"
"""Of Kubernetes, whose schemas objects are held to."""

CUSTOM: dict[tuple[str, str], type[Any]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitor,
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("networking.istio.io/v1", "DestinationRule"): istio.DestinationRule,
    ("networking.istio.io/v1", "VirtualService"): istio.VirtualService,
}
"""Kinds that Kubernetes itself does not have."""


def fits(one: Object) -> None:
    """Return if an object fits its schema, without a field that it does not know."""
    custom = CUSTOM.get((one["apiVersion"], one["kind"]))
    if custom is None:
        kubernetes_validate.validate(one, VERSION, strict=True)
    else:
        known = custom.model_validate(one).model_dump(mode="json", by_alias=True, exclude_unset=True)
        if unknown := sorted(set(_places(one)) - set(_places(known))):
            raise ValueError(f"{one['kind']} has no {unknown}")


def _places(node: object, place: str = "") -> Iterator[str]:
    """Yield where an object holds something."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield f"{place}.{name}"
        yield from _places(value, f"{place}.{name}")


@pytest.fixture(params=OVERLAYS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Every overlay --------------------------------------------------------------------------------------------------------


def test_every_object_of_an_overlay_fits_its_schema(name: str) -> None:
    objects = overlay(name)
    assert {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"} <= {
        one["kind"] for one in objects
    }
    for one in objects:
        fits(one)


def test_an_overlay_speaks_of_nothing_that_the_service_lacks(name: str) -> None:
    assert faults(overlay(name)) == []


def test_a_change_of_settings_rolls_the_pods(name: str) -> None:
    assert re.fullmatch(r"dmn-settings-\w{10}", container(overlay(name))["envFrom"][0]["configMapRef"]["name"])


def test_every_component_is_part_of_an_overlay_or_fits_to_one(tmp_path: Path) -> None:
    used = {part for name in OVERLAYS for part in _components(KUSTOMIZE / "overlays" / name)}
    for left in set(COMPONENTS) - used:
        objects = render(_own(tmp_path / left, resources=["overlays/redis"], components=[f"components/{left}"]))
        for one in objects:
            fits(one)
        assert faults(objects) == []


def _components(folder: Path) -> set[str]:
    return {Path(part).name for part in read(folder / "kustomization.yaml").get("components", ())}


def _own(folder: Path, *, resources: list[str], **more: Any) -> Path:
    """Write a folder that starts from some of ours, and return it."""
    folder.mkdir(parents=True)
    told = {"resources": resources, **more}
    for key in ("resources", "components"):
        if key in told:
            told[key] = [os.path.relpath(KUSTOMIZE / part, folder) for part in told[key]]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(told))
    return folder


def test_weights_from_a_volume_are_read_where_the_image_looks_for_them(tmp_path: Path) -> None:
    objects = render(_own(tmp_path / "own", resources=["overlays/redis"], components=["components/weights"]))
    env = re.search(r"HF_HOME=(\S+)", (ROOT / "docker" / "Dockerfile").read_text().rpartition("FROM")[2])
    assert env
    for own in (container(objects), of_kind(objects, "Job")[0]["spec"]["template"]["spec"]["containers"][0]):
        mounts = {one["name"]: one for one in own["volumeMounts"]}
        assert mounts["weights"]["mountPath"] == env[1]
    assert container(objects)["volumeMounts"][-1].get("readOnly") or True


# What differs ---------------------------------------------------------------------------------------------------------


def test_each_overlay_is_what_its_name_says() -> None:
    told = {name: overlay(name) for name in OVERLAYS}
    assert settings_of(told["embedded"])["DMN_STORE"] == "embedded"
    assert of_kind(told["embedded"], "Deployment")[0]["spec"]["strategy"] == {"type": "Recreate"}
    assert [one["metadata"]["name"] for one in of_kind(told["valkey"], "StatefulSet")] == ["dmn-valkey"]
    assert of_kind(told["redis"], "HorizontalPodAutoscaler")
    assert of_kind(told["cluster"], "ScaledObject")[0]["spec"]["minReplicaCount"] == 3
    zones, nodes = service_pod(told["cluster"])["topologySpreadConstraints"]
    assert (zones["topologyKey"], zones["whenUnsatisfiable"]) == ("topology.kubernetes.io/zone", "DoNotSchedule")
    assert (nodes["topologyKey"], nodes["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert container(told["gpu"])["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(told["gpu"])["DMN_DEVICE"] == "cuda"


def test_without_a_store_of_its_own_a_service_is_told_of_one_by_a_secret(name: str) -> None:
    assert (("dmn-store", "url") in secrets(overlay(name))) is (name != "embedded")


def test_a_service_may_call_a_store_of_every_kind_at_its_usual_port(name: str) -> None:
    (policy,) = (one for one in of_kind(overlay(name), "NetworkPolicy") if one["metadata"]["name"] == "dmn")
    let_out = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert {port for port in url._PORTS.values() if port} <= let_out


# Wrong ones -----------------------------------------------------------------------------------------------------------

POD = ("spec", "template", "spec")
OWN = (*POD, "containers", 0)
METRIC = ("spec", "metrics", 0, "pods")
TRIGGER = ("spec", "triggers", 0, "metadata")
CREDENTIALS = ("spec", "endpoints", 0, "authorization", "credentials")
HASH = ("spec", "trafficPolicy", "loadBalancer", "consistentHash")
ROUTE = ("spec", "http", 0, "route", 0, "destination")
GONE = object()
WRONG: list[tuple[str, str, tuple[str | int, ...], object, str]] = [
    ("redis", "Deployment", (*OWN, "image"), "dmn-clip-service:latest", "there is no image dmn-clip-service:latest"),
    ("gpu", "Deployment", (*OWN, "image"), "dmn-clip-service:0.1.0-cpu", "not that of the device"),
    ("redis", "ConfigMap", ("data", "DMN_ENCODERS"), "lite", "DMN_ENCODERS is no setting"),
    ("redis", "ConfigMap", ("data", "DMN_PORT"), "eighty", "DMN_PORT: "),
    ("redis", "ConfigMap", ("data", "DMN_AUTH"), "open", "lets anyone"),
    ("redis", "ConfigMap", ("data", "DMN_DRAIN_TIMEOUT_S"), "60", "a pod that stops may need"),
    ("redis", "ConfigMap", ("data", "DMN_DEADLINE_MS"), "40000", "a call may take longer"),
    ("redis", "ConfigMap", ("data", "DMN_OPERATOR_KEY_FILE"), "/run/secrets/dmn/key", "there is no file"),
    ("redis", "Deployment", (*OWN, "env", 0, "name"), "DMN_STORES", "nothing says where memories live"),
    ("redis", "Deployment", (*OWN, "env", 0, "valueFrom", "secretKeyRef", "key"), "uri", "what Secret dmn-store holds"),
    ("redis", "Deployment", (*OWN, "envFrom", 0, "configMapRef", "name"), "dmn", "there is no ConfigMap dmn"),
    ("redis", "Deployment", (*OWN, "volumeMounts", 2), GONE, "volume tmp is not both"),
    ("redis", "Deployment", (*OWN, "volumeMounts", 1, "mountPath"), "/var/cache", "nothing can be written to /cache"),
    ("embedded", "PersistentVolumeClaim", ("metadata", "name"), "data", "there is no claim dmn-data"),
    ("redis", "Deployment", (*OWN, "ports", 0, "containerPort"), 80, "the port is not that of DMN_PORT"),
    ("redis", "Service", ("spec", "ports", 0, "targetPort"), "web", "Service dmn leads nowhere"),
    ("redis", "Service", ("spec", "selector", "app.kubernetes.io/name"), "clip", "Service dmn leads nowhere"),
    ("redis", "NetworkPolicy", ("spec", "ingress", 0, "ports", 0, "port"), "web", "there is no port web"),
    ("redis", "PodDisruptionBudget", ("spec", "selector", "matchLabels"), {"a": "b"}, "is of no pods"),
    ("redis", "Deployment", (*OWN, "livenessProbe", "httpGet", "path"), "/health", "livenessProbe does not ask /livez"),
    ("redis", "Deployment", (*OWN, "startupProbe", "failureThreshold"), 3, "five minutes to load is killed"),
    ("redis", "Deployment", (*POD, "terminationGracePeriodSeconds"), 30, "a pod that stops may need 70 s"),
    ("gpu", "Deployment", (*POD, "terminationGracePeriodSeconds"), 75, "a pod that stops may need 130 s"),
    ("embedded", "Deployment", (*POD, "terminationGracePeriodSeconds"), 75, "a pod that stops may need 130 s"),
    ("redis", "Deployment", (*POD, "securityContext", "runAsNonRoot"), GONE, "more than it has to be"),
    ("redis", "Deployment", (*POD, "enableServiceLinks"), GONE, "Services would set settings"),
    ("redis", "Deployment", (*OWN, "securityContext", "readOnlyRootFilesystem"), False, "may do more"),
    ("redis", "Deployment", (*OWN, "resources", "limits"), {}, "may take what it likes"),
    ("redis", "Deployment", ("spec", "replicas"), 3, "either the Deployment or an autoscaler"),
    ("embedded", "Deployment", ("spec", "replicas"), 2, "would each have others"),
    ("redis", "HorizontalPodAutoscaler", ("spec", "scaleTargetRef", "name"), "clip", "scales nothing"),
    (
        "redis",
        "HorizontalPodAutoscaler",
        (*METRIC, "metric", "name"),
        "dmn_queue",
        "the adapter is told of no dmn_queue",
    ),
    ("cluster", "ScaledObject", (*TRIGGER, "query"), 'sum(dmn_queue_s{job="dmn"})', "nobody has dmn_queue_s"),
    ("cluster", "ScaledObject", (*TRIGGER, "query"), 'sum(dmn_queue_images{op="x"})', "nobody has dmn_queue_images"),
    ("redis", "ServiceMonitor", ("spec", "jobLabel"), "app", "Prometheus would not call the job dmn"),
    ("redis", "ServiceMonitor", ("spec", "endpoints", 0, "path"), "/stats", "Prometheus would ask somewhere else"),
    ("redis", "ServiceMonitor", (*CREDENTIALS, "key"), "token", "what Secret dmn-metrics holds in token"),
    ("cluster", "DestinationRule", ("spec", "host"), "clip", "there is no Service clip"),
    ("cluster", "DestinationRule", (*HASH, "httpHeaderName"), "X-Customer", "heeds no such header"),
    ("cluster", "VirtualService", (*ROUTE, "port", "number"), 8000, "calls would be sent nowhere"),
    ("valkey", "StatefulSet", (*OWN, "image"), "valkey/valkey:9.9", "there is no image valkey/valkey:9.9"),
]
UNFIT: list[tuple[str, str, tuple[str | int, ...], object]] = [
    ("redis", "Deployment", (*OWN, "livenessProbes"), {}),
    ("redis", "Deployment", (*OWN, "ports", 0, "containerPort"), "http"),
    ("redis", "HorizontalPodAutoscaler", ("spec", "maxReplicas"), GONE),
    ("redis", "NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
    ("redis", "ServiceMonitor", ("spec", "endpoints", 0, "authorisation"), {}),
    ("redis", "ServiceMonitor", ("spec", "selector"), GONE),
    ("cluster", "ScaledObject", ("spec", "minReplicas"), 3),
    ("cluster", "ScaledObject", (*TRIGGER, "threshold"), 0.25),
    ("cluster", "DestinationRule", (*HASH, "httpHeader"), "X-Tenant"),
    ("cluster", "VirtualService", (*ROUTE, "port", "number"), "eighty"),
]


@pytest.mark.parametrize(("name", "kind", "path", "value", "said"), WRONG)
def test_what_the_service_does_not_know_is_found(
    name: str, kind: str, path: tuple[str | int, ...], value: object, said: str
) -> None:
    told = faults(changed(overlay(name), kind, path, value))
    assert any(said in fault for fault in told), told


@pytest.mark.parametrize(("name", "kind", "path", "value"), UNFIT)
def test_an_object_that_does_not_fit_its_schema_is_found(
    name: str, kind: str, path: tuple[str | int, ...], value: object
) -> None:
    (one, *_) = of_kind(changed(overlay(name), kind, path, value), kind)
    with pytest.raises((kubernetes_validate.ValidationError, ValueError)):
        fits(one)


def changed(objects: list[Object], kind: str, path: tuple[str | int, ...], value: object) -> list[Object]:
    """Return objects, the first of a kind with something else at a place; of ConfigMaps, that of the settings."""
    found = of_kind(objects, kind)
    node: Any = next((one for one in found if one["metadata"]["name"].startswith("dmn-settings")), found[0])
    for part in path[:-1]:
        node = node[part]
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return objects


# Beside the overlays --------------------------------------------------------------------------------------------------

PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Prometheus, is not installed")
def test_what_autoscalers_ask_prometheus_can_be_read_and_where_nobody_calls_nobody_waits(tmp_path: Path) -> None:
    """Both count the images of two pods: of one the mean wait is half a second, the other has none."""
    (rule,) = read(ADAPTER)
    (trigger,) = of_kind(overlay("cluster"), "ScaledObject")[0]["spec"]["triggers"]
    rows = {"a": ("0+30x10", "0+60x10"), "b": ("0x10", "0x10")}
    labels = 'job="dmn", namespace="dmn", stage="queue"'
    series = [
        {"series": f'dmn_stage_duration_seconds_{what}{{{labels}, pod="{pod}"}}', "values": values[at]}
        for pod, values in rows.items()
        for at, what in enumerate(("sum", "count"))
    ]
    expected = [
        (filled(rule["metricsQuery"]), [{"labels": '{pod="a"}', "value": 0.5}, {"labels": '{pod="b"}', "value": 0}]),
        (trigger["metadata"]["query"], [{"labels": "{}", "value": 0.5}]),
        (trigger["metadata"]["query"].replace('"queue"', '"none"'), [{"labels": "{}", "value": 0}]),
    ]
    asked = [{"expr": query, "eval_time": "8m", "exp_samples": found} for query, found in expected]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": asked}
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [case]}))
    told = subprocess.run([str(PROMTOOL), "test", "rules", file], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_both_autoscalers_mean_the_same() -> None:
    (pods,) = of_kind(overlay("redis"), "HorizontalPodAutoscaler")[0]["spec"]["metrics"]
    (trigger,) = of_kind(overlay("cluster"), "ScaledObject")[0]["spec"]["triggers"]
    assert pods["pods"]["target"]["averageValue"] == f"{1000 * float(trigger['metadata']['threshold']):.0f}m"


@pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")
async def test_the_valkey_that_comes_with_it_is_one_that_the_service_takes(tmp_path: Path) -> None:
    """Its own command, but for where its data lies and how it is reached here."""
    (own,) = of_kind(overlay("valkey"), "StatefulSet")[0]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "valkey-server").symlink_to(str(BINARIES["valkey"]))
    line = own["args"][0].replace("/data", str(tmp_path)) + f" --port 0 --unixsocket {tmp_path}/s.sock"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VALKEY_PASSWORD": "secret"}
    command = [*own["command"], line]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:  # noqa: ASYNC220 - nobody else waits
        try:
            wait_until_listening(process, tmp_path / "s.sock")
            client = connect(f"unix://:secret@{tmp_path}/s.sock")
            await check(client)
            told = {name: (await client.config_get(name))[name] for name in ("appendonly", "appendfsync", "maxmemory")}
            assert told == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory": str(3 << 30)}
            await client.aclose()
        finally:
            process.terminate()


# What the README says to do -------------------------------------------------------------------------------------------


def test_a_folder_as_the_readme_has_it_renders_with_ones_own_registry_and_namespace(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n# kustomization.yaml.*?\n(.*?)```", README.read_text(), re.DOTALL)
    text = "\n".join(blocks)
    (tmp_path / "dmn-clip-service").symlink_to(ROOT)
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(text.replace("../dmn-clip-service", os.path.relpath(ROOT, own)))
    objects = render(own)
    assert {one["metadata"]["namespace"] for one in objects} == {"dmn"}
    assert container(objects)["image"] == "registry.example.org/dmn-clip-service:0.1.0-cpu"
    assert settings_of(objects)["DMN_LOG_LEVEL"] == "warning"
    for one in objects:
        fits(one)


def test_the_secrets_that_the_readme_makes_are_those_that_overlays_ask_for() -> None:
    text = README.read_text().replace("\\\n", " ")
    made = {
        (secret, key)
        for secret, rest in re.findall(r"create secret generic ([\w-]+) (.*)", text)
        for key in re.findall(r"--from-literal=(\w+)=", rest)
    }
    assert made == {pair for name in OVERLAYS for pair in secrets(overlay(name))}


def test_the_rules_become_a_resource_of_the_operator_by_the_line_of_the_readme() -> None:
    (loop,) = re.findall(r"^for name in recording alerts; do\n.*?^done", README.read_text(), re.DOTALL | re.MULTILINE)
    told = subprocess.run(["/bin/sh", "-c", loop], cwd=ROOT, capture_output=True, text=True, check=True)
    objects = [one for one in yaml.safe_load_all(told.stdout) if one]
    assert [one["spec"] for one in objects] == [read(RULES / f"{name}.yml") for name in ("recording", "alerts")]
    for one in objects:
        PrometheusRule.model_validate(one)


def test_every_overlay_and_component_that_the_readme_names_is_there() -> None:
    text = README.read_text()
    assert set(re.findall(r"components/(\w+)", text)) <= set(COMPONENTS)
    for name in OVERLAYS:
        assert f"\n| `{name}` |" in text
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (README.parent / link).exists(), link
