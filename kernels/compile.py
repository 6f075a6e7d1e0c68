"""From an op's DSL object to PTX text; what every op's `generate` shares."""

import re
from collections.abc import Mapping
from contextlib import chdir
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

from kernels.tiles import VECTOR
from registry.contract.abi import Abi

SCALARS = {"i32": cutlass.Int32(1), "i64": cutlass.Int64(VECTOR), "f32": cutlass.Float32(1)}


def to_ptx(
    op: Any, abi: Abi, elements: Mapping[str, type[cutlass.Numeric]], symbol: str, dump_dir: str,
    vectors: tuple[str, ...] = (), arch: str | None = None,
) -> tuple[str, str]:  # fmt: skip
    """(PTX, name of its only entry) of `op`, whose `kernel` takes the ABI's parameters in their order.

    elements: element type of each pointer that is not to fp32; two-byte elements are 16-byte aligned, and those to
    `vectors` too.
    arch: of the PTX, where it is not the worker's CUTE_DSL_ARCH.
    """
    arguments = []
    for p in abi.params:
        element = elements.get(p.name, cutlass.Float32)
        align = 16 if element.width == 16 or p.name in vectors else 4
        pointer = p.type == "ptr"
        arguments.append(
            make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align) if pointer else SCALARS[p.type]
        )
    # A name of our own: the DSL's would hold module paths and change the PTX when a file moves.
    type(op).kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    with chdir(dump_dir):  # the DSL splits its options at spaces: only a path that holds none, '.', survives
        options = "--keep-ptx --dump-dir=." + (f" --gpu-arch={arch}" if arch else "")
        ptx = cute.compile(op, *arguments, options=options).__ptx__.rstrip("\0")
    entry = re.search(r"\.entry\s+(\w+)", ptx)  # the DSL appends the number of the kernel within its trace, always 0
    assert entry is not None and entry[1].startswith(symbol), f"the DSL named the kernel {entry and entry[1]!r}"
    return ptx, entry[1]
