"""The readout against plainer forms of itself, in one run: `python tests/bench/bench_readout.py`.

All forms answer the same images from the same slots; their calls are interleaved, so that whatever else the machine
does falls on all of them. Prints medians, the largest difference from the float64 literal form, the bytes that the
shelves read per call, and what share of a measured memory bandwidth that is. It asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.bank import Slots
from core.dynamic import DynamicMemory
from core.shelves import Shelves
from core.snapshot import Snapshot
from core.static import StaticMemory
from tests import literal

TAU, BETA = 100.0, 5.5
SLOW_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Unit-norm slots `c s d` (the first of each class is its text feature) and images `n d`, float32."""

    slots: Tensor
    x: Tensor

    def shelves(self) -> Shelves:
        """Return the shelves that the service keeps."""
        classes, width, dim = self.slots.shape
        ids = tuple(range(width - 1))
        rows = tuple(Slots(keys=own[1:], entropies=(0.0,) * (width - 1), ids=ids) for own in self.slots)
        return Shelves(
            Snapshot(
                text=self.slots[:, 0].contiguous(),
                dynamic=DynamicMemory(classes=rows, slots=width - 1),
                static=StaticMemory.empty(classes, dim),
                tau=TAU,
                beta=BETA,
            )
        )

    def method(self, dtype: type[np.floating]) -> literal.Method:
        """Return what the literal form takes."""
        classes, _, dim = self.slots.shape
        return literal.Method(
            text=self.slots[:, 0].numpy().astype(dtype),
            shots=[[]] * classes,
            offsets=literal.no_offsets(classes, dim, dtype),
            slots=0,
            tau=TAU,
            beta=BETA,
        )


def problem(classes: int, slots: int, dim: int, batch: int, seed: int) -> Problem:
    """Return random slots near one direction, as an encoder's features are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)

    def near(*shape: int) -> Tensor:
        noise = torch.nn.functional.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)
        return torch.nn.functional.normalize(common + 0.7 * noise, dim=-1)

    return Problem(slots=near(classes, slots), x=near(batch))


def literally(given: Problem, dtype: type[np.floating]) -> Callable[[], Tensor]:
    """Return Eq. (7) to (11) as they stand, NumPy, one slot at a time."""
    method, banks = given.method(dtype), [list(own) for own in given.slots.numpy().astype(dtype)]
    images = given.x.numpy().astype(dtype)
    return lambda: torch.from_numpy(np.stack([literal.eq_7_to_11(method, banks, image) for image in images]))


def lean_loop(given: Problem) -> Callable[[], Tensor]:
    """Return a loop over classes and slots that is spared all it can be: no offsets, slots of unit norm as stored."""
    banks, images = [list(own) for own in given.slots.numpy()], given.x.numpy()

    def call() -> Tensor:
        out = np.empty((len(images), len(banks)), np.float32)
        for n, x in enumerate(images):
            for c, slots in enumerate(banks):
                total = np.zeros_like(x)
                for slot in slots:
                    total += np.exp(-BETA * (1.0 - slot @ x)) * slot
                out[n, c] = TAU * (total @ x) / np.sqrt(total @ total)
        return torch.from_numpy(out)

    return call


def class_loop(given: Problem) -> Callable[[], Tensor]:
    """Return a loop over classes with their slots as one matrix."""

    def call() -> Tensor:
        columns = []
        for slots in given.slots:
            weights = torch.exp(-BETA * (1.0 - given.x @ slots.T))
            columns.append(TAU * (torch.nn.functional.normalize(weights @ slots, dim=-1) * given.x).sum(-1))
        return torch.stack(columns, -1)

    return call


def two_passes(given: Problem) -> Callable[[], Tensor]:
    """Return the tidy batched form: similarities in one pass over the slots, weighted sums in another."""

    def call() -> Tensor:
        similar = torch.einsum("csd,nd->ncs", given.slots, given.x)
        weights = torch.exp(-BETA * (1.0 - similar))
        sums = torch.einsum("ncs,csd->ncd", weights, given.slots)
        return TAU * torch.einsum("ncd,nd->nc", torch.nn.functional.normalize(sums, dim=-1), given.x)

    return call


def bandwidth(repeats: int, mebibytes: int = 256) -> dict[str, float]:
    """Return what this machine reads (a sum) and copies (read and write counted) in bytes a second, at the median."""
    big = torch.ones(mebibytes * 2**18)
    other = torch.empty_like(big)
    seconds = medians({"sum": big.sum, "copy": lambda: other.copy_(big)}, dict.fromkeys(("sum", "copy"), repeats))
    return {"sum": big.nbytes / seconds["sum"], "copy": 2 * big.nbytes / seconds["copy"]}


def medians(calls: dict[str, Callable[[], object]], repeats: dict[str, int]) -> dict[str, float]:
    """Return the median seconds of each call after one to warm up, the calls taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(max(repeats.values())):
        for name, call in calls.items():
            # The slow ones are spread over the run, so that every form meets every state of the machine.
            if turn * repeats[name] // max(repeats.values()) < len(seconds[name]):
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def bytes_read(shelves: Shelves) -> int:
    """Return what one call must fetch: prepared keys, Gram matrices and masks, once."""
    total = 0
    for shelf in shelves._shelves.values():
        ready = shelf.prepared()
        total += ready.keys.nbytes + ready.gram.nbytes + shelf.masks(("dynamic",))["dynamic"].nbytes
    return total


