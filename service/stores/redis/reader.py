"""How many slices of a memory are read ahead."""

from __future__ import annotations

SLICES_AHEAD = 4
