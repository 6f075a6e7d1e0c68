"""An index in parts is the same index: whoever reads all of it, and whoever reads what one call needs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import ops
from registry.contract import (
    PARTED,
    Condition,
    ContractError,
    DispatchRow,
    Index,
    IntegrityError,
    OpenIndex,
    Served,
    Variant,
    canonical_json,
    check_part,
    common_conditions,
    is_part,
    part_digests,
    parts,
    sha256_hex,
)
from registry.contract import index as index_file
from tests.registry.contract.opened_samples import ABI, INDEX, artifact, change, facts, first, paths


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "MAX_WHOLE", 3)
    monkeypatch.setattr(parts, "PART_ROWS", 4)


def parted() -> Index:
    return INDEX.replace(release="parted")


class Shelf:
    """An index's documents, and which of them were read."""

    def __init__(self, documents: dict[str, bytes]):
        self.documents, self.read = dict(documents), list[str]()

    def __call__(self, digest: str) -> bytes:
        self.read.append(digest)
        return self.documents[digest]


def opened(index: Index) -> tuple[OpenIndex, Shelf]:
    shelf = Shelf(index.documents)
    return OpenIndex(index.to_bytes(), index.digest, shelf), shelf


def test_it_reads_as_what_was_written():
    index = parted()
    *_, head = index.documents
    assert head == index.digest == sha256_hex(index.to_bytes())
    assert json.loads(index.to_bytes())["format"] == PARTED
    assert part_digests(index.to_bytes()) == [digest for digest in index.documents if digest != head]
    again = Index.from_bytes(index.to_bytes(), index.documents.get)
    assert again.documents == index.documents
    assert again == index.replace(artifacts=again.artifacts) and set(again.artifacts) == set(index.artifacts)
    for digest, body in index.documents.items():
        assert sha256_hex(body) == digest and is_part(body) == (digest != head)
        if digest != head:
            check_part(body)


def test_an_index_that_was_cut_otherwise_keeps_its_documents(monkeypatch: pytest.MonkeyPatch):
    """Another release may cut elsewhere: what it published is imported as it is."""
    index = parted()
    documents = dict(index.documents)
    monkeypatch.setattr(parts, "PART_ROWS", 7)
    monkeypatch.setattr(index_file, "MAX_WHOLE", 10_000)
    again = Index.from_bytes(documents[index.digest], documents.get)
    assert again.documents == documents and again.digest == index.digest
    assert list(again.replace().documents) != list(documents)


def test_a_small_index_is_one_document_as_before():
    small = parted().replace(artifacts=INDEX.artifacts[:3])
    assert list(small.documents) == [small.digest] and part_digests(small.to_bytes()) == []
    assert json.loads(small.to_bytes()) == small.to_json() and not is_part(small.to_bytes())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(ops.OPS), facts())
def test_a_call_is_served_as_by_the_whole(op: str, call: dict[str, Any]):
    index, shelf = OPEN
    row = first(INDEX, op, call)
    assert index.serving(op, call) == (row and Served(row.variant, row.pack))
    if row:
        before = len(shelf.read)
        assert index.artifact(row.variant) == INDEX.by_variant[row.variant]
        assert len(shelf.read) == before  # it came with the row


with pytest.MonkeyPatch.context() as patch:
    patch.setattr(index_file, "MAX_WHOLE", 3)
    patch.setattr(parts, "PART_ROWS", 4)
    OPEN = opened(parted())


def test_rows_with_some_facts_known_are_all_that_could_serve():
    index, shelf = opened(parted())
    assert index.rows("fwd", {}) == [row for row in INDEX.rows if row.op == "fwd"]
    known = {"dtype": "fp16", "head_dim": 128, "head_dim_v": 128}
    fresh, shelf = opened(parted())
    found = fresh.rows("fwd", known)
    may_serve = [row for row in INDEX.rows if row.op == "fwd" and row.variant.startswith("fwd-fp16-d128-dv128")]
    assert may_serve and all(row in found for row in may_serve)
    assert len(shelf.read) < len(part_digests(parted().to_bytes())) / 2


