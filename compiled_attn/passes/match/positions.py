"""Where each element of a value comes from: ops that only move elements, run on a tensor of element numbers.

Rolls, partitions into windows, unfolds, paddings, heads and their inverses can be written in many ways; what they do to
numbers tells them apart from everything else. Elements count from 1, so that 0 is what padding puts in; the numbers are
kept as float64, which unfold knows how to move and which is exact up to 2^53.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.program import Program
from compiled_attn.passes.fold_constants import constant_placeholders

aten = torch.ops.aten
MOVES = {
    operator.getitem,
    aten.alias.default,
    aten.chunk.default,
    aten.clone.default,
    aten.expand.default,
    aten.flip.default,
    aten.im2col.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.permute.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unbind.int,
    aten.unfold.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
# where ops that take or move places along a dimension name it, and which it is where they do not; []: all
ALONG: dict[Any, tuple[int, Any]] = {
    aten.chunk.default: (2, 0),
    aten.flip.default: (1, []),
    aten.index_select.default: (1, 0),
    aten.roll.default: (2, []),
    aten.select.int: (1, 0),
    aten.slice.Tensor: (1, 0),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.unbind.int: (1, 0),
    aten.unfold.default: (1, 0),
    aten.cat.default: (1, 0),
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
# ops that take the number of pictures as a length or a place, and what they say of one picture is the same for all
COUNTS = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
}
BATCH = 2  # pictures that element numbers are followed for, where the batch is symbolic


def moves(node: fx.Node) -> bool:
    """Whether a node only moves elements of its first argument, and may put zeros between them."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return moves(node.args[0])  # type: ignore[arg-type]
    return node.target in MOVES or node.target is aten.cat.default or _zero_pad(node) or _folds_apart(node)


def pads(node: fx.Node) -> bool:
    """Whether a node puts zeros beside its elements; padding by nothing is no padding."""
    return node.target in PADS and any(node.args[1])  # type: ignore[arg-type]


def _folds_apart(node: fx.Node) -> bool:
    """Whether a node puts windows back into a map where none lies over another, so that nothing is summed."""
    if node.target is not aten.col2im.default:
        return False
    _, _, kernel, dilation, _, stride = node.args
    return list(dilation) == [1, 1] and all(s >= k for s, k in zip(stride, kernel, strict=True))  # type: ignore


def _zero_pad(node: fx.Node) -> bool:
    mode, value = (*node.args[2:], "constant", None)[:2] if node.target is aten.pad.default else ("constant", None)
    if node.target is aten.constant_pad_nd.default and len(node.args) > 2:
        value = node.args[2]
    value = node.kwargs.get("value", value)
    return node.target in PADS and node.kwargs.get("mode", mode) == "constant" and not value


def moved(node: fx.Node) -> list[fx.Node]:
    """The nodes whose elements a moving node moves."""
    first: Any = node.args[0]
    return [first] if isinstance(first, fx.Node) else [n for n in first if isinstance(n, fx.Node)]


