"""Splits attention whose probabilities are mixed with others, so that each part is an attention of its own.

    a = g softmax(q k^T) + f softmax(positions)                  s = softmax(q k^T) v
    a = a / sum(a, -1)                                    ->     p = rows (columns v)
    y = a v                                                      y = (g s + f p) / (g + f)

ConViT's gated positional self-attention is the case in point. Rows of a softmax sum to 1, which gives the divisor.
Probabilities that do not depend on the input are computed once; where they are a product of one matrix along the map's
rows and one along its columns, as softmax of squared distances is, they are applied as these two. Never split:
probabilities that something else reads, or that are mixed by more than one number for each query and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.match import values
from compiled_attn.passes.match.axes import fresh, is_one, shape
from compiled_attn.passes.match.positions import Numbering
from compiled_attn.passes.match.scores import Scores, climb
from compiled_attn.passes.match.softmax import softmax
from compiled_attn.passes.match.table import ULPS
from compiled_attn.passes.strides import follow_strides, moved

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """factor * probabilities; factor has one number a row, None for 1.

    known: the probabilities [H, N, M] where they do not depend on the input, else None.  made_from: what from.
    """

    probabilities: fx.Node
    factor: fx.Node | None
    known: torch.Tensor | None
    made_from: tuple[str, ...]


@dataclass(frozen=True)
class Mixture:
    """(sum of the terms) @ v.  divided: by the sum of its rows.  turned: written as v^T times its transpose."""

    terms: tuple[Term, ...]
    v: fx.Node
    divided: bool
    turned: bool


def match(program: Program, node: fx.Node) -> Mixture | None:
    """The mixture of probabilities that a product with v takes; None for any other product."""
    if node.target is not aten.matmul.default or node.meta["val"].dim() != 4:
        return None
    left: Any = node.args[0]
    right: Any = node.args[1]
    turned = right.target is aten.transpose.int and {d % 4 for d in right.args[1:]} == {2, 3}
    found = _mixture(program, right.args[0], left, turned=True) if turned else None
    return found or _mixture(program, left, right, turned=False)


def _mixture(program: Program, mixed: fx.Node, v: fx.Node, *, turned: bool) -> Mixture | None:
    numbering = Numbering.of(program, [mixed])
    if numbering is None:
        return None
    while len(values.readers(mixed)) == 1 and (values.inactive_dropout(mixed) or mixed.target is aten.clone.default):
        mixed = mixed.args[0]  # type: ignore[assignment]
    total = _total(mixed)
    summed = mixed if total is None else total
    allowed = 1 if total is None else 2
    if summed.target is not aten.add.Tensor or summed.kwargs or len(values.readers(summed)) != allowed:
        return None
    if len(values.readers(mixed)) != 1 or not all(values.is_tensor(a) for a in summed.args):
        return None
    terms = [_term(program, a, numbering) for a in summed.args]  # type: ignore[arg-type]
    found = tuple(t for t in terms if t is not None)
    if len(found) != 2 or all(t.known is not None for t in found):
        return None
    if len(shape(v)) != 4 or any(t.known is not None and t.known.shape[0] != shape(v)[1] for t in found):
        return None
    return Mixture(found, v, total is not None, turned)


def _total(node: fx.Node) -> fx.Node | None:
    """What a node divides by the sums of its own rows."""
    if node.target is not aten.div.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    top: Any = node.args[0]
    bottom: Any = node.args[1]
    kept = bottom.target is aten.unsqueeze.default and bottom.args[1] in (-1, 3)
    total = bottom.args[0] if kept else bottom
    if total.target is not aten.sum.dim_IntList or total.args[0] is not top or total.args[1] not in ([-1], [3]):
        return None
    return top if values.argument(total, 2, "keepdim", False) is not kept else None


def _term(program: Program, node: fx.Node, numbering: Numbering) -> Term | None:
    """A summand as one number a row times probabilities."""
    factor = None
    if node.target is aten.mul.Tensor and all(values.is_tensor(a) for a in node.args):
        if len(values.readers(node)) != 1:
            return None
        sides: Any = node.args
        if any(len(shape(side)) != 4 for side in sides):
            return None
        factor, node = sides if is_one(shape(sides[0])[-1]) else sides[::-1]
        if not is_one(shape(factor)[-1]):
            return None
    found = softmax(node)
    if found is None or found.dim != 3 or len(shape(node)) != 4 or len(values.readers(node)) != 1:
        return None
    constant = numbering.constant(node)
    if constant is not None:
        alike = torch.equal(constant, constant[:1].expand_as(constant))
        return Term(node, factor, constant[0], numbering.made_from(node)) if alike else None
    own = climb(program, found, found.scores, fresh(shape(node)))
    return Term(node, factor, None, ()) if isinstance(own, Scores) else None


def factors_of(known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """rows [H, Y, Y] and columns [H, X, X] whose product is probabilities [H, Y X, Y X]; None where there are none."""
    heads, n, m = known.shape
    for height in _divisors(n) if n == m else ():
        width = n // height
        table = known.double().view(heads, height, width, height, width)
        rows, columns = table.sum(4)[:, :, 0], table.sum(3)[:, 0]  # of the first column's and the first row's queries
        product = rows.view(heads, height, 1, height, 1) * columns.view(heads, 1, width, 1, width)
        if bool(((product - table).abs() <= ULPS * table.amax((3, 4), keepdim=True)).all()):
            return rows.to(known.dtype), columns.to(known.dtype)
    return None


def _divisors(n: int) -> Iterator[int]:
    """Divisors but for 1 and n, those near the square root first."""
    yield from sorted((d for d in range(2, n) if n % d == 0), key=lambda d: abs(d * d - n))


def write(edit: Edit, node: fx.Node, found: Mixture) -> tuple[fx.Node, str]:
    """Puts the sum of the parts' products in the place of the product; tells it and what the known part became."""
    new = edit.node_of[node]
    said = "probabilities added as another product"
    with edit.graph.inserting_before(new):

        def call(target: Any, *args: Any) -> fx.Node:
            return edit.call(target, args, like=new)

        parts: list[fx.Node] = []
        divisor: Any = 0.0
        v = edit.node_of[found.v]
        if found.turned:
            v = call(aten.transpose.int, v, 2, 3)
        for term in found.terms:
            if term.known is None:
                part = call(aten.matmul.default, edit.node_of[term.probabilities], v)
            else:
                part, said = _applied(edit, new, term, v)
            factor = None if term.factor is None else edit.node_of[term.factor]
            parts.append(part if factor is None else call(aten.mul.Tensor, part, factor))
            if factor is None:
                divisor = call(aten.add.Tensor, divisor, 1.0) if isinstance(divisor, fx.Node) else divisor + 1.0
            else:
                divisor = call(aten.add.Tensor, factor, divisor) if divisor else factor
        out = call(aten.add.Tensor, *parts)
        if found.divided:
            out = call(aten.div.Tensor, out, divisor)
        if found.turned:
            out = call(aten.transpose.int, out, 2, 3)
    edit.replace(new, out)
    return out, said


