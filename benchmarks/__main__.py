"""python -m benchmarks: all that stands in `results/`, one after the other; one that fails does not stop the rest."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import ROOT

NAMES = ("forward", "host_overhead", "cold_start")


def main(argv: list[str] | None = None) -> int:
    """Run each in a process of its own, with the same arguments (e.g. --registry PATH); 1 if any failed."""
    arguments = sys.argv[1:] if argv is None else argv
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
