"""`python -m registry keys|publish|rollback|promote|yank|rotate|timestamp|push`. tuf is imported by what runs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.contract import check_arch, check_digest
from registry.errors import ReleaseError, StoreError
from registry.interrupt import ended_by_ctrl_c
from registry.store import Store, default_path

if TYPE_CHECKING:
    from registry.releases.publish import Draft

ROLES = ("root", "targets", "snapshot", "timestamp")
TOKEN = "CUBINERY_TOKEN"


def add_commands(subparsers: Any) -> None:
    """Add the parsers; each sets `run`, a function from the parsed options to the exit code."""

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text)
        parser.add_argument("--registry", metavar="PATH", type=Path, help="the registry file")
        parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")
        parser.set_defaults(run=run)
        return parser

    def signing(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = command(name, run, text)
        parser.add_argument("--keys", metavar="DIR", type=Path, action="append", required=True, default=[],
                            help="a folder of keys, or one key's file; may be repeated")  # fmt: skip
        return parser

    def releasing(name: str, change: Callable[[Draft, argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        parser = signing(name, lambda options: _release(options, change), text)
        parser.add_argument(
            "--days", type=_days, help="life of the targets' and the snapshot's signature (default: 365)"
        )
        return parser

    keys = command("keys", _keys, "make the keys of releases, and the registry's first root")
    keys.add_argument("folder", metavar="DIR", type=Path, help="where the keys go; made if it is missing")
    keys.add_argument("--threshold", metavar="ROLE=K/N", type=_threshold, action="append", default=[],
                      help="K of N keys sign for a role (default: 1/1); may be repeated")  # fmt: skip

    publish = releasing("publish", _publish, "sign the indexes that a channel of the registry points at")
    publish.add_argument("--channel", default="stable", help="the channel (default: %(default)s)")
    publish.add_argument("--arch", type=_arch, action="append", default=[], help="only this one; may be repeated")

    rollback = releasing("rollback", _rollback, "sign a channel anew with the index that it had before")
    rollback.add_argument("--channel", default="stable", help="the channel (default: %(default)s)")
    rollback.add_argument("--arch", type=_arch, action="append", default=[], help="only this one; may be repeated")
    rollback.add_argument("--to", metavar="DIGEST", type=_digest, help="the index to go back to")

    promote = releasing("promote", _promote, "sign one channel's indexes under the name of another")
    promote.add_argument("source", metavar="FROM", help="the signed channel whose indexes to take")
    promote.add_argument("target", metavar="TO", help="the channel that gets them")

    yank = releasing(
        "yank", _yank, "declare that an index must not be loaded; channels go back to what they had before"
    )
    yank.add_argument("digest", metavar="DIGEST", type=_digest, help="the index")

    rotate = signing("rotate", _rotate, "sign a new root: with new keys for a role, or only for a longer life")
    rotate.add_argument("--role", choices=ROLES, default="root", help="whose keys to replace (default: %(default)s)")
    rotate.add_argument(
        "--new-keys", metavar="DIR", type=Path, help="where the role's new keys go; without, none change"
    )
    rotate.add_argument(
        "--threshold", metavar="K/N", type=_share, default=(1, 1), help="K of N new keys (default: 1/1)"
    )

    timestamp = signing("timestamp", _timestamp, "sign a new timestamp, which lives for 7 days")
    timestamp.add_argument("--if-needed", action="store_true", help="only if the present one ends within 6 days")

    push = command("push", _push, f"send the release to a server; the token is in {TOKEN}")
    push.add_argument("url", metavar="URL", help="the server's http(s) URL")


def _keys(options: argparse.Namespace) -> int:
    from registry.releases import publish, signing

    shares = dict.fromkeys(ROLES, (1, 1)) | dict(options.threshold)
    with _store(options, create=True) as store:
        if store.tuf("1.root.json") is not None:
            message = f"{store.path}: has a root already; `python -m registry rotate` replaces keys"
            raise ReleaseError(message, reason="root")
        made = signing.make_keys(options.folder, {role: count for role, (_, count) in shares.items()})
        now = datetime.datetime.now(datetime.UTC)
        body = publish.create_root(store, made, {role: least for role, (least, _) in shares.items()}, now)
    root = options.folder / "root.json"
    root.write_bytes(body)
    text = f"keys in {options.folder}; give {root} to whoever is to load from this registry (CUBINERY_ROOT)"
    return _say(options, {"keys": str(options.folder), "root": str(root)}, text)


def _publish(draft: Draft, options: argparse.Namespace) -> None:
    draft.publish(options.channel, options.arch)


def _rollback(draft: Draft, options: argparse.Namespace) -> None:
    draft.rollback(options.channel, options.arch, options.to)


def _promote(draft: Draft, options: argparse.Namespace) -> None:
    draft.promote(options.source, options.target)


def _yank(draft: Draft, options: argparse.Namespace) -> None:
    draft.yank(options.digest)


def _release(options: argparse.Namespace, change: Callable[[Draft, argparse.Namespace], None]) -> int:
    from registry.releases.publish import Draft

    signers = _signers(options)
    days = {"targets": options.days, "snapshot": options.days} if options.days else None
    with _store(options) as store:
        draft = Draft(store, signers, days)
        change(draft, options)
        draft.sign_targets()
        draft.commit()
    return _say_release(options, draft)


def _rotate(options: argparse.Namespace) -> int:
    from registry.releases.publish import Draft
    from registry.releases.signing import can_sign, make_keys

    signers = _signers(options)
    with _store(options) as store:
        draft = Draft(store, signers)
        if not can_sign(draft.root, "root", signers):
            draft.rotate(options.role)  # says which keys are lacking, before new ones lie about
        least, count = options.threshold
        new = make_keys(options.new_keys, {options.role: count})[options.role] if options.new_keys else []
        draft.rotate(options.role, new, least)
        draft.commit()
    return _say_release(options, draft)


def _timestamp(options: argparse.Namespace) -> int:
    from registry.releases.publish import Draft
    from registry.releases.upload import renew

    signers = _signers(options)
    with _store(options) as store:
        if options.if_needed:
            text = "timestamp signed" if renew(store, signers) else "the timestamp lives long enough"
            return _say(options, {"timestamp": text}, text)
        draft = Draft(store, signers)
        draft.sign_timestamp()
        if not draft.files:
            raise ReleaseError("timestamp: its key is not among --keys", reason="keys")
        draft.commit()
    return _say_release(options, draft)


def _push(options: argparse.Namespace) -> int:
    from registry.releases.push import Push

    token = os.environ.get(TOKEN, "")
    if not token:
        raise ReleaseError(f"no token: put the server's into {TOKEN}", reason="argument")
    with ended_by_ctrl_c(), _store(options) as store, Push(store, options.url, token) as push:
        sent = push.run()
    return _say(options, sent, ", ".join(f"{count} {what}" for what, count in sent.items()) + " sent")


def _store(options: argparse.Namespace, create: bool = False) -> Store:
    """The registry, to write; one that is not there is made only where that is meant."""
    path = Path(options.registry or default_path())
    if not create and not path.exists():
        raise StoreError(f"{path}: no such registry; python -m builder --registry PATH makes one", reason="missing")
    return Store(path)


def _signers(options: argparse.Namespace) -> Any:
    from registry.releases.signing import read_keys

    return read_keys(options.keys)


def _say_release(options: argparse.Namespace, draft: Draft) -> int:
    channels = {name: channel.indexes for name, channel in draft.channels.items()}
    signed = sorted(path for path in draft.files if "/" not in path)
    lines = [f"{name}  {arch}  {digest}" for name, indexes in channels.items() for arch, digest in indexes.items()]
    lines.append(f"signed: {', '.join(signed)}")
    if draft.versions["snapshot"] and "timestamp.json" not in draft.files and any("snapshot" in p for p in signed):
        lines.append("no timestamp key here: `python -m registry push` to the server that has it")
    return _say(options, {"channels": channels, "signed": signed}, "\n".join(lines))


def _say(options: argparse.Namespace, value: dict[str, Any], text: str) -> int:
    print(json.dumps(value, indent=1, sort_keys=True) if options.json else text)
    return 0


def _arch(text: str) -> str:
    return _checked(check_arch, text)


def _digest(text: str) -> str:
    return _checked(check_digest, text)


def _checked(check: Callable[[object], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to 3650")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9])/([1-9])", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 ≤ K ≤ N ≤ 9, e.g. 2/3")
    return int(match[1]), int(match[2])


def _threshold(text: str) -> tuple[str, tuple[int, int]]:
    role, _, share = text.partition("=")
    if role not in ROLES:
        raise argparse.ArgumentTypeError(f"{text!r} is not like root=2/3; roles: {', '.join(ROLES)}")
    return role, _share(share)
