"""Wrong bytes never reach the driver: each kind of damage has its own reason."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import ContractError, OpenIndex, sha256_hex
from registry.frames import elf_arch, unpack
from registry.store import compress
from runtime.errors import IntegrityError
from tests.runtime.fakes import TABLE, elf, toy_artifact, toy_index

VARIANT = TABLE[0][-1]
ARTIFACT, FRAME = toy_artifact(VARIANT, "sm_120")


def reason(frame: bytes, artifact=ARTIFACT) -> str:
    with pytest.raises(IntegrityError) as error:
        unpack(frame, artifact)
    assert VARIANT.key in str(error.value) or error.value.reason == "elf"
    return error.value.reason


def vouched(cubin: bytes, frame: bytes | None = None, **changes):
    """An artifact whose hashes fit these bytes: only what comes after the hashes can refuse them."""
    artifact, frame = toy_artifact(VARIANT, "sm_120", cubin=cubin, frame=frame, **changes)
    return frame, artifact


def test_sound_bytes_pass():
    assert sha256_hex(unpack(FRAME, ARTIFACT)) == ARTIFACT.cubin_sha256


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, len(FRAME) - 1), st.integers(0, 7))
def test_any_flipped_bit_of_the_frame(place, bit):
    damaged = bytearray(FRAME)
    damaged[place] ^= 1 << bit
    assert reason(bytes(damaged)) == "sha256"


def test_wrong_sizes():
    assert reason(FRAME[:-1]) == "size"
    assert reason(FRAME + b"\0") == "size"
    assert reason(b"") == "size"


def test_a_frame_that_is_none():
    assert reason(*vouched(elf("sm_120"), b"no zstd at all")) == "zstd"


def test_a_frame_that_is_cut_off():
    cubin = elf("sm_120", bytes(range(256)) * 40)
    assert reason(*vouched(cubin, compress(cubin)[:-3])) == "zstd"


def defused(cubin: bytes, bomb: bytes) -> None:
    """Refused, and never unpacked: 50 MB would show."""
    frame, artifact = vouched(cubin, bomb)
    tracemalloc.start()
    try:
        assert reason(frame, artifact) == "zstd"
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_with_a_declared_size():
    cubin = elf("sm_120")
    bomb = compress(cubin + bytes(50_000_000))
    assert len(bomb) < 10_000
    defused(cubin, bomb)


def test_a_bomb_without_a_declared_size():
    from backports.zstd import ZstdCompressor

    compressor, cubin = ZstdCompressor(), elf("sm_120")
    bomb = compressor.compress(cubin) + b"".join(compressor.compress(bytes(1_000_000)) for _ in range(50))
    defused(cubin, bomb + compressor.flush())


def test_several_frames_and_trailing_bytes():
    cubin = elf("sm_120")
    assert reason(*vouched(cubin, compress(cubin) + compress(b""))) == "zstd"
    assert reason(*vouched(cubin, compress(cubin) + b"tail")) == "zstd"


def test_a_cubin_of_another_size_or_content():
    cubin = elf("sm_120", b"abc")
    frame, artifact = vouched(cubin)
    assert reason(frame, artifact.replace(cubin_size=len(cubin) + 1)) == "zstd"
    assert reason(frame, artifact.replace(cubin_size=len(cubin) - 1)) == "zstd"
    assert reason(frame, artifact.replace(cubin_sha256="0" * 64)) == "sha256"


@pytest.mark.parametrize("cubin", [
    b"", b"\x7fELF", elf("sm_120")[:63], b"MZ" + elf("sm_120")[2:], elf("sm_120", machine=62),
    elf("sm_120", abi_version=9), elf("sm_120")[:4] + b"\x01" + elf("sm_120")[5:],
    elf("sm_120")[:5] + b"\x02" + elf("sm_120")[6:],
    b".version 8.0\n.target sm_80\n" + bytes(64),
], ids=["empty", "stub", "short", "not ELF", "x86", "future ABI", "32 bit", "big endian", "PTX"])  # fmt: skip
def test_what_is_no_cubin(cubin):
    frame, artifact = vouched(cubin or b"\0")
    if not cubin:
        frame, artifact = compress(b""), artifact.replace(cubin_size=0, cubin_sha256=sha256_hex(b""))
        artifact = artifact.replace(frame_sha256=sha256_hex(frame), frame_size=len(frame))
    assert reason(frame, artifact) == "elf"


@pytest.mark.parametrize("arch", ["sm_90", "sm_121", "sm_100", "sm_89"])
def test_a_cubin_for_another_architecture(arch):
    assert reason(*vouched(elf(arch))) == "arch"


@pytest.mark.parametrize(("header", "arch"), [
    (elf("sm_120"), "sm_120"), (elf("sm_90"), "sm_90"), (elf("sm_90", abi_version=7), "sm_90"),
    (elf("sm_121"), "sm_121"),
])  # fmt: skip
def test_the_architecture_in_both_elf_versions(header, arch):
    assert elf_arch(header) == arch


def test_the_flags_that_were_seen_in_real_cubins():
    """facts/compile.md: 0x6007802 is sm_120, 0x6005a04 sm_90 (ABI version 8), 0x5a055a sm_90 (7)."""
    for flags, abi_version, arch in ((0x6007802, 8, "sm_120"), (0x6005A04, 8, "sm_90"), (0x5A055A, 7, "sm_90")):
        header = bytearray(elf("sm_50", abi_version=abi_version))
        header[48:52] = flags.to_bytes(4, "little")
        assert elf_arch(bytes(header)) == arch


def test_an_index_must_hash_to_its_digest():
    index, _ = toy_index(only="bf16-d64")
    data = index.to_bytes()
    assert OpenIndex(data, index.digest).whole.to_bytes() == data
    with pytest.raises(IntegrityError) as error:
        OpenIndex(data.replace(b"fwd-bf16", b"fwd-fp16"), index.digest)
    assert error.value.reason == "sha256"
    with pytest.raises(ContractError, match="update it"):
        newer = data.replace(b'"format":2', b'"format":4')
        OpenIndex(newer, sha256_hex(newer))


def test_corrupt_cubins_in_a_registry_file_are_refused(backend, registry: Path):
    """End to end: every blob's last byte changed on disk."""
    import sqlite3

    import torch

    import runtime

    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with sqlite3.connect(registry) as db:
        for digest, frame in db.execute("SELECT sha256, frame FROM blobs").fetchall():
            db.execute("UPDATE blobs SET frame = ? WHERE sha256 = ?", (frame[:-1] + bytes([frame[-1] ^ 1]), digest))
    db.close()
    with pytest.raises(IntegrityError) as error:
        runtime.flash_attn(q, q, q)
    assert error.value.reason == "sha256"
    assert "load_library" not in backend.driver.calls


def test_a_registry_of_mislabelled_cubins_is_refused(backend, tmp_path: Path):
    import torch

    import runtime
    from tests.runtime.fakes import write_registry

    write_registry(tmp_path / "r.db", "sm_120", only="bf16-d64-dv64-m64", cubin=elf("sm_90", b"x" * 50))
    runtime.configure(registry=tmp_path / "r.db")
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(IntegrityError) as error:
        runtime.flash_attn(q, q, q)
    assert error.value.reason == "arch" and "sm_90" in str(error.value)
    assert "load_library" not in backend.driver.calls
