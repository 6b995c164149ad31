"""Events, not sentences: one line each, with the request it belongs to. Never images, features or keys."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request at hand; set by the porch."""

traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""Span of the request at hand, as W3C's header of that name writes it; set by the porch while there are traces."""

STARTED = "dmn.service.started"
STOPPED = "dmn.service.stopped"
ENCODER_SLOWER = "dmn.encoder.slower"
NOTHING_KEPT = "dmn.store.nothing_kept"
NO_KEYS = "dmn.auth.no_keys"
DRAINING = "dmn.service.draining"
PROCESS_STARTED = "dmn.process.started"
PROCESS_ENDED = "dmn.process.ended"
STUCK = "dmn.process.stuck"
PROCESS_STAYED = "dmn.process.stayed"
REQUEST = "dmn.request"
FAILED = "dmn.request.failed"
ANSWER_CUT = "dmn.request.cut"
BATCH_FAILED = "dmn.batch.failed"
BATCH_HALVED = "dmn.batch.halved"
MEMORY_LOADED = "dmn.memory.loaded"
MEMORY_EVICTED = "dmn.memory.evicted"
MEMORY_RESCORED = "dmn.memory.rescored"
SHOTS_REENCODED = "dmn.shots.reencoded"
TRAINED = "dmn.offsets.trained"
OFFSETS_REMOVED = "dmn.offsets.removed"
MEMORY_RESET = "dmn.memory.reset"
MEMORY_REPAIRED = "dmn.memory.repaired"
MEMORY_RESTORED = "dmn.memory.restored"
MIGRATED = "dmn.memory.migrated"
SNAPSHOT_TAKEN = "dmn.snapshot.taken"
WRITES_LOST = "dmn.writes.lost"
WRITES_DELIVERED = "dmn.writes.delivered"
STORE_AWAY = "dmn.store.away"
STORE_NOT_FLUSHED = "dmn.store.not_flushed"
STORE_STILL_THERE = "dmn.store.still_there"
STORE_BACK = "dmn.store.back"
JOB_OVER = "dmn.job.over"
JOB_FAILED = "dmn.job.failed"
UPKEEP_FAILED = "dmn.upkeep.failed"
UPKEEP_REFUSED = "dmn.upkeep.refused"
TENANT_CHANGED = "dmn.tenant.changed"

logger = logging.getLogger("dmn")


def event(name: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """Log one event with its values; `error` adds its traceback."""
    logger.log(level, name, extra={"fields": fields}, exc_info=error)


def set_up(level: str, form: Literal["json", "text"], stream: TextIO = sys.stderr, *, process: str = "") -> None:
    """Send this service's events, and warnings of its libraries and of Python, to `stream`.

    Of several processes each has a name.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json(process) if form == "json" else _Text(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    logging.captureWarnings(capture=True)


def _values(record: logging.LogRecord, process: str) -> dict[str, object]:
    own: dict[str, object] = dict(getattr(record, "fields", {}))
    if process:
        own["process"] = process
    if request_id.get():
        own.setdefault("request_id", request_id.get())
    return own


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_values(record, self._process),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=True)


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        # json.dumps keeps a value on one line, whatever a client put into it.
        values = " ".join(
            f"{name}={json.dumps(value, default=str)}" for name, value in _values(record, self._process).items()
        )
        text = f"{time} {record.levelname.lower():7} {json.dumps(record.getMessage())[1:-1]} {values}".rstrip()
        if not record.exc_info:
            return text
        # Behind a bar, and with control characters spelled out: an error's text must not pass for a line of ours.
        trace = (json.dumps(line)[1:-1] for line in self.formatException(record.exc_info).splitlines())
        return "\n".join((text, *(f"  | {line}" for line in trace)))
