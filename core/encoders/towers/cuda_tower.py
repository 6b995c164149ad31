"""Image towers on a CUDA device: pixels cross from pinned memory, and a batch is one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.errors import reason

from .torch_tower import PixelTower

_WARM_RUNS = 3
"""Runs of a batch size before it is captured: libraries choose their kernels in them, and cannot while capturing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Graph:
    inputs: UInt8[Tensor, "n 3 h w"]
    replay: Callable[[], None]
    output: Float[Tensor, "n d"]


class CudaTower:
    """Runs batches of up to `most` pictures; smaller ones are padded up to the next captured size.

    Its calls belong to one thread. Where a graph cannot be captured every batch runs as it is, and `notice` is told.
    """

    def __init__(
        self, tower: PixelTower, preprocess: Preprocess, device: torch.device, most: int, notice: Callable[[str], None]
    ) -> None:
        self._tower, self._device = tower, device
        self._pinned = torch.zeros(most, 3, preprocess.size, preprocess.size, dtype=torch.uint8, pin_memory=True)
        self._crossed = torch.cuda.Event()
        self._graphs: dict[int, _Graph] = {}
        with torch.cuda.device(device):
            try:
                pool = None
                for size in reversed(sizes(most)):  # the largest first: the others fit into its memory
                    self._graphs[size], pool = _captured(tower, self._pinned[:size].to(device), pool)
            except RuntimeError as error:
                self._graphs.clear()
                notice(f"no CUDA graph of the encoder: {reason(error)}")

    def __call__(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return raw features on the device."""
        n = len(pixels)
        self._crossed.synchronize()  # the last batch may still be on its way out of the pinned memory
        staged = self._pinned[:n].copy_(pixels)
        graph = next((self._graphs[size] for size in sorted(self._graphs) if size >= n), None)
        with torch.cuda.device(self._device):
            inputs = torch.empty_like(staged, device=self._device) if graph is None else graph.inputs[:n]
            inputs.copy_(staged, non_blocking=True)
            self._crossed.record()
            if graph is None:
                return self._tower.forward(inputs)
            graph.replay()
            return graph.output[:n].clone()  # the next replay writes over it


def sizes(most: int) -> list[int]:
    """Return the batch sizes that are captured: powers of two, and the largest batch."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def _captured(tower: PixelTower, inputs: UInt8[Tensor, "n 3 h w"], pool: Any) -> tuple[_Graph, Any]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_RUNS):
            tower(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = tower(inputs)
    return _Graph(inputs=inputs, replay=graph.replay, output=output), graph.pool()
