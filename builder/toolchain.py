"""What a build depends on: versions, the kernels' sources, and the fingerprints made of them. Never imports cutlass."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from builder import ROOT, nvjitlink
from builder.errors import ToolchainError
from registry.contract import canonical_json, sha256_hex
from registry.frames import ZSTD_VERSION

DSL_ARCH = "sm_80"  # the DSL's default; each variant's PTX is for the target that its op's description names
DSL_DISTRIBUTIONS = tuple(
    "nvidia-cutlass-dsl" + part for part in ("", "-libs-base", "-libs-core", "-libs-cu12", "-libs-cu13")
)
NVDISASM = "nvidia-cuda-nvdisasm"
# What of ours may shape a PTX text: sources outside these do not count towards a fingerprint.
SOURCE_PACKAGES = ("kernels", "registry.contract", "registry.ops")
# Packages whose files define names and do nothing else (tests/registry), and whose __init__
# hands these on: importing one file runs all, but those that it does not import cannot shape what it does.
FACADES = ("registry.contract", "registry.ops")
# These turn a PTX text into an artifact's fields, so a change to them makes stored artifacts stale.
ARTIFACT_SOURCES = ("nvjitlink.py", "inspect.py", "sass.py", "checks.py", "examine.py")


def min_driver(arch: str, toolkit: tuple[int, int]) -> int:
    """The oldest driver (12080 is CUDA 12.8) that loads a cubin for `arch` assembled by `toolkit` (major, minor).

    Drivers load cubins of any toolkit of their own major version or an older one (CUDA minor-version compatibility).
    """
    return max(nvjitlink.ARCHS[arch], toolkit[0] * 1000)


@dataclass(frozen=True)
class Toolchain:
    """Exact versions. generate: what makes the PTX; assemble: what makes the artifact out of it."""

    generate: Mapping[str, str]
    assemble: Mapping[str, str]
    toolkit: tuple[int, int]

    @classmethod
    def current(cls) -> Toolchain:
        """What is installed beside this Python. ToolchainError names the package that is missing."""
        dsl = {name: found for name in DSL_DISTRIBUTIONS if (found := _version(name)) is not None}
        needed = {name: _version(name) for name in (DSL_DISTRIBUTIONS[0], nvjitlink.DISTRIBUTION, NVDISASM)}
        if missing := [name for name, found in needed.items() if found is None]:
            raise ToolchainError(
                f"not installed: {', '.join(missing)}; in the checkout: pip install -e '.[build,serve]'"
            )
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        sources = {name: sha256_hex((ROOT / "builder" / name).read_bytes()) for name in ARTIFACT_SOURCES}
        return cls(
            generate={**dsl, "python": python, "CUTE_DSL_ARCH": DSL_ARCH},
            assemble={
                nvjitlink.DISTRIBUTION: str(needed[nvjitlink.DISTRIBUTION]),
                NVDISASM: str(needed[NVDISASM]),
                "zstd": ZSTD_VERSION,
                **sources,
            },
            toolkit=nvjitlink.version(),
        )

    def __str__(self) -> str:
        """The artifact's `toolchain` field."""
        return (
            f"nvidia-cutlass-dsl {self.generate[DSL_DISTRIBUTIONS[0]]}, python {self.generate['python']}, "
            f"{nvjitlink.DISTRIBUTION} {self.assemble[nvjitlink.DISTRIBUTION]}"
        )

    def ptx_fingerprint(self, variant_key: str, sources: Mapping[str, str]) -> str:
        """SHA-256 over all that shapes a variant's PTX. sources: module name → SHA-256, from `closure`."""
        return sha256_hex(canonical_json({"variant": variant_key, "sources": dict(sources), **self.generate}))

    def artifact_fingerprint(self, ptx_fingerprint: str, arch: str, abi_digest: str) -> str:
        """SHA-256 over all that shapes one artifact: its PTX, the assembler with its options, and the inspection."""
        parts = {"ptx": ptx_fingerprint, "abi": abi_digest, "options": nvjitlink.options(arch), **self.assemble}
        return sha256_hex(canonical_json(parts))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def nvdisasm_path() -> Path:
    """The nvdisasm program of its wheel. ToolchainError if it is not there."""
    try:
        files = metadata.distribution(NVDISASM).files or []
        return Path(str(next(f.locate() for f in files if f.name in ("nvdisasm", "nvdisasm.exe"))))
    except (metadata.PackageNotFoundError, StopIteration):
        raise ToolchainError(f"nvdisasm is not installed: pip install {NVDISASM}") from None


def closure(roots: Iterable[str], packages: Iterable[str] = SOURCE_PACKAGES, folder: Path = ROOT) -> dict[str, str]:
    """Module name → SHA-256 of its source, for `roots` and all they import, directly or not, of `packages`.

    A package's __init__ counts with each of its modules; a facade's does not, unless something is imported from it.
    Reads the import statements with ast and runs nothing. Names are relative to `folder`, so equal sources in different
    folders give equal results. ToolchainError if a root is not there or a source does not parse.
    """
    packages = tuple(packages)
    found: dict[str, str] = {}
    waiting = list(roots)
    for root in waiting:
        if _source(root, folder) is None:
            raise ToolchainError(f"module {root} is not in {folder}: its variants cannot be built")
    while waiting:
        name = waiting.pop()
        path = _source(name, folder)
        if name in found or path is None or not _inside(name, packages):
            continue
        text = path.read_bytes()
        found[name] = sha256_hex(text)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _imports(_parse(text, path), package)
        waiting += (parent for parent in _parents(name) if parent not in FACADES)
    return dict(sorted(found.items()))


def broken(error: SyntaxError | ValueError, path: object) -> ToolchainError:
    """The typed error for a source that does not parse."""
    line = getattr(error, "lineno", None)  # a NUL byte has none
    return ToolchainError(f"{path}{f':{line}' if line else ''}: {getattr(error, 'msg', error)}; nothing can be built")


def _parse(text: bytes, path: Path) -> ast.AST:
    try:
        return ast.parse(text, str(path))
    except (SyntaxError, ValueError) as error:
        raise broken(error, path) from None


def _source(name: str, folder: Path) -> Path | None:
    base = folder.joinpath(*name.split("."))
    # Python takes the package where there are both.
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _imports(tree: ast.AST, package: str) -> list[str]:
    """Every name that the module may import; `from a import b` gives both a and a.b, since b may be a module.

    `import a.b` gives both too: the module can reach what a holds then, unlike with `import a.b as c`.
    """
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names += [alias.name, *([] if alias.asname else _parents(alias.name))]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names
