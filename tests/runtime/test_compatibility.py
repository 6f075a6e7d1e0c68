"""docs/compatibility.md against upstream's signatures, and every row of its tables by a call.

Upstream's argument lists are those of flash-attention's commit 0251105a (`flash_attn` 2.8.4 and its `flash_attn.cute`).
What a call should give is computed from upstream's arguments alone, in fp64, sequence by sequence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import runtime
from runtime.errors import ArgumentError
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, reference
from tests.support.kvcache import E4M3, rotated
from tests.support.varlen import ints

PAGE = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
WINDOW = "window_size=(-1, -1)"
FA2 = f"dropout_p=0.0 softmax_scale=None causal=False {WINDOW} softcap=0.0 alibi_slopes=None deterministic=False "
FA2 += "return_attn_probs=False"
FA4_END = "score_mod=None score_mod_bwd=None mask_mod=None"
FA4_SCORES = "softmax_scale=None causal=False window_size=(None, None) learnable_sink=None softcap=0.0 num_splits=1 "
FA4_SCORES += "pack_gqa=None deterministic=False"
UPSTREAM = {
    "runtime.flash_attn_func": f"q k v {FA2}",
    "runtime.flash_attn_qkvpacked_func": f"qkv {FA2}",
    "runtime.flash_attn_kvpacked_func": f"q kv {FA2}",
    "runtime.flash_attn_varlen_func":
        f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {FA2} block_table=None",
    "runtime.flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {FA2}",
    "runtime.flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {FA2}",
    "runtime.flash_attn_with_kvcache":
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
        f"cache_leftpad=None block_table=None softmax_scale=None causal=False {WINDOW} softcap=0.0 "
        "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
    "runtime.fa4.flash_attn_func":
        f"q k v qv=None gather_kv_indices=None {FA4_SCORES} {FA4_END} aux_tensors=None aux_scalars=None "
        "block_sparse_tensors=None block_sparse_tensors_bwd=None return_lse=False",
    "runtime.fa4.flash_attn_varlen_func":
        "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None min_seqlen_k=None "
        f"seqused_q=None seqused_k=None gather_kv_indices=None page_table=None {FA4_SCORES} {FA4_END} "
        "block_sparse_tensors=None aux_tensors=None aux_scalars=None return_lse=False scheduler_metadata=None "
        "seqlen_k_per_split=None disable_scheduler_metadata=False",
    "runtime.fa4.flash_attn_combine":
        "out_partial lse_partial out=None out_dtype=None cu_seqlens=None seqused=None virtual_batch_idx=None "
        "return_lse=True",
}  # fmt: skip
# Ours have a default where upstream has none.
OPTIONAL = {("runtime.flash_attn_varlen_func", name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
                                                                  "max_seqlen_k")}  # fmt: skip


class Row(NamedTuple):
    function: str
    argument: str
    status: str
    text: str

    @property
    def call(self) -> Callable[..., Any]:
        found = runtime
        for name in self.function.split(".")[1:]:
            found = getattr(found, name)
        return found  # type: ignore[return-value]


def rows() -> list[Row]:
    found = []
    for section in PAGE.split("\n## ")[1:]:
        function, _, text = section.partition("\n")
        for argument, status, more in re.findall(r"^\| `(\w+)` \| (\w+) \|(.*)\|$", text, re.MULTILINE):
            found.append(Row(function, argument, status, more.strip()))
    return found


ROWS = rows()


def of(status: str) -> list[Any]:
    return [pytest.param(row, id=f"{row.function} {row.argument}") for row in ROWS if row.status == status]


# -- the page and the signatures --------------------------------------------------------------------------------------


def signature(text: str) -> list[tuple[str, Any]]:
    """(name, default), the default as Python writes it, '' for none."""
    parts = re.findall(r"(\w+)(?:=(\([^)]*\)|\S+))?", text)
    return [(name, default) for name, default in parts]


def test_every_function_and_argument_of_upstream_has_its_row():
    assert list(dict.fromkeys(row.function for row in ROWS)) == list(UPSTREAM)
    for function, text in UPSTREAM.items():
        assert [row.argument for row in ROWS if row.function == function] == [name for name, _ in signature(text)]
    assert {row.status for row in ROWS} == {"served", "differs", "refused"}
    assert all(row.text for row in ROWS if row.status != "served")
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS), "a row that was not read"


@pytest.mark.parametrize("function", UPSTREAM)
def test_order_and_defaults_are_upstream_s(function: str):
    call = next(row for row in ROWS if row.function == function).call
    ours = [p for p in inspect.signature(call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours] == [name for name, _ in signature(UPSTREAM[function])]
    for parameter, (name, default) in zip(ours, signature(UPSTREAM[function]), strict=True):
        has = parameter.default is not parameter.empty
        assert has is (bool(default) or (function, name) in OPTIONAL), name
        assert not default or parameter.default == eval(default), name


# -- calls ------------------------------------------------------------------------------------------------------------

TABLE = ints(2, 0, 1, 3).view(2, 2)  # pages of 4 keys: of 6 and 3 tokens in use
SLOPES, SINK = torch.tensor([0.5, 0.1, 0.0, 2.0]), torch.tensor([1.0, -2, 0, 5])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base(function: str) -> dict[str, Any]:
    """A call with nothing but what it needs: two sequences of 2 and 3 queries, 6 and 3 keys, or 3 and 7 of each."""
    if "combine" in function:
        return {"out_partial": random(3, 7, 4, 64, dtype=torch.float32), "lse_partial": random(3, 7, 4, seed=1).float()}
    if "kvcache" in function:
        return {
            "q": random(2, 2, 4, 64),
            "k_cache": random(4, 8, 2, 64, seed=1),
            "v_cache": random(4, 8, 2, 64, seed=2),
        }
    heads = {"q": 4, "k": 2, "v": 2, "qkv": 4, "kv": 2}
    parts = {"qkv": (3,), "kv": (2,)}
    names = [name for name, _ in signature(UPSTREAM[function]) if name in heads]
    queries = {"q": 5, "qkv": 9}
    found: dict[str, Any] = {}
    for seed, name in enumerate(names):
        tokens = (queries.get(name, 9),) if "varlen" in function else (2, queries.get(name, 7))
        found[name] = random(*tokens, *parts.get(name, ()), heads[name], 64, seed=seed)
    if "varlen_qkv" in function:
        return found | {"cu_seqlens": ints(0, 2, 9), "max_seqlen": 7}
    if "varlen" in function:
        found |= {"cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 6, 9), "max_seqlen_q": 3, "max_seqlen_k": 6}
    return found


class Attended(NamedTuple):
    """What upstream's arguments ask for: (out, lse) in fp64, (tokens, heads, …), of the rows that count."""

    rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def spans(given: dict[str, Any], side: str, array: torch.Tensor) -> list[tuple[int, int]]:
    """(first row, rows) of each sequence, rows counted over the whole array."""
    starts, used = given.get(f"cu_seqlens_{side}", given.get("cu_seqlens")), given.get(f"seqused_{side}")
    if starts is None:
        found = [(b * array.shape[1], array.shape[1]) for b in range(array.shape[0])]
    else:
        found = [(a, z - a) for a, z in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    return found if used is None else [(a, min(n, u)) for (a, n), u in zip(found, used.tolist(), strict=True)]


def flat(array: torch.Tensor) -> torch.Tensor:
    return array.flatten(0, -3)


def arrays(given: dict[str, Any]) -> list[torch.Tensor]:
    if "qkv" in given:
        return list(given["qkv"].unbind(-3))
    if "kv" in given:
        return [given["q"], *given["kv"].unbind(-3)]
    return [given["q"], given.get("k_cache", given.get("k")), given.get("v_cache", given.get("v"))]


def paged(given: dict[str, Any], k: torch.Tensor, v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each sequence, through a table of pages."""
    table = given.get("block_table", given.get("page_table"))
    starts, used = given.get("cu_seqlens_k"), given.get("seqused_k")
    lengths = used.tolist() if used is not None else starts.diff().tolist()
    return [tuple(x[table[b].long()].flatten(0, 1)[:n] for x in (k, v)) for b, n in enumerate(lengths)]


def scores(given: dict[str, Any], function: str) -> dict[str, Any]:
    """The options of `reference`."""
    left, right = given.get("window_size", (-1, -1))
    if "fa4" in function and given.get("causal"):
        right = 0
    if "fa4" in function and None not in (left, right) and left + right < 0:
        left = right = None
    sides = tuple(None if side is None or side < 0 else int(side) for side in (left, right))
    softcap = given.get("softcap", 0.0)
    softcap = abs(softcap) if "fa4" in function else max(softcap, 0.0)
    return {"window": sides, "softcap": softcap, "sink": given.get("learnable_sink"),
            "causal": given.get("causal", False), "softmax_scale": given.get("softmax_scale")}  # fmt: skip


def attended(given: dict[str, Any], function: str) -> Attended:
    q, k, v = arrays(given)
    slopes, options = given.get("alibi_slopes"), scores(given, function)
    found = []
    of_q = spans(given, "q", q)
    if given.get("block_table", given.get("page_table")) is not None and "kvcache" not in function:
        pairs = paged(given, k, v)
    elif "kvcache" in function:
        q, pairs = appended(given)
    else:
        pairs = [(flat(k)[a : a + n], flat(v)[a : a + n]) for a, n in spans(given, "k", k)]
    for b, ((first, n), (keys, values)) in enumerate(zip(of_q, pairs, strict=True)):
        one = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = reference(flat(q)[None, first : first + n], keys[None], values[None], alibi_slopes=one, **options)
        found.append((torch.arange(first, first + n), out[0], lse[0].T))
    return Attended(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def appended(given: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    """(q, keys and values of each sequence) of `flash_attn_with_kvcache`, new ones and rotation included."""
    q, caches = given["q"].double(), [given["k_cache"].double(), given["v_cache"].double()]
    table, places = given.get("block_table"), given.get("cache_batch_idx")
    lengths, pairs, turned = given.get("cache_seqlens"), [], []
    interleaved = given.get("rotary_interleaved", True)
    for b in range(q.shape[0]):
        if table is not None:
            keys, values = (x[table[b].long()].flatten(0, 1) for x in caches)
        else:
            keys, values = (x[b if places is None else int(places[b])] for x in caches)
        n = keys.shape[0] if lengths is None else lengths if isinstance(lengths, int) else int(lengths[b])
        keys, values, one = keys[:n], values[:n], q[b]
        if given.get("k") is not None:
            new = given["k"][b].double()
            if given.get("rotary_cos") is not None:
                turn = given["rotary_cos"], given["rotary_sin"]
                new = rotated(new, *turn, torch.arange(n, n + new.shape[0]), interleaved)
                moves = given.get("causal") or given.get("window_size", (-1, -1)) != (-1, -1)
                one = rotated(one, *turn, n + torch.arange(one.shape[0]) * int(bool(moves)), interleaved)
            keys, values = torch.cat((keys, new)), torch.cat((values, given["v"][b].double()))
        left = 0 if given.get("cache_leftpad") is None else int(given["cache_leftpad"][b])
        pairs.append((keys[left:], values[left:]))
        turned.append(one)
    return torch.stack(turned), pairs


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), atol=3e-2, rtol=3e-2)


def differ(one: Any, other: Any) -> bool:
    return one.shape != other.shape or not torch.allclose(one.double(), other.double(), atol=5e-2, rtol=5e-2)


def result(found: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) as rows."""
    out, lse = found[:2] if isinstance(found, tuple) else (found, None)
    return flat(out), None if lse is None else (lse.transpose(-1, -2).flatten(0, -2))


def hold(row: Row, given: dict[str, Any]) -> Any:
    """Call it, and compare with what upstream's arguments ask for."""
    want, found = attended(given, row.function), row.call(**copied(given))
    out, lse = result(found)
    close(out[want.rows], want.out)
    if lse is not None:
        close(lse[want.rows], want.lse)
    return found


# -- arguments --------------------------------------------------------------------------------------------------------

NEW = {"k": random(2, 1, 2, 64, seed=5), "v": random(2, 1, 2, 64, seed=6), "cache_seqlens": ints(5, 3)}
ANGLES = {"rotary_cos": random(9, 16, seed=7), "rotary_sin": random(9, 16, seed=8)}
PAGES = {"k": random(4, 4, 2, 64, seed=1), "v": random(4, 4, 2, 64, seed=2)}
# Argument -> changes of the base call of which each must change the result as upstream has it. What is in the second
# dictionary, the base call has too.
EFFECTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "softmax_scale": ([{"softmax_scale": 0.7}], {}),
    "causal": ([{"causal": True}], {}),
    "window_size": ([{"window_size": (1, 0)}, {"window_size": (0, 1)}], {}),
    "softcap": ([{"softcap": 0.4}], {}),
    "alibi_slopes": ([{"alibi_slopes": SLOPES}, {"alibi_slopes": torch.stack((SLOPES, 2 * SLOPES))}], {}),
    "learnable_sink": ([{"learnable_sink": SINK.to(dtype)} for dtype in (torch.float32, torch.float16, BF16)], {}),
    "cu_seqlens": ([{"cu_seqlens": ints(0, 4, 9)}], {}),
    "cu_seqlens_q": ([{"cu_seqlens_q": ints(0, 4, 5)}], {}),
    "cu_seqlens_k": ([{"cu_seqlens_k": ints(0, 2, 9)}], {}),
    "seqused_q": ([{"seqused_q": ints(1, 2)}], {}),
    "seqused_k": ([{"seqused_k": ints(3, 1)}], {}),
    "k": ([NEW], {"cache_seqlens": ints(5, 3)}),
    "v": ([NEW | {"v": random(2, 1, 2, 64, seed=9)}], NEW),
    "rotary_cos": ([NEW | ANGLES], NEW),
    "rotary_sin": ([NEW | ANGLES | {"causal": True}], NEW | ANGLES),
    "rotary_interleaved": ([NEW | ANGLES | {"rotary_interleaved": False}], NEW | ANGLES),
    "cache_seqlens": ([{"cache_seqlens": ints(5, 3)}, {"cache_seqlens": 4}], {}),
    "cache_batch_idx": ([{"cache_batch_idx": ints(3, 0)}], {}),
    "cache_leftpad": ([{"cache_leftpad": ints(2, 1)}, {"cache_leftpad": ints(2, 1), "block_table": TABLE}], {}),
}
# Arguments that change no result.
NEUTRAL: dict[str, list[Any]] = {
    "max_seqlen": [1, 10**6, torch.tensor(7)],
    "max_seqlen_q": [1, 10**6, torch.tensor(3)],
    "max_seqlen_k": [1, 10**6, torch.tensor(6)],
    "min_seqlen_k": [1, 3],
    "pack_gqa": [True, False],
    "num_splits": [1, 2, 7],
    "scheduler_metadata": [object()],
    "disable_scheduler_metadata": [True],
    "deterministic": [True],  # of the backward, which has a test of its own
}
TENSORS = ("q", "k", "v", "qkv", "kv", "k_cache", "v_cache")
WITH_LSE = {"return_lse": 2, "return_softmax_lse": 2, "return_attn_probs": 3}
BY_NAME: dict[tuple[str, str], Callable[[Row, FakeBackend], None]] = {}


def exercise(*functions_and_arguments: tuple[str, str]) -> Callable[[Any], Any]:
    def keep(function: Any) -> Any:
        BY_NAME.update(dict.fromkeys(functions_and_arguments, function))
        return function

    return keep


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("row", [*of("served"), *of("differs")])
def test_what_is_served_has_its_effect(backend: FakeBackend, row: Row):
    given, name = base(row.function), row.argument
    if (row.function, name) in BY_NAME:
        BY_NAME[row.function, name](row, backend)
    elif name in NEUTRAL:
        for value in NEUTRAL[name]:
            hold(row, given | {name: value})
    elif name in WITH_LSE:
        plain, found = hold(row, given), hold(row, given | {name: True})
        assert len(found) == WITH_LSE[name] and all(isinstance(one, torch.Tensor) for one in found)
        assert isinstance(plain, torch.Tensor) or plain[1] is None
    elif name in given and name in TENSORS:
        changed = given | {name: random(*given[name].shape, seed=9)}
        assert differ(attended(given, row.function).out, attended(changed, row.function).out)
        hold(row, given)
        hold(row, changed)
    else:
        changes, beside = EFFECTS[name]
        for change in changes:
            before, after = (attended(given | x, row.function) for x in (beside, beside | change))
            assert differ(before.out, after.out) or differ(before.rows, after.rows), "no effect that could be seen"
            hold(row, given | beside | change)


@exercise(*((function, "v") for function in ("runtime.flash_attn_func", "runtime.flash_attn_varlen_func")))
def _other_head_dim(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    hold(row, given)
    hold(row, given | {"v": random(*given["v"].shape[:-1], 32, seed=9)})


@exercise(("runtime.flash_attn_with_kvcache", "k_cache"), ("runtime.flash_attn_with_kvcache", "v_cache"))
def _low_cache(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    hold(row, given)
    hold(row, given | {row.argument: random(*given[row.argument].shape, seed=9)})
    hold(row, given | {name: given[name].to(E4M3) for name in ("k_cache", "v_cache")})
    if row.argument == "v_cache":
        hold(row, given | {"v_cache": random(4, 8, 2, 32, seed=9)})


@exercise(
    ("runtime.flash_attn_varlen_func", "cu_seqlens_q"), ("runtime.flash_attn_varlen_func", "cu_seqlens_k"),
)  # fmt: skip
def _lengths_or_dense(row: Row, backend: FakeBackend) -> None:
    given, name = base(row.function), row.argument
    hold(row, given | EFFECTS[name][0][0])
    dense = {"q": random(2, 3, 4, 64)} if name == "cu_seqlens_q" else {x: random(2, 7, 2, 64, seed=1) for x in "kv"}
    hold(row, given | dense | {name: None})


@exercise(("runtime.flash_attn_varlen_func", "block_table"), ("runtime.fa4.flash_attn_varlen_func", "page_table"))
def _table(row: Row, backend: FakeBackend) -> None:
    lengths = {"cu_seqlens_k": ints(0, 6, 9)} if row.argument == "block_table" else {"seqused_k": ints(6, 3)}
    given = base(row.function) | PAGES | {"cu_seqlens_k": None, row.argument: TABLE} | lengths
    hold(row, given)
    hold(row, given | {row.argument: TABLE.flip(0)})
    three = {name: random(4, 3, 2, 64, seed=3) for name in "kv"}
    hold(row, given | three)
    assert backend.driver.launched("fwd_paged")


@exercise(("runtime.flash_attn_with_kvcache", "block_table"))
def _cache_table(row: Row, backend: FakeBackend) -> None:
    given = base(row.function) | {"block_table": TABLE, "cache_seqlens": ints(6, 3)}
    hold(row, given)
    hold(row, given | {"block_table": TABLE.flip(0)})
    hold(row, given | {name: random(4, 3, 2, 64, seed=3) for name in ("k_cache", "v_cache")})


@exercise(*((f"runtime.{name}", "num_splits") for name in ("flash_attn_with_kvcache", "fa4.flash_attn_func")))
def _splits(row: Row, backend: FakeBackend) -> None:
    for value in (1, 3, 256):
        hold(row, base(row.function) | {"num_splits": value})
        made = backend.driver.launched("fwd_paged")
        assert value == 1 or made[-1]["params"]["num_splits"] == value
    hold(row, base(row.function) | {"num_splits": 0})


@exercise(("runtime.fa4.flash_attn_varlen_func", "num_splits"))
def _splits_of_sequences(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    hold(row, given | {"num_splits": 3})
    assert not backend.driver.launched("fwd_paged")
    dense = {"cu_seqlens_k": None, "k": random(2, 7, 2, 64, seed=1), "v": random(2, 7, 2, 64, seed=2)}
    hold(row, given | dense | {"num_splits": 3})
    assert backend.driver.launched("fwd_paged")[-1]["params"]["num_splits"] == 3
    hold(row, given | dense | {"num_splits": 3, "seqused_q": ints(1, 2)})


@exercise(*((f"runtime.fa4.{name}", "pack_gqa") for name in ("flash_attn_func", "flash_attn_varlen_func")))
def _packs(row: Row, backend: FakeBackend) -> None:
    for value, pack in ((True, 2), (False, 1)):
        hold(row, base(row.function) | {"pack_gqa": value})
        assert backend.driver.launches[-1]["params"]["pack"] == pack


@exercise(*((f"runtime.fa4.{name}", "window_size") for name in ("flash_attn_func", "flash_attn_varlen_func")))
def _windows(row: Row, backend: FakeBackend) -> None:
    for window in ((1, 0), (0, 1), (None, 0), (1, None), (-1, -1), (-1, 0)):
        hold(row, base(row.function) | {"window_size": window})
    with pytest.raises(ArgumentError) as error:
        row.call(**base(row.function), window_size=(3, -1))
    assert (error.value.argument, error.value.reason) == ("window_size", named_reason(row))


@exercise(*((function, "softcap") for function in UPSTREAM if "combine" not in function))
def _softcaps(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    assert differ(attended(given, row.function).out, attended(given | {"softcap": 0.4}, row.function).out)
    for value in (0.4, -0.4, 0.0):
        hold(row, given | {"softcap": value})
    if "fa4" in row.function:
        assert torch.equal(row.call(**given, softcap=None)[0], row.call(**given)[0])


@exercise(*((function, "softmax_scale") for function in UPSTREAM if "combine" not in function))
def _scales(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    assert differ(attended(given, row.function).out, attended(given | {"softmax_scale": 0.7}, row.function).out)
    hold(row, given | {"softmax_scale": 0.7})
    for value in (0.0, -1.0, 1e31):
        with pytest.raises(ArgumentError) as error:
            row.call(**given, softmax_scale=value)
        assert (error.value.argument, error.value.reason) == ("softmax_scale", "value")


# -- combining --------------------------------------------------------------------------------------------------------

COMBINE = "runtime.fa4.flash_attn_combine"


def joined(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logsumexp(given["lse_partial"].double(), 0)
    weights = torch.exp(given["lse_partial"].double() - lse)
    return (weights[..., None] * given["out_partial"].double()).sum(0), lse


def hold_joined(row: Row, given: dict[str, Any], rows: list[int] | None = None) -> Any:
    found = row.call(**given)
    for mine, want in zip(found, joined(given), strict=True):
        if mine is not None:
            close(mine if rows is None else mine[rows], want if rows is None else want[rows])
    return found


@exercise((COMBINE, "out_partial"), (COMBINE, "lse_partial"))
def _parts(row: Row, backend: FakeBackend) -> None:
    given, name = base(row.function), row.argument
    changed = given | {name: random(*given[name].shape, seed=9).float()}
    assert differ(joined(given)[0], joined(changed)[0])
    hold_joined(row, given)
    hold_joined(row, changed)
    hold_joined(row, {n: x.unflatten(1, (1, 7)) for n, x in given.items()})
    for dtype in (BF16, torch.float16):
        out, _ = hold_joined(row, given | {"out_partial": given["out_partial"].to(dtype)})
        assert out.dtype == dtype


@exercise((COMBINE, "out"))
def _given_out(row: Row, backend: FakeBackend) -> None:
    given, out = base(row.function), torch.empty(7, 4, 64, dtype=BF16)
    assert hold_joined(row, given | {"out": out})[0] is out
    given["out_partial"].requires_grad_()
    with pytest.raises(ArgumentError) as error:
        row.call(**given, out=out)
    assert (error.value.argument, error.value.reason) == ("out", named_reason(row))


@exercise((COMBINE, "out_dtype"))
def _out_dtype(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    for dtype in (torch.float32, BF16, torch.float16):
        assert hold_joined(row, given | {"out_dtype": dtype})[0].dtype == dtype
    with pytest.raises(ArgumentError) as error:
        row.call(**given, out=torch.empty(7, 4, 64, dtype=BF16), out_dtype=torch.float16)
    assert (error.value.argument, error.value.reason) == ("out", named_reason(row))


@exercise((COMBINE, "cu_seqlens"), (COMBINE, "seqused"), (COMBINE, "virtual_batch_idx"))
def _rows_in_use(row: Row, backend: FakeBackend) -> None:
    lengths = {"cu_seqlens": ints(1, 3, 6)}
    rows = [1, 2, 3, 4, 5]
    if row.argument == "seqused":
        lengths, rows = lengths | {"seqused": ints(1, 2)}, [1, 3, 4]
    if row.argument == "virtual_batch_idx":
        lengths |= {"virtual_batch_idx": ints(1, 0)}
    out = torch.full((7, 4, 64), 9.0)
    hold_joined(row, base(row.function) | lengths | {"out": out}, rows)
    assert (out[[i for i in range(7) if i not in rows]] == 9).all()
    hold_joined(row, base(row.function) | lengths, rows)


@exercise((COMBINE, "return_lse"))
def _lse_or_none(row: Row, backend: FakeBackend) -> None:
    given = base(row.function)
    assert hold_joined(row, given)[1].shape == (7, 4)
    assert hold_joined(row, given | {"return_lse": False})[1] is None


# -- refusals and gradients -------------------------------------------------------------------------------------------


def named_reason(row: Row) -> str:
    """The reason that the row gives."""
    (reason,) = re.findall(r": `(\w+)`", row.text)
    return reason


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("row", of("refused"))
def test_what_is_refused_raises_the_error_that_is_named(backend: FakeBackend, row: Row):
    given = base(row.function)
    hold(row, given)
    launches = len(backend.driver.launches)
    for value in (0.5, torch.zeros(4), [torch.zeros(4)], lambda *_: None):
        with pytest.raises(ArgumentError) as error:
            row.call(**given | {row.argument: value})
        assert (error.value.argument, error.value.reason) == (row.argument, named_reason(row))
    assert len(backend.driver.launches) == launches
    default = dict(signature(UPSTREAM[row.function]))[row.argument]
    hold(row, given | {row.argument: eval(default)})


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize("row", [p for p in of("served") if p.values[0].argument == "deterministic"])
def test_deterministic_is_about_the_backward(backend: FakeBackend, row: Row):
    given = base(row.function)
    wanting = [given[name].requires_grad_() for name in TENSORS if name in given]
    for value in (True, False):
        out, _ = result(row.call(**given, deterministic=value))
        torch.autograd.grad(out.float().square().sum(), wanting)
        assert bool(backend.driver.launched("bwd")[-1]["params"]["semaphores"]) is value


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize("row", [p for p in of("differs") if p.values[0].argument == "alibi_slopes"])
def test_slopes_are_differentiable(backend: FakeBackend, row: Row):
    slopes = SLOPES.clone().requires_grad_()
    out, _ = result(row.call(**base(row.function), alibi_slopes=slopes))
    (found,) = torch.autograd.grad(out.float().square().sum(), slopes)
    assert found.shape == (4,) and found.any()


def test_every_exercise_has_its_row():
    named = {(row.function, row.argument) for row in ROWS if row.status != "refused"}
    assert BY_NAME.keys() <= named
