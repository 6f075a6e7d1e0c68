"""`make demo`: build a few kernels, serve them, fetch them over HTTP, and with a GPU run one.

Everything happens in a temporary folder and on loopback. Each step is checked; the exit code is non-zero if any fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ONLY = "fwd-bf16-d64-*"  # both tiles of one head_dim: a few seconds on a laptop
# What is fetched: one model's attention.
MODEL = ("--op", "fwd", "--dtype", "bf16", "--head-dim", "64", "--heads", "8/2")
READY_S = 30  # how long the server may take to start


class StepError(Exception):
    """A step did not do what it should; the message says what it did."""


class Report:
    """Runs steps and keeps one table row for each."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float]] = []

    def step(self, name: str, action: Callable[[], tuple[str, Any]]) -> Any:
        """Run `action`, which returns (what to show, a value); returns the value. Raises StepError after noting it."""
        print(f"{name} …", flush=True)
        start = time.perf_counter()
        try:
            shown, value = action()
        except StepError as error:
            self.rows.append((name, f"FAILED: {error}", time.perf_counter() - start))
            raise
        self.rows.append((name, shown, time.perf_counter() - start))
        return value

    def note(self, name: str, shown: str) -> None:
        self.rows.append((name, shown, 0.0))

    def print(self) -> None:
        table = Table("step", "result", "seconds", title="Cubinery demo")
        for name, shown, seconds in self.rows:
            table.add_row(name, shown, f"{seconds:.1f}" if seconds else "")
        # Piped or not, a line is wide enough for a digest.
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def module(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m …` in the checkout, with its output kept."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean_environment() | (env or {}), capture_output=True, text=True)


def clean_environment() -> dict[str, str]:
    """This process's environment without settings that would lead a step to the user's own registry."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CUBINERY_")}


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    """The standard output, or StepError with what the command said."""
    if done.returncode != 0:
        said = f"{done.stdout}{done.stderr}".strip()[-2000:]
        raise StepError(f"`{' '.join(done.args[1:4])} …` exited {done.returncode}:\n{said}")
    return done.stdout


def build(registry: Path, archs: list[str]) -> tuple[str, dict[str, str]]:
    """Compile the variants; returns {arch: index digest}."""
    flags = [flag for arch in archs for flag in ("--arch", arch)]
    said = output_of(module("builder", *flags, "--only", ONLY, "--registry", str(registry), "--json"))
    answer = json.loads(said.splitlines()[-1])
    if answer["failed"] or answer["built"] == 0 or answer["built"] + answer["cached"] < answer["variants"]:
        raise StepError(f"the builder built {answer['built']} of {answer['variants']}: {answer['failed']}")
    index = answer["index"]
    indexes = index if isinstance(index, dict) else {archs[0]: index}
    if list(indexes) != archs:
        raise StepError(f"the builder printed indexes for {list(indexes)}, asked for {archs}")
    digests = ", ".join(f"{arch} index {digest[:12]}…" for arch, digest in indexes.items())
    return f"{answer['variants']} variants, {answer['bytes']:,} bytes: {digests}", indexes


def check_registry(registry: Path) -> tuple[str, None]:
    output_of(module("registry", "verify", "--registry", str(registry)))
    return "every blob, row and index is sound", None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def server(registry: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process on loopback, as (URL, process); ended on the way out, whatever happens."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--registry", str(registry), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=out, stderr=out)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> tuple[str, None]:
    """Ask /readyz until it answers 200."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/readyz", timeout=2).close()
            return f"{url} is ready", None
        time.sleep(0.1)
    state = "did not become ready" if process.poll() is None else f"exited {process.returncode}"
    raise StepError(f"the server {state}:\n{log.read_text(errors='replace')[-2000:]}")


def prefetch(arch: str, env: dict[str, str], cache: Path) -> tuple[str, None]:
    """Fill the empty cache; every file in it must have the digest that its name says."""
    output_of(module("runtime", "prefetch", "--arch", arch, *MODEL, env=env))
    files = [path for path in cache.rglob("*") if path.is_file() and re.fullmatch(r"[0-9a-f]{64}", path.name)]
    wrong = [path.name for path in files if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]
    if not files or wrong:
        raise StepError(f"the cache holds {len(files)} files, of which with wrong content: {wrong}")
    return f"{len(files)} files in the cache, each with the SHA-256 that its name says", None


def refuse_other_digest(arch: str, env: dict[str, str]) -> tuple[str, None]:
    """An index that was not named by its digest must not be taken from a server."""
    done = module("runtime", "prefetch", "--arch", arch, *MODEL, env=env | {"CUBINERY_INDEX": "0" * 64})
    if done.returncode == 0:
        raise StepError("prefetch accepted an index digest that the server does not have")
    return "an index digest that the server does not have is refused", None


def gpu_name() -> str | None:
    """The first GPU that nvidia-smi lists, or None."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return None
    return next((line for line in listed if line.startswith("GPU")), None)


def gpu_arch() -> str:
    """The architecture to build for the GPU of this machine; all of 12.x runs sm_120's cubins."""
    try:
        import torch
    except ImportError:
        raise StepError("nvidia-smi lists a GPU but torch is not installed: `make demo` installs it") from None
    if not torch.cuda.is_available():
        raise StepError(f"nvidia-smi lists a GPU but torch {torch.__version__} cannot use it")
    major, minor = torch.cuda.get_device_capability()
    return "sm_120" if major == 12 else f"sm_{major}{minor}"


def attention(url: str, indexes: dict[str, str], cache: Path) -> tuple[str, None]:
    """One causal grouped-query forward on the GPU against an fp64 reference. SDPA's own error is the yardstick."""
    import torch

    import runtime

    runtime.configure(registry=url, index=indexes, cache=cache)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 777, 8, 64), (2, 777, 2, 64), (2, 777, 2, 64)]
    q, k, v = (torch.randn(s, dtype=torch.bfloat16, device="cuda", generator=generator) for s in shapes)
    out: Any = runtime.flash_attn(q, k, v, causal=True)

    def sdpa(dtype: torch.dtype) -> torch.Tensor:
        hq, hk, hv = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # heads before seqlen
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(hq, hk, hv, is_causal=True, enable_gqa=True).transpose(1, 2)

    reference = sdpa(torch.float64)
    error = (out - reference).abs().max().item()
    accepted = 2 * (sdpa(torch.bfloat16) - reference).abs().max().item() + 1e-3
    if not error <= accepted:
        raise StepError(f"largest error against fp64 {error:.2e}, accepted {accepted:.2e}")
    return f"{torch.cuda.get_device_name()}: largest error against fp64 {error:.1e} (accepted {accepted:.1e})", None


def run(report: Report, folder: Path) -> None:
    """All steps in order; StepError ends them."""
    registry, cache, log = folder / "registry.db", folder / "cache", folder / "server.log"
    gpu = gpu_name()
    archs = ["sm_120"]
    if gpu:
        arch = report.step("find the GPU", lambda: (gpu, gpu_arch()))
        archs = list(dict.fromkeys([*archs, arch]))
    indexes = report.step("build", partial(build, registry, archs))
    report.step("verify the registry", partial(check_registry, registry))
    with server(registry, log) as (url, process):
        report.step("serve", partial(wait_ready, url, process, log))
        pins = ",".join(f"{arch}={digest}" for arch, digest in indexes.items())
        env = {"CUBINERY_REGISTRY": url, "CUBINERY_INDEX": pins, "CUBINERY_CACHE": str(cache)}
        for arch in archs:
            report.step(f"prefetch {arch} over HTTP", partial(prefetch, arch, env, cache))
        other = env | {"CUBINERY_CACHE": str(folder / "other")}
        report.step("ask for an unknown index", partial(refuse_other_digest, archs[0], other))
        if gpu:
            report.step("run attention", partial(attention, url, indexes, cache))
        else:
            report.note("run attention", "not run: nvidia-smi lists no GPU here")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended then too
    report = Report()
    failed = False
    with tempfile.TemporaryDirectory(prefix="cubinery-demo-") as folder:
        try:
            run(report, Path(folder))
        except StepError:
            failed = True
    report.print()
    print("The demo FAILED." if failed else "All steps passed.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
