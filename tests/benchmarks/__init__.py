"""Tests of the benchmark scripts and of the GPU harness, on the CPU."""
