"""The forward against SDPA's FlashAttention-2 on the grid: forward.free.json and forward.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.forward [--modes free sm120]

Ours is `runtime.flash_attn` with the dispatch table's own choice. Mode sm120 pads the dynamic shared memory of our
launches until as many blocks share an H200 SM as would share an SM120 SM (by the sm_120 artifact's registers, threads
and shared memory); the peer is never padded. Times are device times between CUDA events, medians, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cases, measure
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError, Candidate, Kernel, read
from benchmarks.derived import private_copy, read_index
from registry.contract import Artifact, CubineryError

MODES = ("free", "sm120")
MAX_DIFFERENCE = 2e-2  # relative, of norms, from the peer's output: both round P and the output to the dtype


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    failures = 0
    for mode in options.modes:
        bench = Forward(measure.registry_path(options.registry), mode)
        rows = []
        for case in cases.grid():
            if not fnmatchcase(case.name, options.cases):
                continue
            try:
                rows.append(bench.row(case, options.dtype, options.repeats))
                print(_line(case, rows[-1]), flush=True)
            except CubineryError as error:  # one case without a kernel must not cost the others
                failures += 1
                print(f"  {case.name:<26} FAILED {error.reason}: {error}", flush=True)
        value = measure.result(mode, rows, occupancy=bench.occupancy)
        path = measure.write(options.out, f"forward.{mode}", value)
        print(f"{path}: geomean {value['geomean']} over {len(rows)} cases, {mode}; blocks per SM {bench.occupancy}")
    return int(failures > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, help="registry file; by default CUBINERY_REGISTRY")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", default="*", help="glob over case names, e.g. 'llama3-8b/S8192/*'")
    parser.add_argument("--dtype", choices=sorted(measure.DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=30)
    return parser


class Forward:
    """The runtime, configured for one mode. occupancy: variant -> blocks per SM, ours as launched."""

    def __init__(self, registry: Path, mode: str):
        import runtime
        from runtime import launch

        self.runtime, self.mode = runtime, mode
        arch = measure.device_arch()
        self.index = read_index(registry, arch)
        self.candidates = {c.key: c for c in read(registry, arch)}
        self.occupancy: dict[str, str] = {}
        launch.SMEM_PADDING = self._padding if mode == "sm120" else None
        self._scratch = tempfile.TemporaryDirectory()
        runtime.configure(registry=private_copy(registry, Path(self._scratch.name) / "registry.db"))

    def _padding(self, artifact: Artifact) -> int:
        return self._candidate(artifact).emulated_smem() - artifact.smem

    def _candidate(self, artifact: Artifact) -> Candidate:
        candidate = self.candidates.get(artifact.variant)
        if candidate is None or candidate.artifact.cubin_sha256 != artifact.cubin_sha256:
            raise BenchmarkError(f"{artifact.variant}: the index and the artifacts table of the registry disagree")
        return candidate

    def artifact(self, case: Case, dtype: str) -> Artifact:
        """What the dispatch rows choose for the case."""
        from runtime.select import select

        facts = {
            "dtype": dtype, "head_dim": case.head_dim, "head_dim_v": case.head_dim, "batch": case.batch,
            "heads_q": case.heads_q, "heads_kv": case.heads_kv, "seqlen_q": case.seqlen, "seqlen_k": case.seqlen,
            "group": case.heads_q // case.heads_kv, "causal": int(case.causal),
        }  # fmt: skip
        return select(self.index, "fwd", facts)

    def row(self, case: Case, dtype: str, repeats: int) -> dict[str, Any]:
        """One case: check ours against the peer, then time both in turn."""
        artifact = self.artifact(case, dtype)
        if artifact.variant not in self.occupancy:
            self.occupancy[artifact.variant] = self._occupancy(artifact)
        inputs = measure.make_inputs(case, dtype)
        with measure.flash_backend():
            ours = [partial(self.runtime.flash_attn, *qkv, causal=case.causal) for qkv in inputs]
            peer = [partial(measure.sdpa, *qkv, case.causal) for qkv in inputs]
            difference = measure.relative_error(ours[0](), peer[0]().transpose(1, 2))
            if not difference <= MAX_DIFFERENCE:
                raise BenchmarkError(f"{case.name}: ours differs from SDPA by {difference:.2e}")
            runs: dict[str, measure.Run] = {"ours": partial(call, ours), "peer": partial(call, peer)}
            times = measure.interleaved(runs, len(inputs), repeats, warmup=3)
        mine, theirs = statistics.median(times["ours"]), statistics.median(times["peer"])
        return {
            "case": case.name,
            "ours": round(mine, 5),
            "peer": round(theirs, 5),
            "ratio": round(theirs / mine, 4),
            "variant": artifact.variant,
            "ptx_sha256": artifact.ptx_sha256,
            "tflops": round(case.tflops(mine), 1),
            "peer_tflops": round(case.tflops(theirs), 1),
        }

    def _occupancy(self, artifact: Artifact) -> str:
        """'launched' or 'launched of wanted' blocks per SM, as the driver computes it for this launch."""
        candidate = self._candidate(artifact)
        if self.mode == "free":
            return str(Kernel(candidate).occupancy)
        blocks, wanted = Kernel(candidate, smem=candidate.emulated_smem()).occupancy, candidate.target_blocks()
        if blocks != wanted:
            print(
                f"  {artifact.variant}: {blocks} blocks per SM instead of {wanted}: not SM120's occupancy", flush=True
            )
        return f"{blocks} of {wanted}"


def call(bound: list[Any], i: int) -> Any:
    """Run input set `i`."""
    return bound[i]()


def _line(case: Case, row: dict[str, Any]) -> str:
    return (
        f"  {case.name:<26} ours {row['ours']:8.4f} ms {row['tflops']:6.1f} TFLOP/s   "
        f"SDPA {row['peer']:8.4f} ms {row['peer_tflops']:6.1f}   {row['ratio']:.3f}x   {row['variant']}"
    )


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
