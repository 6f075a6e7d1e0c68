"""`bwd`: dK and dV of a tile of keys."""
