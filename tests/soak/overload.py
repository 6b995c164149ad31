"""Ten times what it can do, for two minutes: `python -m tests.soak.overload [--seconds 120 --times 10 --json]`.

A service as it comes is measured first: what an answer takes alone, and how many it gives a second when it is never
idle. Then one that lets nobody wait longer than some such answers take (`DMN_MAX_WAIT_MS`, `--wait`) is asked so many
times as much, by an open loop from this process. Where there are two cores or more, one is this process's alone, and
the service has the others, from the first measurement on: the client would else be charged to the service. Every answer
has to be the right one, or a refusal that says when to come again; of the accepted ones 99 of 100 are to take three
times as long as alone at most, of the refusals 95 of 100 are to take 50 ms from their head on; memory must stay; and
when the load ends the next call is to be answered as if there had been none. Status 1 if it is not so. The short form
is `tests/e2e/test_overload.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from service.bench.load import Answer, Client, Offered, arrivals, offer, saturate
from service.bench.photos import photo
from service.bench.telling import stamp
from tests.bench.null import CLASSES
from tests.support.process import WITH_FAKE, Command

MOST_TIMES_SLOWER = 3.0
MOST_REFUSAL_MS = 50.0
MOST_GROWN_MB = 256.0
MOST_RECOVERY_S = 1.0

_CLIENTS = 32
_LOOK_S = 0.25
_SIDE = 227
_JPEG = {"Content-Type": "image/jpeg"}
_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service, and what is posted to it: images, and the label that each is known to get."""

    command: Command
    url: str
    known: Mapping[bytes, str]

    @property
    def images(self) -> list[bytes]:
        return list(self.known)

    def caller(self) -> Caller:
        """Return a client that looks at each answer."""
        return Caller(self.url, "/classify", _JPEG, known=self.known)

    def gauges(self) -> tuple[float, float]:
        """Return how many images wait, and how many are in the server."""
        text = httpx.get(f"{self.url}/metrics", timeout=_PATIENCE_S, trust_env=False).text
        found = dict(re.findall(r"^(dmn_(?:queue|inflight)_images) (\S+)$", text, re.MULTILINE))
        return float(found["dmn_queue_images"]), float(found["dmn_inflight_images"])

    def resident_mb(self) -> float:
        """Return the resident size of its process."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.command.process.pid}/status").read_text())
        assert found is not None
        return round(int(found[1]) / 1024, 1)

    def refusals_ms(self) -> list[float]:
        """Return how long each refusal took by the service's own log: from the call's head to the whole answer."""
        told = (json.loads(line) for line in self.command.err if line.startswith("{"))
        return [one["ms"] for one in told if one["event"] == "dmn.request" and one["status"] == 503]


class Caller(Client):
    """Posts images whose labels are known; `faults` counts answers that are neither right nor a proper refusal."""

    def __init__(self, url: str, path: str, headers: dict[str, str], *, known: Mapping[bytes, str]) -> None:
        super().__init__(url, path, headers)
        self._known = known
        self.faults: Counter[str] = Counter()

    async def post(self, body: bytes, **headers: str) -> int:
        answer = await self.ask(body, **headers)
        fault = _fault(answer, self._known[body])
        if fault:
            self.faults[fault] += 1
        return answer.status


def _fault(answer: Answer, known: str) -> str:
    """Return what is wrong with an answer, if anything. Traffic changes the fused label, but never the text head's."""
    if answer.status == 200:
        (told,) = json.loads(answer.body)["predictions"]
        return "" if told["readouts"]["text"]["label"] == known else "a wrong label"
    if answer.status != 503:
        return f"an answer with {answer.status}"
    if json.loads(answer.body)["type"] != "/problems/queue-full":
        return "a refusal for another reason"
    return "" if int(answer.headers.get(b"retry-after", b"0")) >= 1 else "a refusal without Retry-After"


@dataclass(kw_only=True)
class Overload:
    """What became of a service under more than it can do.

    `recovered_s` is when after the load a call took no longer than it may alone, and `tries` how many it took for that.
    """

    offered: Offered
    faults: Counter[str]
    gauges: tuple[float, float]
    refusals_ms: list[float]
    before_mb: float
    after_mb: float
    recovered_s: float
    tries: int
    during_mb: list[float] = field(default_factory=list)

    @property
    def grown_mb(self) -> float:
        """How much larger it was at most than before."""
        return round(max(*self.during_mb, self.after_mb) - self.before_mb, 1)


