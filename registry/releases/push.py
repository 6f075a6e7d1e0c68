"""Sending a release to a server: blobs, then indexes, then the metadata in one piece. Needs httpx2 and a token."""

from __future__ import annotations

import json
from typing import Any

from registry.contract import canonical_json, sha256_hex
from registry.errors import ReleaseError
from registry.releases.document import ROLE_FILE, TARGET_FILE, Channel
from registry.store import Store

TIMEOUT_S = 60.0  # of a silence
MAX_REPLY = 1 << 20  # bytes shown or parsed of a reply


class Push:
    """One server, for one token. client: what sends the requests, by default one of httpx2 (tests give their own).

    Raises ReleaseError ('upload') with the server's own words, for what it refuses.
    """

    def __init__(self, store: Store, url: str, token: str, client: Any = None):
        import httpx2

        self._store, self._http = store, httpx2
        headers = {"authorization": f"Bearer {token}", "user-agent": "cubinery"}
        self._client = client or httpx2.Client(base_url=url.rstrip("/"), timeout=TIMEOUT_S)
        self._client.headers.update(headers)

    def __enter__(self) -> Push:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def run(self) -> dict[str, int]:
        """Send what the server lacks, and take over its timestamp. {'blobs', 'indexes', 'metadata': how many}."""
        sent = {"blobs": 0, "indexes": 0, "metadata": 0}
        files = self._lacking()
        for digest in sorted(self._indexes(files)):
            if self._has(f"/v1/indexes/sha256/{digest}"):
                continue
            index = self._store.index(digest)
            if index is None:
                raise ReleaseError(f"{self._store.path}: holds no index {digest}", reason="missing")
            for artifact in index.artifacts:
                path = f"/v1/blobs/sha256/{artifact.frame_sha256}"
                if not self._has(path):
                    self._call("PUT", path, self._store.get_frame(artifact.frame_sha256) or b"")
                    sent["blobs"] += 1
            for name, document in index.documents.items():
                self._call("PUT", f"/v1/indexes/sha256/{name}", document)
            sent["indexes"] += 1
        if files:
            body = canonical_json({"files": {path: text.decode() for path, text in files.items()}})
            sent["metadata"] = len(json.loads(self._call("PUT", "/v1/tuf", body))["new"])
            self._take_timestamp()
        return sent

    def _lacking(self) -> dict[str, bytes]:
        """Metadata and documents that the server has not."""
        paths = [path for path in self._store.tuf_paths() if ROLE_FILE.fullmatch(path) or TARGET_FILE.fullmatch(path)]
        bodies = {path: self._store.tuf(path) or b"" for path in paths}
        files = {path: body for path, body in bodies.items() if path == "timestamp.json" or not self._holds(path, body)}
        mine, theirs = files.get("timestamp.json"), self._get("/v1/tuf/timestamp.json")
        if mine is not None and theirs is not None and _version(theirs) >= _version(mine):
            del files["timestamp.json"]  # the server's own is as new, or newer
        elif mine is not None and not self._leads_to_newest(mine):
            del files["timestamp.json"]  # the server is to sign one
        return files

    def _leads_to_newest(self, timestamp: bytes) -> bool:
        newest = max((int(m["version"]) for m in map(ROLE_FILE.fullmatch, self._store.tuf_paths())
                      if m and m["role"] == "snapshot"), default=0)  # fmt: skip
        version: int = json.loads(timestamp)["signed"]["meta"]["snapshot.json"]["version"]
        return version == newest

    def _indexes(self, files: dict[str, bytes]) -> set[str]:
        found = set()
        for path, body in files.items():
            if match := TARGET_FILE.fullmatch(path):
                found |= set(Channel.from_bytes(body, match["channel"]).indexes.values())
        return found

    def _take_timestamp(self) -> None:
        theirs, mine = self._get("/v1/tuf/timestamp.json"), self._store.tuf("timestamp.json")
        if theirs is not None and (mine is None or _version(theirs) > _version(mine)):
            self._store.put_tuf({"timestamp.json": theirs}, expected={"timestamp.json": mine})

    def _holds(self, path: str, body: bytes) -> bool:
        """Whether the server has this file; ReleaseError if it has another of that name."""
        answer = self._send("HEAD", f"/v1/tuf/{path}")
        if answer.status_code == 200 and answer.headers.get("etag", "").strip('W/"') != sha256_hex(body):
            message = f"the server holds another {path}: somebody else publishes there, or was faster"
            raise ReleaseError(message, reason="upload")
        return bool(answer.status_code == 200)

    def _has(self, path: str) -> bool:
        return self._send("HEAD", path).status_code == 200

    def _get(self, path: str) -> bytes | None:
        answer = self._send("GET", path)
        return answer.content[:MAX_REPLY] if answer.status_code == 200 else None

    def _call(self, method: str, path: str, body: bytes) -> bytes:
        answer = self._send(method, path, body)
        if answer.status_code not in (200, 201):
            text = answer.content[:1000].decode(errors="replace")
            raise ReleaseError(f"{method} {path}: the server answers {answer.status_code}: {text}", reason="upload")
        return bytes(answer.content[:MAX_REPLY])

    def _send(self, method: str, path: str, body: bytes | None = None) -> Any:
        try:
            answer = self._client.request(method, path, content=body)
        except (self._http.HTTPError, self._http.InvalidURL) as error:
            message = f"{self._client.base_url}: {error or type(error).__name__}"
            raise ReleaseError(message, reason="upload") from None
        if method in ("HEAD", "GET") and answer.status_code not in (200, 404):
            message = f"{method} {path}: the server answers {answer.status_code}"
            raise ReleaseError(message, reason="upload")
        return answer


def _version(metadata: bytes) -> int:
    try:
        return int(json.loads(metadata)["signed"]["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"timestamp.json is no metadata: {error}", reason="metadata") from None
