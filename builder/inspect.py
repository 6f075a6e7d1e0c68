"""What a cubin is: its ELF header, kernels and code, nvJitLink's log about it, and how many fit an SM120 SM."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from builder.errors import InspectError
from registry.frames import elf_machine

_SHT_SYMTAB, _STT_FUNC, _STO_CUDA_ENTRY = 2, 2, 0x10

# Limits of one SM of compute capability 12.x (CUDA C++ Programming Guide, 'Technical Specifications').
SM120_SMEM = 102_400  # bytes, of which the system reserves the next per block
SM120_SMEM_RESERVED = 1024
SM120_SMEM_UNIT = 128  # bytes that shared memory is given out in
SM120_REGISTERS = 65_536
SM120_REGISTER_UNIT = 256  # registers that a warp's share is rounded up to
SM120_PARTITIONS = 4  # an SM's registers and warps are split among them; a warp lives in one
SM120_THREADS = 1536
SM120_BLOCKS = 24


@dataclass(frozen=True)
class Elf:
    """machine: e_machine. arch: e.g. 'sm_120', where the machine is CUDA. kernels: entry symbol → its code."""

    machine: int
    arch: str
    kernels: dict[str, bytes]


@dataclass(frozen=True)
class Usage:
    """Of one kernel, from nvJitLink's log. spills: bytes of spill stores + loads; static_smem without the kilobyte
    that the system reserves."""

    registers: int
    spills: int
    stack: int
    static_smem: int


def read_elf(cubin: bytes) -> Elf:
    """Parse a cubin. InspectError for bytes that are no 64-bit little-endian ELF file."""
    try:
        return _read_elf(cubin)
    except (struct.error, IndexError, ValueError) as error:
        raise InspectError(f"not a cubin: {error}") from None


def _read_elf(cubin: bytes) -> Elf:
    machine, arch = elf_machine(cubin)
    offset, size, count = struct.unpack_from("<40xQ10xHH", cubin)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + n * size) for n in range(count)]
    kernels = {}
    for section in sections:
        if section[1] != _SHT_SYMTAB:
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], section[9]):
            name, info, other, home, value, length = struct.unpack_from("<IBBHQQ", cubin, at)
            if info & 0xF == _STT_FUNC and other & _STO_CUDA_ENTRY:
                start = sections[home][4] + value
                symbol = cubin[names + name : cubin.index(b"\0", names + name)].decode()
                if start + length > len(cubin):
                    raise ValueError(f"the code of {symbol} ends behind the file's end")
                kernels[symbol] = cubin[start : start + length]
    return Elf(machine, arch, kernels)


def read_log(log: str) -> Usage:
    """Registers, spills, stack and static shared memory from nvJitLink's -verbose log of a single-kernel PTX.

    Device functions that were not inlined count too: their spills add up. Only ptxas' own lines are read: the
    linker's summary counts the reserved kilobyte on some architectures and not on others.
    """
    ptxas = "\n".join(line for line in log.splitlines() if line.startswith("ptxas"))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    used = re.findall(r"Used (\d+) registers(.*)", ptxas)
    if len(used) != 1 or not frames:
        raise InspectError(
            f"nvJitLink's log states {len(used)} kernels' registers and {len(frames)} stacks: {log:.500}"
        )
    registers, rest = used[0]
    smem = re.search(r"(\d+) bytes smem", rest)
    return Usage(
        registers=int(registers),
        spills=sum(int(stores) + int(loads) for _, stores, loads in frames),
        stack=max(int(stack) for stack, _, _ in frames),
        static_smem=int(smem[1]) if smem else 0,
    )


def blocks_per_sm(threads: int, registers: int, smem: int) -> int:
    """How many blocks run at once on an SM120 SM. smem: dynamic and static shared memory of a block, in bytes."""
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // SM120_REGISTER_UNIT) * SM120_REGISTER_UNIT
    warps_by_registers = SM120_REGISTERS // SM120_PARTITIONS // max(warp_registers, 1) * SM120_PARTITIONS
    block_smem = -(-(smem + SM120_SMEM_RESERVED) // SM120_SMEM_UNIT) * SM120_SMEM_UNIT
    return min(SM120_BLOCKS, SM120_THREADS // (warps * 32), warps_by_registers // warps, SM120_SMEM // block_smem)