async def alone(service: Service, seconds: float) -> list[float]:
    """Return what answers take to a client that asks again once it is answered.

    Raises:
        AssertionError: it was not answered, or wrongly.
    """
    took, start = [], time.perf_counter()
    async with service.caller() as client:
        for image in service.images * 1000:
            began = time.perf_counter()
            assert await client.post(image) == 200
            took.append(time.perf_counter() - began)
            if time.perf_counter() - start > seconds:
                break
        assert not client.faults, client.faults
    return took


async def overload(service: Service, *, rate: float, seconds: float, seed: int, calm_s: float) -> Overload:
    """Offer so many calls a second, and go on until the service answers again in `calm_s`."""
    before, during = service.resident_mb(), list[float]()
    watch = asyncio.create_task(_watch(service, during))
    start = time.perf_counter()
    async with service.caller() as client:
        offered = await offer(client, service.images, arrivals(rate, seconds, seed))
        watch.cancel()
        recovered, tries = await _recovered(service, calm_s)
    return Overload(
        offered=offered,
        faults=client.faults,
        gauges=await asyncio.to_thread(service.gauges),
        refusals_ms=service.refusals_ms(),
        before_mb=before,
        during_mb=during,
        after_mb=service.resident_mb(),
        recovered_s=recovered - start - seconds,
        tries=tries,
    )


async def _watch(service: Service, sizes: list[float]) -> None:
    while True:
        sizes.append(service.resident_mb())
        await asyncio.sleep(_LOOK_S)


async def _recovered(service: Service, calm_s: float) -> tuple[float, int]:
    """Return when a call was answered in its usual time again, and how many it took."""
    ends = time.perf_counter() + _PATIENCE_S
    async with service.caller() as client:
        for tries in count(1):
            began = time.perf_counter()
            if await client.post(service.images[0]) == 200 and time.perf_counter() - began <= calm_s:
                return time.perf_counter(), tries
            if began > ends:
                break
    raise TimeoutError(f"{_PATIENCE_S:g} s after the load it still does not answer as before")


# A service to ask -----------------------------------------------------------------------------------------------------


@contextmanager
def served(
    encoder: str,
    images: Sequence[bytes],
    classes: Sequence[str],
    script: str = WITH_FAKE,
    cores: Sequence[int] = (),
    **settings: str,
) -> Iterator[Service]:
    """Run `dmn serve` with its embedded store, and learn what it says of each image while nobody else asks.

    `cores` are those that it may use; all that this process has by default.
    """
    with TemporaryDirectory(prefix="dmn-overload-", ignore_cleanup_errors=True) as home:
        own = {"DMN_DATA_DIR": f"{home}/data", "DMN_DRAIN_DELAY_S": "0", **settings}
        with _on(cores):
            command = Command(encoder, "serve", "--port", "0", store="embedded", script=script, **own)
        with command:
            url = command.url()
            try:
                with httpx.Client(base_url=url, timeout=_PATIENCE_S, trust_env=False) as client:
                    client.put("/tenants/default", json={"classes": list(classes)}).raise_for_status()
                    known = {image: _label(client, image) for image in images}
                yield Service(command=command, url=url, known=known)
            finally:
                command.signal(signal.SIGTERM)
                command.ended()


@contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Compute on these cores only, with all threads and processes that begin meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _label(client: httpx.Client, image: bytes) -> str:
    answer = client.post("/classify", content=image, headers=_JPEG, params={"learn": "false"}).raise_for_status()
    return str(answer.json()["predictions"][0]["readouts"]["text"]["label"])


# The long form --------------------------------------------------------------------------------------------------------


def soak(options: argparse.Namespace, heard: Callable[[str], object]) -> dict[str, Any]:
    """Return all figures, and in `broken` what is not as it has to be."""
    images = [photo(seed, _SIDE) for seed in range(options.images)]
    every = sorted(os.sched_getaffinity(0))
    with _on(every[-1:]):
        told = _soaked(options, images, every[:-1] or every, heard)
    return told | {"service_cores": len(every[:-1] or every)}


