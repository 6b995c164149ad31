"""The `dmn` command: serving, evaluation, memories, API keys and benchmarks."""
