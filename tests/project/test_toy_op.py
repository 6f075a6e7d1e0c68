"""How much a new op costs: one is added to a copy of the checkout, and does all that an op does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.checkout import Checkout, Edit, both, insert

TOY = Path(__file__).with_name("toy_op")  # the new files, each with .txt behind its name
MOST = 8  # existing files that a new op may touch, generated ones included


# The tables of files of the folders that get one.
TABLE = re.compile(r"(\n##+ (?:registry/ops|runtime/api|runtime/call)\n.*?\n\|---\|---\|\n)", re.DOTALL)
EDITS: dict[str, Edit] = {
    "registry/ops/catalogue.py": insert('"bwd_preprocess"', '"toy_scale", '),
    "runtime/__init__.py": both(insert("    from runtime.api.varlen", "    from runtime.api.toy import toy_scale\n"),
                                both(insert('"ledger"]', '"toy_scale", '),
                                     insert('    "api.varlen":', '    "api.toy": "toy_scale",\n'))),
    "runtime/call/autograd.py": both(insert("from runtime.call import", "from runtime.call import toy\n"),
                                     insert('"bwd": backward.gradients', '"toy_scale": toy.gradients, ')),
    "tests/gpu/conformance.json": insert('    "bwd_preprocess"', '    "toy_scale": [],\n'),
    "docs/design.md": lambda source: TABLE.sub(r"\1| `toy.py`, `toy_scale.py` | a toy |\n", source),
}  # fmt: skip


def test_a_toy_op_from_its_description_to_a_public_function(tmp_path):
    checkout = Checkout(tmp_path / "checkout")
    checkout.add(TOY)
    checkout.edit(EDITS)
    checkout.python("-m", "tests.project.described")
    touched = checkout.touched()
    assert touched == set(EDITS) and len(touched) <= MOST
    registry = tmp_path / "toy.db"
    checkout.python("-m", "builder", "--arch", "sm_120", "--op", "toy_scale", "--registry", registry)
    assert "the toy op works" in checkout.python("-m", "tests.toy_program", registry)
    told = checkout.python("-m", "runtime", "explain", "--op", "toy_scale", "--arch", "sm_120", "--head-dim", "64",
                           "--registry", registry, "--json")  # fmt: skip
    assert json.loads(told)["variant"] == "toy_scale-bf16-d256-dv256-m4"
    # what no new op may break: layers, descriptions in the documents, the names of tests on the GPU
    checkout.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/project/test_described.py",
                    "tests/kernels/test_validity.py")  # fmt: skip
    checkout.lint_imports()
