"""`python -m tests.kernels.compile REGISTRY KEY...`: what `python -m builder` does, for these variants alone."""

import sys
from pathlib import Path

from builder.build import Build, Table
from registry.store import Store


def main(path: str, *keys: str) -> int:
    with Store(Path(path)) as store:
        build = Build(Table.ours(), ["sm_120"], store)
        result = build.run(lambda variant: variant.key in keys, jobs=2, allow_partial=True)
    for key, why in result.failed.items():
        print(f"{key}: {why}", file=sys.stderr)
    return 1 if result.failed or result.variants != len(set(keys)) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
