"""What the method `auto` costs beside `dmn`, in one run: `python tests/bench/bench_auto.py`.

Both classify the same images on the same memory; their calls are interleaved, so that whatever else the machine does
falls on all of them. Directions are made anew once in 32 counted images, as in a stream of a thousand: the time of
that is told apart and, a 32nd of it an image, together. It asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.adapted import Adaptation
from core.classify import Sample, classify
from core.shelves import Shelves
from core.static import Shots, StaticMemory
from core.statistics import Statistics, counted
from tests.bench.bench_readout import TAU, medians, problem

REFRESH = 32


def grown(text: Tensor, static: StaticMemory, x: Tensor) -> Adaptation:
    """Return an adaptation after 64 images, whose directions are made anew when 32 more were counted."""
    none = x.new_zeros(len(x), len(Statistics.zeros(1, 1).agreed))
    statistics = counted(x, (TAU * x @ text.T).softmax(-1), none, none[:, 0])
    return Adaptation.begin(text, static, TAU, statistics)


@torch.inference_mode()
def measure(classes: int, slots: int, dim: int, shots: int, repeats: int, seed: int) -> dict[str, object]:
    """Return every figure of a run."""
    given = problem(classes, slots, dim, REFRESH, seed)
    plain = given.shelves().snapshot
    if shots:
        own = problem(classes, shots, dim, 1, seed + 1).slots
        plain = replace(plain, static=StaticMemory(classes=tuple(Shots(keys=k, ids=tuple(range(shots))) for k in own)))
    start = grown(plain.text, plain.static, problem(classes, 2, dim, 64, seed + 2).x)
    shelves = {"dmn": Shelves(plain), "auto": Shelves(replace(plain, adaptation=start))}
    out: dict[str, object] = {"classes": classes, "slots": slots, "dim": dim, "shots": shots}
    samples = [Sample(views=x[None], id=10**9 + at) for at, x in enumerate(given.x)]
    calls = {
        "dmn, 1": lambda: classify(shelves["dmn"], samples[:1]),
        "auto, 1": lambda: classify(shelves["auto"], samples[:1]),
        "dmn, 32": lambda: classify(shelves["dmn"], samples),
        # All but the last, so that nothing is made anew.
        "auto, 31": lambda: classify(shelves["auto"], samples[:-1]),
        "refresh": lambda: replace(start, made_at=-1).known(start.statistics),
        "begin": lambda: Adaptation.begin(plain.text, plain.static, TAU, start.statistics),
    }
    seconds = medians(calls, dict.fromkeys(calls, repeats))
    one = (seconds["auto, 1"] + seconds["refresh"] / REFRESH) / seconds["dmn, 1"]
    many = (seconds["auto, 31"] * REFRESH / (REFRESH - 1) + seconds["refresh"]) / seconds["dmn, 32"]
    return {
        **out,
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1e3 * each for name, each in seconds.items()},
        "ratio": {"1": one, "32": many},
        "state_bytes": start.nbytes,
        "statistics_bytes": start.statistics.nbytes,
        "class_and_square_bytes": 4 * (classes * dim + dim * dim),
        "shelf_bytes": shelves["dmn"].nbytes,
    }


def report(figures: dict[str, object]) -> None:
    """Print the figures for people."""
    milliseconds, ratio = figures["milliseconds"], figures["ratio"]
    assert isinstance(milliseconds, dict)
    assert isinstance(ratio, dict)
    print("{classes} classes x {slots} slots x {dim}, {shots} shots a class, {threads} thread(s)".format(**figures))
    for name, each in milliseconds.items():
        print(f"{name:10} {each:9.3f} ms")
    for number, times in ratio.items():
        print(
            f"auto takes {times:.2f} times as long as dmn for {number} image(s), making anew every {REFRESH} included"
        )
    sizes = {name: each / 1e6 for name, each in figures.items() if name.endswith("bytes") and isinstance(each, int)}
    print(
        "state      {state_bytes:.1f} MB, of it the statistics of traffic {statistics_bytes:.1f} MB "
        "(C D + D D numbers: {class_and_square_bytes:.1f} MB); the memory's shelves hold {shelf_bytes:.1f} MB".format(
            **sizes
        )
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=51, help="filled slots a class, its text feature included")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--shots", type=int, default=0, help="labelled shots a class")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0 leaves it its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    figures = measure(given.classes, given.slots, given.dim, given.shots, given.repeats, given.seed)
    if given.json:
        print(json.dumps(figures))
    else:
        report(figures)


if __name__ == "__main__":
    main()
