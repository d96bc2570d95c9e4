"""Benchmarks of gravlens_jax on the machine at hand; `scripts/benchmark.py` is their command line."""
