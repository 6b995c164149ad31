"""`dmn bench encode`: every way that there is, in turns, and why another is not."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from core.encoders import openclip
from core.encoders.protocol import Preprocess
from core.errors import EncoderUnavailable
from core.numerics import unit
from service.bench import encode
from service.bench.output import Absent
from service.cli import bench
from service.errors import InvalidRequest

PLAN = encode.Plan(
    encoder="small",
    random="",
    backends=["torch", "onnx"],
    dtypes=["float32"],
    batches=[1, 3],
    seconds=0.01,
    device="cpu",
)
QUIET = Console(file=StringIO())


class Pool(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return unit(pictures.float().mean((2, 3)))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, runtime: openclip.Runtime, **_: object) -> SimpleNamespace:
        if runtime.backend == "onnx":
            raise EncoderUnavailable(f"{name} by onnx is not here.")
        return SimpleNamespace(
            preprocess=Preprocess(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), encode_images=Pool()
        )

    monkeypatch.setattr(openclip, "load", load)
    monkeypatch.setattr(openclip, "plain", lambda *_, **__: Pool())


@pytest.mark.usefixtures("_small")
def test_every_way_is_measured_at_every_size_and_the_others_say_why_not() -> None:
    told = encode.measure(PLAN, QUIET)
    ways = [(row["backend"], row["batch"]) for row in told["rows"]]
    assert ways == [(name, batch) for batch in (1, 3) for name in (encode.PLAIN, "torch")]
    assert told["skipped_ways"] == [{"backend": "onnx", "dtype": "float32", "why": "small by onnx is not here."}]
    for row in told["rows"]:
        assert row["images_per_second"] > 0
        assert row["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert row["calls"] >= 1
    assert all(row["ratio"] == 1 for row in told["rows"] if row["backend"] == encode.PLAIN)
    text = StringIO()
    Console(file=text, width=120).print(encode.table(told))
    assert "onnx in float32: small by onnx is not here." in text.getvalue()


@pytest.mark.parametrize(
    ("plan", "why"),
    [({"device": "cuda:99"}, "cuda:99"), ({"random": "ViT-B-61"}, "open_clip knows no model 'ViT-B-61'")],
)
def test_what_is_not_here_is_absent(plan: dict[str, str], why: str) -> None:
    asked = {name: getattr(PLAN, name) for name in encode.Plan.__dataclass_fields__}
    with pytest.raises(Absent, match=why):
        encode.measure(encode.Plan(**{**asked, **plan}), QUIET)


def test_a_model_of_random_weights_is_one_that_can_be_loaded(tmp_path: Path) -> None:
    name = openclip.write_random("ViT-S-32-alt", tmp_path / "random.safetensors")
    encoder = openclip.load(name)
    pixels = encode._pixels(2, encoder.preprocess.size)
    mean, std = (torch.tensor(of)[:, None, None] for of in (encoder.preprocess.mean, encoder.preprocess.std))
    with torch.inference_mode():
        expected = openclip.plain(name)((pixels / 255 - mean) / std)
    torch.testing.assert_close(encoder.encode_images(pixels), expected.clone(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["torch,cpp", "", ","])
def test_unknown_backends_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--backends takes some of torch,openvino,onnx"):
        bench._chosen("backends", text, encode.BACKENDS)


@pytest.mark.parametrize("text", ["1,x", "", "0", "-3", "99999"])
def test_wrong_batch_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--batches"):
        bench._sizes("batches", text, bench.MOST_AT_ONCE)
