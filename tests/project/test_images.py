"""docker/ and compose.yaml without a Docker engine.

Each Dockerfile's own install and start commands run in a clean virtual environment, on the files that COPY names.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.store import Store
from tests.project.shell import (
    ROOT,
    attempt,
    environment,
    exec_form,
    free_port,
    instructions,
    only,
    run,
    stage,
)

SERVER, BUILDER = (instructions(ROOT / f"docker/Dockerfile.{name}") for name in ("server", "builder"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
HUGGING_FACE = "kernels==0.17.2"
ROOMS = ("runtime", "registry", "server")

# Two environments serve all of this file, so it runs in one process.
pytestmark = pytest.mark.xdist_group("images")


def pip_line(pairs: list[tuple[str, str]]) -> str:
    """The RUN instruction that installs."""
    (line,) = [rest for name, rest in pairs if name == "RUN" and rest.startswith("pip install ")]
    return line


def venv_environment(venv: Path) -> dict[str, str]:
    """As in a shell with the environment activated: `pip` and `python` are its own."""
    return environment(PATH=f"{venv / 'bin'}:{os.environ['PATH']}")


def moved(words: list[str], data: Path, port: int = 0) -> list[str]:
    """An image's command for this machine: its volume is `data`, its port a free one, and only loopback listens."""
    places = {"/data/": f"{data}/", "0.0.0.0": "127.0.0.1", "8000": str(port)}
    for image, here in places.items():
        words = [word.replace(image, here) for word in words]
    return words


def install(pairs: list[tuple[str, str]], folder: Path) -> Path:
    """A clean environment, `folder`/venv, after the image's RUN pip install in `folder`/app."""
    run([sys.executable, "-m", "venv", folder / "venv"])
    stage(pairs, folder / "app")
    run(["sh", "-c", pip_line(pairs)], env=venv_environment(folder / "venv"), cwd=folder / "app")
    return folder / "venv"


