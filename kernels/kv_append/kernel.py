"""`kv_append`: new keys and values into the cache, in place; rotary embedding of keys and queries.

A warp takes a row, one head of one token, 8 columns a lane. Rows are those of K, then V, then Q.
Rotary embedding: Su et al. 2021; pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) if interleaved.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint16

from kernels.trunk import fp8
from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.scalars import DTYPES, VECTOR, element, fast_div, named
from kernels.trunk.tiles import vector_at
from registry.contract.variant import Variant
from registry.ops.attention import E4M3
from registry.ops.kv_append import KV_APPEND

BEHIND = 2**30  # behind every cache's last position; tokens added to it stay in 32 bits


class Append:
    """One variant: the dtype of queries and new keys, and whether the cache is e4m3."""

    smem = 0

    def __init__(self, variant: Variant):
        self.dtype = DTYPES[variant.dtype]
        self.e4m3 = E4M3 in variant.features
        self.rows = variant.size("m")
        self.threads = 32 * self.rows

    @cute.jit
    def __call__(self, *parameters):
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1))

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, KV_APPEND.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row, column = block * self.rows + tid // 32, tid % 32 * VECTOR  # rows: below 2**31 (`registry.ops.attention`)
        new = Int32(0)
        if call.k_new.toint() != 0:
            new = call.batch * call.seqlen_new * call.heads_kv
        if row < new:
            self.key(call, row, column)
        elif row < 2 * new:
            self.value(call, row - new, column)
        elif (call.q.toint() != 0) & (row - 2 * new < call.batch * call.seqlen_q * call.heads_q):
            self.query(call, row - 2 * new, column)

    @cute.jit
    def row_coord(
        self, call: SimpleNamespace, row: Int32, heads: Int32, seqlen: Int32
    ) -> tuple[Int32, Int32, Int32, Int32]:
        """(entry, token, head, keys that the entry had) of a row."""
        token = row // heads
        head = row - token * heads
        batch_idx = token // seqlen
        had = Int32(0)
        if call.seqused_k.toint() != 0:
            had = cutlass.min(element(call.seqused_k, batch_idx), BEHIND)
        return batch_idx, token - batch_idx * seqlen, head, had

    @cute.jit
    def key(self, call: SimpleNamespace, row: Int32, column: Int32):
        batch_idx, token, head, had = self.row_coord(call, row, call.heads_kv, call.seqlen_new)
        position = had + token
        if (position >= 0) & (position < call.seqlen_k) & (column < call.head_dim):
            page, slot = self.slot(call, batch_idx, position)
            if page >= 0:
                start = batch_idx * call.k_new_stride_b + token * call.k_new_stride_s + head * call.k_new_stride_h
                values = self.rotated(call, call.k_new, start, column, position)
                there = page * call.k_stride_b + slot * call.k_stride_s + head * call.k_stride_h + column
                self.keep(call.k, there, values, call.k_descale, Int64(batch_idx) * call.k_descale_stride_b + head)

    @cute.jit
    def value(self, call: SimpleNamespace, row: Int32, column: Int32):
        batch_idx, token, head, had = self.row_coord(call, row, call.heads_kv, call.seqlen_new)
        position = had + token
        if (position >= 0) & (position < call.seqlen_k) & (column < call.head_dim_v):
            page, slot = self.slot(call, batch_idx, position)
            if page >= 0:
                start = batch_idx * call.v_new_stride_b + token * call.v_new_stride_s + head * call.v_new_stride_h
                values = self.load(call.v_new, start + column)
                there = page * call.v_stride_b + slot * call.v_stride_s + head * call.v_stride_h + column
                self.keep(call.v, there, values, call.v_descale, Int64(batch_idx) * call.v_descale_stride_b + head)

    @cute.jit
    def query(self, call: SimpleNamespace, row: Int32, column: Int32):
        batch_idx, token, head, had = self.row_coord(call, row, call.heads_q, call.seqlen_q)
        position = had if call.q_still != 0 else had + token
        if column < call.head_dim:
            start = batch_idx * call.q_stride_b + token * call.q_stride_s + head * call.q_stride_h
            values = self.rotated(call, call.q, start, column, position)
            there = batch_idx * call.q_out_stride_b + token * call.q_out_stride_s + head * call.q_out_stride_h + column
            self.write(call.q_out, there, values)

    @cute.jit
    def slot(self, call: SimpleNamespace, batch_idx: Int32, position: Int32) -> tuple[Int64, Int64]:
        """(page, row in it) of a key. A page below 0 is none: graphs are padded with sequences of such."""
        number = fast_div(position, call.page_magic, call.page_shift)
        page = batch_idx
        if call.page_table.toint() != 0:
            page = element(call.page_table, Int64(batch_idx) * call.page_table_stride + number)
        return Int64(page), Int64(position - number * call.page_size)

    @cute.jit
    def load(self, pointer: cute.Pointer, offset: Int64) -> cute.Tensor:
        """8 elements, 16 bytes, in fp32."""
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        low = cute.make_rmem_tensor(((VECTOR, 1),), self.dtype)
        cute.copy(copy, vector_at(pointer, offset), low)
        values = cute.make_rmem_tensor(VECTOR, Float32)
        for i in cutlass.range_constexpr(VECTOR):
            values[i] = Float32(low[i])
        return values

    @cute.jit
    def rotated(
        self, call: SimpleNamespace, pointer: cute.Pointer, start: Int64, column: Int32, position: Int32
    ) -> cute.Tensor:
        """Columns column … column + 7 of the head at `start`, rotated as of `position`."""
        values = self.load(pointer, start + column)
        if column < call.rotary_dim:
            at = Int64(cutlass.min(cutlass.max(position, 0), call.rotary_rows - 1)) * call.rotary_stride
            if call.interleaved != 0:
                for i in cutlass.range_constexpr(VECTOR // 2):
                    cos, sin = self.angle(call, at + column // 2 + i)
                    x, y = values[2 * i], values[2 * i + 1]
                    values[2 * i], values[2 * i + 1] = x * cos - y * sin, y * cos + x * sin
            else:
                half = call.rotary_dim // 2
                second = column >= half
                others = self.load(pointer, start + (column - half if second else column + half))
                first = at + (column - half if second else column)
                for i in cutlass.range_constexpr(VECTOR):
                    cos, sin = self.angle(call, first + i)
                    values[i] = values[i] * cos + (others[i] if second else -others[i]) * sin
        return values

    @cute.jit
    def angle(self, call: SimpleNamespace, index: Int64) -> tuple[Float32, Float32]:
        return Float32(element(call.rotary_cos, index)), Float32(element(call.rotary_sin, index))

    @cute.jit
    def keep(self, pointer: cute.Pointer, offset: Int64, values: cute.Tensor, descales: cute.Pointer, index: Int64):
        """Write to the cache, in its dtype."""
        if cutlass.const_expr(self.e4m3):
            if descales.toint() != 0:
                factor = 1.0 / element(descales, index)
                for i in cutlass.range_constexpr(VECTOR):
                    values[i] = values[i] * factor
            packed = cute.make_rmem_tensor(VECTOR // 2, Uint16)
            for i in cutlass.range_constexpr(VECTOR // 2):
                packed[i] = fp8.narrow(values[2 * i], values[2 * i + 1])
            copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Uint16, num_bits_per_copy=64)
            there = cute.recast_ptr(pointer, dtype=Uint16) + cute.assume(offset >> 1, divby=VECTOR // 2)
            cute.copy(copy, packed, cute.make_tensor(there, cute.make_layout(VECTOR // 2)))
        else:
            self.write(pointer, offset, values)

    @cute.jit
    def write(self, pointer: cute.Pointer, offset: Int64, values: cute.Tensor):
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        low = cute.make_rmem_tensor(((VECTOR, 1),), self.dtype)
        for i in cutlass.range_constexpr(VECTOR):
            low[i] = values[i].to(self.dtype)
        cute.copy(copy, low, vector_at(pointer, offset))


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = Append(variant)
    return compiled(kernel, KV_APPEND, variant, dump_dir, tile=kernel.rows)
