"""A client of a cluster, made of ordinary clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from redis import exceptions as told
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from .client import Single
from .url import Address

Command = tuple[Sequence[Any], Mapping[str, Any]]

_LATE = (told.TimeoutError, TimeoutError)
AWAY = (*_LATE, told.ConnectionError, told.ClusterDownError, OSError)
"""What a node that is gone, or about to be replaced, gives instead of an answer."""

_ELSEWHERE = (told.AskError, told.TryAgainError, told.ClusterDownError, told.ConnectionError)
"""What stands for an answer where a command of many has to be sent alone, to be redirected and tried again."""

_TURNS = 16
"""Redirections of one command, and questions whether a slot is whole by now."""

_PAUSES_S = (0.02, 0.04)
_HASTE_S = 0.1
_KEYLESS = ("PING", "INFO", "CONFIG", "SCRIPT", "FLUSHALL", "FLUSHDB", "DBSIZE")


class Cluster(Redis):
    """A client of a cluster: each command goes to the node that has its key, those without a key to all primaries.

    redis-py's own (8.1, asyncio) is not used. When one caller meets a change it closes the connections of all, which
    ends in other callers' AttributeErrors and in more changes to meet; it sends ASKING and what is asked by two
    connections, and does not find a node that has no slots yet. Here every node has an ordinary client, who owns a slot
    is corrected by each redirection, and the nodes are asked anew only when one does not answer.
    """

    def __init__(
        self, seeds: Sequence[Address], make: Callable[[Address], Single], *, shown: str, patience_s: float
    ) -> None:
        self._seeds, self._make = tuple(seeds), make
        self._clients: dict[Address, Single] = {}
        self._owners: list[Address | None] = []
        self._replicas: frozenset[Address] = frozenset()
        self._silent: set[Address] = set()
        self._looking, self._looks = asyncio.Lock(), 0
        self.shown, self._patience_s = shown, patience_s
        super().__init__(connection_pool=self._client(self._seeds[0]).connection_pool)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command.

        Raises:
            ClusterError: its slot is being moved and was not whole in time.
        """
        key = self._key(args)
        send = partial(self._to_all, args, options) if key is None else partial(self._to_owner, key, args, options)
        async with asyncio.timeout(self._patience_s):
            return await self._again(send)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: ARG002, FBT001, FBT002 - as in the base
        """Return a pipeline; what it holds for one node goes together, and nothing of it is a transaction."""
        return _Spread(self)

    async def run_all(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands, those of one node together, and return their answers in order, or the errors in their places.

        What a node that is away was to answer is an error; the others' answers are there all the same.
        """
        async with asyncio.timeout(self._patience_s):
            answers = await self._by_node(commands)
            astray = [at for at, answer in enumerate(answers) if isinstance(answer, _ELSEWHERE)]
            again = (self.execute_command(*commands[at][0], **commands[at][1]) for at in astray)
            for at, answer in zip(astray, await asyncio.gather(*again, return_exceptions=True), strict=True):
                answers[at] = answer
            return answers

    async def nodes(self) -> tuple[list[Single], list[Single]]:
        """Return the clients of all primaries and of all replicas, as the cluster is now.

        Raises:
            ClusterDownError: some slots have no primary.
        """
        await self._look(self._looks)
        if None in self._owners:
            raise _uncovered()
        primaries = dict.fromkeys(owner for owner in self._owners if owner is not None)
        return [self._client(one) for one in primaries], [self._client(one) for one in self._replicas]

    def owner_of(self, key: str) -> Single | None:
        """Return the client of the node that is known to have a key's slot."""
        owner = self._owners[key_slot(key.encode())] if self._owners else None
        return None if owner is None else self._client(owner)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: ARG002, FBT001 - as in the base
        """Close every connection to every node."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))

    def _key(self, args: Sequence[Any]) -> bytes | None:
        """Return the key that says where a command belongs; each one that the store uses has it at the same place."""
        name = str(args[0]).split()[0].upper()
        if name in _KEYLESS or (name in ("EVAL", "EVALSHA") and int(args[2]) == 0):
            return None
        key = args[3 if name in ("EVAL", "EVALSHA") else 1]
        return key if isinstance(key, bytes) else str(key).encode()

    async def _again(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Send something, and twice more if a node is away, after a look who has its slots by now.

        One that was silent is not tried again: it has had its time.
        """
        for pause_s in _PAUSES_S:
            seen = self._looks
            try:
                return await send()
            except _LATE:
                await self._try_look(seen)
                raise
            except AWAY:
                await asyncio.sleep(pause_s)
                await self._try_look(seen)
        return await send()

    async def _to_all(self, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        await self._look(0)
        primaries = dict.fromkeys(owner for owner in self._owners if owner is not None)
        clients = [self._client(one) for one in primaries]
        return (await asyncio.gather(*(client.execute_command(*args, **options) for client in clients)))[0]

    async def _to_owner(self, key: bytes, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        slot, importing = key_slot(key), None
        for turn in range(_TURNS):
            owner, seen = await self._owner(slot), self._looks
            try:
                answer = await self._run(importing or owner, importing is not None, args, options)
            except told.MovedError as moved:
                self._owners[slot], importing = (moved.host or owner[0], moved.port), None
            except told.AskError as ask:
                importing = (ask.host or owner[0], ask.port)
            except told.TryAgainError:
                # Keys of the slot are on both nodes. Ask its owner again, after they had some time.
                importing = None
                await asyncio.sleep(min(0.1, 0.005 * 2**turn))
            except _LATE:
                await self._try_look(seen)
                if self._owners[slot] in (owner, None):
                    raise
                importing = None
            else:
                return answer
        raise told.ClusterError(f"slot {slot} was not whole in time")

    async def _run(self, address: Address, asking: bool, args: Sequence[Any], options: Mapping[str, Any]) -> Any:  # noqa: FBT001 - says which of two calls it is
        client = self._client(address)
        try:
            answer = await (client.asking if asking else client.execute_command)(*args, **options)
        except (*_LATE, told.ConnectionError, OSError):
            self._silent.add(address)
            raise
        self._silent.discard(address)
        return answer

    async def _by_node(self, commands: Sequence[Command]) -> list[Any]:
        """Return each command's answer, or the error that stands for it."""
        answers: list[Any] = [told.ConnectionError("not sent")] * len(commands)
        parts: dict[Address, list[int]] = {}
        for at, (args, _) in enumerate(commands):
            key = self._key(args)
            with suppress(told.ClusterDownError):
                if key is not None:
                    parts.setdefault(await self._owner(key_slot(key)), []).append(at)
        seen = self._looks

        async def run(address: Address, part: Sequence[int]) -> None:
            batch = self._client(address).pipeline(transaction=False)
            for at in part:
                batch.execute_command(*commands[at][0], **commands[at][1])
            try:
                replies = await batch.execute(raise_on_error=False)
            except AWAY as error:
                self._silent.add(address)
                await self._try_look(seen)
                silent = isinstance(error, _LATE) and address in self._owners
                replies = [error if silent else told.ConnectionError("not there")] * len(part)
            for at, answer in zip(part, replies, strict=True):
                answers[at] = answer

        await asyncio.gather(*(run(address, part) for address, part in parts.items()))
        return answers

    def _client(self, address: Address) -> Single:
        if address not in self._clients:
            self._clients[address] = self._make(address)
        return self._clients[address]

    async def _owner(self, slot: int) -> Address:
        await self._look(0)
        if self._owners[slot] in self._silent:
            await self._try_look(self._looks)
        owner = self._owners[slot]
        if owner is None:
            raise _uncovered()
        return owner

    async def _try_look(self, seen: int) -> None:
        with suppress(*AWAY):
            await self._look(seen)

    async def _look(self, seen: int) -> None:
        """Find out who owns which slot, unless somebody has since the count of looks that the caller saw."""
        if self._looks > seen:
            return
        async with self._looking:
            if self._looks <= seen:
                self._owners, self._replicas = await self._slots()
                self._looks += 1

    async def _slots(self) -> tuple[list[Address | None], frozenset[Address]]:
        """Ask one node after the other, those last that were silent before, and return the owners and all replicas.

        A node that takes its time is not waited for before the next one is asked.
        """
        known = dict.fromkeys((*(owner for owner in self._owners if owner), *self._replicas, *self._seeds))
        waiting = sorted(known, key=self._silent.__contains__)
        asked: set[asyncio.Task[tuple[list[Address | None], frozenset[Address]]]] = set()
        fault: BaseException | None = None
        try:
            while waiting or asked:
                if waiting:
                    asked.add(asyncio.create_task(self._slots_by(waiting.pop(0))))
                patience_s = _HASTE_S if waiting else None
                done, asked = await asyncio.wait(asked, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    fault = one.exception()
                    if fault is None:
                        return one.result()
        finally:
            for one in asked:
                one.add_done_callback(lambda late: late.cancelled() or late.exception())
                one.cancel()
        raise fault or told.ConnectionError("nobody to ask")

    async def _slots_by(self, address: Address) -> tuple[list[Address | None], frozenset[Address]]:
        try:
            spans = await self._client(address).execute_command("CLUSTER", "SLOTS")
        except BaseException:
            self._silent.add(address)
            raise
        self._silent.discard(address)
        return _read_slots(spans, address)


class _Spread(Pipeline):
    """Commands for several nodes of a cluster."""

    def __init__(self, client: Cluster) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)  # noqa: FBT003 - as in the base
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as in the base
        commands, self.command_stack = self.command_stack, []
        answers = await self._client.run_all(commands)
        if raise_on_error and (faults := [answer for answer in answers if isinstance(answer, Exception)]):
            raise faults[0]
        return answers


def _read_slots(spans: Sequence[Any], asked: Address) -> tuple[list[Address | None], frozenset[Address]]:
    """Return the owner of each slot and all replicas; a node that does not know its own name is who was asked."""
    owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    replicas: set[Address] = set()
    for first, last, *nodes in spans:
        primary, *others = ((host.decode() if host else asked[0], int(port)) for host, port, *_ in nodes)
        owners[first : last + 1] = [primary] * (last + 1 - first)
        replicas.update(others)
    return owners, frozenset(replicas)


def _uncovered() -> told.ClusterDownError:
    return told.ClusterDownError("slots are not covered")
