"""TUF's client over any source of files: what it verifies is what a root of trust vouches for.

Imports tuf (some 130 ms): import it where it is needed. Raises ReleaseError, whose `reason` names what does not hold.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import Metadata as Signed
from tuf.api.metadata import MetaFile, Root, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from registry.contract import ContractError
from registry.errors import ReleaseError
from registry.releases.document import Channel

Fetch = Callable[[str, int], bytes | None]  # (path below v1/tuf/, most bytes) -> the file, None where there is none

ROLES = ("timestamp", "snapshot", "targets")  # beside root
LIMITS = UpdaterConfig(
    max_root_rotations=256,
    max_delegations=0,  # the top-level targets role alone names channels
    root_max_length=512_000,
    timestamp_max_length=16_384,
    snapshot_max_length=2_000_000,
    targets_max_length=5_000_000,
)
MAX_DOCUMENT = 1 << 20  # bytes of a channel's document
NO_TIME = datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC)  # before which nothing expires

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.UnsignedMetadataError, "signature"),
    (exceptions.BadVersionNumberError, "rollback"),
    (exceptions.ExpiredMetadataError, "expired"),
    (exceptions.LengthOrHashMismatchError, "mismatch"),
    (exceptions.DownloadLengthMismatchError, "mismatch"),
)


@dataclass(frozen=True)
class Known:
    """The metadata that a client holds, each file's bytes. roots: those after the given one, in order of version."""

    roots: tuple[bytes, ...] = ()
    timestamp: bytes | None = None
    snapshot: bytes | None = None
    targets: bytes | None = None

    def to_bytes(self) -> bytes:
        files = {role: text.decode() for role in ROLES if (text := getattr(self, role)) is not None}
        return json.dumps({"format": 1, "roots": [root.decode() for root in self.roots], **files}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Known:
        """The inverse of to_bytes; nothing known if `data` is anything else."""
        try:
            found = json.loads(data)
            roots = tuple(text.encode() for text in found["roots"]) if found["format"] == 1 else ()
            return cls(roots, *(found[role].encode() if role in found else None for role in ROLES))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def versions(self) -> dict[str, int]:
        """{role: version}, 0 for what is not there; root is how many follow the given one."""
        found = {role: _version(text) if (text := getattr(self, role)) else 0 for role in ROLES}
        return {"root": len(self.roots), **found}


def merge(root: bytes, one: Known, other: Known) -> Known:
    """Of two clients of one root the newest that each holds: per role the highest version that the newest root signs.

    Where a root has replaced a role's keys, what the old ones signed is dropped, however high its version. Of targets
    those count that the newest snapshot names, if they are here.
    """
    # A damaged file may hold anything: of roots that follow on each other the longer chain counts.
    roots = max(one.roots, other.roots, key=lambda roots: len(_chain(root, roots)))
    roots = _chain(root, roots)
    trusted: Root = _payload(roots[-1] if roots else root)
    held = {
        role: [text for text in (getattr(one, role), getattr(other, role)) if text and signed_by(trusted, role, text)]
        for role in ROLES
    }
    timestamp, snapshot = (max(held[role], key=_version, default=None) for role in ("timestamp", "snapshot"))
    targets = [text for text in held["targets"] if snapshot is not None and _names(snapshot, text)] or held["targets"]
    return Known(roots, timestamp, snapshot, max(targets, key=_version, default=None))


def _chain(root: bytes, roots: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """As many of `roots` as follow on `root`, each signed by the one before and by itself."""
    before: Root = _payload(root)
    for n, body in enumerate(roots):
        if not signed_by(before, "root", body) or not signed_by(_payload(body), "root", body):
            return roots[:n]
        if _version(body) != before.version + 1:
            return roots[:n]
        before = _payload(body)
    return roots


def _names(snapshot: bytes, targets: bytes) -> bool:
    meta: MetaFile | None = _payload(snapshot).meta.get("targets.json")
    return meta is not None and meta.version == _version(targets)


def signed_by(root: Root, role: str, data: bytes) -> bool:
    """Whether a file is the role's metadata with enough signatures of its keys."""
    try:
        metadata = Signed.from_bytes(data)
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (exceptions.RepositoryError, ValueError):
        return False
    return metadata.signed.type == role


class Client:
    """One look at a release, through TUF's own client; a context manager, which owns a private folder.

    fetch: the files. root: the trusted root metadata. known: what is held already, against rollbacks. fresh: whether
    timestamp and snapshot must not have expired; False for files that claim no freshness (a folder, a bundle), of
    which only the targets' own expiry counts. `known` grows with `refresh`, also when that fails.
    """

    def __init__(self, fetch: Fetch, root: bytes, known: Known | None = None, *, fresh: bool = True):
        self.known = known or Known()
        self._root, self._fetch, self._fresh = root, fetch, fresh

    def __enter__(self) -> Client:
        self._folder = tempfile.TemporaryDirectory(prefix="cubinery-tuf-")
        try:
            with _translated():
                self._updater = self._prepare(Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def refresh(self) -> None:
        """Bring root, timestamp, snapshot and targets up to date, as TUF's client workflow has it."""
        try:
            with _translated():
                self._updater.refresh()
                if not self._fresh and self.targets.is_expired():
                    raise exceptions.ExpiredMetadataError("targets.json is expired")
        finally:
            self.known = self._held()

    def channel(self, name: str) -> Channel:
        """A channel's document, held by the targets' length and hash."""
        with _translated():
            info = self._updater.get_targetinfo(f"{name}.json")
            if info is None:
                names = ", ".join(self.channels()) or "none"
                raise ReleaseError(
                    f"no channel {name!r:.100} is signed (there are: {names:.1000})", reason="no_channel"
                )
            if info.length > MAX_DOCUMENT:
                raise exceptions.LengthOrHashMismatchError(f"channel {name}: longer than {MAX_DOCUMENT} bytes")
            path = self._updater.download_target(info, str(Path(self._folder.name, "document")))
        return Channel.from_bytes(Path(path).read_bytes(), name)

    def channels(self) -> list[str]:
        """The names of all channels of the release."""
        return sorted(path.removesuffix(".json") for path in self.targets.targets)

    @property
    def targets(self) -> Targets:
        """The verified targets metadata, after `refresh`."""
        return _payload(self._file("targets.json") or b"")

    @property
    def timestamp(self) -> Timestamp:
        return _payload(self._file("timestamp.json") or b"")

    def _prepare(self, folder: Path) -> Updater:
        """An updater whose folder holds what is known."""
        first = _version(self._root)
        (folder / "metadata" / "root_history").mkdir(parents=True)
        held = {f"root_history/{first + n}.root.json": text for n, text in enumerate(self.known.roots, 1)}
        held |= {f"{role}.json": text for role in ROLES if (text := getattr(self.known, role)) is not None}
        for path, text in held.items():
            (folder / "metadata" / path).write_bytes(text)
        updater = Updater(
            str(folder / "metadata"),
            _BASE,
            target_base_url=f"{_BASE}targets/",
            fetcher=_Fetcher(self._fetch),
            # Those that are known already do not count: a refresh always gets further.
            config=replace(LIMITS, max_root_rotations=LIMITS.max_root_rotations + len(self.known.roots)),
            bootstrap=self._root,
        )
        if not self._fresh:
            updater._trusted_set.reference_time = NO_TIME
        return updater

    def _held(self) -> Known:
        """What the updater's folder holds: all of it was verified, in this or an earlier refresh."""
        first = _version(self._root)
        latest = _version(self._file("root.json") or b"")
        roots = [self._file(f"root_history/{version}.root.json") for version in range(first + 1, latest + 1)]
        return Known(tuple(root for root in roots if root), *(self._file(f"{role}.json") for role in ROLES))

    def _file(self, path: str) -> bytes | None:
        try:
            return Path(self._folder.name, "metadata", path).read_bytes()
        except FileNotFoundError:
            return None


_BASE = "v1/tuf/"


class _Fetcher(FetcherInterface):
    """TUF's view of a Fetch: what bounds a request in time, and where it may be redirected, is the source's."""

    def __init__(self, fetch: Fetch):
        self._read = fetch

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter([self.download_bytes(url, LIMITS.targets_max_length)])

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[Any]:
        yield io.BytesIO(self.download_bytes(url, max_length))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        path = url.removeprefix(_BASE)
        data = self._read(path, max_length)
        if data is None:
            raise exceptions.DownloadHTTPError(f"{path} is missing", 404)
        if len(data) > max_length:
            raise exceptions.DownloadLengthMismatchError(f"{path} is longer than {max_length} bytes")
        return data


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """tuf's errors as ReleaseError; those of the source pass through tuf as they are."""
    try:
        yield
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        if isinstance(error, exceptions.DownloadHTTPError):
            raise ReleaseError(f"no signed release is there: {error}", reason="missing") from None
        reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "metadata")
        raise ReleaseError(f"the release does not hold: {error}", reason=reason) from None


def verify_all(fetch: Fetch, root: bytes, known: Known | None = None, *, fresh: bool) -> dict[str, Channel]:
    """Every channel of a release that holds, by name. For imports and checks; raises ReleaseError, ContractError."""
    with Client(fetch, root, known, fresh=fresh) as client:
        client.refresh()
        return {name: client.channel(name) for name in client.channels()}


def check_root(data: bytes) -> Root:
    """Root metadata that is signed by itself. ReleaseError ('root') for anything else."""
    try:
        metadata: Signed[Root] = Signed.from_bytes(data)
        if not isinstance(metadata.signed, Root):
            raise ContractError(f"it is {metadata.signed.type} metadata")
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    except (exceptions.RepositoryError, ValueError) as error:
        raise ReleaseError(f"no usable root metadata: {error}", reason="root") from None
    return metadata.signed


def _version(data: bytes) -> int:
    return int(_payload(data).version)


def _payload(data: bytes) -> Any:
    """The signed part of metadata, of whichever role."""
    return Signed.from_bytes(data).signed
