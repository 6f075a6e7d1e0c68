"""Cold start: `import runtime`, the first call and the first backward, in fresh processes: cold_start.free.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.cold_start

torch is imported and the CUDA context exists before the clock starts; the call is 2 x 1024 x 32/8 x 128 bf16, causal,
and the clock stops when its result is there. `embedded` reads a registry file; `disk_cache` names a server that does
not exist, an index digest, and a disk cache that holds everything. One process of each kind runs unmeasured first, so
that files are in the page cache and Python's bytecode is written. SDPA's FlashAttention-2 is the peer.

The yardstick is `bindings`: the bare import of cuda.bindings.driver in processes of its own, which are the others' but
for that. `embedded_25000` and `disk_cache_25000` have an index of that many artifacts (benchmarks/large_index.py).

The first backward follows in the same processes, after two plain calls. `autograd` is what torch itself takes for the
first backward of a process, of a product with a number; `grad_forward` is our first forward that keeps a graph; then
`backward` is the first of attention, until all three gradients are there: so what it costs beyond autograd's start is
measured and not a difference of longer times. In `whole`, processes of their own, it is the process' first backward.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure, published
from benchmarks.cases import dense
from benchmarks.cubins import BenchmarkError
from benchmarks.derived import private_copy, read_index
from benchmarks.large_index import enlarge
from registry.contract import Artifact
from runtime.load.select import select

CASE = dense("llama3-8b", 1024, True, 32, 8, 128, 2)
LARGE = 25_000  # artifacts
SMALL_BEYOND, LARGE_BEYOND = 8.0, 10.0  # ms of import and first call beyond the bindings' import
USUAL, SLOW = 12.5, 15.0  # ms of the bindings' import: where these bars were set, and from where on they grow with it
MAX_BEYOND = 10.0  # ms of the first backward beyond autograd's start
BACKWARD = ("autograd", "grad_forward", "backward", "second_backward")
NO_SERVER = "http://127.0.0.1:9"  # the discard port: whoever asked it would fail at once
Answers = list[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, help="registry file; by default CUBINERY_REGISTRY")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--processes", type=int, default=7, help="measured processes of each kind")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        value = run(measure.registry_path(options.registry), Path(scratch), options.processes)
    for row in value["rows"]:
        print(
            f"  {row['case']:<36} import {row['import']:7.2f} + first call {row['first']:7.2f} = {row['ours']:7.2f} ms"
            f"   bindings {row['bindings']:7.2f} ms   SDPA {row['peer']:7.2f} ms   second call {row['second']:.3f} ms"
        )
        print(
            f"    autograd's start {row['autograd']:7.2f} ms, then the first backward {row['backward']:7.2f} ms   "
            f"SDPA {value['backward']['peer']:7.2f} ms   second backward {row['second_backward']:.3f} ms"
        )
        for stage in [*row["stages"], *row["backward_stages"]]:
            print(f"      {stage['stage']:<16} {stage['ms']:8.3f} ms  {stage['what']}")
    print("\n".join(map(published.line, value["bars"])))
    print(measure.write(options.out, "cold_start.free", value))
    return 0


def run(registry: Path, scratch: Path, processes: int) -> dict[str, Any]:
    """The result file's content. scratch: a private folder."""
    arch = measure.device_arch()
    ours = sources(registry, arch, scratch)
    kinds = {
        **{name: ("ours", source.env) for name, source in ours.items()},
        "sdpa": ("sdpa", {}),
        "whole": ("whole", ours["disk_cache"].env),
        "bindings": ("bindings", {}),
    }
    seen: dict[str, Answers] = {name: [] for name in kinds}
    for i in range(processes + 1):
        for name, (which, env) in kinds.items():  # in turn: a slow minute of the machine hits all of them
            answer = child(which, env)
            if i:
                seen[name].append(answer)
    rows = [_row(name, source, seen) for name, source in ours.items()]
    backward = {
        "peer": _medians(seen["sdpa"])["backward"], "peer_autograd": _medians(seen["sdpa"])["autograd"],
        "peer_all": _all(seen["sdpa"], "backward"),
        "whole": _medians(seen["whole"])["backward"], "whole_all": _all(seen["whole"], "backward"),
    }  # fmt: skip
    more = {
        "peer_all": _all(seen["sdpa"], "total"), "bindings_all": _all(seen["bindings"], "import"),
        "bindings_version": metadata.version("cuda-bindings"),
    }  # fmt: skip
    return measure.result("free", rows, **more, backward=backward, bars=bars(rows))


