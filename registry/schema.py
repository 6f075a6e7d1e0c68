"""The tables of a registry file, as migrations. The runtime reads them with whatever SQLite its Python has."""

from __future__ import annotations

import time

from sqlite_utils.db import Database
from sqlite_utils.migrations import Migrations

APPLICATION_ID = 0x43554249  # 'CUBI' in the file's header: whose database this is
PAGE_SIZE = 8192

MIGRATIONS = Migrations("cubinery")


@MIGRATIONS()
def m001_tables(db: Database) -> None:
    """Blobs and what refers to them. Not STRICT: SQLite 3.34 has no STRICT."""
    tables: dict[str, tuple[dict[str, type], str | tuple[str, ...], list[tuple[str, str, str]]]] = {
        "blobs": ({"sha256": str, "frame": bytes, "size": int, "content_sha256": str}, "sha256", []),
        "ptx": (
            {"fingerprint": str, "variant": str, "ptx_sha256": str, "frame_sha256": str, "facts": str},
            "fingerprint",
            [("frame_sha256", "blobs", "sha256")],
        ),
        "artifacts": ({"fingerprint": str, "variant": str, "arch": str, "json": str}, "fingerprint", []),
        "indexes": ({"digest": str, "arch": str, "body": bytes}, "digest", []),
        "channels": ({"name": str, "arch": str, "digest": str}, ("name", "arch"), [("digest", "indexes", "digest")]),
    }
    for name, (columns, key, references) in tables.items():
        db.table(name).create(columns, pk=key, not_null=columns, foreign_keys=references)
    db.table("ptx").create_index(["ptx_sha256"])
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")


@MIGRATIONS()
def m002_releases_and_ages(db: Database) -> None:
    """TUF's files, and what gc must know: where channels have pointed, what the builder wants, how old each row is.

    `added` is in Unix seconds; rows from before count as added now. As a column's default that rewrites no blob.
    """
    now = int(time.time())
    for name in ("blobs", "ptx", "artifacts", "indexes"):
        db.execute(f"ALTER TABLE {name} ADD COLUMN added REAL NOT NULL DEFAULT {now}")
    db.table("tuf").create({"path": str, "body": bytes}, pk="path", not_null=["path", "body"])
    moves = {"id": int, "name": str, "arch": str, "digest": str, "moved": float}
    db.table("history").create(moves, pk="id", not_null=moves)
    db.execute(
        f"INSERT INTO history (name, arch, digest, moved) SELECT name, arch, digest, {now} FROM channels "
        "ORDER BY name, arch"
    )
    wanted = {"arch": str, "fingerprint": str}
    db.table("wanted").create(wanted, pk=("arch", "fingerprint"), not_null=wanted)
    db.execute("PRAGMA user_version = 2")


@MIGRATIONS()
def m003_parts_of_indexes(db: Database) -> None:
    """Rows of `indexes` without an architecture are parts. The tables stay as they are: the number keeps older code
    out, whose gc would take parts for indexes that nobody names."""
    db.execute("PRAGMA user_version = 3")
