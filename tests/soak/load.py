"""A load of pictures on a service, and a ledger of what it answered: who was told what about which picture."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from tests.support.fakes import COLOURS, picture
from tests.support.process import PATIENCE_S, client

LABELS = tuple(COLOURS)
HELD = ("filled", "replaced", "duplicate")
"""Outcomes that say: it is in a slot now."""

_BACK_S = 0.1

Banks = Mapping[str, Mapping[str, float]]
"""Entropies by slot, by class."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What an answer said of a picture; `stale` says that it was given while the store was away."""

    outcome: str
    label: str
    entropy: float
    slot: str | None
    evicted: str | None
    stale: bool

    @property
    def settled(self) -> bool:
        """Whether it is a promise: who is rejected by a stale memory may have to give way to a write that waits."""
        return self.outcome in HELD or (self.outcome == "rejected" and not self.stale)


@dataclass(kw_only=True)
class Sent:
    """One picture: how to make it again, how often it was sent, and what was answered, if anything."""

    colour: str
    seed: int
    times: int = 0
    told: list[Told] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return picture(self.colour, self.seed)

    @property
    def settled(self) -> Told | None:
        """The last answer that says where the picture is; None if it may or may not be in a slot."""
        return next((told for told in reversed(self.told) if told.settled), None)

    @property
    def pending(self) -> Told | None:
        """The last answer that said: it will be learned when the store is back."""
        return next((told for told in reversed(self.told) if told.outcome == "pending"), None)


class Ledger:
    """Everything that was sent for one tenant, and what was answered. Threads may share it."""

    def __init__(self, tenant: str, slots: int) -> None:
        self.tenant, self.slots = tenant, slots
        self.sent: list[Sent] = []
        self.outcomes: Counter[str] = Counter()
        self.refused, self.cut = 0, 0
        self.faults: list[str] = []
        self.may_be_cut = False
        """Whether the service was killed or stopped: calls may go unanswered."""
        self._lock = threading.Lock()
        self.stale, self.settled = 0, 0
        """Answers that were given while the store was away, and pictures of which is known where they are."""
        self._last_held = 0.0

    def held_since(self, moment: float) -> bool:
        """Return whether a picture that was sent after a moment went into a slot."""
        return self._last_held > moment

    def take(self, colour: str, seed: int) -> Sent:
        """Enter a picture that is about to be sent."""
        one = Sent(colour=colour, seed=seed)
        with self._lock:
            self.sent.append(one)
        return one

    def answer(self, part: Sequence[Sent], answer: httpx.Response, began: float) -> None:
        """Enter what a call was answered."""
        with self._lock:
            if answer.status_code != 200:
                self._refuse(answer.status_code, answer.text, answer.headers.get("retry-after"))
                return
            whole = answer.json()
            stale = whole["memory"]["state"] != "fresh"
            self.stale += stale
            for one, told in zip(part, whole["predictions"], strict=True):
                self._enter(one, told, began, stale=stale)

    def unanswered(self, error: httpx.TransportError) -> None:
        """Enter that a call was cut off."""
        with self._lock:
            self.cut += 1
            if not self.may_be_cut:
                self.faults.append(f"a call was cut off while the service ran: {error!r}")

    def unsettled(self) -> list[Sent]:
        """Return the pictures that may or may not be in a slot."""
        return [one for one in self.sent if one.settled is None]

    def _enter(self, one: Sent, told: Mapping[str, Any], began: float, *, stale: bool) -> None:
        if told["error"] is not None:
            self._refuse(told["error"]["status"], str(told["error"]), told["error"].get("retry_after"))
            return
        learned = Told(**told["learned"], stale=stale)
        one.told.append(learned)
        self.outcomes[learned.outcome] += 1
        self.settled += learned.settled
        if learned.outcome in HELD:
            self._last_held = max(self._last_held, began)
        elif learned.outcome not in ("rejected", "pending"):
            self.faults.append(f"a picture was {learned.outcome}")

    def _refuse(self, status: int, text: str, retry_after: object) -> None:
        self.refused += 1
        if status != 503 or not retry_after:
            self.faults.append(f"a call was refused with {status}, Retry-After {retry_after}: {text[:300]}")


