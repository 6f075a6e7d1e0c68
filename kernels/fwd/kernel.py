"""`fwd`: the forward over dense and packed keys."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from kernels.fwd.smem import NOTES, smem
from kernels.trunk import mask, softmax
from kernels.trunk.compile import compiled
from kernels.trunk.forward import Forward, recall
from kernels.trunk.generated import Generated
from kernels.trunk.outputs import sinks_of, write_lse
from kernels.trunk.products import Products
from kernels.trunk.scalars import DTYPES, aligned
from kernels.trunk.tile_coord import left_padding, sequence, tokens
from kernels.trunk.tiles import load_tile, matrix_of, smem_layout, store_rows, thread_view, tile_copy
from kernels.trunk.turns import Alternating
from kernels.trunk.visits import visits
from registry.contract.variant import Variant
from registry.ops.fwd import FWD


class DenseKeys:
    """Keys and values one behind another (`kernels.trunk.interfaces.Keys`).

    Only the last key block may reach past seqlen_k, and it comes first: the loads ahead need no bound.
    """

    ahead = 1
    first_steps = 1  # the loads' addresses are computed while the tensor cores work
    from_notes = bounded_ahead = False
    panel = 0

    def __init__(self, variant: Variant):
        self.dtype, self.threads = DTYPES[variant.dtype], 32 * variant.size("w")
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n, self.carried = variant.size("m"), variant.size("n"), variant.size("a") == 1
        self.turns = Alternating()

    def work(self, call: SimpleNamespace, block: Int32) -> Int32:
        return block

    @cute.jit
    def lengths(self, call: SimpleNamespace, batch_idx: Int32) -> tuple[Int32, Int32]:
        """(first token, length) of an entry's keys, those of its left padding left out."""
        first, length = sequence(call.cu_seqlens_k, call.seqused_k, batch_idx, call.seqlen_k)
        padding = left_padding(call.leftpad_k, batch_idx, length)
        return first + padding, length - padding

    @cute.jit
    def open(self, state: SimpleNamespace, rows: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> SimpleNamespace:
        call, tid = state.call, state.tid
        k_start = batch_idx * call.k_stride_b + rows.k_first * call.k_stride_s + head_kv * call.k_stride_h
        v_start = batch_idx * call.v_stride_b + rows.k_first * call.v_stride_s + head_kv * call.v_stride_h
        mK = matrix_of(call.k, rows.seqlen_k, self.head_dim, call.k_stride_s, k_start)
        mV = matrix_of(call.v, rows.seqlen_k, self.head_dim_v, call.v_stride_s, v_start)
        state.copy_k = tile_copy(self.dtype, self.head_dim, self.threads, True)
        state.copy_v = tile_copy(self.dtype, self.head_dim_v, self.threads, True)
        state.tKgK = thread_view(state.copy_k, mK, self.tile_n, tid)
        state.tVgV = thread_view(state.copy_v, mV, self.tile_n, tid)
        first, last = tokens(rows, self.tile_m)
        first, inner_first, inner_end, end = mask.block_ranges(
            first, last, self.tile_n, rows.offset, rows.seqlen_k, call.window_left, call.window_right
        )
        return visits(first, inner_first, inner_end, end)

    def noted(self, rows: SimpleNamespace) -> tuple[Int32, ...]:
        return ()

    @cute.jit
    def load_k(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None):
        sK, first = state.sK[None, None, stage], n_block * self.tile_n
        left, offset = self.rows_left(first, seqlen_k), Int64(first) * state.call.k_stride_s
        load_tile(state.copy_k, state.tKgK, sK, state.call.head_dim, offset, state.tid, left)

    @cute.jit
    def load_v(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None):
        sV, first = state.sV[None, None, stage], n_block * self.tile_n
        left, offset = self.rows_left(first, seqlen_k), Int64(first) * state.call.v_stride_s
        load_tile(state.copy_v, state.tVgV, sV, state.call.head_dim_v, offset, state.tid, left)

    def rows_left(self, first: Int32, seqlen_k: Int32 | None) -> Int32 | None:
        return None if seqlen_k is None else seqlen_k - first

    def look_up(self, state: SimpleNamespace, n_block: Int32):
        """Nothing: a block's number says where it is."""

    def look_ahead(self, state: SimpleNamespace, n_block: Int32, left: cutlass.Boolean, blocks: int = 0):
        """Nothing, likewise."""

    def advance(self, state: SimpleNamespace):
        """Nothing, likewise."""

    def to_start(self, blocks: SimpleNamespace) -> Int32:
        return blocks.count

    def left_at_edge(self, i: Int32, count: Int32) -> cutlass.Boolean:
        """Whether there is one more, all that must be known."""
        return i + 1 < count

    def left_inside(self, n_block: Int32, inner_first: Int32) -> cutlass.Boolean:
        return n_block > inner_first

    def more(self, left: cutlass.Boolean, blocks: int) -> cutlass.Boolean:
        return left

    def first_key(self, state: SimpleNamespace) -> None:
        """Left padding is no part of the keys."""
        return None


class Whole:
    """An output that one block computes (`kernels.trunk.interfaces.Output`)."""

    def tile(self, forward: Forward, memory: cute.Pointer) -> cute.Tensor:
        """Where O goes in shared memory: to Q's place, which begins at `memory`."""
        return cute.make_tensor(memory, smem_layout(forward.tile_m, forward.head_dim_v))

    @cute.jit
    def write(self, forward: Forward, state: SimpleNamespace, head_kv: Int32):
        """Normalise, write the LSE where it is wanted, and store O through the shared memory that held Q."""
        call, rows = state.call, recall(state)
        batch_idx = rows.batch_idx
        tOcO = forward.coordinates(state, forward.head_dim_v)
        sinks = sinks_of(call, rows, tOcO, forward.dtype)
        softmax.finish(state.acc_O, state.row_max, state.row_sum, call.scale_log2, sinks)
        if (call.lse.toint() != 0) & (tOcO[0][1] == 0):
            lse = call.lse + (batch_idx * call.lse_stride_b + rows.head * call.lse_stride_h + rows.q_first)
            write_lse(state, rows, tOcO, lse)
        rO = cute.make_fragment_like(state.acc_O, forward.dtype)
        rO.store(state.acc_O.load().to(forward.dtype))
        if cutlass.const_expr(forward.q_steps == 0):
            cute.arch.cp_async_wait_group(0)  # Q's loads may still be in flight where no key block was visited
        cute.arch.barrier()  # other warps may still read what lay there
        forward.products.to_smem(state, rO, tOcO)
        cute.arch.barrier()
        rows.token_stride, rows.head_stride = call.o_stride_s, call.o_stride_h
        o_start = batch_idx * call.o_stride_b + rows.q_first * call.o_stride_s + rows.head * call.o_stride_h
        copy = tile_copy(forward.dtype, forward.head_dim_v, forward.threads, False)
        store_rows(copy, state.sO, aligned(call.o, o_start), rows, call.head_dim_v, state.tid)


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = Forward(variant, FWD.abi, smem(variant), NOTES, DenseKeys(variant), Products(variant), Whole())
    return compiled(kernel, FWD, variant, dump_dir, tile=kernel.tile_m)