@torch.inference_mode()
def measure(given: Problem, repeats: int) -> dict[str, object]:
    """Return every figure of a run."""
    shelves = given.shelves()
    truth = literally(given, np.float64)()
    calls = {
        "shelves": lambda: shelves.scores(given.x)[0],
        "literal loop": literally(given, np.float32),
        "lean loop": lean_loop(given),
        "class loop": class_loop(given),
        "two passes": two_passes(given),
    }
    slow = {"literal loop", "lean loop"}
    counts = {name: min(repeats, SLOW_REPEATS) if name in slow else repeats for name in calls}
    seconds = medians(calls, counts)
    classes, slots, dim = given.slots.shape
    read = bytes_read(shelves)
    return {
        "classes": classes,
        "slots": slots,
        "dim": dim,
        "batch": len(given.x),
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1e3 * each for name, each in seconds.items()},
        "ratio": {name: each / seconds["shelves"] for name, each in seconds.items()},
        "largest_difference": {name: (call().double() - truth).abs().max().item() for name, call in calls.items()},
        "bytes_read": read,
        "bytes_of_slots": given.slots.nbytes,
        "bytes_per_second": read / seconds["shelves"],
        "bandwidth": bandwidth(min(repeats, 9)),
        "state_bytes": shelves.nbytes,
        "prediction_memory_bytes": 4 * classes * slots * classes,
    }


def report(figures: dict[str, object]) -> None:
    """Print the figures for people."""
    print(
        f"{figures['classes']} classes x {figures['slots']} slots x {figures['dim']}, {figures['batch']} image(s), "
        f"{figures['threads']} thread(s)"
    )
    print(f"{'form':14} {'median ms':>10} {'times shelves':>14} {'off by at most':>15}")
    milliseconds, ratio, off = (figures[key] for key in ("milliseconds", "ratio", "largest_difference"))
    assert isinstance(milliseconds, dict)
    assert isinstance(ratio, dict)
    assert isinstance(off, dict)
    for name in milliseconds:
        print(f"{name:14} {milliseconds[name]:10.3f} {ratio[name]:13.1f}x {off[name]:15.1e}")
    band = figures["bandwidth"]
    assert isinstance(band, dict)
    print(f"read a call    {_mega(figures['bytes_read'])} (the slots alone: {_mega(figures['bytes_of_slots'])})")
    print(
        f"achieved       {_giga(figures['bytes_per_second'])}; a sum of a big tensor reads {_giga(band['sum'])}, "
        f"a copy moves {_giga(band['copy'])}"
    )
    print(
        f"state          {_mega(figures['state_bytes'])} in all; classes x slots x classes predictions would be "
        f"{_mega(figures['prediction_memory_bytes'])} more"
    )


def _mega(count: object) -> str:
    assert isinstance(count, int)
    return f"{count / 1e6:.1f} MB"


def _giga(rate: object) -> str:
    assert isinstance(rate, float)
    return f"{rate / 1e9:.1f} GB/s"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=51, help="filled slots a class, its text feature included")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30, help=f"of the fast forms; {SLOW_REPEATS} of the loops")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0 leaves it its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    figures = measure(problem(given.classes, given.slots, given.dim, given.batch, given.seed), given.repeats)
    if given.json:
        print(json.dumps(figures))
    else:
        report(figures)


if __name__ == "__main__":
    main()
