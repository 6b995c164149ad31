"""Steady traffic of several tenants, at a rate that waits for nobody, and everything that it was promised.

Pictures are classified and learned, shots uploaded, tenants made, classes added and tenants read, over connections that
are kept open. Nothing is ever sent twice. Whatever is not answered 2xx, and rightly, is a fault.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from tests.soak.load import HELD, LABELS, Ledger, missing
from tests.support.fakes import picture

SLOTS = 20
KINDS = {"classify": 70, "shot": 12, "read": 13, "make": 5}
"""Calls of each kind in a hundred."""

_CLIENTS = 16
_PATIENCE_S = 60.0
_MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A call that was answered: when it was sent, on the clock of `time.monotonic`, and how long that took."""

    sent: float
    seconds: float


class Traffic:
    """Calls from when it is started until it is stopped. After a share `renewed` a client leaves its connection.

    Tenants have `dmn` and shots, or `auto` and none, in turns.

    Shots change how `auto` labels: what it said of a picture before would not hold afterwards.
    """

    def __init__(self, url: str, *, tenants: int, rate: float, renewed: float, seed: int) -> None:
        self._url, self._rate, self._renewed, self._random = url, rate, renewed, Random(seed)
        names = [f"tenant-{at}" for at in range(tenants)]
        self.methods = {name: ("dmn", "auto")[at % 2] for at, name in enumerate(names)}
        self.ledgers = {name: Ledger(name, SLOTS) for name in names}
        self.shots: dict[str, dict[str, str]] = {name: {} for name, method in self.methods.items() if method == "dmn"}
        """Labels of the shots that were acknowledged, by tenant and id."""
        self.made: dict[str, list[str]] = {}
        """Classes of the tenants that were acknowledged while it ran."""
        self.calls: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.answered: list[Answered] = []
        self.faults: list[str] = []
        self._clients: list[httpx.AsyncClient] = []
        self._over = asyncio.Event()
        self._numbers, self._turns = iter(range(10**9)), self._shuffled()

    async def prepare(self) -> None:
        """Make the tenants."""
        async with self._client() as own:
            for name, method in self.methods.items():
                body = {"classes": list(LABELS), "slots": SLOTS, "method": method}
                (await own.put(f"/tenants/{name}", json=body)).raise_for_status()

    async def run(self) -> None:
        """Make calls until told to stop, and return once all are answered."""
        async with AsyncExitStack() as stack:
            self._clients = [await stack.enter_async_context(self._client()) for _ in range(_CLIENTS)]
            due, calls = time.monotonic(), asyncio.TaskGroup()
            async with calls:
                while not self._over.is_set():
                    due += self._random.expovariate(self._rate)
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
                    calls.create_task(getattr(self, f"_{kind}")(self._random.choice(self._clients), next(self._turns)))

    def stop(self) -> None:
        """Make no more calls."""
        self._over.set()

    # Calls ------------------------------------------------------------------------------------------------------------

    async def _classify(self, own: httpx.AsyncClient, tenant: str) -> None:
        ledger, colour = self.ledgers[tenant], self._random.choice(LABELS)
        one, began = ledger.take(colour, next(self._numbers)), time.monotonic()
        one.times += 1
        files = {"images": ("a.png", one.data, "image/png")}
        answer = await self._ask(own, "classify", "POST", "/classify", files=files, headers={"X-Tenant": tenant})
        if answer is None:
            return
        ledger.answer([one], answer, began)
        told = answer.json()
        read, state = told["predictions"][0]["readouts"], told["memory"]["state"]
        if read is None or read["text"]["label"] != colour or state != "fresh":
            self.faults.append(f"a picture of {tenant} that is {colour} was read as {read}, from a {state} memory")

    async def _shot(self, own: httpx.AsyncClient, _: str) -> None:
        tenant, colour = self._random.choice(list(self.shots)), self._random.choice(LABELS)
        files = {"images": ("a.png", picture(colour, next(self._numbers)), "image/png")}
        how: dict[str, Any] = {"files": files, "data": {"label": colour}, "headers": {"X-Tenant": tenant}}
        answer = await self._ask(own, "shot", "POST", "/memory/static", **how)
        if answer is None:
            return
        (shot,) = answer.json()["shots"]
        if shot["error"] or shot["label"] != colour:
            self.faults.append(f"a shot of {tenant} was answered {shot}")
        else:
            self.shots[tenant][shot["id"]] = colour

    async def _make(self, own: httpx.AsyncClient, _: str) -> None:
        name = f"made-{next(self._numbers)}"
        body = {"classes": list(LABELS[:2])}
        if await self._ask(own, "make", "PUT", f"/tenants/{name}", json=body) is None:
            return
        self.made[name] = list(LABELS[:2])
        more = {"classes": [LABELS[2]]}
        if await self._ask(own, "make", "POST", f"/tenants/{name}/classes", json=more) is not None:
            self.made[name].append(LABELS[2])

    async def _read(self, own: httpx.AsyncClient, _: str) -> None:
        name = self._random.choice([*self.ledgers, *self.made])
        due = set(self.made.get(name, LABELS))
        answer = await self._ask(own, "read", "GET", f"/tenants/{name}")
        if answer is not None and not due <= set(classes_of(answer)):
            self.faults.append(f"{name} was told to have {classes_of(answer)}, without some of {due}")

    async def _ask(
        self, own: httpx.AsyncClient, kind: str, method: str, path: str, **how: Any
    ) -> httpx.Response | None:
        """Return an answer; None for one that is a fault."""
        headers = how.pop("headers", {}) | ({"Connection": "close"} if self._random.random() < self._renewed else {})
        self.calls[kind] += 1
        began = time.monotonic()
        try:
            answer = await own.request(method, path, headers=headers, **how)
        except httpx.TransportError as error:
            self.statuses[type(error).__name__] += 1
            self.faults.append(f"{method} {path} was not answered: {error!r}")
            return None
        self.statuses[str(answer.status_code)] += 1
        self.answered.append(Answered(sent=began, seconds=time.monotonic() - began))
        if not answer.is_success:
            self.faults.append(f"{method} {path} was answered {answer.status_code}: {answer.text[:300]}")
            return None
        return answer

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=_PATIENCE_S, trust_env=False, verify=False)  # noqa: S501

    def _shuffled(self) -> Iterator[str]:
        """Yield tenants, each as often as any other, in an order that follows nobody's turns."""
        while True:
            yield from self._random.sample(list(self.ledgers), len(self.ledgers))


