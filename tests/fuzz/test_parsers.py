"""Bar 5: no bytes make a parser raise anything but its typed error, hang, or grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import ContractError, Index, canonical_json
from tests.fuzz import __main__ as program
from tests.fuzz import mutate, seeds, targets
from tests.project.shell import ROOT
from tests.soak.size import size

CASES = size(5_000, 200_000)  # of each engine and parser
EXAMPLES = settings(max_examples=size(150, 5_000), deadline=None, derandomize=True, database=None)
GROWTH_MIB = 32
KEPT = [(name, path) for name in program.NAMES for path in sorted((program.CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", program.NAMES)
@pytest.mark.parametrize("engine", ["seeded", "atheris"] if program.has_atheris() else ["seeded"])
def test_many_cases(name: str, engine: str, record_property):
    command = [sys.executable, "-m", "tests.fuzz", name, "--engine", engine, "--cases", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["cases"] >= CASES and report["grown_mib"] <= GROWTH_MIB
    record_property(f"{engine} {name}", done.stdout.strip())


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_the_kept_corpus(name: str, path):
    targets.TARGETS[name](path.read_bytes())


def test_seeds_are_kept_and_both_kinds_are_among_them():
    for name, made in seeds.seeds().items():
        kept = {n: (program.CORPUS / name / f"seed-{n}").read_bytes() for n in made}
        if name != "frame":  # another zstd may write other bytes
            assert kept == made
        assert {targets.TARGETS[name](data) for data in kept.values()} == {True, False}


def test_a_finding_is_reported_with_its_input(monkeypatch):
    def broken(data: bytes) -> bool:
        if len(data) > 100:
            raise KeyError("no typed error")
        return False

    monkeypatch.setitem(targets.TARGETS, "elf", broken)
    with pytest.raises(SystemExit, match=r"elf: KeyError.* from /.*fuzz-") as error:
        program.seeded("elf", 10_000, 1)
    assert len(Path(str(error.value).split(" from ")[1]).read_bytes()) > 100


def test_without_atheris_only_its_engine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(program, "has_atheris", lambda: False)
    with pytest.raises(SystemExit):
        program.main(["elf", "--engine", "atheris"])
    assert "pip install atheris" in capsys.readouterr().err
    assert program.main(["elf", "--cases", "10"]) == 0


def test_the_mutator_repeats_itself_and_changes_almost_everything():
    corpus = program.corpus("frame")
    one, again, other = (mutate.Mutator(corpus, seed) for seed in ("1", "1", "2"))
    cases = [one.case() for _ in range(500)]
    assert cases == [again.case() for _ in range(500)] != [other.case() for _ in range(500)]
    assert len(set(cases)) > 400 and max(map(len, cases)) <= mutate.LONGEST


# -- structure, by hypothesis -----------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))


def changed(base: bytes, draw: st.DataObject) -> bytes:
    """A JSON text with up to three of its values replaced, taken away or doubled."""
    value = json.loads(base)
    for _ in range(draw.draw(st.integers(1, 3))):
        *path, last = draw.draw(st.sampled_from(mutate.places(value)[1:] or [(None,)]))
        inner = value
        for key in path:
            inner = inner[key]
        action = draw.draw(st.sampled_from(("replace", "delete", "double")))
        if last is None:
            break
        if action == "replace":
            inner[last] = draw.draw(VALUES)
        elif action == "delete":
            del inner[last]
        elif isinstance(inner, list):
            inner.append(inner[last])
        else:
            inner[draw.draw(st.text(max_size=8))] = inner[last]
    return json.dumps(value).encode()


@pytest.mark.parametrize(("name", "base"), [("index", "whole"), ("channel", "whole")])
def test_changed_documents(name: str, base: str):
    @EXAMPLES
    @given(st.data())
    def check(draw: st.DataObject) -> None:
        targets.TARGETS[name](changed(seeds.seeds()[name][base], draw))

    check()


BLOCKS = st.lists(
    st.tuples(st.sampled_from((0, 1, 2, 3)), st.integers(0, 1 << 18), st.binary(max_size=40), st.booleans()), max_size=4
)


@EXAMPLES
@given(
    st.integers(0, 255),
    st.binary(max_size=14),
    BLOCKS,
    st.binary(max_size=12),
    st.sampled_from((seeds.MAGIC, b"", seeds.skippable(3, b"abc") + seeds.MAGIC)),
)
def test_frames_of_any_header_and_blocks(descriptor, fields, blocks, tail, magic):
    """Descriptor, window, dictionary and size fields, then blocks: raw, one byte repeated, compressed, reserved."""
    body = b"".join(
        ((length << 3 | kind << 1 | last) & 0xFFFFFF).to_bytes(3, "little") + content
        for kind, length, content, last in blocks
    )
    targets.frame(magic + bytes([descriptor]) + fields + body + tail)


@EXAMPLES
@given(
    st.sampled_from((seeds.header(), seeds.header(90, 7))),
    st.dictionaries(st.integers(0, 63), st.integers(0, 255), max_size=6),
    st.binary(max_size=10),
    st.integers(0, 80),
)
def test_elf_headers_with_other_bytes(header, changes, tail, length):
    data = bytearray(header)
    for at, value in changes.items():
        data[at] = value
    targets.elf(bytes(data + tail)[:length])


# -- time and memory --------------------------------------------------------------------------------------------------

UNITS = {"lists": b"[],", "objects": b"{},", "numbers": b"1,", "names": b'"a":1,', "texts": b'"",', "deep": b"["}
TIMES = 40  # bytes that reading JSON may take for each of the text's


@pytest.mark.parametrize("unit", UNITS)
def test_an_index_costs_a_bounded_multiple_of_its_length(unit: str):
    """The worst are many small values; one that hashes to a trusted digest is never like that."""
    opening, end = (b'{"artifacts":{', b'"z":1}}') if unit == "names" else (b'{"artifacts":[', b"1]}")
    data = opening + UNITS[unit] * 200_000 + end
    tracemalloc.start()
    try:
        with pytest.raises(ContractError):
            Index.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] <= TIMES * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["a_" * 200_000, "a-" * 200_000, "fwd-bf16-d64-dv64" + "-m1" * 100_000 + "!"])
def test_long_names_are_read_in_one_pass(key: str):
    """A pattern that went back and forth would take hours here."""
    value = json.loads(seeds.seeds()["index"]["row"])
    value["rows"][0]["variant"] = key
    with pytest.raises(ContractError):
        Index.from_bytes(canonical_json(value))
