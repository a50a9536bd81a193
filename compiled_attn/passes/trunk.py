"""Finds the trunk of a Vision Transformer: its self-attention blocks in order, and the tokens that run through them.

By dataflow alone. A block is a scaled_dot_product_attention whose queries, keys and values are made of the same tokens
[B, N, C], and the first sum behind it that adds those tokens again:

    q, k, v = f(x); a = scaled_dot_product_attention(q, k, v); y = add(x, g(a))

The tokens after the attention are y, or norm(y) where y is only read by a norm (post-norm networks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Program
from compiled_attn.passes.follow import Follow, Lost, Tags, Tokens, batch_in, same, tokens_in
from compiled_attn.passes.rotary import name_of

aten = torch.ops.aten
ATTENTION = (aten.scaled_dot_product_attention.default,)
PER_TOKEN = frozenset(("layer_norm", "rms_norm", "clone", "_to_copy", "to", "contiguous", "alias", "dropout"))
SHAPE_ONLY = frozenset(("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"))


@dataclass(frozen=True)
class Block:
    """attention: the node.  before: the tokens it reads, `x`.  after: the tokens behind it, `y`.  axis: 1 or 0."""

    attention: fx.Node
    before: fx.Node
    after: fx.Node
    axis: int


@dataclass(frozen=True)
class Trunk:
    """Blocks in order, and the layout of their token axis: fixed rows in front, patches, fixed rows behind."""

    blocks: tuple[Block, ...]
    tokens: Tokens


def find_trunk(program: Program, graph: fx.Graph, edit: Any, prefix: int | None) -> Trunk | None:
    """The longest trunk of `graph`; None where no attention is found. prefix: rows in front, instead of finding."""
    open_ = [b for n in graph.nodes if n.op == "call_function" and n.target in ATTENTION and (b := block_of(n))]
    best: Trunk | None = None
    data = depends(graph, user_inputs(program, graph))
    while open_:
        tokens = layout(open_[0].before, open_[0].axis, data, prefix)
        found = _connected(edit, open_, tokens, data)
        if best is None or len(found) > len(best.blocks):
            best = Trunk(tuple(found), tokens) if found else best
        rest = [b for b in open_ if b not in found]
        open_ = rest[1:] if len(rest) == len(open_) else rest
    return best


def user_inputs(program: Program, graph: fx.Graph) -> set[fx.Node]:
    names = {n.name for n in program.inputs}
    return {n for n in graph.nodes if n.op == "placeholder" and n.name in names}


def depends(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose numbers depend on those of `sources`; sizes do not count."""
    found = set(sources)
    for node in graph.nodes:
        if node.op != "call_function" or name_of(node) in ("sym_size", *SHAPE_ONLY):
            continue
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def sources_of(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def block_of(attention: fx.Node) -> Block | None:
    """The block of a self-attention, by its residual sum; None where there is none, or where a query is not a token."""
    q, k = (attention.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    count = _torch.expression(q.shape[-2])
    if not same(count, _torch.expression(k.shape[-2])):
        return None
    above = sources_of(attention)
    below = {attention}
    node = attention
    while (node := node.next).op != "root":
        if node.op != "call_function" or not any(a in below for a in node.all_input_nodes):
            continue
        below.add(node)
        if name_of(node) == "add" and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args):
            others = [a for a in node.args if a not in below]
            if len(others) == 1 and others[0] in above and _same_shape(others[0], node):
                axis = _axis(node, count)
                return None if axis is None else Block(attention, others[0], _behind(node), axis)  # type: ignore[arg-type]
    return None


def layout(node: fx.Node, axis: int, data: set[fx.Node], prefix: int | None) -> Tokens:
    """Fixed rows in front of and behind the patches of `node`: those that do not depend on the pictures."""
    runs = _runs(node, axis, data)
    sizes = [(size, live) for size, live in runs if size != 0]
    front = behind = 0
    for size, live in sizes:
        if live or not isinstance(size, int):
            break
        front += size
    for size, live in reversed(sizes):
        if live or not isinstance(size, int):
            break
        behind += size
    return Tokens(0, front if prefix is None else prefix, behind)


def _runs(node: fx.Node, axis: int, data: set[fx.Node]) -> list[tuple[Any, bool]]:
    """The entries of a dimension as runs (how many, whether they depend on the pictures)."""
    size = _torch.expression(node.meta["val"].shape[axis])
    whole = [(size, True)]
    if node not in data:
        return [(size, False)]
    name = name_of(node)
    rank = node.meta["val"].dim()
    args: Any = node.args
    if name == "cat":
        along = (args[1] if len(args) > 1 else 0) % rank
        if along == axis:
            return [run for part in args[0] for run in _runs(part, axis, data)]
        return whole
    if name == "slice":
        along = (args[1] if len(args) > 1 else 0) % rank
        inner = _runs(args[0], axis, data)
        return inner if along != axis else _cut(node, inner, size)
    if name in ("transpose", "permute"):
        source: Any = args[0]
        order = list(range(rank))
        if name == "permute":
            order = [d % rank for d in args[1]]
        else:
            a, b = (d % rank for d in args[1:3])
            order[a], order[b] = order[b], order[a]
        return _runs(source, order[axis], data)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if pointwise or name in PER_TOKEN:
        live = [a for a in node.all_input_nodes if a in data and _same_shape(a, node)]
        return _runs(live[0], axis, data) if len(live) == 1 else whole
    return whole


def _cut(node: fx.Node, runs: list[tuple[Any, bool]], size: Any) -> list[tuple[Any, bool]]:
    """The runs of a slice that begins and ends at fixed places."""
    start = node.args[2] if len(node.args) > 2 else 0
    start = 0 if start is None else start
    if not isinstance(start, int) or start < 0 or len(node.args) > 4:
        return [(size, True)]
    found: list[tuple[Any, bool]] = []
    left: Any = size
    for count, live in runs:
        if isinstance(count, int) and start >= count:
            start -= count
            continue
        count = count - start
        start = 0
        if isinstance(count, int) and isinstance(left, int):
            count = min(count, left)
        elif isinstance(left, int):
            count = left
        if count == 0:
            break
        found.append((count, live))
        left = left - count
    return found


def _connected(edit: Any, blocks: list[Block], tokens: Tokens, data: set[fx.Node]) -> list[Block]:
    """Those of `blocks` whose queries, keys and values are all made of the tokens of the first."""
    follow = Follow(edit, data)
    follow.seed(blocks[0].before, blocks[0].axis, tokens)
    node = blocks[0].before
    while (node := node.next).op != "root":
        follow.visit(node)
    found = []
    for block in blocks:
        stream, made = follow.of(block.before), [follow.of(a) for a in block.attention.args[:3]]
        if stream is not None and tokens_in(stream[block.axis]) == tokens and all(_rows(t, tokens) for t in made):
            found.append(block)
    return found


def _rows(tags: Tags | None, tokens: Tokens) -> bool:
    return tags is not None and len(tags[-2]) == 1 and tokens_in(tags[-2]) == tokens and batch_in(tags[0])


def _same_shape(a: Any, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta["val"]
    return (
        isinstance(x, torch.Tensor)
        and x.dim() == y.dim()
        and all(same(_torch.expression(m), _torch.expression(n)) for m, n in zip(x.shape, y.shape, strict=True))
    )


def _axis(node: fx.Node, count: Any) -> int | None:
    sizes = [_torch.expression(s) for s in node.meta["val"].shape]
    if len(sizes) != 3:
        return None
    return next((d for d in (1, 0) if same(sizes[d], count)), None)


def _behind(node: fx.Node) -> fx.Node:
    """The tokens that the rest of the block reads: behind a norm or a copy that alone reads the sum."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if name_of(user) not in PER_TOKEN or not _same_shape(user, node) or user.args[0] is not node:
            break
        node = user
    return node


__all__ = ["Block", "Lost", "Trunk", "depends", "find_trunk", "sources_of"]
