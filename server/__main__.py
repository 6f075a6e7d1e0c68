"""`python -m server`: serve a registry file over HTTP."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from server.app import create_app

EPILOG = """\
The registry is --registry, else the file that CUBINERY_REGISTRY names, else registry.db in the user's data folder.
Its folder must be writable: SQLite keeps its locks there. It may be missing at the start: /readyz then answers 503
until a builder has made it. One process serves some thousand requests a second.
With CUBINERY_TOKEN (16 characters or more) set, `python -m registry push` may send releases that verify; without it
nothing is taken in. With CUBINERY_TIMESTAMP_KEY, the file of the timestamp key, it keeps the releases' timestamp alive.
Exit codes: 0 ended by a signal, 1 it cannot start, for one because the address is taken, 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        listeners = _listen(arguments.host, arguments.port)
    except OSError as error:
        where = f"--host {arguments.host} --port {arguments.port}"
        print(f"python -m server: cannot listen on {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        create_app(arguments.registry),
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
        access_log=arguments.access_log,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    for listener in listeners:
        logging.getLogger("uvicorn.error").info("Listening on http://%s", _shown(listener))
    try:
        server.run(listeners)
    except KeyboardInterrupt:  # uvicorn has shut down in order, then repeats the signal
        return 0
    return 0 if server.started else 1


def _listen(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of `host`. OSError if one cannot be had.

    Not left to uvicorn, which starts the application first and then ends in the middle of a log.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [socket.create_server(address, family=family) for family, _, _, _, address in dict.fromkeys(found)]


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m server", description=__doc__, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--registry", metavar="PATH", type=Path, help="the registry file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s; 0.0.0.0: all)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="port to listen on (default %(default)s; 0: a free one)"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--access-log", action="store_true", help="log every request (/metrics counts them anyway)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
