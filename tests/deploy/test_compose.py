"""The service on one machine: compose's files are valid, and every part of them is there and wired to the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from compose_spec import PyCompose

from service.multiprocess.supervisor import _MARGIN_S
from service.settings import Settings
from tests.deploy.container import read_stages
from tests.deploy.dockers import COMPOSE, DOCKER, DOCKERFILE, IMAGES, SERVICES
from tests.deploy.observability import read

FILES = ("compose.yaml", "compose.cuda.yaml")
OWN = SERVICES["dmn"]
FINAL = {step.word: step.rest for step in read_stages(DOCKERFILE, {})[-1].steps}


def volumes(name: str) -> list[tuple[str, str, str]]:
    """Return what a service mounts: from where, to where, and how."""
    parts = (one.split(":") for one in SERVICES[name]["volumes"])
    return [(source, target, mode[0] if mode else "rw") for source, target, *mode in parts]


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_valid(file: str) -> None:
    PyCompose.from_yaml((DOCKER / file).read_text()).to_spec()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("read_only: true", "readonly: true"),
        ("stop_grace_period: 70s", "stop_grace_period: soon"),
        ("condition: service_healthy", "condition: healthy"),
        ("127.0.0.1:8000:8000", "127.0.0.1:8000:http"),
        ("context: ..", "folder: .."),
    ],
)
def test_a_file_with_something_wrong_in_it_is_not(right: str, wrong: str) -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert right in text
    with pytest.raises(ValueError, match=r"services\.dmn"):
        PyCompose.from_yaml(text.replace(right, wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_whatever_a_service_mounts_is_there(name: str) -> None:
    for source, _, mode in volumes(name) if "volumes" in SERVICES[name] else ():
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert mode == "ro"
        else:
            assert source in COMPOSE["volumes"]


def test_the_service_has_settings_that_it_knows_and_a_store_that_is_there() -> None:
    env = OWN["environment"] | {"DMN_ENCODER": "lite"}
    settings = Settings(**{name.removeprefix("DMN_").lower(): value for name, value in env.items()})
    assert settings.store == "redis://valkey:6379"
    assert OWN["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert all(name.startswith("DMN_") for name in env)


def test_who_needs_no_key_comes_from_this_machine() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_it_has_a_read_only_root_and_volumes_where_the_image_writes() -> None:
    places = {target for _, target, _ in volumes("dmn")} | {one.partition(":")[0] for one in OWN["tmpfs"]}
    assert places == {"/weights", "/cache", "/tmp"}  # noqa: S108 - its own
    for service in SERVICES.values():
        assert service["read_only"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_it_is_given_the_time_that_it_needs_to_stop() -> None:
    settings = Settings()
    assert (
        int(OWN["stop_grace_period"].removesuffix("s")) >= settings.drain_delay_s + settings.drain_timeout_s + _MARGIN_S
    )


@pytest.mark.parametrize("file", FILES)
def test_what_is_built_is_what_the_dockerfile_makes(file: str) -> None:
    own = read(DOCKER / file)["services"]["dmn"]
    assert own["image"] in IMAGES
    arguments = own["build"].get("args", {"DEVICE": "cpu"})
    assert own["image"].endswith(f"-{arguments['DEVICE']}")
    assert f"packages-{arguments['DEVICE']}" in {stage.name for stage in read_stages(DOCKERFILE, arguments)}
    assert (DOCKER / OWN["build"]["context"] / OWN["build"]["dockerfile"]).resolve() == DOCKERFILE


def test_valkey_keeps_what_it_is_given() -> None:
    words = SERVICES["valkey"]["command"]
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert told == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}


def test_prometheus_has_the_rules_and_scrapes_the_service() -> None:
    mounted = {target: DOCKER / source for source, target, _ in volumes("prometheus") if source.startswith(".")}
    folder = mounted["/etc/prometheus/dmn"]
    assert "--config.file=/etc/prometheus/dmn/prometheus.yml" in SERVICES["prometheus"]["command"]
    (job,) = read(folder / "prometheus.yml")["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert (folder / file).is_file()  # it is what the other one is mounted over
    (group,) = read(mounted[f"/etc/prometheus/dmn/{file}"])
    assert group == {"targets": [f"dmn:{FINAL['EXPOSE']}"]}


def test_grafana_shows_the_dashboard_of_that_prometheus() -> None:
    mounted = {target: DOCKER / source for source, target, _ in volumes("grafana") if source.startswith(".")}
    (source,) = read(mounted["/etc/grafana/provisioning/datasources/dmn.yml"])["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in SERVICES  # type: ignore[index]  # or it fails
    (provider,) = read(mounted["/etc/grafana/provisioning/dashboards/dmn.yml"])["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert provider["options"]["path"] == str(home.parent)
    assert (mounted[str(home.parent)] / home.name).is_file()