def large(count: int) -> Index:
    """A table of so many variants of fwd: of each head dims and dtype several tiles, by length."""
    rows, made = [], []
    for n in range(count):
        dims = 8 * (1 + n // 20 % 30)
        variant = Variant("fwd", ("bf16", "fp16")[n // 600 % 2], dims, dims, (("m", 1 + n),))
        when = (Condition("dtype", "==", variant.dtype), Condition("head_dim", "<=", dims),
                Condition("seqlen_q", "<=", 100 * (1 + n % 20)), Condition("group", ">=", n // 1200))  # fmt: skip
        rows.append(DispatchRow("fwd", when, variant.key))
        made.append(artifact(variant.key))
    return Index("sm_120", "0", tuple(made), tuple(rows), (ABI,))


def test_a_first_call_reads_the_part_that_serves_it_and_few_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    index = large(1200)
    call = {"dtype": "fp16", "head_dim": 240, "seqlen_q": 1950, "group": 1}
    served, shelf = opened(index)
    found = served.serving("fwd", call)
    assert found and served.artifact(found.variant) and first(index, "fwd", call).variant == found.variant
    assert len(part_digests(index.to_bytes())) == 12 and len(shelf.read) == 1


def test_a_part_is_passed_over_whose_pairs_of_head_dims_are_too_small_though_each_bound_is_not(
    monkeypatch: pytest.MonkeyPatch,
):
    """In a table by the sum of head dims, the parts before (128, 128) have bounds up to 252 of either."""
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    pairs = sorted(((d, v) for d in range(8, 257, 8) for v in range(8, 257, 8)), key=lambda pair: (sum(pair), pair))
    rows = [DispatchRow("fwd", (Condition("head_dim", "<=", d), Condition("head_dim_v", "<=", v)),
                        f"fwd-bf16-d{d}-dv{v}") for d, v in pairs]  # fmt: skip
    index = Index("sm_120", "0", tuple(artifact(row.variant) for row in rows), tuple(rows), (ABI,))
    for dims in ((128, 128), (72, 40), (256, 8)):
        call = dict(zip(("head_dim", "head_dim_v"), dims, strict=True))
        served, shelf = opened(index)
        assert served.serving("fwd", call) == Served(first(index, "fwd", call).variant, False)
        assert len(shelf.read) == 1


def test_artifacts_that_no_row_names_and_those_that_several_parts_name():
    row = INDEX.rows[0]
    twice = tuple(row.replace(when=(*row.when, Condition("batch", "==", n))) for n in range(9))
    index = Index("sm_120", "0", INDEX.artifacts[:6], (*twice, *INDEX.rows[1:3]), (ABI,))
    again = Index.from_bytes(index.to_bytes(), index.documents.get)
    assert set(again.artifacts) == set(index.artifacts) and again.rows == index.rows
    served, _ = opened(index)
    for a in index.artifacts:
        assert served.artifact(a.variant) == a
    assert served.artifact("fwd-bf16-d8-dv8-m1-n1-w1-s1") is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((), []),
        (([("a", "==", 1)], [("a", "==", 1)]), [["a", "==", 1]]),
        (([("a", "==", 1)], [("a", "==", 2)]), []),
        (([("a", "<=", 1)], [("a", "<=", 2)]), [["a", "<=", 2]]),
        (([("a", ">=", 1), ("b", "==", 3)], [("a", ">=", 2)]), [["a", ">=", 1]]),
        (([("a", "in", (1, 2))], [("a", "in", (2, 3))]), [["a", "in", [1, 2, 3]]]),
    ],
)
def test_what_all_rows_of_a_part_ask(rows, expected):
    made = [DispatchRow("fwd", tuple(Condition(*one) for one in when), "fwd-bf16-d8-dv8") for when in rows]
    assert common_conditions(made) == expected


def test_other_bytes_and_missing_parts_are_refused():
    index = parted()
    some = part_digests(index.to_bytes())[0]
    documents = index.documents | {some: index.documents[some] + b" "}
    for read in (lambda: Index.from_bytes(index.to_bytes(), documents.get),
                 lambda: OpenIndex(index.to_bytes(), index.digest, documents.__getitem__).rows("fwd", {})):  # fmt: skip
        with pytest.raises(IntegrityError) as error:
            read()
        assert error.value.reason == "sha256"
    for lacking in (lambda: Index.from_bytes(index.to_bytes()), lambda: Index.from_bytes(index.to_bytes(), {}.get),
                    lambda: OpenIndex(index.to_bytes(), index.digest).rows("fwd", {})):  # fmt: skip
        with pytest.raises(ContractError, match="is not there"):
            lacking()


def with_part(index: Index, changed: bytes) -> tuple[bytes, dict[str, bytes]]:
    """(the index's document, all documents) where its first part has other bytes, under their own digest."""
    value = json.loads(index.to_bytes())
    value["parts"][0]["sha256"] = sha256_hex(changed)
    return canonical_json(value), {**index.documents, sha256_hex(changed): changed}


TINY = Index("sm_120", "0", INDEX.artifacts[:4], INDEX.rows[:4], (ABI,))
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(index_file, "MAX_WHOLE", 3)
    FIRST_PART = json.loads(next(iter(TINY.documents.values())))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(paths(FIRST_PART)), st.sampled_from([..., None, 1, -1, "", "x", [], {}, True, 1.5, "!="]))
def test_a_damaged_part_means_the_same_or_a_contract_error(path: list[Any], new: Any):
    head, documents = with_part(TINY, canonical_json(json.loads(change(FIRST_PART, path, new))))
    call = {name: 64 for name in ("head_dim", "head_dim_v")} | {"dtype": "bf16", "packed_rows": 1, "group": 1}
    call |= {name: 1 for name in ("seqlen_q", "seqlen_k", "batch", "causal", "varlen", "window", "heads_q", "total_q")}
    index = OpenIndex(head, sha256_hex(head), documents.__getitem__)
    try:
        served = index.serving("fwd", call)
        found = index.artifact(served.variant) if served else None
    except ContractError:
        with pytest.raises(ContractError):
            first(Index.from_bytes(head, documents.get), "fwd", call)
        return
    if found is not None:
        good = TINY.artifacts[0].to_json()
        assert {name: type(value) for name, value in found.to_json().items()} == {n: type(v) for n, v in good.items()}


@pytest.mark.parametrize(
    ("path", "new"),
    [(["parts", 0, "sha256"], "../../../victim"), (["parts", 0], 3), (["parts"], {}), (["parts", 0, "op"], ...),
     (["parts", 0, "when"], [["batch", "==", 7]]), (["parts", 0, "op"], "bwd"), (["parts", 0, "head_dims"], [[8, 8]])],
)  # fmt: skip
def test_a_list_of_parts_that_says_something_else_is_refused(path: list[Any], new: Any):
    index = parted()
    head = change(json.loads(index.to_bytes()), path, new)
    with pytest.raises(ContractError):
        Index.from_bytes(head, index.documents.get)


def test_a_part_that_is_listed_twice_is_refused():
    value = json.loads(parted().to_bytes())
    value["parts"].append(value["parts"][0])
    head = canonical_json(value)
    for read in (lambda: Index.from_bytes(head, parted().documents.get), lambda: part_digests(head),
                 lambda: OpenIndex(head, sha256_hex(head), parted().documents.__getitem__)):  # fmt: skip
        with pytest.raises(ContractError, match="listed twice"):
            read()


def test_threads_that_ask_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch):
    index, answers = opened(parted())[0], list[Any]()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: answers.append(index.artifact("none"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert answers == [None] * 8


@pytest.mark.parametrize("new", [..., None, 7, {}, [7], [["head_dim", "!=", 3]], [[1]], [["x"] * 3]])
@pytest.mark.parametrize("name", ["when", "head_dims", "op"])
def test_a_damaged_list_of_parts_serves_or_is_a_contract_error(name: str, new: Any):
    index = parted()
    head = canonical_json(json.loads(change(json.loads(index.to_bytes()), ["parts", 0, name], new)))
    call = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64}
    for ask in (lambda it: it.serving("fwd", call), lambda it: it.rows("fwd", call)):
        with contextlib.suppress(ContractError):
            ask(OpenIndex(head, sha256_hex(head), index.documents.__getitem__))


def test_check_part_refuses_what_is_none():
    body = next(iter(parted().documents.values()))
    check_part(body)
    for other in (b"", b"[]", b"{}", body + b" ", parted().to_bytes(), body.replace(b'"pack":false', b'"pack":0')):
        with pytest.raises(ContractError):
            check_part(other)
