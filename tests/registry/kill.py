"""Programs that write a registry or a mirror, killed with SIGKILL in the midst of their writes.

    python -m tests.registry.kill builder|publish|gc|export FOLDER SEED KILLS

One process that has imported everything forks each victim, lets it live until it has begun a write that a seeded draw
chose, kills it a drawn part of a write's time later, and checks what it left. A kill counts only if the write was under
way. Prints {"program", "kills", "landed", "acknowledged"} as JSON; exits 1 with the reason if anything was wrong.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from registry import connection, export, gc
from registry.contract import Artifact, Index, sha256_hex
from registry.releases.client import verify_all
from registry.store import Store
from registry.untrusted import read_file
from tests.registry import releases
from tests.registry.samples import KEYS, artifact, cubin, index, ptx

POOL = 24  # releases, made once
KEEP = 3  # indexes of a channel, for gc
INSIDE, LASTED = 0, 8  # offsets in the shared memory: a flag, and how long the last write took (seconds, a double)

Item = tuple[str, Artifact, bytes, Index]


class Watch:
    """Shared by a victim and its killer: whether a write is under way, and a pipe that says which one has begun."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 16)
        self.begun = os.pipe()
        self.said = os.pipe()
        os.set_blocking(self.said[0], False)
        self.fatal = 0  # the number of the write during which the victim is to die
        self.on = False  # only in a victim
        struct.pack_into("d", self.shared, LASTED, 0.002)

    def say(self, text: str) -> None:
        os.write(self.said[1], f"{text}\n".encode())  # one write below PIPE_BUF: never torn

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        if not self.on:
            yield
            return
        self.fatal -= 1
        self.shared[INSIDE] = 1
        start = time.perf_counter()
        if self.fatal == 0:
            os.write(self.begun[1], b"!")
        yield
        self.shared[INSIDE] = 0
        struct.pack_into("d", self.shared, LASTED, time.perf_counter() - start)


def watched(watch: Watch) -> None:
    """Every transaction of a Store, and every file of an export, is a write."""
    begin, write = connection.Connection._write, export.write

    @contextlib.contextmanager
    def transaction(self: Store) -> Iterator[Any]:
        with watch.write(), begin(self) as db:
            yield db

    def file(*arguments: Any) -> None:
        with watch.write():
            write(*arguments)

    connection.Connection._write, export.write = transaction, file  # type: ignore[method-assign]


def pool(seed: str, kib: int) -> list[Item]:
    made = []
    for n in range(POOL):
        text = ptx(f"{seed} {n}")
        a, frame = artifact(KEYS[0], content=cubin(f"{seed} {n}", kib << 10), ptx_sha256=sha256_hex(text.encode()))
        made.append((text, a, frame, index([a])))
    return made


class Program:
    """A victim's life in one folder, and what must hold after its death. `done`: how many items it has finished."""

    writes = 8  # of which one is chosen
    kib = 100  # of a cubin

    def __init__(self, folder: Path, watch: Watch, items: list[Item]):
        self.folder, self.watch, self.items = folder, watch, items
        self.path = folder / "r.db"
        self.said: list[str] = []
        folder.mkdir()
        self.set_up()

    @property
    def acknowledged(self) -> list[str]:
        """What it said of each item that it had finished."""
        return [line.removeprefix("done ") for line in self.said if line.startswith("done ")]

    def set_up(self) -> None:
        with Store(self.path) as store:
            store.put_ptx("kept", KEYS[0], ptx("kept"), {})

    def exhausted(self) -> bool:
        return len(self.acknowledged) > POOL - 8

    def live(self) -> None:
        with Store(self.path) as store:
            for item in self.items[len(self.acknowledged) :]:
                self.step(store, item)

    def step(self, store: Store, item: Item) -> None:
        raise NotImplementedError

    def check(self) -> None:
        with Store(self.path) as store:
            assert store.verify() == [], store.verify()
            self.check_store(store)

    def check_store(self, store: Store) -> None:
        raise NotImplementedError