def _soaked(
    options: argparse.Namespace, images: Sequence[bytes], cores: Sequence[int], heard: Callable[[str], object]
) -> dict[str, Any]:
    with served(options.encoder, images, CLASSES, cores=cores) as service:
        calm, most = asyncio.run(_measured(service, options.calm_seconds))
    wait_ms = round(1000 * options.wait * calm, 1)
    heard(f"alone {1000 * calm:.1f} ms, never idle {most:.1f}/s: DMN_MAX_WAIT_MS={wait_ms}")
    with served(options.encoder, images, CLASSES, cores=cores, DMN_MAX_WAIT_MS=str(wait_ms)) as service:
        took = asyncio.run(alone(service, options.calm_seconds))
        heard(f"alone again {1000 * _percentile(took, 50):.1f} ms; asked {options.times * most:.0f}/s from now on")
        work = overload(
            service,
            rate=options.times * most,
            seconds=options.seconds,
            seed=options.seed,
            calm_s=MOST_TIMES_SLOWER * _percentile(took, 50),
        )
        found = asyncio.run(work)
    return _told(found, took, most, wait_ms, options)


async def _measured(service: Service, seconds: float) -> tuple[float, float]:
    """Return the median of what an answer takes alone, and the answers a second of a service that is never idle."""
    took = await alone(service, seconds)
    async with service.caller() as client:
        most = await saturate(client, service.images, clients=_CLIENTS, seconds=seconds)
    assert not most.failed, "a service as it comes refused some of a few clients that wait for their answers"
    return _percentile(took, 50), most.per_second


def _told(
    found: Overload, took: Sequence[float], most: float, wait_ms: float, options: argparse.Namespace
) -> dict[str, Any]:
    accepted = found.offered.latencies
    figures = {
        "encoder": options.encoder,
        "per_second_never_idle": round(most, 1),
        "max_wait_ms": wait_ms,
        "offered_per_second": round(options.times * most, 1),
        "seconds": options.seconds,
        "calls": len(found.offered.calls),
        "unsent": found.offered.unsent,
        "client_late_ms": round(1000 * found.offered.late_s, 1),
        "accepted": len(accepted),
        "accepted_per_second": round(len(accepted) / options.seconds, 1),
        "refused_share": round(found.offered.refused / max(1, len(found.offered.calls)), 4),
        **{f"alone_p{percent}_ms": round(1000 * _percentile(took, percent), 1) for percent in (50, 99)},
        **{f"accepted_p{percent}_ms": round(1000 * _percentile(accepted, percent), 1) for percent in (50, 99)},
        **{
            f"times_slower_p{percent}": round(_percentile(accepted, percent) / _percentile(took, percent), 2)
            for percent in (50, 99)
        },
        **{f"refusal_p{percent}_ms": round(_percentile(found.refusals_ms, percent), 2) for percent in (50, 95, 99)},
        "resident_before_mb": found.before_mb,
        "resident_most_mb": max(found.during_mb),
        "resident_after_mb": found.after_mb,
        "recovered_s": round(found.recovered_s, 2),
        "queue_images_after": found.gauges[0],
        "inflight_images_after": found.gauges[1],
        "faults": dict(found.faults),
    }
    return figures | {"broken": _broken(found, figures)}


def _broken(found: Overload, figures: Mapping[str, Any]) -> list[str]:
    holds = {
        "every answer is right or a refusal that says when to come again": not found.faults,
        f"accepted calls take {MOST_TIMES_SLOWER:g} times as long as alone at most, 99 of 100": (
            figures["times_slower_p99"] <= MOST_TIMES_SLOWER
        ),
        f"95 of 100 refusals take {MOST_REFUSAL_MS:g} ms at most": figures["refusal_p95_ms"] <= MOST_REFUSAL_MS,
        f"it grows by {MOST_GROWN_MB:g} MB at most": found.grown_mb <= MOST_GROWN_MB,
        f"it has recovered after {MOST_RECOVERY_S:g} s": found.recovered_s <= MOST_RECOVERY_S,
        "nothing is left in its queue": found.gauges == (0.0, 0.0),
    }
    return [law for law, kept in holds.items() if not kept]


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--times", type=float, default=10.0, help="of what it answers when it is never idle")
    parser.add_argument("--wait", type=float, default=1.0, help="answers that the longest wait is as long as")
    parser.add_argument("--calm-seconds", type=float, default=20.0, help="for each measurement before the load")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--encoder", default="lite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told = soak(options, lambda line: print(line, file=sys.stderr, flush=True)) | stamp()
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(f"{name:>24} {value}" for name, value in told.items()))
    return 1 if told["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
