"""What a variant must pass before anything of it is stored. Each check gives a reason, or None when all is well.

A reason reads 'code: what is wrong and what would be right'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from builder.inspect import Elf, Usage
from builder.sass import Loops
from registry.contract import GRID_RULES, MAX_SMEM, PARAM_FORMATS, Abi
from registry.frames import ELF_MACHINE_CUDA

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\b.*?([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.S)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# An absolute path: it would make the PTX depend on where the checkout lies. '//' opens a comment.
_PATH = re.compile(r"(?<![\w/.])/[\w.+~-]+/[^\s\"']*")
# How PTX spells the contract's types; b32 and b64 say nothing about the kind.
_PTX_TYPES = {"ptr": ("u64", "b64"), "i64": ("s64", "u64", "b64"), "i32": ("s32", "u32", "b32"), "f32": ("f32", "b32")}
assert _PTX_TYPES.keys() == PARAM_FORMATS.keys()
Facts = Mapping[str, Any]


def ptx_reasons(ptx: str, facts: Facts, abi: Abi, arch: str) -> list[str]:
    """Why this PTX may not be assembled. facts: symbol, threads, smem, grid as the generator states them. arch: the
    target that it must name."""
    code = _COMMENT.sub("", ptx)
    checks = (target(code, arch), paths(ptx), entry(code, facts), params(code, abi), launch(facts))
    return [reason for reason in checks if reason]


def elf_reasons(elf: Elf, facts: Facts, arch: str) -> list[str]:
    """Why this file is not the one kernel for this architecture."""
    return [f"{arch}: {reason}" for reason in (machine(elf, arch), kernels(elf, facts)) if reason]


def usage_reasons(usage: Usage, loops: Loops, facts: Facts, arch: str) -> list[str]:
    """Why this kernel's use of shared memory and registers does not do."""
    return [f"{arch}: {reason}" for reason in (smem(usage, facts), spills(usage, loops, arch)) if reason]


def target(code: str, arch: str) -> str | None:
    """All cubins of a variant come from PTX for one generic target; an 'a' target would not assemble elsewhere."""
    found = re.findall(r"^\s*\.target\s+([^\n]+)", code, re.M)
    if [f.strip() for f in found] == [arch]:
        return None
    return f"target: the PTX names .target {found}, expected {arch}, once"


def paths(ptx: str) -> str | None:
    found = _PATH.search(ptx)
    return (
        f"path: the PTX holds the path {found[0]:.200}; equal sources must give equal PTX anywhere" if found else None
    )


def entry(code: str, facts: Facts) -> str | None:
    """Exactly one kernel, of the name and the number of threads that the generator states."""
    entries = _ENTRY.findall(code)
    names = [name for name, _, _ in entries]
    if len(re.findall(r"\.entry\b", code)) != 1 or names != [facts["symbol"]]:
        return f"symbol: the PTX has the entries {names}, expected only {facts['symbol']}"
    required = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entries[0][2])
    if required:
        threads = 1
        for number in filter(None, required.groups()):
            threads *= int(number)
        if threads != facts["threads"]:
            return f"threads: the PTX requires blocks of {threads} threads, the generator states {facts['threads']}"
    return None


def params(code: str, abi: Abi) -> str | None:
    """The entry's parameters are the ABI's, in number, type, offset and size."""
    match = _ENTRY.search(code)
    given = [p.strip() for p in (match[2] or "").split(",")] if match else []
    parsed = [_PARAM.search(p) for p in given if p]
    if len(parsed) != len(abi.params) or None in parsed:
        return f"abi: the entry has {len(parsed)} parameters, {abi.op} v{abi.version} has {len(abi.params)}"
    offset = 0
    for param, place, text in zip(abi.params, abi.layout, parsed, strict=True):
        assert text is not None
        kind = text[2]
        size = int(kind[1:]) // 8 * int(text[4] or 1)
        align = int(text[1] or int(kind[1:]) // 8)
        offset = -(-offset // align) * align
        if (offset, size) != place or kind not in _PTX_TYPES[param.type]:
            return (
                f"abi: parameter {param.name} is .{kind} of {size} bytes at offset {offset}, {abi.op} v{abi.version} "
                f"has {param.type} of {place[1]} bytes at {place[0]}"
            )
        offset += size
    return None


def launch(facts: Facts) -> str | None:
    """The launch facts are possible ones on SM120."""
    if facts["threads"] % 32 or not 32 <= facts["threads"] <= 1024:
        return f"threads: {facts['threads']} a block are not a multiple of 32 up to 1024"
    if not 0 <= facts["smem"] <= MAX_SMEM:
        return f"smem: {facts['smem']:,} bytes of dynamic shared memory are not within 0 to {MAX_SMEM:,}"
    if facts["grid"]["rule"] not in GRID_RULES:
        return f"grid: rule {facts['grid']['rule']!r} is none of {', '.join(GRID_RULES)}"
    return None


def machine(elf: Elf, arch: str) -> str | None:
    if (elf.machine, elf.arch) == (ELF_MACHINE_CUDA, arch):
        return None
    return f"elf: machine {elf.machine} and {elf.arch} in the header, expected {ELF_MACHINE_CUDA} and {arch}"


def kernels(elf: Elf, facts: Facts) -> str | None:
    if list(elf.kernels) == [facts["symbol"]]:
        return None
    return f"kernels: the cubin holds {sorted(elf.kernels)}, expected only {facts['symbol']}"


def smem(usage: Usage, facts: Facts) -> str | None:
    total = usage.static_smem + facts["smem"]
    if total <= MAX_SMEM:
        return None
    return f"smem: {facts['smem']:,} dynamic + {usage.static_smem:,} static bytes exceed the {MAX_SMEM:,} of SM120"


def spills(usage: Usage, loops: Loops, arch: str) -> str | None:
    """Spills cost only where they repeat. Other architectures have other register files' worth; they are for tests."""
    if arch not in ("sm_120", "sm_121") or not usage.spills or not loops.spilling:
        return None
    return f"spills: {usage.spills} bytes with {usage.registers} registers, in a loop with HMMA"
