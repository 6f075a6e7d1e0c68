"""`python -m registry`: output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from registry.__main__ import main
from registry.contract import Artifact
from registry.store import Store
from tests.registry.samples import KEYS, fill, ptx


@pytest.fixture
def registry(tmp_path, monkeypatch):
    path = tmp_path / "r.db"
    monkeypatch.setenv("CUBINERY_REGISTRY", str(path))
    with Store(path) as store:
        fill(store, KEYS[:2])
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_ls(registry, run):
    with Store(registry, readonly=True) as store:
        channels, artifacts = store.channels(), store.artifacts()
    code, out, _ = run("ls")
    assert code == 0
    for text in (str(registry), "stable", *channels["stable"].values(), *KEYS[:2], "4 artifacts"):
        assert text in out
    code, out, _ = run("ls", "--json", "--registry", registry)
    value = json.loads(out)
    assert (code, value["channels"], value["path"]) == (0, channels, str(registry))
    assert value["counts"]["artifacts"] == len(value["artifacts"]) == 4
    assert set(value["indexes"]) == set(channels["stable"].values())
    listed = {a.pop("fingerprint"): Artifact.from_json(a) for a in value["artifacts"]}
    assert listed == artifacts


def test_show_each_kind(registry, run):
    with Store(registry, readonly=True) as store:
        digest = store.channel("stable")["sm_120"]
        body = store.get_index(digest)
        fingerprint, a = next(
            (f, a) for f, a in store.artifacts().items() if a.variant == KEYS[0] and a.arch == "sm_120"
        )
    expected = [
        ("stable", "channel", digest, {"sm_120": digest}),
        (digest, "index", f"index {digest}: sm_120", json.loads(body)),
        (digest[:8], "index", "serves a call when", json.loads(body)),
        (KEYS[0], "artifacts", a.cubin_sha256, None),
        (fingerprint, "artifacts", a.cubin_sha256, None),
        (a.cubin_sha256[:12], "artifacts", a.cubin_sha256, None),
        (a.frame_sha256, "artifacts", a.cubin_sha256, None),
        (a.ptx_sha256, "ptx", ptx(KEYS[0]), ptx(KEYS[0])),
    ]
    for what, kind, text, value in expected:
        code, out, _ = run("show", what)
        assert (code, text in out) == (0, True), what
        code, out, _ = run("show", what, "--json")
        shown = json.loads(out)
        assert (code, shown["kind"]) == (0, kind)
        if kind == "channel":
            assert shown["value"]["sm_120"] == digest
        elif kind == "artifacts":
            assert {"fingerprint": fingerprint, **json.loads(json.dumps(a.to_json()))} in shown["value"]
        else:
            assert shown["value"] == value


def test_show_what_is_not_there(registry, run):
    for what in ("nightly", "0" * 64, "fwd-bf16-d1-dv1", ""):
        code, out, err = run("show", what)
        assert (code, out) == (1, "")
        assert "[not_found]" in err


def test_verify(registry, run):
    code, out, _ = run("verify")
    assert (code, "sound" in out) == (0, True)
    with Store(registry) as store:
        store._db.execute("UPDATE blobs SET frame = x'00'")
    code, out, _ = run("verify")
    assert (code, "another hash" in out, "sound" in out) == (1, True, False)
    code, out, _ = run("verify", "--json")
    assert (code, len(json.loads(out)["problems"]) > 0) == (1, True)


def test_files_that_cannot_be_read(tmp_path, run):
    code, out, err = run("ls", "--registry", tmp_path / "none.db")
    assert (code, out) == (2, "")
    assert "[missing]" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["frob"], ["show"], ["ls", "--nope"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "--help"], ["show", "--help"], ["verify", "--help"]])
def test_help_states_the_exit_codes(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "exit codes" in capsys.readouterr().out


def test_as_a_module_into_a_closed_pipe(registry):
    command = [sys.executable, "-m", "registry", "ls", "--json"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
