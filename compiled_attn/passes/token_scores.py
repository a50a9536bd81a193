"""How patches are ranked: one number per patch and picture, [B, n], computed beside an attention or behind it."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.op import NAMESPACE
from compiled_attn.ir.program import Edit
from compiled_attn.passes.follow import END, Follow, Lost, Tokens, batch_in, tokens_in

aten = torch.ops.aten
SCORES = ("class", "mean-query", "key-norm", "token-norm")


class Cursor:
    """Inserts one node after another behind `node`, each with the provenance of `like`."""

    def __init__(self, edit: Edit, node: fx.Node, like: fx.Node | None = None) -> None:
        self.edit, self.node, self.like = edit, node, like or node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.edit.graph.inserting_after(self.node):
            self.node = self.edit.call(target, args, kwargs, like=self.like)
        return self.node

    def size(self, tensor: fx.Node, dim: int) -> int | fx.Node:
        """A size as an argument: an int, or a sym_size node."""
        size = tensor.meta["val"].shape[dim]
        return self(aten.sym_size.int, tensor, dim) if _torch.is_symbolic(size) else int(size)


def attention_score(follow: Follow, attention: fx.Node, score: str) -> fx.Node | None:
    """Scores [B, n] of the patches by `attention`; "class" replaces it by attention_with_class_row. None: not by it."""
    if score == "token-norm":
        return None
    tags = follow.of(attention.args[1])
    tokens = tokens_in(tags[-2]) if tags is not None else None
    if tokens is None:
        raise Lost(attention, "its keys are not the tokens")
    here = Cursor(follow.edit, attention)
    q, k, v, bias, scale = heads_first(follow, here, attention)
    if score == "class":
        row = _class_row(follow, here, attention, q, k, v, bias, scale)
    elif score == "mean-query":
        row = _mean_query(here, q, k, bias, scale)
    else:
        row = here(aten.linalg_vector_norm.default, _float(here, k), 2, [-1])
        row = here(aten.mean.dim, row, [1])
    patches = patches_of(here, row, tokens)
    return _shares(here, patches) if score == "key-norm" else patches


def token_norms(here: Cursor, x: fx.Node, tokens: Tokens) -> fx.Node:
    """|x_j| over the sum of all patches: [B, n] from tokens [B, N, C]."""
    norms = here(aten.linalg_vector_norm.default, _float(here, x), 2, [-1])
    return _shares(here, patches_of(here, norms, tokens))


def patches_of(here: Cursor, row: fx.Node, tokens: Tokens) -> fx.Node:
    """The patches among the tokens of `row` [B, N]."""
    end = -tokens.after if tokens.after else END
    return here(aten.slice.Tensor, row, 1, tokens.before, end)


def heads_first(follow: Follow, here: Cursor, node: fx.Node) -> tuple[Any, Any, Any, Any, float]:
    """q, k, v [B, H, N, D], bias or None and scale of a scaled_dot_product_attention, [B*H, N, D] taken apart."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v, bias = given["query"], given["key"], given["value"], given.get("attn_mask")
    for option in ("dropout_p", "is_causal", "enable_gqa"):
        if given.get(option):
            raise Lost(node, f"tokens can not be ranked by an attention with {option}={given[option]}")
    tags = follow.of(q)
    if tags is None or not batch_in(tags[0]):
        raise Lost(node, "its first dimension is not the batch")
    if len(tags) == 3:
        if tags[0][0].role != "batch":
            raise Lost(node, "heads stand in front of the batch")
        batch = here.size(follow.batch_source(), 0)
        q, k, v = (here(aten.reshape.default, x, [batch, -1, here.size(x, 1), here.size(x, 2)]) for x in (q, k, v))
        if isinstance(bias, fx.Node) and bias.meta["val"].dim() == 3 and len(follow.shape(bias)) == 3:
            bias = here(aten.reshape.default, bias, [batch, -1, here.size(bias, 1), here.size(bias, 2)])
    elif len(tags) != 4:
        raise Lost(node, f"its queries have {len(tags)} dimensions instead of [B, H, N, D]")
    scale = given.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(q.meta["val"].shape[-1]))
    if isinstance(bias, fx.Node) and bias.meta["val"].dtype == torch.bool:
        zero = here(aten.zeros_like.default, bias, dtype=q.meta["val"].dtype)
        bias = here(aten.masked_fill.Scalar, zero, here(aten.logical_not.default, bias), -math.inf)
    return q, k, v, bias, float(scale)


def _class_row(
    follow: Follow, here: Cursor, attention: fx.Node, q: Any, k: Any, v: Any, bias: Any, scale: float
) -> fx.Node:
    op = getattr(torch.ops, NAMESPACE).attention_with_class_row.default
    both = here(op, q, k, v, bias, scale=scale)
    out = here(operator.getitem, both, 0)
    if attention.meta["val"].dim() == 3:
        out = here(aten.reshape.default, out, [-1, here.size(out, 2), here.size(out, 3)])
    follow.substitute(attention, out)
    return here(operator.getitem, both, 1)


def _mean_query(here: Cursor, q: Any, k: Any, bias: Any, scale: float) -> fx.Node:
    mean = here(aten.mean.dim, _float(here, q), [-2], True)  # [B, H, 1, D]
    logits = here(aten.matmul.default, mean, here(aten.transpose.int, _float(here, k), -2, -1))
    logits = here(aten.mul.Tensor, logits, scale)
    if bias is not None:
        logits = here(aten.add.Tensor, logits, here(aten.mean.dim, _float(here, bias), [-2], True))
    row = here(aten.softmax.int, logits, -1)
    return here(aten.mean.dim, here(aten.squeeze.dim, row, -2), [1])  # [B, N]


def _float(here: Cursor, x: Any) -> Any:
    return x if x.meta["val"].dtype == torch.float32 else here(aten._to_copy.default, x, dtype=torch.float32)


def _shares(here: Cursor, values: fx.Node) -> fx.Node:
    return here(aten.div.Tensor, values, here(aten.sum.dim_IntList, values, [-1], True))
