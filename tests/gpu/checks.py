"""The forward's conformance checks. Each takes a device under test, a variant's key and a scale, and asserts.

They run on the GPU against `runtime.flash_attn` (test_fwd.py), and on the CPU in small against a stand-in and its
planted faults (tests/benchmarks/test_gpu_checks.py), so that it is known that they can fail.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from registry.contract import CubineryError, Variant
from tests.gpu.covering import covering
from tests.gpu.dut import Dut
from tests.gpu.inputs import DTYPES, FAMILIES, Shape, padded, place, untouched, values
from tests.gpu.yardstick import Window, expected, problems

OPEN: Window = (None, None)
CAUSAL: Window = (None, 0)
MIN_ROWS = 256  # of a softmax: with few, one row whose P rounds badly exceeds twice the model's RMS by chance


@dataclass(frozen=True)
class Scale:
    """How large the problems are. groups: name -> (heads_q, heads_kv); beyond: elements that an offset must pass."""

    seqlens: tuple[int, ...] = (1, 17, 64, 113, 128, 1024, 4097)
    groups: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"mha": (3, 3), "4:1": (8, 2), "7:1": (14, 2), "mqa": (5, 1)}
    )
    near: tuple[int, int] = (113, 128)
    ragged: tuple[int, int] = (700, 1300)
    grid_batch: int = 1100  # with 64 heads: more blocks than a 16-bit grid dimension holds
    beyond: int = 2**31
    threads: int = 4
    calls: int = 20
    thin: bool = False  # every pair of factor values instead of the product


FULL = Scale()
TINY = Scale(
    seqlens=(1, 17, 40), near=(21, 24), ragged=(37, 53), grid_batch=3, beyond=2**14, threads=2, calls=3, thin=True
)


# ---- the checks, by their names in conformance.json ----


def yardstick(dut: Dut, key: str, scale: Scale) -> None:
    """Lengths × head ratios × masks, input families in turn, against the error yardstick, LSE included."""
    factors: dict[str, tuple[Any, ...]] = {
        "seqlen_q": scale.seqlens,
        "seqlen_k": scale.seqlens,
        "group": tuple(scale.groups),
        "window": (OPEN, CAUSAL),
    }
    if scale.thin:
        cases = covering({**factors, "family": FAMILIES})
    else:
        cases = [dict(zip(factors, combination, strict=True)) for combination in product(*factors.values())]
        # The innermost factors have 4 · 2 values and the families are 3: each meets every mask, ratio and length.
        cases = [{**case, "family": FAMILIES[i % 3]} for i, case in enumerate(cases)]
    report = Report()
    for seed, case in enumerate(cases):
        shape = _shape(key, None, scale.groups[case["group"]], case["seqlen_q"], case["seqlen_k"])
        report.call(dut, shape, case["family"], case["window"], seed)
    report.call(dut, _shape(key, scale.grid_batch, (64, 1), 1, 17), "normal", OPEN, 1)
    report.done()


def lse(dut: Dut, key: str, scale: Scale) -> None:
    """Scales other than the default, and that asking for the LSE changes nothing in the output."""
    report = Report()
    for seed, softmax_scale in enumerate((None, 0.3, 0.02, 1.0)):
        for window in (OPEN, CAUSAL):
            shape = _shape(key, 2, (4, 2), *scale.ragged)
            report.call(dut, shape, FAMILIES[seed % 3], window, seed, softmax_scale=softmax_scale)
    shape = _shape(key, 2, (4, 2), *scale.ragged)
    tensors = values(shape, "normal", dut.device, 7)
    both = dut.attn(**tensors, causal=True, return_lse=True)
    alone = dut.attn(**tensors, causal=True)
    report.expect(isinstance(alone, torch.Tensor) and torch.equal(both[0], alone), "return_lse changes the output")
    report.done()


def strided(dut: Dut, key: str, scale: Scale) -> None:
    """Packed qkv, (batch, heads, seqlen, head_dim) storage, expanded keys, strided outputs: each bit-equal to dense."""
    report = Report()
    shape = _shape(key, 2, (6, 2), *scale.ragged)
    square = _shape(key, 2, (6, 2), scale.ragged[1], scale.ragged[1])
    dense = values(shape, "normal", dut.device, 3)
    layouts = {
        "packed qkv": _packed(square, values(square, "normal", dut.device, 4)),
        "heads before seqlen": {name: _heads_first(x) for name, x in dense.items()},
        "k and v expanded over the batch": {
            "q": dense["q"], **{name: dense[name][:1].expand_as(dense[name]) for name in "kv"}
        },
        "k and v expanded over the heads": {
            "q": dense["q"], **{name: dense[name][:, :, :1].expand_as(dense[name]) for name in "kv"}
        },
    }  # fmt: skip
    for name, tensors in layouts.items():
        for causal in (False, True):
            copies = {name: x.contiguous() for name, x in tensors.items()}
            right, right_lse = dut.attn(**copies, causal=causal, return_lse=True)
            out = _heads_first(torch.full_like(copies["q"], float("nan")))
            got, got_lse = dut.attn(**tensors, causal=causal, return_lse=True, out=out)
            report.expect(got is out, f"{name}: `out` is not returned")
            report.expect(torch.equal(got, right) and torch.equal(got_lse, right_lse), f"{name}: differs from dense")
            wanted = expected(**copies, scale=_default_scale(copies), window=CAUSAL if causal else OPEN)
            report.note(f"{name}, causal {causal}", problems(got, got_lse, wanted))
    report.done()


def windows(dut: Dut, key: str, scale: Scale) -> None:
    """Windows with either side open, narrow and wide, on lengths that put the diagonal everywhere."""
    report = Report()
    short, long = scale.ragged
    lengths = (scale.near, (short, long), (long, short), (1, long), (long, long))
    sides = ((0, 0), (16, 0), (64, 64), (None, 5), (5, None), (200, 3), (0, None), (None, 1000), (1, 300))
    for seed, ((seqlen_q, seqlen_k), window) in enumerate(product(lengths, sides)):
        report.call(dut, _shape(key, None, (4, 2), seqlen_q, seqlen_k), FAMILIES[seed % 3], window, seed)
    tensors = values(_shape(key, 1, (2, 1), short, long), "normal", dut.device, 5)
    one = dut.attn(**tensors, causal=True, window=(33, 9))
    other = dut.attn(**tensors, window=(33, 0))
    report.expect(torch.equal(one, other), "causal=True does not close the right side of a window")
    report.done()


def empty(dut: Dut, key: str, scale: Scale) -> None:
    """No keys, no queries, no batch, and rows that a mask empties: 0 and −inf, nothing else, nowhere else."""
    report = Report()
    for batch, seqlen_q, seqlen_k in ((2, 65, 0), (2, 0, 65), (0, 65, 65), (0, 0, 0)):
        for window in (OPEN, CAUSAL):
            report.call(dut, _shape(key, batch, (4, 2), seqlen_q, seqlen_k), "normal", window, 1)
    for window in (CAUSAL, (3, 0), (0, 2)):
        report.call(dut, _shape(key, 2, (4, 2), scale.ragged[1], 5), "far_below", window, 2)
    report.done()


def beyond_2g(dut: Dut, key: str, scale: Scale) -> None:
    """Offsets beyond 2³¹ elements along the batch, and along the sequence: addresses need 64 bits."""
    report = Report()
    rows = 64
    along_batch = (scale.beyond + 64, 0)
    along_seqlen = (0, scale.beyond // 32)
    with _huge(dut, key, 2 * scale.beyond + scale.beyond // 8) as (inputs_buffer, output_buffer):
        for name, (step_b, step_s) in {"batch": along_batch, "seqlen": along_seqlen}.items():
            batch = 2 if step_b else 1
            shape = _shape(key, batch, (2, 1), rows, rows)
            tensors = values(shape, "normal", dut.device, 6)
            # q, k and v share the rows of one buffer: heads 0-1, 2 and 3 of each.
            dim, step_s = shape.head_dim, step_s or 4 * shape.head_dim
            stride = (step_b, step_s, dim, 1)
            views = {
                part: inputs_buffer.as_strided(tensors[part].shape, stride, offset * dim)
                for part, offset in (("q", 0), ("k", 2), ("v", 3))
            }
            for part, view in views.items():
                view.copy_(tensors[part])
            out = output_buffer.as_strided(tensors["q"].shape, stride, 0)
            out.fill_(float("nan"))
            _, statistics = dut.attn(**views, causal=True, return_lse=True, out=out)
            wanted = expected(**tensors, scale=_default_scale(tensors), window=CAUSAL)
            report.note(f"offsets beyond 2^31 along the {name}", problems(out.clone(), statistics, wanted))
    report.done()


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same call gives the same bits, with other work in between."""
    report = Report()
    for causal in (False, True):
        tensors = values(_shape(key, 2, (8, 2), *scale.ragged), "normal", dut.device, 8)
        first = dut.attn(**tensors, causal=causal, return_lse=True)
        for _ in range(4):
            dut.attn(**{name: x.flip(1) for name, x in tensors.items()}, causal=causal)
            again = dut.attn(**tensors, causal=causal, return_lse=True)
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            report.expect(same, f"causal {causal}: two calls differ")
    report.done()


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A cold call during capture is refused; a warm one is captured, and its replays see new contents."""
    report = Report()
    shape = _shape(key, 2, (4, 2), *scale.ragged)
    static = values(shape, "normal", dut.device, 9)
    dut.force(key)  # forgets what was loaded
    reason = "nothing was raised"
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            dut.attn(**static, causal=True)
    except CubineryError as error:
        reason = error.reason
    report.expect(reason == "capture", f"a cold call during capture: reason {reason!r} instead of 'capture'")
    dut.attn(**static, causal=True, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, statistics = dut.attn(**static, causal=True, return_lse=True)
    for seed in (10, 11):
        fresh = values(shape, "normal", dut.device, seed)
        for name, tensor in static.items():
            tensor.copy_(fresh[name])
        out.fill_(float("nan"))
        statistics.fill_(float("nan"))
        graph.replay()
        eager = dut.attn(**fresh, causal=True, return_lse=True)
        report.expect(torch.equal(out, eager[0]) and torch.equal(statistics, eager[1]), "a replay differs from a call")
        wanted = expected(**fresh, scale=_default_scale(fresh), window=CAUSAL)
        report.note(f"replay {seed}", problems(out, statistics, wanted))
    report.done()


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many calls in flight, two shapes a thread: each result is that of a lone call."""
    report = Report()
    work = []
    for i in range(scale.threads):
        shapes = [_shape(key, 1, (4, 2), scale.ragged[0] - i, scale.ragged[1] - 9 * i - j) for j in range(2)]
        inputs = [values(shape, "normal", dut.device, 20 + i) for shape in shapes]
        work.append((inputs, [dut.attn(**tensors, causal=True) for tensors in inputs]))
    if dut.device == "cuda":
        torch.cuda.synchronize()
    faults: list[str] = []
    threads = [threading.Thread(target=_hammer, args=(dut, *job, scale.calls, faults)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.note("threads", faults)
    report.done()


CHECKS: dict[str, Callable[[Dut, str, Scale], None]] = {
    check.__name__: check
    for check in (yardstick, lse, strided, windows, empty, beyond_2g, determinism, graph_capture, streams)
}


# ---- what they are made of ----


class Report:
    """Gathers what is wrong over many cases, so that one run tells all of it."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def note(self, case: str, wrong: list[str]) -> None:
        self.failures += [f"{case}: {text}" for text in wrong]

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)

    def call(
        self, dut: Dut, shape: Shape, family: str, window: Window, seed: int, softmax_scale: float | None = None
    ) -> None:
        """One call on NaN-surrounded inputs into a NaN-poisoned output, held to the yardstick."""
        tensors = {name: place(x) for name, x in values(shape, family, dut.device, seed).items()}
        out = padded(shape.sizes()["o"], DTYPES[shape.dtype], dut.device)
        causal = window == CAUSAL
        options = {"causal": causal} if causal or window == OPEN else {"window": window}
        _, statistics = dut.attn(**tensors, **options, softmax_scale=softmax_scale, return_lse=True, out=out)
        used = _default_scale(tensors) if softmax_scale is None else softmax_scale
        wrong = problems(out, statistics, expected(**tensors, scale=used, window=window))
        if not untouched(out):
            wrong.append("something beside the output was written")
        self.note(f"{shape} {family} window {window} scale {used:.4g}", wrong)

    def done(self, shown: int = 8) -> None:
        """AssertionError that lists what was found, if anything was."""
        more = f"\n… and {len(self.failures) - shown} more" if len(self.failures) > shown else ""
        assert not self.failures, f"{len(self.failures)} failures:\n" + "\n".join(self.failures[:shown]) + more


def _shape(key: str, batch: int | None, heads: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Shape:
    """batch None: one large enough for the RMS of few queries to mean something."""
    variant = Variant.parse(key)
    if batch is None:
        batch = max(1 if seqlen_q * seqlen_k > 2**21 else 2, -(-MIN_ROWS // (heads[0] * seqlen_q)))
    return Shape(batch, *heads, seqlen_q, seqlen_k, variant.head_dim, variant.dtype)


def _default_scale(tensors: Mapping[str, torch.Tensor]) -> float:
    return tensors["q"].shape[3] ** -0.5


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with storage (batch, heads, seqlen, head_dim)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(shape: Shape, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q, k and v as slices of one (batch, seqlen, heads_q + 2·heads_kv, head_dim) tensor."""
    packed = torch.cat([tensors[name] for name in "qkv"], dim=2)
    sizes = (shape.heads_q, shape.heads_kv, shape.heads_kv)
    return dict(zip("qkv", packed.split(sizes, dim=2), strict=True))


@contextlib.contextmanager
def _huge(dut: Dut, key: str, elements: int) -> Any:
    """Two buffers of that many elements, full of NaN."""
    dtype = DTYPES[Variant.parse(key).dtype]
    yield tuple(torch.full((elements,), float("nan"), dtype=dtype, device=dut.device) for _ in range(2))


def _hammer(dut: Dut, inputs: list[Any], right: list[torch.Tensor], calls: int, faults: list[str]) -> None:
    """Many calls on a stream of this thread's own, alternating between the inputs."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if dut.device == "cuda" else contextlib.nullcontext():
            got = [dut.attn(**inputs[i % len(inputs)], causal=True) for i in range(calls)]
            # On this stream too: elsewhere a result could be read before it is written.
            wrong = sum(not torch.equal(out, right[i % len(right)]) for i, out in enumerate(got))
        if wrong:
            faults.append(f"{wrong} of {calls} results differ from a lone call's")
    except Exception as error:  # a thread's error must reach the report
        faults.append(repr(error))