# What was promised ----------------------------------------------------------------------------------------------------


def lost(traffic: Traffic, own: httpx.Client) -> list[str]:
    """Return a sentence for each promise that an instance does not keep: slots, shots, tenants, classes."""
    faults = []
    for tenant, ledger in traffic.ledgers.items():
        faults += [*ledger.faults, *missing(ledger, banks(own, tenant))]
    for tenant, promised in traffic.shots.items():
        held = _shots(own, tenant)
        faults += [f"the shot {shot} of {tenant} is missing" for shot in promised if held.get(shot) != promised[shot]]
        faults += [f"the shot {shot} of {tenant} was promised to nobody" for shot in held if shot not in promised]
    for tenant, classes in traffic.made.items():
        answer = own.get(f"/tenants/{tenant}")
        if answer.status_code != 200 or classes_of(answer) != classes:
            faults.append(f"{tenant} has to have {classes}: {answer.text[:300]}")
    return faults


def uncounted(traffic: Traffic, own: httpx.Client) -> list[str]:
    """Return a sentence for each tenant whose class statistics are not of all pictures that were answered."""
    faults = []
    for tenant in (name for name, method in traffic.methods.items() if method == "auto"):
        due = sum(bool(one.told) for one in traffic.ledgers[tenant].sent)
        counted = _read(own, tenant, "/memory")["adaptation"]["images"]
        if counted != due:
            faults.append(f"{tenant} was answered {due} pictures, and {counted} are counted")
    return faults


def promised(traffic: Traffic) -> int:
    """Return how many pictures were told to be in a slot."""
    return sum(ledger.outcomes[name] for ledger in traffic.ledgers.values() for name in HELD)


def banks(own: httpx.Client, tenant: str) -> dict[str, dict[str, float]]:
    """Return the slots of a tenant, entropies by id, by class."""
    told = {label: _read(own, tenant, f"/memory/dynamic/{label}?limit={_MOST}") for label in LABELS}
    return {label: {slot["slot"]: slot["entropy"] for slot in page["items"]} for label, page in told.items()}


def classes_of(answer: httpx.Response) -> Sequence[str]:
    """Return the names of a tenant's classes."""
    return [one["name"] for one in answer.json()["classes"]]


def _shots(own: httpx.Client, tenant: str) -> dict[str, str]:
    held: dict[str, str] = {}
    cursor = ""
    while True:
        page = _read(own, tenant, f"/memory/static?limit={_MOST}{cursor}")
        held |= {shot["id"]: shot["label"] for shot in page["items"]}
        if page["next"] is None:
            return held
        cursor = f"&cursor={page['next']}"


def _read(own: httpx.Client, tenant: str, path: str) -> Any:
    return own.get(path, headers={"X-Tenant": tenant}).raise_for_status().json()
