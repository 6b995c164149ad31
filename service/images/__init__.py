"""From bytes to RGB pixels: formats, limits, decoding."""