def names(venv: Path) -> set[str]:
    """The distributions in an environment."""
    return {item["name"] for item in json.loads(run([venv / "bin/pip", "list", "--format=json"]))}


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """The server image's environment."""
    return install(SERVER, tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def builder_venv(tmp_path_factory):
    """The builder image's environment, beside its sources in `app`."""
    return install(BUILDER, tmp_path_factory.mktemp("builder"))


@pytest.fixture(scope="module")
def data(builder_venv, tmp_path_factory):
    """The volume, filled by the builder image's start command; one variant is enough here."""
    data = tmp_path_factory.mktemp("data")
    command = moved(exec_form(only(BUILDER, "CMD")), data)
    # `env` looks the command up in the PATH that it is given, as a container's start does.
    run(
        ["env", *command, "--only", "fwd-bf16-d64-dv64-m64-n64-*"],
        env=venv_environment(builder_venv),
        cwd=builder_venv.parent / "app",
    )
    return data


@contextlib.contextmanager
def serving(venv: Path, data: Path, log: Path) -> Iterator[tuple[str, int]]:
    """The server image's CMD on a free port; ended on the way out."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            moved(exec_form(only(SERVER, "CMD")), data, port),
            env=venv_environment(venv),
            cwd=data,
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + 30
        while status(f"http://127.0.0.1:{port}/livez") is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", port
    finally:
        process.terminate()
        process.wait(timeout=20)


def status(url: str) -> int | None:
    """The HTTP status, None where nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.parametrize("pairs", [SERVER, BUILDER], ids=["server", "builder"])
def test_images_are_not_root_and_pinned(pairs):
    assert only(pairs, "USER") == "10001:10001"
    assert only(pairs, "FROM").startswith("python:3.") and only(pairs, "VOLUME") == "/data"


def test_hadolint_has_nothing_to_say():
    run([Path(sys.executable).parent / "hadolint", *sorted((ROOT / "docker").glob("Dockerfile.*"))])


@pytest.mark.parametrize("pairs", [SERVER, BUILDER], ids=["server", "builder"])
def test_dockerignore_lets_in_what_is_copied(pairs):
    ignored, *admitted = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    copied = {source for name, rest in pairs if name == "COPY" for source in rest.split()[:-1]}
    assert ignored == "*" and copied <= {line[1:] for line in admitted if line.startswith("!")}


def test_server_image_has_neither_builder_nor_kernels():
    copied = " ".join(rest for name, rest in SERVER if name == "COPY").split()
    assert not {"builder", "kernels", "."} & set(copied)


def test_server_environment_has_no_compiler(venv):
    installed = names(venv)
    assert {"cubinery", "fastapi", "sqlite-utils"} <= installed
    assert not {name for name in installed if name.startswith(("torch", "nvidia-", "triton", "numba"))}


def test_server_starts_and_gets_ready_when_the_builder_has_finished(venv, data, tmp_path):
    check = exec_form(only(SERVER, "HEALTHCHECK"))
    with serving(venv, tmp_path, tmp_path / "log") as (url, port):  # an empty volume
        assert status(f"{url}/livez") == 200 and status(f"{url}/readyz") == 503
        assert attempt(moved(check, tmp_path, port), env=venv_environment(venv)).returncode != 0
    with serving(venv, data, tmp_path / "log") as (url, port):
        assert status(f"{url}/readyz") == 200
        run(moved(check, data, port), env=venv_environment(venv))


def test_builder_environment_has_the_compiler_and_no_torch(builder_venv):
    installed = names(builder_venv)
    assert {"cubinery", "nvidia-cutlass-dsl", "nvidia-nvjitlink-cu12", "sqlite-utils"} <= installed
    assert not {"torch", "fastapi"} & installed


def test_builder_image_fills_the_volume(data):
    """One cubin for sm_120, in an index that the channel names."""
    with Store(data / "registry.db", readonly=True) as store:
        (artifact,) = store.artifacts().values()
        assert artifact.arch == "sm_120" and set(store.channel("stable")) == {"sm_120"}
        assert store.verify() == []


def service(name: str) -> dict[str, Any]:
    found = COMPOSE["services"][name]
    assert isinstance(found, dict)
    return found


def test_compose_starts_builder_and_server_on_one_volume():
    assert set(COMPOSE["services"]) == {"builder", "server"} and set(COMPOSE["volumes"]) == {"registry"}
    for name in COMPOSE["services"]:
        one = service(name)
        assert one["read_only"] is True and one["user"] == "10001:10001" and one["tmpfs"] == "/tmp"
        assert one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"]
        assert one["volumes"] == ["registry:/data"]
        assert (ROOT / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
        assert not {"command", "entrypoint"} & set(one)  # the Dockerfile's CMD, tested above, is what runs


def test_compose_serves_on_loopback_and_builds_once():
    server, builder = service("server"), service("builder")
    assert server["ports"] == ["${CUBINERY_BIND:-127.0.0.1}:${CUBINERY_PORT:-8000}:8000"]
    assert server["restart"] == "unless-stopped" and builder["restart"] == "no"
    assert server["healthcheck"]["test"] == ["CMD", *exec_form(only(SERVER, "HEALTHCHECK"))]


def files_of(venv: Path, distribution: str) -> set[str]:
    """What pip recorded as installed, byte code aside."""
    code = "import sys, importlib.metadata as m; print(*m.files(sys.argv[1]), sep='\\n')"
    said = run([venv / "bin/python", "-c", code, distribution], cwd=venv)
    return {line for line in said.splitlines() if "__pycache__" not in line}


def test_lives_beside_hugging_face_kernels_in_both_orders(venv, wheel):
    pip, python = venv / "bin/pip", venv / "bin/python"
    ours = [python, "-c", f"import {', '.join(ROOMS)}; from registry import contract; runtime.flash_attn"]
    theirs = [python, "-c", "import kernels; kernels.get_kernel"]
    # Wheel first.
    run([pip, "install", "--quiet", "--no-deps", "--force-reinstall", wheel])
    run([pip, "install", "--quiet", HUGGING_FACE])
    assert not files_of(venv, "cubinery") & files_of(venv, "kernels")
    run([*ours[:2], f"import kernels; {ours[2]}"], cwd=venv)
    run([pip, "uninstall", "--quiet", "--yes", "cubinery"])
    run(theirs, cwd=venv)
    # Hugging Face's first.
    run([pip, "install", "--quiet", "--no-deps", wheel])
    assert not files_of(venv, "cubinery") & files_of(venv, "kernels")
    run([*ours[:2], f"import kernels; {ours[2]}"], cwd=venv)
    run([pip, "uninstall", "--quiet", "--yes", "kernels"])
    run(ours, cwd=venv)
    assert attempt(theirs, cwd=venv).returncode != 0
