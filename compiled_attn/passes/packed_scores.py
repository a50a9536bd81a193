"""How packed patches are ranked: the scores of token_scores.py, [B, n], with 0 where a patch was left out before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.follow import END, Lost, tokens_in
from compiled_attn.passes.follow_layout import argument, tags_of
from compiled_attn.passes.follow_packed import Cut, FollowPacked, Packed, rows_of
from compiled_attn.passes.packed_pairs import check_pairs, row_of_mask
from compiled_attn.passes.token_scores import Cursor

aten = torch.ops.aten


def packed_score(follow: FollowPacked, attention: fx.Node, score: str) -> fx.Node | None:
    """Scores by an attention over packed tokens, which is not rewritten yet. None: not by it."""
    if score == "token-norm":
        return None
    tokens = tokens_in(tags_of(follow, attention.args[1])[-2])
    if tokens is None:
        raise Lost(attention, "its keys are not the tokens")
    mask = argument(attention, 3, "attn_mask", None)
    if mask is not None and score == "mean-query":
        raise Lost(attention, "the mean of its bias or mask over the queries that are left is not known")
    if argument(attention, 5, "is_causal", False):
        raise Lost(attention, "tokens can not be ranked by a causal attention")
    stage = follow.stage_at(tokens)
    cut = follow.cut(tokens, attention)
    with follow.graph.inserting_before(attention):
        here = Before(follow.edit, attention)
        q, k = (_float(here, rows_of(follow, here, attention, x)) for x in attention.args[:2])  # [T, H, D]
        if score == "key-norm":
            norms = here(aten.mean.dim, here(aten.linalg_vector_norm.default, k, 2, [-1]), [1], True)
            return shares(here, patches(here, on_canvas(follow, here, norms, cut, 0.0), stage))
        scale = argument(attention, 7, "scale", None)
        scale = 1.0 / math.sqrt(int(q.meta["val"].shape[2])) if scale is None else float(scale)
        asked = _class_queries(here, q, cut) if score == "class" else _mean_queries(follow, here, q, cut)  # [B, H, D]
        picture = here(aten.floor_divide.default, cut.place, cut.full)
        mine = here(aten.index_select.default, asked, 0, picture)
        logits = here(aten.sum.dim_IntList, here(aten.mul.Tensor, mine, k), [2])  # [T, H]
        logits = on_canvas(follow, here, here(aten.mul.Tensor, logits, scale), cut, -math.inf)  # [B, N, H]
        if mask is not None:
            check_pairs(follow, attention, mask)
            logits = here(aten.add.Tensor, logits, row_of_mask(here, mask))
        row = here(aten.mean.dim, here(aten.softmax.int, logits, 1), [2], True)
        return patches(here, row, stage)


class Before(Cursor):
    """Inserts nodes one after another in front of `node`."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.edit.call(target, args, kwargs, like=self.like)


def packed_norms(follow: FollowPacked, here: Cursor, x: fx.Node) -> fx.Node:
    """|x_j| over the sum of all patches of its picture: [B, n] from packed tokens [1, T, C]."""
    tokens, cut = follow.pictures_first(x, x)
    norms = here(aten.linalg_vector_norm.default, _float(here, here(aten.select.int, x, 0, 0)), 2, [-1], True)
    return shares(here, patches(here, on_canvas(follow, here, norms, cut, 0.0), follow.stage_at(tokens)))


def on_canvas(follow: FollowPacked, here: Cursor, rows: fx.Node, cut: Cut, fill: float) -> fx.Node:
    """Rows [T, C] at their places in [B, N, C] of `fill`."""
    return follow.canvas(here, here(aten.unsqueeze.default, rows, 0), cut, fill)


def patches(here: Cursor, row: fx.Node, stage: Packed) -> fx.Node:
    """[B, N, 1] -> [B, n]: the patches among the tokens."""
    flat = here(aten.squeeze.dim, row, 2)
    return here(aten.slice.Tensor, flat, 1, stage.prefix, -stage.after if stage.after else END)


def shares(here: Cursor, values: fx.Node) -> fx.Node:
    return here(aten.div.Tensor, values, here(aten.sum.dim_IntList, values, [-1], True))


def _class_queries(here: Cursor, q: fx.Node, cut: Cut) -> fx.Node:
    """[T, H, D] -> [B, H, D]: the first query of each picture."""
    return here(aten.index_select.default, q, 0, here(aten.slice.Tensor, cut.begins, 0, 0, -1))


def _mean_queries(follow: FollowPacked, here: Cursor, q: fx.Node, cut: Cut) -> fx.Node:
    """[T, H, D] -> [B, H, D]: the mean of each picture's queries."""
    heads, width = q.meta["val"].shape[1:]
    spread = on_canvas(follow, here, here(aten.flatten.using_ints, q, 1, 2), cut, 0.0)
    total = here(aten.sum.dim_IntList, spread, [1])
    ends = here(aten.slice.Tensor, cut.begins, 0, 1, END)
    count = here(aten.sub.Tensor, ends, here(aten.slice.Tensor, cut.begins, 0, 0, -1))
    mean = here(aten.div.Tensor, total, here(aten.unsqueeze.default, count, 1))
    return here(aten.reshape.default, mean, [-1, int(heads), int(width)])


def _float(here: Cursor, x: Any) -> Any:
    return x if x.meta["val"].dtype == torch.float32 else here(aten._to_copy.default, x, dtype=torch.float32)
