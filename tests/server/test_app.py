"""server.app through an in-process client: every endpoint's bytes, headers and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.contract import Index, canonical_json, sha256_hex
from registry.store import Store
from server.app import create_app
from tests.registry.samples import KEYS, artifact, fill, index

IMMUTABLE = "public, max-age=31536000, immutable"
GONE = "0" * 64


def problem(answer, status: int, reason: str) -> str:
    """Check a typed error; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"reason", "message"}
    assert answer.json()["reason"] == reason
    return answer.json()["message"]


@pytest.fixture
def blob(filled):
    """(URL, digest, frame) of one blob."""
    digest = next(iter(filled.artifacts().values())).frame_sha256
    return f"/v1/blobs/sha256/{digest}", digest, filled.get_frame(digest)


# -- what is served ---------------------------------------------------------------------------------------------------


def test_from_channel_to_index_to_blob(filled, client):
    answer = client.get("/v1/channels/stable")
    assert answer.status_code == 200
    assert answer.json() == {"name": "stable", "indexes": filled.channel("stable")}
    assert answer.content == canonical_json(answer.json())
    for arch, digest in answer.json()["indexes"].items():
        answer = client.get(f"/v1/indexes/sha256/{digest}")
        assert sha256_hex(answer.content) == digest
        found = Index.from_bytes(answer.content)
        assert (found.arch, len(found.artifacts)) == (arch, 2)
        for a in found.artifacts:
            answer = client.get(f"/v1/blobs/sha256/{a.frame_sha256}")
            assert sha256_hex(answer.content) == a.frame_sha256
            assert len(answer.content) == a.frame_size


def test_immutable_things_say_so(filled, client, blob):
    url, digest, frame = blob
    answer = client.get(url)
    assert answer.content == frame
    assert answer.headers["content-type"] == "application/zstd"
    assert answer.headers["cache-control"] == IMMUTABLE
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(frame))
    assert "content-encoding" not in answer.headers  # it would be undone on the way, and the hash with it
    digest = filled.channel("stable")["sm_120"]
    answer = client.get(f"/v1/indexes/sha256/{digest}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == IMMUTABLE
    assert answer.headers["etag"] == f'"{digest}"'


def test_channels_are_short_lived_and_follow_the_registry(filled, client):
    first = client.get("/v1/channels/stable")
    assert first.headers["cache-control"] == "public, max-age=30"
    assert first.headers["etag"] == f'"{sha256_hex(first.content)}"'
    again = client.get("/v1/channels/stable", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["cache-control"] == first.headers["cache-control"]
    digest = filled.put_index(index([]), "stable")
    changed = client.get("/v1/channels/stable", headers={"if-none-match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.json()["indexes"]["sm_120"] == digest


def test_head_has_the_headers_of_get_and_no_body(filled, client, blob):
    for url in (blob[0], "/v1/channels/stable", f"/v1/indexes/sha256/{filled.channel('stable')['sm_90']}"):
        head, get = client.head(url), client.get(url)
        assert (head.status_code, head.content) == (200, b"")
        assert dict(head.headers) == dict(get.headers)
    assert client.head(blob[0], headers={"range": "bytes=0-1"}).status_code == 200
    assert client.head(f"/v1/blobs/sha256/{GONE}").status_code == 404


# -- preconditions and ranges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"other", {tag}', 304),
        ("*", 304),
        ('"other"', 200),
        ("{bare}", 200),
        ("", 200),
    ],
)
def test_if_none_match(client, blob, template, status):
    url, digest, frame = blob
    header = template.format(tag=f'"{digest}"', bare=digest)
    for method in ("GET", "HEAD"):
        answer = client.request(method, url, headers={"if-none-match": header, "range": "bytes=0-3"})
        assert answer.status_code == (206 if (status, method) == (200, "GET") else status)
    assert client.get(url, headers={"if-none-match": header}).content == (frame if status == 200 else b"")


@pytest.mark.parametrize(("template", "status"), [("{tag}", 200), ("*", 200), ("W/{tag}", 412), ('"other"', 412)])
def test_if_match(client, blob, template, status):
    url, digest, _ = blob
    answer = client.get(url, headers={"if-match": template.format(tag=f'"{digest}"')})
    if status == 412:
        problem(answer, 412, "precondition_failed")
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=0-9", slice(0, 10)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-999999", slice(5, None)),
        ("bytes=-999999", slice(None)),
        ("bytes=0-", slice(None)),
    ],
)
def test_a_single_range(client, blob, header, part):
    url, digest, frame = blob
    expected = frame[part]
    answer = client.get(url, headers={"range": header})
    assert (answer.status_code, answer.content) == (206, expected)
    first = range(len(frame))[part].start
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(frame)}"
    assert answer.headers["content-length"] == str(len(expected))
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["cache-control"] == IMMUTABLE


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-1,3-4",
        "bytes=0-1," * 2000 + "5-6",
        "bytes=9-3",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=0x0-0x9",
        "bytes=--5",
        "items=0-1",
        "bytes 0-1",
        "bytes=" + "9" * 5000 + "-",
    ],
    ids=lambda header: header[:16],
)
def test_other_range_headers_are_ignored(client, blob, header):
    url, _, frame = blob
    answer = client.get(url, headers={"range": header})
    assert (answer.status_code, answer.content) == (200, frame)


