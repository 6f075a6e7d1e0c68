"""The distribution, built once."""

import sys

import pytest

from tests.project.shell import run


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "--directory", folder])
    return folder


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = dist.glob("cubinery-0.1.0-py3-none-any.whl")
    return path