class Numbering:
    """Runs moving ops on element numbers, and constants on their values, with `BATCH` for a symbolic batch."""

    def __init__(self, program: Program, symbol: Any) -> None:
        self.symbol = symbol
        self._names, self._tensors = constant_placeholders(program), program.tensors()
        self._origin = program.origin
        self._values: dict[fx.Node, Any] = {}

    @classmethod
    def of(cls, program: Program, nodes: Sequence[fx.Node]) -> Numbering | None:
        """For values whose sizes hold one symbol or none; None where they hold several."""
        symbols: set[Any] = set()
        for size in (n for node in nodes for n in node.meta["val"].shape):
            symbols |= set() if isinstance(size, int) else _torch.expression(size).free_symbols
        tokens = [node.meta["val"].shape[2:] for node in nodes]
        if len(symbols) > 1 or any(not isinstance(n, int) for sizes in tokens for n in sizes):
            return None
        return cls(program, next(iter(symbols), None))

    def size(self, value: Any) -> int | None:
        """A size as a number; None where another symbol is in it."""
        expression = _torch.expression(value)
        if isinstance(expression, int):
            return expression
        number = expression.subs(self.symbol, BATCH) if self.symbol is not None else expression
        return int(number) if number.is_number else None

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        sizes = [self.size(n) for n in node.meta["val"].shape]
        return None if any(n is None for n in sizes) else tuple(n for n in sizes if n is not None)

    def grows(self, node: fx.Node) -> bool:
        """Whether a value holds so many times more elements as there are more pictures, along one dimension."""
        if self.symbol is None:
            return True
        sizes = [_torch.expression(n) for n in node.meta["val"].shape]
        growing = [n for n in sizes if not isinstance(n, int) and not n.is_number]
        return len(growing) == 1 and (growing[0] / self.symbol).is_number

    def root(self, node: fx.Node, *, through_pads: bool = True) -> fx.Node | None:
        """The one value whose elements `node` moves; None where there are several."""
        roots: dict[fx.Node, None] = {}
        pending, met = [node], {node}
        while pending:
            current = pending.pop()
            if moves(current) and (through_pads or not pads(current)):
                fresh = [n for n in moved(current) if n not in met]
                met.update(fresh)
                pending += fresh
            elif not self._zeros(current):
                roots[current] = None
        return next(iter(roots)) if len(roots) == 1 else self._only(node, list(roots))

    def _only(self, node: fx.Node, roots: list[fx.Node]) -> fx.Node | None:
        """The one of several joined values that all of `node` comes from."""
        shapes = [self.shape(r) if isinstance(r.meta.get("val"), torch.Tensor) else None for r in roots]
        if any(s is None for s in shapes):
            return None
        sized = enumerate(zip(roots, shapes, strict=True), start=1)
        found = self.run(node, {r: torch.full(s, float(i), dtype=torch.float64) for i, (r, s) in sized if s})
        kinds = [] if found is None else found.unique().tolist()
        real = [int(kind) for kind in kinds if kind]
        return roots[real[0] - 1] if len(real) == 1 else None

    def run(self, node: fx.Node, known: dict[fx.Node, torch.Tensor], *, alone: bool = False) -> torch.Tensor | None:
        """What `node` holds, from what the values in `known` hold; None where a size is unknown or does not fit.

        alone: values that are not known stand as zeros, where none of their elements come to `node`.
        """
        memo: dict[fx.Node, Any] = dict(known)
        found = self._moved(node, memo, alone)
        return found if isinstance(found, torch.Tensor) else None

    def _moved(self, node: fx.Node, memo: dict[fx.Node, Any], alone: bool) -> Any:
        if node in memo:
            return memo[node]
        memo[node] = None
        if not moves(node):
            shape = self.shape(node) if alone else None
            memo[node] = self.constant(node) if shape is None else torch.zeros(shape, dtype=torch.float64)
            return memo[node]
        if self.symbol is not None and _picks_pictures(node):
            return None
        values = {n: self._moved(n, memo, alone) for n in moved(node)}
        if any(v is None for v in values.values()):
            return None
        values |= {n: self._known(n) for n in node.all_input_nodes if n not in values}
        memo[node] = _call(node, values)
        return memo[node]

    def _known(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        return self.constant(node) if isinstance(value, torch.Tensor) else self.size(value)

    def _zeros(self, node: fx.Node) -> bool:
        value = self.constant(node)
        return value is not None and not bool(value.any())

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node that follows from the program's own tensors and the batch."""
        found = self._constant(node)
        return found if isinstance(found, torch.Tensor) else None

    def _constant(self, node: fx.Node) -> Any:
        if node in self._values:
            return self._values[node]
        self._values[node] = None
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            self._values[node] = self.size(value)
        elif node.op == "placeholder":
            name = self._names.get(node.name)
            self._values[node] = None if name is None else self._tensors.get(node.name)
        elif _pure(node) and not _computes_with_sizes(node):
            inputs = {n: self._constant(n) for n in node.all_input_nodes}
            if all(v is not None for v in inputs.values()):
                self._values[node] = _call(node, inputs)
        return self._values[node]

    def made_from(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the program's tensors that a constant follows from."""
        names: dict[str, None] = {}
        pending, met = [node], {node}
        while pending:
            current = pending.pop()
            name = self._names.get(current.name) if current.op == "placeholder" else None
            if name is not None:
                names.update(dict.fromkeys(self._origin.get(name, (name,))))
            fresh = [n for n in current.all_input_nodes if n not in met]
            met.update(fresh)
            pending += fresh
        return tuple(sorted(names))


def _pure(node: fx.Node) -> bool:
    """Whether a node's value follows from its arguments alone."""
    target = node.target
    if target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _picks_pictures(node: fx.Node) -> bool:
    """Whether a node takes or moves places along a dimension of symbolic size: it does another thing at each batch."""
    args: Any = node.args
    first = args[0]
    if node.target in ALONG:
        at, default = ALONG[node.target]
        dims = args[at] if len(args) > at else node.kwargs.get("dims", default)
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
    elif node.target is aten.index.Tensor:
        dims = [d for d, index in enumerate(args[1]) if index is not None]
    else:
        return False
    for source in first if isinstance(first, (list, tuple)) else [first]:
        sizes = source.meta["val"].shape
        along = dims or range(len(sizes))
        if any(not isinstance(sizes[d], int) for d in along) and not _same_shape(source, node):
            return True
    return False


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether a slice takes all."""
    value = b.meta.get("val")
    return b.target is aten.slice.Tensor and str(a.meta["val"].shape) == str(value.shape)  # type: ignore[union-attr]


def _computes_with_sizes(node: fx.Node) -> bool:
    """Whether a symbol is one of the numbers that a value follows from, so that it is another at each batch."""
    numbers = (*node.args, *node.kwargs.values())
    symbolic = any(isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.SymInt) for n in numbers)
    return symbolic and isinstance(node.meta.get("val"), torch.Tensor) and node.target not in COUNTS


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """A node's op on the values of its arguments; None where they do not fit."""
    if any(v is None for v in values.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    target: Any = aten.reshape.default if node.target in VIEWS else node.target  # memory may lie otherwise here
    try:
        with torch.no_grad():
            return target(*args, **kwargs)
    except RuntimeError:
        return None


def numbered(*sizes: int) -> torch.Tensor:
    """1, 2, 3, ... in the shape, as float64."""
    return torch.arange(1, math.prod(sizes) + 1, dtype=torch.float64).view(sizes)
