"""The runtime as users have it, configured for one mode, and what it chooses for a case.

Mode `free` launches as users do. Mode `sm120` pads the dynamic shared memory of our launches until as many blocks share
an H200 SM as would share an SM120 SM (by the sm_120 artifact's registers, threads and shared memory).
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError, Candidate, Kernel, read
from benchmarks.derived import private_copy, read_index
from registry.contract import Artifact

MODES = ("free", "sm120")


class Ours:
    """occupancy: variant -> blocks per SM, 'launched' or 'launched of wanted', of every artifact asked for so far."""

    def __init__(self, registry: Path, mode: str):
        import runtime
        from runtime.load import kernel

        self.runtime, self.mode = runtime, mode
        arch = measure.device_arch()
        self.index = read_index(registry, arch)
        ops = sorted({row.op for row in self.index.rows})
        self.candidates = {c.key: c for op in ops for c in read(registry, arch, op)}
        self.occupancy: dict[str, str] = {}
        kernel.SMEM_PADDING = self._padding if mode == "sm120" else None
        self._scratch = tempfile.TemporaryDirectory()
        runtime.configure(registry=private_copy(registry, Path(self._scratch.name) / "registry.db"))

    def _padding(self, artifact: Artifact) -> int:
        return self.candidate(artifact).emulated_smem() - artifact.smem

    def candidate(self, artifact: Artifact) -> Candidate:
        """The artifact with its cubin and its sm_120 counterpart."""
        candidate = self.candidates.get(artifact.variant)
        if candidate is None or candidate.artifact.cubin_sha256 != artifact.cubin_sha256:
            raise BenchmarkError(f"{artifact.variant}: the index and the artifacts table of the registry disagree")
        return candidate

    def choice(self, case: Case, dtype: str = "bf16", op: str | None = None) -> Any:
        """What the dispatch rows choose for the case: `runtime.load.select.Choice`, with .artifact and .pack.

        op: by default the case's own.
        """
        from runtime.load.select import select

        chosen = select(self.index, op or case.op, case.facts(dtype))
        if chosen.artifact.variant not in self.occupancy:
            self.occupancy[chosen.artifact.variant] = self._occupancy(chosen.artifact)
        return chosen

    def _occupancy(self, artifact: Artifact) -> str:
        """As the driver computes it for this launch."""
        candidate = self.candidate(artifact)
        if self.mode == "free":
            return str(Kernel(candidate).occupancy)
        blocks, wanted = Kernel(candidate, smem=candidate.emulated_smem()).occupancy, candidate.target_blocks()
        if blocks != wanted:
            print(
                f"  {artifact.variant}: {blocks} blocks per SM instead of {wanted}: not SM120's occupancy", flush=True
            )
        return f"{blocks} of {wanted}"

    def calls(self, case: Case, inputs: list[tuple[Any, Any, Any]], **options: Any) -> list[Any]:
        """A call of the public API for each input set of the case. options: arguments beside those of the case."""
        if case.lengths is None:
            window = None if case.left is None else case.window
            attn = self.runtime.flash_attn
            return [partial(attn, *qkv, causal=case.causal, window=window, **options) for qkv in inputs]
        cu, longest = measure.cu_seqlens(case.lengths), max(case.lengths)
        given: dict[str, Any] = {
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        given |= {"causal": case.causal, **options}
        return [partial(self.runtime.flash_attn_varlen, *qkv, **given) for qkv in inputs]

    def facts(self, case: Case, ms: float, dtype: str = "bf16", op: str = "fwd") -> dict[str, Any]:
        """What a result row states of our side."""
        chosen = self.choice(case, dtype, op)
        return {
            "case": case.name,
            "ours": round(ms, 5),
            "tflops": round(case.tflops(ms, op), 1),
            "variant": chosen.artifact.variant,
            "pack": chosen.pack,
            "ptx_sha256": chosen.artifact.ptx_sha256,
        }
