"""Readout of a memory and fusion of the branches, Eq. (6) to (13)."""
