"""Digests and messages that do not change: registries in the field hold the former, people search for the latter."""

from __future__ import annotations

import pytest

from registry.contract import (
    Abi,
    Artifact,
    Condition,
    ContractError,
    DispatchRow,
    Grid,
    Index,
    Param,
    Variant,
    check_arch,
)
from registry.frames import elf_machine
from tests.support.abis import ABIS

ABI = Abi("toy", 3, (Param("q", "ptr"), Param("stride", "i64"), Param("n", "i32"), Param("scale", "f32")))
ARTIFACT = Artifact(
    variant="toy-bf16-d64-dv128-m64-n32-paged",
    arch="sm_120",
    symbol="cubinery_toy_0",
    abi=ABI.digest,
    grid=Grid("tiles_heads_batch", 64),
    threads=128,
    smem=65_536,
    static_smem=16,
    registers=168,
    spills=0,
    stack=8,
    blocks_per_sm=1,
    hot_loop=(("HMMA", 128), ("LDSM", 32)),
    cubin_sha256="1" * 64,
    cubin_size=3000,
    frame_sha256="2" * 64,
    frame_size=1500,
    ptx_sha256="3" * 64,
    toolchain="dsl ünd assembler",
    min_driver=12080,
)
WHEN = (Condition("dtype", "in", ("bf16", "fp16")), Condition("head_dim", "<=", 64))
INDEX = Index("sm_120", "0.1.0", (ARTIFACT,), (DispatchRow("toy", WHEN, ARTIFACT.variant, pack=True),), (ABI,))
OURS = {
    "fwd_combine": "bbf74623a14daad762bd8d37c74b2166cad24793af1b8d54dc51e6c615a694b9",
    "kv_append": "e0f35f0f579c6aef967fde379a8374a8505afb59869373ebcc0c8433a63a9321",
    "bwd_preprocess": "aa31d0dab0de800beb0ebcf5eb6cd318f0b3f4cd64bac5b36e3356e3d64e4f10",
    "bwd_postprocess": "c9fd1a14ce3c68499ff313f8a553991b3698cf6f7c142cfbf064ff5fcd3920bb",
}


@pytest.mark.parametrize("op", OURS)
def test_digests_of_abis(op):
    """An ABI changes on purpose only, with its version: cubins in the field name it by its digest."""
    assert ABIS[op].digest == OURS[op]


def test_digests_of_a_toy():
    assert ABI.digest == "3da093b31bd0e6ab1bd0a3ba9ef2f4a10835d8402ca3653e773e526c4cc80d5a"
    assert INDEX.digest == "846d923bf8ccb167d65cdbb31a02296ede282c89ecd773d2ec91473ce4f73345"


MESSAGES = [
    (
        lambda: Variant.parse("fwd-bf16-d64"),
        "variant key 'fwd-bf16-d64' is not like 'fwd-bf16-d128-dv128-m128-n64-w4-s1'",
    ),
    (lambda: Variant("fwd", "fp8", 64, 64), "variant: dtype 'fp8' is none of bf16, fp16, fp32"),
    (lambda: Param("q", "u8"), "param 'q': type 'u8' is none of ptr, i32, i64, f32"),
    (
        lambda: ABI.pack({"q": 1, "m": 2}),
        "abi of toy v3: parameters ['m', 'n', 'scale', 'stride'] are missing or unknown",
    ),
    (lambda: Abi.from_json([]), "abi: list instead of an object"),
    (lambda: Abi.from_json({"op": "f", "version": "1", "params": []}), "abi: version is str, expected int"),
    (
        lambda: Grid("persistent", 64),
        "grid: rule 'persistent' is none of tiles_heads_batch, key_tiles_heads_batch, rows; update the client",
    ),
    (lambda: Condition("dtype", "~", 1), "condition: '~' is none of ==, <=, >=, in; update the client"),
    (
        lambda: Condition("paged", "==", 1).holds({}),
        "condition on 'paged', a fact this client does not know; update the client",
    ),
    (
        lambda: Condition("dtype", "<=", 64).holds({"dtype": "bf16"}),
        "condition dtype <= 64: cannot be compared with 'bf16'",
    ),
    (
        lambda: DispatchRow.from_json({"op": "toy"}),
        "dispatch row: fields ['pack', 'variant', 'when'] are missing or unknown",
    ),
    (lambda: Artifact.from_json({**ARTIFACT.to_json(), "threads": 0}), "artifact: threads 0 is out of range"),
    (
        lambda: Artifact.from_json({**ARTIFACT.to_json(), "abi": "x"}),
        "artifact abi: 'x' is not 64 lower-case hex digits",
    ),
    (
        lambda: check_arch("sm_120a"),
        "arch: 'sm_120a' is not like 'sm_120' ('a' and 'f' targets are not shipped)",
    ),
    (lambda: elf_machine(b"MZ"), "no 64-bit little-endian ELF file: it starts with b'MZ'"),
    (
        lambda: Index.from_bytes(b""),
        "index: not JSON: Expecting value: line 1 column 1 (char 0)",
    ),
    (lambda: Index.from_bytes(b'{"format":99}'), "index: format 99, this client reads 2 and 3; update it"),
    (
        lambda: Index("sm_90", "0.1.0", (ARTIFACT,), (), (ABI,)),
        "index: toy-bf16-d64-dv128-m64-n32-paged is for sm_120, the index for sm_90",
    ),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages(call, message):
    with pytest.raises(ContractError) as error:
        call()
    assert (str(error.value), error.value.reason) == (message, "contract")
