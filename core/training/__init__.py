"""Few-shot training of the offsets, Eq. (16)."""