def _applied(edit: Edit, like: fx.Node, term: Term, v: fx.Node) -> tuple[fx.Node, str]:
    """Known probabilities times v [B, H, M, D]."""
    known = term.known
    if known is None:
        raise ValueError("these probabilities depend on the input")  # the caller asked

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call(target, args, like=like)

    def kept(name: str, value: torch.Tensor) -> fx.Node:
        return edit.constant(f"{like.name}_{name}", value, made_from=term.made_from)

    factors = factors_of(known)
    if factors is None:
        return call(aten.matmul.default, kept("probabilities", known), v), "known probabilities as a matrix"
    rows, columns = factors
    heads, depth = v.meta["val"].shape[1], v.meta["val"].shape[3]
    height, width = rows.shape[1], columns.shape[1]
    across = call(aten.reshape.default, v, [-1, heads, height, width, depth])
    across = call(aten.matmul.default, kept("columns", columns.unsqueeze(1)), across)
    across = call(aten.reshape.default, across, [-1, heads, height, width * depth])
    down = call(aten.matmul.default, kept("rows", rows), across)
    result = call(aten.reshape.default, down, [-1, heads, height * width, depth])
    return result, f"known probabilities as {height} rows and {width} columns"


@dataclass(frozen=True)
class SplitMixedAttention:
    """Mixed probabilities become attention of their own and products with known matrices."""

    name: ClassVar[str] = "split-mixed-attention"
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        del target
        if program.mode != "inference":
            return program
        edit = None
        written: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            found = match(program, node) if node.op == "call_function" else None
            if found is None:
                continue
            edit = edit or program.edit()
            out, said = write(edit, node, found)
            written[out] = node
            notes.did(node, self.name, said)
        if edit is None:
            return program
        follow_strides(edit, moved(written))
        return edit.finish(self.name)
