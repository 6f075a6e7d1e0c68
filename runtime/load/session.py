"""What one configuration has open: its source, the indexes it may load, the kernels that are loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from registry import ops
from registry.contract import Artifact, OpenIndex, check_bytes
from runtime import config, stages
from runtime.errors import CaptureError, ConfigError, InstallError, IntegrityError
from runtime.load import plans
from runtime.load.backend import TorchBackend
from runtime.load.kernel import Kernel, load
from runtime.sources import Source
from runtime.sources.source import open_source
from runtime.trust import resolve

if TYPE_CHECKING:
    from runtime.trust.lockfile import LockFile

BACKEND: Callable[[], Any] = TorchBackend  # made at the first call


class Session:
    """Made from the settings as they stand; `configure` replaces it. Its methods may be called from any thread."""

    def __init__(self, settings: config.Config | None = None):
        self.config = settings or config.current()
        self.lock = _lock_file(self.config.lock) if self.config.lock else None
        self.source: Source = open_source(self.config)
        self._lock = threading.RLock()
        self._digests: dict[str, str] | None = None
        self._indexes: dict[str, OpenIndex] = {}
        self._kernels: dict[tuple[str, int], Kernel] = {}  # by variant and device
        self._loading: dict[tuple[str, int], threading.Lock] = {}

    @cached_property
    def backend(self) -> Any:
        return BACKEND()

    @property
    def signed(self) -> bool:
        """Whether signed releases, under the root that was given, say what may be loaded from this source."""
        return bool(self.config.root) and not self.config.pins and resolve.why_remote(self.source) is not None

    def digests(self) -> dict[str, str]:
        """{arch: index digest} that may be loaded. Raises SourceError, UntrustedError."""
        with self._lock:
            if self._digests is None and self.lock is not None:
                self._digests = self._locked_digests(self.lock)
            if self._digests is None:
                self._digests = self._resolve("resolve")
            return self._digests

    def refresh(self) -> dict[str, str]:
        """This asks a signed remote source for its newest release, then answers as `digests` does. A local or pinned
        source has no newer release to ask for. Loaded indexes and kernels stay, and under a lock file the new release
        is not loaded. Raises SourceError, UntrustedError."""
        with self._lock:
            found = self._resolve("refresh", newest=True)
            if self.lock is None:
                self._digests = found
            return found

    def _resolve(self, stage: str, newest: bool = False) -> dict[str, str]:
        asked = self.config
        ask = partial(resolve.resolve, self.source, asked.channel, asked.pins, self._arch_of, asked, newest)
        found: dict[str, str] = self._timed(stage, self.source.where, ask)
        return found

    def _locked_digests(self, lock: LockFile) -> dict[str, str]:
        """The lock file's; ConfigError if a digest was given that is not among them."""
        others = [digest for _, digest in self.config.pins if digest not in lock.indexes.values()]
        if others:
            message = f"index: {others[0]} is not in the lock file {lock.path}; give one or the other, or lock it anew"
            raise ConfigError(message)
        return dict(lock.indexes)

    def _arch_of(self, digest: str) -> str:
        return self.index_by_digest(digest).arch

    def index_by_digest(self, digest: str) -> OpenIndex:
        """A verified index; a corrupt copy in the disk cache is set aside and fetched again, once."""

        def read() -> OpenIndex:
            return OpenIndex(self.source.index(digest), digest, self._part)

        with self._lock:
            if digest not in self._indexes:
                again = partial(self._once_more, read, "indexes", digest)
                self._indexes[digest] = self._timed("index", digest[:12], again)
            return self._indexes[digest]

    def _part(self, digest: str) -> bytes:
        """A part of an index; a corrupt copy in the disk cache is set aside and fetched again, once."""

        if "backend" in self.__dict__ and self.backend.is_capturing():
            raise _unloaded("the part of the index that serves this call has not been read yet")

        def read() -> bytes:
            data = self.source.index(digest)
            check_bytes(data, digest, "index part")
            return data

        found: bytes = self._once_more(read, "indexes", digest)
        return found

    def index_for_arch(self, arch: str) -> OpenIndex:
        """The index that may be loaded for an architecture, which `digests()` lists. IntegrityError ('index') if it is
        for another one."""
        index = self.index_by_digest(self.digests()[arch])
        if index.arch != arch:
            raise IntegrityError(f"the index given for {arch} is for {index.arch}", reason="index")
        return index

    def index_for_device(self, capability: tuple[int, int]) -> OpenIndex:
        """The index whose cubins run on a device of this capability. NoKernelError ('arch') if there is none."""
        digests = self.digests()
        arch = pick_arch(digests, capability)
        if arch is None and self.lock is not None:
            raise self.lock.no_arch(capability)
        if arch is None:
            from runtime.load import select  # here: only errors, and calls of other lengths, need it

            raise select.no_arch(capability, digests, self.source.where)
        return self.index_for_arch(arch)

    def cubin(self, artifact: Artifact) -> bytes:
        """Verified bytes, ready to load; a corrupt copy in the disk cache is set aside and fetched again, once.

        NoKernelError ('not_locked') if there is a lock file and they are not in it.
        """
        if self.lock is not None:
            self.lock.check(artifact)

        def read() -> bytes:
            started = perf_counter()
            frame = self.source.frame(artifact)
            fetched = perf_counter()
            try:
                from registry.frames import unpack  # here: it imports zstd
            except ImportError:
                raise InstallError("backports.zstd is missing; pip install cubinery installs it") from None
            cubin = unpack(frame, artifact)
            stages.record(("fetch", artifact.variant, (fetched - started) * 1e3))
            stages.record(("verify", artifact.variant, (perf_counter() - fetched) * 1e3))
            return cubin

        cubin: bytes = self._once_more(read, "blobs", artifact.frame_sha256)
        return cubin

    def kernel(self, op: str, facts: dict[str, Any], device: int, capturing: bool) -> tuple[Kernel, bool, bool]:
        """(kernel, pack, fresh) for a call on a device, which is torch's current one.

        The kernel is loaded; pack is the dispatch row's, and fresh says whether this call loaded it.
        capturing: whether this thread is capturing a CUDA graph. Raises every error of the tree but ArgumentError;
        CaptureError, before disk, network or driver are touched, if it would have to load while capturing. Waits for
        a fetch by another thread only if it needs the same kernel.
        """
        if capturing and not any(where == device for _, where in list(self._kernels)):
            raise _unloaded("no kernel is loaded yet on this device")
        index = self.index_for_device(self.backend.capability(device))
        start = perf_counter()
        served = index.serving(op, facts)
        artifact = index.artifact(served.variant) if served else None
        spent = (perf_counter() - start) * 1e3
        if served is None or artifact is None:
            from runtime.load import select

            raise select.no_kernel(index.whole, op, facts)
        place = artifact.variant, device
        found = self._kernels.get(place)
        if found is not None:
            return found, served.pack, False
        if capturing:
            raise _unloaded(f"{artifact.variant} is not loaded yet")
        with self._lock:
            loading = self._loading.setdefault(place, threading.Lock())
        with loading:
            if place in self._kernels:  # by another thread, meanwhile
                return self._kernels[place], served.pack, False
            stages.record(("select", artifact.variant, spent))
            kernel = self._kernels[place] = self._load(op, artifact, index, device)
            return kernel, served.pack, True

    def _load(self, op: str, artifact: Artifact, index: OpenIndex, device: int) -> Kernel:
        cubin = self.cubin(artifact)
        ours = ops.get(op).abi  # an index of another release may order parameters differently: `launch.layout` copes
        abi = ours if artifact.abi == ours.digest else index.abi(artifact.abi)
        start = perf_counter()
        found = load(self.backend.driver, cubin, artifact, abi, device)
        stages.record(("load", artifact.variant, (perf_counter() - start) * 1e3))
        return found

    def _timed(self, stage: str, what: str, run: Callable[[], Any]) -> Any:
        start = perf_counter()
        try:
            return run()
        finally:
            stages.record((stage, what, (perf_counter() - start) * 1e3))

    def _once_more(self, read: Callable[[], Any], kind: str, digest: str) -> Any:
        try:
            return read()
        except IntegrityError:
            if not self.source.discard(kind, digest):
                raise
            return read()


