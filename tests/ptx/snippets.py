"""Kernels of a few lines, for the interpreter's tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from tests.ptx.formats import Array
from tests.ptx.interpreter import Device, Kernel

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"


def kernel(body: str, params: Sequence[str] = ("out", "in")) -> Kernel:
    """A kernel of pointer parameters. %d0, %d1, … hold them, %r0 the thread and %d9 four times it."""
    loads = "\n".join(f"ld.param.u64 %d{j}, [{name}];" for j, name in enumerate(params))
    declared = ", ".join(f".param .u64 {name}" for name in params)
    return Kernel(
        f"{HEADER}.visible .entry test({declared})\n{{\n"
        ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>;\n"
        f"{loads}\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d9, %r0, 4;\n{body}\n}}\n"
    )


def launch(body: str, *inputs: Array, out: int = 512, threads: int = 32, blocks: int = 1, smem: int = 0) -> Array:
    """Run a body whose first parameter is `out` bytes of new memory, the others copies of `inputs`. The output bytes.

    The body begins with %d8 = the thread's word of the output.
    """
    device = Device()
    address = device.empty(out)
    pointers = [address, *(device.put(x) for x in inputs)]
    names = ["out", *(f"in{j}" for j in range(len(inputs)))]
    one = kernel(f"add.s64 %d8, %d0, %d9;\n{body}", names)
    params = struct.pack(f"<{len(pointers)}Q", *pointers)
    one.run(device, grid=(blocks, 1, 1), block=(threads, 1, 1), params=params, smem=smem)
    return device.get(address)


def evaluate(code: str, out: type, *inputs: Array) -> Array:
    """`code` for 32 threads: input j in register xj, the result in y. Scalars are spread over the threads."""
    out_type = np.dtype(out)
    lanes = [np.ascontiguousarray(np.broadcast_to(x, 32)) for x in inputs]
    registers = "".join(f".reg .b{8 * x.itemsize} x{j};\n" for j, x in enumerate(lanes))
    loads = "".join(
        f"mul.wide.u32 %d10, %r0, {x.itemsize}; add.s64 %d10, %d10, %d{j + 1}; "
        f"ld.global.b{8 * x.itemsize} x{j}, [%d10];\n"
        for j, x in enumerate(lanes)
    )
    result = launch(
        f"{registers}.reg .b{8 * out_type.itemsize} y;\n.reg .pred p, q;\n{loads}{code}\n"
        f"mul.wide.u32 %d10, %r0, {out_type.itemsize}; add.s64 %d10, %d10, %d0; "
        f"st.global.b{8 * out_type.itemsize} [%d10], y; ret;",
        *lanes,
        out=32 * out_type.itemsize,
    )
    return result.view(out_type)
