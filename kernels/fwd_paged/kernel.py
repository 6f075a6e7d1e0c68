"""`fwd_paged`: the forward over a cache, of pages or contiguous, with split-KV: the forward of serving.

What `fwd` computes, but for three things. Keys and values are found through a page table, row by row (`keys`). The key
blocks of a query tile may be shared out among `num_splits` blocks, whose partial outputs `fwd_combine` adds up
(`output`). A cache may be of e4m3 (`products`).
"""

from kernels.fwd_paged.keys import PagedKeys
from kernels.fwd_paged.output import SplitOutput
from kernels.fwd_paged.products import E4m3Products
from kernels.fwd_paged.smem import NOTES, smem
from kernels.trunk.compile import compiled
from kernels.trunk.forward import Forward
from kernels.trunk.generated import Generated
from kernels.trunk.products import Products
from registry.contract.variant import Variant
from registry.ops.attention import E4M3
from registry.ops.fwd_paged import FWD_PAGED


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    products = E4m3Products(variant) if E4M3 in variant.features else Products(variant)
    keys, output = PagedKeys(variant, products), SplitOutput(products)
    kernel = Forward(variant, FWD_PAGED.abi, smem(variant), NOTES, keys, products, output)
    elements = {"k": products.dtype, "v": products.dtype}
    return compiled(kernel, FWD_PAGED, variant, dump_dir, tile=kernel.tile_m, elements=elements)
