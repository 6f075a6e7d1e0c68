"""The backward's workspaces of query rows, and the two kernels around it: `bwd_preprocess` and `bwd_postprocess`.

`registry.ops.workspaces` has their layout. A block of either takes ROWS rows of one query head and batch entry.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from kernels.accumulate import STRIP, UNIT
from kernels.compile import to_ptx
from kernels.flash_fwd import DTYPES, LOG2E, named
from kernels.generate import Generated
from kernels.place import element, entry_of, first_tile, sequence
from kernels.tiles import VECTOR
from kernels.validity import rows_invalid
from registry.contract.errors import ContractError
from registry.contract.grid import Grid
from registry.contract.variant import Variant
from registry.ops.bwd_postprocess import BWD_POSTPROCESS
from registry.ops.bwd_preprocess import BWD_PREPROCESS
from registry.ops.workspaces import ROWS

THREADS = 256
STEPS = 4  # a warp takes 4 rows at once, 8 lanes each
MAX_HEAD_DIM = 256


def packed_row(token: Int32, entry: Int32) -> Int32:
    """The workspace row of a packed entry that begins at `token`."""
    return (token // ROWS + entry) * ROWS


@cute.jit
def tile_start(tile: Int32, total: Int32, tile_m: cutlass.Constexpr) -> Int32:
    """The first token of an entry's tile. Where `cu_seqlens` is not sorted its number can be anything: below 0 or far
    behind the array's end it is taken for one just behind that."""
    last = Uint32(total // tile_m + 1)
    return Int32(cutlass.min(Uint32(tile), last)) * tile_m


@cute.jit
def place(call: SimpleNamespace, block: Int32) -> SimpleNamespace:
    """Where a block works: entry, head, the tile's first row and the number of rows that the entry has, its first
    token, and the tile's first row in the workspaces.

    heads · tiles, with batch in it where q is dense, is the number of blocks, below 2**31.
    """
    tiles = cute.ceil_div(call.seqlen_q, ROWS) * call.batch
    if call.cu_seqlens_q.toint() != 0:
        tiles = call.seqlen_q // ROWS + call.batch
    head = block // tiles
    tile = block - head * tiles
    of_entry = cute.ceil_div(call.seqlen_q, ROWS)
    entry = tile // of_entry
    start = (tile - entry * of_entry) * ROWS
    if call.cu_seqlens_q.toint() != 0:
        entry = entry_of(tile, call.cu_seqlens_q, call.batch, call.seqlen_q, Int32(1), ROWS)
        first = first_tile(call.cu_seqlens_q, entry, call.seqlen_q, Int32(1), ROWS)
        start = tile_start(tile - first, call.seqlen_q, ROWS)
    q_first, count = sequence(call.cu_seqlens_q, call.seqused_q, entry, call.seqlen_q)
    return SimpleNamespace(entry=entry, head=head, start=start, count=count, q_first=q_first, row=Int64(tile) * ROWS)


class _Rows:
    def __init__(self, variant: Variant):
        reason = rows_invalid(variant)
        if reason:
            raise ContractError(f"{variant.key}: {reason}")
        self.dtype = DTYPES[variant.dtype]

    @cute.jit
    def __call__(self, *parameters):
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(THREADS, 1, 1))

    def vector(self, pointer: cute.Pointer, offset: Int64) -> cute.Tensor:
        return cute.make_tensor(pointer + cute.assume(offset, divby=VECTOR), cute.make_layout(VECTOR))


