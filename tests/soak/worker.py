"""One worker of a convergence run: the service's own rooms in a process of its own, told line by line what to do."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from core.memory.codec import encode_feature
from service.domain.tenant import TenantConfig
from service.errors import StoreDown
from service.inference.results import Question
from service.memory.hot_memory import HotMemory
from service.services import Rooms
from service.settings import Settings
from service.tenants import configuration, reset
from tests.soak.plan import TENANT, Ask, Image, Options, PlainEncoder, Reset, Step, class_specs, feature, images, steps

CALLERS = 48
"""Steps under way at once."""

SETTLE_S = 60.0
_TRIES = 50

Bank = list[tuple[str, float, str]]
"""Id, entropy and feature (hexadecimal) of each slot, in order of (entropy, id)."""


def main() -> None:
    """Answer every line on stdin, a JSON object, by one on stdout, until there are no more."""
    torch.set_num_threads(1)
    # The encoder is brought along; open_clip takes seconds to import, in each of the processes.
    sys.modules["core.encoders.openclip"] = ModuleType("core.encoders.openclip")
    url, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
    asyncio.run(_serve(url, options))


async def _serve(url: str, options: Options) -> None:
    from service.wiring import open_rooms  # noqa: PLC0415 - after what it shall not import was put aside

    async with open_rooms(Settings(store=url, store_timeout_ms=60_000), PlainEncoder(options.classes)) as rooms:
        worker = _Worker(rooms, options)
        while line := await asyncio.to_thread(sys.stdin.readline):
            told = json.loads(line)
            answer = await getattr(worker, told.pop("do"))(**told)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


class _Worker:
    """Does what it is told with its rooms."""

    def __init__(self, rooms: Rooms, options: Options) -> None:
        self._rooms, self._options = rooms, options
        self._images = images(options)
        self._deliveries: list[tuple[int, int, str, float, str, int]] = []
        self._resets: list[tuple[int, tuple[int, ...] | None]] = []
        self._again = 0

    async def configure(self) -> None:
        """Make the tenant."""
        config = TenantConfig(classes=class_specs(self._options), slots=self._options.slots, templates=("{}",))
        await configuration.put_tenant(self._rooms, TENANT, config)

    async def work(self, phase: int, worker: int) -> dict[str, Any]:
        """Take the steps of a phase, many at once, and return what was answered to each."""
        self._deliveries, self._resets, self._again = [], [], 0
        todo = iter(steps(self._options, phase, worker))
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._call(todo))
        return {"deliveries": self._deliveries, "resets": self._resets, "again": self._again}

    async def settle(self) -> dict[str, Any]:
        """Return the hot memory once it stands where the store does, and the seconds that it took.

        One that does not come to stand there in time is returned as it is.
        """
        start = time.perf_counter()
        while True:
            record = await self._rooms.store.get(TENANT)
            async with self._rooms.archive.open(TENANT) as hot:
                seconds, stamp = time.perf_counter() - start, hot.stamp
                if (record is not None and stamp == record.stamp) or seconds > SETTLE_S:
                    banks = await self._rooms.reader.run(_dump, hot)
                    return {"banks": banks, "stamp": (stamp.epoch, stamp.version), "seconds": seconds}
            await asyncio.sleep(0.01)  # a copy asks for changes when it is used and old enough; nobody tells it

    async def load(self) -> dict[str, Any]:
        """Return what the store holds."""
        stored = await configuration.load(self._rooms, TENANT)
        banks = {own: _sorted((s.id, s.entropy, s.feature.hex()) for s in bank) for own, bank in stored.slots.items()}
        return {"banks": banks, "stamp": (stored.record.stamp.epoch, stored.record.stamp.version)}

    async def counted(self, name: str) -> float:
        """Return a counter of this worker's."""
        return self._rooms.metrics.registry.get_sample_value(name) or 0.0

    async def _call(self, todo: Iterator[Step]) -> None:
        """Take one step after the other, as a client would that sends a call when the last is answered."""
        for step in todo:
            if isinstance(step, Reset):
                await self._reset(step)
            else:
                await self._deliver(self._images[step.number], step)

    async def _deliver(self, image: Image, step: Ask) -> None:
        views = feature(image, step.bits, self._options)[None]
        question = Question(views=views, digest=image.id, learn=True, explain=False)
        for _ in range(_TRIES):
            try:
                reading = await self._rooms.desk.ask(TENANT, question)
            except StoreDown:
                self._again += 1  # resets came faster than it could be pushed: nothing was written; a client retries
                continue
            told = reading.learned
            self._deliveries.append(
                (step.number, step.bits, told.label, told.entropy, told.outcome, reading.stamp.epoch)
            )
            return
        raise AssertionError(f"image {step.number} was refused {_TRIES} times")

    async def _reset(self, step: Reset) -> None:
        specs = class_specs(self._options)
        names = None if step.classes is None else [specs[c].name for c in step.classes]
        stamp, _ = await reset.reset(self._rooms, TENANT, dynamic=True, static=False, classes=names)
        self._resets.append((stamp.epoch, step.classes))


def _dump(hot: HotMemory) -> dict[str, Bank]:
    classes = zip(hot.config.classes, hot.snapshot.dynamic.classes, strict=True)
    return {
        spec.id: _sorted(
            (str(id_), entropy, encode_feature(key).hex())
            for id_, entropy, key in zip(bank.ids, bank.entropies, bank.keys, strict=True)
        )
        for spec, bank in classes
    }


def _sorted(slots: Iterator[tuple[str, float, str]]) -> Bank:
    return sorted(slots, key=lambda slot: (slot[1], slot[0]))


if __name__ == "__main__":
    main()
