"""From a frame to a cubin, trusting nothing but the artifact's row of a trusted index."""

from __future__ import annotations

from registry.contract import ELF_MACHINE_CUDA, Artifact, ContractError, Index, elf_machine, sha256_hex
from registry.errors import StoreError
from runtime.errors import InstallError, IntegrityError


def index(data: bytes, digest: str) -> Index:
    """The index whose bytes hash to `digest`. IntegrityError ('sha256') or ContractError if these are no such bytes."""
    if sha256_hex(data) != digest:
        raise IntegrityError(f"index {digest[:12]}…: its bytes hash to {sha256_hex(data)[:12]}…", reason="sha256")
    return Index.from_bytes(data)


def cubin(frame: bytes, artifact: Artifact) -> bytes:
    """The cubin in `frame`: the very buffer that is to be loaded. Raises IntegrityError at the first thing wrong.

    The frame's size and hash are checked before it is decoded, decoding is bounded by the cubin's size, then follow
    the cubin's size and hash and its ELF header.
    """
    _check(frame, artifact.frame_size, artifact.frame_sha256, f"{artifact.variant} ({artifact.arch}): zstd frame")
    content = _decode(frame, artifact.cubin_size, artifact.variant)
    _check(content, artifact.cubin_size, artifact.cubin_sha256, f"{artifact.variant} ({artifact.arch}): cubin")
    found = elf_arch(content)
    if found != artifact.arch:
        raise IntegrityError(f"{artifact.variant}: the cubin is for {found}, not for {artifact.arch}", reason="arch")
    return content


def elf_arch(content: bytes) -> str:
    """The architecture in a cubin's ELF header, e.g. 'sm_120'. Raises IntegrityError for what is no cubin."""
    try:
        machine, arch = elf_machine(content)
    except ContractError as error:
        raise IntegrityError(f"the cubin: {error}", reason="elf") from None
    if machine != ELF_MACHINE_CUDA:
        raise IntegrityError(f"the cubin's ELF machine is {machine}, not {ELF_MACHINE_CUDA} (CUDA)", reason="elf")
    return arch


def _check(data: bytes, size: int, digest: str, what: str) -> None:
    if len(data) != size:
        raise IntegrityError(f"{what}: {len(data)} bytes instead of {size}", reason="size")
    if sha256_hex(data) != digest:
        raise IntegrityError(f"{what}: SHA-256 {sha256_hex(data)[:12]}… instead of {digest[:12]}…", reason="sha256")


def _decode(frame: bytes, size: int, what: str) -> bytes:
    """Exactly one zstd frame that declares and holds `size` bytes."""
    try:
        from registry.frames import decompress
    except ImportError:
        raise InstallError("backports.zstd is missing; pip install cubinery installs it") from None
    try:
        return decompress(frame, size)
    except StoreError as error:
        raise IntegrityError(f"{what}: {error}", reason="zstd") from None
