"""The server's side of releases: what it serves, what it takes in from whom, and the timestamp that it keeps alive."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tuf.api.metadata import Metadata

from registry import gc
from registry.contract import Index, canonical_json, parts, sha256_hex
from registry.contract import index as index_file
from registry.errors import ConflictError, ReleaseError
from registry.releases import publish, signing
from registry.releases import upload as accepting
from registry.releases.client import verify_all
from registry.releases.push import Push
from registry.releases.upload import accept, renew
from registry.store import Store
from server import upload
from server.app import create_app
from server.upload import Settings
from tests.runtime.fakes import write_registry

TOKEN = "a token of some length"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


class Publisher:
    """A publisher's own registry and keys; `timestamp` says whether the timestamp key is here or on the server."""

    def __init__(self, folder: Path, timestamp: bool):
        self.folder = folder
        self.path = folder / "mine.db"
        self.digests = write_registry(self.path, only="bf16-d64")
        with Store(self.path) as store:
            roles = dict.fromkeys(signing.ROLES, 1)
            made = signing.make_keys(folder / "keys", roles)
            now = datetime.datetime.now(datetime.UTC)
            self.root = publish.create_root(store, made, roles, now)
        self.timestamp_key = folder / "keys" / "timestamp-1.pem"
        if not timestamp:
            self.timestamp_key = self.timestamp_key.rename(folder / "server.pem")

    def release(self, only: str = "", change=lambda draft: draft.publish("stable")) -> None:
        if only:
            self.digests = write_registry(self.path, only=only)
        with Store(self.path) as store:
            draft = publish.Draft(store, signing.read_keys([self.folder / "keys"]))
            change(draft)
            draft.sign_targets()
            draft.commit()

    def files(self) -> dict[str, bytes]:
        with Store(self.path, readonly=True) as store:
            return {path: store.tuf(path) or b"" for path in store.tuf_paths()}

    def push(self, client: TestClient, token: str = TOKEN) -> dict[str, int]:
        with Store(self.path) as store:
            return Push(store, "http://testserver", token, client).run()


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "publisher", timestamp=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path / "server" / "r.db"


@pytest.fixture
def client(path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(path, Settings(TOKEN)), raise_server_exceptions=False) as client:
        yield client


def problem(answer, status: int, reason: str) -> str:
    assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
    return answer.json()["message"]


def put_metadata(client: TestClient, files: dict[str, bytes]):
    body = canonical_json({"files": {path: text.decode() for path, text in files.items()}})
    return client.put("/v1/tuf", content=body, headers=HEADERS)


def signed(client: TestClient, root: bytes) -> dict[str, dict[str, str]]:
    """What a new client of the server would load."""

    def fetch(path: str, cap: int) -> bytes | None:
        answer = client.get(f"/v1/tuf/{path}")
        assert answer.status_code in (200, 404), answer.text
        return answer.content if answer.status_code == 200 else None

    return {name: channel.indexes for name, channel in verify_all(fetch, root, fresh=True).items()}


# -- what is served ---------------------------------------------------------------------------------------------------