def test_ranges_beyond_the_end(client, blob):
    url, _, frame = blob
    for header in (f"bytes={len(frame)}-", f"bytes={len(frame)}-{len(frame) + 5}", "bytes=999999999-", "bytes=-0"):
        answer = client.get(url, headers={"range": header})
        problem(answer, 416, "range")
        assert answer.headers["content-range"] == f"bytes */{len(frame)}"


def test_if_range(client, blob):
    url, digest, frame = blob
    for value, status in ((f'"{digest}"', 206), (f'W/"{digest}"', 200), ('"older"', 200), ("Sat, 1 Jan 2000", 200)):
        answer = client.get(url, headers={"range": "bytes=4-9", "if-range": value})
        assert answer.status_code == status
        assert answer.content == (frame[4:10] if status == 206 else frame)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_not_there(filled, client):
    assert GONE in problem(client.get(f"/v1/blobs/sha256/{GONE}"), 404, "not_found")
    assert GONE in problem(client.get(f"/v1/indexes/sha256/{GONE}"), 404, "not_found")
    assert "nightly" in problem(client.get("/v1/channels/nightly"), 404, "not_found")
    problem(client.get("/v1/nothing"), 404, "not_found")
    index_digest = filled.channel("stable")["sm_120"]
    problem(client.get(f"/v1/blobs/sha256/{index_digest}"), 404, "not_found")  # an index is no blob


@pytest.mark.parametrize("digest", ["abc", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "%0A", "%2e%2e%2fetc", "g" * 64])
@pytest.mark.parametrize("kind", ["blobs", "indexes"])
def test_digests_are_checked(filled, client, kind, digest):
    answer = client.get(f"/v1/{kind}/sha256/{digest}")
    if "%2f" in digest:  # decoded before routing: another path
        problem(answer, 404, "not_found")
    else:
        assert "digest" in problem(answer, 422, "argument")


@pytest.mark.parametrize("name", ["Stable", ".x", "a" * 65, "%3Cb%3E", "stable%00"])
def test_channel_names_are_checked(filled, client, name):
    assert "name" in problem(client.get(f"/v1/channels/{name}"), 422, "argument")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(filled, client, blob, method):
    for url in (blob[0], "/v1/channels/stable", "/"):
        answer = client.request(method, url)
        if (method, url) == ("PUT", blob[0]):
            problem(answer, 403, "read_only")  # no token is set: tests/trust/test_upload.py has the rest
            continue
        problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == ("GET, HEAD, PUT" if url == blob[0] else "GET, HEAD")


