"""Raises windows mixed by weights that the model predicts, and the fold behind them, to neighborhood_apply.

    u = im2col(v, [3, 3], padding=1, stride=2)            m = neighborhood_apply(w, v, window=[3, 3], stride=[2, 2],
    m = matmul(w, windows(u))                     ->              block=[1, 1], border="zero")
    y = col2im(rows(m), [Y, X], [3, 3], ...)              y = sums of shifted slices of m

Outlook attention, dynamic kernels, involution: windows are found by following element numbers (match/mixing.py), so it
does not matter how they are cut out, and no copy of them is left. Never raised: products whose weights come from
queries and keys, which are attention, and windows that the op can not say, with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn import ops
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.match.axes import fresh, shape
from compiled_attn.passes.match.mixing import PARTS, Mixing, Windows, mixings, windows_of
from compiled_attn.passes.match.positions import Numbering, moves, numbered
from compiled_attn.passes.match.probabilities import reached
from compiled_attn.passes.match.rebuild import Builder
from compiled_attn.passes.match.scores import Scores, climb
from compiled_attn.passes.match.softmax import softmax
from compiled_attn.passes.strides import follow_strides, moved

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "neighborhood_apply"


@dataclass(frozen=True)
class Found:
    """A match. fold: the col2im that alone reads the result, where its sums can be written as slices."""

    mixing: Mixing
    windows: Windows
    numbering: Numbering
    fold: fx.Node | None

    @property
    def mixes(self) -> int:
        """Results of a window."""
        return math.prod(size(self.mixing, x) for x in self.mixing.mixes)

    @property
    def width(self) -> int:
        return self.windows.tokens.channels.shape[1]


def match(program: Program, node: fx.Node) -> Found | str | None:
    """The neighborhoods that a node mixes; a sentence where it nearly does; None for any other product."""
    because = None
    for mixing in mixings(node):
        kinds = {n.meta["val"].dtype for n in (mixing.values, mixing.weights, node)}
        if len(kinds) != 1 or not kinds.pop().is_floating_point:
            continue
        numbering = Numbering.of(program, [mixing.values])
        windows = None if numbering is None else windows_of(mixing, numbering)
        if isinstance(windows, Windows) and numbering is not None:
            found = Found(mixing, windows, numbering, None)
            return Found(mixing, windows, numbering, fold_behind(found))
        because = because or windows
    return because if isinstance(because, str) else None


def attentions(program: Program) -> set[fx.Node]:
    """Products that probabilities of queries and keys go into."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        weights = softmax(node) if node.op == "call_function" else None
        if weights is not None and isinstance(climb(program, weights, weights.scores, fresh(shape(node))), Scores):
            found.update(reached(weights.node))
    return found


def size(mixing: Mixing, label: str) -> Any:
    """A label's size; -1 where it holds the symbol."""
    for node, labels in ((mixing.values, mixing.values_labels), (mixing.weights, mixing.weights_labels)):
        if label in labels:
            found = shape(node)[labels.index(label)]
            return found if isinstance(found, int) else -1
    raise ValueError(f"no factor has a dimension {label}")


