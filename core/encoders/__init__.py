"""Encoders: the protocol, open_clip, the built-in `lite` encoder, weights and views."""
