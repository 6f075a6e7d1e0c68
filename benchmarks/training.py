"""A 2-layer transformer trained for 50 steps on random tokens, by attention: training.free.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.training

The same seeds, tokens and weights with three kinds of attention: ours, SDPA's FlashAttention-2, and SDPA's plain
implementation in fp32, which is the reference; everything else is the same code, in bf16 through autocast over fp32
weights, with AdamW. Tokens are drawn once for each seed and repeat, so that the loss falls.

The measure of agreement is |loss − loss of the reference|, its mean and its maximum over all steps of all seeds. Both
bf16 kernels round, and training amplifies that, so what is asked of ours is at most twice the deviation of
FlashAttention-2 plus 1e-3. `reference_again` is a second run of the reference: what deviates without any change. Memory
is the peak of torch's allocator from the third step on, less what was there before the model; `attention` is that of
one call's forward and backward alone, less its inputs.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import measure, published
from benchmarks.cases import dense
from benchmarks.cubins import BenchmarkError
from benchmarks.ours import Ours

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.transformer import Attention, Sizes

SEEDS = (0, 1, 2, 3)
STEPS, WARMUP = 50, 2
BATCH, BATCHES = 4, 2  # sequences of a step; steps until tokens repeat
LEARNING_RATE = 1e-3
FACTOR, SLACK = 2.0, 1e-3  # of the bar on the deviation
LONG = dense("llama3-8b", 8192, True, 32, 8, 128, 1)  # whose memory alone is stated


class Run(NamedTuple):
    losses: list[float]
    peak: int  # bytes


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("training", __doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args(argv)
    from benchmarks.transformer import Sizes

    ours = Ours(measure.registry_path(options.registry), "free")
    value = compare(attentions(ours), Sizes(), options.seeds, options.steps)
    value["memory"]["attention"] = {"case": LONG.name, **_memory_alone(attentions(ours))}
    for name, found in value["deviation"].items():
        print(f"  {name:<16} |Δ loss| mean {found['mean']:.2e} max {found['max']:.2e}")
    print(f"  loss {value['loss']}   memory {value['memory']}")
    print("\n".join(map(published.line, value["bars"])))
    print(measure.write(options.out, "training.free", value))
    return 0


def attentions(ours: Ours) -> dict[str, Attention]:
    """By name: 'ours', 'flash' and 'reference'."""
    return {"ours": partial(ours.runtime.flash_attn, causal=True), "flash": _flash, "reference": _reference}


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with measure.flash_backend():
        out: Tensor = measure.sdpa(q, k, v, True).transpose(1, 2)
    return out


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.autocast(measure.DEVICE, enabled=False), sdpa_kernel(SDPBackend.MATH):
        out: Tensor = measure.sdpa(q.float(), k.float(), v.float(), True).transpose(1, 2)
    return out.to(q.dtype)


def compare(attentions: dict[str, Attention], sizes: Sizes, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """The result file's content, but for the memory of a call alone."""
    for attention in attentions.values():  # loads kernels and allocates what libraries keep
        train(attention, sizes, seeds[0], WARMUP + 1)
    asked = {**attentions, "reference_again": attentions["reference"]}
    runs = {name: [train(attention, sizes, seed, steps) for seed in seeds] for name, attention in asked.items()}
    right = [loss for run in runs["reference"] for loss in run.losses]
    found = {
        name: deviation([loss for run in runs[name] for loss in run.losses], right)
        for name in asked
        if name != "reference"
    }
    memory = {name: max(run.peak for run in runs[name]) for name in attentions}
    ends = {name: [round(run.losses[at], 4) for at in (0, -1)] for name, (run, *_) in runs.items()}
    value = {
        **measure.environment(),
        "mode": "free",
        "model": {**asdict(sizes), "batch": BATCH, "batches": BATCHES, "learning_rate": LEARNING_RATE},
        "steps": steps,
        "seeds": list(seeds),
        "deviation": found,
        "loss": ends,
        "curves": {name: [round(loss, 5) for loss in run.losses] for name, (run, *_) in runs.items()},
        "memory": memory,
    }
    return {**value, "bars": bars(found, memory, [run for found in runs.values() for run in found])}


def train(attention: Attention, sizes: Sizes, seed: int, steps: int) -> Run:
    """Train from scratch on tokens drawn from the seed. BenchmarkError where the loss is not a number."""
    import torch

    from benchmarks.transformer import Transformer

    before = _allocated()
    torch.manual_seed(seed)
    drawn = torch.randint(sizes.vocabulary, (BATCHES, BATCH, sizes.seqlen + 1)).to(measure.DEVICE)
    model = Transformer(sizes, attention).to(measure.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        if step == WARMUP:
            _forget_peak()
        optimizer.zero_grad()
        with torch.autocast(measure.DEVICE, dtype=torch.bfloat16):
            loss = model(drawn[step % BATCHES])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = [float(loss) for loss in losses]
    if not all(loss < float("inf") for loss in found):
        raise BenchmarkError(f"seed {seed}: the loss is {found}")
    return Run(found, _peak() - before)


def deviation(losses: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """Mean and maximum of |difference|."""
    differences = [abs(loss - expected) for loss, expected in zip(losses, right, strict=True)]
    return {"mean": round(statistics.fmean(differences), 7), "max": round(max(differences), 7)}


def bars(found: dict[str, dict[str, float]], memory: dict[str, int], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One line a bar. Losses that do not fall would agree whatever the attention did."""
    made = [
        published.at_most(
            f"{kind} deviation from fp32 attention",
            found["ours"][kind],
            round(FACTOR * found["flash"][kind] + SLACK, 7),
        )
        for kind in ("mean", "max")
    ]
    made.append(published.at_most("peak memory, bytes,", memory["ours"], memory["flash"]))
    made.append(
        published.at_most("last loss over first", round(max(r.losses[-1] / r.losses[0] for r in runs), 4), 0.95)
    )
    return made


def _memory_alone(attentions: dict[str, Attention]) -> dict[str, int]:
    """Bytes that forward and backward of LONG take beside inputs and the output's gradient, and hold at their peak."""
    import torch

    q, k, v = measure.make_inputs(LONG, "bf16", rotated=1)[0]
    dout = torch.randn_like(q)
    for x in (q, k, v):
        x.requires_grad_()

    def step(attention: Attention) -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), dout)

    return {name: _peak_of(partial(step, attentions[name])) for name in ("ours", "flash")}


def _peak_of(step: Callable[[], object]) -> int:
    step()
    before = _allocated()
    _forget_peak()
    step()
    return _peak() - before


def _allocated() -> int:
    """Bytes of live tensors on the device; 0 on the CPU."""
    import torch

    gc.collect()
    measure.synchronize()
    return torch.cuda.memory_allocated() if measure.DEVICE == "cuda" else 0


def _forget_peak() -> None:
    import torch

    measure.synchronize()
    if measure.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    import torch

    measure.synchronize()
    return torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else 0


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
