"""kernels/fwd/tiles.json, and what tables and dispatch make of such files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels import dispatch
from kernels.fwd.table import TILES
from kernels.tables import Tiles
from registry.contract import DTYPES, ContractError, Variant

FACTS: dict[str, Any] = {
    "dtype": "fp16", "head_dim": 128, "head_dim_v": 128, "batch": 2, "heads_q": 8, "heads_kv": 8, "group": 1,
    "seqlen_q": 1000, "seqlen_k": 1000, "total_q": 2000, "packed_rows": 1000, "causal": 0, "varlen": 0, "window": 0,
}  # fmt: skip


ROWS = dispatch.rows()  # once: reading and checking the tables takes longer than a thousand calls


def first(**facts: Any) -> Any:
    call = {**FACTS, **facts}
    return next(row for row in ROWS if all(c.holds(call) for c in row.when))


def test_the_file_is_the_one_text_of_its_table() -> None:
    assert Tiles.read(TILES).to_text() == TILES.read_text()


def test_every_pair_of_head_dims_is_served_by_the_cheapest_that_holds_it() -> None:
    dims = list(dict.fromkeys(tile.dims for tile in Tiles.read(TILES).tiles))
    assert dims == [(64, 64), (96, 96), (128, 64), (128, 128), (192, 128), (192, 192), (256, 128), (256, 256)]
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            fitting = [pair for pair in dims if head_dim <= pair[0] and head_dim_v <= pair[1]]
            variant = Variant.parse(first(head_dim=head_dim, head_dim_v=head_dim_v).variant)
            assert (variant.head_dim, variant.head_dim_v) == min(fitting, key=lambda pair: (sum(pair), pair[0]))


def test_short_queries_get_short_tiles_and_few_packed_rows_are_packed() -> None:
    for head_dim in (64, 128, 256):
        dims = {"head_dim": head_dim, "head_dim_v": head_dim}
        decode = first(**dims, seqlen_q=1, group=8, heads_kv=1, packed_rows=8)
        assert decode.pack and Variant.parse(decode.variant).size("m") <= 64
        short = first(**dims, seqlen_q=33, packed_rows=33)
        assert not short.pack and Variant.parse(short.variant).size("m") <= 64
        assert Variant.parse(first(**dims).variant).size("m") >= Variant.parse(short.variant).size("m")


def test_rows_pack_only_calls_with_groups_and_dtypes_share_tiles() -> None:
    for row in ROWS:
        assert not row.pack or any(c.fact == "group" and c.value >= 2 for c in row.when)
    keys = {dtype: [r.variant.replace(dtype, "") for r in ROWS if f"-{dtype}-" in r.variant] for dtype in DTYPES}
    (fp32,) = [row for row in ROWS if "-fp32-" in row.variant]  # partial outputs combined into fp32
    assert fp32.op == "fwd_combine"
    assert keys["bf16"] == keys["fp16"] and len(ROWS) == 2 * len(keys["bf16"]) + 1
    assert [v.key for v in dispatch.variants()] == sorted({row.variant for row in ROWS})


def damaged(change: Callable[[dict[str, Any]], object], path: Path) -> str:
    value = json.loads(TILES.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ContractError) as error:
        Tiles.read(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tiles"][0].update(tile="m128-n64-w4"), "a tile of fwd is like m…-n…-w…-s…"),
        (lambda v: v["tiles"][0].update(tile="m128-n064-w4-s1"), "is not like"),
        (lambda v: v["tiles"][0].update(tile="m128-n64-w4-s3"), "64/64 packed_decode m128-n64-w4-s3: s3: one or two"),
        (lambda v: v["tiles"][1].update(pack=True), "64/64 short m64-n64-w4-s2: pack needs a class with the condition"),
        (lambda v: v["tiles"][0].update(pack=1), "pack 1 is neither true nor false"),
        (lambda v: v["tiles"][0].update({"class": "long"}), "no class of that name, there are packed_decode, "),
        (lambda v: v["tiles"][0].pop("evidence"), "KeyError: 'evidence'"),
        (lambda v: v["tiles"].reverse(), "tiles are not one a class, by"),
        (lambda v: v["tiles"].append(v["tiles"][-1]), "tiles are not one a class, by"),
        (lambda v: v["tiles"].pop(), "head dims (256, 256) lack a tile of the class without conditions"),
        (lambda v: v["tiles"].clear(), "no tiles"),
        (lambda v: v["classes"][0]["when"][0].__setitem__(0, "sequence"), "condition on 'sequence', which is none of"),
        (lambda v: v["classes"][0]["when"][0].__setitem__(2, "2"), "is no comparison with a whole number"),
        (lambda v: v["classes"][0]["when"][0].__setitem__(1, "<"), "'<' is none of ==, <=, >=, in"),
        (lambda v: v["classes"].append(v["classes"][0]), "a class is named twice"),
        (lambda v: v.pop("classes"), "KeyError: 'classes'"),
    ],
)
def test_a_table_with_a_fault_says_which(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    assert message in damaged(change, tmp_path / "tiles.json")


def test_what_is_no_json_or_no_file_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with pytest.raises(ContractError, match="FileNotFoundError"):
        Tiles.read(path)
    path.write_text("[1")
    with pytest.raises(ContractError, match="JSONDecodeError"):
        Tiles.read(path)
    path.write_text("[]")
    with pytest.raises(ContractError, match="TypeError"):
        Tiles.read(path)
