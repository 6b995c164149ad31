"""Every class's bank, prepared and kept ready to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.memory.bank import Slots
from core.readout.projection import Projection, project_query
from core.readout.scores import Prepared, Turned, barrier, prepare, scores

from .snapshot import Snapshot

_NARROWEST = 4
_STEPS = 5
_FEWEST_ROWS = 4
_AT_ONCE = 32
_SMALL = 1 << 20
"""Numbers in a bank that stands on one shelf, uneven as its classes may be: a second one would cost more than these."""


class Shelves:
    """A cache of one snapshot's banks, changed in place by one owner.

    Classes of similar size share a shelf, padded to its width, so that padding adds three slots at most, or a sixteenth
    to what is filled, however uneven the classes are. A class that outgrows its shelf moves to the next one. A small
    bank stands on one shelf, as wide as its widest class.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._static = snapshot.static.filled
        self._widths = [_width(snapshot.filled(index)) for index in range(len(snapshot.text))]
        self._place_all()

    def advance(self, snapshot: Snapshot) -> None:
        """Move on to a later snapshot that differs from the present one in its dynamic slots and adaptation alone."""
        before, after = self.snapshot.dynamic.classes, snapshot.dynamic.classes
        self.snapshot = snapshot
        if before is after:
            return
        changed = [index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
        for index in changed:
            self._widths[index] = _width(snapshot.filled(index))
        if self._common != self._one_for_all():
            self._place_all()
        else:
            self._place(changed)

    def scores(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"] | None]:
        """Return the dynamic and the static scores of every class; no static ones where there is no shot."""
        parts = [self._read(*shelf.ready, x) for shelf in self._shelves.values()]
        both = parts[0] if self._common else torch.cat(parts, -1).index_select(-1, self._in_order())
        return both[0], both[1] if len(both) > 1 else None

    def patched(self, states: Sequence[tuple[int, Slots]], x: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """Return the dynamic scores of some classes, read as if they held other slots; nothing is changed."""
        classes, slots = zip(*states, strict=True)
        bank, _ = self.snapshot.bank(classes, slots)
        prepared = prepare(bank, _offsets(self.snapshot.projection, classes))
        return self._read(prepared, barrier(bank.occupied)[:, None], x)[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and room to grow included."""
        return sum(shelf.nbytes for shelf in self._shelves.values())

    def _read(
        self, prepared: Prepared, barriers: Float[Tensor, "c b s"], x: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b n c"]:
        query = project_query(x, self.snapshot.projection)
        return scores(prepared, barriers[:, :, None], x, query, beta=self.snapshot.beta, tau=self.snapshot.tau)

    def _one_for_all(self) -> int | None:
        """Return the width of the shelf for all classes, if the bank is small."""
        classes, dim = self.snapshot.text.shape
        if classes * _NARROWEST * dim > _SMALL:
            return None
        widest = max(self._widths)
        return widest if classes * widest * dim <= _SMALL else None

    def _place_all(self) -> None:
        self._common = self._one_for_all()
        self._shelves: dict[int, _Shelf] = {}
        self._shelf_of: dict[int, int] = {}
        self._place(range(len(self._widths)))

    def _place(self, classes: Iterable[int]) -> None:
        """Put classes on the shelves of their widths."""
        self._back: Int[Tensor, " c"] | None = None
        by_width: dict[int, list[int]] = {}
        for index in classes:
            by_width.setdefault(self._common or self._widths[index], []).append(index)
        for width, own in by_width.items():
            self._take_down([index for index in own if self._shelf_of.get(index, width) != width])
            shelf = self._shelves.setdefault(width, _Shelf(room=len(own)))
            # Many at a time: a class by itself is too little work for an operation.
            for start in range(0, len(own), _AT_ONCE):
                self._put(shelf, own[start : start + _AT_ONCE], width)
            self._shelf_of.update(dict.fromkeys(own, width))

    def _take_down(self, classes: Iterable[int]) -> None:
        for index in classes:
            width = self._shelf_of[index]
            self._shelves[width].remove(index)
            if not self._shelves[width].classes:
                del self._shelves[width]

    def _put(self, shelf: _Shelf, classes: Sequence[int], width: int) -> None:
        bank, static = self.snapshot.bank(classes, width=width)
        filled = [bank.occupied]
        if self._static:
            shots = torch.tensor(static, device=bank.keys.device)
            filled.append(torch.arange(width, device=shots.device) < shots[:, None])
        prepared = prepare(bank, _offsets(self.snapshot.projection, classes))
        shelf.put(classes, prepared, barrier(torch.stack(filled, 1)))

    def _in_order(self) -> Int[Tensor, " c"]:
        """Return the place of each class among the rows of all shelves."""
        if self._back is None:
            rows = [index for shelf in self._shelves.values() for index in shelf.classes]
            self._back = torch.tensor(rows, device=self.snapshot.text.device).argsort()
        return self._back


class _Shelf:
    """Prepared rows of one width, compact, in tensors that double when they are full."""

    def __init__(self, *, room: int) -> None:
        self._least = max(_FEWEST_ROWS, room)
        self.classes: list[int] = []
        """The class of each row."""
        self._row_of: dict[int, int] = {}
        self._arrays: dict[str, Tensor] = {}
        self._ready: tuple[Prepared, Float[Tensor, "c b s"]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def ready(self) -> tuple[Prepared, Float[Tensor, "c b s"]]:
        """The rows in use, and what tells their filled slots."""
        if self._ready is None:
            rows = {name: array[: len(self.classes)] for name, array in self._arrays.items()}
            turned = Turned(**{f.name: rows[f.name] for f in fields(Turned)}) if "key" in rows else None
            prepared = Prepared(slots=rows["slots"], scale=rows["scale"], gram=rows["gram"], turned=turned)
            self._ready = prepared, rows["barriers"]
        return self._ready

    def put(self, classes: Sequence[int], prepared: Prepared, barriers: Float[Tensor, "c b s"]) -> None:
        """Write the rows of some classes."""
        parts = {"slots": prepared.slots, "scale": prepared.scale, "gram": prepared.gram, "barriers": barriers}
        if prepared.turned is not None:
            parts |= {f.name: getattr(prepared.turned, f.name) for f in fields(Turned)}
        rows = [self._row_of[index] if index in self._row_of else self._append(index) for index in classes]
        places = torch.tensor(rows, device=barriers.device)
        for name, part in parts.items():
            self._room(name, part).index_copy_(0, places, part)

    def remove(self, index: int) -> None:
        """Drop a class; the last row takes its place."""
        row, last = self._row_of.pop(index), self.classes.pop()
        self._ready = None
        if last == index:
            return
        for array in self._arrays.values():
            array[row] = array[len(self.classes)]
        self.classes[row] = last
        self._row_of[last] = row

    def _append(self, index: int) -> int:
        self._row_of[index] = len(self.classes)
        self.classes.append(index)
        self._ready = None
        return self._row_of[index]

    def _room(self, name: str, like: Tensor) -> Tensor:
        array = self._arrays.get(name, like[:0])
        if len(array) < len(self.classes):
            rows = max(self._least, 2 * len(array), len(self.classes))
            grown = like.new_empty((rows, *like.shape[1:]))  # only rows in use are read
            grown[: len(array)] = array
            self._arrays[name] = array = grown
        return array


def _width(filled: int) -> int:
    step = max(_NARROWEST, 1 << max(0, filled.bit_length() - _STEPS))
    return -(-filled // step) * step


def _offsets(projection: Projection | None, classes: Sequence[int]) -> Projection | None:
    if projection is None:
        return None
    return projection.of(torch.tensor(classes, device=projection.key.device))
