"""A registry file of variants with each barrier of their PTX removed in turn: what racecheck must be seen to flag.

    python -m tests.gpu.plant_race --registry registry.db --out planted.db

Runs where the registry is built (it assembles). The kernels get names of their own, `cubinery_planted0_…`, so that
findings about them are told from findings about the real one, and a file of their own, so that nobody serves them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.derived import only_one, read_index
from builder import nvjitlink
from registry.contract import Artifact, Variant, sha256_hex
from registry.frames import compress
from registry.store import Store

OPS = ("fwd", "bwd")  # of each, the first variant of the index, unless told otherwise
BARRIER = re.compile(r"^\s*(?:bar\.sync|barrier\.sync|barrier\.cta\.sync)\b[^;]*;[ \t]*$", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.plant_race", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the file to write; replaced if it exists")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument(
        "--variant", nargs="+", help="keys of the variants to break; by default the index's first forward and backward"
    )
    options = parser.parse_args(argv)
    index = read_index(options.registry, options.arch)
    artifacts = [index.by_variant[key] for key in options.variant or first_of_each(index.by_variant)]
    with Store(options.registry, readonly=True) as store:
        texts = [store.ptx_text(a.ptx_sha256) for a in artifacts]
        beside = {a.symbol: a for broken in artifacts for a in only_one(index, broken).artifacts if a != broken}
        frames = [(a, store.get_frame(a.frame_sha256)) for a in beside.values()]
    options.out.unlink(missing_ok=True)
    with Store(options.out) as store:
        for a, whole in frames:
            assert whole is not None, f"{a.variant}: the registry lacks its blob"
            store.put_artifact(sha256_hex(a.symbol.encode()), a, whole)
        places = [(a, ptx, i) for a, ptx in zip(artifacts, texts, strict=True) for i in range(barriers(ptx))]
        for number, place in enumerate(places):
            planted, frame = plant(*place)
            store.put_artifact(sha256_hex(planted.symbol.encode()), planted, frame)
            store.put_index(only_one(index, planted), f"planted{number}")
            print(f"{options.out}: {planted.symbol} for {options.arch}")
    return 0


def first_of_each(keys: Iterable[str]) -> list[str]:
    """The first key of each of OPS, or of all where there is none of these."""
    found = [min((key for key in keys if Variant.parse(key).op == op), default="") for op in OPS]
    return [key for key in found if key] or [min(keys)]


def barriers(ptx: str) -> int:
    return len(BARRIER.findall(ptx))


def plant(artifact: Artifact, ptx: str, barrier: int) -> tuple[Artifact, bytes]:
    """The artifact and frame of the PTX without its barrier number `barrier`, under a new name."""
    name = artifact.symbol.replace("cubinery_", f"cubinery_planted{barrier}_", 1)
    broken = re.sub(rf"\b{re.escape(artifact.symbol)}\b", name, without_barrier(ptx, barrier))
    cubin = nvjitlink.assemble(broken, artifact.arch).cubin
    frame = compress(cubin)
    made = artifact.replace(
        symbol=name, ptx_sha256=sha256_hex(broken.encode()),
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