def test_a_bug_is_a_typed_500(path, filled, client, monkeypatch):
    monkeypatch.setattr(Store, "get_frame", lambda *_: 1 // 0)
    message = problem(client.get(f"/v1/blobs/sha256/{GONE}"), 500, "internal")
    assert "division" not in message


# -- health -----------------------------------------------------------------------------------------------------------


def test_ready_once_the_builder_has_made_the_registry(path, client):
    assert client.get("/livez").json() == {"status": "ok"}
    problem(client.get("/readyz"), 503, "missing")
    answer = client.get("/v1/channels/stable")
    message = problem(answer, 503, "missing")
    assert answer.headers["retry-after"] == "5"
    assert str(path.parent) not in message  # paths of the server are nobody else's business
    assert not path.exists()
    path.touch()
    problem(client.get("/readyz"), 503, "empty")
    with Store(path) as store:
        assert "no index" in problem(client.get("/readyz"), 503, "empty")
        problem(client.get("/v1/channels/stable"), 404, "not_found")
        fill(store, KEYS[:1])
        assert client.get("/readyz").json() == {"status": "ok"}
        assert client.get("/v1/channels/stable").status_code == 200


@pytest.mark.parametrize("noticed", [True, False], ids=["asked between", "not asked"])
def test_a_replaced_or_removed_registry_is_noticed(path, client, filled, noticed):
    before = client.get("/v1/channels/stable").json()
    filled.close()
    path.unlink()
    if noticed:
        problem(client.get("/readyz"), 503, "missing")
    with Store(path) as store:
        fill(store, KEYS[2:4])
        after = client.get("/v1/channels/stable").json()
        assert after["indexes"] == store.channel("stable") != before["indexes"]
        assert client.get(f"/v1/indexes/sha256/{before['indexes']['sm_120']}").status_code == 404
        assert store.verify() == []


@pytest.mark.parametrize("content", [b"not a database at all" * 500, None], ids=["garbage", "folder"])
def test_an_unreadable_registry_is_not_ready(path, client, content, caplog):
    path.mkdir() if content is None else path.write_bytes(content)
    for _ in range(3):
        problem(client.get("/readyz"), 503, "not_a_registry")
    assert client.get("/livez").status_code == 200
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 1  # logged once, not a request


def test_a_damaged_registry_is_a_typed_503(path, filled, client):
    filled.close()
    data = path.read_bytes()
    path.write_bytes(data[:8192] + b"\xa5" * (len(data) - 8192))
    problem(client.get("/v1/channels/stable"), 503, "corrupt")


def test_the_server_does_not_write_the_registry(path, filled, client, blob):
    filled.close()
    before = path.read_bytes()
    for url in (blob[0], "/v1/channels/stable", "/", "/readyz", "/metrics"):
        assert client.get(url).status_code == 200
    assert path.read_bytes() == before


# -- metrics, page, documentation -------------------------------------------------------------------------------------


def _metric(client, line: str) -> float:
    found = [float(row.rsplit(" ", 1)[1]) for row in client.get("/metrics").text.splitlines() if row.startswith(line)]
    return found[0] if found else 0.0


def test_metrics_count_by_route_and_status(filled, client, blob):
    url, _, frame = blob
    for _ in range(3):
        client.get(url)
    client.get(url, headers={"range": "bytes=0-9"})
    client.head(url)
    client.get("/v1/blobs/sha256/nonsense")
    client.get("/a/path/of/an/attacker")
    client.request("BREW", "/v1/channels/stable")
    route = 'route="/v1/blobs/sha256/{digest}"'
    requests = "cubinery_http_requests_total"
    assert _metric(client, f'{requests}{{method="GET",{route},status="200"}}') == 3
    assert _metric(client, f'{requests}{{method="GET",{route},status="206"}}') == 1
    assert _metric(client, f'{requests}{{method="HEAD",{route},status="200"}}') == 1
    assert _metric(client, f'{requests}{{method="GET",{route},status="422"}}') == 1
    assert _metric(client, f'{requests}{{method="GET",route="unmatched",status="404"}}') == 1
    assert _metric(client, f'{requests}{{method="other",route="/v1/channels/{{name}}",status="405"}}') == 1
    assert _metric(client, f"cubinery_http_request_duration_seconds_count{{{route}}}") == 6
    refusal = len(client.get("/v1/blobs/sha256/nonsense").content)
    sent = _metric(client, f"cubinery_http_response_body_bytes_total{{{route}}}")
    assert sent == 3 * len(frame) + 10 + 2 * refusal
    assert "attacker" not in client.get("/metrics").text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")


def test_two_applications_count_apart(path, filled, client):
    client.get("/livez")
    with TestClient(create_app(path)) as other:
        assert _metric(other, 'cubinery_http_requests_total{method="GET",route="/livez"') == 0


def test_the_page_lists_what_there_is_and_escapes_it(path, filled, client):
    page = client.get("/").text
    for text in ("stable", *filled.channel("stable").values(), *KEYS[:2]):
        assert text in page
    evil = "<script>alert('1')</script>"
    filled.put_index(index([artifact(KEYS[0])[0]]).replace(release=evil), "stable")
    answer = client.get("/")
    assert evil not in answer.text
    assert "&lt;script&gt;" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_page_of_an_empty_registry_says_what_to_do(path, client):
    Store(path).close()
    assert "python -m builder" in client.get("/").text


def test_openapi_describes_every_endpoint_once(client):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of an operation id given twice
        document = client.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        "/v1/channels/{name}",
        "/v1/indexes/sha256/{digest}",
        "/v1/blobs/sha256/{digest}",
        "/v1/batch",
        "/v1/tuf",
        "/v1/tuf/{name}",
        "/v1/tuf/targets/{name}",
        "/livez",
        "/readyz",
    }
    methods = {path: set(operations) for path, operations in paths.items()}
    assert methods.pop("/v1/batch") == {"post"} and methods.pop("/v1/tuf") == {"put"}
    assert methods.pop("/v1/indexes/sha256/{digest}") == methods.pop("/v1/blobs/sha256/{digest}") == {"get", "put"}
    assert all(found == {"get"} for found in methods.values())
    blobs = paths["/v1/blobs/sha256/{digest}"]["get"]["responses"]
    assert blobs["200"]["content"].keys() == {"application/zstd"}
    assert set(blobs) == {"200", "206", "304", "404", "416", "422", "503"}
    for status in ("404", "416", "422", "503"):
        assert blobs[status]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}
    channel = paths["/v1/channels/{name}"]["get"]["responses"]["200"]
    assert channel["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Channel"}
    assert client.get("/docs").status_code == 200


# -- the module -------------------------------------------------------------------------------------------------------


def test_the_environment_names_the_registry_and_no_compiler_is_imported(path, filled):
    code = (
        "import json, sys\n"
        "from fastapi.testclient import TestClient\n"
        "from server.app import app\n"
        "answer = TestClient(app).get('/v1/channels/stable').json()\n"
        "heavy = {'torch', 'cutlass', 'triton', 'kernels', 'builder', 'runtime'} & set(sys.modules)\n"
        "print(json.dumps([answer, sorted(heavy)]))"
    )
    environment = {**os.environ, "CUBINERY_REGISTRY": str(path)}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    answer, heavy = json.loads(result.stdout)
    assert answer["indexes"] == filled.channel("stable")
    assert heavy == []
