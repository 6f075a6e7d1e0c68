"""The disk cache: what each failing call, each threat and its limit do to it. Its basics are in test_source.py, many
processes and kill −9 in test_cache_processes.py."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime.sources.cache
from registry.contract import sha256_hex
from runtime import config
from runtime.errors import CubineryError, IntegrityError, SourceError
from runtime.load import session
from runtime.sources.cache import LIMIT, DiskCache
from runtime.sources.remote import CachedSource
from tests.runtime.cache_programs import Bodies, Steps, release

INDEX, BODIES = release(1, 5_000)
(ARTIFACT,) = INDEX.artifacts
DIGEST = ARTIFACT.frame_sha256
DATA = BODIES[DIGEST]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that can be, since these tests sync thousands of times; gone afterwards."""
    where = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield where / "cache"
    shutil.rmtree(where)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Sets what happens at each call that the cache makes of `os`."""
    return lambda hit: monkeypatch.setattr(runtime.sources.cache, "os", Steps(hit))


class Counting(Bodies):
    """A server that counts its downloads, and can be down."""

    def __init__(self, bodies: dict[str, bytes]):
        super().__init__(bodies)
        self.asked: list[str] = []
        self.down = False

    def _give(self, digest: str) -> bytes:
        self.asked.append(digest)
        if self.down:
            raise SourceError("nobody answers", reason="unreachable")
        return super()._give(digest)


def client(folder: Path, server: Bodies, **changes: Any) -> session.Session:
    """A session behind the cache in `folder`, whose server stands here."""
    made = session.Session(config.current()._replace(pins=(("sm_120", INDEX.digest),), cache=str(folder), **changes))
    made.source = CachedSource(server, DiskCache(str(folder)))
    return made


def load(now: session.Session) -> bytes:
    """From the pinned digest to verified bytes, as a call does it."""
    return now.cubin(now.index_for_arch("sm_120").whole.artifacts[0])


def entry(folder: Path, digest: str = DIGEST, kind: str = "blobs") -> Path:
    return Path(DiskCache(str(folder)).path(kind, digest))


def assert_sound(folder: Path) -> None:
    """Each entry holds what its name says."""
    for path in folder.rglob("[0-9a-f]" * 64):
        assert sha256_hex(path.read_bytes()) == path.name


# -- failing calls ----------------------------------------------------------------------------------------------------


def prepare(folder: Path, state: str) -> None:
    """A cold cache, a warm one, or one whose entry is corrupt."""
    if state != "cold":
        load(client(folder, Bodies(BODIES)))
    if state == "corrupt":
        entry(folder).write_bytes(DATA[:-1] + b"?")


def untouched(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return real(*args, **kwargs)


class Fault:
    """Call number `failing` fails, with `lasting` also each after it. A write does half of its work before."""

    def __init__(self, failing: int, lasting: bool, code: int):
        self.failing, self.lasting, self.code = failing, lasting, code
        self.calls = 0

    def __call__(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at, self.calls = self.calls, self.calls + 1
        if at != self.failing and not (self.lasting and at > self.failing):
            return real(*args, **kwargs)
        if name == "close":  # it is closed all the same, as on Linux
            real(*args)
        if name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(self.code, os.strerror(self.code))


def calls_of_a_load(folder: Path, steps: Callable[..., None], state: str) -> list[str]:
    prepare(folder, state)
    names: list[str] = []

    def hit(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names.append(name)
        return real(*args, **kwargs)

    steps(hit)
    load(client(folder, Bodies(BODIES)))
    steps(untouched)
    return names


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("state", ["cold", "warm", "corrupt"])
def test_every_call_that_fails_means_success_or_an_error_never_bad_bytes(folder, steps, state, lasting, code):
    """Bar 2: each write, fsync, rename and every other call of a load fails in turn; a write does half of its work."""
    names = calls_of_a_load(folder / "count", steps, state)
    assert state == "warm" or {"write", "fsync", "rename", "close", "mkdir"} <= set(names)
    for failing in range(len(names)):
        where, fault = folder / str(failing), Fault(failing, lasting, code)
        prepare(where, state)
        steps(fault)
        try:
            assert sha256_hex(load(client(where, Bodies(BODIES)))) == ARTIFACT.cubin_sha256
        except CubineryError as error:
            assert isinstance(error, SourceError | IntegrityError)
        steps(untouched)
        assert fault.calls > failing
        server = Counting(BODIES)
        assert sha256_hex(load(client(where, server))) == ARTIFACT.cubin_sha256
        assert_sound(where)
        load(client(where, server))
        assert len(server.asked) <= 2, "the next healthy load fills the cache"


def test_writes_that_do_less_than_asked_are_gone_on_with(folder, steps):
    def hit(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return real(args[0], args[1][:7]) if name == "write" else real(*args, **kwargs)

    steps(hit)
    DiskCache(str(folder)).put("blobs", DIGEST, DATA)
    assert entry(folder).read_bytes() == DATA


# -- threats ----------------------------------------------------------------------------------------------------------


def refuse_writing(code: int) -> Callable[..., Any]:
    """A file system that cannot be changed."""

    def hit(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changes = name in ("mkdir", "makedirs", "write", "fsync", "rename", "replace", "unlink", "utime")
        if changes or (name == "open" and args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return hit


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=lambda code: errno.errorcode[code])
def test_threat_disk_full(folder, steps, code):
    steps(refuse_writing(code))
    server = Counting(BODIES)
    for _ in range(2):
        assert sha256_hex(load(client(folder, server))) == ARTIFACT.cubin_sha256
    assert server.asked == [INDEX.digest, DIGEST] * 2 and not list(folder.rglob("*"))


def test_threat_read_only_cache(folder, steps):
    """Warm entries serve; a corrupt or missing one is loaded from memory."""
    server = Counting(BODIES)
    load(client(folder, server))
    os.utime(entry(folder), (0, 0))  # a use that should be noted, and cannot be
    steps(refuse_writing(errno.EROFS))
    load(client(folder, server))
    assert len(server.asked) == 2
    entry(folder).write_bytes(b"?" * len(DATA))
    now = client(folder, server)
    load(now)
    load(now)
    assert server.asked == [INDEX.digest, DIGEST, DIGEST, DIGEST]


class Swap:
    """Before call number `moment` a folder is replaced by a link to another."""

    def __init__(self, moment: int, path: Path, target: Path):
        self.moment, self.path, self.target = moment, path, target
        self.calls = 0

    def __call__(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.calls == self.moment:
            self.path.rename(self.path.with_name("moved"))
            self.path.symlink_to(self.target)
        self.calls += 1
        return real(*args, **kwargs)


@pytest.mark.parametrize("inner", ["", "v1", "v1/blobs", "v1/blobs/sha256", f"v1/blobs/sha256/{DIGEST[:2]}"])
def test_threat_symlink_swap(folder, steps, inner):
    """A folder that becomes a link at any moment of a read or write: what lies there is neither used nor written."""
    outside, forged = folder.parent / "outside", b"forged".ljust(len(DATA))
    target = entry(outside)
    target.parent.mkdir(parents=True)
    target.write_bytes(forged)
    before = sorted(outside.rglob("*"))
    for moment in range(200):
        where = folder / str(moment) / "cache"
        swap = Swap(moment, where / inner, outside / inner)
        DiskCache(str(where)).put("blobs", DIGEST, DATA)
        steps(swap)
        cache = DiskCache(str(where))
        try:
            assert cache.get("blobs", DIGEST, len(DATA)) in (None, DATA)
            cache.put("blobs", DIGEST, DATA)
        except SourceError as error:
            assert error.reason == "cache_owner" and inner == ""
        steps(untouched)
        assert target.read_bytes() == forged and sorted(outside.rglob("*")) == before
        if swap.calls <= moment:  # all of them have had their turn
            assert moment > 30
            return
    raise AssertionError("a read and a write never end")


@pytest.mark.parametrize("inner", ["", "v1", "v1/blobs", "v1/blobs/sha256", f"v1/blobs/sha256/{DIGEST[:2]}", "entry"])
@pytest.mark.parametrize("whose", ["others own it", "others can write it"])
def test_threat_foreign_owned_cache(folder, monkeypatch, inner, whose):
    """The cache's own folder: a typed error. Anything within: not used, and not written through."""
    load(client(folder, Bodies(BODIES)))
    path = entry(folder) if inner == "entry" else folder / inner
    if whose == "others can write it":
        path.chmod(0o777)
    else:
        facts, real = os.stat(path), os.fstat

        def fstat(fd: int) -> os.stat_result:  # only root could give it away
            found = real(fd)
            return os.stat_result((*found[:4], 12345, *found[5:])) if found.st_ino == facts.st_ino else found

        monkeypatch.setattr(os, "fstat", fstat)
    server = Counting(BODIES)
    if inner == "":
        with pytest.raises(SourceError, match="CUBINERY_CACHE") as error:
            load(client(folder, server))
        assert error.value.reason == "cache_owner" and server.asked == []
    else:
        assert sha256_hex(load(client(folder, server))) == ARTIFACT.cubin_sha256
        assert DIGEST in server.asked


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty", "a folder", "a link", "unreadable"])
@pytest.mark.parametrize("kind", ["blobs", "indexes"])
def test_threat_corrupt_entry(folder, kind, damage):
    """Set aside or replaced, fetched once, and whole from then on."""
    server = Counting(BODIES)
    load(client(folder, server))
    digest = DIGEST if kind == "blobs" else INDEX.digest
    path, good = entry(folder, digest, kind), BODIES[digest]
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a link":
        (folder / "elsewhere").write_bytes(good)
        path.symlink_to(folder / "elsewhere")
    else:
        bad = {
            "flipped": good[:-1] + bytes([good[-1] ^ 1]),
            "truncated": good[:-1],
            "longer": good + b"!",
            "empty": b"",
        }
        path.write_bytes(bad.get(damage, good))
        path.chmod(0o622 if damage == "unreadable" else 0o600)
    for _ in range(2):
        assert sha256_hex(load(client(folder, server))) == ARTIFACT.cubin_sha256
    assert server.asked == [INDEX.digest, DIGEST, digest]
    assert path.read_bytes() == good and not path.is_symlink()


