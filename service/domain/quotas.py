"""Quotas, their leases and decisions; limits on how much one call may hold."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import TooManyImages
from service.settings import Settings

MICROSECONDS = 1e6


def check_count(images: int, settings: Settings) -> None:
    """Return if a call may hold so many images.

    Raises:
        TooManyImages: it may not.
    """
    if images > settings.max_images:
        raise TooManyImages(f"The call holds {images} images; at most {settings.max_images} are allowed.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How much of a tenant's work is let in, in images times views; 0 stands for no limit.

    `rate` a second in the long run, `burst` at once after a pause, `concurrent` at work at a time.
    """

    rate: float = 0.0
    burst: int = 0
    concurrent: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Room for images that are at work; nobody else's has this id."""

    id: str
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What a store says to images that want in, and what is left once they are in, or are not.

    They are `let_in` unless they have to wait `wait_s` seconds for tokens, or there is no room beside the `held` images
    that are at work (`crowded`).
    """

    wait_s: float
    crowded: bool
    tokens: float
    held: int

    @property
    def let_in(self) -> bool:
        """Whether they are in."""
        return not self.wait_s and not self.crowded
