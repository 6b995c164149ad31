"""One thread owns the device."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator

import pytest
import torch

from service.concurrency.worker_thread import Worker, choose_device
from service.inference.batching import batch_on
from service.settings import Settings

PATIENCE_S = 60.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


async def test_everything_runs_in_one_thread_which_is_not_the_loops(worker: Worker) -> None:
    idents = await asyncio.gather(*(worker.run(threading.get_ident) for _ in range(8)))
    assert len(set(idents)) == 1
    assert threading.get_ident() not in idents


async def test_functions_run_one_after_the_other_in_order(worker: Worker) -> None:
    ran: list[int] = []
    gate = threading.Event()
    first = asyncio.create_task(worker.run(gate.wait, PATIENCE_S))
    others = [asyncio.create_task(worker.run(ran.append, n)) for n in range(5)]
    await asyncio.sleep(0)
    assert ran == []
    gate.set()
    await asyncio.gather(first, *others)
    assert ran == [0, 1, 2, 3, 4]


async def test_the_loop_goes_on_while_a_function_runs(worker: Worker) -> None:
    gate = threading.Event()
    running = asyncio.create_task(worker.run(gate.wait, PATIENCE_S))
    await asyncio.sleep(0)
    gate.set()
    assert await running is True


async def test_nothing_that_is_computed_there_keeps_gradients(worker: Worker) -> None:
    weight = torch.ones(2, requires_grad=True)
    result = await worker.run(lambda: weight * 2)
    assert result.is_inference()
    assert not result.requires_grad
    assert not torch.is_inference_mode_enabled()


async def test_arguments_and_results_pass_through(worker: Worker) -> None:
    assert await worker.run(divmod, 17, 5) == (3, 2)
    assert await worker.run(int, "ff", base=16) == 255


async def test_what_a_function_raises_reaches_its_caller_and_stops_nobody(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        await worker.run(divmod, 1, 0)
    assert await worker.run(divmod, 1, 1) == (1, 0)


async def test_a_caller_that_leaves_does_not_stop_the_function(worker: Worker) -> None:
    started, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert gate.wait(PATIENCE_S)
        ended.set()

    caller = asyncio.create_task(worker.run(slow))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    gate.set()
    await worker.run(lambda: None)
    assert ended.is_set()


async def test_a_caller_that_leaves_before_its_turn_costs_nothing(worker: Worker) -> None:
    gate, ran = threading.Event(), threading.Event()
    first = asyncio.create_task(worker.run(gate.wait, PATIENCE_S))
    second = asyncio.create_task(worker.run(ran.set))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    gate.set()
    await first
    await worker.run(lambda: None)
    assert not ran.is_set()


async def test_closing_waits_for_the_function_that_runs() -> None:
    worker, started, gate = Worker(), threading.Event(), threading.Event()

    def slow() -> str:
        started.set()
        assert gate.wait(PATIENCE_S)
        return "done"

    running = asyncio.create_task(worker.run(slow))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    gate.set()
    assert await running == "done"
    await closing


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def test_a_device_that_is_named_is_taken() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "", "cpu:x", "cuda:999", "vulkan"])
def test_a_device_that_cannot_be_used_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"The device {name!r} cannot be used here"):
        choose_device(name)


async def test_all_cores_are_the_workers_and_those_who_made_it_compute_on_one() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker = Worker()
        other = Worker("other", cores=1)
        assert await worker.run(torch.get_num_threads) == 2
        assert await other.run(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 1
        other.close()
        worker.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "asked", "batch"),
    [("cpu", 0, (32, 0.5)), ("cuda", 0, (32, math.inf)), ("cpu", 5, (5, math.inf)), ("cuda", 5, (5, math.inf))],
)
def test_a_batch_takes_a_tenth_of_the_longest_wait_on_a_cpu_unless_the_settings_say_how_large_it_is(
    device: str, asked: int, batch: tuple[int, float]
) -> None:
    assert batch_on(torch.device(device), Settings(batch_images=asked, max_wait_ms=5000)) == batch


def test_a_batch_may_take_any_time_where_calls_may_wait_for_any() -> None:
    assert batch_on(torch.device("cpu"), Settings(max_wait_ms=0)) == (32, math.inf)


def test_a_batch_is_never_larger_than_the_queue() -> None:
    assert batch_on(torch.device("cuda"), Settings(queue_images=9))[0] == 9
