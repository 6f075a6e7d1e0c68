"""compute-sanitizer over a few small calls per variant: memcheck and racecheck, into the ledger.

    python -m tests.gpu.sanitize --registry registry.db --planted planted.db

One process per tool launches every variant, then planted faults that the tool must see: an output astray for
memcheck, kernels without one of their barriers for racecheck (tests/gpu/plant_race.py writes their file). Only
kernels of ours are instrumented, and a finding names its kernel, so each variant gets its own verdict: it passes when
its launches ended, nothing names its symbol, and a planted fault was seen, of racecheck one of each op that is planted.
A tool that cannot run here, or that is blind, gives no verdict: the report says so and the ledger stays as it is.
A process in which nothing happens for too long is killed; the variant that it was at hangs.
Exit codes: 0 every variant passed, 1 one did not or has no verdict, 3 --stop-after left some out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import measure
from benchmarks.derived import private_copy, read_index
from builder.verified import FAILS
from registry.contract import Artifact, Variant
from tests.gpu import ledger, watchdog
from tests.gpu.watchdog import HANG_AFTER, SLOWER, UNFINISHED

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
PLANTED = "cubinery_planted"  # how the symbols of planted faults begin
REFUSALS = ("Device not supported", "Unable to", "not supported on", "insufficient driver", "Failed to initialize")


@dataclass
class Run:
    """What one process under one tool showed. ended: keys whose launches ended; named: symbols that findings name;
    hung: it was killed; stopped: it left the keys that had not ended, since the time was over."""

    ended: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    device: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    refused: str = ""
    hung: bool = False
    stopped: bool = False


@dataclass
class Verdict:
    """passed, failed, hung: variant keys, and left: those that the time was over for; blind: why there is no verdict on
    the others ('' if there are none)."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    blind: str = ""
    planted_seen: list[str] = field(default_factory=list)
    device: dict[str, str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    options.stop_at = time.monotonic() + options.stop_after
    if options.child:
        _child(options)
        return 0
    artifacts = _artifacts(options)
    path = Path(os.environ.get("CUBINERY_GPU_RUN") or ledger.new_run())
    done = ledger.done(path, artifacts.values(), options.resume)
    verdicts = {}
    for tool in options.tools:
        symbols = {key: artifacts[key].symbol for key in sorted(artifacts) if (key, tool) not in done}
        if symbols or not artifacts:
            verdicts[tool] = _verdict(tool, options, symbols)
            _record(path, tool, verdicts[tool], artifacts)
        else:
            print(f"{tool}: the ledger has all of it already")
    if verdicts:
        written = options.report or ledger.sanitizers_report(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        report = {tool: vars(verdict) for tool, verdict in verdicts.items()}
        written.write_text(json.dumps({"version": _version(), **report}, indent=1) + "\n")
        print(f"sanitizers' report: {written}")
    if any(verdict.left for verdict in verdicts.values()):
        return UNFINISHED
    failed = any(row["result"] in FAILS for row in ledger.read(path) if row["test"] in options.tools)
    return int(failed or any(verdict.blind or not verdict.passed for verdict in verdicts.values()))


def _verdict(tool: str, options: argparse.Namespace, symbols: Mapping[str, str]) -> Verdict:
    races = planted_symbols(options.planted, options.arch) if options.planted and tool == "racecheck" else {}
    verdict = judge(partial(_run, tool, options), symbols, tool, races)
    bad = verdict.failed + [f"{key} (hang)" for key in verdict.hung]
    print(f"{tool}: {len(verdict.passed)} passed, {len(bad)} failed {bad} {verdict.blind}")
    print(f"{tool}: planted faults seen: {', '.join(verdict.planted_seen) or 'none'}")
    if verdict.left:
        print(f"{tool}: the time was over for {len(verdict.left)} variants")
    return verdict


def _record(path: Path, tool: str, verdict: Verdict, artifacts: Mapping[str, Artifact]) -> None:
    run = ledger.Ledger(path, verdict.device.get("gpu", "unknown"), ledger.driver_version())
    for result, keys in {"pass": verdict.passed, "fail": verdict.failed, "hang": verdict.hung}.items():
        for key in keys:
            run.add(artifacts[key], tool, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.sanitize",
        description=__doc__.splitlines()[0],
        parents=[watchdog.options(HANG_AFTER * SLOWER)],
    )
    parser.add_argument("--registry", type=Path, required=True, help="registry file with cubins for this GPU")
    parser.add_argument(
        "--planted", type=Path, help="registry file of tests.gpu.plant_race; without it there is no verdict"
    )
    parser.add_argument("--arch", default="sm_90", help="architecture of the index whose variants are run")
    parser.add_argument("--only", default="*", help="glob over variant keys")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--logs", type=Path, help="folder that keeps what the tools and the variants wrote")
    parser.add_argument(
        "--report", type=Path, help="JSON file for the verdicts and refusals; by default beside the run's ledger file"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keys", nargs="*", help=argparse.SUPPRESS)
    return parser


def _artifacts(options: argparse.Namespace) -> dict[str, Artifact]:
    found = read_index(options.registry, options.arch).by_variant
    matching = {key: a for key, a in found.items() if fnmatchcase(key, options.only)}
    return {key: a for key, a in matching.items() if Variant.parse(key).op in options.ops}


# ---- verdicts ----


def judge(
    run: Callable[[list[str]], Run], symbols: Mapping[str, str], tool: str, planted: Mapping[str, str] | None = None
) -> Verdict:
    """Run until every variant has a verdict. `run(keys)` starts one process; a variant that breaks it is left out of
    the next. symbols: variant key -> kernel name. planted: kernel name -> op, of each of which one must be seen."""
    verdict, pending = Verdict(), list(symbols)
    while pending and not verdict.blind:
        seen = run(pending)
        if seen.stopped and not seen.ended:
            verdict.left = pending
            break
        verdict.device = verdict.device or seen.device
        verdict.planted_seen = sorted(name for name in seen.named if name.startswith(PLANTED))
        guilty = [key for key in pending if symbols[key] in seen.named]
        clean = [key for key in pending if key in seen.ended and key not in guilty]
        others = [key for key in pending if key not in seen.ended and key not in guilty]
        if seen.refused:
            verdict.blind = f"{tool} cannot run here: {seen.refused}"
        elif guilty:
            verdict.failed += guilty
            pending = [key for key in pending if key not in guilty]
        elif others and not (seen.stopped or seen.ended or seen.device):
            verdict.blind = f"{tool}'s process {'hung' if seen.hung else 'ended'} before it launched anything"
        elif others and not seen.stopped:  # the first ended the process without a finding of its own: by a crash or so
            (verdict.hung if seen.hung else verdict.failed).append(others[0])
            pending = [key for key in pending if key != others[0]]
        elif lacking := _unseen(verdict.planted_seen, planted or {}):
            how = f"{'hung, ' if seen.hung else ''}{seen.summary or 'no summary'}"
            verdict.blind = f"{tool} did not see the planted {lacking} ({how})"
        else:
            verdict.passed, verdict.left, pending = clean, others, []
    return verdict


def _unseen(seen: list[str], planted: Mapping[str, str]) -> str:
    """Which planted faults had to be seen and were not, in words; '' if none."""
    if not seen:
        return "fault"
    ops = {planted[name] for name in seen if name in planted}
    return ", ".join(f"fault of {op}" for op in sorted(set(planted.values()) - ops))


def planted_symbols(planted: Path, arch: str) -> dict[str, str]:
    """Kernel name -> op of what a file of planted faults holds."""
    found = [a for name in channels(planted) for a in read_index(planted, arch, name).artifacts]
    return {a.symbol: Variant.parse(a.variant).op for a in found if a.symbol.startswith(PLANTED)}


def channels(planted: Path) -> list[str]:
    """The channels of a file of planted faults: one kernel each."""
    database = sqlite3.connect(f"file:{planted.resolve()}?mode=ro", uri=True)
    try:
        return [name for (name,) in database.execute("SELECT DISTINCT name FROM channels ORDER BY name")]
    finally:
        database.close()


def parse(log: str) -> tuple[set[str], str, str]:
    """(symbols that findings name, the tool's summary line, why it refused) of a compute-sanitizer log."""
    lines = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    device = [line for line in lines if "Host Frame" not in line]
    named = {name for line in device for name in re.findall(r"\bcubinery_\w+", line)}
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "")
    refused = next((line for line in lines if any(text in line for text in REFUSALS)), "")
    if not refused and not lines:
        refused = "it wrote no log"
    return named, summary, refused


# ---- a process under the tool ----


def _run(tool: str, options: argparse.Namespace, keys: list[str]) -> Run:
    if (left := options.stop_at - time.monotonic()) <= 0:
        return Run(stopped=True)
    folder = options.logs or Path(tempfile.mkdtemp(prefix="cubinery-sanitize-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{tool}-{len(list(folder.glob(f'{tool}-*.log')))}.log"
    output, errors = log.with_suffix(".out"), log.with_suffix(".err")
    child = [sys.executable, "-m", "tests.gpu.sanitize", "--child", "--registry", str(options.registry)]
    child += ["--arch", options.arch, "--tools", tool, "--stop-after", str(left), "--keys", *keys]
    child += ["--planted", str(options.planted)] if options.planted else []
    # API errors are left out: the runtime itself asks for parameters until there is no next one.
    command = ["compute-sanitizer", "--tool", tool, "--log-file", str(log), "--report-api-errors", "no"]
    command += [*_only_ours(), "--print-limit", "200", *child]
    # Without the caching allocator, memory beyond a tensor is not mapped and memcheck can tell.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    try:
        with output.open("wb") as out, errors.open("wb") as err:
            code = watchdog.watch(command, options.hang_after, output, cwd=ROOT, env=env, stdout=out, stderr=err)
    except FileNotFoundError:
        return Run(refused="compute-sanitizer is not installed")
    said, complained = (path.read_text(errors="replace") for path in (output, errors))
    seen = read_output(said, log.read_text(errors="replace") if log.exists() else "", hung=code is None)
    if seen.refused or len(seen.ended) < len(keys):
        print(f"{tool}: {seen.refused or 'unfinished'}\n{said[-500:]}\n{complained[-2000:]}", file=sys.stderr)
    return seen


def read_output(output: str, log: str, hung: bool = False) -> Run:
    """A Run from the child's stdout (JSON lines among others) and the tool's log. hung: the child had to be killed."""
    named, summary, refused = parse(log)
    run = Run(named=named, summary=summary, refused=refused, hung=hung)
    for line in output.splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            if event["event"] == "end":
                run.ended.add(event["variant"])
            elif event["event"] == "stop":
                run.stopped = True
            else:
                run.device = {name: event[name] for name in ("gpu", "arch")}
    if run.ended or (hung and run.device):
        run.refused = ""  # it ran: words that look like a refusal were about something else, and a kill leaves no log
    return run


@cache
def _only_ours() -> tuple[str, str]:
    """The option that instruments only kernels whose name contains 'cubinery_'; its name differs between versions."""
    try:
        text = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        text = ""
    return ("--kernel-name" if "--kernel-name" in text else "--kernel-regex"), "kns=cubinery_"


def _version() -> str:
    try:
        text = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "none"
    return " ".join(text.split())


# ---- the child ----


def _child(options: argparse.Namespace) -> None:
    """Launch every key's small calls through `runtime`, then the tool's planted fault."""
    import torch

    from tests.gpu import small_calls
    from tests.gpu.dut import Gpu

    arch = measure.device_arch()
    with tempfile.TemporaryDirectory() as scratch:
        dut = Gpu(options.registry, Path(scratch), arch)
        _say(event="device", gpu=torch.cuda.get_device_name(), arch=arch)
        for number, key in enumerate(options.keys):
            if time.monotonic() >= options.stop_at:
                _say(event="stop")
                if not number:
                    return
                break
            dut.force(key, pack=True)
            small_calls.launch(dut, key)
            _say(event="end", variant=key)
        if options.planted:
            planted = private_copy(options.planted, Path(scratch) / "planted.db")
            (_write_astray if options.tools == ["memcheck"] else _race)(planted, arch)


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _race(planted: Path, arch: str) -> None:
    """Each kernel that lacks a barrier, through the public API."""
    import runtime
    from tests.gpu import small_calls

    public = SimpleNamespace(attn=runtime.flash_attn, varlen=runtime.flash_attn_varlen)
    public.kvcache, public.combine = runtime.flash_attn_with_kvcache, runtime.flash_attn_combine
    public.poison = lambda: None
    for name in channels(planted):
        runtime.configure(registry=planted, channel=name)
        broken = [a for a in read_index(planted, arch, name).artifacts if a.symbol.startswith(PLANTED)]
        small_calls.launch(public, broken[0].variant)


def _write_astray(planted: Path, arch: str) -> None:
    """A planted kernel whose output lies where nothing is. The last act of a process: the context dies.

    Not just past a short output's end: there may be another allocation, and then memcheck has nothing to say.
    """
    import torch

    from benchmarks.cubins import Kernel, bind_fwd, read
    from tests.gpu.inputs import DTYPES

    candidate = next(c for c in read(planted, arch) if c.artifact.symbol.startswith(PLANTED))
    variant = candidate.variant
    q, k, v = (
        torch.ones(1, 128, 1, dim, dtype=DTYPES[variant.dtype], device="cuda")
        for dim in (variant.head_dim, variant.head_dim, variant.head_dim_v)
    )
    nowhere = SimpleNamespace(data_ptr=lambda: 1 << 46, stride=v.stride)
    bind_fwd(Kernel(candidate), q, k, v, nowhere, torch.empty(1, 1, 128, device="cuda"), causal=False)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
