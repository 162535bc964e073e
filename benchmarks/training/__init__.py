"""``python -m benchmarks train``: small networks with each system, trained on real images that need no download."""