class Preprocess(_Rows):
    """delta = rowsum(dO ∘ O) − dLSE (FlashAttention 2, Dao 2023), the LSE in base 2, zeros in dq_accum."""

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD_PREPROCESS.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = place(call, block)
        self.clear(call, at, tid)
        sums = cute.make_rmem_tensor(STEPS, Float32)
        sums.fill(0.0)
        if at.start < at.count:
            self.products(call, at, tid, sums)
        for step in cutlass.range_constexpr(STEPS):
            for width in (1, 2, 4):
                sums[step] = sums[step] + cute.arch.shuffle_sync_bfly(sums[step], offset=width)
        self.store(call, at, tid, sums)

    @cute.jit
    def clear(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32):
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        first = (at.head * call.rows + at.row) * call.head_dim_accum
        for i in cutlass.range(ROWS * call.head_dim_accum // (4 * THREADS)):
            there = call.dq_accum + cute.assume(first + (i * THREADS + tid) * 4, divby=4)
            cute.autovec_copy(zeros, cute.make_tensor(there, cute.make_layout(4)))
        if (call.semaphores.toint() != 0) & (tid < ROWS // STRIP):
            there = call.semaphores + ((at.head * call.rows + at.row) // STRIP + tid)
            cute.make_tensor(there, cute.make_layout(1))[0] = Int32(0)

    def row(self, tid: Int32, step: int) -> Int32:
        """The row of the tile that this thread's 8 lanes take in a step."""
        return tid // 32 * STRIP + 4 * step + tid % 32 // 8

    @cute.jit
    def products(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32, sums: cute.Tensor):
        """Add this lane's columns of dO ∘ O to sums. What does not exist is read as something else, and left out."""
        o_start = at.entry * call.o_stride_b + at.q_first * call.o_stride_s + at.head * call.o_stride_h
        dout_start = at.entry * call.dout_stride_b + at.q_first * call.dout_stride_s + at.head * call.dout_stride_h
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        rO, rdO = (cute.make_rmem_tensor((VECTOR, STEPS), self.dtype) for _ in range(2))
        for chunk in cutlass.range_constexpr(MAX_HEAD_DIM // 64):
            if chunk * 64 < call.head_dim_v:
                column = chunk * 64 + tid % 8 * VECTOR
                there = cutlass.min(column, call.head_dim_v - VECTOR)
                for step in cutlass.range_constexpr(STEPS):
                    token = cutlass.min(at.start + self.row(tid, step), at.count - 1)
                    cute.copy(copy, self.vector(call.o, o_start + token * call.o_stride_s + there), rO[None, step])
                    dout = self.vector(call.dout, dout_start + token * call.dout_stride_s + there)
                    cute.copy(copy, dout, rdO[None, step])
                for step in cutlass.range_constexpr(STEPS):
                    for i in cutlass.range_constexpr(VECTOR):
                        product = Float32(rO[i, step]) * Float32(rdO[i, step])
                        sums[step] = sums[step] + (product if column < call.head_dim_v else Float32(0.0))

    @cute.jit
    def store(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32, sums: cute.Tensor):
        lse_start = at.entry * call.lse_stride_b + at.head * call.lse_stride_h + at.q_first
        dlse_start = at.entry * call.dlse_stride_b + at.head * call.dlse_stride_h + at.q_first * call.dlse_stride_s
        first = at.head * call.rows + at.row
        for step in cutlass.range_constexpr(STEPS):
            row = self.row(tid, step)
            token = at.start + row
            lse, delta = Float32.inf, Float32(0.0)
            if token < at.count:
                given = element(call.lse, lse_start + token)
                lse = Float32.inf if given == -Float32.inf else given * LOG2E
                delta = sums[step]
                if call.dlse.toint() != 0:
                    delta = delta - element(call.dlse, dlse_start + token * call.dlse_stride_s)
            if tid % 8 == 0:
                cute.make_tensor(call.lse_log2 + (first + row), cute.make_layout(1))[0] = lse
                cute.make_tensor(call.delta + (first + row), cute.make_layout(1))[0] = delta


class Postprocess(_Rows):
    """dq = softmax_scale · dq_accum, in rows of the query's dtype."""

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD_POSTPROCESS.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = place(call, block)
        strip, lane = tid // 32, tid % 32
        first = (at.head * call.rows + at.row + strip * STRIP) * call.head_dim_accum + lane * 4
        dq_start = at.entry * call.dq_stride_b + at.q_first * call.dq_stride_s + at.head * call.dq_stride_h
        token = at.start + strip * STRIP + lane // 4
        if at.start + strip * STRIP < at.count:
            for group in cutlass.range(cute.ceil_div(call.head_dim, 32), unroll=1):
                units = self.units(call, first + group * (4 * UNIT))
                column = group * 32 + lane % 4 * VECTOR
                for half in cutlass.range_constexpr(2):
                    row = transposed([units[half, unit] for unit in range(4)], lane)
                    if (token + 8 * half < at.count) & (column < call.head_dim):
                        there = self.vector(call.dq, dq_start + (token + 8 * half) * call.dq_stride_s + column)
                        cute.autovec_copy(cute.recast_tensor(row, self.dtype), there)

    @cute.jit
    def units(self, call: SimpleNamespace, start: Int64) -> cute.Tensor:
        """(half, unit): this lane's pairs of columns of 4 units side by side, as registers of two elements."""
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
        found = cute.make_rmem_tensor((4, 4), Float32)
        for unit in cutlass.range_constexpr(4):
            there = call.dq_accum + cute.assume(start + unit * UNIT, divby=4)
            cute.copy(copy, cute.make_tensor(there, cute.make_layout(4)), found[None, unit])
        low = cute.make_rmem_tensor((4, 4), self.dtype)
        low.store((found.load() * call.softmax_scale).to(self.dtype))
        return cute.recast_tensor(low, Uint32)


@cute.jit
def transposed(units: list, lane: Int32) -> cute.Tensor:
    """Of a quad's 4 × 4 registers: lane u of the four gets unit u's, in the order of the lanes that had them."""
    low, right = lane % 4 < 2, lane % 2 == 1
    pairs = []
    for i in cutlass.range_constexpr(2):
        kept = units[i] if low else units[2 + i]
        got = Uint32(cute.arch.shuffle_sync_bfly(units[2 + i] if low else units[i], offset=2))
        pairs.append((kept if low else got, got if low else kept))
    row = cute.make_rmem_tensor(4, Uint32)
    for source in cutlass.range_constexpr(2):
        kept = pairs[1][source] if right else pairs[0][source]
        got = Uint32(cute.arch.shuffle_sync_bfly(pairs[0][source] if right else pairs[1][source], offset=1))
        row[2 * source] = got if right else kept
        row[2 * source + 1] = kept if right else got
    return row


def generate(variant: Variant, symbol: str, dump_dir: str) -> Generated:
    """Compile one variant of either op to PTX (see `kernels.generate`)."""
    op, abi = (Preprocess, BWD_PREPROCESS.abi) if variant.op == "bwd_preprocess" else (Postprocess, BWD_POSTPROCESS.abi)
    kernel = op(variant)
    elements = dict.fromkeys(("o", "dout", "dq"), kernel.dtype)
    elements |= dict.fromkeys(("cu_seqlens_q", "seqused_q", "semaphores"), Int32)
    ptx, entry = to_ptx(kernel, abi, elements, symbol, dump_dir, vectors=("dq_accum",))
    return Generated(ptx, entry, THREADS, 0, Grid("tiles_heads_batch", ROWS))
