"""A process of its own for the tests of registry.store. Usage: worker.py COMMAND REGISTRY [ARGUMENT …]"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from registry.store import Store, StoreError
from tests.registry.samples import KEYS, artifact, index, ptx


def together(path: str, name: str, count: str) -> None:
    """Wait for the file REGISTRY.go, then open the registry and store `count` artifacts under the name's own keys."""
    print("ready", flush=True)
    while not os.path.exists(f"{path}.go"):
        time.sleep(0.001)
    with Store(path) as store:
        for i in range(int(count)):
            store.put_ptx(f"{name}:{i}", KEYS[0], ptx(f"{name} {i}"), {"i": i})
            store.put_ptx("shared", KEYS[0], ptx("shared"), {})
            a, frame = artifact(KEYS[i % len(KEYS)], content=f"{name} {i}".encode() * 50)
            store.put_artifact(f"{name}:{i}", a, frame)


def write(path: str) -> None:
    """Until killed: store one more artifact, point 'stable' at an index of it, and say so."""
    with Store(path) as store:
        for i in range(1_000_000):
            a, frame = artifact(KEYS[0], content=f"cubin {i}".encode() * 1000, ptx_sha256=_ptx(store, i))
            store.put_artifact(f"cubin:{i}", a, frame)
            print(store.put_index(index([a]), "stable"), flush=True)


def _ptx(store: Store, i: int) -> str:
    return store.put_ptx(f"ptx:{i}", KEYS[0], ptx(str(i)), {})


def unprivileged(path: str, readonly: str) -> None:
    """Open as a user without rights (root drops them) and print the reason of the refusal."""
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        with Store(Path(path), readonly=readonly == "readonly"):
            print("opened")
    except StoreError as error:
        print(error.reason)


if __name__ == "__main__":
    {f.__name__: f for f in (together, write, unprivileged)}[sys.argv[1]](*sys.argv[2:])