def pick_arch(available: Iterable[str], capability: tuple[int, int]) -> str | None:
    """The newest architecture whose cubins run on a device: same major version, minor version at most the device's."""
    major, minor = capability
    numbers = [int(arch.removeprefix("sm_")) for arch in available]
    fitting = [n for n in numbers if n // 10 == major and n % 10 <= minor]
    return f"sm_{max(fitting)}" if fitting else None


def _lock_file(path: str) -> LockFile:
    from runtime.trust import lockfile  # here: most processes have none

    return lockfile.read(path)


def _unloaded(what: str) -> CaptureError:
    return CaptureError(
        f"{what}, and nothing can be loaded while a CUDA graph is being captured: make this call once before it"
    )


_current: Session | None = None
_lock = threading.Lock()  # of _current, and of the settings that it was made from


def current() -> Session:
    """The session of the settings as they stand, made on first need."""
    global _current
    with _lock:
        if _current is None:
            _current = Session()
        return _current


def ready() -> Session:
    """This is `current()` with torch imported and the backend made: what a call needs."""
    now = _current
    if now is None or "backend" not in now.__dict__:
        made = BACKEND()
        now = current()
        now.__dict__.setdefault("backend", made)
    return now


def reset() -> None:
    """Drop the session and every plan. Loaded code stays in the driver; calls in flight finish with what they hold."""
    with _lock:
        _drop()


def _drop() -> None:
    """With the lock held: nobody may store a session of settings that have just been replaced."""
    global _current
    if _current is not None:
        _current.source.close()
    _current = None
    plans.drop()


def configure(
    *,
    registry: Any = None,
    index: Any = None,
    cache: Any = None,
    channel: str | None = None,
    offline: bool | None = None,
    root: Any = None,
    state: Any = None,
    max_age: float | None = None,
    lock: Any = None,
    cache_limit: int | str | None = None,
) -> None:
    """Settings that stand over the environment's and the configuration file's, see docs/settings.md; each call replaces
    all of the last, and drops what was loaded.

    registry: a registry file's path, a mirror folder's, or a server's http(s) URL. Else CUBINERY_REGISTRY, else
        registry.db in the user's data folder, where the builder writes.
    root: a file of TUF root metadata, whose releases may be loaded from a server, folder or foreign file. Else
        CUBINERY_ROOT.
    index: digests of the indexes that may be loaded, whatever is signed: '<digest>', 'sm_120=<digest>,sm_90=<digest>'
        or a dict. Else CUBINERY_INDEX.
    cache: folder of the disk cache, used with servers. Else CUBINERY_CACHE, else the user's cache folder.
    channel: which of the registry's channels; 'stable' by default.
    offline: True never opens a connection.
    state: folder of what was trusted last. Else CUBINERY_STATE, else the user's state folder.
    max_age: seconds after which a signed release must be asked for again; never by default. Else CUBINERY_MAX_AGE.
    lock: a lock file, as `python -m runtime lock` writes it: nothing else is loaded. Else CUBINERY_LOCK.
    cache_limit: bytes that the disk cache may hold, as a number or like '512M'; 4 GiB by default. Else
        CUBINERY_CACHE_LIMIT.

    Raises ConfigError, and then changes nothing.
    """
    with _lock:
        config.give(
            registry=registry,
            index=index,
            cache=cache,
            channel=channel,
            offline=offline,
            root=root,
            state=state,
            max_age=max_age,
            lock=lock,
            cache_limit=cache_limit,
        )
        _drop()


def _after_fork() -> None:
    """A child starts afresh: its parent's driver handles, locks and connections are not its own."""
    global _lock, _current
    _lock = threading.Lock()
    _current = None  # not closed: a goodbye on a connection that the parent still uses would end it there
    plans.drop()


os.register_at_fork(after_in_child=_after_fork)
