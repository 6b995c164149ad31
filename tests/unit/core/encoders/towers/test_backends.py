from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from core.encoders.protocol import Preprocess
from core.encoders.towers import backends, cuda_tower, export_cache
from core.encoders.towers.backends import AGREEMENT, Runtime, check_possible, image_tower, sample
from core.encoders.towers.torch_tower import PixelTower, Tower
from core.errors import EncoderUnavailable
from core.numerics import unit
from tests.support.process import ROOT

CPU = torch.device("cpu")
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
LIBRARIES = list(export_cache.LIBRARIES)

needs_a_library = pytest.mark.slow
"""Exports a tower; the libraries for it are installed for the slow tier only."""


class Small(nn.Module):
    """A convolution with a batch norm, and a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16), nn.Linear(256, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1))
        return features


def small(seed: int = 0) -> nn.Module:
    return Small(seed).eval().requires_grad_(requires_grad=False)


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def reference(visual: nn.Module, of: torch.Tensor) -> torch.Tensor:
    return unit(PixelTower(visual, PREPROCESS)(of))


def built(visual: nn.Module, runtime: Runtime, name: str = "small") -> Tower:
    return image_tower(copy.deepcopy(visual), PREPROCESS, reference(visual, sample(32)), name, runtime, CPU)


@pytest.fixture(autouse=True)
def _outside_of_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """Return the runtime of the library that exports fastest; what is kept is kept alike for all."""
    return Runtime(backend="openvino", cache=tmp_path)


@pytest.fixture(params=LIBRARIES)
def each(request: pytest.FixtureRequest, tmp_path: Path) -> Runtime:
    return Runtime(backend=request.param, cache=tmp_path)


def places(runtime: Runtime) -> list[Path]:
    assert runtime.cache is not None
    return [path for path in (runtime.cache / "towers").iterdir() if path.is_dir()]


def exports(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that every export adds its folder to."""
    library, seen = export_cache.LIBRARIES[runtime.backend], []
    export = library.export

    def noted(tower: nn.Module, example: torch.Tensor, folder: Path) -> None:
        seen.append(folder)
        export(tower, example, folder)

    monkeypatch.setattr(library, "export", noted)
    return seen


@needs_a_library
def test_a_backend_gives_the_models_features_for_batches_of_every_size(each: Runtime) -> None:
    visual = small()
    tower = built(visual, each)
    for n in (1, 3, 8, 2):
        torch.testing.assert_close(unit(tower(pixels(n))), reference(visual, pixels(n)), rtol=0, atol=1e-5)


@needs_a_library
def test_features_of_an_earlier_batch_are_not_written_over(each: Runtime) -> None:
    tower = built(small(), each)
    first = tower(pixels(2))
    before = first.clone()
    tower(pixels(2).flip(0))
    assert torch.equal(first, before)


