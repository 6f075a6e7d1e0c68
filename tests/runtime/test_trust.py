"""resolve.resolve: which index may be loaded from where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import runtime
from runtime import config
from runtime.errors import ConfigError, IntegrityError, NoKernelError, SourceError, UntrustedError
from runtime.load import session
from runtime.sources.remote import HttpSource, OfflineSource
from runtime.sources.source import EmbeddedSource
from runtime.trust import resolve
from tests.runtime.fakes import write_registry


def test_a_file_of_our_own_is_local(registry: Path):
    embedded = EmbeddedSource(str(registry))
    assert resolve.why_remote(embedded) is None
    assert resolve.resolve(embedded, "stable") == embedded.channel("stable")


@pytest.mark.parametrize("writable", ["file", "-wal", "-shm", "-journal", "folder", "link's folder"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_remote(registry: Path, tmp_path: Path, writable, mode):
    path = registry
    if writable == "link's folder":
        path = tmp_path / "links" / "r.db"
        path.parent.mkdir()
        path.symlink_to(registry)
        victim = path.parent
    elif writable == "folder":
        victim = registry.parent
    else:
        victim = registry if writable == "file" else Path(f"{registry}{writable}")
        victim.touch()
    victim.chmod(victim.stat().st_mode | mode)
    embedded = EmbeddedSource(str(path))
    with pytest.raises(UntrustedError, match="chmod go-w") as error:
        resolve.resolve(embedded, "stable")
    assert str(victim) in str(error.value) and "configure(index=" in str(error.value)
    (digest,) = embedded.channel("stable").values()
    assert resolve.resolve(embedded, "stable", (("sm_120", digest),)) == {"sm_120": digest}


def test_what_others_own_is_remote(registry: Path, monkeypatch):
    me = os.geteuid()
    if me == 0:
        os.chown(registry, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(UntrustedError, match="belongs to user"):
        resolve.resolve(EmbeddedSource(str(registry)), "stable")


def test_root_s_files_are_local(registry: Path, monkeypatch):
    owner = registry.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert (resolve.why_remote(EmbeddedSource(str(registry))) is None) == (owner == 0)


def test_servers_are_remote():
    for remote in (HttpSource("http://127.0.0.1:9"), OfflineSource("https://r")):
        with pytest.raises(UntrustedError, match="it is a server"):
            resolve.resolve(remote, "stable")


def test_a_missing_file_is_missing_not_untrusted(tmp_path: Path):
    with pytest.raises(SourceError) as error:
        resolve.resolve(EmbeddedSource(str(tmp_path / "none.db")), "stable")
    assert error.value.reason == "no_registry"


def test_a_missing_file_is_not_opened(tmp_path: Path, monkeypatch):
    """Not even if somebody puts one there meanwhile."""
    open_folder = tmp_path / "open"
    for path in (open_folder / "r.db", tmp_path / "absent" / "r.db"):
        open_folder.mkdir(exist_ok=True)
        open_folder.chmod(0o777)
        embedded = EmbeddedSource(str(path))
        assert resolve.why_remote(embedded)
        monkeypatch.setattr(embedded, "channel", lambda name: pytest.fail("opened"))
        with pytest.raises(SourceError) as error:
            resolve.resolve(embedded, "stable")
        assert error.value.reason == "no_registry"
        monkeypatch.setattr(embedded, "check_present", lambda: None)  # there by now
        with pytest.raises(UntrustedError):
            resolve.resolve(embedded, "stable")


def test_a_folder_that_cannot_be_examined_is_remote(registry: Path):
    assert "cannot be examined" in str(resolve.why_remote(EmbeddedSource(str(registry / "r.db"))))


def test_nobody_is_told_to_change_the_mode_of_tmp(tmp_path: Path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    write_registry(folder / "r.db", only="bf16-d64")
    with pytest.raises(UntrustedError, match="move the registry to a folder of your own") as error:
        resolve.resolve(EmbeddedSource(str(folder / "r.db")), "stable")
    assert "chmod" not in str(error.value)


def test_given_digests_are_all_that_counts(backend, tmp_path: Path):
    digests = write_registry(tmp_path / "r.db", "sm_120", "sm_90", only="bf16-d64")
    runtime.configure(registry=tmp_path / "r.db", index=digests["sm_90"])
    assert session.current().digests() == {"sm_90": digests["sm_90"]}
    with pytest.raises(NoKernelError) as error:
        session.current().index_for_device((12, 0))
    assert error.value.reason == "arch"
    runtime.configure(registry=tmp_path / "r.db", index={"sm_120": digests["sm_90"]})
    with pytest.raises(IntegrityError) as mislabelled:
        session.current().index_for_device((12, 0))
    assert mislabelled.value.reason == "index"
    runtime.configure(registry=tmp_path / "r.db", index=dict.fromkeys(digests, digests["sm_90"]))
    assert session.current().index_for_device((9, 0)).arch == "sm_90"
    with pytest.raises(IntegrityError):
        session.current().index_for_device((12, 0))


# -- settings ---------------------------------------------------------------------------------------------------------

A, B = "a" * 64, "b" * 64


def test_configure_stands_over_the_environment_over_the_defaults(monkeypatch, tmp_path: Path):
    from registry.store import default_path

    assert config.current().registry == str(default_path()) and config.current().pins == ()
    assert config.current().cache_folder == str(tmp_path / "home" / "cache" / "cubinery")
    monkeypatch.setenv("CUBINERY_REGISTRY", "https://example.test/kernels/")
    monkeypatch.setenv("CUBINERY_INDEX", f"sm_120={A},sm_90={B}")
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    assert config.current() == config.Config(
        "https://example.test/kernels", (("sm_120", A), ("sm_90", B)), str(tmp_path / "cache"), "stable", False
    )
    runtime.configure(registry=tmp_path / "r.db", index=B, cache="c", channel="nightly", offline=True)
    assert config.current() == config.Config(
        str(tmp_path / "r.db"), ((None, B),), os.path.abspath("c"), "nightly", True
    )
    runtime.configure(index={"sm_120": A})
    assert config.current().pins == (("sm_120", A),) and config.current().remote
    runtime.configure(index="")
    assert config.current().pins == ()
    monkeypatch.setenv("CUBINERY_REGISTRY", "relative.db")
    assert config.current().registry == str(default_path().resolve())


@pytest.mark.parametrize("settings", [
    {"registry": "ftp://x"}, {"registry": "s3://bucket"}, {"registry": "http://"},
    {"registry": "http://host/?a=1"}, {"registry": "http://host/#top"}, {"registry": "http://host /x"},
    {"registry": "http://a\tb"}, {"registry": "a\0b"}, {"cache": "a\0b"},
    {"registry": "http://[half"}, {"registry": "http://host:port"}, {"registry": 3}, {"registry": ""}, {"index": 3},
    {"index": "abc"}, {"index": A.upper()}, {"index": f"sm120={A}"}, {"index": f"{A},{B}"},
    {"index": f"{A},sm_120={B}"}, {"index": {"sm_120": None}},
    {"index": f"sm_120={A},sm_120={B}"}, {"index": "sm_120a=" + A}, {"cache": 1}, {"channel": 2}, {"offline": "yes"},
], ids=str)  # fmt: skip
def test_settings_that_cannot_be_used_change_nothing(registry: Path, settings):
    before = config.current()
    with pytest.raises(ConfigError) as error:
        runtime.configure(**settings)
    assert str(error.value).startswith(next(iter(settings)) + ": ")
    assert config.current() == before


@pytest.mark.parametrize("url", [
    "https://user:secret@host/r", "ftp://user:secret@host", "http://user:se/secret@host", "https://secret@[half",
])  # fmt: skip
def test_a_password_is_refused_and_not_shown(url, monkeypatch):
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as error:
        runtime.configure(registry=url)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("CUBINERY_REGISTRY", url)
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as error:
        config.current()
    assert "secret" not in str(error.value)


def test_an_environment_that_cannot_be_used_is_named(monkeypatch, backend):
    monkeypatch.setenv("CUBINERY_INDEX", "latest")
    with pytest.raises(ConfigError, match="CUBINERY_INDEX"):
        session.current()
    with pytest.raises(TypeError):
        runtime.configure("positional")
