"""Whose turn it is: what several owners wait for, one of each in turn, each owner's own in order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue in which an owner who has much waiting delays another's next one by one of its own at most."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(own) for own in self._of.values())

    def __bool__(self) -> bool:
        return bool(self._of)

    def __iter__(self) -> Iterator[T]:
        return (item for own in self._of.values() for item in own)

    def put(self, owner: str, item: T) -> None:
        """Let an item wait behind its owner's others."""
        self._of.setdefault(owner, deque()).append(item)

    def first(self) -> T:
        """Return the item whose turn is next; there must be one."""
        return next(iter(self._of.values()))[0]

    def take(self) -> T:
        """Remove the item whose turn is next, and return it; there must be one."""
        owner, own = next(iter(self._of.items()))
        item = own.popleft()
        if own:
            self._of.move_to_end(owner)
        else:
            del self._of[owner]
        return item

    def clear(self) -> list[T]:
        """Remove all items, and return them."""
        left = list(self)
        self._of.clear()
        return left
