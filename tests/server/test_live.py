"""`python -m server` on loopback, read while another process writes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from registry.contract import Index, sha256_hex
from server.__main__ import _parser

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "registry" / "worker.py"


@contextlib.contextmanager
def _process(*command: object):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture
def server(path):
    """(process, port) of a server whose registry does not exist yet."""
    with _process("-m", "server", "--registry", path, "--port", 0) as process:
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                yield process, int(found[1])
                return
        pytest.fail("the server did not start")


def _get(connection: http.client.HTTPConnection, url: str) -> tuple[int, bytes]:
    connection.request("GET", url)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _follow(port: int, releases: int, seen: list[str], failures: list[str]) -> None:
    """Fetch 'stable', its index and its blobs over one connection until `releases` different ones were whole."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    deadline = time.monotonic() + 40
    while len(set(seen)) < releases and time.monotonic() < deadline and not failures:
        status, body = _get(connection, "/v1/channels/stable")
        if status != 200:
            failures.append(f"channel: {status} {body!r}")
            break
        digest = json.loads(body)["indexes"]["sm_120"]
        _, body = _get(connection, f"/v1/indexes/sha256/{digest}")
        for a in Index.from_bytes(body).artifacts:
            status, frame = _get(connection, f"/v1/blobs/sha256/{a.frame_sha256}")
            if sha256_hex(frame) != a.frame_sha256:
                failures.append(f"blob: {status} {a.frame_sha256}")
        seen.append(digest)
    connection.close()


def test_clients_follow_a_builder_at_work(server, path):
    process, port = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    assert _get(connection, "/livez")[0] == 200
    assert _get(connection, "/readyz")[0] == 503
    with _process(WORKER, "write", path) as writer:
        assert re.fullmatch("[0-9a-f]{64}\n", writer.stdout.readline())
        threading.Thread(target=writer.stdout.read, daemon=True).start()  # so that its pipe never fills
        assert _get(connection, "/readyz") == (200, b'{"status":"ok"}')
        seen: list[str] = []
        failures: list[str] = []
        clients = [threading.Thread(target=_follow, args=(port, 30, seen, failures)) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
    assert failures == []
    assert len(set(seen)) >= 30
    assert 'status="200"' in _get(connection, "/metrics")[1].decode()
    connection.close()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in output
    assert "Finished server process" in output


def test_help_and_wrong_usage():
    wrong = (["--nope"], ["--port", "x"], ["--port", "70000"], ["--port", "-1"])
    for arguments, code in ((["--help"], 0), *((words, 2) for words in wrong)):
        command = [sys.executable, "-m", "server", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == code
        assert "--registry" in result.stdout + result.stderr


def test_a_taken_port_is_told_in_one_line(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "server", "--registry", str(path), "--port", port]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert "cannot listen on --host 127.0.0.1 --port " + port in line and "in use" in line


@pytest.mark.parametrize("port", ["0", "65535"])
def test_the_ends_of_the_range_of_ports_are_in_it(port):
    assert _parser().parse_args(["--port", port]).port == int(port)
