"""What ops that only rearrange do to a token axis: reshapes, transposes, slices, splits and joins.

A rule as in passes/follow_rules.py: `(follow, node) -> tags`, rewriting what is sized by token, raising `Lost` where a
patch is taken by its place or the patches are split into rows and columns. With the helpers that all rules share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.passes.follow import (
    END,
    Dim,
    Follow,
    Lost,
    Part,
    Tags,
    Tokens,
    batch_in,
    latest,
    plain,
    product,
    quotient,
    same,
    tokens_in,
)


def view(f: Follow, node: fx.Node) -> Tags:
    """Regroups the parts of the dimensions in order; a token axis may be merged and must not be split."""
    parts = [p for d in tags_of(f, node.args[0]) for p in d]
    out: list[Dim] = []
    for size in f.shape(node):
        if same(size, 1):
            first = bool(parts) and same(parts[0].size, 1)
            out.append((parts.pop(0),) if first else plain(1))
            continue
        taken: list[Part] = []
        while not same(product([p.size for p in taken]), size):
            if not parts:
                raise Lost(node, f"size {size} could not be traced to the dimensions before")
            head = parts.pop(0)
            whole = quotient(size, product([p.size for p in [*taken, head]]))
            if whole is not None:
                taken.append(head)
                continue
            need = quotient(size, product([p.size for p in taken]))
            rest = quotient(head.size, need) if need is not None else None
            if head.role is not None or need is None or rest is None:
                what = "tokens" if isinstance(head.role, Tokens) else "the batch" if head.role else "a dimension"
                raise Lost(node, f"it splits {what} of size {head.size}, as a map of rows and columns or windows do")
            taken.append(Part(need))
            parts.insert(0, Part(rest))
        while parts and same(parts[0].size, 1) and parts[0].role is None:
            parts.pop(0)
        taken = [p for p in taken if p.role is not None or not same(p.size, 1)] or taken[:1]
        out.append(tuple(taken))
    rewrite_sizes(f, node, 1, tuple(out))
    return tuple(out)


def rewrite_sizes(f: Follow, node: fx.Node, position: int, tags: Tags) -> None:
    """Writes the new sizes of token axes into a list of sizes; -1 stays."""
    given = list(node.args[position])  # type: ignore[arg-type]
    offset = len(tags) - len(given)
    for i, size in enumerate(given):
        if not resized(tags[i + offset]) or (isinstance(size, int) and size == -1):
            continue
        new = f.size_argument(node, tags[i + offset])
        if new is None:
            if any(isinstance(s, int) and s == -1 for s in given):
                raise Lost(node, "it merges tokens with a symbolic dimension beside another unknown size")
            new = -1
        given[i] = new
    node.update_arg(position, given)


def resized(dim: Dim) -> bool:
    """Whether a dimension has another size than before: its tokens are fewer, or its pictures are packed."""
    return latest((dim,)) > 0 or any(p.role == "packed" for p in dim)


def expand(f: Follow, node: fx.Node) -> Tags:
    tags, shape = tags_of(f, node.args[0]), f.shape(node)
    offset = len(shape) - len(tags)
    own = f.shape(node.args[0])
    out = tuple(
        tags[d - offset] if d >= offset and same(own[d - offset], shape[d]) else plain(shape[d])
        for d in range(len(shape))
    )
    rewrite_sizes(f, node, 1, out)
    return out


def repeat(f: Follow, node: fx.Node) -> Tags:
    tags, times = tags_of(f, node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    offset = len(times) - len(tags)
    out = []
    for d, (size, n) in enumerate(zip(f.shape(node), times, strict=True)):
        once = isinstance(n, int) and n == 1
        if d >= offset and tokens_in(tags[d - offset]) and not once:
            raise Lost(node, "it repeats the tokens")
        out.append(tags[d - offset] if d >= offset and once else plain(size))
    return tuple(out)


def transpose(f: Follow, node: fx.Node) -> Tags:
    tags = list(tags_of(f, node.args[0]))
    a, b = (dimension(d, len(tags)) for d in node.args[1:3])  # type: ignore[arg-type]
    tags[a], tags[b] = tags[b], tags[a]
    return tuple(tags)


def turned(f: Follow, node: fx.Node) -> Tags:
    return tuple(reversed(tags_of(f, node.args[0])))


def permute(f: Follow, node: fx.Node) -> Tags:
    tags = tags_of(f, node.args[0])
    return tuple(tags[dimension(d, len(tags))] for d in node.args[1])  # type: ignore[union-attr, arg-type]


def unsqueeze(f: Follow, node: fx.Node) -> Tags:
    tags = list(tags_of(f, node.args[0]))
    tags.insert(dimension(node.args[1], len(tags) + 1), plain(1))  # type: ignore[arg-type]
    return tuple(tags)


def squeeze(f: Follow, node: fx.Node) -> Tags:
    tags = tags_of(f, node.args[0])
    given = argument(node, 1, "dim", list(range(len(tags))))
    dims = {dimension(d, len(tags)) for d in (given if isinstance(given, (list, tuple)) else [given])}
    return tuple(t for d, t in enumerate(tags) if d not in dims or not same(f.shape(node.args[0])[d], 1))


def view_as_real(f: Follow, node: fx.Node) -> Tags:
    return (*tags_of(f, node.args[0]), plain(2))


def view_as_complex(f: Follow, node: fx.Node) -> Tags:
    return tags_of(f, node.args[0])[:-1]


def span(node: fx.Node, dim: Dim, start: Any, end: Any) -> tuple[Dim, int, int]:
    """The part [start, end) of a token axis: its tags, and start and end as arguments that stay right as it shrinks."""
    tokens = tokens_in(dim)
    if tokens is None or len(dim) != 1:
        raise Lost(node, "it cuts a dimension in which tokens and others are merged")
    total = dim[0].size
    start, end = size_of(0 if start is None else start), size_of(END if end is None else end)
    if not isinstance(start, int):
        raise Lost(node, f"it cuts the tokens at {start}")
    if start < 0:
        if -start > tokens.after:
            raise Lost(node, f"it takes the last {-start} tokens by their place")
        if not (isinstance(end, int) and end >= END // 2):
            raise Lost(node, "it cuts within the last tokens")
        return plain(-start), start, END
    if isinstance(end, int) and 0 <= end <= tokens.before:
        return plain(max(0, end - start)), start, end
    left: Any = 0
    if isinstance(end, int) and end < 0:
        left = -end
    elif not (isinstance(end, int) and (end >= END // 2 or (isinstance(total, int) and end >= total))):
        left = size_of(total - end)
    if start > tokens.before or not isinstance(left, int) or left > tokens.after:
        raise Lost(node, f"it takes patches by their place, from {start} to {end} of {total}")
    rest = Tokens(tokens.stage, tokens.before - start, tokens.after - left)
    return (Part(total - start - left, rest),), start, END if left == 0 else -left


def size_of(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    found = _torch.expression(value)
    return int(found) if getattr(found, "is_Integer", False) else found


def slice_(f: Follow, node: fx.Node) -> Tags:
    tags = list(tags_of(f, node.args[0]))
    d = dimension(argument(node, 1, "dim", 0), len(tags))
    start, end, step = argument(node, 2, "start", None), argument(node, 3, "end", None), argument(node, 4, "step", 1)
    if tokens_in(tags[d]) is None:
        if not same(f.shape(node)[d], f.shape(node.args[0])[d]):
            tags[d] = plain(f.shape(node)[d])
        return tuple(tags)
    if step != 1:
        raise Lost(node, f"it takes every {step}th token")
    tags[d], start, end = span(node, tags[d], start, end)
    node.args = (node.args[0], d, start, end)
    node.kwargs = {}
    return tuple(tags)


def select(f: Follow, node: fx.Node) -> Tags:
    tags = list(tags_of(f, node.args[0]))
    d, index = dimension(node.args[1], len(tags)), node.args[2]  # type: ignore[arg-type]
    tokens = tokens_in(tags[d])
    if tokens is not None and not (
        isinstance(index, int) and (0 <= index < tokens.before or -tokens.after <= index < 0)
    ):
        raise Lost(node, f"it takes token {index} by its place, where {tokens.before} stand in front of the patches")
    return tuple(tags[:d] + tags[d + 1 :])


def pieces(f: Follow, node: fx.Node) -> list[Tags | None]:
    """split, chunk, unbind: several values along one dimension."""
    tags = list(tags_of(f, node.args[0]))
    name = str(node.target).split(".")[1]
    d = dimension(argument(node, 1 if name == "unbind" else 2, "dim", 0), len(tags))
    outs = f.old[node]
    if tokens_in(tags[d]) is None:
        if name == "unbind":
            return [tuple(tags[:d] + tags[d + 1 :])] * len(outs)
        return [tuple([*tags[:d], plain(_torch.expression(o.shape[d])), *tags[d + 1 :]]) for o in outs]
    sizes = node.args[1]
    if name not in ("split_with_sizes", "split") or not isinstance(sizes, (list, tuple)):
        raise Lost(node, "it takes the tokens apart")
    found: list[Tags | None] = []
    new: list[Any] = list(sizes)
    begin: Any = 0
    for i, out in enumerate(outs):
        size = _torch.expression(out.shape[d])
        last = i == len(outs) - 1
        piece = span(node, tags[d], begin, END if last else begin + size)[0]
        found.append(tuple([*tags[:d], piece, *tags[d + 1 :]]))
        if latest((piece,)) > 0:
            new[i] = f.size_argument(node, piece)
        begin = begin + size
    node.update_arg(1, new)
    return found


def getitem(f: Follow, node: fx.Node) -> Tags | None:
    found = f.tags.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(found, list):
        raise Lost(node, "it takes an item of something that is not followed")
    return found[node.args[1]]  # type: ignore[index]


def cat(f: Follow, node: fx.Node) -> Tags:
    operands: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(f.shape(node))
    along = dimension(argument(node, 1, "dim", 0), rank)
    out = list(merge_all(f, node, operands, rank, along))
    tagged = [i for i, o in enumerate(operands) if tokens_in(tags_of(f, o)[along])]
    if len(tagged) > 1:
        raise Lost(node, "it joins tokens to tokens")
    if tagged:
        tokens = tokens_in(tags_of(f, operands[tagged[0]])[along])
        sizes = [f.shape(o)[along] for o in operands]
        fixed = [s for i, s in enumerate(sizes) if i != tagged[0]]
        if tokens is None or not all(isinstance(s, int) for s in fixed):
            raise Lost(node, "it joins tokens to a number of others that is not fixed")
        before, after = sum(sizes[: tagged[0]]), sum(sizes[tagged[0] + 1 :])
        out[along] = (Part(sum(sizes), Tokens(tokens.stage, tokens.before + before, tokens.after + after)),)
    wanted = [plain(1) if d == along else dim for d, dim in enumerate(out)]
    if latest(tuple(wanted)) > 0:
        operands = [
            f.bring(node, o, tuple(wanted), partial(no_entry, node, o)) if tokens_apart(f, o, wanted, along) else o
            for o in operands
        ]
        node.update_arg(0, operands)
    return tuple(out)


def merge_all(f: Follow, node: fx.Node, operands: list[Any], rank: int, along: int) -> list[Dim]:
    merged = merge(f, node, operands, rank)
    return [plain(f.shape(node)[d]) if d == along else dim for d, dim in enumerate(merged)]


def tokens_apart(f: Follow, operand: Any, wanted: list[Dim], along: int) -> bool:
    """Whether an operand of a cat has to be gathered along another dimension than the one it is joined along."""
    own = tags_of(f, operand)
    return any(tokens_in(w) and tokens_in(w) != tokens_in(own[d]) for d, w in enumerate(wanted) if d != along)


def no_entry(node: fx.Node, table: fx.Node) -> Any:
    raise Lost(node, f"the fused token has no stated entry in {table}, a table indexed by token")


def stack(f: Follow, node: fx.Node) -> Tags:
    operands: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(f.shape(operands[0]))
    out = list(merge(f, node, operands, rank))
    if latest(tuple(out)) > 0:
        brought = [f.bring(node, o, tuple(out), partial(no_entry, node, o)) for o in operands]
        node.update_arg(0, brought)
    out.insert(dimension(argument(node, 1, "dim", 0), rank + 1), plain(len(operands)))
    return tuple(out)


def along_other_axes(f: Follow, node: fx.Node) -> Tags:
    """roll, flip: fine on dimensions that hold no tokens."""
    tags = tags_of(f, node.args[0])
    dims = argument(node, 2 if "roll" in str(node.target) else 1, "dims", [])
    if not dims:
        no_tokens(node, tags, "it moves tokens by their place")
    no_tokens(node, tuple(tags[dimension(d, len(tags))] for d in dims), "it moves tokens by their place")
    return tags


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def tags_of(f: Follow, node: Any) -> Tags:
    """Tags of a tensor; plain dimensions where it is not on the way of the tokens."""
    return f.of(node) or tuple(plain(s) for s in f.shape(node))


def no_tokens(node: fx.Node, tags: Tags, because: str) -> None:
    if any(tokens_in(d) for d in tags):
        raise Lost(node, because)


def dimension(value: int, rank: int) -> int:
    return value % rank if rank else 0


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument given by position or by keyword."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def merge(f: Follow, node: fx.Node, operands: list[Any], rank: int) -> Tags:
    """Tags of what operands, aligned from the right, broadcast to; the latest stage wins, older ones are gathered."""
    out: list[Dim] = []
    for d in range(rank):
        best: Dim | None = None
        for operand in operands:
            tags, shape = tags_of(f, operand), f.shape(operand)
            own = d - (rank - len(shape))
            if own < 0 or (same(shape[own], 1) and not batch_in(tags[own])):
                continue
            best = tags[own] if best is None else stronger(node, best, tags[own])
        out.append(best if best is not None else plain(1))
    return tuple(out)


def stronger(node: fx.Node, a: Dim, b: Dim) -> Dim:
    left, right = tokens_in(a), tokens_in(b)
    if left is None and right is None:
        if batch_in(a) and batch_in(b):
            return b if any(p.role == "packed" for p in b) else a
        if batch_in(a) != batch_in(b):
            tagged, other = (a, b) if batch_in(a) else (b, a)
            return tagged if not same(product([p.size for p in tagged]), 1) or same_size(other, 1) else other
        return a if not same_size(a, 1) or batch_in(a) else b
    if left is None or right is None:
        return b if left is None else a
    if (left.before, left.after) != (right.before, right.after):
        raise Lost(node, f"it combines {left.before} fixed entries and the patches with {right.before} and the patches")
    return a if left.stage >= right.stage else b


def same_size(dim: Dim, size: int) -> bool:
    return same(product([p.size for p in dim]), size)
