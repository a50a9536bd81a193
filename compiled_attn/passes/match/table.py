"""What is added to the scores of an attention in groups, as the op takes it: a table of distances, logits of the query.

bias + mask               ->  visible pairs, and a table [H, 2 wy - 1, 2 wx - 1] if nothing but distance counts
moved(q @ heights^T) +    ->  logits [B, Y, X, H, 2 wy - 1 + 2 wx - 1], each axis's table of embeddings times q
    moved(q @ widths^T)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from compiled_attn.passes.match.positions import Numbering, moved, moves, numbered
from compiled_attn.passes.match.tokens import Tokens, origin_of, tokens_of
from compiled_attn.passes.match.windows import Pattern

aten = torch.ops.aten
HIDDEN = -80.0  # what is this far below the rest has a probability below 1e-34
ULPS = 2.0**-21  # a function of equal numbers may differ in its last bits from place to place


@dataclass(frozen=True)
class Logits:
    """Products of queries with rows of a constant `table` [R, width]: row [groups, n, m], -1 for none."""

    tokens: Tokens
    table: fx.Node
    flipped: bool  # the table as [width, R]
    row: torch.Tensor


@dataclass(frozen=True)
class Added:
    """What is added to the scores. value [groups, n, m] of the constant parts (None: none), `names` what it is made
    from; logits: the parts that depend on queries."""

    value: torch.Tensor | None
    names: tuple[str, ...]
    logits: tuple[Logits, ...]

    def visible(self, shape: tuple[int, ...]) -> torch.Tensor:
        """[groups, n, m]: what no mask hides."""
        if self.value is None:
            return torch.ones(math.prod(shape[:-2]), *shape[-2:], dtype=torch.bool)
        if self.value.dtype == torch.bool:
            return self.value
        return self.value > self.value.amax((1, 2), keepdim=True) + HIDDEN

    def condition(self, visible: torch.Tensor, groups: torch.Tensor) -> str:
        """What the equality rests on besides rounding; visible [W, n, m] is what no mask hides."""
        if self.value is None or self.value.dtype == torch.bool:
            return ""
        hidden = self.value[groups[0]][:, ~visible]
        if not hidden.numel() or not bool(hidden.isfinite().any()):
            return ""
        return f"pairs hidden by {hidden.max():.3g} count nothing"


@dataclass(frozen=True)
class AxisLogits:
    """The logits of one axis: the table's row for each distance."""

    logits: Logits
    rows: torch.Tensor


def added_by(mask: fx.Node | None, numbering: Numbering, q: Tokens, shape: tuple[int, ...]) -> Added | str:
    """What `mask` adds to scores of `shape` [d0, d1, n, m]."""
    if mask is None:
        return Added(None, (), ())
    whole = numbering.constant(mask)
    if whole is not None:
        value = whole.expand(shape).reshape(-1, *shape[2:])
        return Added(value if value.dtype == torch.bool else value.float(), numbering.made_from(mask), ())
    value, names, logits = torch.zeros(()), set(), []
    for leaf, path in _terms(mask, ()):
        constant = numbering.constant(leaf)
        if constant is not None:
            part = _along(path, leaf, constant.double(), numbering)
            if part is None:
                return f"{leaf.name} is not spread over the scores by moving elements"
            value = value + part
            names |= set(numbering.made_from(leaf))
            continue
        found = _logits(leaf, path, numbering, q, shape)
        if isinstance(found, str):
            return found
        logits.append(found)
    known = value.expand(shape).reshape(-1, *shape[2:]).float() if names else None
    return Added(known, tuple(sorted(names)), tuple(logits))


def _terms(node: fx.Node, path: tuple[fx.Node, ...]) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The summands of a value, each with the moving ops between it and the value, nearest to the summand first."""
    if node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args[:2]):
        sides: Any = node.args[:2]
        return [t for side in sides for t in _terms(side, (node, *path))]
    if moves(node) and len(moved(node)) == 1:
        return _terms(moved(node)[0], (node, *path))
    return [(node, path)]


def _along(path: tuple[fx.Node, ...], leaf: fx.Node, value: torch.Tensor, numbering: Numbering) -> torch.Tensor | None:
    """A summand's value where the path ends; sums on the path spread it over their shape."""
    current: fx.Node = leaf
    for node in path:
        if node.target is aten.add.Tensor:
            shape = numbering.shape(node)
            spread: Any = None if shape is None else value.expand(shape)
        else:
            spread = numbering.run(node, {current: value})
        if spread is None:
            return None
        current, value = node, spread
    return value