class Load:
    """Threads that send pictures without pause."""

    def __init__(self, url: str, ledger: Ledger, seed: str, *, threads: int = 4) -> None:
        self._url, self._ledger, self._seed, self._threads = url, ledger, seed, threads
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send until the block ends, and wait until all is answered or cut off."""
        threads = [threading.Thread(target=self._send, args=(i,), name=f"load-{i}") for i in range(self._threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(PATIENCE_S)

    def _send(self, number: int) -> None:
        random, refused = Random(f"{self._seed}/{number}"), 0
        with client(self._url) as own:
            while not self._over.is_set():
                pictures = [(random.choice(LABELS), random.randrange(2**60)) for _ in range(random.randint(1, 4))]
                if not send(own, self._ledger, [self._ledger.take(*one) for one in pictures]):
                    return
                if self._ledger.refused > refused:
                    # Sooner than it was told to come back, so that the moment of a kill is met again and again.
                    self._over.wait(_BACK_S)
                refused = self._ledger.refused


def send(own: httpx.Client, ledger: Ledger, part: Sequence[Sent]) -> bool:
    """Send some pictures by one call; return whether there was an answer."""
    files = [("images", (f"{i}.png", one.data, "image/png")) for i, one in enumerate(part)]
    began = time.monotonic()
    for one in part:
        one.times += 1
    try:
        answer = own.post("/classify", files=files, headers={"X-Tenant": ledger.tenant})
    except httpx.TransportError as error:
        ledger.unanswered(error)
        return False
    ledger.answer(part, answer, began)
    return True


def missing(ledger: Ledger, banks: Banks) -> list[str]:
    """Return a sentence for whatever an answer said and the slots deny.

    A picture that was told to be in a slot is there, or its class is full of surer ones; one that was told to be
    rejected has a full class of surer ones; who was evicted is gone; and whatever is there was sent.
    """
    out = []
    for one in ledger.sent:
        told = one.settled
        if told is not None:
            out += _denied(one, told, banks[told.label], ledger.slots)
    gone = {told.evicted for one in ledger.sent for told in one.told} - {None}
    known = {told.slot for one in ledger.sent for told in one.told if told.slot}
    every = {slot for bank in banks.values() for slot in bank}
    out += [f"{slot} was evicted and is there" for slot in gone & every]
    strangers, possible = every - known, len(ledger.unsettled())
    if len(strangers) > possible:
        out.append(f"{len(strangers)} slots are of pictures that nobody was told of; {possible} may be")
    return out


def undelivered(ledger: Ledger, banks: Banks) -> list[Sent]:
    """Return the pictures that wait to be learned: those that nothing surer keeps out."""
    waiting = [(one, one.pending) for one in ledger.unsettled()]
    return [one for one, told in waiting if told and _lacks(told, banks[told.label], ledger.slots)]


def _denied(one: Sent, told: Told, bank: Mapping[str, float], slots: int) -> Iterable[str]:
    if len(bank) > slots:
        yield f"the class {told.label} holds {len(bank)} slots"
    held = bank.get(told.slot or "", told.entropy)
    if held != told.entropy and not (one.times > 1 and held < told.entropy):
        yield f"{told.slot} was {told.outcome} at {told.entropy} and is there at {held}"
    if _lacks(told, bank, slots):
        yield f"{told.slot} was {told.outcome} as {told.label} at {told.entropy} and is missing; {len(bank)} are there"


def _lacks(told: Told, bank: Mapping[str, float], slots: int) -> bool:
    """Return whether a picture is not there though it should be: its class is not full of surer ones."""
    if told.slot in bank:
        return False
    # The id of one that was rejected is not told; at an equal entropy it may have been the larger.
    worst = max((entropy, slot) for slot, entropy in bank.items()) if len(bank) >= slots else None
    return worst is None or worst > (told.entropy, told.slot or "~")
