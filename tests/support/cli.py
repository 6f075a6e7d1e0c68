"""The runtime's commands, run in this process or in one of their own."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cli import commands as cli
from tests.runtime.fakes import toy_index


def run(capsys, *argv: object) -> tuple[int, dict]:
    code = cli.main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def usage(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def program(*argv: object, first: str = "", **options) -> subprocess.Popen:
    """`python -m runtime` after the statements `first`. A shell may have started the tests with SIGINT ignored, which a
    child would inherit."""
    start = f"import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n{first}\n"
    start += f"sys.argv = {['runtime', *map(str, argv)]!r}; runpy.run_module('runtime', run_name='__main__')"
    where = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.PIPE, text=True, cwd=where, **options)


@contextlib.contextmanager
def holding_server(held: str) -> Iterator[tuple[list[str], threading.Event]]:
    """A server that has an index for sm_120, and holds its answer to whatever has `held` in its path.

    The options that name it and the index, and an event: something held was asked for.
    """
    index, _ = toy_index(only="bf16-d64")
    asked, over = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if held in self.path:
                asked.set()
                over.wait(60)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(index.to_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield ["--registry", f"http://127.0.0.1:{server.server_port}", "--index", index.digest], asked
        finally:
            over.set()
            server.shutdown()
