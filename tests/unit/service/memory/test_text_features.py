"""Each prompt is encoded once, whoever asks for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from core.numerics import unit
from service.concurrency.worker_thread import Worker
from service.memory.text_features import CHUNK, TextFeatures

DIM = 4
ONE = DIM * 4
"""Bytes of one feature."""

PATIENCE_S = 60.0


class Tower:
    """A text tower that notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    @property
    def encoded(self) -> list[str]:
        return [text for call in self.calls for text in call]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.calls.append(list(texts))
        return torch.stack([feature(text) for text in texts])


def feature(text: str) -> Tensor:
    return unit(torch.randn(DIM, generator=torch.Generator().manual_seed(sum(text.encode()))))


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def texts(worker: Worker, tower: Tower) -> TextFeatures:
    return TextFeatures(worker, tower, max_bytes=1 << 20)


async def test_a_class_is_the_unit_mean_of_its_prompts(texts: TextFeatures) -> None:
    weights = await texts.class_weights([("a", "b"), ("c",)])
    torch.testing.assert_close(weights[0], unit((feature("a") + feature("b")) / 2))
    torch.testing.assert_close(weights[1], feature("c"))


async def test_a_prompt_that_is_said_twice_counts_twice_and_is_encoded_once(texts: TextFeatures, tower: Tower) -> None:
    weights = await texts.class_weights([("a", "a", "b"), ("a",)])
    torch.testing.assert_close(weights[0], unit((2 * feature("a") + feature("b")) / 3))
    assert tower.encoded == ["a", "b"]


async def test_a_prompt_is_encoded_once_for_all_callers(texts: TextFeatures, tower: Tower) -> None:
    first = await texts.class_weights([("a", "b")])
    await texts.class_weights([("b", "c"), ("a",)])
    again = await texts.class_weights([("a", "b")])
    assert tower.encoded == ["a", "b", "c"]
    assert torch.equal(first, again)


async def test_a_prompt_is_encoded_once_for_callers_that_come_together(texts: TextFeatures, tower: Tower) -> None:
    tower.gate.clear()
    calls = [asyncio.create_task(texts.class_weights([("a", "b")])) for _ in range(3)]
    assert await asyncio.to_thread(tower.entered.wait, PATIENCE_S)
    tower.gate.set()
    results = await asyncio.gather(*calls)
    assert all(torch.equal(result, results[0]) for result in results)
    assert tower.encoded == ["a", "b"]


async def test_many_prompts_are_encoded_a_chunk_at_a_time(texts: TextFeatures, tower: Tower) -> None:
    prompts = tuple(f"prompt {n}" for n in range(2 * CHUNK + 1))
    await texts.class_weights([prompts])
    assert [len(call) for call in tower.calls] == [CHUNK, CHUNK, 1]
    assert tower.encoded == list(prompts)


async def test_images_get_their_turn_between_the_chunks(texts: TextFeatures, tower: Tower, worker: Worker) -> None:
    tower.gate.clear()
    loading = asyncio.create_task(texts.class_weights([tuple(f"{n}" for n in range(3 * CHUNK))]))
    assert await asyncio.to_thread(tower.entered.wait, PATIENCE_S)
    turn = asyncio.create_task(worker.run(lambda: len(tower.calls)))
    await asyncio.sleep(0)
    tower.gate.set()
    assert await turn == 1
    await loading


async def test_the_features_kept_are_bounded_in_bytes_and_the_least_used_go_first(worker: Worker, tower: Tower) -> None:
    texts = TextFeatures(worker, tower, max_bytes=2 * ONE)
    await texts.class_weights([("a",)])
    await texts.class_weights([("b",)])
    await texts.class_weights([("a",)])
    await texts.class_weights([("c",)])
    assert tower.encoded == ["a", "b", "c"]
    await texts.class_weights([("a",)])
    assert tower.encoded == ["a", "b", "c"]
    await texts.class_weights([("b",)])
    assert tower.encoded == ["a", "b", "c", "b"]


@pytest.mark.parametrize("room", [0, ONE - 1, 3 * ONE])
async def test_a_label_set_larger_than_the_room_is_answered_all_the_same(
    worker: Worker, tower: Tower, room: int
) -> None:
    texts = TextFeatures(worker, tower, max_bytes=room)
    prompts = [(f"{n}",) for n in range(10)]
    weights = await texts.class_weights(prompts)
    torch.testing.assert_close(weights, torch.stack([feature(own) for (own,) in prompts]))
    assert sum(one.nbytes for one in texts._kept.values()) <= room


async def test_what_is_kept_holds_on_to_its_own_bytes_alone(texts: TextFeatures) -> None:
    await texts.class_weights([("a", "b", "c")])
    assert all(one.untyped_storage().nbytes() == ONE for one in texts._kept.values())


async def test_a_tower_that_fails_is_asked_again(texts: TextFeatures, tower: Tower, worker: Worker) -> None:
    calls = iter([True, False])

    def flaky(prompts: Sequence[str]) -> Tensor:
        if next(calls):
            raise RuntimeError("out of memory")
        return tower(prompts)

    texts = TextFeatures(worker, flaky, max_bytes=1 << 20)
    with pytest.raises(RuntimeError):
        await texts.class_weights([("a",)])
    assert len(await texts.class_weights([("a",)])) == 1
