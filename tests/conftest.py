"""What all rooms' tests share on the command line: whether kernels are executed anew (`tests/kernels/executed.py`)."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "execute kernels that have no record and the tenth that the commit picks, or all, which writes records"
    parser.addoption("--executed", choices=("new", "all"), default="new", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.executed == "all" and not hasattr(config, "workerinput"):
        given = config.option
        if given.keyword or given.markexpr or given.deselect or any("::" in arg for arg in config.args):
            raise pytest.UsageError("--executed all records whole test files: it takes no -k, -m, --deselect or ::")
        config.pluginmanager.register(Recorder(), "executed")


class Recorder:
    """Writes the records of what passed; in the process that sees all reports."""

    def __init__(self) -> None:
        self.passed: set[tuple[str, ...]] = set()
        self.failed: set[tuple[str, ...]] = set()
        self.broken: set[str] = set()  # modules of tests that failed before they knew their variant

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = [tuple(value) for name, value in report.user_properties if name == "executed"]
        if report.failed:
            self.failed.update(found)
            if not found:
                self.broken.add(report.nodeid.split("::")[0])
        elif report.passed and report.when == "call":
            self.passed.update(found)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or session.shouldstop:
            return
        from tests.kernels.executed import Ledger, Record

        broken = {name.removesuffix(".py").replace("/", ".") for name in self.broken}
        sound = (Record(*fields) for fields in self.passed - self.failed)
        Ledger.read().write(record for record in sound if record.module not in broken)
