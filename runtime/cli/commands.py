"""`python -m runtime doctor|prefetch|explain|lock|refresh`. Works without a GPU and without torch, and says so."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from registry import ops
from registry.contract import ALL_DTYPES, DTYPES, Artifact, ContractError, Index, check_arch
from registry.interrupt import ended_by_ctrl_c
from runtime import config
from runtime.call import forward
from runtime.call.forward import MAX_TOKENS
from runtime.cli import doctor
from runtime.errors import ArgumentError, ConfigError, CubineryError, NoKernelError
from runtime.load import select, session
from runtime.trust import lockfile, resolve

DOWNLOADS = 8  # at a time
COUNTS = ("head_dim", "head_dim_v", "heads_q", "heads_kv", "batch", "seqlen_q", "seqlen_k", "total_q")
KV_DTYPES = (*DTYPES, "e4m3")
FLAGS = ("causal", "varlen", "window")
LARGEST = MAX_TOKENS


def main(argv: list[str] | None = None) -> int:
    """0: all is well. 1: something is missing or wrong, as the output says. 2: wrong usage."""
    args = _parser().parse_args(argv)
    try:
        given = {name: getattr(args, name) for name in ("registry", "root", "index", "cache", "channel", "lock")}
        session.configure(**given, offline=args.offline or None)
        report, code = args.run(args)
    except CubineryError as error:
        report = {"error": {"type": type(error).__name__, "reason": error.reason, "message": str(error)}}
        code = 2 if isinstance(error, (ArgumentError, ConfigError)) else 1
        if not args.json:
            print(f"{type(error).__name__} ({error.reason}): {error}", file=sys.stderr)
            return code
    print(json.dumps(report) if args.json else args.show(report))
    return code


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--registry", help="registry file, folder or http(s) URL (default: CUBINERY_REGISTRY)")
    shared.add_argument("--root", help="file of the trusted root of signed releases (default: CUBINERY_ROOT)")
    shared.add_argument("--index", help="digest(s) that may be loaded (default: CUBINERY_INDEX)")
    shared.add_argument("--cache", help="folder of the disk cache (default: CUBINERY_CACHE)")
    shared.add_argument("--channel", help="channel of the registry (default: CUBINERY_CHANNEL, or stable)")
    shared.add_argument("--lock", help="lock file: nothing else is loaded (default: CUBINERY_LOCK)")
    shared.add_argument("--offline", action="store_true", help="never open a connection")
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser = argparse.ArgumentParser(prog="python -m runtime", description="Cubinery's runtime: what it would do.")
    commands = parser.add_subparsers(required=True, metavar="doctor|prefetch|explain|lock|refresh")

    command = commands.add_parser("doctor", parents=[shared], help="GPU, driver, registry, cache, what would be loaded")
    command.set_defaults(run=doctor.examine, show=doctor.show)

    command = commands.add_parser("refresh", parents=[shared], help="ask a signed registry for its newest release")
    command.set_defaults(run=_refresh, show=_show_refresh)

    shapes = _shape_parser()
    command = commands.add_parser("prefetch", parents=[shared, shapes], help="fetch and verify kernels ahead of time")
    command.set_defaults(run=_prefetch, show=_show_prefetch)

    command = commands.add_parser(
        "lock",
        parents=[shared, shapes],
        help="fetch, verify, and write a lock file of the index and the kernels for shapes",
        description="Write the lock file that --lock, CUBINERY_LOCK or cubinery.lock names. Without shapes: those that "
        "the file has, else every kernel.",
    )
    command.add_argument("--add", action="store_true", help="keep the file's index and kernels, add those for shapes")
    command.set_defaults(run=_lock, show=_show_lock)

    _add_explain(commands.add_parser("explain", parents=[shared], help="the kernel for a described call, or why none"))
    return parser


def _shape_parser() -> argparse.ArgumentParser:
    """The options that say which kernels are meant."""
    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--arch", type=_arch, help="sm_120, … (default: every architecture that may be loaded)")
    shapes.add_argument(
        "--shapes",
        type=_read_shapes,
        default=[],
        help="JSON file: a list of objects with any of " + ", ".join(("op", "dtype", *COUNTS, *FLAGS)),
    )
    shapes.add_argument("--heads", type=_heads, default={}, help="query/kv heads of one model, e.g. 32/8")
    shapes.add_argument("--head-dim", type=_count)
    shapes.add_argument("--head-dim-v", type=_count, help="default: head-dim")
    shapes.add_argument("--dtype", choices=DTYPES)
    shapes.add_argument("--op", help="a kernel role, such as fwd or fwd_paged (default: all)")
    return shapes


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("--arch", required=True, type=_arch)
    explain.add_argument("--op", choices=ops.OPS, default=ops.OPS[0])
    explain.add_argument("--dtype", choices=ALL_DTYPES, default="bf16", help="fp32: an output of fwd_combine")
    explain.add_argument("--kv-dtype", choices=KV_DTYPES, help="of a KV cache (default: dtype)")
    explain.add_argument("--rows", type=_count, help="of an op that counts rows (default: batch · seqlen-q · heads-q)")
    for name, default in (("head-dim", 128), ("batch", 1), ("seqlen-q", 1024), ("heads-q", 32)):
        explain.add_argument(f"--{name}", type=_count, default=default)
    explain.add_argument("--head-dim-v", type=_count, help="default: head-dim")
    explain.add_argument("--seqlen-k", type=_count, help="default: seqlen-q")
    explain.add_argument("--heads-kv", type=_count, help="default: heads-q")
    explain.add_argument(
        "--varlen", action="store_true", help="packed q (and k, of a backward): seqlen-q is the longest's"
    )
    explain.add_argument("--total-q", type=_count, help="tokens of a packed q (default: batch times seqlen-q)")
    explain.add_argument("--causal", action="store_true")
    explain.add_argument("--window", type=_window, help="left,right; an empty side is open: '128,' or ',0' or '128,0'")
    explain.set_defaults(run=_explain, show=_show_explain)


# -- prefetch ---------------------------------------------------------------------------------------------------------


def _prefetch(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Under a lock file without shapes: the kernels that it names."""
    now = session.current()
    if now.signed and not now.config.offline and now.lock is None:
        now.refresh()
    report, _ = _fetch(now, args.arch, _shapes(args))
    return report, 1 if report["missing"] or not report["wanted"] else 0


