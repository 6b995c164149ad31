"""Replay of recorded streams and its metrics."""
