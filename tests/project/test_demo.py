"""`make demo`'s script: its good end, and that a step that fails is told and cleaned up after."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from tests.project.shell import ROOT, run


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "docs/demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_passes():
    said = run([sys.executable, "docs/demo.py"])
    for step in ("build", "verify the registry", "serve", "prefetch sm_120 over HTTP", "ask for an unknown index"):
        assert f"│ {step} " in said
    assert "FAILED" not in said and said.rstrip().endswith("All steps passed.")


@pytest.fixture
def demo(monkeypatch):
    """The demo's module with a build that costs nothing; its server is real, and remembered in `started`."""
    demo = load()
    monkeypatch.setattr(demo, "build", lambda registry, archs: ("nothing", {"sm_120": "0" * 64}))
    monkeypatch.setattr(demo, "check_registry", lambda registry: ("not looked at", None))
    monkeypatch.setattr(demo, "READY_S", 3)
    demo.started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if self.args[1:3] == ["-m", "server"]:
                demo.started.append(self)

    monkeypatch.setattr(demo.subprocess, "Popen", Popen)
    return demo


def test_a_server_that_never_gets_ready_fails_the_demo_and_is_ended(demo, capsys):
    assert demo.main() == 1  # the registry file does not exist, so /readyz stays at 503
    said = capsys.readouterr().out
    assert "FAILED: the server did not become ready" in said and "The demo FAILED." in said
    (server,) = demo.started
    assert server.poll() is not None


def test_a_prefetch_that_fails_fails_the_demo(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "wait_ready", lambda url, process, log: demo_ready(url, process))
    assert demo.main() == 1
    assert "FAILED: `-m runtime prefetch …` exited" in capsys.readouterr().out
    (server,) = demo.started
    assert server.poll() is not None


def demo_ready(url, process):
    assert process.poll() is None
    return f"{url} is taken as ready", None


def test_wrong_bytes_in_the_cache_are_seen(demo, monkeypatch, tmp_path):
    def pretend(*arguments, env):
        (tmp_path / ("0" * 64)).write_bytes(b"not these")
        return subprocess.CompletedProcess(["python", *arguments], 0, "", "")

    monkeypatch.setattr(demo, "module", pretend)
    with pytest.raises(demo.StepError, match="wrong content"):
        demo.prefetch("sm_120", {}, tmp_path)
    with pytest.raises(demo.StepError, match="accepted"):
        demo.refuse_other_digest("sm_120", {})
