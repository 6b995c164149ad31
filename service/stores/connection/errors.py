"""What the errors of a client mean, as one sentence each, without an address, a key or a password of anyone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from errno import EADDRNOTAVAIL, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH

from redis import exceptions as told

from service.errors import StoreDown

FAULTS = (told.RedisError, OSError)
"""Everything that a client raises when the server, or the way to it, is at fault: what `down` explains."""

_SOON_S, _LATER_S = 1.0, 10.0


def down(error: BaseException, shown: str = "") -> StoreDown:
    """Return what a client's error means and when to come back; `shown` says where the store is, if that may be said.

    The server's own words are not repeated: they may hold names, keys or arguments.
    """
    wait_s, says = _meaning(list(causes(error)))
    return StoreDown(f"{f'The store {shown}'.strip()} {says}.", retry_after_s=wait_s)


_MEANINGS: tuple[tuple[str, float, str], ...] = (
    (
        r"^MasterNotFoundError.*AuthenticationError",
        _LATER_S,
        "cannot be found: its Sentinels refuse the user or the password that the URL gives by ?sentinel_password=",
    ),
    (
        r"^MasterNotFoundError.* : ",
        _SOON_S,
        "cannot be found: no Sentinel that answers knows it, and some do not answer",
    ),
    (r"^MasterNotFoundError", _SOON_S, "cannot be found: its Sentinels know no primary of this name that is up"),
    (r"without any password|no password is set", _LATER_S, "has no password, but the URL gives one"),
    (r"(?i)authentication required", _LATER_S, "asks for a password, and the URL gives none"),
    (r"^AuthenticationError", _LATER_S, "refuses the user or the password"),
    (
        r"(?i)no permissions? to access|permissions to access",
        _LATER_S,
        "does not let its user use the keys of this service: allow ~dmn:* in its ACL",
    ),
    (
        r"has no permissions|ACL failure in script|can't run this command|^NoPermissionError",
        _LATER_S,
        "does not let its user run {command}: allow it in its ACL, and scripts (EVAL, EVALSHA) too",
    ),
    (r"^ReadOnlyError|READONLY\b", _SOON_S, "is a read-only replica: name its primary, or use Sentinels"),
    (r"^OutOfMemoryError|\bOOM\b", _LATER_S, "has no memory left: raise its maxmemory, or remove tenants"),
    (r"\bMISCONF\b", _LATER_S, "cannot write to its disk and takes no changes: make room, and read its log"),
    (r"^BusyLoadingError", _SOON_S, "is still loading its data"),
    (r"^MasterDownError", _SOON_S, "is a replica that has lost its primary"),
    (r"cluster support disabled", _LATER_S, "is no cluster: use redis:// (or rediss://)"),
    (
        r"^ClusterDownError|^SlotNotCoveredError|slots are not covered|CLUSTERDOWN",
        _SOON_S,
        "is a cluster that is down: some of its slots have no primary",
    ),
    (r"^TryAgainError|^ClusterError", _SOON_S, "is moving data between its nodes, and was not done with it in time"),
    (r"^MovedError|^AskError", _LATER_S, "is a node of a cluster: use redis+cluster:// (or rediss+cluster://)"),
    (r"^MaxConnectionsError|No connection available", _SOON_S, "is not asked: all connections to it are in use"),
    (r"max number of clients", _SOON_S, "has as many clients as it takes: raise its maxclients"),
    (r"\bBUSY \w+ is busy", _SOON_S, "is busy with a script that does not end"),
    (r"\bNOREPLICAS\b", _SOON_S, "has too few replicas to take changes (min-replicas-to-write)"),
    (r"\bDENIED\b", _LATER_S, "is in protected mode and lets nobody in from outside: give it a password"),
    (
        r"(?i)unknown (?:redis |valkey )?command",
        _LATER_S,
        "does not know {command}: it is disabled or renamed, or the server is too old",
    ),
    (
        r"nonexistent global variable|attempt to (?:index|call)",
        _LATER_S,
        "runs scripts without what ours need (struct, redis.sha1hex): use Redis or Valkey themselves",
    ),
    (r"wrong kind of value", _LATER_S, "holds something else under the keys of this service (dmn:*)"),
    (r"DB index is out of range|invalid DB index", _LATER_S, "has no database of this number"),
    # A host with several addresses that all refuse is one error without a number, which quotes those of all.
    (rf"\[Errno {ECONNREFUSED}\]", _SOON_S, "refuses the connection: no server is running there"),
    (r"^gaierror", _LATER_S, "cannot be found: its host name does not resolve"),
    (
        r"^SSLCertVerificationError",
        _LATER_S,
        "shows a certificate that is not trusted, or is another's: name its authority by ?ssl_ca_certs=FILE",
    ),
    (
        r"(?i)alert certificate required",
        _LATER_S,
        "asks for a certificate of ours: name it and its key by ?ssl_certfile=FILE&ssl_keyfile=FILE",
    ),
    (r"^SSL\w*Error", _LATER_S, "does not speak TLS as it should: is this its TLS port?"),
    (r"^FileNotFoundError", _SOON_S, "is not there: its socket does not exist"),
    (r"^PermissionError", _LATER_S, "cannot be entered: this process may not open its socket"),
    (
        rf"\[Errno (?:{EHOSTUNREACH}|{ENETUNREACH}|{EADDRNOTAVAIL})\]",
        _SOON_S,
        "cannot be reached: there is no way to its host",
    ),
    (r"^TimeoutError", _SOON_S, "did not answer in time"),
)
"""What is found in an error's kind and text, when to come back, and what is said; what says more is first."""

_LOST = (_SOON_S, "cannot be reached, or closed the connection")


def _meaning(causes: Sequence[BaseException]) -> tuple[float, str]:
    """Return when to come back, and what is said of the store."""
    # A pipeline puts the command before what the server said to it.
    words = (str(one).rpartition("of pipeline caused error: ")[2] for one in causes)
    texts = [f"{type(one).__name__}: {said}" for one, said in zip(causes, words, strict=True)]
    for text in texts:
        for pattern, wait_s, says in _MEANINGS:
            if re.search(pattern, text, re.DOTALL):
                return wait_s, says.format(command=_command_in(texts))
    if any(isinstance(one, told.ConnectionError | OSError) for one in causes):
        return _LOST
    return _LATER_S, f"answers with an error that this service does not know ({type(causes[0]).__name__})"


def _command_in(texts: Sequence[str]) -> str:
    """Return which command the server speaks of, as far as it says."""
    found = (re.search(r"(?:command|run the),? ['`\u2018]([\w|.-]{1,40})", text) for text in texts)
    return next((f"the command {one[1].lower()!r}" for one in found if one), "a command that it needs")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from: redis-py wraps the system's errors, and more than once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
