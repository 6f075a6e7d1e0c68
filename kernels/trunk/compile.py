"""From an op's DSL object to PTX text and launch facts; what every op's `generate` shares."""

import re
from collections.abc import Mapping
from contextlib import chdir
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

from kernels.trunk.generated import Generated, symbol
from kernels.trunk.scalars import DTYPES, VECTOR
from registry.contract.abi import Param
from registry.contract.grid import Grid
from registry.contract.variant import Variant
from registry.ops.describe import Op

SCALARS = {"i32": cutlass.Int32(1), "i64": cutlass.Int64(VECTOR), "f32": cutlass.Float32(1)}
FIXED = {"i32": cutlass.Int32, "fp32": cutlass.Float32}  # tensors' dtypes that are no variant's choice


def compiled(
    kernel: Any, op: Op, variant: Variant, dump_dir: str, *, tile: int, vectors: tuple[str, ...] = (),
    elements: Mapping[str, type[cutlass.Numeric]] | None = None,
) -> Generated:  # fmt: skip
    """Compile a DSL object, whose `kernel` takes the parameters of the op's ABI in their order, with `threads` and
    `smem`.

    tile: rows of the grid's tiles. vectors: pointers of 16-byte alignment beside those to two-byte elements. elements:
    what a pointer is to, where its tensor's description does not say it.
    """
    # A name of our own: the DSL's would hold module paths and change the PTX when a file moves.
    type(kernel).kernel.set_name_prefix(symbol(variant), remove_cutlass_symbol=True, keep_mangled_name=False)
    pointees = {t.name: FIXED.get(t.dtypes[0], DTYPES[variant.dtype]) for t in op.tensors} | dict(elements or {})
    arguments = [_argument(p, pointees.get(p.name), p.name in vectors) for p in op.abi.params]
    with chdir(dump_dir):  # the DSL splits its options at spaces: only a path that holds none, '.', survives
        options = f"--keep-ptx --dump-dir=. --gpu-arch={op.target(variant.features)}"
        ptx = cute.compile(kernel, *arguments, options=options).__ptx__.rstrip("\0")
    entry = re.search(r"\.entry\s+(\w+)", ptx)  # the DSL appends the number of the kernel within its trace, always 0
    assert entry is not None and entry[1].startswith(symbol(variant)), f"the DSL named the kernel {entry and entry[1]}"
    return Generated(ptx, entry[1], kernel.threads, kernel.smem, Grid(op.grid, tile))


def _argument(param: Param, pointee: type[cutlass.Numeric] | None, vectors: bool) -> Any:
    """A stand-in of the parameter's type."""
    if pointee is None:
        return SCALARS[param.type]
    align = 16 if vectors or pointee.width == 16 else 4
    return make_ptr(pointee, 0, cute.AddressSpace.gmem, assumed_align=align)
