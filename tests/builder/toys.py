"""Toy variants in hand-written PTX, and a generator that plants one fault per feature name.

A worker process imports this module as 'tests.builder.toys' and calls `generate`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from builder.build import Table
from registry.contract import Abi, Condition, DispatchRow, Grid, Param, Variant

ABI = Abi("toy", 1, (Param("out", "ptr"), Param("n", "i32"), Param("scale", "f32"), Param("stride", "i64")))
PARAMS = (".u64 .ptr .global .align 16", ".u32", ".f32", ".u64")
GENERATOR = "tests.builder.toys:generate"
CALLS = "TOY_CALLS"  # environment variable: a file that gets one line for every call of `generate`


@dataclass(frozen=True)
class Toy:
    """What `kernels.generate.Generated` has, without importing `kernels`."""

    ptx: str
    symbol: str
    threads: int
    smem: int
    grid: Grid


def variant(*features: str, n: int = 64) -> Variant:
    return Variant("toy", "bf16", 64, 64, (("m", 64), ("n", n)), tuple(sorted(features)))


def table(*variants: Variant, folder: Path) -> Table:
    """A dispatch table of these variants, whose sources lie in `folder` (see `write_sources`)."""
    rows = tuple(DispatchRow("toy", (Condition("head_dim", "==", v.size("n")),), v.key) for v in variants)
    return Table(tuple(sorted(variants)), rows, {"toy": ABI}, {"toy": ("kernels.toy",)}, GENERATOR, folder)


def write_sources(folder: Path, text: str = "from kernels import helper\n") -> Path:
    """A little `kernels` package: what the toys' fingerprints cover."""
    package = folder / "kernels"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(text)
    (package / "helper.py").write_text("VALUE = 1\n")
    (package / "unrelated.py").write_text("VALUE = 2\n")
    return folder


def generate(variant: Variant, dump_dir: str) -> Toy:
    """The toy of a variant, with the fault that its feature names."""
    if calls := os.environ.get(CALLS):
        with open(calls, "a") as file:
            file.write(f"{variant.key} {os.environ['CUTE_DSL_ARCH']} {sorted(os.listdir(dump_dir))}\n")
    features = set(variant.features)
    print("a worker's own output must not disturb anything")
    if "raises" in features:
        raise ValueError("planted: no such tile")
    if "dies" in features:
        print("planted: last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if "exits" in features:
        os._exit(3)
    if "hangs_up" in features:
        os.closerange(3, 100)
        time.sleep(600)
    if "hangs" in features:
        time.sleep(600)
    symbol = "toy_" + variant.key.replace("-", "_")
    stated = "other" if "wrong_symbol" in features else symbol
    threads = 256 if "wrong_threads" in features else 128
    smem = 204_800 if "big_smem" in features else 65_536 if "big_total" in features else 1024
    return Toy(ptx(symbol, features, variant.size("n")), stated, threads, smem, Grid("tiles_heads_batch", 64))


def ptx(symbol: str, features: set[str] | frozenset[str] = frozenset(), n: int = 64) -> str:
    """PTX of one small kernel: out[0] = n · … so that kernels with another `n` differ."""
    params = list(PARAMS)
    if "swapped_params" in features:
        params[1], params[2] = params[2], params[1]
    if "short_params" in features:
        params.pop()
    listed = ",\n".join(f"\t.param {kind} {symbol}_param_{i}" for i, kind in enumerate(params))
    body = (
        mma_body(symbol, 24 if "spills" in features else 2) if features & {"spills", "mma"} else plain_body(symbol, n)
    )
    limit = ".maxnreg 48\n" if "spills" in features else ""
    static = "\t.shared .align 4 .b8 buffer[40000];\n" if "big_total" in features else ""
    if static:
        body = body.replace("\tret;", "\tmov.u32 %r1, buffer;\n\tst.shared.u32 [%r1], %r1;\n\tbar.sync 0;\n\tret;")
    head = (
        f"//\n// Toy\n//\n.version 8.0\n.target {'sm_90a' if 'bad_target' in features else 'sm_80'}\n.address_size 64\n"
    )
    if "path" in features:
        head += '// "/home/somebody/checkout/kernels/toy.py"\n'
    entry = f".visible .entry {symbol}(\n{listed}\n)\n.reqntid 128, 1, 1\n{limit}{{\n{static}{body}}}\n"
    if "two_kernels" in features:
        entry += entry.replace(symbol, symbol + "_b")
    if "bad_ptx" in features:
        entry = entry.replace("\tret;", "\tno.such.instruction;\n\tret;")
    return head + entry


def plain_body(symbol: str, n: int) -> str:
    return f"""\t.reg .b32 %r<4>;
\t.reg .b64 %rd<4>;
\tld.param.u64 %rd1, [{symbol}_param_0];
\tld.param.u32 %r2, [{symbol}_param_1];
\tadd.u32 %r3, %r2, {n};
\tst.global.u32 [%rd1], %r3;
\tret;
"""


def mma_body(symbol: str, tiles: int) -> str:
    """A loop of `tiles` mma.sync with accumulators of their own: 4 registers each, so many of them spill."""
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    acc = [[f"%f{4 * t + i}" for i in range(4)] for t in range(tiles)]
    init = "".join(f"\tmov.f32 {r}, 0f00000000;\n" for group in acc for r in group)
    work = "".join(f"\t{mma} {{{','.join(g)}}}, {{%r4,%r5,%r6,%r7}}, {{%r8,%r9}}, {{{','.join(g)}}};\n" for g in acc)
    store = "".join(f"\tst.global.f32 [%rd1+{16 * t + 4 * i}], {acc[t][i]};\n" for t in range(tiles) for i in range(4))
    loads = "".join(f"\tld.global.u32 %r{r}, [%rd1+{4 * r}];\n" for r in range(4, 10))
    return f"""\t.reg .pred %p1;
\t.reg .b32 %r<12>;
\t.reg .f32 %f<{4 * tiles}>;
\t.reg .b64 %rd<4>;
\tld.param.u64 %rd1, [{symbol}_param_0];
\tld.param.u32 %r2, [{symbol}_param_1];
{init}LOOP:
{loads}{work}\tadd.u64 %rd1, %rd1, 64;
\tsub.u32 %r2, %r2, 1;
\tsetp.ne.u32 %p1, %r2, 0;
\t@%p1 bra LOOP;
{store}\tret;
"""
