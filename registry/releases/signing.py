"""Keys of releases: made, read, and used to sign. They lie in folders that the operator names, never in a registry.

One file a key, `<role>-<number>.pem` (PKCS #8, Ed25519, 0600). Which key may sign what is the root's to say, not the
file name's. Imports tuf, and cryptography through securesystemslib[crypto].
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from registry.errors import ReleaseError

ROLES = ("root", "targets", "snapshot", "timestamp")
MAX_KEY = 16_384  # bytes of a key's file


def make_keys(folder: Path, counts: Mapping[str, int]) -> dict[str, list[CryptoSigner]]:
    """New keys of each role, in `folder`, which is made (0700) if it is missing. counts: {role: how many}.

    Raises ReleaseError ('keys') if one of the files exists: nothing is overwritten.
    """
    with _readable(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths = {role: [folder / f"{role}-{n}.pem" for n in range(1, count + 1)] for role, count in counts.items()}
        for path in (path for of_role in paths.values() for path in of_role):
            if path.exists():
                raise ReleaseError(f"{path} exists; name another folder: no key is overwritten", reason="keys")
        return {role: [_make_key(path) for path in of_role] for role, of_role in paths.items()}


def read_keys(folders: Iterable[Path]) -> list[CryptoSigner]:
    """Every key in these folders (`*.pem`) or files. Raises ReleaseError ('keys') for none, for one that others can
    read, and for what is no Ed25519 key."""
    signers = []
    for folder in folders:
        with _readable(folder):
            paths = sorted(folder.glob("*.pem")) if folder.is_dir() else [folder]
            signers += [_read_key(path) for path in paths]
    if not signers:
        raise ReleaseError(f"{', '.join(map(str, folders)) or 'no folder'}: holds no *.pem", reason="keys")
    return signers


def sign(roots: Sequence[Root], role: str, payload: Any, signers: Iterable[CryptoSigner]) -> bytes:
    """The role's metadata, signed with all keys among `signers` that any of `roots` names for it.

    payload: one of tuf's Root, Targets, Snapshot and Timestamp. roots: the root in force; for root metadata the one
    before too. Raises ReleaseError ('keys') if the signatures are fewer than the threshold of one of them.
    """
    metadata: Metadata[Any] = Metadata(payload)
    wanted = {keyid for root in roots for keyid in root.roles[role].keyids}
    for signer in signers:
        if signer.public_key.keyid in wanted:
            metadata.sign(signer, append=True)
    for root in roots:
        keyids, threshold = set(root.roles[role].keyids), root.roles[role].threshold
        if len(found := keyids & set(metadata.signatures)) < threshold:
            raise ReleaseError(
                f"{role}: {len(found)} of the {threshold} keys that must sign it are here; add the folders of the "
                f"others with --keys (key ids: {', '.join(sorted(keyids - found))})",
                reason="keys",
            )
    return metadata.to_bytes()


def can_sign(root: Root, role: str, signers: Iterable[CryptoSigner]) -> bool:
    """Whether enough of the role's keys are here."""
    found = {signer.public_key.keyid for signer in signers} & set(root.roles[role].keyids)
    return len(found) >= root.roles[role].threshold


def _make_key(path: Path) -> CryptoSigner:
    signer = CryptoSigner.generate_ed25519()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(signer.private_bytes)
        file.flush()
        os.fsync(fd)
    return signer


def _read_key(path: Path) -> CryptoSigner:
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise ReleaseError(f"{path}: others can read or write this key; chmod 600 it", reason="keys")
        data = file.read(MAX_KEY)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise ReleaseError(f"{path}: no unencrypted private key in PEM: {error}", reason="keys") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ReleaseError(f"{path}: no Ed25519 key", reason="keys")
    return CryptoSigner(key)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReleaseError(f"{error.filename or path}: {error.strerror}", reason="keys") from None
