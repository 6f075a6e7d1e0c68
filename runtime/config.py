"""Settings: `configure(...)` over environment over configuration file over defaults, frozen into one Config."""

import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from registry.contract import ContractError, check_arch, check_digest
from runtime.errors import ConfigError

CACHE_LIMIT = 4 << 30  # bytes that the disk cache may hold by default
MAX_FILE = 1 << 16  # bytes of a configuration file
Pins = tuple[tuple[str | None, str], ...]  # (architecture, index digest); architecture None: whatever the index says


class Config(NamedTuple):
    """registry: a file's or folder's path or an http(s) URL. pins: index digests that were given. cache: the disk
    cache's folder, '' for the user's: who needs none needs no home folder either.

    channel: which of the registry's channels. offline: never open a connection. root: the file of the trusted TUF root,
    '' for none. state: the folder of what was trusted last, '' for the user's. max_age: seconds after which that must
    be asked for again, None for never. lock: the lock file, '' for none. cache_limit: bytes that the cache may hold.
    """

    registry: str
    pins: Pins
    cache: str
    channel: str
    offline: bool
    root: str = ""
    state: str = ""
    max_age: float | None = None
    lock: str = ""
    cache_limit: int = CACHE_LIMIT

    @property
    def remote(self) -> bool:
        return "://" in self.registry

    @property
    def cache_folder(self) -> str:
        return self.cache or _user_folder("user_cache_dir")

    @property
    def state_folder(self) -> str:
        return self.state or _user_folder("user_state_dir")


_given: dict[str, Any] = {}


def give(**settings: Any) -> None:
    """Take over what `configure` was given; None leaves a setting to the environment. Raises ConfigError, changing
    nothing."""
    given = {name: _READERS[name](value, name) for name, value in settings.items() if value is not None}
    _given.clear()
    _given.update(given)


def current() -> Config:
    """The settings as they stand now. Raises ConfigError for an environment variable that cannot be used."""
    found = _from_file() | _from_environment() | _given
    return Config(
        registry=found.get("registry") or default_registry(),
        pins=found.get("index", ()),
        cache=found.get("cache", ""),
        channel=found.get("channel", "stable"),
        offline=found.get("offline", False),
        root=found.get("root", ""),
        state=found.get("state", ""),
        max_age=found.get("max_age"),
        lock=found.get("lock", ""),
        cache_limit=found.get("cache_limit", CACHE_LIMIT),
    )


def _from_environment() -> dict[str, Any]:
    """What CUBINERY_<NAME> says of each setting; an empty variable says nothing."""
    texts = {name: (f"CUBINERY_{name.upper()}", os.environ.get(f"CUBINERY_{name.upper()}")) for name in _READERS}
    return {name: _FROM_TEXT.get(name, _READERS[name])(text, key) for name, (key, text) in texts.items() if text}


def _from_file() -> dict[str, Any]:
    """The settings of the configuration file: CUBINERY_CONFIG, which must then exist, or the user's.

    It decides what is trusted, so others must not be able to write it. Paths in it count from its folder.
    """
    named = os.environ.get("CUBINERY_CONFIG")
    # As platformdirs has it on Linux: most processes need that package for nothing else.
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = named or os.path.join(folder, "cubinery", "config.toml")
    if not named and not (os.path.isabs(path) and os.path.exists(path)):
        return {}
    path = os.path.abspath(path)
    data = read_trusted(path, "the configuration file", MAX_FILE)
    import tomllib  # here: few processes have such a file

    try:
        values = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from None
    if not values.keys() <= _READERS.keys():
        unknown = ", ".join(sorted(values.keys() - _READERS.keys()))
        raise ConfigError(f"{path}: has {unknown:.200}; accepted: {', '.join(_READERS)}")
    beside = os.path.dirname(path)
    for name in _PATHS & values.keys():
        if isinstance(values[name], str) and values[name] and "://" not in values[name]:
            values[name] = os.path.join(beside, values[name])
    return {name: _READERS[name](value, f"{path}: {name}") for name, value in values.items()}


def read_trusted(path: str, what: str, cap: int) -> bytes:
    """All of a file that decides what is trusted. ConfigError if it cannot be read, if others could have written it, or
    if it is longer than `cap` bytes."""
    try:
        with open(path, "rb") as file:
            facts, data = os.fstat(file.fileno()), file.read(cap + 1)
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror})") from None
    if facts.st_uid not in (os.geteuid(), 0) or facts.st_mode & 0o022:
        raise ConfigError(f"{what}: {path} must be a file that you or root own and nobody else can write (chmod go-w)")
    if len(data) > cap:
        raise ConfigError(f"{what}: {path} is longer than {cap} bytes")
    return data


def default_registry() -> str:
    """The embedded registry when nothing names another: registry.db in the user's data folder, as the builder's."""
    return os.path.join(_user_folder("user_data_dir"), "registry.db")


def _user_folder(which: str) -> str:
    import platformdirs  # here: a configured process never needs it

    try:
        folder: str = getattr(platformdirs, which)("cubinery")
    except RuntimeError:  # of newer releases; older ones leave the '~'
        folder = "~"
    if not os.path.isabs(folder):  # HOME is not set, and no passwd entry says where it is
        setting, variable = _FOLDERS[which]
        message = (
            f"{setting}: {variable} is not set, and this user has no home folder; set it, or HOME, or "
            f"runtime.configure({setting}=…)"
        )
        raise ConfigError(message)
    return folder


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
        folder = "/" if len(text) > 1 and text.endswith("/") else ""  # which says that it is one, whatever is there now
        return os.path.abspath(text) + folder if text else ""
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


def _folder(value: Any, name: str) -> str:
    return os.path.abspath(_text(value, name, "a folder's path"))


def _file(value: Any, name: str) -> str:
    return os.path.abspath(_text(value, name, "a file's path"))


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r:.100} is neither True nor False")
    return value


def _seconds(value: Any, name: str) -> float:
    try:
        seconds = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{name}: {value!r:.100} is not a number of seconds, 0 or more")
    return seconds


def _nbytes(value: Any, name: str) -> int:
    """Bytes: a number, or a text like '512M' with K, M, G or T for powers of 1024."""
    found = re.fullmatch(r"(\d{1,15})([KMGT]?)", value.strip()) if isinstance(value, str) else None
    if found:
        return int(found[1]) << 10 * " KMGT".index(found[2] or " ")
    if type(value) is not int or value < 0:
        raise ConfigError(f"{name}: {value!r:.100} is not a number of bytes, 0 or more, or a text like '512M' or '4G'")
    return value


def _flag_of(text: str, name: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise ConfigError(f"{name}: {text!r:.100} is none of 0, 1, false, true")
    return text.lower() in ("1", "true")


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "registry": lambda value, name: _registry(_text(value, name, "a file's or folder's path or an http(s) URL")),
    "index": _pins,
    "cache": _folder,
    "channel": lambda value, name: _text(value, name, "a channel's name"),
    "offline": _flag,
    "root": _file,
    "state": _folder,
    "max_age": _seconds,
    "lock": _file,
    "cache_limit": _nbytes,
}
# platformdirs' name -> the setting that takes its place, and the variable.
_FOLDERS = {
    "user_data_dir": ("registry", "CUBINERY_REGISTRY"),
    "user_cache_dir": ("cache", "CUBINERY_CACHE"),
    "user_state_dir": ("state", "CUBINERY_STATE"),
}
_FROM_TEXT = {"offline": _flag_of}  # where a text is read in another way
_PATHS = {"registry", "cache", "root", "state", "lock"}
