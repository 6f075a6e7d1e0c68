"""Keeps torch.compile out of this package: a graph breaks at a public function, which then runs as it does eagerly.

Without this, Dynamo traces into configuration, session and sources, for many seconds, to break there all the same.
torch is not imported: what can be said to a function object is said at once, what must be said to torch as soon as
it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_waiting: list[CodeType] = []  # torch has not been told of these yet


def untraced(function: Function) -> Function:
    """A decorator: Dynamo neither traces into the function nor into what it calls."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "Cubinery launches its kernels itself"  # type: ignore[attr-defined]
    _waiting.append(function.__code__)
    tell_torch()
    return function


def tell_torch() -> None:
    """Skip the frames of untraced functions, if torch is imported. Cheap when there is nothing new to say."""
    if not _waiting or "torch" not in sys.modules:
        return
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
        while _waiting:
            eval_frame.set_code_exec_strategy(_waiting.pop(), skip)
    except (ImportError, AttributeError):  # a torch without these: tracing is slow there, and gives the same results
        _waiting.clear()
