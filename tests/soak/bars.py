"""What the soak runs: issue 6's bars, each as the tests that prove it."""

from __future__ import annotations

from typing import NamedTuple


class Bar(NamedTuple):
    """tests: pytest's arguments. small and full: how much these tests do under `make test` and `make soak`.

    alone: it measures times, so nothing runs beside it.
    """

    number: int
    tests: tuple[str, ...]
    small: str
    full: str
    alone: bool = False


BARS: dict[str, Bar] = {
    "flips": Bar(1, ("tests/trust/test_flips.py",), "40 bits of each file", "every bit of every file"),
    "threats": Bar(1, ("tests/fuzz/test_threats.py",), "every threat", "every threat"),
    "kill_registry": Bar(
        2,
        ("tests/registry/test_kill.py",),
        "60 kills in builder, publish, gc and export",
        "500 kills: 125 each in builder, publish, gc and export",
    ),
    "kill_client": Bar(
        2,
        ("tests/runtime/test_cache_processes.py::test_kill_9_in_the_middle_of_writing_leaves_whole_entries",),
        "60 kills",
        "500 kills",
    ),
    "faults": Bar(
        2,
        ("tests/runtime/test_cache.py", "tests/trust/test_state.py"),
        "EIO and ENOSPC at each call of the cache and of the state",
        "the same",
    ),
    "cold_start": Bar(
        3,
        (
            "tests/runtime/test_cache_processes.py::test_many_processes_starting_cold_download_each_kernel_once",
            "tests/runtime/test_cache_processes.py::test_without_working_locks_a_cold_start_still_succeeds",
            "tests/runtime/test_cache_processes.py::test_processes_that_share_a_small_cache_take_each_others_entries_away",
        ),
        "64 processes, 100 kernels; without locks 8 and 10",
        "64 processes, 100 kernels, with and without locks",
    ),
    "refresh": Bar(
        3,
        ("tests/trust/test_live.py::test_processes_that_refresh_at_once_neither_fail_nor_go_back",),
        "16 processes, 2 refreshes each",
        "16 processes, 40 refreshes each",
    ),
    "conformance": Bar(
        4,
        ("tests/trust/test_conformance.py", "tests/trust/test_conformance_keys.py"),
        "every case that applies",
        "the same",
    ),
    "parsers": Bar(
        5,
        ("tests/fuzz/test_parsers.py",),
        "5,000 cases of each of 4 parsers and 2 engines; 150 examples of hypothesis's",
        "200,000 cases of each of 4 parsers and 2 engines; 5,000 examples of hypothesis's",
    ),
    "bombs": Bar(5, ("tests/fuzz/test_bombs.py",), "every kind, up to 1 GiB", "the same"),
    "warm_load": Bar(6, ("tests/benchmarks/test_warm_load.py",), "300 loads", "5000 loads", alone=True),
}
