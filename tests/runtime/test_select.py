"""select: pure functions of an index and facts."""

from __future__ import annotations

import itertools

import pytest

from registry.contract import WINDOW_OPEN, Condition, ContractError, DispatchRow, Index, Variant
from runtime.call.forward import facts
from runtime.call.launch import LENGTH_FACTS
from runtime.errors import NoKernelError
from runtime.load import select, session
from tests.runtime.fakes import TABLE, toy_index

INDEX, _ = toy_index()
FACTS = facts(dtype="bf16", head_dim=64, head_dim_v=64, batch=1, heads_q=4, heads_kv=4, seqlen_q=65, seqlen_k=65,
              window=(WINDOW_OPEN, WINDOW_OPEN))  # fmt: skip


def test_the_first_row_that_holds_wins():
    assert select.select(INDEX, "fwd", FACTS).artifact.variant == "fwd-bf16-d64-dv64-m128-n64-w4-s1"
    assert select.select(INDEX, "fwd", FACTS | {"seqlen_q": 64}).artifact.variant == "fwd-bf16-d64-dv64-m64-n64-w4-s1"
    upside_down = INDEX.replace(rows=INDEX.rows[::-1])
    artifact, _ = select.select(upside_down, "fwd", FACTS | {"seqlen_q": 64})
    assert artifact.variant == "fwd-bf16-d128-dv128-m128-n64-w4-s1"


def test_the_real_table_serves_what_the_issue_names():
    from kernels.dispatch import rows, variants
    from tests.runtime.fakes import toy_artifact
    from tests.support.abis import FWD

    index = Index("sm_120", "0", tuple(toy_artifact(v, "sm_120")[0] for v in variants()), rows(), (FWD,))
    for dtype in ("bf16", "fp16"):
        for head_dim, head_dim_v in itertools.product(range(8, 257, 8), repeat=2):
            for heads_q, seqlen_q in ((8, 1), (8, 4096), (1, 65)):
                call = facts(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, batch=1, heads_q=heads_q,
                             heads_kv=1, seqlen_q=seqlen_q, seqlen_k=65, window=(WINDOW_OPEN, 0))  # fmt: skip
                choice = select.select(index, "fwd", call)
                variant = Variant.parse(choice.artifact.variant)
                assert variant.dtype == dtype and not (choice.pack and heads_q == 1)
                assert variant.head_dim >= head_dim and variant.head_dim_v >= head_dim_v


def test_no_row_lists_every_rejection_nearest_first():
    with pytest.raises(NoKernelError) as error:
        select.select(INDEX, "fwd", FACTS | {"head_dim": 136})
    found = error.value
    assert found.reason == "row" and isinstance(found, LookupError)
    assert len(found.rejections) == len(INDEX.rows) and {key for key, _ in found.rejections} == set(INDEX.by_variant)
    assert found.rejections[0] == ("fwd-bf16-d128-dv128-m128-n64-w4-s1", "needs head_dim <= 128, the call has 136")
    assert found.rejections[-1][1].count("needs") == 4
    text = str(found)
    assert "in a checkout of cubinery 0.1: add" in text and "kernels/fwd/" in text
    assert "python -m builder --arch sm_120 --only 'fwd-bf16-d160-dv64-*'" in text
    assert "seqlen_k=65" in text and f"and {len(INDEX.rows) - 6} more" in text


def test_a_message_may_show_every_rejection():
    with pytest.raises(NoKernelError) as error:
        select.select(INDEX, "fwd", FACTS | {"head_dim": 136}, shown=None)
    text = str(error.value)
    assert text.count(": needs ") == len(INDEX.rows) and all(f"  {key}: " in text for key in INDEX.by_variant)
    assert "explain" not in text


def test_a_row_whose_variant_was_not_built_is_never_passed_over():
    """Short queries' kernel is missing; the long one would do, slowly: it is not taken."""
    short = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
    partial = INDEX.replace(artifacts=tuple(a for a in INDEX.artifacts if a.variant != short))
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
        select.select(INDEX.replace(rows=(row,)), "fwd", FACTS)


@pytest.mark.parametrize(("available", "capability", "arch"), [
    (["sm_120"], (12, 0), "sm_120"), (["sm_120"], (12, 1), "sm_120"), (["sm_120", "sm_121"], (12, 1), "sm_121"),
    (["sm_120", "sm_121"], (12, 0), "sm_120"), (["sm_121"], (12, 0), None), (["sm_90", "sm_120"], (9, 0), "sm_90"),
    (["sm_120"], (13, 0), None), (["sm_80", "sm_86"], (8, 9), "sm_86"), ([], (12, 0), None),
])  # fmt: skip
def test_which_index_fits_a_device(available, capability, arch):
    assert session.pick_arch(available, capability) == arch


def test_a_row_says_whether_heads_are_packed():
    choice = select.select(INDEX, "fwd", FACTS | {"group": 4, "packed_rows": 64, "seqlen_q": 16})
    assert choice == (INDEX.by_variant["fwd-bf16-d64-dv64-m64-n64-w4-s1"], True)
    assert not select.select(INDEX, "fwd", FACTS | {"group": 4, "packed_rows": 68, "seqlen_q": 17}).pack


def test_head_dims_between_variants_run_on_the_next_larger():
    for (d, dv), variant in {(8, 8): 64, (72, 64): 96, (64, 72): 96, (104, 8): 128, (128, 128): 128}.items():
        artifact = select.select(INDEX, "fwd", FACTS | {"head_dim": d, "head_dim_v": dv}).artifact
        assert artifact.variant.startswith(f"fwd-bf16-d{variant}-")


def test_open_rows_pick_what_all_rows_pick():
    index, _ = toy_index()
    sizes = {"batch": 2, "heads_q": 4, "seqlen_k": 9, "window": (WINDOW_OPEN, 0)}
    for dtype, head_dim, heads_kv in itertools.product(("bf16", "fp16"), (64, 72, 256), (1, 4)):
        for seqlen_q in (1, 16, 17, 64, 65):
            call = facts(dtype=dtype, head_dim=head_dim, head_dim_v=64, heads_kv=heads_kv, seqlen_q=seqlen_q, **sizes)
            known = {name: value for name, value in call.items() if name not in LENGTH_FACTS}
            found = select.first(
                select.open_rows(index.rows, known), {name: call[name] for name in LENGTH_FACTS if name in call}
            )
            want = select.first(index.rows, call)
            assert (found and (found.variant, found.pack)) == (want and (want.variant, want.pack))


def test_candidates_of_partly_known_calls():
    """Rows after one that is known to hold serve nothing."""
    short, long = "fwd-bf16-d64-dv64-m64-n64-w4-s1", "fwd-bf16-d64-dv64-m128-n64-w4-s1"
    shape = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64}

    def found(index=INDEX, **facts):
        artifacts, missing = select.candidates(index, "fwd", facts)
        return [a.variant for a in artifacts], missing

    assert found(**shape) == ([short, long], [])
    assert found(**shape, seqlen_q=1000) == ([short, long], [])  # of a huge group nothing is known
    assert found(**shape, seqlen_q=1000, group=1, packed_rows=1000) == ([long], [])
    assert found(**shape, seqlen_q=1, group=1, packed_rows=1) == ([short], [])
    assert found(head_dim=64, head_dim_v=64) == (
        [short, long, short.replace("bf", "fp"), long.replace("bf", "fp")], [])  # fmt: skip
    assert len(found()[0]) == len(TABLE)
    assert found(head_dim=136) == ([], [])
    assert found(INDEX.replace(artifacts=()), **shape) == ([], [short, long])
