"""Every class's bank, prepared and kept ready to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .bank import Slots, pack
from .projection import Projection, project_query
from .readout import Prepared, prepare, scores
from .snapshot import Snapshot

_NARROWEST = 4
_FEWEST_ROWS = 4
_AT_ONCE = 32


class Shelves:
    """A cache of one snapshot's banks, changed in place by one owner.

    Classes of similar size share a shelf, padded to its width, so that padding adds at most a quarter to what is
    filled (and three slots to a class of a few), however uneven the classes are. A class that outgrows its shelf moves
    to the next one.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._shelves: dict[int, _Shelf] = {}
        self._width_of: dict[int, int] = {}
        by_width: dict[int, list[int]] = {}
        for index in range(len(snapshot.text)):
            by_width.setdefault(_width(snapshot.filled(index)), []).append(index)
        for width, classes in by_width.items():
            # Many at a time: a class by itself is too little work for an operation.
            for start in range(0, len(classes), _AT_ONCE):
                self._place(classes[start : start + _AT_ONCE], width, room=len(classes))

    def advance(self, snapshot: Snapshot) -> None:
        """Move on to a later snapshot that differs from the present one in its dynamic slots and adaptation alone."""
        before, after = self.snapshot.dynamic.classes, snapshot.dynamic.classes
        self.snapshot = snapshot
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            if old is not new:
                self._put(index)

    def scores(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"] | None]:
        """Return the dynamic and the static scores of every class; no static ones where there is no shot."""
        names = ("dynamic", "static") if self.snapshot.static.filled else ("dynamic",)
        out = {name: x.new_empty(len(x), len(self._width_of)) for name in names}
        for shelf in self._shelves.values():
            for name, part in self._read(shelf.prepared(), shelf.masks(names), x).items():
                out[name][:, shelf.classes] = part
        return out["dynamic"], out.get("static")

    def patch(self, index: int, slots: Slots, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return the dynamic scores of one class, read as if it held `slots`; nothing is changed."""
        row, _ = self.snapshot.row(index, slots)
        bank = pack([row])
        prepared = prepare(bank, _offsets(self.snapshot.projection, [index]))
        return self._read(prepared, {"dynamic": bank.occupied}, x)["dynamic"][:, 0]

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and room to grow included."""
        return sum(shelf.nbytes for shelf in self._shelves.values())

    def _read(
        self,
        prepared: Prepared,
        masks: Mapping[str, Bool[Tensor, "c s"]],
        x: Float[Tensor, "n d"],
    ) -> dict[str, Float[Tensor, "n c"]]:
        query = project_query(x, self.snapshot.projection)
        return scores(prepared, masks, x, query, beta=self.snapshot.beta, tau=self.snapshot.tau)

    def _put(self, index: int) -> None:
        width, old = _width(self.snapshot.filled(index)), self._width_of.get(index)
        if old is not None and old != width:
            self._shelves[old].remove(index)
            if not self._shelves[old].places:
                del self._shelves[old]
        self._place([index], width)

    def _place(self, classes: Sequence[int], width: int, *, room: int = 0) -> None:
        """Put classes on the shelf of a width, which has room for so many at first."""
        rows = [self.snapshot.row(index) for index in classes]
        bank = pack([row for row, _ in rows], width=width)
        static = torch.tensor([count for _, count in rows], device=bank.keys.device)
        prepared = prepare(bank, _offsets(self.snapshot.projection, classes))
        self._shelves.setdefault(width, _Shelf(room)).put(classes, prepared, bank.occupied, static)
        self._width_of.update(dict.fromkeys(classes, width))


class _Shelf:
    """Prepared rows of one width, compact, in tensors that double when they are full."""

    def __init__(self, room: int) -> None:
        self._least = max(_FEWEST_ROWS, room)
        self.places: dict[int, int] = {}
        self._order: list[int] = []
        self._arrays: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def classes(self) -> Int[Tensor, " c"]:
        return torch.tensor(self._order, device=self._arrays["keys"].device)

    def prepared(self) -> Prepared:
        keys, projected = self._filled("keys"), "values" in self._arrays
        return Prepared(
            keys=keys,
            values=self._filled("values") if projected else keys,
            gram=self._filled("gram"),
            onto_output=self._filled("onto_output") if projected else None,
            output=self._filled("output") if projected else None,
        )

    def masks(self, names: tuple[str, ...]) -> dict[str, Bool[Tensor, "c s"]]:
        return {name: self._filled(name) for name in names}

    def put(
        self, classes: Sequence[int], rows: Prepared, occupied: Bool[Tensor, "c s"], static: Int[Tensor, " c"]
    ) -> None:
        """Write the rows of some classes; the first `static` slots of each are those of the static memory."""
        shots = occupied & (torch.arange(occupied.shape[1], device=static.device) < static[:, None])
        parts = {"keys": rows.keys, "gram": rows.gram, "dynamic": occupied, "static": shots}
        if rows.onto_output is not None and rows.output is not None:
            parts |= {"values": rows.values, "onto_output": rows.onto_output, "output": rows.output}
        places = [self.places[index] if index in self.places else self._append(index) for index in classes]
        for name, part in parts.items():
            self._room(name, part)[places] = part

    def remove(self, index: int) -> None:
        """Drop a class; the last row takes its place."""
        place, last = self.places.pop(index), self._order.pop()
        if last == index:
            return
        for array in self._arrays.values():
            array[place] = array[len(self._order)]
        self._order[place] = last
        self.places[last] = place

    def _append(self, index: int) -> int:
        self.places[index] = len(self._order)
        self._order.append(index)
        return self.places[index]

    def _room(self, name: str, like: Tensor) -> Tensor:
        array = self._arrays.get(name, like[:0])
        if len(array) < len(self._order):
            grown = like.new_empty((max(self._least, 2 * len(array)), *like.shape[1:]))  # only rows in use are read
            grown[: len(array)] = array
            self._arrays[name] = array = grown
        return array

    def _filled(self, name: str) -> Tensor:
        return self._arrays[name][: len(self._order)]


def _width(filled: int) -> int:
    step = max(_NARROWEST, 1 << (filled.bit_length() - 3) if filled.bit_length() > 3 else 1)  # noqa: PLR2004
    return -(-filled // step) * step


def _offsets(projection: Projection | None, classes: Sequence[int]) -> Projection | None:
    if projection is None:
        return None
    return projection.of(torch.tensor(classes, device=projection.key.device))