def test_threat_corrupt_entry_that_another_process_has_mended(folder):
    """Who saw the corrupt bytes later does not move the good ones away."""
    load(client(folder, Bodies(BODIES)))
    assert DiskCache(str(folder)).set_aside("blobs", DIGEST) is True
    assert entry(folder).read_bytes() == DATA


def test_threat_server_down_with_a_warm_cache(folder):
    server = Counting(BODIES)
    load(client(folder, server))
    server.down = True
    assert sha256_hex(load(client(folder, server))) == ARTIFACT.cubin_sha256
    entry(folder).unlink()
    with pytest.raises(SourceError) as error:
        load(client(folder, server))
    assert error.value.reason == "unreachable"


def test_threat_a_stuck_download_of_another_process(folder, monkeypatch):
    """Who waits for a download does not wait for ever."""
    monkeypatch.setattr(runtime.sources.cache, "LOCK_WAIT_S", 0.2)
    server = Counting(BODIES)
    with DiskCache(str(folder))._turn(DIGEST), DiskCache(str(folder))._turn(INDEX.digest):
        assert sha256_hex(load(client(folder, server))) == ARTIFACT.cubin_sha256
    assert len(server.asked) == 2


def test_the_default_cache_is_not_in_tmp(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert config.current().cache_folder == "/home/someone/.cache/cubinery"


# -- the limit --------------------------------------------------------------------------------------------------------


def bodies(n: int, nbytes: int = 1000) -> dict[str, bytes]:
    made = [i.to_bytes(2, "big") * (nbytes // 2) for i in range(n)]
    return {sha256_hex(data): data for data in made}


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("[0-9a-f]" * 64)}


def test_what_was_used_longest_ago_goes_first(folder):
    cache, given = DiskCache(str(folder), limit=10_000), bodies(11)
    *first, last = given
    for age, digest in enumerate(first):
        cache.put("blobs", digest, given[digest])
        os.utime(entry(folder, digest), (0, 1_000_000 + age))
    assert kept(folder) == set(first)
    assert cache.get("blobs", first[0], 1000) == given[first[0]]  # used again: the oldest no more
    cache.put("indexes", last, given[last])
    assert kept(folder) == set(given) - {first[1], first[2]}, "down to nine tenths of the limit"
    assert cache.usage() == (9, 0, 9_000)


def test_the_limit_holds_after_every_write(folder):
    given = bodies(60)
    cache = DiskCache(str(folder), limit=20_000)
    for digest, data in given.items():
        cache.put("blobs", digest, data)
        assert cache.usage().nbytes <= 20_000 and cache.get("blobs", digest, 1000) == data


def test_the_folder_is_not_measured_at_every_write(folder, monkeypatch):
    cache, given, measured = DiskCache(str(folder), limit=LIMIT), bodies(20), []
    real = cache._files
    monkeypatch.setattr(cache, "_files", lambda: measured.append(1) or real())
    for digest, data in given.items():
        cache.put("blobs", digest, data)
    assert len(measured) == 1


def test_what_was_just_written_stays(folder):
    """Even where it alone is more than what making room leaves."""
    cache, small, large = DiskCache(str(folder), limit=1_000), bodies(1, 100), bodies(1, 960)
    for digest, data in (small | large).items():
        cache.put("blobs", digest, data)
    assert kept(folder) == set(large)


@pytest.mark.parametrize("moment", ["stat", "unlink"])
def test_another_process_that_makes_room_at_the_same_time(folder, steps, caplog, moment):
    """What it has removed is gone, and no reason to complain."""
    given = bodies(4)
    cache = DiskCache(str(folder), limit=3_000)

    def hit(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == moment:
            os.unlink(*args, **{key: value for key, value in kwargs.items() if key == "dir_fd"})
        return real(*args, **kwargs)

    for digest in list(given)[:3]:
        cache.put("blobs", digest, given[digest])
    steps(hit)
    cache.put("blobs", list(given)[3], given[list(given)[3]])
    assert cache.usage().nbytes <= 3_000 and "cannot be written" not in caplog.text


def test_an_entry_above_the_limit_and_a_limit_of_0_are_not_written(folder):
    for limit in (0, 999):
        cache, given = DiskCache(str(folder), limit=limit), bodies(1)
        ((digest, data),) = given.items()
        assert cache.fetch("blobs", digest, 1000, lambda data=data: data) == data
        assert kept(folder) == set()


def test_corrupt_entries_count_and_go(folder):
    cache, given = DiskCache(str(folder), limit=3_000), bodies(4)
    digests = list(given)
    for digest in digests[:3]:
        cache.put("blobs", digest, given[digest])
    entry(folder, digests[0]).write_bytes(b"?" * 1000)
    assert cache.set_aside("blobs", digests[0]) and cache.usage() == (2, 1, 3_000)
    os.utime(f"{entry(folder, digests[0])}.corrupt", (0, 0))
    cache.put("blobs", digests[3], given[digests[3]])
    assert cache.usage().corrupt == 0


def test_what_is_being_written_is_not_taken_away(folder):
    cache, given = DiskCache(str(folder), limit=2_500), bodies(4)
    digests = list(given)
    cache.put("blobs", digests[0], given[digests[0]])
    half = entry(folder, digests[0]).with_name("half.tmp")
    half.write_bytes(b"x" * 1000)
    os.utime(half, (0, time.time() - 3600))
    for digest in digests[1:]:
        cache.put("blobs", digest, given[digest])
    assert half.exists() and len(kept(folder)) == 1
