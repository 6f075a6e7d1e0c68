"""Measurements on a GPU: `python -m benchmarks.<name>` from the root of a checkout. Results live in `results/`."""
