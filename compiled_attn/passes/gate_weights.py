"""Puts computed factors of the channels into the weights of the linear map that alone reads them: gates, mostly.

    g = sigmoid(...)[1, 1, 1, K]
    y = linear(mul(x[1, Y, X, K], g), w[N, K], b)    ->    y = linear(x, mul(w, reshape(g, [K])), b)

Squeeze and excitation, global response norm, and whatever else multiplies a map channel by channel by numbers that are
the same for all of its rows, sums with constants included. The map is not written again; the weights are, which are
fewer numbers: only maps of at least `FEWER` times as many rows as there are outputs are taken. PackLinear knows such
weights, and packs what is constant in them.

Never touches a factor of more than one picture, nor maps that are read by anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.passes.fold_constants import constant_placeholders
from compiled_attn.passes.pack_linear import ours_is_ahead

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
RULE = "gate-weights"
FEWER = 2  # rows of the map for each output, from which fewer numbers are written
Expression = Any  # a number, a node of one number a channel, or (operator, expression, expression)


@dataclass(frozen=True)
class Gated:
    """source * factor + shift, channel by channel; shift None for nothing."""

    source: fx.Node
    factor: Expression = 1.0
    shift: Expression | None = None

    def times(self, other: fx.Node) -> Gated:
        factor = other if self.factor == 1.0 else (aten.mul.Tensor, self.factor, other)
        return Gated(self.source, factor, None if self.shift is None else (aten.mul.Tensor, self.shift, other))

    def plus(self, other: fx.Node) -> Gated:
        return Gated(self.source, self.factor, _sum(self.shift, other))

    def joined(self, other: Gated) -> Gated | None:
        """The sum with another map of the same source."""
        if self.source is not other.source:
            return None
        return Gated(self.source, _sum(self.factor, other.factor), _sum(self.shift, other.shift))


def _sum(a: Expression | None, b: Expression | None) -> Expression | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if isinstance(a, float) and isinstance(b, float) else (aten.add.Tensor, a, b)


def gated(node: fx.Node, channels: int) -> Gated:
    """A map as another one times factors plus shifts, as far up as each is read once."""
    found = _gated(node, channels) if len(node.users) == 1 else None
    return Gated(node) if found is None else found


def _gated(node: fx.Node, channels: int) -> Gated | None:
    args: Any = node.args
    if node.kwargs or node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.addcmul.default):
        return None
    *shift, a, b = args
    if any(not _by_channel(s, channels) for s in shift):
        return None
    for one, other in ((a, b), (b, a)):
        if not _alike(one, node) or not _by_channel(other, channels):
            continue
        inner = gated(one, channels)
        if node.target is aten.add.Tensor:
            return inner.plus(other)
        return inner.times(other).plus(shift[0]) if shift else inner.times(other)
    if node.target is aten.add.Tensor and _alike(a, node) and _alike(b, node):
        return gated(a, channels).joined(gated(b, channels))
    return None


def _alike(x: Any, node: fx.Node) -> bool:
    a, b = x.meta.get("val") if isinstance(x, fx.Node) else None, node.meta["val"]
    if not isinstance(a, torch.Tensor) or a.dim() != b.dim() or a.dtype != b.dtype:
        return False
    return all(_torch.statically_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _by_channel(x: Any, channels: int) -> bool:
    """Whether it is one number for each channel, the same for every row."""
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return False
    *leading, last = value.shape
    return last == channels and all(_torch.statically_true(n == 1) for n in leading)


def steady(program: Program) -> set[fx.Node]:
    """The program's tensors that never change, and what is made from them alone."""
    names = constant_placeholders(program)
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        made = node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if made or (node.op == "placeholder" and node.name in names):
            found.add(node)
    return found


def refuses(node: fx.Node, found: Gated, constants: set[fx.Node], target: Target) -> str | None:
    """Because of what a linear map's weights do not take the factors of what it reads."""
    weight, bias = _weights(node)
    rows = 1
    for size in found.source.meta["val"].shape[:-1]:
        rows *= size
    named = [n for n in (weight, bias) if isinstance(n, fx.Node)]
    if any(n.op != "placeholder" or n not in constants for n in named) or weight.meta["val"].dim() != 2:
        return "its weight or bias is computed"
    if not isinstance(rows, int):
        return "its rows are symbolic"
    outer, inner = weight.meta["val"].shape
    kinds = {n.meta["val"].dtype for n in (*named, found.source, *_nodes(found.factor), *_nodes(found.shift))}
    if len(kinds) != 1:
        return f"its operands are {', '.join(sorted(str(kind) for kind in kinds))}"
    if rows < FEWER * outer:
        return f"its map has {rows} rows, its weight {outer}: the map is written faster"
    if not ours_is_ahead(inner, outer, weight.meta["val"].dtype, target):
        return f"oneDNN serves {inner} x {outer} on target {target.name}, from weights that stay"
    if not constants.issuperset(_nodes(found.shift)):
        return "what is added to its map is computed"
    return None


def _weights(linear: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    given: Any = (*linear.args, None)
    return given[1], given[2]


def _nodes(expression: Expression) -> list[fx.Node]:
    if isinstance(expression, tuple):
        return [n for part in expression[1:] for n in _nodes(part)]
    return [expression] if isinstance(expression, fx.Node) else []


def write(edit: Edit, old: fx.Node, found: Gated) -> fx.Node:
    """The linear map on the source, with weights that hold the factors, and a bias that holds the shifts."""
    node = edit.node_of[old]
    weight, bias = _weights(node)
    outer, inner = weight.meta["val"].shape

    def written(expression: Expression) -> Any:
        """One number a channel, [K]; or the number that it is for all."""
        if isinstance(expression, tuple):
            operator, *parts = expression
            a, b = (written(p) for p in parts)
            return edit.call(operator, (a, b) if isinstance(a, fx.Node) else (b, a), like=node)
        if not isinstance(expression, fx.Node):
            return expression
        return edit.call(aten.reshape.default, (edit.node_of[expression], [inner]), like=node)

    with edit.graph.inserting_before(node):
        if found.shift is not None:
            row = edit.call(aten.reshape.default, (written(found.shift), [1, inner]), like=node)
            row = edit.call(aten.linear.default, (row, weight, bias), like=node)
            bias = edit.call(aten.reshape.default, (row, [outer]), like=node)
        gates = edit.call(aten.mul.Tensor, (weight, written(found.factor)), like=node)
        return edit.call(aten.linear.default, (edit.node_of[found.source], gates, bias), like=node)


@dataclass(frozen=True)
class GateWeights:
    """Computed factors of the channels go into the weights of the linear maps behind them."""

    name: ClassVar[str] = RULE
    exact: ClassVar[bool] = True

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if program.mode != "inference" or target.kind != "cpu":
            return program
        constants = steady(program)
        edit: Edit | None = None
        for node in program.graph.nodes:
            if node.target is not aten.linear.default or not isinstance(node.args[0], fx.Node):
                continue
            channels = node.args[0].meta["val"].shape[-1]
            found = gated(node.args[0], channels)
            if constants.issuperset(_nodes(found.factor)):
                continue
            because = refuses(node, found, constants, target)
            if because is not None:
                notes.miss(node, RULE, because)
                continue
            edit = edit or program.edit()
            edit.replace(edit.node_of[node], write(edit, node, found))
            notes.did(node, RULE, f"factors of {channels} channels")
        return edit.finish(self.name) if edit is not None else program
