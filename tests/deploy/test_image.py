"""Images: their files lint, pin and agree; and their own lines, run without a container engine, make one that serves.

The lines run in `tests/deploy/container.py`. What they install is real and checked against the lock, but was fetched
before, in the way that this machine has; and torch, of a few gigabytes, is the one that these tests run with: the lines
install a wheel that says where it is. CLIP is the one that images have by default, with weights that are random.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from packaging.requirements import Requirement

from core.encoders import openclip
from tests.deploy.container import Builder, Image, Volumes, first, healthy, read_stages, read_steps, started
from tests.deploy.dockers import DOCKER, DOCKERFILE, PROJECT
from tests.deploy.observability import ROOT
from tests.support.fakes import picture
from tests.support.process import URL

LOCKS = {file.stem: file for file in (DOCKER / "requirements").glob("*.txt")}
EXTRAS = {"cpu": ("lite", "embedded", "cpu", "otel"), "cuda": ("lite", "embedded", "otel")}
TORCH = ("torch", "torchvision")
PATIENCE_S = 180.0
FETCH_S = 600.0
"""How long 300 MB of wheels may take to come."""

KEY = "an-operators-key-for-tests"


# Lint -----------------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    told = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


# The lock -------------------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    """Return the versions of a list, by name."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", LOCKS[name].read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["build", "cpu", "cuda"])
def test_everything_that_is_installed_is_pinned_with_its_hashes(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", LOCKS[name].read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins(name)) > 0
    assert all(re.fullmatch(r"[\w.-]+==\S+( ; .*?)?( --hash=sha256:[0-9a-f]{64})+", line) for line in lines)


def test_no_list_names_an_index() -> None:
    assert not [name for name, file in LOCKS.items() if re.search(r"://|^--", file.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("image", EXTRAS)
def test_the_lock_has_what_the_service_and_its_extras_ask_for(image: str) -> None:
    """A requirement that is new in `pyproject.toml` fails here until `scripts/lock_images.py` has run."""
    have = pins(image) | pins("torch")
    asked = [
        *PROJECT["dependencies"],
        *(one for extra in EXTRAS[image] for one in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert have[name] in requirement.specifier, requirement


def test_both_images_have_the_same_versions() -> None:
    cpu, cuda = pins("cpu") | pins("torch"), pins("cuda")
    assert {name: cpu[name] for name in cpu if name in cuda} == {name: cuda[name] for name in cpu if name in cuda}
    assert set(pins("torch")) == set(TORCH) <= set(cuda)


def test_the_image_for_cpus_leaves_out_what_gpus_need() -> None:
    assert not [name for name in pins("cpu") if name.startswith(("nvidia-", "cuda-", "triton")) or name in TORCH]
    assert [name for name in pins("cuda") if name.startswith("nvidia-")]


# The Dockerfile -------------------------------------------------------------------------------------------------------


def test_every_file_that_is_copied_is_there_and_let_through() -> None:
    let = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        step.rest.split()[:-1] for step in read_steps(DOCKERFILE) if step.word == "COPY" and "--from" not in step.rest
    ]
    files = [file for part in copied for file in part]
    assert files
    for file in files:
        assert (ROOT / file).exists(), file
        assert any(file == name or file.startswith(f"{name}/") for name in let), file
    assert all(any(file == name or file.startswith(f"{name}/") for file in files) for name in let)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_last_stage_installs_nothing_and_is_nobody_special(device: str) -> None:
    last = read_stages(DOCKERFILE, {"DEVICE": device})[-1]
    assert not re.search(r"pip install|apt-get", " ".join(step.rest for step in last.steps if step.word == "RUN"))
    (user,) = (step.rest for step in last.steps if step.word == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_each_device_has_packages_of_its_own() -> None:
    for device in ("cpu", "cuda"):
        stages = {stage.name: stage for stage in read_stages(DOCKERFILE, {"DEVICE": device})}
        assert stages["installed"].base == f"packages-{device}"
        lines = " ".join(step.rest for step in stages[f"packages-{device}"].steps)
        assert f"docker/requirements/{device}.txt" in lines
        assert "--require-hashes" in lines
        assert ("torch.txt" in lines) is (device == "cpu")


# The lines, run -------------------------------------------------------------------------------------------------------

with_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can lay out the root of an image")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of all wheels that the lock names, and of two that say where torch is."""
    folder = tmp_path_factory.mktemp("house")
    lists = [part for name in ("build", "cpu") for part in ("-r", str(LOCKS[name]))]
    fetch = (sys.executable, "-m", "pip", "download", "--quiet", "--timeout=30", "--no-deps", "--require-hashes")
    subprocess.run([*fetch, "--only-binary=:all:", "--dest", str(folder), *lists], check=True, timeout=FETCH_S)
    for name, version in pins("torch").items():
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{name}_of_this_machine.pth", "/torch\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def torch_here() -> Volumes:
    """Return the places of the torch of these tests, and of what it needs of CUDA, in an image."""
    packages = Path(torch.__file__).parents[1]
    names = ("torch", "torchgen", "functorch", "torchvision", "torchvision.libs", "nvidia", "triton")
    return {f"/torch/{name}": (packages / name, "ro") for name in names if (packages / name).is_dir()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a volume as the first start would fill it, but for what the weights know."""
    folder = tmp_path_factory.mktemp("weights")
    file = place_of_weights(folder)
    openclip.write_random("ViT-B-16", file)
    file.chmod(0o644)  # safetensors are written for their owner alone
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, house: Path, weights: Path) -> Image:
    """Return the image for CPUs as the lines of the Dockerfile make it.

    The line that bakes weights in finds them where it would fetch them to: a volume here, and so none are baked in.
    Nothing is compiled ahead, which takes longer than all else and changes nothing that is looked at.
    """
    builder = Builder(
        DOCKERFILE,
        ROOT,
        tmp_path_factory.mktemp("image"),
        args={"WEIGHTS": "baked"},
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/house", "PIP_COMPILE": "0"},
        volumes={"/house": (house, "ro"), "/weights": (weights, "rw"), **torch_here()},
    )
    return builder.build()


def place_of_weights(volume: Path) -> Path:
    """Return where a volume has the weights of `ViT-B-16/openai`, as the hub's client lays it out."""
    place = volume / "hub" / "models--timm--vit_base_patch16_clip_224.openai"
    (place / "snapshots" / "0").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    volume.chmod(0o755)
    return place / "snapshots" / "0" / "open_clip_model.safetensors"


class Container:
    """An image that runs, with the volumes that the Dockerfile speaks of."""

    def __init__(self, image: Image, folder: Path, weights: Path | None, **settings: str) -> None:
        self.env = {"DMN_PORT": "0", "DMN_HOST": "127.0.0.1", "DMN_OPERATOR_KEY": KEY, **settings}
        self._mounts = dict(torch_here())
        for name in ("data", "cache"):
            (folder / name).mkdir()
            os.chown(folder / name, *map(int, image.user.split(":")))
            self._mounts[f"/{name}"] = (folder / name, "rw")
        if weights is not None:
            self._mounts["/weights"] = (weights, "ro")
        self._image = image

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """Run it until the block ends."""
        with started(self._image, env=self.env, mounts=self._mounts) as process:
            yield process

    def healthy(self, process: subprocess.Popen[str]) -> bool:
        """Return what the image's check of its health says."""
        return healthy(self._image, process, self.env)

    def client(self) -> httpx.Client:
        """Return a client of it, with the operator's key."""
        key = {"Authorization": f"Bearer {KEY}"}
        url = f"http://127.0.0.1:{self.env['DMN_PORT']}"
        return httpx.Client(base_url=url, headers=key, timeout=PATIENCE_S, trust_env=False)

    def until_it_serves(self, process: subprocess.Popen[str]) -> str:
        """Return the line with which it says that it serves; from then on its port is known here, too."""
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if url := URL.search(line):
                self.env["DMN_PORT"] = url[0].rpartition(":")[2]
                return line
        raise AssertionError("".join(told))

    def told_to_stop(self, *, reading: bool) -> tuple[int, str] | None:
        """Run it and tell it to stop again and again, from the start or while it reads its weights.

        Return how it ended and what it said, or None if it served before it was told: this process was held up.
        """
        with self.running() as process:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            ends, told, signalled = time.monotonic() + PATIENCE_S, b"", False
            while process.poll() is None:
                assert time.monotonic() < ends
                with contextlib.suppress(LookupError, OSError):
                    pid = first(process)
                    if not reading or ".safetensors" in Path(f"/proc/{pid}/maps").read_text():
                        os.kill(pid, signal.SIGTERM)
                        signalled = True
                with contextlib.suppress(BlockingIOError):
                    told += os.read(process.stdout.fileno(), 1 << 16)
                if URL.search(told.decode()) and not signalled:
                    return None
                time.sleep(0.02)  # no event tells how far another process is; bounded above
            os.set_blocking(process.stdout.fileno(), True)
            return process.returncode, told.decode() + process.stdout.read()


@with_root
def test_what_the_lines_make_serves_clip_as_nobody_on_a_root_that_cannot_be_written(
    image: Image, weights: Path, tmp_path: Path
) -> None:
    own = Container(image, tmp_path, weights)
    with own.running() as process:
        assert "dmn serves ViT-B-16/openai" in own.until_it_serves(process)
        status = Path(f"/proc/{first(process)}/status").read_text()
        assert re.search(r"^Uid:(\t10001){4}$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)
        with own.client() as client:
            assert client.get("/readyz").json()["ready"]
            assert own.healthy(process)
            own.env["DMN_PORT"] = "1"
            assert not own.healthy(process)
            assert client.put("/tenants/default", json={"classes": ["red", "green"]}).status_code == 200
            body = picture("red", 0, form="JPEG", size=(320, 240))
            answer = client.post("/classify", content=body, headers={"Content-Type": "image/jpeg"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "ViT-B-16/openai"
            assert answer.json()["predictions"][0]["learned"]["outcome"] == "filled"
        assert list((tmp_path / "data" / "store").iterdir())
        os.kill(first(process), signal.SIGTERM)
        rest, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, rest
        assert "dmn.service.stopped" in rest.splitlines()[-1]


@with_root
def test_an_image_without_its_weights_says_so_in_one_line_and_ends(image: Image, tmp_path: Path) -> None:
    own = Container(image, tmp_path, None, HF_ENDPOINT="http://127.0.0.1:1")
    with own.running() as process:
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    (line,) = told.splitlines()
    assert line.startswith("dmn: ViT-B-16/openai was asked for, but its weights are not in the cache and cannot be")


@with_root
def test_weights_that_only_somebody_else_may_read_are_said_in_one_line(image: Image, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    file = place_of_weights(tmp_path / "weights")
    file.write_bytes(b"secret")
    file.chmod(0o600)
    with Container(image, tmp_path, tmp_path / "weights").running() as process:
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    (line,) = told.splitlines()
    assert re.match(r"dmn: ViT-B-16/openai was asked for, but the user that this runs as may not read /weights/", line)


@with_root
@pytest.mark.parametrize("reading", [False, True])
def test_told_to_stop_before_it_serves_it_ends_although_it_is_process_1(
    image: Image, weights: Path, tmp_path: Path, *, reading: bool
) -> None:
    """Process 1 may not listen to signals yet."""
    own = Container(image, tmp_path, weights)
    status, told = next(filter(None, (own.told_to_stop(reading=reading) for _ in range(5))))
    assert status == 128 + signal.SIGTERM, told
    assert not URL.search(told)
    assert "Traceback" not in told


@with_root
def test_nothing_in_the_image_installs_or_builds(image: Image) -> None:
    look = (
        "import importlib.util as u; print([n for n in ('pip', 'wheel', 'hatchling', 'ensurepip') if u.find_spec(n)])"
    )
    with started(replace(image, entrypoint=()), ("python", "-c", look)) as process:
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert told == "[]\n"
    assert not [file.name for file in (image.root / "opt" / "dmn" / "bin").iterdir() if file.name.startswith("pip")]


@with_root
def test_whoever_runs_it_can_write_to_volumes_alone(image: Image) -> None:
    """Some of these folders are its own, and no volume is mounted over them here."""
    line = (
        "for place in /opt/dmn /usr/local/bin /etc /data /cache /weights /tmp; do touch $place/x && echo $place; done"
    )
    with started(replace(image, entrypoint=()), ("sh", "-c", line)) as process:
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert [word for word in told.splitlines() if word.startswith("/")] == ["/tmp"]  # noqa: S108 - its own
    assert told.count("Read-only file system") == 6


@with_root
def test_without_a_volume_for_its_memories_it_says_so_in_one_line_and_ends(image: Image) -> None:
    with started(image, env={"DMN_OPERATOR_KEY": KEY}, mounts=torch_here()) as process:
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    (line,) = told.splitlines()
    assert line.startswith("dmn: The data folder /data/store cannot be used: Read-only file system.")
