"""What the header of an ELF file states about a cubin."""

import struct

from registry.contract.errors import ContractError

ELF_MACHINE_CUDA = 190
ELF_HEADER = 64  # bytes of a 64-bit ELF header


def elf_machine(content: bytes) -> tuple[int, str]:
    """(e_machine, architecture) that an ELF file's header states: (190, 'sm_120') for a cubin.

    The architecture means nothing for another machine. ContractError for what is no 64-bit little-endian ELF file, or
    a cubin whose ABI version is not 7 or 8: where its flags hold the architecture depends on that.
    """
    header = content[:ELF_HEADER]
    if len(header) < ELF_HEADER or header[:6] != b"\x7fELF\x02\x01":
        raise ContractError(f"no 64-bit little-endian ELF file: it starts with {header[:6]!r}")
    machine, flags = struct.unpack_from("<18xH28xI", header)
    abi_version = header[8]
    if machine == ELF_MACHINE_CUDA and abi_version not in (7, 8):
        raise ContractError(f"the cubin's ELF ABI version is {abi_version}, this code reads 7 and 8")
    return machine, f"sm_{flags >> 8 & 0xFF if abi_version == 8 else flags & 0xFF}"
