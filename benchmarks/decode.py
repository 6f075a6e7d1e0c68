"""Decode over KV caches at the speed of memory: decode.free.json and decode.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.decode [--modes free sm120]
    python -m benchmarks.decode --sweep --registry FILE [--op-variants GLOB] [--cases GLOB] [--splits 1 4 16]

One query token, 32 query heads on 8 key/value heads of 128: `runtime.flash_attn_with_kvcache` over a contiguous cache
and over pages of 16 and 64 in random order, bf16 and e4m3, in turn with SDPA's FlashAttention-2 and cuDNN on the same
contiguous bf16 cache. share: bytes of keys and values over time, as a share of what the device reads, which
torch.amax over 4 GiB shows. Mode sm120 pads our launches as in the other benchmarks. --sweep launches variants raw with
several numbers of splits, prints a table and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import decode_raw, measure, published
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError, Kernel
from benchmarks.decode_cases import ALONE, SIZES, Caches, decode, every, kept, kv_bytes
from benchmarks.ours import MODES, Ours
from registry.contract import CubineryError, Variant

READ_BYTES = 4 << 30
MAX_ERROR = 1e-2  # relative, of norms, from float64 over what the cache holds
MIN_SHARE, MIN_SHARE_ALONE, MIN_E4M3, MAX_PAGED, MIN_SDPA = 0.85, 0.75, 1.7, 1.10, 1.4
FLASHINFER = "not measured: it is not installed on the GPU machine, which reaches no package index"
PEERS = {"fa2": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("decode", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", default="*", help="glob over case names, e.g. '32x8192/page16/*'")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="raw variants by numbers of splits instead")
    parser.add_argument("--op-variants", default="*", metavar="GLOB", help="keys of fwd_paged variants to sweep")
    parser.add_argument("--splits", nargs="+", type=int, default=list(decode_raw.SPLITS), help="numbers to sweep")
    options = parser.parse_args(argv)
    registry = measure.registry_path(options.registry)
    if options.sweep:
        asked = options.op_variants, options.cases, options.splits, options.modes, options.repeats
        rows = decode_raw.sweep(registry, *asked, bandwidth=read_bandwidth())
        return int(not all(row["right"] for row in rows))
    return int(sum([_mode(mode, options) for mode in options.modes]) > 0)


def _mode(mode: str, options: argparse.Namespace) -> int:
    """Measure and write one mode's file; how many sizes failed."""
    ours = Ours(measure.registry_path(options.registry), mode)
    bandwidth, failures = read_bandwidth(), 0
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for size in (*SIZES, ALONE):
        cases = [case for case in every((size,)) if fnmatchcase(case.name, options.cases)]
        if not cases:
            continue
        try:
            found, reasons = one_size(ours, cases, options.repeats, bandwidth)
        except CubineryError as error:  # one size must not cost the others
            failures += 1
            print(f"  {size[0]}x{size[1]}: FAILED {error.reason}: {error}", flush=True)
            continue
        print("\n".join(map(line, found)), flush=True)
        rows += found
        refused |= reasons
    value = result(mode, rows, bandwidth)
    value |= {"refused": refused, "flashinfer": FLASHINFER, "occupancy": ours.occupancy}
    print("\n".join(map(published.line, value["bars"])))
    print(f"{measure.write(options.out, f'decode.{mode}', value)}: geomean {value['geomean']}, {mode}")
    return failures


def read_bandwidth() -> float:
    """Bytes a second that the device reads: torch.amax over 4 GiB, the better of fp32 and bf16."""
    import torch

    count = READ_BYTES if measure.DEVICE == "cuda" else 1 << 16
    data = torch.rand(count // 4, device=measure.DEVICE)
    runs: dict[str, measure.Run] = {
        "fp32": lambda i: torch.amax(data),
        "bf16": lambda i: torch.amax(data.view(torch.bfloat16)),
    }
    times = measure.interleaved(runs, 1, 10)
    return count / min(statistics.median(ms) for ms in times.values()) * 1e3


# ---- one size ----


def one_size(
    ours: Ours, cases: Sequence[Case], repeats: int, bandwidth: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a row for each case, why a peer could not run), all timed in turn. BenchmarkError for a wrong output."""
    batch, context = cases[0].batch, cases[0].seqlen_k
    caches = Caches(batch, context)
    steps = {case: _call(ours, case, caches) for case in cases}
    errors = {case: _checked(case, step, caches) for case, step in steps.items()}
    runs: dict[str, measure.Run] = {case.name: partial(measure.call, [step]) for case, step in steps.items()}
    refused = {}
    for name, backend in PEERS.items():
        peer = partial(_sdpa, backend, caches)
        try:
            if not (error := caches.error(decode(batch, context), peer())) <= MAX_ERROR:
                raise RuntimeError(f"its result is wrong by {error:.1e}")
            runs[name] = partial(measure.call, [peer])
        except RuntimeError as error:  # this torch or device may lack it
            refused[name] = str(error).splitlines()[0][:200]
    ms = {name: statistics.median(found) for name, found in measure.interleaved(runs, 1, repeats).items()}
    return [_row(ours, case, ms, bandwidth, errors[case]) for case in cases], refused


def _call(ours: Ours, case: Case, caches: Caches) -> Callable[[], Any]:
    """A call of the public API. Its occupancy is asked for before anything is timed."""
    ours.choice(case)
    return partial(ours.runtime.flash_attn_with_kvcache, caches.q, *caches.stored(case), **caches.options(case))


def _checked(case: Case, step: Callable[[], Any], caches: Caches) -> dict[str, float]:
    """Relative errors of an output from float64: over what the cache holds and, for e4m3, what that was made from."""
    out = step()
    error = caches.error(case, out)
    if not error <= MAX_ERROR:
        raise BenchmarkError(f"{case.name}: ours differs from float64 by {error:.2e}")
    found = {"error": float(f"{error:.2e}")}
    if kept(case).kv_dtype == "e4m3":
        found["error_from_bf16_cache"] = float(f"{caches.error(case, out, quantised=False):.2e}")
    return found


def _sdpa(backend: str, caches: Caches) -> Any:
    """The same step by SDPA over the contiguous bf16 cache; on the CPU, for self-tests, by its plain backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend if measure.DEVICE == "cuda" else "MATH")):
        k, v = caches.kv["bf16"]
        return measure.sdpa(caches.q, k, v, False).transpose(1, 2)


