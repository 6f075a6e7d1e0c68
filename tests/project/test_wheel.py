"""What the wheel and the sdist hold."""

import re
import tarfile
import zipfile
from email.parser import HeaderParser

import pytest

from tests.project.shell import ROOT

PACKAGES = ("registry", "runtime", "server")

pytestmark = pytest.mark.xdist_group("images")  # beside the other user of the built wheel


def test_wheel_holds_three_packages_and_metadata(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("cubinery-0.1.0.dist-info/")]
    tracked = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in tracked if "__pycache__" not in path.parts}
    assert set(names) == expected and len(names) == len(expected)
    assert all(any(name.startswith(f"{package}/") for name in names) for package in PACKAGES)


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    head = HeaderParser().parsestr(archive.read("cubinery-0.1.0.dist-info/METADATA").decode())
    assert head["Requires-Python"] == ">=3.11" and head["License-Expression"] == "Apache-2.0"
    assert set(head.get_all("Provides-Extra") or ()) == {"torch", "remote", "serve", "release", "build"}
    base = {re.match(r"[\w-]+", line)[0] for line in head.get_all("Requires-Dist") or () if "extra ==" not in line}
    assert base == {"cuda-bindings", "platformdirs", "backports-zstd"}
    assert b"Apache License" in archive.read("cubinery-0.1.0.dist-info/licenses/LICENSE")


def test_sdist_is_the_checkout(dist):
    (path,) = dist.glob("cubinery-0.1.0.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    needed = {"Makefile", "compose.yaml", "kernels/dispatch.py", "builder/__main__.py", "docs/demo.py", "LICENSE"}
    assert needed <= names and not [name for name in names if name.endswith((".db", ".pyc"))]
