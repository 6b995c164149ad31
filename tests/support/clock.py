"""Time that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Seconds of a monotonic clock and of wall time, which are the same here."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once."""
        self.now += seconds
