"""Every command and every line of Python in the pages for people is one that works.

Those of docs/decode.md, training.md, settings.md, trust.md and care.md are run, by test_kvcache_docs.py,
test_training_docs.py and test_settings.py of tests/runtime, tests/trust/test_document.py and
tests/registry/test_care_page.py; here their names and links count. tests/runtime/test_compatibility.py calls what
docs/compatibility.md says.
"""

import ast
import inspect
import pkgutil
import re
import shlex
import sys
import tomllib

import pytest

from runtime.config import _READERS as READERS
from tests.project.shell import ROOT, run

CHECKED = (ROOT / "README.md", ROOT / "docs/operations.md")
NAMED = ("settings", "decode", "training", "compatibility", "trust", "care")
PAGES = (*CHECKED, *(ROOT / f"docs/{name}.md" for name in NAMED))
TEXT = {page: page.read_text() for page in PAGES}
README = TEXT[CHECKED[0]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = ("builder", "registry", "server", "runtime")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of console blocks, and what stands between backticks and begins with one of the project's commands."""
    block_lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:make|pip|python -m|docker) [^`]+)`", prose)
    return list(dict.fromkeys(block_lines + inline))


COMMANDS = sorted({command for page in CHECKED for command in commands(TEXT[page])})
PYTHON = [block for page in CHECKED for block in blocks(TEXT[page], "python")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_set_up_is_exactly_two_commands():
    set_up = README.split("\n## Set up\n")[1].split("\n## ")[0]
    assert [line for block in blocks(set_up, "console") for line in block.splitlines()] == ["make demo", "make test"]


def test_every_command_has_a_check():
    known = (
        "make ",
        "pip install ",
        "docker compose ",
        *(f"python -m {name}" for name in (*MODULES, "tests.gpu.plant_race", "tests.gpu.verify", "benchmarks")),
    )
    assert COMMANDS and not [command for command in COMMANDS if not command.startswith(known)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_the_target(command):
    targets = [word for word in words_of(command)[1:] if "=" not in word]
    assert targets
    for target in targets:
        # Up to date or not, a target that exists is no error for --dry-run.
        run(["make", "--dry-run", target])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip ")])
def test_pip_installs_extras_that_exist(command):
    (requirement,) = [word for word in words_of(command)[2:] if not word.startswith("-")]
    name, extras = re.fullmatch(r"(\.|cubinery)\[([\w,]+)\]", requirement).groups()
    assert name == "." or name == PROJECT["project"]["name"]
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("docker ")])
def test_docker_commands_are_of_compose(command):
    assert words_of(command)[:3] in (["docker", "compose", "up"], ["docker", "compose", "run"])
    assert (ROOT / "compose.yaml").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_options_exist(command):
    """The command's module and sub-command answer --help, and the help lists every option that the page uses."""
    words = words_of(command)
    subcommand = [word for word in words[3:4] if not word.startswith("-")]
    usage = run([sys.executable, *words[1:3], *subcommand, "--help"])
    for option in [word.split("=")[0] for word in words if word.startswith("--")]:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", usage), f"{option} is not in\n{usage}"


@pytest.mark.parametrize("block", PYTHON)
def test_python_binds_to_the_signatures(block):
    """Names exist and their arguments bind; the GPU is not needed for that."""
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert calls
    for call in calls:
        name = ast.unparse(call.func)
        assert name.startswith("runtime.")
        signature = inspect.signature(pkgutil.resolve_name(name))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """So do the pages that are named without a link."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)|`([\w-]+\.md)`", TEXT[page])
    assert [target for found in targets for target in found if not (page.parent / target).exists()] == []


def test_environment_variables_are_read_somewhere():
    named = {name for text in TEXT.values() for name in re.findall(r"\bCUBINERY_[A-Z_]+\b", text)}
    named -= {f"CUBINERY_{name.upper()}" for name in READERS}  # names that runtime.config puts together
    tracked = [path for name in (*MODULES, "tests/gpu") for path in (ROOT / name).rglob("*.py")]
    sources = "".join(path.read_text() for path in [*tracked, ROOT / "compose.yaml"])
    assert named and not [name for name in named if name not in sources]
