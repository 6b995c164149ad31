"""How what an image costs the memory grows with the classes of a tenant, and with tenants that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from core.prepared_banks import Shelves

from .readout import STEPS, Problem, drawn, medians, steps, threaded

_TURNS = 500


@torch.inference_mode()
def measure(
    problem: Problem, classes: Sequence[int], tenants: Sequence[int], *, threads: int = 0, repeats: int = 9
) -> dict[str, Any]:
    """Return what one image takes by the number of classes, and by the number of tenants that take turns.

    `problem` is what each of the tenants has. Every memory is full, and nothing is evicted.
    """
    with threaded(threads):
        return {
            **asdict(problem),
            "threads": torch.get_num_threads(),
            "by_classes": _by_classes(problem, classes, repeats),
            "by_tenants": _by_tenants(problem, tenants, repeats),
        }


def table(told: dict[str, Any]) -> Table:
    """Return a row for each number of classes, and one for each number of tenants."""
    title = f"{1 + told['shots'] + told['slots']} slots x {told['dim']}, one image, {told['threads']} thread(s)"
    columns = ("tenants", "classes of each", "readout ms", "dmn ms", "auto ms", "readout, us a class")
    shown = Table(*columns, title=title, box=None, pad_edge=False)
    for one in told["by_classes"]:
        times = (f"{one[f'{name}_ms']:.3f}" for name in ("readout", *STEPS))
        shown.add_row("1", str(one["classes"]), *times, f"{1e3 * one['readout_ms'] / one['classes']:.2f}")
    for one in told["by_tenants"]:
        shown.add_row(
            str(one["tenants"]), str(told["classes"]), "", *(f"{one[f'{name}_ms']:.3f}" for name in STEPS), ""
        )
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw times against classes."""
    numbers = [one["classes"] for one in told["by_classes"]]
    for name in ("readout", *STEPS):
        axes.plot(numbers, [one[f"{name}_ms"] for one in told["by_classes"]], marker="o", label=name)
    axes.set(xlabel="classes", ylabel="an image, ms", xscale="log", yscale="log")
    axes.legend(loc="best", frameon=False)


def _by_classes(problem: Problem, classes: Sequence[int], repeats: int) -> list[dict[str, float]]:
    calls: dict[str, Callable[[], object]] = {}
    for number in classes:
        world = drawn(replace(problem, classes=number))
        shelves = Shelves(world.snapshot)
        own: dict[str, Callable[[], object]] = {"readout": partial(shelves.scores, world.x), **steps(world, shelves)}
        calls |= {f"{name} {number}": own[name] for name in ("readout", *STEPS)}
    seconds = medians(calls, repeats)
    return [
        {"classes": number, **{f"{name}_ms": 1e3 * seconds[f"{name} {number}"] for name in ("readout", *STEPS)}}
        for number in classes
    ]


def _by_tenants(problem: Problem, tenants: Sequence[int], repeats: int) -> list[dict[str, float]]:
    every = []
    for at in range(max(tenants)):
        world = drawn(replace(problem, seed=problem.seed + at))
        every.append(steps(world, Shelves(world.snapshot)))

    def turns(name: str, number: int) -> None:
        for at in range(_TURNS):
            every[at % number][name]()

    calls = {f"{name} {number}": partial(turns, name, number) for number in tenants for name in STEPS}
    seconds = medians(calls, repeats)
    return [
        {"tenants": number, **{f"{name}_ms": 1e3 * seconds[f"{name} {number}"] / _TURNS for name in STEPS}}
        for number in tenants
    ]