def _put(store: Store, item: Item, say: Callable[[str], None] = lambda text: None) -> None:
    """As the builder does: PTX, then the artifact."""
    text, a, frame, _ = item
    store.put_ptx(f"ptx:{a.cubin_sha256}", a.variant, text, {})
    say(f"ptx {a.cubin_sha256}")
    store.put_artifact(f"cubin:{a.cubin_sha256}", a, frame)
    say(f"cubin {a.cubin_sha256}")


class Builder(Program):
    """What `builder.build` does to a store: wanted fingerprints, PTX, artifacts, an index, its channel."""

    def step(self, store: Store, item: Item) -> None:
        store.set_wanted("sm_120", [f"ptx:{item[1].cubin_sha256}", f"cubin:{item[1].cubin_sha256}"])
        _put(store, item, self.watch.say)
        self.watch.say(f"done {store.put_index(item[3], 'stable')}")

    def check_store(self, store: Store) -> None:
        for line in self.said:
            kind, name = line.split()
            found = {"ptx": store.get_ptx, "cubin": store.get_artifact, "done": store.get_index}[kind]
            assert found(name if kind == "done" else f"{kind}:{name}") is not None, f"lost: {line}"
        there = [move.digest for move in reversed(store.history("stable"))]
        assert there[: len(self.acknowledged)] == self.acknowledged and len(there) <= len(self.acknowledged) + 1
        assert not there or store.channel("stable") == {"sm_120": there[-1]}


class Publish(Program):
    """`python -m registry publish`, one release after the other."""

    writes = 6

    def set_up(self) -> None:
        with Store(self.path) as store:
            self.root = releases.keys(store, self.folder / "keys")
            for item in self.items:
                _put(store, item)
                store.put_index(item[3], None)

    def step(self, store: Store, item: Item) -> None:
        store.put_index(item[3], "stable")
        self.watch.say(f"done {item[3].digest} {releases.release(store, self.folder / 'keys')}")

    def check_store(self, store: Store) -> None:
        if not self.acknowledged and store.tuf("timestamp.json") is None:
            return
        signed = verify_all(lambda path, cap: store.tuf(path), self.root, fresh=True)["stable"].indexes
        version = json.loads(store.tuf("timestamp.json") or b"")["signed"]["version"]
        digests = [line.split()[0] for line in self.acknowledged]
        assert not digests or version >= int(self.acknowledged[-1].split()[1]), "an acknowledged release is lost"
        at = [item[3].digest for item in self.items].index(signed["sm_120"])
        assert not digests or signed["sm_120"] == digests[-1] or at == len(digests)


class Gc(Program):
    """gc without its day of grace after every new index. Only gc's own transaction is watched."""

    writes = 4
    kib = 30

    def set_up(self) -> None:
        with Store(self.path) as store:
            _put(store, self.items[0])
            store.set_wanted("sm_120", [f"{kind}:{self.items[0][1].cubin_sha256}" for kind in ("ptx", "cubin")])

    def step(self, store: Store, item: Item) -> None:
        self.watch.on = False
        _put(store, item)
        digest = store.put_index(item[3], "stable")
        self.watch.say(f"done {digest}")
        self.watch.on = True
        gc.collect(store, keep_indexes=KEEP, keep_s=0.0)

    def check_store(self, store: Store) -> None:
        for digest in self.acknowledged[1 - KEEP :]:  # one more may have come, unacknowledged
            body = store.get_index(digest)
            assert body is not None, "gc took an index that a channel keeps"
            assert all(store.get_frame(a.frame_sha256) for a in Index.from_bytes(body).artifacts)
        _, a, frame, _ = self.items[0]
        assert store.get_artifact(f"cubin:{a.cubin_sha256}") == a and store.get_frame(a.frame_sha256) == frame
        assert store.get_ptx(f"ptx:{a.cubin_sha256}") is not None, "gc took what the builder wants"
        gc.collect(store, keep_indexes=KEEP, keep_s=0.0)
        assert len(store.indexes()) <= KEEP and store.verify() == []


