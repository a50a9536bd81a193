"""Attention over packed tokens with a bias or a mask over pairs of tokens, a relative position bias for example.

    q, k, v [T, H, D], mask [B, H, N, N]   ->   q, k, v at their places [B, H, N, D]; tokens that left hidden as keys;
                                                scaled_dot_product_attention; the rows that are left [T, H, D]

The bias is over the places, so the products of this attention are those of all N places; everything else stays packed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from compiled_attn.passes.follow import END, Lost, latest
from compiled_attn.passes.follow_layout import tags_of

if TYPE_CHECKING:
    from compiled_attn.passes.follow_packed import Cut, FollowPacked, Packed
    from compiled_attn.passes.token_scores import Cursor

aten = torch.ops.aten


def check_pairs(f: FollowPacked, node: fx.Node, mask: Any) -> None:
    """Raises Lost where a mask does not hold a value for each pair of the places before any token left."""
    if node.meta["val"].dim() != 4:
        raise Lost(node, "it has a mask, and its pictures and heads are merged")
    if latest(tags_of(f, mask)) > 0:
        raise Lost(node, f"its mask {mask} is made of tokens that are fewer now")


def attention_by_place(
    f: FollowPacked, here: Cursor, rows: list[fx.Node], mask: fx.Node, cut: Cut, stage: Packed, scale: float
) -> fx.Node:
    """[T, H, Dv] of rows q, k, v [T, H, D]; mask: bool or added to the scores, broadcastable to [B, H, N, N]."""
    spread = [_by_place(f, here, x, cut) for x in rows]
    kept = here(aten.slice.Tensor, stage.kept, 1, cut.count, END) if cut.count else stage.kept
    for _ in range(2):
        kept = here(aten.unsqueeze.default, kept, 1)  # [B, 1, 1, N]
    if mask.meta["val"].dtype == torch.bool:
        seen = here(aten.logical_and.default, mask, kept)
    else:
        kinds = {"dtype": mask.meta["val"].dtype, "device": mask.meta["val"].device}
        seen = here(aten.where.self, kept, mask, here(aten.scalar_tensor.default, -math.inf, **kinds))
    out = here(aten.scaled_dot_product_attention.default, *spread, seen, scale=scale)
    out = here(aten.flatten.using_ints, here(aten.transpose.int, out, 1, 2), 0, 1)  # [B * N, H, Dv]
    return here(aten.index_select.default, out, 0, cut.place)


def row_of_mask(here: Cursor, mask: fx.Node) -> fx.Node:
    """What a mask adds to the scores of the first query, broadcastable to [B, N, H]: float32."""
    row = here(aten.select.int, mask, -2, 0)
    if row.meta["val"].dim() < 2:
        row = here(aten.unsqueeze.default, row, 0)
    row = here(aten.transpose.int, row, -2, -1)
    if row.meta["val"].dtype != torch.bool:
        return row if row.meta["val"].dtype == torch.float32 else here(aten._to_copy.default, row, dtype=torch.float32)
    zero = here(aten.zeros_like.default, row, dtype=torch.float32)
    return here(aten.masked_fill.Scalar, zero, here(aten.logical_not.default, row), -math.inf)


def _by_place(f: FollowPacked, here: Cursor, rows: fx.Node, cut: Cut) -> fx.Node:
    """[T, H, D] -> [B, H, N, D], zeros where a token has left."""
    heads, width = (int(s) for s in rows.meta["val"].shape[1:])
    flat = here(aten.unsqueeze.default, here(aten.flatten.using_ints, rows, 1, 2), 0)
    grid = f.canvas(here, flat, cut, 0.0)
    grid = here(aten.reshape.default, grid, [here.size(grid, 0), here.size(grid, 1), heads, width])
    return here(aten.transpose.int, grid, 1, 2)
