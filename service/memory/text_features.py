"""Text features, computed once for each prompt and kept for all tenants."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from core.prompts import class_weights
from service.concurrency.worker_thread import Worker

CLASSES = 256
"""Classes whose prompts are held together."""

CHUNK = 64
"""Prompts encoded at a time, so that images get their turn in between."""


class TextFeatures:
    """Prompts -> class weights, with the features of the latest prompts kept up to a number of bytes."""

    def __init__(self, worker: Worker, encode: Callable[[Sequence[str]], Tensor], *, max_bytes: int) -> None:
        self._worker, self._encode, self._room = worker, encode, max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = asyncio.Lock()

    async def class_weights(self, prompts: Sequence[tuple[str, ...]]) -> Tensor:
        """Return t_c (c, d), Eq. (1), for the prompts of each class; (0, 0) for none."""
        parts = [torch.empty(0, 0)]
        for start in range(0, len(prompts), CLASSES):
            # Some classes at a time: the features of every prompt of a large tenant would be gigabytes.
            own = prompts[start : start + CLASSES]
            features = await self._features(list(dict.fromkeys(prompt for part in own for prompt in part)))
            parts.append(await self._worker.run(_weights, own, features))
        return torch.cat(parts[1:] or parts)

    async def _features(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for start in range(0, len(prompts), CHUNK):
            # Held for one chunk: callers that come together encode a prompt once, and none waits for another's last.
            async with self._lock:
                found.update(await self._chunk(prompts[start : start + CHUNK]))
        return found

    async def _chunk(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
        for prompt in found:
            self._kept.move_to_end(prompt)
        missing = [prompt for prompt in prompts if prompt not in found]
        if missing:
            encoded = await self._worker.run(self._encode, missing)
            # Cloned one by one: a row of a shared tensor would keep the whole chunk alive.
            new = {prompt: row.clone() for prompt, row in zip(missing, encoded, strict=True)}
            for prompt, feature in new.items():
                self._keep(prompt, feature)
            found.update(new)
        return found

    def _keep(self, prompt: str, feature: Tensor) -> None:
        self._kept[prompt] = feature
        self._room -= feature.nbytes
        while self._room < 0:
            self._room += self._kept.popitem(last=False)[1].nbytes


def _weights(prompts: Sequence[tuple[str, ...]], features: Mapping[str, Tensor]) -> Tensor:
    return class_weights([torch.stack([features[prompt] for prompt in own]) for own in prompts])
