"""From a variant to PTX: the one entry point of this room for the builder."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from registry.contract.grid import Grid
from registry.contract.variant import Variant

# op -> the module whose `generate(variant, symbol, dump_dir) -> Generated` compiles it.
MODULES = {
    "fwd": "kernels.flash_fwd",
    "fwd_paged": "kernels.flash_paged",
    "fwd_combine": "kernels.combine",
    "kv_append": "kernels.append",
    "bwd": "kernels.flash_bwd",
    "bwd_preprocess": "kernels.bwd_rows",
    "bwd_postprocess": "kernels.bwd_rows",
    "bwd_sum": "kernels.bwd_sum",
}


@dataclass(frozen=True)
class Generated:
    """A variant's PTX and launch facts. smem: dynamic shared memory in bytes; ptx holds exactly the entry `symbol`."""

    ptx: str
    symbol: str
    threads: int
    smem: int
    grid: Grid


def symbol(variant: Variant) -> str:
    """The kernel's entry name: readable, stable across folders, short enough that the DSL never cuts it."""
    return "cubinery_" + variant.key.replace("-", "_")


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX. Imports cutlass: call it in a worker whose CUTE_DSL_ARCH was set before.

    dump_dir: an existing folder of the caller's own, for the DSL's intermediate files.
    """
    module = importlib.import_module(MODULES[variant.op])
    return module.generate(variant, symbol(variant), dump_dir)