def _fetch(
    now: session.Session, arch: str | None, shapes: list[dict[str, Any]] | None
) -> tuple[dict[str, Any], list[Artifact]]:
    """Fetch and verify the kernels for shapes (None: all). The report, and the kernels that are here now."""
    digests = now.digests()
    archs = [arch] if arch else sorted(digests)
    missing: list[dict[str, str]] = []
    wanted: dict[str, Artifact] = {}
    for arch in archs:
        if arch not in digests:
            missing.append({"key": arch, "reason": f"{now.source.where} has no index for {arch} that may be loaded"})
            continue
        index = now.index_for_arch(arch).whole
        meant = _locked(now.lock, index, missing) if now.lock and shapes is None else _wanted(index, shapes, missing)
        for artifact in meant:
            wanted[artifact.frame_sha256] = artifact
    verified = []
    for artifact, error in _progress(_all_cubins(now, wanted.values()), len(wanted)):
        if error is None:
            verified.append(artifact)
        else:
            missing.append({"key": f"{artifact.arch} {artifact.variant}", "reason": str(error)})
    report = {
        "indexes": {a: digests[a] for a in archs if a in digests},
        "wanted": len(wanted),
        "verified": len(verified),
        "bytes": sum(artifact.frame_size for artifact in verified),
        "missing": missing,
    }
    return report, verified


