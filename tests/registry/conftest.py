"""Hypothesis draws the same cases in every run: CI is to be reproducible, and its machines differ in speed."""

from hypothesis import settings

settings.register_profile("registry", derandomize=True, deadline=None, database=None)
settings.load_profile("registry")
