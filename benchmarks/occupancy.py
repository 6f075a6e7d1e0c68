"""The shared-memory padding that makes an H200's SM hold as many blocks as an SM120's would.

How many an SM120 SM holds is a fact of the artifact (`blocks_per_sm`). Limits: CUDA C++ Programming Guide, technical
specifications of compute capability 9.0; every block loses 1 KB of shared memory to the system.
"""

SM90_SMEM = 233_472  # bytes of an SM
SM90_SMEM_PER_BLOCK = 232_448
SM90_RESERVED = 1024


def padded_smem(target: int, static: int) -> int:
    """The most dynamic shared memory with which `target` blocks, and no more, fit an H200 SM, registers apart."""
    if target < 1:
        raise ValueError(f"target: {target} blocks per SM cannot be emulated, at least 1 is needed")
    share = SM90_SMEM // target // 128 * 128 - SM90_RESERVED
    return min(share, SM90_SMEM_PER_BLOCK) - static