def _row(ours: Ours, case: Case, ms: Mapping[str, float], bandwidth: float, errors: dict[str, float]) -> dict[str, Any]:
    chosen, mine, (page, kv) = ours.choice(case), ms[case.name], (kept(case).page_size, kept(case).kv_dtype)
    row = {
        "case": case.name,
        "ours": round(mine, 5),
        "peer": round(ms["fa2"], 5) if "fa2" in ms else None,
        "ratio": round(ms["fa2"] / mine, 4) if "fa2" in ms else None,
        "variant": chosen.artifact.variant,
        "pack": chosen.pack,
        "ptx_sha256": chosen.artifact.ptx_sha256,
        "num_splits": splits_of(ours, case),
        "gb_s": round(kv_bytes(case) / mine / 1e6, 1),
        "share": round(kv_bytes(case) / mine * 1e3 / bandwidth, 4),
        "cudnn": round(ms["cudnn"], 5) if "cudnn" in ms else None,
        "ratio_cudnn": round(ms["cudnn"] / mine, 4) if "cudnn" in ms else None,
        "tokens_s": round(case.batch / mine * 1e3),
    }
    contiguous, bf16 = (ms.get(decode(case.batch, case.seqlen_k, *how).name) for how in ((None, kv), (page, "bf16")))
    if page and contiguous:
        row["over_contiguous"] = round(mine / contiguous, 4)
    if kv == "e4m3" and bf16:
        row["over_bf16"] = round(bf16 / mine, 4)
    return row | errors


def splits_of(ours: Ours, case: Case) -> int:
    """What the runtime's heuristic takes for the case."""
    from runtime.call import splits

    chosen = ours.choice(case)
    candidate = ours.candidate(chosen.artifact)
    kernel = Kernel(candidate, smem=None if ours.mode == "free" else candidate.emulated_smem())
    facts, grid = case.facts(), chosen.artifact.grid
    variant = Variant.parse(chosen.artifact.variant)
    key_blocks = -(-case.seqlen_k // variant.size("n"))
    blocks = grid.blocks(facts, case.group if chosen.pack else 1)
    resident = measure.multiprocessors(), kernel.occupancy
    return splits.num_splits(blocks, key_blocks, *resident, heavy=splits.is_heavy(variant))


# ---- all of them ----


def result(mode: str, rows: Sequence[dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """The file's content. geomean: of SDPA's FlashAttention-2 over ours, bf16 pages, batch 1 apart."""
    judged = [row for row in rows if _is(row, kv="bf16", alone=False, paged=True)]
    value = measure.result(mode, [row for row in judged if row["ratio"] is not None])
    value |= {"rows": list(rows), "read_gb_s": round(bandwidth / 1e9, 1)}
    value["bars"] = verdicts(rows, value["geomean"])
    return value


def _is(row: Mapping[str, Any], kv: str | None = None, alone: bool | None = None, paged: bool | None = None) -> bool:
    size, layout, stored = row["case"].split("/")
    is_alone = size == "{}x{}".format(*ALONE)
    return kv in (None, stored) and alone in (None, is_alone) and paged in (None, layout != "contiguous")


def verdicts(rows: Sequence[Mapping[str, Any]], geomean: float | None) -> list[dict[str, Any]]:
    """The bars of issue 4, each by its worst case; a run over a part of the cases is judged by what it has."""
    many = [row["share"] for row in rows if _is(row, "bf16", alone=False, paged=True)]
    alone = [row["share"] for row in rows if _is(row, "bf16", alone=True, paged=True)]
    low = [row["over_bf16"] for row in rows if "over_bf16" in row and _is(row, paged=True)]
    paged = [row["over_contiguous"] for row in rows if "over_contiguous" in row and _is(row, "bf16")]
    found = [published.bar("share of the read bandwidth", min(many), MIN_SHARE)] if many else []
    found += [published.bar("share, batch 1", min(alone), MIN_SHARE_ALONE)] if alone else []
    found += [published.bar("tokens/s of an e4m3 cache over bf16", min(low), MIN_E4M3)] if low else []
    found += [published.at_most("paged over contiguous", max(paged), MAX_PAGED)] if paged else []
    found += [published.bar("geomean over SDPA's FlashAttention-2", geomean, MIN_SDPA)] if geomean else []
    return found


def line(row: Mapping[str, Any]) -> str:
    named = (("FA2", row["ratio"]), ("cuDNN", row["ratio_cudnn"]))
    peers = "".join(f"   {name} {ratio:.2f}x" for name, ratio in named if ratio is not None)
    more = "".join(f"   {key} {row[key]:.3f}" for key in ("over_contiguous", "over_bf16") if key in row)
    return (
        f"  {row['case']:<28} {row['ours']:8.4f} ms {row['gb_s']:7.1f} GB/s {100 * row['share']:5.1f} %  "
        f"{row['num_splits']:>2} splits{peers}{more}   {row['variant'].removeprefix('fwd_paged-')}"
    )


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