def test_metadata_is_served_with_the_right_lifetimes(publisher, client):
    publisher.release()
    publisher.push(client)
    for path, body in publisher.files().items():
        answer = client.get(f"/v1/tuf/{path}")
        assert answer.content == body and answer.headers["etag"] == f'"{sha256_hex(body)}"'
        assert ("immutable" in answer.headers["cache-control"]) == (path != "timestamp.json")
        assert client.get(f"/v1/tuf/{path}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    problem(client.get("/v1/tuf/9.root.json"), 404, "not_found")
    problem(client.get(f"/v1/tuf/targets/{'0' * 64}.stable.json"), 404, "not_found")
    for name in ("root.json", "01.root.json", "1.boss.json", "targets/x.json", "..%2f..%2fetc", "1.root.json%0a"):
        assert client.get(f"/v1/tuf/{name}").status_code in (404, 422)


# -- who may send, and how much ---------------------------------------------------------------------------------------

PUTS = (f"/v1/blobs/sha256/{'0' * 64}", f"/v1/indexes/sha256/{'0' * 64}", "/v1/tuf")


@pytest.mark.parametrize("url", PUTS)
def test_only_who_has_the_token_may_send(client, path, url):
    for header in (None, "Bearer", "Bearer wrong token of length", f"Basic {TOKEN}", f"Bearer {TOKEN} ", "Bearer ä"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        problem(client.put(url, content=b"x", headers=headers), 401, "unauthorized")
    with TestClient(create_app(path, Settings(""))) as closed:
        problem(closed.put(url, content=b"x", headers={"authorization": "Bearer "}), 403, "read_only")
    with Store(path, readonly=True) as store:
        assert store.counts()["bytes"] == 0 and store.tuf_paths() == []


@pytest.mark.parametrize("url", PUTS)
def test_length_is_required_and_bounded(client, url, monkeypatch):
    monkeypatch.setattr(upload, "MAX_BLOB", 100)
    problem(client.put(url, content=iter([b"x"]), headers=HEADERS), 411, "length_required")
    for length in ("99999999999999999999999", str(1 << 31)):
        problem(client.put(url, content=b"x", headers={**HEADERS, "content-length": length}), 413, "too_long")


def test_a_body_longer_than_it_says_is_cut(client, monkeypatch):
    """uvicorn holds a body to its Content-Length; this holds where something else does not."""
    for name in ("MAX_BLOB", "MAX_INDEX", "MAX_METADATA"):
        monkeypatch.setattr(upload, name, 4)
    for url in PUTS:
        answer = client.put(url, content=b"12345", headers={**HEADERS, "content-length": "3"})
        problem(answer, 413, "too_long")


def test_the_environment_s_settings(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CUBINERY_TOKEN", TOKEN)
    monkeypatch.setenv("CUBINERY_TIMESTAMP_KEY", str(tmp_path / "t.pem"))
    assert Settings.of_environment() == Settings(TOKEN, tmp_path / "t.pem")
    monkeypatch.setenv("CUBINERY_TOKEN", "short")
    assert Settings.of_environment().token == "" and "fewer than 16" in caplog.text


# -- blobs and indexes ------------------------------------------------------------------------------------------------


def test_blobs_then_indexes(publisher, client):
    with Store(publisher.path, readonly=True) as store:
        body = store.get_index(publisher.digests["sm_120"]) or b""
        frames = {a.frame_sha256: store.get_frame(a.frame_sha256) or b"" for a in Index.from_bytes(body).artifacts}
    index = f"/v1/indexes/sha256/{sha256_hex(body)}"
    assert "put it first" in problem(client.put(index, content=body, headers=HEADERS), 409, "not_found")
    for digest, frame in frames.items():
        url = f"/v1/blobs/sha256/{digest}"
        problem(client.put(url, content=frame[:-1], headers=HEADERS), 422, "integrity")
        assert client.put(url, content=frame, headers=HEADERS).status_code == 201
        assert client.put(url, content=frame, headers=HEADERS).status_code == 200
        problem(client.put(url, content=b"other", headers=HEADERS), 409, "conflict")
        assert client.get(url).content == frame
    problem(client.put(index, content=body + b" ", headers=HEADERS), 422, "integrity")
    assert client.put(index, content=body, headers=HEADERS).status_code == 201
    assert client.put(index, content=body, headers=HEADERS).status_code == 200
    problem(client.put(index, content=b"{}", headers=HEADERS), 409, "conflict")
    for wrong in (b"{}", b"\x00", json.dumps(json.loads(body), indent=1).encode()):
        answer = client.put(f"/v1/indexes/sha256/{sha256_hex(wrong)}", content=wrong, headers=HEADERS)
        problem(answer, 422, "contract")
    for wrong in (b"", b"no frame", frame + frame, frame + b"x"):
        answer = client.put(f"/v1/blobs/sha256/{sha256_hex(wrong)}", content=wrong, headers=HEADERS)
        problem(answer, 422, "integrity")


def test_an_index_in_parts_follows_its_parts_and_what_is_sent_again_stays_a_day(publisher, client, path, monkeypatch):
    monkeypatch.setattr(index_file, "MAX_WHOLE", 0)
    monkeypatch.setattr(parts, "PART_ROWS", 2)
    with Store(publisher.path) as store:
        made = store.index(publisher.digests["sm_120"]).replace(release="in parts")
        frames = [store.get_frame(a.frame_sha256) for a in made.artifacts]
    *some, last = made.documents.items()
    for frame in frames:
        client.put(f"/v1/blobs/sha256/{sha256_hex(frame)}", content=frame, headers=HEADERS)

    def send(item: tuple[str, bytes]):
        return client.put(f"/v1/indexes/sha256/{item[0]}", content=item[1], headers=HEADERS)

    assert "put it first" in problem(send(last), 409, "not_found") and len(some) > 1
    assert [send(item).status_code for item in some] == [201] * len(some)
    with Store(path) as store, store.transaction() as db:
        db.execute("UPDATE indexes SET added = 0")
        db.execute("UPDATE blobs SET added = 0")
    assert [send(item).status_code for item in some] == [200] * len(some)
    for frame in frames:
        client.put(f"/v1/blobs/sha256/{sha256_hex(frame)}", content=frame, headers=HEADERS)
    with Store(path) as store:
        assert (gc.collect(store).parts, gc.collect(store).blobs) == ((), ())
    assert send(last).status_code == 201
    with Store(path, readonly=True) as store:
        assert store.index(made.digest) == made and made.digest in store.indexes()
    assert client.get(f"/v1/indexes/sha256/{some[0][0]}").content == some[0][1]


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_push_brings_a_release_and_then_only_what_is_new(publisher, client, path):
    publisher.release()
    assert publisher.push(client) == {"blobs": 2, "indexes": 1, "metadata": 5}
    assert signed(client, publisher.root) == {"stable": publisher.digests}
    assert publisher.push(client) == {"blobs": 0, "indexes": 0, "metadata": 0}
    publisher.release(only="16-d64")  # two blobs more
    publisher.release(change=lambda draft: draft.promote("stable", "lts"))
    sent = publisher.push(client)
    assert (sent["blobs"], sent["indexes"]) == (2, 1), "two releases at once are fine, without a gap"
    assert signed(client, publisher.root) == {"stable": publisher.digests, "lts": publisher.digests}
    with Store(path, readonly=True) as store:
        assert store.channel("lts") == publisher.digests, "its own channels follow"
        assert store.verify() == [] or all("PTX" in line for line in store.verify())


def test_the_server_signs_the_timestamp_and_the_publisher_takes_it(tmp_path, path):
    publisher = Publisher(tmp_path / "publisher", timestamp=False)
    publisher.release()
    assert "timestamp.json" not in publisher.files()
    with TestClient(create_app(path, Settings(TOKEN))) as keyless:
        with pytest.raises(ReleaseError, match="no key to sign") as error:
            publisher.push(keyless)
        assert error.value.reason == "upload"
    with TestClient(create_app(path, Settings(TOKEN, publisher.timestamp_key))) as client:
        for only in ("", "16-d64", "bf16"):
            if only:
                publisher.release(only=only)
            publisher.push(client)
            assert signed(client, publisher.root) == {"stable": publisher.digests}
            assert client.get("/v1/tuf/timestamp.json").content == publisher.files()["timestamp.json"]
    wrong = signing.make_keys(tmp_path / "other", {"timestamp": 1}) and tmp_path / "other" / "timestamp-1.pem"
    publisher.release(only="fp16-d96")
    with TestClient(create_app(path, Settings(TOKEN, wrong))) as client:
        with pytest.raises(ReleaseError, match="timestamp: 0 of the 1 keys"):
            publisher.push(client)
        assert signed(client, publisher.root) != {"stable": publisher.digests}


def sent(publisher: Publisher, client: TestClient) -> dict[str, bytes]:
    """A first release on the server, a second one ready: the files that are new."""
    publisher.release()
    publisher.push(client)
    before = publisher.files()
    publisher.release(change=lambda draft: draft.promote("stable", "lts"))
    return {path: body for path, body in publisher.files().items() if before.get(path) != body}


def test_an_upload_is_all_or_nothing(publisher, client):
    files = sent(publisher, client)
    before = signed(client, publisher.root)
    for path in files:
        fewer = {name: body for name, body in files.items() if name != path}
        assert put_metadata(client, fewer).status_code in (409, 422), path
        for other in fewer:
            if other != "timestamp.json":
                assert client.get(f"/v1/tuf/{other}").status_code == 404, "nothing of it was stored"
        assert signed(client, publisher.root) == before
    unreached = {path: body for path, body in files.items() if "targets" in path}
    problem(put_metadata(client, unreached), 422, "version")
    assert put_metadata(client, files).status_code == 201
    assert put_metadata(client, files).status_code == 200, "sending it again changes nothing"
    assert set(signed(client, publisher.root)) == {"stable", "lts"}


def test_versions_must_follow_on_what_is_there(publisher, client):
    files = sent(publisher, client)
    publisher.release()
    later = {
        path: body for path, body in publisher.files().items() if path.startswith("3.") or path == "timestamp.json"
    }
    problem(put_metadata(client, later), 409, "version")
    assert put_metadata(client, files).status_code == 201
    problem(put_metadata(client, {"timestamp.json": publisher_first_timestamp(files)}), 409, "version")
    changed = json.dumps(json.loads(files["2.targets.json"])).encode()
    problem(put_metadata(client, {**files, "2.targets.json": changed}), 409, "conflict")


def publisher_first_timestamp(files: dict[str, bytes]) -> bytes:
    found = json.loads(files["timestamp.json"])
    found["signed"]["version"] = 1
    return json.dumps(found).encode()


def test_a_token_alone_changes_nothing(publisher, client, tmp_path):
    """Whoever has the token, but not the keys."""
    files = sent(publisher, client)
    before = signed(client, publisher.root)
    thief = Publisher(tmp_path / "thief", timestamp=True)
    thief.release()
    with pytest.raises(ReleaseError, match=r"holds another 1\.root\.json"):
        thief.push(client)
    answer = put_metadata(client, thief.files())
    problem(answer, 409, "conflict")
    thief.release()
    theirs = {path: body for path, body in thief.files().items() if path.startswith("2.") or path == "timestamp.json"}
    problem(put_metadata(client, theirs), 422, "signature")
    for role in ("2.targets.json", "2.snapshot.json", "timestamp.json"):
        problem(put_metadata(client, {**files, role: theirs[role]}), 422, "signature")
        unsigned = json.loads(files[role])
        unsigned["signatures"] = []
        problem(put_metadata(client, {**files, role: json.dumps(unsigned).encode()}), 422, "signature")
    forged = {**json.loads(files["2.targets.json"])}
    forged["signed"]["targets"] = {}
    problem(put_metadata(client, {**files, "2.targets.json": json.dumps(forged).encode()}), 422, "signature")
    theirs_root = {"2.root.json": json.dumps({**json.loads(thief.root), "x": 1}).encode()}
    assert put_metadata(client, theirs_root).status_code in (409, 422)
    assert signed(client, publisher.root) == before


def test_roots_follow_on_each_other_before_the_first_release_too(publisher, client, tmp_path):
    """A stranger's second root would otherwise stand in the way of the real one."""
    assert put_metadata(client, {"1.root.json": publisher.root}).status_code == 201
    stranger = Publisher(tmp_path / "stranger", timestamp=True)
    for each in (stranger, publisher):
        with Store(each.path) as store:
            draft = publish.Draft(store, signing.read_keys([each.folder / "keys"]))
            draft.rotate("root")
            draft.commit()
    problem(put_metadata(client, {"2.root.json": stranger.files()["2.root.json"]}), 422, "signature")
    assert put_metadata(client, {"2.root.json": publisher.files()["2.root.json"]}).status_code == 201


def test_what_is_no_metadata_is_refused(client, publisher):
    publisher.release()
    for body in (b"", b"[]", b'{"files": 3}', b'{"files": {"a": 1}}', b"\xff"):
        problem(client.put("/v1/tuf", content=body, headers=HEADERS), 422, "argument")
    for path in ("../1.root.json", "root.json", "0.root.json", "1.root.json\n", "targets/stable.json", "a" * 300):
        problem(put_metadata(client, {path: b"{}"}), 422, "argument")
    problem(put_metadata(client, {"1.root.json": b"{}"}), 422, "metadata")
    problem(put_metadata(client, {"1.targets.json": publisher.files()["1.targets.json"]}), 422, "root")
    many = {f"{n}.root.json": b"{}" for n in range(1, 5000)}
    problem(put_metadata(client, many), 422, "argument")


def test_an_index_must_be_there_before_a_channel_names_it(publisher, client):
    publisher.release()
    problem(put_metadata(client, publisher.files()), 422, "missing")


def test_an_expired_release_is_refused(publisher, client):
    publisher.release()
    publisher.push(client)
    with Store(publisher.path) as store:
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
        draft = publish.Draft(store, signing.read_keys([publisher.folder / "keys"]), now=past)
        draft.publish("stable")
        draft.sign_targets()
        files = draft.files
    problem(put_metadata(client, files), 422, "expired")


def test_rotated_roots_come_with_the_release(publisher, client):
    publisher.release()
    publisher.push(client)
    with Store(publisher.path) as store:
        draft = publish.Draft(store, signing.read_keys([publisher.folder / "keys"]))
        draft.rotate("targets", signing.make_keys(publisher.folder / "keys" / "new", {"targets": 1})["targets"])
        draft.commit()
    publisher.push(client)
    assert signed(client, publisher.root) == {"stable": publisher.digests}
    assert client.get("/v1/tuf/2.root.json").status_code == 200


def rivals_of(publisher, path, *channels: str) -> list[dict[str, bytes]]:
    """Files of the same version, of publishers with the same keys: each promotes a channel of its own."""
    with Store(path) as server:
        before = {name: server.tuf(name) for name in server.tuf_paths()}
    rivals = []
    for channel in channels:
        with Store(publisher.folder / f"{channel}.db") as store:
            store.put_tuf({name: body for name, body in before.items() if body is not None})
            draft = publish.Draft(store, signing.read_keys([publisher.folder / "keys"]))
            draft.promote("stable", channel)
            draft.sign_targets()
            rivals.append(draft.files)
    return rivals


def test_a_release_that_comes_while_another_is_verified(publisher, client, path, monkeypatch):
    """Its files are then read beside the other's, so that this one does not hold: a conflict, not a bad release."""
    sent(publisher, client)
    first, second = rivals_of(publisher, path, "lts", "nightly")
    check = accepting._check_signatures

    def overtaken(*arguments):
        monkeypatch.setattr(accepting, "_check_signatures", check)
        with Store(path) as store:
            accept(store, second)
        check(*arguments)

    monkeypatch.setattr(accepting, "_check_signatures", overtaken)
    with Store(path) as store, pytest.raises(ConflictError) as error:
        accept(store, first)
    assert error.value.reason == "version" and "another release came meanwhile" in str(error.value)


def test_of_two_uploads_at_once_one_wins(publisher, client, path):
    """The same version of two publishers with the same keys: what is served is one of them, whole."""
    files = sent(publisher, client)
    rivals = rivals_of(publisher, path, "lts", "nightly", "weekly", "daily")
    codes: list[int] = []

    def send(files: dict[str, bytes]) -> None:
        try:
            with Store(path) as store:
                accept(store, files)
                codes.append(201)
        except Exception as error:
            codes.append(409 if getattr(error, "reason", "") in ("conflict", "version") else 500)

    threads = [threading.Thread(target=send, args=(files,)) for files in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201, 409, 409, 409]
    assert len(signed(client, publisher.root)) == 2
    assert put_metadata(client, files).status_code in (409, 200)


# -- the timestamp ----------------------------------------------------------------------------------------------------


def test_the_timestamp_is_renewed_in_time(publisher):
    signers = signing.read_keys([publisher.timestamp_key])
    now = datetime.datetime.now(datetime.UTC)
    with Store(publisher.path) as store:
        assert renew(store, signers) is False, "nothing is released yet"
    publisher.release()
    with Store(publisher.path) as store:
        assert renew(store, signers, now) is False
        later = now + datetime.timedelta(days=2)
        assert renew(store, signers, later) is True
        assert renew(store, signers, later) is False
        found = Metadata.from_bytes(store.tuf("timestamp.json") or b"").signed
        assert found.version == 2 and found.expires > later + datetime.timedelta(days=6)
        with pytest.raises(ReleaseError) as error:
            renew(
                store, signing.read_keys([publisher.folder / "keys" / "root-1.pem"]), later + datetime.timedelta(days=9)
            )
        assert error.value.reason == "keys"


def test_a_release_without_a_timestamp_gets_one(publisher):
    """The publisher writes the server's own file, but has not its key."""
    publisher.release()
    key = publisher.timestamp_key.rename(publisher.folder / "server.pem")
    publisher.release(only="bf16")
    with Store(publisher.path) as store:
        assert renew(store, signing.read_keys([key])) is True
        channels = verify_all(lambda path, _: store.tuf(path), publisher.root, fresh=True)
    assert channels["stable"].indexes == publisher.digests


def test_a_running_server_renews_it(tmp_path):
    publisher = Publisher(tmp_path / "publisher", timestamp=False)
    publisher.release()  # its timestamp is lacking: the server, on the same file, signs it when it starts
    app = create_app(publisher.path, Settings("", publisher.timestamp_key))
    with TestClient(app) as client:
        for _ in range(200):
            if client.get("/v1/tuf/timestamp.json").status_code == 200:
                break
            threading.Event().wait(0.02)
        assert signed(client, publisher.root) == {"stable": publisher.digests}


def test_a_server_without_a_registry_makes_none(path, tmp_path):
    key = signing.make_keys(tmp_path / "k", {"timestamp": 1}) and tmp_path / "k" / "timestamp-1.pem"
    assert upload.Uploads(path, Settings("", key)).renew() is False
    assert not path.exists()
