"""The Makefile chooses the interpreter and PyTorch as README says. Nothing is installed: make only tells its plan."""

import sys
from pathlib import Path

from tests.project.shell import ROOT, attempt, environment, run

NO_GPU = "No devices were found"


def install_line(target: str, tmp_path: Path, *settings: str, nvidia_smi: str = NO_GPU) -> str:
    """The pip command that make would run for a target in a new environment, where nvidia-smi prints that line."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{nvidia_smi}'\n")
    tool.chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{environment()['PATH']}")
    command = ["make", "--dry-run", target, f"VENV={tmp_path}/none", f"PYTHON={sys.executable}", *settings]
    (line,) = [line for line in run(command, env=env).splitlines() if " install " in line and " -e " in line]
    return line


def test_demo_installs_torch_only_beside_a_gpu(tmp_path):
    gpu = "GPU 0: NVIDIA GeForce RTX 5090 (UUID: GPU-0)"
    assert "'torch==2.13.0'" in install_line("demo", tmp_path, nvidia_smi=gpu)
    assert "torch=" not in install_line("demo", tmp_path)


def test_test_always_installs_the_torch_that_was_asked_for(tmp_path):
    assert "'torch==2.13.0'" in install_line("test", tmp_path)
    assert "'torch==9.9'" in install_line("test", tmp_path, "TORCH=torch==9.9")


def test_the_default_interpreter_is_new_enough():
    (line,) = run(["make", "--dry-run", "--always-make", ".venv/.created"]).splitlines()[-3:-2]
    python = line.split()[0]
    run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"])


def test_old_or_missing_interpreters_are_refused_in_words(tmp_path):
    old = tmp_path / "python3.9"
    pretend = "import sys; sys.version_info = (3, 9, 0, 'final', 0); sys.version = '3.9.0 '; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    for python, said in ((str(old), "is Python 3.9.0; 3.11 or newer is needed"), ("/no/python", "no /no/python here")):
        done = attempt(["make", f"{venv}/.created", f"VENV={venv}", f"PYTHON={python}"])
        assert done.returncode != 0 and said in done.stderr
    assert not venv.exists()


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().splitlines()[-1] == "exec make test"
