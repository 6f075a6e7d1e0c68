"""Arrays of any rank in the PTX interpreter's memory, laid out to show every stray access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.interpreter import Device
from tests.reference import Array
from tests.support.call import Call, Tokens

PAD = 16  # elements beside each row of the last axis, a multiple of what strides must be multiples of
TENSOR_PAD = 8  # elements of NaN beside each row of head_dim; a multiple of 8, as strides must be


class Strided:
    """An array inside a larger buffer of 0xFF: an element beside each other axis, PAD beside the last.

    order: its axes from the outermost to the innermost in memory; the last stays the last. Loading anything but
    `defined` elements of it is a fault, as is an address outside the buffer.
    """

    def __init__(
        self, device: Device, bits: Array, defined: Array | bool = True, order: Sequence[int] = (), pad: int = PAD
    ):
        """bits: unsigned integers; defined: which may be loaded, broadcast to their shape."""
        self.device, self.order = device, (*(order or range(bits.ndim - 1)), bits.ndim - 1)
        self.pads = (1,) * (bits.ndim - 1) + (pad,)
        outer = [bits.shape[axis] + self.pads[axis] for axis in self.order]
        buffer, loadable = np.full(outer, np.iinfo(bits.dtype).max, bits.dtype), np.zeros(outer, bool)
        self.inside(buffer)[...], self.inside(loadable)[...] = bits, defined
        self.before, self.base = buffer, device.put(buffer, loadable)
        view = self.inside(buffer)
        self.strides = [stride // bits.itemsize for stride in view.strides]
        offset = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
        self.address = self.base + offset

    def inside(self, buffer: Array) -> Array:
        """The array's own part of a buffer, axes in their own order."""
        return buffer.transpose(np.argsort(self.order))[tuple(slice(pad, None) for pad in self.pads)]

    def result(self) -> Array:
        return self.inside(self.device.get(self.base, self.before.dtype).reshape(self.before.shape)).copy()

    def stray(self, written: Array | bool = True) -> int:
        """Elements that changed though they are not among those of the array that are to be `written`."""
        after = self.device.get(self.base, self.before.dtype).reshape(self.before.shape)
        changed = after != self.before
        self.inside(changed)[...] &= ~np.asarray(written)
        return int(np.count_nonzero(changed))

    def named(self, name: str, axes: str) -> dict[str, int]:
        """The parameters of an ABI that say where it lies. axes: the letters of its first axes; '.' for none."""
        strides = {f"{name}_stride_{axis}": s for axis, s in zip(axes, self.strides, strict=False) if axis != "."}
        return {name: self.address, **strides}


class Tensor:
    """(arrays, seqlen, heads, dim) on the device, each array inside a larger buffer of NaN of its own.

    Loading a byte of a buffer that is no part of an entry is a fault, as is an address outside the buffers.
    """

    def __init__(
        self, device: Device, case: Call, tokens: Tokens, heads: int, dim: int, values: Array | None = None,
        kind: type = np.uint16,
    ):  # fmt: skip
        """values: bits for an input; an output has none, and loading it before it is stored is a fault.

        kind: the integers that hold an element's bits.
        """
        self.device, self.heads_first, self.tokens, self.kind = device, case.heads_first, tokens, kind
        self.nothing = np.iinfo(kind).max
        outer = (heads + 1, tokens.seqlen + 1) if case.heads_first else (tokens.seqlen + 1, heads + 1)
        self.buffer_shape = (*outer, dim + TENSOR_PAD)
        buffer = np.full(self.buffer_shape, self.nothing, kind)
        self.array_stride = batch_stride(buffer.size, case.far)
        first = device.next
        self.bases = []
        for array in range(tokens.arrays):
            filled, defined = buffer.copy(), np.zeros(self.buffer_shape, bool)
            if values is not None:
                for part in parts(tokens, array):
                    self.inside(filled)[part] = values[array, part]
                    self.inside(defined)[part] = True
            self.bases.append(device.put(filled, defined, at=first + buffer.itemsize * array * self.array_stride))
        stride_s, stride_h, _ = (stride // buffer.itemsize for stride in self.inside(buffer).strides)
        self.strides = {"b": 0 if tokens.is_packed else self.array_stride, "s": stride_s, "h": stride_h}
        self.address = first + sum(buffer.strides[:2]) + buffer.itemsize * TENSOR_PAD

    def inside(self, buffer: Array) -> Array:
        """The tensor's own part of a buffer, as (seqlen, heads, dim)."""
        part = buffer[1:, 1:, TENSOR_PAD:]
        return part.swapaxes(0, 1) if self.heads_first else part

    def result(self) -> tuple[Array, int]:
        """(bits of all entries, (tokens, heads, dim); bytes changed outside them)."""
        buffers = [self.device.get(base, self.kind).reshape(self.buffer_shape).copy() for base in self.bases]
        bits = [self.inside(buffers[array])[part].copy() for array, part in self.tokens.entries]
        for array, part in self.tokens.entries:
            self.inside(buffers[array])[part] = self.nothing
        return np.concatenate(bits), changed_bytes(buffers)


class Statistics:
    """The LSE, (arrays, heads, seqlen_q) in fp32, with room around each row."""

    def __init__(self, device: Device, case: Call, tokens: Tokens | None = None):
        """tokens: the call's queries by default."""
        self.device, self.tokens = device, tokens or case.queries
        self.shape = (case.heads_q + 1, case.seqlen_q + 3)
        buffer = np.full(self.shape, 0xFFFFFFFF, np.uint32)
        self.array_stride = batch_stride(buffer.size, case.far)
        first = device.next
        nothing = np.zeros(self.shape, bool)
        places = (first + 4 * array * self.array_stride for array in range(self.tokens.arrays))
        self.bases = [device.put(buffer, nothing, at=place) for place in places]
        self.stride_b, self.stride_h = 0 if self.tokens.is_packed else self.array_stride, self.shape[1]
        self.address = first + 4

    def result(self) -> tuple[Array, int]:
        """(values of all entries, (heads, tokens); bytes changed outside them)."""
        buffers = [self.device.get(base, np.float32).reshape(self.shape).copy() for base in self.bases]
        values = [buffers[array][:-1, 1:-2][:, part].copy() for array, part in self.tokens.entries]
        for array, part in self.tokens.entries:
            buffers[array][:-1, 1:-2][:, part].view(np.uint32)[...] = 0xFFFFFFFF
        return np.concatenate(values, axis=1), changed_bytes(buffers)


def parts(tokens: Tokens, array: int) -> list[slice]:
    """The tokens of an array that belong to entries."""
    return [part for number, part in tokens.entries if number == array]


def changed_bytes(buffers: list[Array]) -> int:
    return sum(int(np.count_nonzero(buffer.view(np.uint8) != 0xFF)) for buffer in buffers)


def batch_stride(size: int, far: bool) -> int:
    """Elements between batch entries of `size` elements: with a wide gap, or beyond what 32 bits can count."""
    return (2**32 if far else -(-size // 8) * 8 + 2**20) + 8


def put_exact(device: Device, rows: Array) -> int:
    """The address of (rows, columns), aligned like one element only; there is nothing to load around each row."""
    buffer = np.zeros((len(rows) + 1, rows.shape[1] + 1), rows.dtype)
    defined = np.zeros(buffer.shape, bool)
    buffer[:-1, 1:], defined[:-1, 1:] = rows, True
    return device.put(buffer, defined) + rows.itemsize