class Source(NamedTuple):
    """Where processes have kernels from. env: what says so; chosen: what serves the case; artifacts: of the index."""

    env: dict[str, str]
    chosen: Artifact
    artifacts: int


def sources(registry: Path, arch: str, scratch: Path) -> dict[str, Source]:
    """Registry file and disk cache, with the index as it is and with a large one."""
    found = {}
    for suffix, count in (("", None), (f"_{LARGE}", LARGE)):
        local = private_copy(registry, scratch / f"registry{suffix}.db")
        index = enlarge(local, arch, count) if count else read_index(local, arch)
        chosen, cache = select(index, "fwd", CASE.facts()).artifact, scratch / f"cache{suffix}"
        remote = {"CUBINERY_REGISTRY": NO_SERVER, "CUBINERY_INDEX": f"{arch}={fill_cache(local, arch, cache)}"}
        embedded = {"CUBINERY_REGISTRY": str(local), "CUBINERY_INDEX": ""}
        found[f"embedded{suffix}"] = Source(embedded, chosen, len(index.artifacts))
        found[f"disk_cache{suffix}"] = Source(remote | {"CUBINERY_CACHE": str(cache)}, chosen, len(index.artifacts))
    return found


def _row(name: str, source: Source, seen: dict[str, Answers]) -> dict[str, Any]:
    mine, peer = _medians(seen[name]), _medians(seen["sdpa"])
    return {
        "case": f"{CASE.name}/{name}",
        "ours": mine["total"],
        "peer": peer["total"],
        "ratio": round(peer["total"] / mine["total"], 4),
        "bindings": _medians(seen["bindings"])["import"],
        "artifacts": source.artifacts,
        "variant": source.chosen.variant,
        "ptx_sha256": source.chosen.ptx_sha256,
        **{part: mine[part] for part in ("import", "first", "second")},
        "all": _all(seen[name], "total"),
        "stages": seen[name][0]["stages"],
        **{part: mine[part] for part in BACKWARD},
        "backward_all": _all(seen[name], "backward"),
        "backward_stages": seen[name][0]["backward_stages"],
    }


def bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each row the import and first call, and of the index as it is the first backward."""
    found = []
    for row in rows:
        is_large, beyond = row["case"].endswith(f"_{LARGE}"), round(row["ours"] - row["bindings"], 3)
        most = allowed(LARGE_BEYOND if is_large else SMALL_BEYOND, row["bindings"])
        found.append(published.at_most(f"{row['case']}: import and first call beyond bindings, ms,", beyond, most))
        if not is_large:
            what = f"{row['case']}: first backward beyond autograd's start, ms,"
            found.append(published.at_most(what, row["backward"], MAX_BEYOND))
    return found


def allowed(ms: float, bindings: float) -> float:
    """A bar beyond the bindings' import: on a host where that alone is slow, it grows in proportion."""
    return ms if bindings <= SLOW else round(ms * bindings / USUAL, 3)


def child(which: str, env: dict[str, str]) -> dict[str, Any]:
    """One fresh process' answer. BenchmarkError with the end of its output if it fails."""
    script = Path(__file__).with_name("cold_child.py")
    command = [sys.executable, str(script), which, measure.DEVICE]
    # An installed package has its bytecode: pip compiles it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    given = {**kept, "PYTHONPATH": os.pathsep.join([str(measure.ROOT), os.environ.get("PYTHONPATH", "")]), **env}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise BenchmarkError(f"{which} in a fresh process: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fill_cache(registry: Path, arch: str, folder: Path) -> str:
    """Put the index of `arch` and all its frames into a disk cache; returns the index' digest."""
    from runtime.sources.cache import DiskCache

    index, cache = read_index(registry, arch), DiskCache(str(folder))
    for digest, document in index.documents.items():
        cache.put("indexes", digest, document)
    database = sqlite3.connect(f"file:{registry.resolve()}?mode=ro", uri=True)
    try:
        for sha256 in {artifact.frame_sha256 for artifact in index.artifacts}:
            query = "SELECT frame FROM blobs WHERE sha256 = ?"
            cache.put("blobs", sha256, database.execute(query, (sha256,)).fetchone()[0])
    finally:
        database.close()
    return index.digest


def _all(answers: Answers, part: str) -> list[float]:
    return [answer["ms"][part] for answer in answers]


def _medians(answers: Answers) -> dict[str, float]:
    return {part: round(statistics.median(a["ms"][part] for a in answers), 3) for part in answers[0]["ms"]}


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
