"""`fwd`."""

from kernels.fwd.smem import NOTES, smem
from kernels.trunk.compile import compiled
from kernels.trunk.forward import FlashForward
from kernels.trunk.generated import Generated
from registry.contract.variant import Variant
from registry.ops.fwd import FWD


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = FlashForward(variant, FWD.abi, smem(variant), NOTES)
    return compiled(kernel, FWD, variant, dump_dir, tile=kernel.tile_m)
