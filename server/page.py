"""The web page at /: channels and their artifacts."""

from __future__ import annotations

from functools import lru_cache
from html import escape

from registry.contract import ContractError, Index, part_digests, sha256_hex
from registry.store import Store

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 2rem; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #8884; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .9em; overflow-wrap: anywhere; }
:root { color-scheme: light dark; }
"""

# Nothing is loaded or run, whatever a name in the registry says.
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "cache-control": "public, max-age=30",
}


def render(store: Store) -> str:
    """The page as HTML."""
    parts = []
    for name, indexes in store.channels().items():
        parts.append(f"<h2>Channel <a href='v1/channels/{escape(name)}'>{escape(name)}</a></h2>")
        for arch, digest in indexes.items():
            link = f"<a href='v1/indexes/sha256/{escape(digest)}'><code>{escape(digest)}</code></a>"
            parts.append(f"<h3>{escape(arch)}</h3><p>index {link}</p>{_index(store, digest)}")
    body = "".join(parts) or "<p>No channel yet: <code>python -m builder --arch sm_120</code> makes one.</p>"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Cubinery</title><style>{_STYLE}</style>"
        f"<h1>Cubinery</h1><p>Attention kernels for SM120, compiled ahead of time. <a href='docs'>API</a> · "
        f"<a href='metrics'>metrics</a></p>{body}</html>"
    )


def _index(store: Store, digest: str) -> str:
    body = store.get_index(digest)
    try:
        return "" if body is None else _table(body, tuple(store.get_index(part) or b"" for part in part_digests(body)))
    except ContractError as error:  # written by a newer builder
        return f"<p>this server cannot show it: {escape(str(error))}</p>"


@lru_cache(maxsize=32)  # parsing an index of some hundred artifacts takes milliseconds of the event loop
def _table(body: bytes, parts: tuple[bytes, ...]) -> str:
    index = Index.from_bytes(body, {sha256_hex(part): part for part in parts}.get)
    names = ("variant", "cubin bytes", "registers", "spills", "shared memory", "blocks per SM", "oldest driver")
    rows = []
    for a in index.artifacts:
        numbers = (a.cubin_size, a.registers, a.spills, a.smem + a.static_smem, a.blocks_per_sm, a.min_driver)
        link = f"<a href='v1/blobs/sha256/{escape(a.frame_sha256)}'><code>{escape(a.variant)}</code></a>"
        rows.append(f"<tr><td>{link}</td>" + "".join(f"<td class='n'>{n:,}</td>" for n in numbers) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<p>release {escape(index.release)}</p><table><tr>{head}</tr>{''.join(rows)}</table>"
