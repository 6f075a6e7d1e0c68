"""Raw launches of the ops of a decode step, and the sweep over variants and splits that tuning starts from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.cubins import LOG2_E, OPEN, BenchmarkError, Candidate, Kernel, Launch, read
from benchmarks.decode_cases import HEAD_DIM, HEADS_KV, HEADS_Q, Caches, every, kept, kv_bytes
from registry.contract import Abi, fast_divmod

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_ERROR = 1e-2  # relative, of norms, from float64
MODES = ("free", "sm120")


class Step:
    """A decode step of one variant and number of splits: called, it enqueues its launches on torch's current stream."""

    def __init__(self, kernel: Kernel, combine: Kernel, case: Case, caches: Caches, num_splits: int):
        import torch

        k, v = caches.stored(case)
        self.out = torch.empty_like(caches.q)
        o, lse = _outputs(self.out, num_splits)
        self.kept = (caches, k, v, o, lse)  # launches know addresses alone
        group = case.group
        values = _strides(kernel.abi, {"q": caches.q, "k": k, "v": v, "o": o[0] if num_splits > 1 else o})
        values |= {name: x.data_ptr() for name, x in (("q", caches.q), ("k", k), ("v", v), ("o", o), ("lse", lse))}
        values |= {"o_stride_split": o.stride(0), "lse_stride_split": lse.stride(0)} if num_splits > 1 else {}
        values |= {"lse_stride_b": HEADS_Q, "lse_stride_h": 1, "seqused_k": caches.lengths.data_ptr()}
        cache = kept(case)
        page = cache.page_size or case.seqlen_k
        if cache.page_size is not None:
            table = caches.tables[page]
            values |= {"page_table": table.data_ptr(), "page_table_stride": table.stride(0)}
        if cache.kv_dtype == "e4m3":
            values |= {f"{x}_descale": caches.descale[i].data_ptr() for i, x in enumerate("kv")}
        values["page_size"], (values["page_magic"], values["page_shift"]) = page, fast_divmod(page)
        values["pack"], (values["pack_magic"], values["pack_shift"]) = group, fast_divmod(group)
        values |= {"batch": case.batch, "heads_q": HEADS_Q, "heads_kv": HEADS_KV, "seqlen_q": 1}
        values |= {"seqlen_k": case.seqlen_k, "head_dim": HEAD_DIM, "head_dim_v": HEAD_DIM, "num_splits": num_splits}
        values["window_left"], values["window_right"] = OPEN
        values["scale_log2"] = HEAD_DIM**-0.5 * LOG2_E
        blocks = kernel.artifact.grid.blocks(case.facts(), group) * num_splits
        self.launches = [kernel.bind(kernel.abi.pack(values), blocks)]
        if num_splits > 1:
            self.launches.append(_combine(combine, o, lse, self.out, num_splits))

    def __call__(self) -> Any:
        for launch in self.launches:
            launch()
        return self.out


def _outputs(out: Any, num_splits: int) -> tuple[Any, Any]:
    """o and LSE of the forward: the output itself, or (splits, …) fp32 partials."""
    import torch

    batch = out.shape[0]
    if num_splits == 1:
        return out, torch.empty(batch, HEADS_Q, 1, device=out.device)
    partials = torch.empty(num_splits, *out.shape, device=out.device, dtype=torch.float32)
    return partials, torch.empty(num_splits, batch, HEADS_Q, 1, device=out.device)


def _strides(abi: Abi, tensors: dict[str, Any]) -> dict[str, Any]:
    """Every parameter, 0 but for the strides of these (batch, seqlen, heads, dim) tensors."""
    values: dict[str, Any] = {p.name: 0.0 if p.type == "f32" else 0 for p in abi.params}
    for name, tensor in tensors.items():
        for axis, step in zip("bsh", tensor.stride(), strict=False):
            values[f"{name}_stride_{axis}"] = step
    return values


def _combine(kernel: Kernel, o: Any, lse: Any, out: Any, num_splits: int) -> Launch:
    values = _strides(kernel.abi, {"o": out})
    rows = out.shape[0] * HEADS_Q
    values |= {"o_partial": o.data_ptr(), "lse_partial": lse.data_ptr(), "o": out.data_ptr(), "num_splits": num_splits}
    values |= {"o_partial_stride_split": o.stride(0), "lse_partial_stride_split": lse.stride(0)}
    values |= {"lse_partial_stride_b": HEADS_Q, "lse_partial_stride_s": 1, "lse_partial_stride_h": 1}
    values |= {"rows": rows, "seqlen": 1, "heads": HEADS_Q, "head_dim_v": HEAD_DIM}
    return kernel.bind(kernel.abi.pack(values), kernel.artifact.grid.blocks({"rows": rows}))


