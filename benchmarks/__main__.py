"""All that stands in `results/`, one after the other; one that fails does not stop the rest.

CUBINERY_REGISTRY=registry.db python -m benchmarks
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import measure

NAMES = ("forward", "backward", "shapes", "decode", "prefill", "training", "host_overhead", "cold_start")


def main(argv: list[str] | None = None) -> int:
    """Run each in a process of its own, with the same arguments; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, help="registry file; by default CUBINERY_REGISTRY")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    arguments = [
        "--registry",
        str(measure.registry_path(options.registry).resolve()),
        "--out",
        str(options.out.resolve()),
    ]
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=measure.ROOT, check=False
        ).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