class Export(Program):
    """`python -m registry export DIR` into a folder that is new, or that a killed export has left."""

    writes = 40
    kib = 20

    def set_up(self) -> None:
        self.checked: set[int] = set()
        with Store(self.path) as store:
            self.root = releases.keys(store, self.folder / "keys")
            for item in self.items:
                _put(store, item)
                store.put_index(item[3], "stable")
            releases.release(store, self.folder / "keys")

    def live(self) -> None:
        with Store(self.path, readonly=True) as store:
            for n in range(len(self.acknowledged), POOL):
                export.to_folder(store, self.folder / f"mirror {n}")
                self.watch.say(f"done {n}")

    def check(self) -> None:
        for n in range(len(self.acknowledged)):
            if n not in self.checked:
                self.check_mirror(self.folder / f"mirror {n}" / "v1", True)
                self.checked.add(n)
        self.check_mirror(self.folder / f"mirror {len(self.acknowledged)}" / "v1", False)

    def check_mirror(self, root: Path, whole: bool) -> None:
        for kind in ("blobs", "indexes"):
            for path in (root / kind / "sha256").glob("*"):
                assert sha256_hex(path.read_bytes()) == path.name, f"{path}: torn"
        for path in (root / "indexes" / "sha256").glob("*"):
            for a in Index.from_bytes(path.read_bytes()).artifacts:
                assert (root / "blobs" / "sha256" / a.frame_sha256).exists(), "an index before its blobs"
        for path in (root / "channels").glob("*"):
            for digest in json.loads(path.read_bytes())["indexes"].values():
                assert (root / "indexes" / "sha256" / digest).exists(), "a channel before its index"
        if whole or (root / "tuf" / "timestamp.json").exists():
            signed = verify_all(lambda path, cap: read_file(root / "tuf" / path, cap), self.root, fresh=True)[
                "stable"
            ].indexes
            assert all((root / "indexes" / "sha256" / digest).exists() for digest in signed.values())
        assert not whole or (root / "channels" / "stable").exists(), "an acknowledged export is lost"


PROGRAMS: dict[str, type[Program]] = {"builder": Builder, "publish": Publish, "gc": Gc, "export": Export}


def kill_once(program: Program, draw: random.Random) -> bool:
    """Fork a victim and kill it; whether the kill landed in a write. `program` learns what it acknowledged."""
    watch = program.watch
    watch.fatal, watch.shared[INSIDE] = draw.randint(1, program.writes), 0
    share = draw.random()
    victim = os.fork()
    if victim == 0:
        try:
            watch.on = True
            program.live()
        finally:
            os._exit(0)  # it ended before the write that was chosen
    exited = os.pidfd_open(victim)
    ready, _, _ = select.select([watch.begun[0], exited], [], [], 60)
    if watch.begun[0] in ready:
        os.read(watch.begun[0], 1)
        time.sleep(share * struct.unpack_from("d", watch.shared, LASTED)[0])
    os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    os.close(exited)
    with contextlib.suppress(BlockingIOError):
        program.said += os.read(watch.said[0], 1 << 16).decode().splitlines()
    return os.WIFSIGNALED(status) and watch.shared[INSIDE] == 1


def main(name: str, folder: str, seed: str, kills: str) -> int:
    draw, watch, kind = random.Random(f"{name} {seed}"), Watch(), PROGRAMS[name]
    watched(watch)
    items = pool(seed, kind.kib)
    programs = [kind(Path(folder) / "0", watch, items)]
    tried = landed = 0
    while landed < int(kills):
        if programs[-1].exhausted():
            programs.append(kind(Path(folder) / str(len(programs)), watch, items))
        tried += 1
        if tried > 5 * int(kills) + 20:
            raise SystemExit(f"{name}: of {tried} kills only {landed} landed in a write")
        landed += kill_once(programs[-1], draw)
        programs[-1].check()
    acknowledged = sum(len(program.acknowledged) for program in programs)
    print(json.dumps({"program": name, "kills": tried, "landed": landed, "acknowledged": acknowledged}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
