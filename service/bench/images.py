"""JPEGs that no data folder is needed for: smooth coloured noise with a shape on it, the same for the same seed."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, size: int) -> bytes:
    """Return a JPEG of `size` x `size` pixels, about as large as a photo of that size."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image = rough.resize((size, size), Image.Resampling.BICUBIC)
    left, top, width, height = rng.integers((0, 0, size // 4, size // 4), (size // 2, size // 2, size // 2, size // 2))
    shape = ImageDraw.Draw(image)
    draw = (shape.ellipse, shape.rectangle)[seed % 2]
    draw((left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.normal(0, 6, (size, size, 3))
    file = BytesIO()
    Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()
