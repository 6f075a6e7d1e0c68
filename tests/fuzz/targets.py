"""The parsers that read bytes of others, as functions of those bytes.

A target returns whether the bytes were accepted. It lets pass any error that is not the parser's typed one, and
AssertionError where what was accepted does not hold what the parser promises: both are findings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from registry.contract import MAX_CONTENT, ContractError, Index, check_arch, check_digest, sha256_hex
from registry.errors import StoreError
from registry.frames import declared_size, decompress, elf_arch, elf_machine, unpack
from runtime.errors import IntegrityError, SourceError
from runtime.sources.answers import document
from tests.fuzz.seeds import ARTIFACT, CONTENT

MOST = 1 << 20  # bytes of content that a case may ask for
FACTS = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "seqlen_q": 1, "group": 1, "packed_rows": 1}


def index(data: bytes) -> bool:
    """Index.from_bytes: ContractError, or an index whose canonical bytes read as themselves."""
    try:
        parsed = Index.from_bytes(data)
    except ContractError:
        return False
    text = parsed.to_bytes()
    assert Index.from_bytes(text).to_bytes() == text
    for artifact in parsed.artifacts:
        assert parsed.abi(artifact.abi).nbytes >= 0
        assert 1 <= artifact.cubin_size <= MAX_CONTENT and 1 <= artifact.frame_size <= MAX_CONTENT
    for row in parsed.rows:
        for condition in row.when:
            with contextlib.suppress(ContractError):
                condition.holds(FACTS)
    return True


def frame(data: bytes) -> bool:
    """frames.decompress and frames.unpack, told a fixed size and the size that the frame itself declares."""
    sizes = {len(CONTENT)}
    try:
        sizes.add(declared_size(data))
    except StoreError as error:
        assert error.reason == "integrity"
    accepted = False
    for size in sizes:
        if size > MOST:
            continue
        try:
            content = decompress(data, size)
        except StoreError as error:
            assert error.reason == "integrity"
            content = None
        assert content is None or len(content) == size
        accepted |= content is not None
        # All hashes fit: only what comes after them can refuse.
        found = sha256_hex(content or b"")
        sums = {"frame_sha256": sha256_hex(data), "cubin_sha256": found}
        artifact = ARTIFACT.replace(frame_size=len(data), cubin_size=size, **sums)
        try:
            assert unpack(data, artifact) == content
        except IntegrityError as error:
            assert error.reason in (("elf", "arch") if content is not None else ("zstd",))
    return accepted


def elf(data: bytes) -> bool:
    """frames.elf_machine and frames.elf_arch."""
    try:
        machine, arch = elf_machine(data)
    except ContractError:
        machine = -1
    try:
        found = elf_arch(data)
    except IntegrityError as error:
        assert error.reason == "elf" and machine != 190
        return False
    assert machine == 190 and found == arch and data[8] in (7, 8)
    return True


def channel(data: bytes) -> bool:
    """answers.document, which reads what a server says of a channel before anything is verified."""
    try:
        found = document(data, "a channel", "status")
    except SourceError as error:
        assert error.reason == "status"
        return False
    assert all(check_arch(arch) and check_digest(digest) for arch, digest in found.items())
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {"index": index, "frame": frame, "elf": elf, "channel": channel}
