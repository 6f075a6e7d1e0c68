"""Artifacts, indexes and registries for tests: real structure, made-up machine code."""

from __future__ import annotations

import hashlib
from typing import Any

from kernels.dispatch import rows, variants
from registry.contract import Artifact, Grid, Index, sha256_hex
from registry.store import Store, compress
from tests.support.abis import FWD

KEYS = tuple(variant.key for variant in variants())


def cubin(seed: str, size: int = 3000) -> bytes:
    """`size` bytes that look the same in every run; half of them compress."""
    return hashlib.shake_256(seed.encode()).digest(size // 2).ljust(size, b"\0")


def artifact(key: str = KEYS[0], arch: str = "sm_120", *, content: bytes | None = None, **changes: Any):
    """(an artifact, its frame) whose hashes and sizes agree; `changes` replace fields."""
    content = cubin(f"{key} {arch}") if content is None else content
    frame = compress(content)
    made = Artifact(
        variant=key,
        arch=arch,
        symbol="cubinery_" + key.replace("-", "_"),
        abi=FWD.digest,
        grid=Grid("tiles_heads_batch", 128),
        threads=128,
        smem=65536,
        static_smem=0,
        registers=168,
        spills=0,
        stack=0,
        blocks_per_sm=1,
        hot_loop=(("HMMA", 128), ("LDSM", 32)),
        cubin_sha256=sha256_hex(content),
        cubin_size=len(content),
        frame_sha256=sha256_hex(frame),
        frame_size=len(frame),
        ptx_sha256=sha256_hex(ptx(key).encode()),
        toolchain="dsl 4.8.1 nvjitlink 12.9.86",
        min_driver=12080,
    )
    return made.replace(**changes), frame


def ptx(key: str) -> str:
    return f"// {key}\n.version 8.7\n.target sm_80\n"


def index(artifacts: list[Artifact], arch: str = "sm_120") -> Index:
    return Index(arch, "0.1.0", tuple(artifacts), rows(), (FWD,))


def fill(
    store: Store, keys: tuple[str, ...] = KEYS[:3], arches: tuple[str, ...] = ("sm_120", "sm_90")
) -> dict[str, str]:
    """Store PTX, artifacts and one 'stable' index per architecture; returns {arch: index digest}."""
    for key in keys:
        store.put_ptx(f"ptx {key}".replace(" ", ":"), key, ptx(key), {"symbol": "s", "threads": 128})
    digests = {}
    for arch in arches:
        made = [artifact(key, arch) for key in keys]
        for a, frame in made:
            store.put_artifact(f"cubin:{a.variant}:{arch}", a, frame)
        digests[arch] = store.put_index(index([a for a, _ in made], arch), "stable")
    return digests