@needs_a_library
def test_an_exported_tower_is_kept_and_found_again(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = exports(runtime, monkeypatch)
    first, second = built(small(), runtime), built(small(), runtime)
    assert len(seen) == 1
    assert torch.equal(first(pixels()), second(pixels()))


@needs_a_library
def test_another_model_or_another_version_makes_its_own(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    built(small(0), runtime, "one")
    built(small(1), runtime, "two")
    monkeypatch.setattr(export_cache, "version", lambda _: "99")
    built(small(0), runtime, "one")
    assert len(places(runtime)) == 3


@needs_a_library
def test_a_broken_tower_is_made_anew(each: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    built(small(), each)
    (place,) = places(each)
    for file in place.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    seen = exports(each, monkeypatch)
    torch.testing.assert_close(unit(built(small(), each)(pixels())), reference(small(), pixels()), rtol=0, atol=1e-5)
    assert len(seen) == 1
    assert places(each) == [place]


@needs_a_library
def test_a_kept_tower_of_other_features_is_made_anew(runtime: Runtime) -> None:
    built(small(1), runtime, "same name")
    tower = built(small(0), runtime, "same name")
    torch.testing.assert_close(unit(tower(pixels())), reference(small(0), pixels()), rtol=0, atol=1e-5)


@needs_a_library
def test_two_that_start_at_once_export_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, visual = exports(runtime, monkeypatch), small()
    with ThreadPoolExecutor(2) as threads:
        towers = list(threads.map(lambda _: built(visual, runtime), range(2)))
    assert len(seen) == 1
    assert torch.equal(*(tower(pixels()) for tower in towers))


@needs_a_library
def test_what_a_killed_process_left_half_written_is_no_tower(runtime: Runtime) -> None:
    built(small(), runtime)
    (place,) = places(runtime)
    place.rename(place.with_name(place.name + ".part"))
    built(small(), runtime)
    assert places(runtime) == [place]


@needs_a_library
def test_features_that_are_not_the_models_are_refused_and_not_kept(runtime: Runtime) -> None:
    other = reference(small(1), sample(32))
    with pytest.raises(EncoderUnavailable, match=rf"{runtime.backend} in auto .* cosine of .* at least {AGREEMENT}"):
        image_tower(small(0), PREPROCESS, other, "small", runtime, CPU)
    assert places(runtime) == []


@needs_a_library
def test_a_folder_that_cannot_be_written_is_one_sentence(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        EncoderUnavailable, match=r"keeps its towers in .* cannot be written \(Not a dir.*another folder"
    ):
        built(small(), Runtime(backend=runtime.backend, cache=tmp_path / "file"))


@needs_a_library
def test_a_model_that_a_backend_cannot_run_is_one_sentence(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(export_cache.LIBRARIES[runtime.backend], "export", cannot)
    with pytest.raises(EncoderUnavailable, match=r"cannot run this model \(no such operator\); choose another"):
        built(small(), runtime)
    assert places(runtime) == []


@pytest.fixture
def libraries_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every library be found, whether or not it is installed."""
    monkeypatch.setattr(export_cache.importlib.util, "find_spec", lambda _: object())


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_missing_package_is_told_with_the_command_that_brings_it(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_cache.importlib.util, "find_spec", lambda _: None)
    package = export_cache.LIBRARIES[backend].PACKAGES[0]
    with pytest.raises(EncoderUnavailable, match=rf"{package} is missing; .*pip install 'dmn-clip-service\[cpu\]'"):
        check_possible(Runtime(backend=backend), CPU)  # type: ignore[arg-type]


@pytest.mark.usefixtures("libraries_found")
@pytest.mark.parametrize(
    ("runtime", "device", "sentence"),
    [
        (Runtime(dtype="float16"), "cpu", "float16 on GPUs only"),
        (Runtime(backend="onnx", dtype="bfloat16"), "cpu", "onnx computes in float32 only; choose openvino or torch"),
        (Runtime(backend="openvino"), "cuda", "openvino is for CPUs, but the device is cuda"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(runtime: Runtime, device: str, sentence: str) -> None:
    with pytest.raises(EncoderUnavailable, match=sentence):
        check_possible(runtime, torch.device(device))


@pytest.mark.usefixtures("libraries_found")
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_processor_without_bfloat16_says_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Runtime(backend=backend, dtype="bfloat16")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False}, raising=False)
    with pytest.raises(EncoderUnavailable, match="no instructions for bfloat16"):
        check_possible(asked, CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": True}, raising=False)
    check_possible(asked, CPU)


def test_torch_in_bfloat16_keeps_the_features_as_far_as_asked_for() -> None:
    visual = small()
    tower = built(visual, Runtime(dtype="bfloat16"))
    cosines = (unit(tower(pixels()).float()) * reference(visual, pixels())).sum(1)
    assert AGREEMENT <= cosines.min() < 1 - 1e-6


def test_features_that_overflow_are_refused() -> None:
    visual = small()
    visual.head.weight.mul_(1e38).mul_(1e3)
    with pytest.raises(EncoderUnavailable, match=r"in bfloat16 .* cosine of nan"):
        built(visual, Runtime(dtype="bfloat16"))


def test_no_tower_meets_more_pictures_at_once_than_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, met = PixelTower.forward, []

    def noted(self: PixelTower, pixels: torch.Tensor) -> torch.Tensor:
        met.append(len(pixels))
        return forward(self, pixels)

    visual, runtime = small(), Runtime(most=3)
    expected = reference(visual, sample(32))
    monkeypatch.setattr(PixelTower, "forward", noted)
    image_tower(visual, PREPROCESS, expected, "small", runtime, CPU)
    assert met == [3, 1]


def test_a_gpu_takes_batches_whole_and_a_cpu_in_eights() -> None:
    assert Runtime(most=32).batch(torch.device("cuda")) == 32
    assert Runtime(most=32).batch(CPU) == 16
    assert Runtime(most=4).batch(CPU) == 4


def test_the_pictures_that_towers_agree_on_are_always_the_same() -> None:
    assert torch.equal(sample(32), sample(32))
    assert sample(32).shape[1:] == (3, 32, 32)
    assert sample(32).amin((1, 2, 3)).max() == 0
    assert sample(32).amax((1, 2, 3)).min() == 255


@needs_a_library
def test_no_library_is_imported_before_it_is_asked_for_and_none_tells_its_makers() -> None:
    code = (
        "import sys, core.encoders.openclip; from core.encoders.towers import openvino_tower;"
        "assert not {'openvino', 'onnxruntime', 'onnx'} & set(sys.modules);"
        "openvino_tower._openvino();"
        "assert 'openvino' in sys.modules and sys.modules['openvino_telemetry'] is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_a_gpu_gives_the_models_features_for_batches_of_every_size(dtype: backends.Precision) -> None:
    device, visual, told = torch.device("cuda"), small(), []
    expected = reference(visual, sample(32))
    runtime = Runtime(dtype=dtype, most=12, notice=told.append)
    tower = image_tower(visual.to(device), PREPROCESS, expected.to(device), "small", runtime, device)
    visual.cpu()
    for n in (1, 3, 12, 5, 1):  # some are padded, and none sees what an earlier one left
        cosines = (unit(tower(pixels(n)).float()).cpu() * reference(small(), pixels(n))).sum(1)
        assert cosines.min() >= AGREEMENT
    assert told == []


@pytest.mark.parametrize(
    ("most", "captured"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_a_graph_is_captured_for_powers_of_two_and_the_largest_batch(most: int, captured: list[int]) -> None:
    assert cuda_tower.sizes(most) == captured