def _shapes(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Partly known call facts; None: everything."""
    one = {"op": args.op, "head_dim": args.head_dim, "head_dim_v": args.head_dim_v, "dtype": args.dtype, **args.heads}
    one = {name: value for name, value in one.items() if value is not None}
    return [_facts(shape) for shape in [*args.shapes, *([one] if one else [])]] or None


def _arch(text: str) -> str:
    try:
        return check_arch(text)
    except ContractError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _heads(text: str) -> dict[str, int]:
    try:
        heads_q, heads_kv = (int(n) for n in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32/8") from None
    heads = {"heads_q": heads_q, "heads_kv": heads_kv}
    if not _is_shape(heads):
        raise argparse.ArgumentTypeError(f"{text!r}: query heads must be a multiple of kv heads, both at least 1")
    return heads


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {LARGEST}")
    return int(text)


def _window(text: str) -> tuple[int | None, ...]:
    """(left, right); what bounds may be is the call's to say."""
    try:
        left, right = (int(side) if side.strip() else None for side in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like '128,' or ',0' or '128,0'") from None
    return left, right


def _read_shapes(path: str) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            shapes = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    if not isinstance(shapes, list) or not shapes or not all(_is_shape(shape) for shape in shapes):
        message = (
            f"{path}: not a list of objects with any of dtype ('bf16' or 'fp16'), {', '.join(FLAGS)} (true or false) "
            f"and, as numbers from 1 to {LARGEST}, {', '.join(COUNTS)}; heads_q must be a multiple of heads_kv"
        )
        raise argparse.ArgumentTypeError(message)
    return shapes


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, dict) or not shape:
        return False
    counts = {name: value for name, value in shape.items() if name not in ("op", "dtype", *FLAGS)}
    return (
        isinstance(shape.get("op", ""), str)
        and shape.get("dtype", DTYPES[0]) in DTYPES
        and all(shape.get(flag, 0) in (0, 1) for flag in FLAGS)
        and all(name in COUNTS and type(n) is int and 1 <= n <= LARGEST for name, n in counts.items())
        and shape.get("heads_q", 0) % shape.get("heads_kv", 1) == 0
    )


def _facts(shape: dict[str, Any]) -> dict[str, Any]:
    """Call facts as far as a model's shape tells them."""
    facts = shape | {flag: int(shape[flag]) for flag in FLAGS if flag in shape}
    if "head_dim" in facts:
        facts.setdefault("head_dim_v", facts["head_dim"])
    if "heads_kv" in facts and "heads_q" in facts:
        facts["group"] = facts["heads_q"] // facts["heads_kv"]
        if "seqlen_q" in facts:
            facts["packed_rows"] = facts["seqlen_q"] * facts["group"]
    return facts


def _wanted(index: Index, shapes: list[dict[str, Any]] | None, missing: list[dict[str, str]]) -> Iterable[Artifact]:
    """The artifacts of an index that may serve one of the shapes; what should and does not exist goes to `missing`."""
    if shapes is None:
        shapes = [{}]
    for shape in shapes:
        facts = {name: value for name, value in shape.items() if name != "op"}
        ops = [shape["op"]] if "op" in shape else dict.fromkeys(row.op for row in index.rows)
        found: list[Artifact] = []
        lacking: list[str] = []
        for op in ops:
            more = select.candidates(index, op, facts)
            found, lacking = found + more[0], lacking + more[1]
        missing += [{"key": f"{index.arch} {key}", "reason": "a dispatch row names it, the index lacks it"}
                    for key in lacking]  # fmt: skip
        if not found and not lacking:
            missing.append({"key": f"{index.arch} {json.dumps(shape)}", "reason": "no dispatch row serves it"})
        yield from found
        if not shape:
            yield from index.artifacts


def _locked(lock: lockfile.LockFile, index: Index, missing: list[dict[str, str]]) -> Iterable[Artifact]:
    """The artifacts of an index that the lock file names; what it names and the index has not goes to `missing`."""
    found = [artifact for artifact in index.artifacts if lock.names(artifact)]
    lacking = {a.variant for a in lock.artifacts if a.arch == index.arch} - {a.variant for a in found}
    missing += [{"key": f"{index.arch} {key}", "reason": "the lock file names it, with bytes that its index has not"}
                for key in sorted(lacking)]  # fmt: skip
    return found


def _all_cubins(now: session.Session, artifacts: Iterable[Artifact]) -> Iterable[tuple[Artifact, CubineryError | None]]:
    def fetch(artifact: Artifact) -> tuple[Artifact, CubineryError | None]:
        try:
            now.cubin(artifact)
        except CubineryError as error:
            return artifact, error
        return artifact, None

    pool = ThreadPoolExecutor(DOWNLOADS)
    try:
        yield from pool.map(fetch, list(artifacts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for downloads under way


def _progress(done: Iterable[Any], total: int) -> Iterable[Any]:
    """A bar on stderr: rich's where it is installed and stderr is a terminal, else one line a tenth."""
    track = _rich_track() if sys.stderr.isatty() else None
    if track is not None:
        yield from track(done, total)
        return
    for n, item in enumerate(done, 1):
        if n == total or n * 10 // total > (n - 1) * 10 // total:
            print(f"prefetch {n}/{total}", file=sys.stderr)
        yield item


def _rich_track() -> Callable[[Iterable[Any], int], Iterable[Any]] | None:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return None
    return lambda done, total: track(done, "prefetch", total=total, console=Console(stderr=True))


def _show_prefetch(report: dict[str, Any]) -> str:
    lines = [f"{arch} {digest}" for arch, digest in report["indexes"].items()]
    lines += [f"MISSING {m['key']}: {m['reason']}" for m in report["missing"]]
    return "\n".join([*lines, f"{report['verified']} of {report['wanted']} kernels here and verified, "
                              f"{report['bytes']} bytes"])  # fmt: skip


# -- lock, refresh ----------------------------------------------------------------------------------------------------


def _lock(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Nothing is written unless every kernel is here and verified."""
    settings, shapes = config.current(), _shapes(args)
    path = settings.lock or os.path.abspath(lockfile.DEFAULT)
    old = lockfile.read(path) if args.add or (shapes is None and os.path.exists(path)) else None
    if args.add and shapes is None:
        raise ArgumentError("--add", "needs shapes: --dtype, --head-dim, --heads or --shapes", reason="value")
    if old is not None and shapes is None:
        shapes = [dict(shape) for shape in old.shapes] or None
    kept = old if args.add else None
    if kept is not None:
        settings = settings._replace(pins=tuple(kept.indexes.items()))
    now = session.Session(settings._replace(lock=""))
    report, verified = _fetch(now, args.arch, shapes)
    if report["missing"] or not report["wanted"]:
        return report | {"lock": None}, 1
    indexes = kept.indexes if kept is not None else report["indexes"]
    made = lockfile.merged(path, kept, indexes, verified, shapes or [])
    made.write()
    return report | {"lock": path, "indexes": dict(indexes), "locked": len(made.artifacts)}, 0


def _show_lock(report: dict[str, Any]) -> str:
    fetched = _show_prefetch(report)
    return f"{fetched}\n" + (
        f"{report['lock']}: {report['locked']} kernels" if report["lock"] else "no lock file written"
    )


def _refresh(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    now = session.current()
    indexes = now.refresh()
    report: dict[str, Any] = {"where": now.source.where, "channel": now.config.channel, "indexes": indexes}
    found = resolve.trusted(now.source, now.config.channel, now.config) if now.signed else None
    return report | {"release": found._asdict() if found else None, "lock": now.config.lock or None}, 0


def _show_refresh(report: dict[str, Any]) -> str:
    lines = [f"{arch} {digest}" for arch, digest in report["indexes"].items()]
    release = report["release"]
    lines.append(f"release {release['version']} verified" if release else "not signed here: nothing to refresh")
    lines += [f"{report['lock']} says what is loaded, not this"] if report["lock"] else []
    return "\n".join(lines)


# -- explain ----------------------------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    now = session.current()
    digests = now.digests()
    if args.arch not in digests:
        raise select.no_arch(divmod(int(args.arch.removeprefix("sm_")), 10), digests, now.source.where)
    index = now.index_for_arch(args.arch).whole
    facts = _described(args)
    report: dict[str, Any] = {"arch": args.arch, "index": digests[args.arch], "facts": facts}
    try:
        artifact, pack = select.select(index, args.op, facts, shown=None)
    except NoKernelError as error:
        rejections = [{"key": key, "why": why} for key, why in error.rejections]
        return report | {"variant": None, "rejections": rejections, "message": str(error)}, 1
    found = {"variant": artifact.variant, "pack": pack, "artifact": artifact.to_json(), "rejections": []}
    return report | found, 0


def _described(args: argparse.Namespace) -> dict[str, Any]:
    if args.dtype not in ops.get(args.op).dtypes:
        message = f"{args.dtype}, must be {' or '.join(ops.get(args.op).dtypes)} for {args.op}"
        raise ArgumentError("--dtype", message, reason="dtype")
    heads_kv = args.heads_kv or args.heads_q
    seqlen_k = args.seqlen_k or args.seqlen_q
    if args.heads_q % heads_kv:
        raise ArgumentError("--heads-q", f"{args.heads_q} is not a multiple of --heads-kv {heads_kv}", reason="heads")
    if args.seqlen_q + seqlen_k > MAX_TOKENS:
        message = f"with --seqlen-k it is {args.seqlen_q + seqlen_k}, must be at most {MAX_TOKENS}"
        raise ArgumentError("--seqlen-q", message, reason="too_large")
    if args.total_q is not None and not args.varlen:
        raise ArgumentError("--total-q", "is a packed q's; add --varlen", reason="value")
    total_q = (args.total_q or args.batch * args.seqlen_q) if args.varlen else None
    facts = forward.facts(
        dtype=args.dtype,
        head_dim=args.head_dim,
        head_dim_v=args.head_dim_v or args.head_dim,
        batch=args.batch,
        heads_q=args.heads_q,
        heads_kv=heads_kv,
        seqlen_q=args.seqlen_q,
        seqlen_k=seqlen_k,
        window=forward.window_bounds(args.causal, args.window),
        total_q=total_q,
    )
    known = forward.backward_facts(facts, args.batch * seqlen_k if args.varlen else None)
    known["kv_dtype"] = args.kv_dtype or args.dtype
    known["rows"] = args.rows or args.batch * args.seqlen_q * args.heads_q
    return {fact.name: known[fact.name] for fact in ops.get(args.op).facts}


def _show_explain(report: dict[str, Any]) -> str:
    if report["variant"] is None:
        return report["message"]
    a, pack = report["artifact"], ", packed GQA" if report["pack"] else ""
    return (
        f"{report['variant']}{pack}\n  {a['arch']}, {a['threads']} threads, {a['smem']} B dynamic shared memory, "
        f"{a['registers']} registers, {a['blocks_per_sm']} blocks an SM\n"
        f"  cubin {a['cubin_sha256']}\n  ptx   {a['ptx_sha256']}\n  index {report['index']}"
    )


def program() -> int:
    """`main` as a process ends: quietly when nobody reads on (`| head -1`: 141) or after Ctrl-C (130). Neither waits
    for downloads under way, as the interpreter's own end would."""
    try:
        with ended_by_ctrl_c():
            code = main()
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        os._exit(141)
    except KeyboardInterrupt:
        os._exit(130)
