"""Variants → PTX → cubins → store: compiles the dispatch table on a machine with no GPU. See `python -m builder -h`."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout: `kernels` and `registry` must lie beside `builder`


def misplaced(name: str, root: Path = ROOT) -> str | None:
    """Why `import name` would not give the package beside the builder, or None. Other projects own the same names."""
    spec = find_spec(name)
    expected = root / name / "__init__.py"
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == expected:
        return None
    found = "nowhere" if spec is None else spec.origin or f"a namespace package {spec.submodule_search_locations}"
    return (
        f"`import {name}` finds {found}, the builder needs {expected}: "
        f"run it in a checkout of cubinery (cd {root}), with that folder first on sys.path"
    )
