"""A registry file of one variant with each barrier of its PTX removed in turn: what racecheck must be seen to flag.

    python -m tests.gpu.plant_race --registry registry.db --out planted.db

Runs where the registry is built (it assembles). The kernels get names of their own, `cubinery_planted0_…`, so that
findings about them are told from findings about the real one, and a file of their own, so that nobody serves them.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.derived import only_one, read_index
from builder import nvjitlink
from registry.contract import Artifact, sha256_hex
from registry.frames import compress
from registry.store import Store

BARRIER = re.compile(r"^\s*(?:bar\.sync|barrier\.sync|barrier\.cta\.sync)\b[^;]*;[ \t]*$", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.plant_race", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the file to write; replaced if it exists")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--variant", help="key of the variant to break; by default the first of the index")
    options = parser.parse_args(argv)
    index = read_index(options.registry, options.arch)
    artifact = index.by_variant[options.variant or min(index.by_variant)]
    with Store(options.registry, readonly=True) as store:
        ptx = store.ptx_text(artifact.ptx_sha256)
        beside = [(a, store.get_frame(a.frame_sha256)) for a in only_one(index, artifact).artifacts if a != artifact]
    options.out.unlink(missing_ok=True)
    with Store(options.out) as store:
        for a, whole in beside:
            assert whole is not None, f"{a.variant}: the registry lacks its blob"
            store.put_artifact(sha256_hex(a.symbol.encode()), a, whole)
        for i in range(len(BARRIER.findall(ptx))):
            planted, frame = plant(artifact, ptx, i)
            store.put_artifact(sha256_hex(planted.symbol.encode()), planted, frame)
            store.put_index(only_one(index, planted), f"planted{i}")
            print(f"{options.out}: {planted.symbol} for {options.arch}")
    return 0


def plant(artifact: Artifact, ptx: str, barrier: int) -> tuple[Artifact, bytes]:
    """The artifact and frame of the PTX without its barrier number `barrier`, under a new name."""
    name = artifact.symbol.replace("cubinery_", f"cubinery_planted{barrier}_", 1)
    broken = re.sub(rf"\b{re.escape(artifact.symbol)}\b", name, without_barrier(ptx, barrier))
    cubin = nvjitlink.assemble(broken, artifact.arch).cubin
    frame = compress(cubin)
    made = replace(
        artifact, symbol=name, ptx_sha256=sha256_hex(broken.encode()),
        cubin_sha256=sha256_hex(cubin), cubin_size=len(cubin), frame_sha256=sha256_hex(frame), frame_size=len(frame),
    )  # fmt: skip
    return made, frame


def without_barrier(ptx: str, barrier: int) -> str:
    """The PTX with one barrier, counted from 0, turned into a comment. ValueError says how many there are."""
    places = list(BARRIER.finditer(ptx))
    if not 0 <= barrier < len(places):
        raise ValueError(f"barrier: {barrier} is none of the {len(places)} barriers of this PTX")
    place = places[barrier]
    return ptx[: place.start()] + "\t// a barrier was here" + ptx[place.end() :]


if __name__ == "__main__":
    sys.exit(main())
