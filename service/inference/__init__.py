"""From bytes to predictions: decoding, batching, encoding, scoring."""
