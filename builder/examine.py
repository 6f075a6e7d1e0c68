"""From assembled cubins to what their artifacts say about them, or to the reasons why there will be none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder import checks, inspect, sass
from builder.errors import InspectError
from builder.toolchain import Toolchain, min_driver
from builder.worker import Cubin
from registry.contract import Abi, Artifact, Grid, sha256_hex

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A cubin that may become a variant's artifact. facts: symbol, threads, smem and grid, as the generator states."""

    key: str
    cubin: Cubin
    facts: Facts
    ptx_sha256: str


@dataclass(frozen=True)
class Examined:
    """What was found out about a candidate that passed every check."""

    usage: inspect.Usage
    loops: sass.Loops


def examine(batch: Sequence[Candidate], arch: str) -> Iterator[tuple[Candidate, Examined | list[str]]]:
    """Each candidate with what was found, or with the reasons why it fails. Keys must be unique."""
    elves: dict[str, inspect.Elf] = {}
    for candidate in batch:
        try:
            elf = inspect.read_elf(candidate.cubin.cubin)
            reasons = checks.elf_reasons(elf, candidate.facts, arch)
        except InspectError as error:
            reasons = [_reason(error, arch)]
        if reasons:  # code of another machine is not given to nvdisasm
            yield candidate, reasons
        else:
            elves[candidate.key] = elf
    loops = disassembled({key: next(iter(elf.kernels.values())) for key, elf in elves.items()}, arch)
    for candidate in batch:
        if candidate.key in elves:
            yield candidate, _judge(candidate, loops[candidate.key], arch)


def artifact(candidate: Candidate, found: Examined, arch: str, abi: Abi, toolchain: Toolchain) -> Artifact:
    """What the index will say about a candidate that passed."""
    facts, usage, cubin = candidate.facts, found.usage, candidate.cubin
    smem = facts["smem"] + usage.static_smem
    return Artifact(
        variant=candidate.key,
        arch=arch,
        symbol=facts["symbol"],
        abi=abi.digest,
        grid=Grid(**facts["grid"]),
        threads=facts["threads"],
        smem=facts["smem"],
        static_smem=usage.static_smem,
        registers=usage.registers,
        spills=usage.spills,
        stack=usage.stack,
        blocks_per_sm=inspect.blocks_per_sm(facts["threads"], usage.registers, smem),
        hot_loop=found.loops.hot,
        cubin_sha256=sha256_hex(cubin.cubin),
        cubin_size=len(cubin.cubin),
        frame_sha256=sha256_hex(cubin.frame),
        frame_size=len(cubin.frame),
        ptx_sha256=candidate.ptx_sha256,
        toolchain=str(toolchain),
        min_driver=min_driver(arch, toolchain.toolkit),
    )


def disassembled(codes: Mapping[str, bytes], arch: str) -> dict[str, sass.Loops | InspectError]:
    """The loops of every kernel. Where nvdisasm does not read all of them, each is read by itself."""
    if not codes:
        return {}
    try:
        return {key: sass.loops(instructions) for key, instructions in sass.disassemble(codes, arch).items()}
    except InspectError as error:
        if len(codes) == 1:
            return dict.fromkeys(codes, error)
        return {key: disassembled({key: code}, arch)[key] for key, code in codes.items()}


def _judge(candidate: Candidate, loops: sass.Loops | InspectError, arch: str) -> Examined | list[str]:
    try:
        usage = inspect.read_log(candidate.cubin.log)
    except InspectError as error:
        return [_reason(error, arch)]
    if isinstance(loops, InspectError):
        return [_reason(loops, arch)]
    return checks.usage_reasons(usage, loops, candidate.facts, arch) or Examined(usage, loops)


def _reason(error: InspectError, arch: str) -> str:
    return f"{arch}: {error.reason}: {error}"
