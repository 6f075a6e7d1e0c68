"""Tests of `builder/`. Toy kernels in hand-written PTX stand in for the real ones wherever these would take long."""
