"""`python -m runtime`."""