def _logits(
    leaf: fx.Node, path: tuple[fx.Node, ...], numbering: Numbering, q: Tokens, shape: tuple[int, ...]
) -> Logits | str:
    """A summand that is a product of the queries with a constant, which may stand on either side."""
    unknown = f"{leaf.name}, which is added to its scores, depends on the input and is no product of its queries"
    product = leaf.target in (aten.matmul.default, aten.mm.default, aten.bmm.default)
    if (not product and leaf.target is not aten.linear.default) or len(leaf.args) > 2:
        return unknown
    source, table = leaf.args
    if not isinstance(source, fx.Node) or not isinstance(table, fx.Node):
        return unknown
    exchanged = product and numbering.constant(source) is not None  # table [R, width] @ queries [..., width, n]
    source, table = (table, source) if exchanged else (source, table)
    weights, sizes = numbering.constant(table), numbering.shape(leaf)
    if weights is None or weights.dim() != 2 or sizes is None:
        return unknown
    end = _along(path, leaf, numbered(*sizes), numbering)
    if end is None:
        return f"{leaf.name} is not spread over its scores by moving elements"
    element = end.long().expand(shape).reshape(-1, *shape[2:]) - 1  # [groups, n, m]
    rows = _rows_of(source, numbering, q, exchanged)
    if isinstance(rows, str):
        return rows
    tokens, row_batch, row_spot, row_head = rows
    if exchanged:
        made = element // (sizes[-2] * sizes[-1]) * sizes[-1] + element % sizes[-1]
        entry = element // sizes[-1] % sizes[-2]
    else:
        made, entry = element // sizes[-1], element % sizes[-1]
    wanted = q.batch.view(-1, 1, 1), q.spot.unsqueeze(2), q.head.view(-1, 1, 1)
    for have, want in zip((row_batch, row_spot, row_head), wanted, strict=True):
        if not bool(((have[made.clamp(min=0)] == want) | (element < 0)).all()):
            return f"{leaf.name} adds products of other queries to its scores"
    return Logits(tokens, table, product and not exchanged, torch.where(element >= 0, entry, -1))


def _rows_of(
    source: fx.Node, numbering: Numbering, q: Tokens, columns: bool
) -> tuple[Tokens, torch.Tensor, torch.Tensor, torch.Tensor] | str:
    """Queries in the order of a product's rows, or of its `columns`: batch, place and head of each."""
    origin = origin_of(source, numbering)
    if isinstance(origin, str):
        return origin
    numbers = origin.numbers.transpose(-1, -2) if columns else origin.numbers
    rows = numbers.reshape(-1, 1, 1, numbers.shape[-1])
    if origin.steps:
        return f"{source.name} changes its queries before they meet the table of distances"
    found = tokens_of(replace(origin, numbers=rows), q)
    if isinstance(found, str):
        return found
    if found.spatial != q.spatial or not torch.equal(found.channels, q.channels):
        return f"{source.name} holds other tokens or channels than its queries"
    return found, found.batch, found.spot[:, 0], found.head


def bias_table(
    added: Added, pattern: Pattern, groups: torch.Tensor, entries: tuple[int, ...]
) -> torch.Tensor | str | None:
    """The table [H, *entries], None where it is 0.  groups [B, H, W]: the groups of each picture, head and window."""
    if added.value is None or added.value.dtype == torch.bool:
        return None
    values = added.value[groups[0]]  # [H, W, n, m]
    if any(not torch.equal(added.value[other], values) for other in groups[1:]):
        return "its bias differs between pictures"
    heads, seen = len(values), pattern.code >= 0
    table = torch.zeros(heads, math.prod(entries))
    table[:, pattern.code[seen]] = values[:, seen]
    error = (values[:, seen] - table[:, pattern.code[seen]]).abs()
    if bool((error > ULPS * table.abs().max()).any()):
        return "its bias is no function of the distance between two tokens"
    return table.view(heads, *entries) if bool(table.any()) else None


def axis_logits(
    added: Added, pattern: Pattern, groups: torch.Tensor, entries: tuple[int, ...]
) -> list[AxisLogits] | str | None:
    """One table of embeddings for each axis, in order; None where nothing depends on the query."""
    if not added.logits:
        return None
    found: list[AxisLogits | None] = [None] * len(entries)
    for logits in added.logits:
        row = logits.row[groups[0]]  # [H, W, n, m]
        if not bool((row == row[:1]).all()):
            return "its logits differ between heads"
        for i, (code, count) in enumerate(zip(pattern.axes, entries, strict=True)):
            rows = torch.full((count,), -1)
            rows[code[code >= 0]] = row[0][code >= 0]
            if found[i] is None and bool((rows[code.clamp(min=0)] == row[0])[code >= 0].all()):
                found[i] = AxisLogits(logits, rows)
                break
        else:
            return "its logits are no function of the distance along one axis"
    if any(f is None for f in found):
        return "its logits leave out an axis"
    return [f for f in found if f is not None]
