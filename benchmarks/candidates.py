"""Build variants that stand in no table, for `benchmarks.sweep` to measure. Runs where the builder does: no GPU.

    python -m benchmarks.candidates --registry candidates.db fwd-bf16-d128-dv128-m128-n32-w4-s1 …

Without keys: all that docs/tuning.md lists. A variant that fails a check, such as spills in its main loop, is named and
left out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from builder.build import Build, Table
from registry.contract import Variant
from registry.store import Store

TILES = {
    64: "m64-n64-w2-s1 m128-n64-w4-s1 m128-n64-w4-s2 m128-n128-w4-s1 m256-n64-w8-s2 m64-n128-w4-s1 m128-n128-w8-s1 "
    "m64-n64-w4-s2 m128-n32-w4-s2 m64-n64-w4-s1",
    96: "m128-n64-w4-s1 m128-n32-w4-s2 m128-n32-w4-s1 m64-n64-w2-s1 m64-n64-w4-s1 m128-n64-w8-s2 m64-n32-w4-s2",
    128: "m128-n32-w4-s1 m128-n128-w8-s1 m64-n32-w2-s1 m256-n32-w8-s2 m64-n64-w4-s1 m128-n64-w8-s2 m128-n64-w8-s1 "
    "m128-n64-w4-s1 m128-n32-w4-s2 m64-n128-w4-s1 m64-n32-w4-s2",
    192: "m128-n64-w8-s1 m64-n32-w4-s1 m128-n32-w8-s2 m64-n64-w4-s1 m128-n32-w8-s1",
    256: "m128-n32-w8-s1 m64-n64-w4-s1 m64-n32-w4-s2 m64-n16-w4-s1 m64-n32-w4-s1",
}


def main(argv: list[str] | None = None) -> int:
    """0: all were built. 1: some were left out, as the output says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True, help="file to build into; not one that is served")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("keys", nargs="*", type=Variant.parse, help="variant keys")
    options = parser.parse_args(argv)
    keys = [f"fwd-bf16-d{dim}-dv{dim}-{tile}" for dim, tiles in TILES.items() for tile in tiles.split()]
    variants = tuple(options.keys or map(Variant.parse, keys))
    table = replace(Table.ours(), variants=variants, rows=())
    with Store(options.registry) as store:
        result = Build(table, ("sm_120", "sm_90"), store).run(jobs=options.jobs, channel="candidates")
    for key, reason in result.failed.items():
        print(f"left out: {key}: {reason}")
    print(f"{len(result.built) + len(result.cached)} of {result.variants} candidates in {options.registry}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
