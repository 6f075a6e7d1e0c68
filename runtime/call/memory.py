"""Whether `out` stays apart from a call's other tensors."""

from __future__ import annotations

from typing import Any

from runtime.errors import ArgumentError


def span(tensor: Any) -> int:
    """Bytes from a tensor's first element to past its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def check_apart(out: Any, *others: tuple[str, Any]) -> None:
    """ArgumentError if `out` shares memory with an input whose span it meets; parts of one packed buffer do not.

    out: (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim).
    """
    for name, tensor in others:
        distance = out.data_ptr() - tensor.data_ptr()
        if -span(out) < distance < span(tensor) and not _interleaved(out, tensor, distance):
            raise ArgumentError("out", f"shares memory with {name}; give it its own", reason="overlap")


def _interleaved(out: Any, tensor: Any, distance: int) -> bool:
    """Whether both are disjoint parts of the rows of one packed buffer, e.g. q and out of (batch, seqlen, 4, …)."""
    steps = out.stride()[:-2]  # of batch, if there is one, and tokens
    row = steps[-1] * out.element_size()
    batches = out.shape[0] if out.dim() == 4 else 1
    if tensor.stride()[:-2] != steps or row <= 0 or (batches > 1 and steps[0] % steps[1]):
        return False
    offset = distance % row  # from a row's first byte of `tensor` to the next of `out`
    first = (0,) * len(steps)
    return offset >= span(tensor[first]) and offset + span(out[first]) <= row