def kernel_of(candidate: Candidate, mode: str) -> Kernel:
    """The candidate as it runs freely, or with SM120's occupancy and L1 emulated."""
    return Kernel(candidate) if mode == "free" else Kernel(candidate, smem=candidate.emulated_smem(), carveout=100)


def candidates(registry: Path, glob: str) -> list[Candidate]:
    """The variants of fwd_paged in a registry file that can serve the cases. BenchmarkError if there are none."""
    found = [c for c in read(registry, measure.device_arch(), "fwd_paged", glob) if _serves(c)]
    if not found:
        raise BenchmarkError(f"{registry}: no bf16 variant of fwd_paged for head_dim {HEAD_DIM} matches {glob!r}")
    return found


def _serves(candidate: Candidate) -> bool:
    variant = candidate.variant
    return (variant.dtype, variant.head_dim, variant.head_dim_v) == ("bf16", HEAD_DIM, HEAD_DIM)


def kv_of(candidate: Candidate) -> str:
    return "e4m3" if "e4m3kv" in candidate.variant.features else "bf16"


def sweep(
    registry: Path, glob: str, cases: str, splits: Sequence[int], modes: Iterable[str], repeats: int, bandwidth: float
) -> list[dict[str, Any]]:
    """A row for each variant × case × mode × number of splits, printed as they come.

    cases: glob over their names. bandwidth: bytes a second that the device reads.
    """
    found, rows = candidates(registry, glob), []
    combines = read(registry, measure.device_arch(), "fwd_combine", "fwd_combine-bf16-*")
    if not combines:
        raise BenchmarkError(f"{registry}: no fwd_combine-bf16-*, which more than one split needs")
    chosen = [case for case in every() if fnmatchcase(case.name, cases)]
    for size in dict.fromkeys((case.batch, case.seqlen_k) for case in chosen):
        caches = Caches(*size)
        for case in chosen:
            if (case.batch, case.seqlen_k) != size:
                continue
            for mode in modes:
                combine = kernel_of(combines[0], mode)
                for candidate in found:
                    if kv_of(candidate) == kept(case).kv_dtype:
                        kernel = kernel_of(candidate, mode)
                        made = _variant(candidate.key, kernel, combine, case, caches, splits, repeats, bandwidth)
                        rows += [{"mode": mode, **row} for row in made]
                        print(table_line(case, mode, kernel, candidate.key, made), flush=True)
    return rows


def _variant(
    key: str, kernel: Kernel, combine: Kernel, case: Case, caches: Caches, splits: Sequence[int], repeats: int,
    bandwidth: float,
) -> list[dict[str, Any]]:  # fmt: skip
    steps = {n: Step(kernel, combine, case, caches, n) for n in splits}
    errors = {n: caches.error(case, step()) for n, step in steps.items()}
    runs: dict[str, measure.Run] = {str(n): partial(measure.call, [step]) for n, step in steps.items()}
    times = measure.interleaved(runs, 1, repeats)
    rows = []
    for n in splits:
        ms = statistics.median(times[str(n)])
        row = {"case": case.name, "variant": key, "num_splits": n, "blocks_per_sm": kernel.occupancy}
        row |= {
            "ms": round(ms, 5),
            "share": round(kv_bytes(case) / ms * 1e3 / bandwidth, 4),
            "error": float(f"{errors[n]:.2e}"),
        }
        rows.append(row | {"right": errors[n] <= MAX_ERROR})
    return rows


def table_line(case: Case, mode: str, kernel: Kernel, key: str, rows: Sequence[dict[str, Any]]) -> str:
    """The shares of the bandwidth, in percent, by number of splits; the best one marked, wrong results named."""
    best = max((row["share"] for row in rows if row["right"]), default=None)
    cells = []
    for row in rows:
        shown = f"{100 * row['share']:.1f}" + "*" * (row["share"] == best) if row["right"] else "WRONG"
        cells.append(f"{row['num_splits']}:{shown}")
    tile = key.removeprefix("fwd_paged-bf16-")
    return f"{case.name:<26} {mode:<5} {kernel.occupancy:>2} blocks/SM  {tile:<40} " + " ".join(cells)
