"""select: pure functions of an index and facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.contract import Condition, ContractError, DispatchRow, Index
from runtime import select
from runtime.errors import NoKernelError
from tests.runtime.fakes import TABLE, toy_index

INDEX, _ = toy_index()
FACTS = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "batch": 1, "heads_q": 4, "heads_kv": 4, "seqlen_q": 65,
         "seqlen_k": 65, "group": 1, "causal": 0}  # fmt: skip


def test_the_first_row_that_holds_wins():
    assert select.select(INDEX, "fwd", FACTS).variant == "fwd-bf16-d64-dv64-m128-n64-w4-s1"
    assert select.select(INDEX, "fwd", FACTS | {"seqlen_q": 64}).variant == "fwd-bf16-d64-dv64-m64-n64-w4-s1"
    upside_down = replace(INDEX, rows=INDEX.rows[::-1])
    assert select.select(upside_down, "fwd", FACTS | {"seqlen_q": 64}).variant == "fwd-bf16-d64-dv64-m128-n64-w4-s1"


def test_the_real_table_serves_what_the_issue_names():
    from kernels.abi import FWD
    from kernels.dispatch import rows, variants
    from tests.runtime.fakes import toy_artifact

    index = Index("sm_120", "0", tuple(toy_artifact(v, "sm_120")[0] for v in variants()), rows(), (FWD,))
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 96, 128):
            for seqlen_q in (1, 64, 65, 4096):
                for causal in (0, 1):
                    facts = FACTS | {"dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim}
                    artifact = select.select(index, "fwd", facts | {"seqlen_q": seqlen_q, "causal": causal})
                    assert artifact.variant.startswith(f"fwd-{dtype}-d{head_dim}-")


def test_no_row_lists_every_rejection_nearest_first():
    with pytest.raises(NoKernelError) as error:
        select.select(INDEX, "fwd", FACTS | {"head_dim": 80})
    found = error.value
    assert found.reason == "row" and isinstance(found, LookupError)
    assert len(found.rejections) == len(TABLE) and {key for key, _ in found.rejections} == set(INDEX.by_variant)
    assert found.rejections[0] == ("fwd-bf16-d64-dv64-m128-n64-w4-s1", "needs head_dim == 64, the call has 80")
    assert found.rejections[-1][1].count("needs") == 3
    text = str(found)
    assert "in a checkout of cubinery 0.1: add" in text and "kernels/dispatch.py" in text
    assert "python -m builder --arch sm_120 --only 'fwd-bf16-d80-dv64-*'" in text
    assert "seqlen_k=65" in text and "and 6 more" in text


def test_a_message_may_show_every_rejection():
    with pytest.raises(NoKernelError) as error:
        select.select(INDEX, "fwd", FACTS | {"head_dim": 80}, shown=None)
    text = str(error.value)
    assert all(text.count(f"  {key}: ") == 1 for key in INDEX.by_variant) and "explain" not in text


def test_a_row_whose_variant_was_not_built_is_never_passed_over():
    """Short queries' kernel is missing; the long one would do, slowly: it is not taken."""
    short = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
    partial = replace(INDEX, artifacts=tuple(a for a in INDEX.artifacts if a.variant != short))
    with pytest.raises(NoKernelError) as error:
        select.select(partial, "fwd", FACTS | {"seqlen_q": 1})
    assert error.value.reason == "variant" and error.value.rejections[0][0] == short
    assert f"To build it, in a checkout of cubinery 0.1: python -m builder --arch sm_120 --only '{short}'" in str(
        error.value
    )
    assert select.select(partial, "fwd", FACTS)


def test_rows_of_other_ops_do_not_count():
    with pytest.raises(NoKernelError) as error:
        select.select(INDEX, "bwd", FACTS)
    assert error.value.rejections == () and error.value.reason == "row"


def test_a_fact_from_the_future_asks_for_an_update():
    row = DispatchRow("fwd", (Condition("page_size", "==", 16),), TABLE[0][-1].key)
    with pytest.raises(ContractError, match="update the client"):
        select.select(replace(INDEX, rows=(row,)), "fwd", FACTS)


@pytest.mark.parametrize(("available", "capability", "arch"), [
    (["sm_120"], (12, 0), "sm_120"), (["sm_120"], (12, 1), "sm_120"), (["sm_120", "sm_121"], (12, 1), "sm_121"),
    (["sm_120", "sm_121"], (12, 0), "sm_120"), (["sm_121"], (12, 0), None), (["sm_90", "sm_120"], (9, 0), "sm_90"),
    (["sm_120"], (13, 0), None), (["sm_80", "sm_86"], (8, 9), "sm_86"), ([], (12, 0), None),
])  # fmt: skip
def test_which_index_fits_a_device(available, capability, arch):
    assert select.pick_arch(available, capability) == arch


def test_candidates_of_partly_known_calls():
    found, missing = select.candidates(INDEX, "fwd", {"dtype": "bf16", "head_dim": 128})
    assert [a.variant for a in found] == ["fwd-bf16-d128-dv128-m64-n64-w4-s1", "fwd-bf16-d128-dv128-m128-n64-w4-s1"]
    assert not missing
    found, _ = select.candidates(INDEX, "fwd", {"dtype": "bf16", "head_dim": 128, "seqlen_q": 1000})
    assert [a.variant for a in found] == ["fwd-bf16-d128-dv128-m128-n64-w4-s1"]
    assert len(select.candidates(INDEX, "fwd", {})[0]) == len(TABLE)
    assert select.candidates(INDEX, "fwd", {"head_dim": 80}) == ([], [])
    empty = replace(INDEX, artifacts=())
    assert select.candidates(empty, "fwd", {"dtype": "bf16", "head_dim": 64, "seqlen_q": 100}) == (
        [], ["fwd-bf16-d64-dv64-m128-n64-w4-s1"])  # fmt: skip
