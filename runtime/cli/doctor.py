"""`python -m runtime doctor`: what there is here, what would be loaded, and what is wrong."""

from __future__ import annotations

import argparse
import time
from typing import Any

from registry.contract import WINDOW_OPEN
from runtime import stages
from runtime.api.attention import flash_attn
from runtime.call import forward
from runtime.errors import CubineryError, NoKernelError
from runtime.load import backend, select, session
from runtime.load.driver import CudaDriver
from runtime.trust import resolve

# doctor's call
SAMPLE = forward.facts(dtype="bf16", head_dim=128, head_dim_v=128, batch=1, heads_q=8, heads_kv=8, seqlen_q=256,
                         seqlen_k=256, window=(WINDOW_OPEN, WINDOW_OPEN))  # fmt: skip


def examine(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Every part by itself, so that one failure does not hide the others."""
    problems: list[str] = []
    now = session.current()
    report: dict[str, Any] = {
        "gpu": _gpus(),
        "torch": _torch(),
        "registry": {"where": now.config.registry, "remote": resolve.why_remote(now.source)},
        "release": None,
        "lock": _lock(now),
        "cache": _cache(now, problems),
        "indexes": {},
        "would_load": {},
    }
    try:
        report["indexes"] = now.digests()
        archs = {session.pick_arch(report["indexes"], tuple(gpu["capability"])) for gpu in report["gpu"]["devices"]}
        for gpu in report["gpu"]["devices"]:
            if session.pick_arch(report["indexes"], tuple(gpu["capability"])) is None:
                problems.append(str(select.no_arch(tuple(gpu["capability"]), report["indexes"], now.source.where)))
        for arch in sorted({a for a in archs if a} or report["indexes"]):
            report["would_load"][arch] = _would_load(now, arch)
    except CubineryError as error:
        problems.append(f"{type(error).__name__} ({error.reason}): {error}")
    report["release"] = _release(now, problems)
    callable_here = report["gpu"]["devices"] and report["torch"]["cuda"]
    if callable_here and not problems and all(loads["sample"] for loads in report["would_load"].values()):
        problems.extend(_first_call())
    report |= {"problems": problems, "ledger": stages.ledger()}
    return report, 1 if problems else 0


def _gpus() -> dict[str, Any]:
    """The driver and its GPUs; no context is created."""
    try:
        driver = CudaDriver()
        devices = [
            {"name": driver.device_name(i), "capability": list(driver.capability(i))}
            for i in range(driver.device_count())
        ]
        return {"driver": driver.version(), "devices": devices, "note": None if devices else "no GPU"}
    except CubineryError as error:
        return {"driver": None, "devices": [], "note": f"no GPU can be used here: {error}"}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"version": None, "cuda": False, "note": "torch is not installed: flash_attn cannot be called here"}
    usable = torch.cuda.is_available()
    return {"version": torch.__version__, "cuda": usable, "note": None if usable else "torch sees no CUDA device"}


def _release(now: session.Session, problems: list[str]) -> dict[str, Any] | None:
    """What was verified last of a signed release, from the state alone; None where no root decides."""
    if not now.signed:
        return None
    try:
        found = resolve.trusted(now.source, now.config.channel, now.config)
    except CubineryError as error:
        problems.append(f"{type(error).__name__} ({error.reason}): {error}")
        found = None
    facts = found._asdict() | {"age_s": round(time.time() - found.checked_at)} if found else {}
    return {"root": now.config.root, "state": now.config.state_folder, "max_age": now.config.max_age, **facts}


def _lock(now: session.Session) -> dict[str, Any] | None:
    return {"file": now.lock.path, "kernels": len(now.lock.artifacts)} if now.lock else None


def _cache(now: session.Session, problems: list[str]) -> dict[str, Any]:
    cache = getattr(now.source, "cache", None)
    report: dict[str, Any] = {"folder": cache and now.config.cache_folder, "limit": now.config.cache_limit}
    if cache is None:
        return report | {"note": "not used: the registry is read where it lies"}
    try:
        cache.check_owner()
        return report | cache.usage()._asdict() | {"note": None}
    except OSError as error:
        problems.append(str(error))
    return report | {"note": "cannot be used"}


def _would_load(now: session.Session, arch: str) -> dict[str, Any]:
    """An index's facts, and a sample call taken as far as verified bytes."""
    index = now.index_for_arch(arch).whole
    found: dict[str, Any] = {"release": index.release, "variants": sorted(index.by_variant)}
    if now.lock:
        found["variants"] = sorted(locked.variant for locked in now.lock.artifacts if locked.arch == arch)
    try:
        artifact, _ = select.select(index, "fwd", SAMPLE)
        now.cubin(artifact)
    except NoKernelError:
        return found | {"sample": None}
    return found | {"sample": artifact.variant, "min_driver": artifact.min_driver}


def _first_call() -> list[str]:
    """One small call on the GPU, for the ledger. What went wrong."""
    torch = backend.TorchBackend().torch
    try:
        q = torch.zeros(1, 256, 8, 128, dtype=torch.bfloat16, device="cuda")
        flash_attn(q, q, q)
        torch.cuda.synchronize()
    except CubineryError as error:
        return [f"{type(error).__name__} ({error.reason}): {error}"]
    return []


def show(report: dict[str, Any]) -> str:
    gpu, torch, registry = report["gpu"], report["torch"], report["registry"]
    lines = [f"driver    {gpu['driver'] or '-'}"]
    lines += [f"gpu       {d['name']}, sm_{d['capability'][0]}{d['capability'][1]}" for d in gpu["devices"]]
    lines += [f"gpu       {gpu['note']}"] if gpu["note"] else []
    lines += [f"torch     {torch['version'] or '-'}{', ' + torch['note'] if torch['note'] else ''}"]
    lines += [f"registry  {registry['where']}" + (f" ({registry['remote']})" if registry["remote"] else "")]
    lines += _show_release(report["release"])
    lines += [f"lock      {lock['file']}, {lock['kernels']} kernels and no others"] if (lock := report["lock"]) else []
    lines += [f"cache     {report['cache']['folder']}, {_show_cache(report['cache'])}"]
    for arch, digest in report["indexes"].items():
        loads = report["would_load"].get(arch)
        detail = f", {len(loads['variants'])} kernels of {loads['release']}, {_sample(loads)}" if loads else ""
        lines.append(f"index     {arch} {digest}{detail}")
    lines += [f"time      {r['ms']:9.3f} ms  {r['stage']}  {r['what']}".rstrip() for r in report["ledger"]]
    lines += [f"PROBLEM   {problem}" for problem in report["problems"]] or ["all is well"]
    return "\n".join(lines)


def _sample(loads: dict[str, Any]) -> str:
    none = f"none of them for a call with {SAMPLE['dtype']} and head_dim {SAMPLE['head_dim']}, which doctor would try"
    return f"e.g. {loads['sample']}" if loads["sample"] else none


def _show_release(release: dict[str, Any] | None) -> list[str]:
    if release is None:
        return []
    if "version" not in release:
        return [f"release   nothing verified yet under {release['root']}: python -m runtime refresh"]
    now = time.time()
    ends = "ended" if release["expires"] < now else "ends"
    verified = f"version {release['version']}, verified {_ago(release['age_s'])} ago"
    lines = [f"release   {verified}, {ends} {_day(release['expires'])}"]
    if release["timestamp_expires"] < now:
        stale = _ago(now - release["timestamp_expires"])
        lines.append(f"release   the source's timestamp ended {stale} ago: a newer release may exist")
    return lines


def _show_cache(cache: dict[str, Any]) -> str:
    if cache["note"]:
        return str(cache["note"])
    corrupt = f", {cache['corrupt']} set aside as corrupt" if cache["corrupt"] else ""
    return f"{cache['entries']} entries, {cache['nbytes'] / 1e6:.1f} of {cache['limit'] / 1e6:.0f} MB{corrupt}"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
