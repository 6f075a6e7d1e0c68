"""`python -m server`: serve a registry file over HTTP."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from server.app import create_app

EPILOG = """\
The registry is --registry, else the file that CUBINERY_REGISTRY names, else registry.db in the user's data folder.
It is read only, but its folder must be writable: SQLite keeps its locks there. It may be missing at the start:
/readyz then answers 503 until a builder has made it. One process serves some thousand requests a second.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    arguments = _parser().parse_args(argv)
    config = uvicorn.Config(
        create_app(arguments.registry),
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
        access_log=arguments.access_log,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn has shut down in order, then repeats the signal
        return 0
    return 0 if server.started else 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m server", description=__doc__, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--registry", metavar="PATH", type=Path, help="the registry file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s; 0: a free one)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--access-log", action="store_true", help="log every request (/metrics counts them anyway)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
