"""Where a call's tensors lie: whether they have memory, start where the kernels need it, and stay apart from `out`."""

from __future__ import annotations

from typing import Any

from runtime.errors import ArgumentError

ALIGNMENT = 16  # bytes, of q, k, v and out: what one copy of the kernels moves; other tensors are read by elements


def check_storage(*tensors: tuple[str, Any]) -> None:
    """ArgumentError for a tensor that has elements but no memory of its own."""
    for name, tensor in tensors:
        try:
            bare = tensor.data_ptr() == 0 and tensor.numel() > 0
        except RuntimeError:  # of torch.func's wrappers
            bare = True
        if bare:
            message = (
                f"{type(tensor).__name__} without memory of its own (a DTensor, FakeTensor, torch.func wrapper, freed "
                "storage), must be a plain tensor; a DTensor's is .to_local()"
            )
            raise ArgumentError(name, message, reason="storage")


def address_of(name: str, tensor: Any) -> int:
    """Of a tensor that was just made: under FakeTensorMode or torch.func it may have no memory (ArgumentError)."""
    try:
        address: int = tensor.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        address = 0
    if not address:
        check_storage((name, tensor))
    return address


def check_alignment(alignment: int, *pointers: tuple[str, int]) -> None:
    """ArgumentError for the first address that is no multiple of `alignment` bytes, a power of 2."""
    for name, address in pointers:
        if address & (alignment - 1):
            message = f"starts at {address:#x}, must start at a multiple of {alignment} bytes; .clone() it"
            raise ArgumentError(name, message, reason="alignment")


def check_address(name: str, tensor: Any, address: int, alignment: int) -> None:
    """Both of the above, for one tensor's address."""
    check_alignment(alignment, (name, address))
    if not address:
        check_storage((name, tensor))


def span(tensor: Any) -> int:
    """Bytes from a tensor's first element to past its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def overlaps_itself(tensor: Any) -> bool:
    """Whether two elements may share memory: True wherever a stride is within the extent of smaller ones."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


def check_apart(out: Any, *others: tuple[str, Any]) -> None:
    """ArgumentError if `out` shares memory with an input whose span it meets; parts of one packed buffer do not.

    out: (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim). A None among the others is passed over.
    """
    for name, tensor in others:
        if tensor is None:
            continue
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
