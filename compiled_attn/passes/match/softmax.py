"""A softmax, in one op or as people write it by hand."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import Dim, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Softmax:
    """A softmax, in one op or written by hand. inner: the nodes between `scores` and `node` that are part of it.
    keys: the axes that it runs over, once a match has named them."""

    node: fx.Node
    scores: fx.Node
    dim: int
    inner: frozenset[fx.Node] = frozenset()
    keys: Dim = ()


def softmax(node: fx.Node) -> Softmax | None:
    """The softmax whose result `node` is: one op, or exp(x - max x) / sum of it."""
    if node.target in (
        aten.softmax.int,
        aten._softmax.default,
        aten._safe_softmax.default,
        aten.special_softmax.default,
    ):
        source, dim = node.args[0], node.args[1]
        if isinstance(source, fx.Node) and isinstance(dim, int):
            return Softmax(node, source, values.normal_dim(dim, len(shape(source))))
        return None
    if node.target is aten.div.Tensor and values.is_tensor(node.args[0]) and values.is_tensor(node.args[1]):
        return _by_hand(node)
    return None


def _by_hand(node: fx.Node) -> Softmax | None:
    top, below_line = node.args
    if not isinstance(top, fx.Node) or not isinstance(below_line, fx.Node) or top.target is not aten.exp.default:
        return None
    total = below_line
    while total.target in (aten.expand.default, aten.clone.default) and isinstance(total.args[0], fx.Node):
        total = total.args[0]
    dim = _reduced(total, aten.sum.dim_IntList, top)
    shifted = top.args[0]
    if dim is None or not isinstance(shifted, fx.Node):
        return None
    inner = {top, below_line, total}
    if shifted.target is aten.sub.Tensor and shifted.kwargs.get("alpha", 1) == 1:
        scores, most = shifted.args
        chain = largest(most, scores, dim)
        if isinstance(scores, fx.Node) and chain is not None:
            return Softmax(node, scores, dim, frozenset(inner | {shifted} | chain))
    return Softmax(node, shifted, dim, frozenset(inner))


def _reduced(node: fx.Node, target: Any, source: Any) -> int | None:
    """The one dimension that a reduction of `source` with keepdim runs over."""
    if node.target is not target or node.args[0] is not source or not isinstance(source, fx.Node):
        return None
    dims = values.argument(node, 1, "dim", None)
    keep = values.argument(node, 2, "keepdim", False)
    if isinstance(dims, int):
        dims = [dims]
    if not keep or not dims or len(dims) != 1:
        return None
    return values.normal_dim(dims[0], len(shape(source)))


def largest(node: Any, scores: Any, dim: int) -> set[fx.Node] | None:
    """The nodes that take the largest of `scores` along `dim`."""
    chain: set[fx.Node] = set()
    while isinstance(node, fx.Node) and node.target in (
        aten.detach.default, aten.clone.default, aten.expand.default, aten.alias.default, operator.getitem
    ):  # fmt: skip
        if node.target is operator.getitem and node.args[1] != 0:
            return None
        chain.add(node)
        node = node.args[0]
    for target in (aten.amax.default, aten.max.dim):
        if isinstance(node, fx.Node) and _reduced(node, target, scores) == dim:
            return chain | {node}
    return None
