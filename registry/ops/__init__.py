"""One description per op: `get(name)` for each of `OPS`."""

from registry.ops.catalogue import OPS, get, together

__all__ = ["OPS", "get", "together"]
