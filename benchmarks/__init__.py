"""Benchmarks of vcr_ops: ``python -m benchmarks`` from the repository root; ``--help`` shows what it prints."""
