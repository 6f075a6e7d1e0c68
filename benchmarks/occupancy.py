"""How many blocks share a multiprocessor, and the shared-memory padding that makes an H200 hold as many as an SM120.

Pure arithmetic. Limits: CUDA C++ Programming Guide, technical specifications per compute capability; registers are
handed out per warp in units of 256, shared memory in units of 128 bytes plus 1 KB a block for the system.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM: bytes of shared memory (an SM, a block), threads, blocks, 32-bit registers."""

    smem: int
    smem_per_block: int
    threads: int
    blocks: int
    registers: int = 65_536
    reserved: int = 1024  # bytes of shared memory that every block loses to the system


SM120 = Multiprocessor(smem=102_400, smem_per_block=101_376, threads=1536, blocks=24)
SM90 = Multiprocessor(smem=233_472, smem_per_block=232_448, threads=2048, blocks=32)
PARTITIONS = 4  # of an SM; a warp's registers come from one of them


def blocks_per_sm(sm: Multiprocessor, threads: int, registers: int, smem: int) -> int:
    """Blocks of `threads` threads with `registers` a thread and `smem` bytes (static + dynamic) that fit one SM."""
    if smem > sm.smem_per_block:
        return 0
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = sm.registers // PARTITIONS // per_warp * PARTITIONS // warps
    by_smem = sm.smem // (_round(smem) + sm.reserved)
    return min(by_registers, by_smem, sm.threads // (warps * 32), sm.blocks)


def padded_smem(target: int, static: int, sm: Multiprocessor = SM90) -> int:
    """The most dynamic shared memory with which `target` blocks, and no more, fit an SM, registers apart."""
    if target < 1:
        raise ValueError(f"target: {target} blocks per SM cannot be emulated, at least 1 is needed")
    share = sm.smem // target // 128 * 128 - sm.reserved
    return min(share, sm.smem_per_block) - static


def _round(smem: int) -> int:
    return -(-smem // 128) * 128