def fold_behind(found: Found) -> fx.Node | None:
    """The col2im that sums the mixed windows where they overlap, if each of its elements is where the op puts it."""
    tokens, numbering, (m, d) = found.windows.tokens, found.numbering, (found.mixes, found.width)
    if len(found.windows.queries) != 2:
        return None
    heads, count = len(tokens.channels), math.prod(found.windows.queries)
    start = numbered(int(tokens.batch.max()) + 1, count, heads, m, d)
    value, node = arranged(found, start), found.mixing.product.node
    while len(node.users) == 1 and moves(user := next(iter(node.users))):
        following = numbering.run(user, {node: value})
        if following is None:
            return None
        value, node = following, user
    fold = next(iter(node.users), node)
    if len(node.users) != 1 or fold.target is not aten.col2im.default:
        return None
    size_yx, kernel, dilation, padding, stride = fold_options(fold)
    counts = [(n + 2 * p - k) // s + 1 for n, k, p, s in zip(size_yx, kernel, padding, stride, strict=True)]
    if dilation != [1, 1] or counts != list(found.windows.queries) or math.prod(kernel) != m:
        return None
    if any(k < s for k, s in zip(kernel, stride, strict=True)):
        return None
    wanted = start.permute(0, 2, 4, 3, 1).reshape(value.shape) if value.numel() == start.numel() else None
    return fold if wanted is not None and torch.equal(wanted, value) else None


def fold_options(fold: fx.Node) -> list[list[int]]:
    """A col2im's sizes, kernel, dilation, padding and stride."""
    return [list(x) for x in fold.args[1:6]]  # type: ignore[arg-type]


def arranged(found: Found, value: Any, builder: Builder | None = None) -> Any:
    """[B, N, H, M, D] in the order of the product's result: a tensor, or a node that `builder` writes."""
    mixing, place = found.mixing, [PARTS.index(part) for part in found.windows.order]
    at = [(0, 2, 1)[p] for p in place]  # where batch, head and place stand in the op's result
    labels = (*mixing.shared, *mixing.mixes, *mixing.widths)
    back = [labels.index(x) for x in mixing.product.out_labels if x]
    sizes = [size(mixing, x) for x in labels]
    if builder is None:
        return value.permute(*at, 3, 4).reshape(sizes).permute(back)
    moved = builder.call(aten.permute.default, value, [*at, 3, 4])
    return builder.call(aten.permute.default, builder.call(aten.reshape.default, moved, sizes), back)


def write(edit: Edit, node: fx.Node, found: Found) -> dict[fx.Node, fx.Node]:
    """Puts the op in the product's place, and slices in the fold's: {new result: old}."""
    windows, m, d = found.windows, found.mixes, found.width
    end = found.fold or node
    with edit.graph.inserting_before(edit.node_of[end]):
        builder = Builder(edit, edit.node_of[node], found.numbering)
        real, heads = windows.tokens.spatial, len(windows.tokens.channels)
        v = builder.on_map(windows.tokens, real)
        if windows.keys != real:
            behind = [n for full, own in zip(windows.keys[::-1], real[::-1], strict=True) for n in (0, full - own)]
            v = builder.call(aten.constant_pad_nd.default, v, [0, 0, 0, 0, *behind])
        out = builder.call(ops.neighborhood_apply.overload, _weights(builder, found), v, **windows.options)
        if found.fold is None:
            flat = builder.call(aten.reshape.default, out, [-1, math.prod(windows.queries), heads, m, d])
            out = arranged(found, flat, builder)
        else:
            out = _folded(builder, found.fold, out)
    edit.replace(edit.node_of[end], out)
    return {out: end}


def _weights(builder: Builder, found: Found) -> fx.Node:
    """The weights as [B, *queries, H, M, K]."""
    mixing, windows = found.mixing, found.windows
    wanted = (*mixing.shared, *mixing.mixes, *mixing.slots)
    spread = [i for i, x in enumerate(mixing.weights_labels) if x is None]
    order = [*(mixing.weights_labels.index(x) for x in wanted), *spread]
    sizes = {"batch": -1, "head": len(windows.tokens.channels), "place": math.prod(windows.queries)}
    last = [found.mixes, math.prod(size(mixing, x) for x in mixing.slots)]
    w = builder.call(aten.permute.default, builder.edit.node_of[mixing.weights], order)
    w = builder.call(aten.reshape.default, w, [*(sizes[part] for part in windows.order), *last])
    w = builder.call(aten.permute.default, w, [*(windows.order.index(p) for p in ("batch", "place", "head")), 3, 4])
    return builder.call(aten.reshape.default, w, [-1, *windows.queries, sizes["head"], *last])


def _folded(builder: Builder, fold: fx.Node, mixed: fx.Node) -> fx.Node:
    """The overlapping windows of [B, y, x, H, M, D] summed to [B, C, Y, X], row by row and place by place."""
    (height, width), (ky, kx), _, padding, stride = fold_options(fold)
    parts = [builder.call(aten.select.int, mixed, 4, slot) for slot in range(ky * kx)]  # [B, y, x, H, D]
    rows = [
        overlapped(builder, parts[i * kx : (i + 1) * kx], 2, stride[1], padding[1], width) for i in range(ky)
    ]  # [B, y, X, H, D]
    out = overlapped(builder, rows, 1, stride[0], padding[0], height)
    channels = math.prod(out.meta["val"].shape[3:])
    out = builder.call(aten.reshape.default, out, [-1, height, width, channels])
    return builder.call(aten.permute.default, out, [0, 3, 1, 2])


def overlapped(builder: Builder, parts: Sequence[fx.Node], dim: int, stride: int, padding: int, length: int) -> fx.Node:
    """Sums what windows give their first, second, ... place along `dim`, as `length` places behind `padding`.

    Place p of the sum, counted with the padding, takes part i of window (p - i) / stride for each i that divides.
    """
    count, rank = parts[0].meta["val"].shape[dim], parts[0].meta["val"].dim()
    total = max(count + (len(parts) - 1) // stride, -(-(length + padding) // stride))
    classes = []
    for residue in range(stride):
        summed = None
        for i in range(residue, len(parts), stride):
            before = i // stride
            ends = [0, 0] * (rank - 1 - dim) + [before, total - count - before]
            part = builder.call(aten.constant_pad_nd.default, parts[i], ends) if any(ends) else parts[i]
            summed = part if summed is None else builder.call(aten.add.Tensor, summed, part)
        classes.append(builder.call(aten.unsqueeze.default, summed, dim + 1))
    joined = classes[0] if stride == 1 else builder.call(aten.cat.default, classes, dim + 1)
    sizes = [n if isinstance(n, int) else -1 for n in parts[0].meta["val"].shape]
    sizes[dim] = total * stride
    joined = builder.call(aten.reshape.default, joined, sizes)
    return builder.call(aten.slice.Tensor, joined, dim, padding, padding + length)


def said(found: Found) -> str:
    """A match in words."""
    options = found.windows.options
    words = [f"window {' x '.join(str(n) for n in options['window'])}"]
    for name in ("stride", "dilation"):
        if any(n != 1 for n in options[name]):
            words.append(f"{name} {' x '.join(str(n) for n in options[name])}")
    words += [f"border {options['border']}", f"{found.mixes} mixes" if found.mixes > 1 else "1 mix"]
    return ", ".join([*words, *(["overlaps summed in place"] if found.fold is not None else [])])


@dataclass(frozen=True)
class RaiseNeighborhood:
    """Windows mixed by given weights become neighborhood_apply; near misses say why."""

    name: ClassVar[str] = "raise-neighborhood"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference":
            return program
        edit = None
        written: dict[fx.Node, fx.Node] = {}
        left: set[fx.Node] | None = None
        for node in program.graph.nodes:
            if node.op != "call_function" or next(mixings(node), None) is None:
                continue
            left = attentions(program) if left is None else left
            found = None if node in left else match(program, node)
            if isinstance(found, str):
                notes.miss(node, RULE, found)
            if not isinstance(found, Found):
                continue
            edit = edit or program.edit()
            written |= write(edit, node, found)
            notes.did(node, RULE, said(found))
        if edit is None:
            return program
        follow_strides(edit, moved(written))
        return edit.finish(self.name)
