"""Arrays of any rank in the PTX interpreter's memory, laid out to show every stray access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.interpreter import Device
from tests.reference import Array

PAD = 16  # elements beside each row of the last axis, a multiple of what strides must be multiples of


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
