"""How many blocks a call launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.contract.errors import ContractError
from registry.contract.record import Record

GRID_RULES = ("tiles_heads_batch", "key_tiles_heads_batch", "rows")


class Grid(Record):
    """How many blocks a call launches, as data.

    rule 'tiles_heads_batch': a block for each query tile, tile head and batch entry, in one dimension. `pack` query
    heads share a tile head. Entries of a packed (varlen) array lie anywhere: the device gives the one that starts at
    token c, number b, the tiles from c·pack // tile_m + b on, which is always enough.
    rule 'key_tiles_heads_batch': the same for tiles of tile_m keys and heads of keys.
    rule 'rows': a block for each tile_m of the rows that the call counts itself.
    """

    rule: str
    tile_m: int

    def __post_init__(self) -> None:
        if self.rule not in GRID_RULES:
            raise ContractError(f"grid: rule {self.rule!r} is none of {', '.join(GRID_RULES)}; update the client")
        if self.tile_m < 1:
            raise ContractError(f"grid: tile_m {self.tile_m} is not positive")

    def blocks(self, facts: Mapping[str, Any], pack: int = 1) -> int:
        """Blocks of a call with these facts. pack: 1, or heads_q / heads_kv."""
        if self.rule == "rows":
            return -(-facts["rows"] // self.tile_m)
        batch: int = facts["batch"]
        if self.rule == "key_tiles_heads_batch":
            heads, total, seqlen = facts["heads_kv"], facts["total_k"] if facts["varlen_k"] else None, facts["seqlen_k"]
        else:
            heads = facts["heads_q"] // pack
            total = facts["total_q"] * pack if facts.get("varlen") else None
            seqlen = facts["seqlen_q"] * pack
        if total is None:
            tiles = -(-seqlen // self.tile_m) * batch
        else:
            tiles = total // self.tile_m + batch if total and batch else 0
        blocks: int = tiles * heads
        return blocks
