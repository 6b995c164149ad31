"""Events, one line each, whatever a client puts into them."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.telemetry import logs

Form = Literal["json", "text"]
SetUp = Callable[..., io.StringIO]

FORGED = 'x\n{"level":"error","event":"forged"}\r\x1b[31m\u2028\u0085\0"\\'


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetUp]:
    """Return what sets logging up on a stream of its own; all is as before afterwards."""
    root, level = logging.getLogger(), logs.logger.level
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    before = root.level

    def start(form: Form = "json", level: str = "info") -> io.StringIO:
        stream = io.StringIO()
        logging.captureWarnings(capture=False)
        logs.set_up(level, form, stream)
        return stream

    yield start
    logging.captureWarnings(capture=False)
    root.setLevel(before)
    logs.logger.setLevel(level)


def lines(stream: io.StringIO) -> list[str]:
    """Return what a reader of lines sees, by any of the characters that may end one."""
    return stream.getvalue().splitlines()


def test_an_event_is_one_line_of_json(set_up: SetUp) -> None:
    stream = set_up()
    logs.event(logs.MEMORY_LOADED, tenant="zoo", classes=3)
    (line,) = lines(stream)
    told = json.loads(line)
    assert set(told) == {"time", "level", "logger", "event", "tenant", "classes"}
    assert (told["level"], told["event"], told["tenant"], told["classes"]) == ("info", "dmn.memory.loaded", "zoo", 3)
    assert told["time"].endswith("+00:00")


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_value_can_forge_a_line(set_up: SetUp, form: Form) -> None:
    stream = set_up(form)
    token = logs.request_id.set(FORGED)
    logs.event(FORGED, tenant=FORGED, things=[FORGED], more={FORGED: FORGED})
    logs.request_id.reset(token)
    logging.getLogger("library").warning(FORGED)
    assert len(lines(stream)) == 2
    assert "\x1b" not in stream.getvalue()


@given(value=st.text() | st.dictionaries(st.text(), st.text()) | st.floats() | st.binary() | st.none())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("form", ["json", "text"])
def test_any_value_makes_one_line(set_up: SetUp, form: Form, value: object) -> None:
    stream = set_up(form)
    logs.event("event", value=value)
    (line,) = lines(stream)
    if form == "json":
        assert "value" in json.loads(line)


def _fail(message: str) -> None:
    """Log an error that was really raised."""
    with pytest.raises(ValueError, match="x") as raised:
        raise ValueError(message)
    logs.event(logs.FAILED, level=logging.ERROR, error=raised.value)


def test_an_error_brings_its_traceback_within_its_line_of_json(set_up: SetUp) -> None:
    stream = set_up()
    _fail(FORGED)
    (line,) = lines(stream)
    told = json.loads(line)
    assert told["level"] == "error"
    assert "test_logs.py" in told["traceback"]
    assert "forged" in told["traceback"]


def test_an_error_cannot_forge_a_line_of_text(set_up: SetUp) -> None:
    """A traceback takes several lines for people; none of them may look like an event of its own."""
    stream = set_up("text")
    logs.event("dmn.first")
    (first,) = lines(stream)
    stamp = first.split()[0]
    _fail(f"x\n{stamp} error   dmn.forged\x1b[2J")
    assert not [line for line in lines(stream) if line.startswith(f"{stamp} error   dmn.forged")]
    assert "\x1b" not in stream.getvalue()


def test_an_event_carries_the_request_that_it_belongs_to(set_up: SetUp) -> None:
    stream = set_up()
    token = logs.request_id.set("r1")
    logs.event("inside")
    logs.request_id.reset(token)
    logs.event("outside")
    inside, outside = (json.loads(line) for line in lines(stream))
    assert inside["request_id"] == "r1"
    assert "request_id" not in outside


def test_text_is_for_people(set_up: SetUp) -> None:
    stream = set_up("text")
    logs.event(logs.MEMORY_LOADED, tenant="my zoo", classes=3)
    (line,) = lines(stream)
    assert line.endswith('info    dmn.memory.loaded tenant="my zoo" classes=3')


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_the_least_level_is_kept(set_up: SetUp, level: str, count: int) -> None:
    stream = set_up(level=level)
    for own in (logging.DEBUG, logging.INFO, logging.WARNING):
        logs.event("event", level=own)
    assert len(lines(stream)) == count


def test_libraries_are_heard_from_warnings_on_whatever_the_level(set_up: SetUp) -> None:
    stream = set_up(level="debug")
    library = logging.getLogger("library")
    library.info("chatter")
    library.warning("trouble with %s", "this")
    (line,) = lines(stream)
    assert json.loads(line)["event"] == "trouble with this"


def test_a_warning_of_python_is_a_line_too(set_up: SetUp) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        stream = set_up()
        warnings.warn(FORGED, stacklevel=1)
    (line,) = lines(stream)
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("warning", "py.warnings")
    assert "forged" in told["event"]


def test_setting_up_twice_does_not_log_twice(set_up: SetUp) -> None:
    set_up()
    stream = set_up()
    logs.event("event")
    assert len(lines(stream)) == 1
