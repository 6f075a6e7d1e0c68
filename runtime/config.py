"""Settings: `configure(...)` over environment over defaults, frozen into one Config."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from registry.contract import ContractError, check_arch, check_digest
from runtime.errors import ConfigError

Pins = tuple[tuple[str | None, str], ...]  # (architecture, index digest); architecture None: whatever the index says


class Config(NamedTuple):
    """registry: a file's path or an http(s) URL. pins: index digests that were given. cache: the disk cache's folder.

    channel: which of the registry's channels. offline: never open a connection.
    """

    registry: str
    pins: Pins
    cache: str
    channel: str
    offline: bool

    @property
    def remote(self) -> bool:
        return "://" in self.registry


_given: dict[str, Any] = {}


def give(registry: Any, index: Any, cache: Any, channel: Any, offline: Any) -> None:
    """Take over what `configure` was given; None leaves a setting to the environment. Raises ConfigError, changing
    nothing."""
    given: dict[str, Any] = {}
    if registry is not None:
        given["registry"] = _registry(_text(registry, "registry", "a file's path or an http(s) URL"))
    if index is not None:
        given["index"] = _pins(index, "index")
    if cache is not None:
        given["cache"] = os.path.abspath(_text(cache, "cache", "a folder's path"))
    if channel is not None:
        given["channel"] = _text(channel, "channel", "a channel's name")
    if offline is not None:
        if not isinstance(offline, bool):
            raise ConfigError(f"offline: {offline!r:.100} is neither True nor False")
        given["offline"] = offline
    _given.clear()
    _given.update(given)


def current() -> Config:
    """The settings as they stand now. Raises ConfigError for an environment variable that cannot be used."""
    env = os.environ.get
    registry = _given.get("registry") or (_registry(env("CUBINERY_REGISTRY", "")) or default_registry())
    index = _given.get("index")
    if index is None:
        index = _pins(env("CUBINERY_INDEX", ""), "CUBINERY_INDEX")
    cache = _given.get("cache") or env("CUBINERY_CACHE") or _user_folder("user_cache_dir")
    return Config(
        registry, index, os.path.abspath(cache), _given.get("channel", "stable"), _given.get("offline", False)
    )


def default_registry() -> str:
    """The embedded registry when nothing names another: registry.db in the user's data folder, as the builder's."""
    return os.path.join(_user_folder("user_data_dir"), "registry.db")


def _user_folder(which: str) -> str:
    import platformdirs  # here: a configured process never needs it

    return getattr(platformdirs, which)("cubinery")


def _text(value: Any, name: str, accepted: str) -> str:
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{name}: {value!r:.100} is not {accepted}")
    return text


def _registry(text: str) -> str:
    if "://" not in text:
        return os.path.abspath(text) if text else ""
    if "@" in text.split("://", 1)[1]:  # not shown: it may be a password
        raise ConfigError(
            "registry: a URL with '@' is refused: a user or password in it would show in messages and ledgers; "
            "accepted are http(s)://host[:port][/path], so let a proxy (HTTPS_PROXY) add the credentials"
        )
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number, or an address in broken brackets
        usable = False
    if not usable or re.search(r"[\s\x00-\x1f\x7f?#]", text):
        message = "is neither a file's path nor an http:// or https:// URL without spaces, query and fragment"
        raise ConfigError(f"registry: {text!r:.200} {message}")
    return text.rstrip("/")


def _pins(value: Any, name: str) -> Pins:
    """One digest, 'sm_120=…,sm_90=…', or {'sm_120': …}."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        pairs = [tuple(part.split("=", 1)) if "=" in part else (None, part) for part in parts]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ConfigError(f"{name}: {value!r:.100} is neither a digest, 'sm_120=<digest>,…' nor a dict of them")
    try:
        pins = tuple((None if arch is None else check_arch(arch), check_digest(digest)) for arch, digest in pairs)
    except ContractError as error:
        raise ConfigError(f"{name}: {error}; accepted: a digest, 'sm_120=<digest>,sm_90=<digest>' or a dict") from None
    archs = [arch for arch, _ in pins]
    if len(set(archs)) != len(archs) or (None in archs and len(archs) > 1):
        raise ConfigError(f"{name}: of several digests each must name its own architecture: 'sm_120=<digest>,…'")
    return pins
