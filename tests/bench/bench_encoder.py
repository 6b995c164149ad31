"""Images a second with a real encoder, saturated: `dmn serve`, LitServe, and the encoder alone.

`python -m tests.bench.bench_encoder [--encoder ViT-B-32] [--seconds 15] [--rounds 3] [--set DMN_X=Y] [--json]`

An encoder is `lite`, `MODEL@FILE`, or the name of one of open_clip's models, which then gets random weights: they cost
as much time as trained ones, and nothing has to be fetched. Each request is one JPEG of 227 x 227 pixels. Servers and
client share all cores; the client needs next to nothing of them. The servers are loaded in turns, while the others are
stopped, by 8 and by 64 clients that ask again at once; figures and ratios are medians over the rounds. The encoder
alone encodes pixels that stand ready, in batches as large as those that `dmn serve` made on average, rounded. Asserts
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import open_clip
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from service.bench.images import photo
from service.bench.load import Client, saturate
from tests.bench.fleet import Server, clean_environment, medians, missing, only, ours, peer, ratio, running, settings_of
from tests.bench.telling import tell

FEW, MANY = 8, 64
_SIDE = 227
_BATCH = 32
_ALONE_SHARE = 0.5
"""Of the time of a load, for the encoder alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="ViT-B-32")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--set", action="append", default=[], metavar="DMN_X=Y", help="a setting of dmn serve")
    tell(parser, measure, table, absent=missing())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of both servers and of the encoder alone, and what they are to each other."""
    images = [photo(seed, _SIDE) for seed in range(options.images)]
    every = sorted(os.sched_getaffinity(0))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        encoder = named(options.encoder, Path(folder))
        kinds = {
            "dmn": ours(encoder, **settings_of(options.set)),
            "litserve": peer("lit", encoder, "--batch", str(_BATCH), "--wait-ms", "5"),
        }
        dmn, litserve = (
            stack.enter_context(running(name, kind, cores=",".join(map(str, every)), threads=len(every)))
            for name, kind in kinds.items()
        )
        alone = stack.enter_context(_alone(encoder))

        def turn(seconds: float) -> dict[str, dict[str, float]]:
            told: dict[str, dict[str, float]] = {}
            for clients in (FEW, MANY):
                encoded, batches = _counted(dmn)
                with only(dmn, (dmn, litserve)):
                    told[f"dmn, {clients}"] = _saturated(dmn, images, clients, seconds)
                after = _counted(dmn)
                batch = max(1, round((after[0] - encoded) / (after[1] - batches)))
                with only(litserve, (dmn, litserve)):
                    told[f"litserve, {clients}"] = _saturated(litserve, images, clients, seconds)
                with only(None, (dmn, litserve)):
                    rate = _ask(alone, batch, _ALONE_SHARE * seconds)
                told[f"alone, {clients}"] = {"per_second": rate, "batch": batch}
            return told

        turn(options.seconds / 3)  # memories fill, and what is set up lazily is set up
        rounds = [turn(options.seconds) for _ in range(options.rounds)]
    return {"encoder": options.encoder, "figures": medians(rounds), "ratios": _ratios(rounds)}


def named(encoder: str, folder: Path) -> str:
    """Return an encoder as `dmn serve` takes it; one that open_clip knows by name alone gets random weights."""
    if encoder not in open_clip.list_models():
        return encoder
    file = folder / "random.safetensors"
    weights = open_clip.create_model(encoder).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return f"{encoder}@{file}"


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [f"{told['encoder']:<14} images/s   p50 ms   p99 ms failed batch"]
    for name, one in told["figures"].items():
        cells = [one.get("per_second"), one.get("p50_ms"), one.get("p99_ms")]
        numbers = " ".join("        " if cell is None else f"{cell:>8.1f}" for cell in cells)
        lines.append(f"{name:<14} {numbers} {one.get('failed', 0):>6.0f} {one.get('batch', ''):>5}")
    return "\n".join([*lines, *(f"{name}: {ratio}" for name, ratio in told["ratios"].items())])


def _ratios(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    def over(one: str, other: str, figure: str = "per_second") -> float:
        return ratio(rounds, one, other, figure)

    few, many = f"dmn, {FEW}", f"dmn, {MANY}"
    return {
        f"dmn over the encoder alone, {FEW} clients": over(few, f"alone, {FEW}"),
        f"dmn over the encoder alone, {MANY} clients": over(many, f"alone, {MANY}"),
        f"dmn over LitServe, {FEW} clients": over(few, f"litserve, {FEW}"),
        f"dmn over LitServe, {MANY} clients": over(many, f"litserve, {MANY}"),
        f"p99 of dmn over LitServe's, {FEW} clients": over(few, f"litserve, {FEW}", "p99_ms"),
        f"p99 of dmn over LitServe's, {MANY} clients": over(many, f"litserve, {MANY}", "p99_ms"),
        f"dmn, {MANY} clients over {FEW}": over(many, few),
    }


def _saturated(server: Server, images: Sequence[bytes], clients: int, seconds: float) -> dict[str, float]:
    async def load() -> dict[str, float]:
        async with Client(server.url, "/classify", {"Content-Type": "image/jpeg"}) as client:
            told = await saturate(client, images, clients=clients, seconds=seconds)
        p50, p99 = 1000 * np.percentile(told.latencies, [50, 99])
        return {"per_second": told.per_second, "p50_ms": float(p50), "p99_ms": float(p99), "failed": told.failed}

    return asyncio.run(load())


def _counted(server: Server) -> tuple[float, float]:
    """Return the images that `dmn serve` has encoded, and in how many batches."""
    text = httpx.get(f"{server.url}/metrics").raise_for_status().text
    samples = {one.name: one.value for family in text_string_to_metric_families(text) for one in family.samples}
    return samples["dmn_batch_images_sum"], samples["dmn_batch_images_count"]


@contextmanager
def _alone(encoder: str) -> Iterator[subprocess.Popen[str]]:
    """Run the encoder alone, waiting until it is asked."""
    command = [sys.executable, "-m", "tests.bench.alone", "--encoder", encoder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process


def _ask(alone: subprocess.Popen[str], batch: int, seconds: float) -> float:
    assert alone.stdin is not None
    assert alone.stdout is not None
    print(batch, seconds, file=alone.stdin, flush=True)
    return float(alone.stdout.readline())


if __name__ == "__main__":
    main()
