"""The benchmark on a GPU: ``python -m benchmarks --device cuda``, ``python -m benchmarks passes --device cuda``."""
