"""The lock file: what it pins, what is refused under it, and the command that writes it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

import runtime
from registry.contract import canonical_json
from registry.store import Store
from runtime.cli import commands as cli
from runtime.errors import ConfigError, NoKernelError, UntrustedError
from runtime.load import session
from runtime.trust import lockfile, resolve
from tests.runtime.fakes import TABLE, FakeBackend, toy_index, write_registry
from tests.support.cli import run, usage
from tests.support.sources import URL, Server, server

__all__ = ["server"]  # a fixture

Q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
LONG = torch.zeros(1, 100, 1, 64, dtype=torch.bfloat16)
WIDE = torch.zeros(1, 4, 1, 128, dtype=torch.bfloat16)
BF16_64 = ("--dtype", "bf16", "--head-dim", 64)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "cubinery.lock"


def lock_of(capsys, lock: Path, registry: object, *argv: object) -> dict:
    code, report = run(capsys, "lock", "--lock", lock, "--registry", registry, *argv)
    assert code == 0 and report["missing"] == [] and report["lock"] == str(lock)
    return report


def variants(lock: Path) -> set[str]:
    return {artifact["variant"] for artifact in json.loads(lock.read_bytes())["artifacts"]}


def publish_another(registry: Path, only: str = "") -> str:
    """The digest of another index, at which the channel points from now on."""
    with Store(registry) as store:
        return store.put_index(toy_index(only=only)[0].replace(release="0.2"), "stable")


def not_locked(call) -> str:
    with pytest.raises(NoKernelError) as error:
        call()
    assert error.value.reason == "not_locked"
    return str(error.value)


def test_the_file_pins_the_index_and_the_kernels_for_shapes(registry: Path, lock: Path, capsys):
    report = lock_of(capsys, lock, registry, *BF16_64)
    index, _ = toy_index()
    wanted = sorted((a for a in index.artifacts if "bf16-d64" in a.variant), key=lambda a: a.variant)
    value = {
        "format": 1,
        "indexes": {"sm_120": index.digest},
        "artifacts": [
            {"variant": a.variant, "arch": "sm_120", "sha256": a.cubin_sha256, "size": a.cubin_size,
             "frame_sha256": a.frame_sha256, "frame_size": a.frame_size}
            for a in wanted
        ],
        "shapes": [{"dtype": "bf16", "head_dim": 64, "head_dim_v": 64}],
    }  # fmt: skip
    assert lock.read_bytes() == canonical_json(value) + b"\n"
    assert report["locked"] == report["wanted"] == 2
    lock_of(capsys, lock, registry)
    assert lock.read_bytes() == canonical_json(value) + b"\n", "without shapes: those that the file has"
    lock.unlink()
    lock_of(capsys, lock, registry)
    assert len(variants(lock)) == len(TABLE), "nor a file: every kernel"
    assert cli.main(["lock", "--lock", str(lock), "--registry", str(registry)]) == 0
    assert f"{lock}: {len(TABLE)} kernels" in capsys.readouterr().out


def test_only_what_is_locked_loads_and_the_error_names_the_command_that_adds(
    backend: FakeBackend, registry: Path, lock: Path, capsys
):
    lock_of(capsys, lock, registry, *BF16_64)
    settings = {"registry": registry, "lock": lock}
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    message = not_locked(lambda: runtime.flash_attn(WIDE, WIDE, WIDE))
    assert "d128" in message and str(lock) in message and len(backend.driver.launches) == 1
    words = shlex.split(message.split("python -m runtime ")[1])
    assert cli.main([*words, "--registry", str(registry)]) == 0
    runtime.configure(**settings)
    for x in (Q, LONG, WIDE):
        runtime.flash_attn(x, x, x)
    assert len(variants(lock)) == 4 and len(json.loads(lock.read_bytes())["shapes"]) == 2


def test_a_channel_that_moves_changes_nothing(backend: FakeBackend, registry: Path, lock: Path, capsys):
    lock_of(capsys, lock, registry, *BF16_64)
    before = toy_index()[0].digest
    publish_another(registry)
    runtime.configure(registry=registry)
    assert session.current().digests()["sm_120"] != before
    runtime.configure(registry=registry, lock=lock)
    assert session.current().digests() == {"sm_120": before}
    runtime.flash_attn(Q, Q, Q)
    lock_of(capsys, lock, registry)
    assert json.loads(lock.read_bytes())["indexes"]["sm_120"] != before, "until it is locked anew"


def test_added_kernels_are_of_the_locked_index(registry: Path, lock: Path, capsys):
    lock_of(capsys, lock, registry, *BF16_64)
    before = json.loads(lock.read_bytes())["indexes"]
    publish_another(registry, only="d64")
    for _ in range(2):  # the second time there is nothing new
        lock_of(capsys, lock, registry, "--add", "--dtype", "fp16", "--head-dim", 128)
    assert len(json.loads(lock.read_bytes())["shapes"]) == 2
    assert json.loads(lock.read_bytes())["indexes"] == before and len(variants(lock)) == 4


def test_offline_and_without_a_server(backend: FakeBackend, server: Server, lock: Path, tmp_path: Path, capsys):
    cache = tmp_path / "cache"
    lock_of(capsys, lock, URL, "--index", server.index.digest, "--cache", cache, *BF16_64)
    server.down = True
    asked = len(server.asked)
    for offline in (False, True):
        runtime.configure(registry=URL, cache=cache, lock=lock, offline=offline)
        runtime.flash_attn(Q, Q, Q)
    assert len(server.asked) == asked, "the lock file vouches for the index, and the cache has all"


def test_a_yanked_index_that_is_locked_still_loads(backend, registry: Path, lock: Path, capsys, monkeypatch):
    lock_of(capsys, lock, registry, *BF16_64)

    def yanked(*_, **__):
        raise UntrustedError("yanked", reason="yanked")

    monkeypatch.setattr(resolve, "resolve", yanked)
    runtime.configure(registry=registry)
    with pytest.raises(UntrustedError):
        runtime.flash_attn(Q, Q, Q)
    runtime.configure(registry=registry, lock=lock)
    runtime.flash_attn(Q, Q, Q)


@pytest.mark.parametrize("name", ["sha256", "size", "frame_sha256", "frame_size"])
def test_other_bytes_than_the_locked_ones_do_not_load(backend, registry: Path, lock: Path, capsys, name: str):
    lock_of(capsys, lock, registry, *BF16_64)
    value = json.loads(lock.read_bytes())
    for artifact in value["artifacts"]:
        artifact[name] = "0" * 64 if "sha" in name else artifact[name] + 1
    lock.write_text(json.dumps(value))
    runtime.configure(registry=registry, lock=lock)
    not_locked(lambda: runtime.flash_attn(Q, Q, Q))
    assert "load_library" not in backend.driver.calls


def test_another_index_with_the_same_variants_does_not_load(backend, registry: Path, lock: Path, capsys):
    """Where its kernels have other bytes; where they are the same, they are those that were locked."""
    lock_of(capsys, lock, registry, *BF16_64)
    value = json.loads(lock.read_bytes()) | {"indexes": {"sm_120": publish_another(registry)}}
    value["artifacts"][0]["frame_sha256"] = "1" * 64
    lock.write_text(json.dumps(value))
    runtime.configure(registry=registry, lock=lock)
    not_locked(lambda: runtime.flash_attn(LONG, LONG, LONG))
    runtime.flash_attn(Q, Q, Q)


def test_a_gpu_that_the_file_has_no_index_for(backend: FakeBackend, registry: Path, lock: Path, capsys):
    lock_of(capsys, lock, registry, *BF16_64)
    backend.capability_of_all = (9, 0)
    runtime.configure(registry=registry, lock=lock)
    assert "sm_90" in not_locked(lambda: runtime.flash_attn(Q, Q, Q))


def test_one_architecture_of_several(tmp_path: Path, lock: Path, capsys):
    digests = write_registry(tmp_path / "r.db", "sm_120", "sm_90", only="bf16-d64")
    lock_of(capsys, lock, tmp_path / "r.db", *BF16_64, "--arch", "sm_90")
    assert json.loads(lock.read_bytes())["indexes"] == {"sm_90": digests["sm_90"]}
    lock_of(capsys, lock, tmp_path / "r.db")
    assert json.loads(lock.read_bytes())["indexes"] == digests and len(json.loads(lock.read_bytes())["artifacts"]) == 4


def test_nothing_is_written_unless_everything_is_there(server: Server, lock: Path, tmp_path: Path, capsys):
    given = ("--registry", URL, "--index", server.index.digest, "--cache", tmp_path / "c", "--lock", lock)
    code, report = run(capsys, "lock", *given, "--head-dim", 128)
    assert code == 1 and report["missing"] and report["lock"] is None and not lock.exists()
    server.frames = {}
    assert cli.main(["lock", *map(str, given), "--head-dim", "64", "--dtype", "bf16"]) == 1
    assert "no lock file written" in capsys.readouterr().out and not lock.exists()


def test_a_file_that_cannot_be_written(registry: Path, tmp_path: Path, capsys):
    code, report = run(capsys, "lock", "--lock", tmp_path / "none" / "x.lock", "--registry", registry)
    assert code == 2 and "cannot be written" in report["error"]["message"]
    (tmp_path / "folder").mkdir()
    code, report = run(capsys, "lock", "--lock", tmp_path / "folder", "--registry", registry, *BF16_64)
    assert code == 2 and not list(tmp_path.glob("*.tmp"))


def test_the_default_place_and_adding_to_nothing(registry: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, report = run(capsys, "lock", "--registry", registry, *BF16_64)
    assert code == 0 and report["lock"] == str(tmp_path / "cubinery.lock")
    code, report = run(capsys, "lock", "--registry", registry, "--add")
    assert code == 2 and "needs shapes" in report["error"]["message"]
    code, report = run(capsys, "lock", "--registry", registry, "--add", "--lock", tmp_path / "none", *BF16_64)
    assert code == 2 and "cannot be read" in report["error"]["message"]
    assert "--dtype" in usage(capsys, "lock", "--dtype", "fp64")


def test_prefetch_and_doctor_under_a_lock_file(server: Server, lock: Path, tmp_path: Path, capsys):
    given = ("--registry", URL, "--cache", tmp_path / "cache")
    lock_of(capsys, lock, URL, "--index", server.index.digest, "--cache", tmp_path / "other", *BF16_64)
    value = json.loads(lock.read_bytes())
    value["artifacts"] = value["artifacts"][:1]
    lock.write_text(json.dumps(value))
    code, report = run(capsys, "prefetch", *given, "--lock", lock)
    assert code == 0 and report["wanted"] == report["verified"] == 1 and report["missing"] == []
    code, report = run(capsys, "prefetch", *given, "--lock", lock, *BF16_64)
    assert code == 1 and report["verified"] == 1 and "not in the lock file" in report["missing"][0]["reason"]
    damaged = {"artifacts": [value["artifacts"][0] | {"size": 1}]}
    (tmp_path / "damaged.lock").write_text(json.dumps(value | damaged))
    code, report = run(capsys, "prefetch", *given, "--lock", tmp_path / "damaged.lock")
    assert code == 1 and "has not" in report["missing"][0]["reason"]
    code, report = run(capsys, "doctor", *given, "--lock", lock)
    assert code == 0 and report["lock"] == {"file": str(lock), "kernels": 1}
    assert report["would_load"]["sm_120"]["variants"] == [value["artifacts"][0]["variant"]]
    assert cli.main(["doctor", *map(str, given), "--lock", str(lock)]) == 0
    assert f"lock      {lock}, 1 kernels and no others" in capsys.readouterr().out


GOOD = {
    "variant": TABLE[0][3].key, "arch": "sm_120", "sha256": "1" * 64, "size": 5, "frame_sha256": "2" * 64,
    "frame_size": 4,
}  # fmt: skip
WHOLE = {"format": 1, "indexes": {"sm_120": "3" * 64}, "artifacts": [GOOD], "shapes": [{"head_dim": 64}]}


@pytest.mark.parametrize("text", [
    "", "[]", "{", "null", "[" * 100_000, "\xff", json.dumps(WHOLE | {"format": 2}), json.dumps(WHOLE | {"more": 1}),
    *(json.dumps({k: v for k, v in WHOLE.items() if k != name}) for name in WHOLE),
    *(json.dumps(WHOLE | {"indexes": value}) for value in ([], {"sm_120": "3"}, {"sm_120a": "3" * 64}, None)),
    *(json.dumps(WHOLE | {"shapes": value}) for value in ({}, [1], None)),
    *(json.dumps(WHOLE | {"artifacts": value}) for value in ({}, [1], None, 5)),
    *(json.dumps(WHOLE | {"artifacts": [GOOD | {name: value}]}) for name in GOOD for value in (None, -1, "x", [])),
    json.dumps(WHOLE | {"artifacts": [{k: v for k, v in GOOD.items() if k != "size"}]}),
    json.dumps(WHOLE | {"artifacts": [GOOD | {"more": 1}]}),
], ids=lambda text: text[:12])  # fmt: skip
def test_what_is_no_lock_file(lock: Path, text: str):
    lock.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        lockfile.read(str(lock))
    assert str(lock) in str(error.value)


def test_a_lock_file_is_read_as_it_was_written(lock: Path):
    lock.write_text(json.dumps(WHOLE, indent=4))
    found = lockfile.read(str(lock))
    found.write()
    assert lock.read_bytes() == canonical_json(WHOLE) + b"\n" and lockfile.read(str(lock)) == found


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_threat_a_lock_file_that_others_can_write(registry: Path, lock: Path, mode: int):
    lock.write_text(json.dumps(WHOLE))
    lock.chmod(mode)
    runtime.configure(registry=registry, lock=lock)
    with pytest.raises(ConfigError, match="nobody else can write"):
        session.current()


def test_a_missing_file_and_a_contradiction_are_said(registry: Path, lock: Path, capsys):
    runtime.configure(registry=registry, lock=lock)
    with pytest.raises(ConfigError, match="cannot be read"):
        session.current()
    lock_of(capsys, lock, registry, *BF16_64)
    runtime.configure(registry=registry, lock=lock, index="4" * 64)
    with pytest.raises(ConfigError, match="not in the lock file"):
        session.current().digests()
    runtime.configure(registry=registry, lock=lock, index=toy_index()[0].digest)
    assert session.current().digests() == {"sm_120": toy_index()[0].digest}
