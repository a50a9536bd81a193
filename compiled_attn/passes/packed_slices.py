"""The fixed tokens of packed pictures, a class token for example: picked, left out, and put in front again.

x[:, 0]; x[:, :, :k]              ->   the rows where each picture begins; [B, H, k, D]
x[:, 1:]                          ->   the rows without those
cat([front [B, H, k, D], x], 2)   ->   the rows, each picture's front ones put in front of its others
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from compiled_attn.passes.follow import END, Lost, Part, Tags, Tokens, plain, same, tokens_in
from compiled_attn.passes.follow_layout import argument, dimension, span, tags_of
from compiled_attn.passes.token_scores import Cursor

if TYPE_CHECKING:
    from compiled_attn.passes.follow_packed import Cut, FollowPacked

aten = torch.ops.aten


def select(f: FollowPacked, node: fx.Node) -> bool:
    """x[:, i]: row i of each picture."""
    x, index = node.args[0], node.args[2]
    tags = tags_of(f, x)
    d = dimension(node.args[1], len(tags))  # type: ignore[arg-type]
    no_pictures(node, tags, {d})
    if tokens_in(tags[d]) is None:
        return False
    tokens, cut = f.pictures_first(node, x)
    if d != 1 or not isinstance(index, int) or not (0 <= index < tokens.before or -tokens.after <= index < 0):
        raise Lost(node, f"it takes token {index} by its place, where {tokens.before} stand in front of the patches")
    here = Cursor(f.edit, node)
    out = here(aten.index_select.default, here(aten.select.int, x, 0, 0), 0, fixed(here, cut, index, index + 1))
    f.put(node, out, ((Part(tags[0][0].size, "batch"),), *tags[2:]))
    return True


def fixed(here: Cursor, cut: Cut, start: int, end: int) -> fx.Node:
    """Rows [B * (end - start)] of the fixed tokens [start, end) of each picture; negative: from behind."""
    side = (0, 0, -1) if start >= 0 else (0, 1, END)
    ends = here(aten.slice.Tensor, cut.begins, *side)
    if end - start == 1:
        return here(aten.add.Tensor, ends, start)
    some = here(aten.arange.start, start, end, device=cut.begins.meta["val"].device)
    both = here(aten.add.Tensor, here(aten.unsqueeze.default, ends, 1), some)
    return here(aten.reshape.default, both, [-1])


def slice_(f: FollowPacked, node: fx.Node) -> bool:
    """x[:, :k] of fixed tokens: picked; x[:, k:]: the rows without those."""
    x: Any = node.args[0]
    tags = tags_of(f, x)
    d = dimension(argument(node, 1, "dim", 0), len(tags))
    if tokens_in(tags[d]) is None:
        if not same(f.shape(node)[d], f.shape(x)[d]):
            no_pictures(node, tags, {d})
        return False
    if argument(node, 4, "step", 1) != 1:
        raise Lost(node, "it takes tokens in steps")
    dim, start, end = span(node, tags[d], argument(node, 2, "start", None), argument(node, 3, "end", None))
    if dim == tags[d]:
        f.put(node, x, tags)
        return True
    here = Cursor(f.edit, node)
    tokens = tokens_in(dim)
    if tokens is None:
        end = 0 if start < 0 else end
        out, tags = taken(f, here, node, x, d, start, end)
        f.put(node, out, tags)
        return True
    if f.cut(tokens_in(tags[d]), node).count:  # type: ignore[arg-type]
        raise Lost(node, "it leaves out tokens in front a second time")
    out = here(aten.index_select.default, x, d, f.cut(tokens, node).rows)
    f.put(node, out, (*tags[:d], dim, *tags[d + 1 :]))
    return True


def split(f: FollowPacked, node: fx.Node) -> bool:
    """split_with_sizes(x, [k, n]) along the tokens: its parts are slices, which come next."""
    x: Any = node.args[0]
    tags, sizes = tags_of(f, x), node.args[1]
    d = dimension(argument(node, 2, "dim", 0), len(tags))
    if tokens_in(tags[d]) is None:
        no_pictures(node, tags, {d})
        return False
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(s, int) for s in sizes[:-1]):
        raise Lost(node, "it takes the tokens apart")
    for part in list(node.users):
        index: Any = part.args[1]
        begin = sum(sizes[:index])
        end = END if index == len(sizes) - 1 else begin + sizes[index]
        part.target, part.args = aten.slice.Tensor, (x, d, begin, end)
    f.graph.erase_node(node)
    return True


def taken(
    f: FollowPacked, here: Cursor, node: fx.Node, x: fx.Node, d: int, start: int, end: int
) -> tuple[fx.Node, Tags]:
    """Fixed tokens [start, end) along dimension d of x [1, ..., T, ...]: [B, ..., end - start, ...] and its tags."""
    tags = tags_of(f, x)
    cut = axis_of(f, node, tags, d)
    count = end - start
    rows = here(aten.select.int, here(aten.index_select.default, x, d, fixed(here, cut, start, end)), 0, 0)
    sizes = [here.size(x, i) for i in range(1, len(tags))]
    sizes[d - 1 : d] = [f.pictures(here, cut), count]
    out = here(aten.reshape.default, rows, sizes)
    if d > 1:
        out = here(aten.permute.default, out, [d - 1, *(i for i in range(len(tags)) if i != d - 1)])
    return out, ((Part(tags[0][0].size, "batch"),), *tags[1:d], plain(count), *tags[d + 1 :])


def cat(f: FollowPacked, node: fx.Node) -> bool:
    """cat([front, x], d) along the tokens, front [B, ..., k, ...] of every picture."""
    operands: Any = node.args[0]
    d = dimension(argument(node, 1, "dim", 0), len(f.shape(node)))
    tags = [tags_of(f, x) for x in operands]
    if not any(tokens_in(t[d]) for t in tags):
        no_pictures(node, tags[0], {d})
        return False
    if len(operands) != 2 or f.packed(operands[0]):
        raise Lost(node, "it joins packed tokens to others than fixed ones in front, of every picture")
    front, x = operands
    axis_of(f, node, tags[1], d)
    tokens, count = tokens_in(tags[1][d]), f.shape(front)[d]
    if tokens is None or not isinstance(count, int):
        raise Lost(node, f"it puts {count} tokens in front, a number that is not fixed")
    joined = Tokens(tokens.stage, tokens.before + count, tokens.after)
    cut, here = f.cut(joined, node), Cursor(f.edit, node)
    rank = len(tags[0])
    first = here(aten.permute.default, front, [*range(1, d), 0, *range(d, rank)]) if d > 1 else front
    sizes = [here.size(front, i) for i in range(rank)]
    first = here(aten.reshape.default, first, [1, *sizes[1:d], -1, *sizes[d + 1 :]])
    picture = here(aten.floor_divide.default, cut.place, cut.full)
    in_front = here(aten.add.Tensor, here(aten.mul.Tensor, picture, count), cut.positions)
    row = here(aten.arange.default, cut.total, device=cut.begins.meta["val"].device)
    before = here(aten.mul.Tensor, here(aten.add.Tensor, picture, 1), count)  # rows of `first` up to this picture
    behind = here(aten.add.Tensor, here(aten.sub.Tensor, row, before), here.size(first, d))
    index = here(aten.where.self, here(aten.lt.Scalar, cut.positions, count), in_front, behind)
    out = here(aten.index_select.default, here(aten.cat.default, [first, x], d), d, index)
    f.put(node, out, (*tags[1][:d], (Part(f.shape(node)[d], joined),), *tags[1][d + 1 :]))
    return True


def axis_of(f: FollowPacked, node: fx.Node, tags: Tags, d: int) -> Cut:
    """The rows along dimension d of a value [1, ..., T, ...]. Raises Lost, at `node`, where it lies otherwise."""
    tokens = tokens_in(tags[d])
    if tokens is None or d == 0 or len(tags[d]) != 1 or [p.role for p in tags[0]] != ["packed"]:
        raise Lost(node, "pictures are not its first dimension, or merged with others")
    return f.cut(tokens, node)


def no_pictures(node: fx.Node, tags: Tags, dims: set[int]) -> None:
    if any(p.role == "packed" for d in dims for p in tags[d]):
        raise Lost(node, "it takes pictures apart, which are packed here")
