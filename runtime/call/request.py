"""What the user passed: a call before it is checked."""

from typing import Any, NamedTuple

PLAIN = frozenset((bool, int, float, type(None)))  # types of numbers as a key should hold them
SIDES = frozenset((int, type(None)))  # the same of a window's sides


class Options(NamedTuple):
    """A call's arguments that are no tensors; `flash_attn` and the other public functions say what each is.

    pack_gqa: whether the query heads of a key/value head share tiles; None leaves it to the dispatch table.
    num_splits, rotary_interleaved: of a call over a cache. out_dtype: of `flash_attn_combine`.
    """

    causal: Any = False
    softmax_scale: Any = None
    window: Any = None
    softcap: Any = 0.0
    return_lse: Any = False
    pack_gqa: Any = None
    num_splits: Any = 1
    rotary_interleaved: Any = True
    out_dtype: Any = None


class Hints(NamedTuple):
    """What a caller may say of lengths that are on the device. max_seqlen_q, max_seqlen_k: of the longest entry."""

    max_seqlen_q: Any = None
    max_seqlen_k: Any = None


class Request(NamedTuple):
    """op: the one whose result the caller gets. tensors: by the public functions' names, only those that are given."""

    op: str
    tensors: dict[str, Any]
    options: Options
    hints: Hints = Hints()


class Call(NamedTuple):
    """A checked request: what is left is numbers.

    facts: what dispatch rows look at. numbers: of the kernels' scalars and strides, by name, but for those that depend
    on the kernel. sizes: of the tensors' dimensions, by name. given: names of the tensors. window: (left, right) in
    tokens, open is WINDOW_OPEN. pack_gqa: as in Options. num_splits: as asked for, 0 is our choice.
    """

    op: str
    facts: dict[str, Any]
    numbers: dict[str, int | float]
    sizes: dict[str, int]
    given: tuple[str, ...]
    window: tuple[int, int] = (0, 0)
    pack_gqa: bool | None = None
    num_splits: int = 1
